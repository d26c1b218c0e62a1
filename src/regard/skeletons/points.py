"""Models on point clouds: from points to cells, through any encoder of cells, to a map seen from above."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from regard.layers.detection import CenterHead, DynamicVFE
from regard.layouts.points import Cells, grid_size, to_grid, voxelize
from regard.layouts.ragged import check_offsets
from regard.skeletons.base import Model


class CellDetector(Model):
    """cells -> point_encoder -> encoder -> map from above -> backbone -> neck -> head.

    Args:
        point_encoder: points and cells -> `(M, C)`.
        encoder: `(x (M, C), coordinates (M, 3) z y x, counts)` -> `(M, C)`; cells must not share y and x afterwards.
        backbone: `(B, H, W, C)` -> maps. neck: maps -> one map. head: predictions, loss and decoding.
        voxel_size, point_range: of the cells, x y z; lowest then highest.
    """

    def __init__(
        self,
        *,
        point_encoder: DynamicVFE,
        encoder: nn.Module,
        backbone: nn.Module,
        neck: nn.Module,
        head: CenterHead,
        voxel_size: Sequence[float],
        point_range: Sequence[float],
        in_chans: int,
    ) -> None:
        super().__init__()
        self.voxel_size, self.point_range = tuple(voxel_size), tuple(point_range)
        self.in_chans, self.num_classes = in_chans, head.num_classes
        self.point_encoder, self.encoder = point_encoder, encoder
        self.backbone, self.neck, self.head = backbone, neck, head

    def voxelize(self, points: Tensor, offsets: Tensor) -> Cells:
        """Check the input at the door and find the cell of each point."""
        if points.dim() != 2 or points.shape[1] != self.in_chans or not points.is_floating_point():
            raise ValueError(
                f"points must be float (N, {self.in_chans}), x y z first, got {points.dtype} {tuple(points.shape)}."
            )
        check_offsets("offsets", offsets, len(points))
        cells = voxelize(points, offsets, self.voxel_size, self.point_range)
        if not len(cells.coordinates):
            raise ValueError(f"no point lies in the range {self.point_range}: check the units and the frame of points.")
        return cells

    def forward_features(self, points: Tensor, offsets: Tensor) -> Tensor:
        """Points `(N, in_chans)`, offsets `(B + 1,)` -> encoded cells as a map from above `(B, H, W, C)`."""
        cells = self.voxelize(points, offsets)
        x = self.encoder(self.point_encoder(points, cells), cells.coordinates, cells.counts)
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
