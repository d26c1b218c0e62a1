"""Models on point clouds: from points to cells, through any encoder of cells, to boxes or to a class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regard.layers.detection import CenterHead, DynamicVFE
from regard.layouts.points import Cells, grid_size, max_of, mean_of, sample_of, to_grid, voxelize
from regard.layouts.ragged import check_offsets
from regard.skeletons.base import Model, make_head


class CellModel(Model):
    """Points -> cells -> point_encoder -> encoder; what follows is a subclass's.

    Args:
        point_encoder: points and cells -> `(M, C)`.
        encoder: `(x (M, C), coordinates (M, 3) z y x, counts)` -> `(M, C)`.
        voxel_size, point_range: of the cells, x y z; lowest then highest. Points outside are left out.
        point_chans: columns of a point, x y z first.
    """

    def __init__(
        self,
        *,
        point_encoder: DynamicVFE,
        encoder: nn.Module,
        voxel_size: Sequence[float],
        point_range: Sequence[float],
        point_chans: int,
    ) -> None:
        super().__init__()
        self.voxel_size, self.point_range = tuple(voxel_size), tuple(point_range)
        self.point_chans = point_chans
        self.point_encoder, self.encoder = point_encoder, encoder

    def voxelize(self, points: Tensor, offsets: Tensor) -> Cells:
        """Check the input at the door and find the cell of each point."""
        if points.dim() != 2 or points.shape[1] != self.point_chans or not points.is_floating_point():
            raise ValueError(
                f"points must be float (N, {self.point_chans}), x y z first, got {points.dtype} {tuple(points.shape)}."
            )
        check_offsets("offsets", offsets, len(points))
        cells = voxelize(points, offsets, self.voxel_size, self.point_range)
        if not len(cells.coordinates):
            raise ValueError(f"no point lies in the range {self.point_range}: check the units and the frame of points.")
        return cells

    def encode(self, points: Tensor, offsets: Tensor) -> tuple[Tensor, Cells]:
        """Points `(N, point_chans)`, offsets `(B + 1,)` -> the cells, encoded `(M, C)`, and where they are."""
        cells = self.voxelize(points, offsets)
        return self.encoder(self.point_encoder(points, cells), cells.coordinates, cells.counts), cells


class CellDetector(CellModel):
    """cells -> map from above -> backbone -> neck -> head. The encoder's cells must not share y and x.

    Args:
        backbone: `(B, H, W, C)` -> maps. neck: maps -> one map. head: predictions, loss and decoding.
        cells: arguments of `CellModel`.
    """

    def __init__(self, *, backbone: nn.Module, neck: nn.Module, head: CenterHead, **cells: Any) -> None:
        super().__init__(**cells)
        self.num_classes = head.num_classes
        self.backbone, self.neck, self.head = backbone, neck, head

    def forward_features(self, points: Tensor, offsets: Tensor) -> Tensor:
        """Points `(N, in_chans)`, offsets `(B + 1,)` -> encoded cells as a map from above `(B, H, W, C)`."""
        x, cells = self.encode(points, offsets)
        nx, ny, _ = grid_size(self.voxel_size, self.point_range)
        return to_grid(x, cells.coordinates[:, 1:], cells.counts, (ny, nx))

    def forward(self, points: Tensor, offsets: Tensor) -> dict[str, Tensor]:
        """Points `(N, in_chans)`, offsets `(B + 1,)` -> the head's maps `(B, H, W, width)` by name."""
        return self.head(self.neck(self.backbone(self.forward_features(points, offsets))))

    def loss(self, predictions: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        """The head's loss against `boxes` (B, K, 7) and `labels` (B, K), of which the first `counts` (B,) are real."""
        counts = batch["counts"].tolist()
        boxes = [some[:count] for some, count in zip(batch["boxes"], counts, strict=True)]
        labels = [some[:count] for some, count in zip(batch["labels"], counts, strict=True)]
        return self.head.loss(predictions, boxes, labels)

    def decode(self, predictions: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """For each sample `boxes` (D, 7), `scores` (D,), `labels` (D,)."""
        with torch.no_grad():
            return self.head.decode(predictions)


class CellClassifier(CellModel):
    """Points with features -> cells -> mean and maximum over the cells of each cloud -> LayerNorm -> linear classifier.

    Args:
        dim: channels of the encoder. num_classes: 0 leaves the pooled features.
        cells: arguments of `CellModel`; a point is its coordinates followed by its features.
    """

    def __init__(self, dim: int, num_classes: int, **cells: Any) -> None:
        super().__init__(**cells)
        self.num_features = 2 * dim
        self.norm = nn.LayerNorm(self.num_features)
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a fresh one; 0 classes leave the pooled features."""
        self.num_classes = num_classes
        self.head = make_head(self.num_features, num_classes, like=self.norm.weight)

    def forward_features(self, features: Tensor, coordinates: Tensor, offsets: Tensor) -> Tensor:
        """Features `(N, in_chans)` of points at `(N, 3)`, offsets `(B + 1,)` -> `(B, 2 dim)`; 0 for an empty cloud."""
        if coordinates.dim() != 2 or coordinates.shape != (len(features), 3):
            raise ValueError(f"coordinates must be ({len(features)}, 3), x y z, got shape {tuple(coordinates.shape)}.")
        x, cells = self.encode(torch.cat([coordinates, features], 1), offsets)
        sample, clouds = sample_of(cells.counts, x.device), len(cells.counts)
        return torch.cat([mean_of(x, sample, clouds), max_of(x, sample, clouds)], 1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooled features `(B, 2 dim)` -> logits `(B, num_classes)`, or normalised features before the classifier."""
        x = self.norm(x)
        return x if pre_logits else self.head(x)

    def forward(self, features: Tensor, coordinates: Tensor, offsets: Tensor) -> Tensor:
        """Features `(N, in_chans)` of points at `(N, 3)`, offsets `(B + 1,)` -> logits `(B, num_classes)`."""
        return self.forward_head(self.forward_features(features, coordinates, offsets))
