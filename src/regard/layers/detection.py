"""What lidar detectors share around their encoder: pillar features, a 2-D backbone with a pyramid, the centre head.

Maps are channels-last `(B, H, W, C)` with y along H and x along W.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.layers.boxes import iou_3d, rotated_nms
from regard.layers.conv import Conv2d, _ChannelsLast
from regard.layers.norm import BatchNorm
from regard.layouts.points import Cells, max_of, mean_of


def _norm(dim: int) -> BatchNorm:
    return BatchNorm(dim, eps=1e-3, momentum=0.01)


class _VFELayer(nn.Module):
    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_dim, dim, bias=False)
        self.norm = _norm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.linear(x)))


class DynamicVFE(nn.Module):
    """Features of cells from all of their points (Zhou et al., 2019, arXiv 1910.06528).

    A point carries [its values, xyz - mean of its cell, xyz - centre of its cell]; each layer is Linear, BatchNorm, ReLU,
    then the maximum over the cell, which the next layer sees beside the point.

    Args:
        in_chans: values of a point, x y z first. dims: width of each layer.
        voxel_size, point_range: as for `regard.layouts.points.voxelize`.
    """

    def __init__(
        self, in_chans: int, dims: Sequence[int], voxel_size: Sequence[float], point_range: Sequence[float]
    ) -> None:
        super().__init__()
        self.voxel_size, self.point_range = tuple(voxel_size), tuple(point_range)
        widths = [in_chans + 6, *(2 * dim for dim in dims[:-1])]
        self.vfe_layers = nn.ModuleList(_VFELayer(a, b) for a, b in zip(widths, dims, strict=True))

    def forward(self, points: Tensor, cells: Cells) -> Tensor:
        """Points `(N, in_chans)` and their cells -> `(M, dims[-1])`."""
        points, cell_of, count = points[cells.points], cells.cell_of, len(cells.coordinates)
        xyz = points[:, :3]
        size, low = xyz.new_tensor(self.voxel_size), xyz.new_tensor(self.point_range[:3])
        centres = (cells.coordinates.flip(1)[cell_of] + 0.5) * size + low
        x = torch.cat([points, xyz - mean_of(xyz, cell_of, count)[cell_of], xyz - centres], 1)
        for index, layer in enumerate(self.vfe_layers):
            x = layer(x)
            best = max_of(x, cell_of, count)
            if index + 1 < len(self.vfe_layers):
                x = torch.cat([x, best[cell_of]], 1)
        return best


class SecondBackbone(nn.Module):
    """Stages of 3 x 3 convolutions, BatchNorm, ReLU on a map seen from above (SECOND; Yan et al., 2018).

    Each stage has `depths + 1` convolutions, the first with the stride. With `residual`, a convolution that keeps the
    shape adds its input after the ReLU.
    """

    def __init__(
        self, in_dim: int, dims: Sequence[int], depths: Sequence[int], strides: Sequence[int], *, residual: bool = True
    ) -> None:
        super().__init__()
        self.residual = residual
        self.blocks = nn.ModuleList()
        for before, dim, depth, stride in zip([in_dim, *dims[:-1]], dims, depths, strides, strict=True):
            convs = [(before, stride)] + [(dim, 1)] * depth
            self.blocks.append(nn.ModuleList(_conv_norm(width, dim, _norm(dim), step) for width, step in convs))
        self.apply(_kaiming)

    def forward(self, x: Tensor) -> list[Tensor]:
        """`(B, H, W, in_dim)` -> the map after each stage."""
        maps = []
        for block in self.blocks:
            for conv in iter(block):  # type: ignore[call-overload]
                after = conv(x)
                x = after + x if self.residual and after.shape == x.shape else after
            maps.append(x)
        return maps


class _Up(_ChannelsLast, nn.ConvTranspose2d):  # type: ignore[misc]
    """nn.ConvTranspose2d on `(B, H, W, C)`."""


class SecondFPN(nn.Module):
    """Bring every map to the size of the first by a transposed convolution, and concatenate them."""

    def __init__(self, in_dims: Sequence[int], dims: Sequence[int], strides: Sequence[int]) -> None:
        super().__init__()
        self.deblocks = nn.ModuleList(
            nn.Sequential(_Up(before, dim, stride, stride, bias=False), _norm(dim), nn.ReLU())
            for before, dim, stride in zip(in_dims, dims, strides, strict=True)
        )
        self.apply(_kaiming)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps, the finest first -> `(B, H, W, sum(dims))`; odd sides are cut to the first map's."""
        height, width = maps[0].shape[1:3]
        raised = [up(x)[:, :height, :width] for up, x in zip(self.deblocks, maps, strict=True)]
        return torch.cat(raised, -1)


class CenterHead(nn.Module):
    """Heat maps of object centres, and what a box is at each place (CenterPoint; Yin et al., 2021, arXiv 2006.11275).

    Predictions are maps by name: `heatmap` (logits a class), `reg` (centre inside the cell), `height` (of the centre),
    `dim` (log length, width, height), `rot` (sine, cosine), `vel`, `iou` (how well the box will fit).

    Args:
        dim: of the shared convolution. head_dim: of each branch.
        cell: metres per cell along x and y. low: x and y of the map's corner. post_range: centres outside are dropped.
        velocity: have the branch `vel`; no task here supervises it.
        iou_power: score = sigmoid(heatmap) * clamp(iou, 0, 1) ** iou_power.
        score_threshold, max_boxes: which peaks become boxes. nms_thresholds, nms_in, nms_out: for each class.
        min_overlap, min_radius: of the Gaussian around a true centre.
        box_weight, iou_weight: of the two losses beside the focal loss.
    """

    def __init__(
        self,
        in_dim: int,
        num_classes: int,
        *,
        cell: tuple[float, float],
        low: tuple[float, float],
        post_range: Sequence[float],
        dim: int = 64,
        head_dim: int = 64,
        velocity: bool = True,
        iou_power: float = 2.0,
        score_threshold: float = 0.1,
        max_boxes: int = 500,
        nms_thresholds: Sequence[float] = (0.8, 0.55, 0.55),
        nms_in: Sequence[int] = (2048, 1024, 1024),
        nms_out: Sequence[int] = (300, 100, 100),
        min_overlap: float = 0.1,
        min_radius: int = 1,
        box_weight: float = 2.0,
        iou_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.num_classes, self.cell, self.low, self.post_range = num_classes, cell, low, tuple(post_range)
        self.iou_power, self.score_threshold, self.max_boxes = iou_power, score_threshold, max_boxes
        last = len(nms_thresholds) - 1  # further classes share the last setting
        rows = list(zip(nms_thresholds, nms_in, nms_out, strict=True))
        self.nms = [rows[min(label, last)] for label in range(num_classes)]
        self.min_overlap, self.min_radius = min_overlap, min_radius
        self.box_weight, self.iou_weight = box_weight, iou_weight
        self.shared_conv = _conv_norm(in_dim, dim, _norm(dim))
        outputs = {"reg": 2, "height": 1, "dim": 3, "rot": 2, **({"vel": 2} if velocity else {}), "iou": 1}
        self.branches = nn.ModuleDict(
            {
                name: nn.Sequential(
                    _conv_norm(dim, head_dim, BatchNorm(head_dim)), Conv2d(head_dim, width, 3, padding=1)
                )
                for name, width in {**outputs, "heatmap": num_classes}.items()
            }
        )
        self.apply(_kaiming)
        nn.init.constant_(self.branches["heatmap"][1].bias, -2.19)  # type: ignore[index, arg-type]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """`(B, H, W, in_dim)` -> maps `(B, H, W, width)` by name."""
        x = self.shared_conv(x)
        return {name: branch(x) for name, branch in self.branches.items()}

    def loss(self, maps: Mapping[str, Tensor], boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
        """Focal loss of the heat maps, L1 of the boxes at true centres, L1 of their predicted overlap.

        Args:
            boxes: `(K_b, 7)` of each sample. labels: `(K_b,)`.
        """
        target, cells, wanted, truth = self.targets(maps["heatmap"], boxes, labels)
        heat = maps["heatmap"].sigmoid().clamp(1e-4, 1 - 1e-4)
        peak = target == 1
        near = -(heat.log() * (1 - heat) ** 2)[peak].sum()
        far = -((1 - heat).log() * heat**2 * (1 - target) ** 4)[~peak].sum()
        loss = (near + far) / peak.sum().clamp(min=1)
        code = torch.cat([maps[name][cells] for name in ("reg", "height", "dim", "rot")], -1)
        count = len(wanted) + 1e-4
        loss = loss + self.box_weight * (code - wanted).abs().sum() / count
        with torch.no_grad():
            fit = iou_3d(self._boxes(code, cells[2], cells[1]), truth)
        return loss + self.iou_weight * (maps["iou"][cells].squeeze(-1) - fit).abs().sum() / count

    def targets(
        self, like: Tensor, boxes: Sequence[Tensor], labels: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
        """What the maps should say.

        Returns:
            heat map `(B, H, W, classes)`; (sample, y, x) of the true centres, `(K,)` each; their codes `(K, 8)`; the
            boxes `(K, 7)`.
        """
        heat, (height, width) = torch.zeros_like(like), like.shape[1:3]
        places, kept = [], []
        for sample, (some, names) in enumerate(zip(boxes, labels, strict=True)):
            column = ((some[:, 0] - self.low[0]) / self.cell[0]).floor().long()
            row = ((some[:, 1] - self.low[1]) / self.cell[1]).floor().long()
            on_map = (column >= 0) & (column < width) & (row >= 0) & (row < height) & (some[:, 3:5] > 0).all(1)
            for one in on_map.nonzero().squeeze(1).tolist():
                long, wide = (float(some[one, 3 + axis]) / self.cell[axis] for axis in (0, 1))
                radius = max(self.min_radius, int(gaussian_radius(long, wide, self.min_overlap)))
                y, x = int(row[one]), int(column[one])
                _draw(heat[sample, :, :, int(names[one])], y, x, radius)
                places.append((sample, y, x))
            kept.append(some[on_map])
        truth = torch.cat(kept) if kept else like.new_zeros(0, 7)
        index = torch.tensor(places, dtype=torch.int64, device=like.device).view(-1, 3)
        cells = (index[:, 0], index[:, 1], index[:, 2])
        inside = torch.stack(
            [(truth[:, axis] - self.low[axis]) / self.cell[axis] - cells[2 - axis] for axis in (0, 1)], 1
        )
        yaw = truth[:, 6:7]
        codes = torch.cat([inside, truth[:, 2:3], truth[:, 3:6].clamp(min=1e-3).log(), yaw.sin(), yaw.cos()], 1)
        return heat, cells, codes, truth

    def _boxes(self, code: Tensor, column: Tensor, row: Tensor) -> Tensor:
        """Codes `(K, 8)` at cells -> boxes `(K, 7)`."""
        x = (code[:, 0] + column) * self.cell[0] + self.low[0]
        y = (code[:, 1] + row) * self.cell[1] + self.low[1]
        yaw = torch.atan2(code[:, 6], code[:, 7])
        return torch.cat([x[:, None], y[:, None], code[:, 2:3], code[:, 3:6].clamp(max=8).exp(), yaw[:, None]], 1)

    @torch.no_grad()
    def decode(self, maps: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """Maps -> for each sample `boxes` (D, 7), `scores` (D,), `labels` (D,), best first within a class."""
        heat = maps["heatmap"].sigmoid() * maps["iou"].clamp(0, 1) ** self.iou_power
        width = heat.shape[2]
        found = []
        for sample, scores in enumerate(heat.flatten(1)):
            best, where = scores.topk(min(self.max_boxes, len(scores)))
            where = where[best >= self.score_threshold]
            best = best[: len(where)]
            label, place = where % self.num_classes, where // self.num_classes
            row, column = place // width, place % width
            code = torch.cat([maps[name][sample, row, column] for name in ("reg", "height", "dim", "rot")], -1)
            boxes = self._boxes(code, column, row)
            low, high = boxes.new_tensor(self.post_range[:3]), boxes.new_tensor(self.post_range[3:])
            rows = []
            for one, (threshold, most_in, most_out) in enumerate(self.nms):
                mine = (label == one).nonzero().squeeze(1)
                rows.append(mine[rotated_nms(boxes[mine], best[mine], threshold, most_in=most_in, most_out=most_out)])
            keep = torch.cat(rows)
            keep = keep[((boxes[keep, :3] >= low) & (boxes[keep, :3] <= high)).all(1)]
            found.append({"boxes": boxes[keep], "scores": best[keep], "labels": label[keep]})
        return found


def _conv_norm(in_dim: int, dim: int, norm: nn.Module, stride: int = 1) -> nn.Module:
    return nn.Sequential(Conv2d(in_dim, dim, 3, stride, 1, bias=False), norm, nn.ReLU())


def _kaiming(module: nn.Module) -> None:
    if isinstance(module, (Conv2d, _Up)):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def gaussian_radius(length: float, width: float, min_overlap: float) -> float:
    """How far a centre may be off, in cells, for the box to overlap the true one by `min_overlap` (CornerNet's rule).

    The least of three cases' radii, in the form that CornerNet and CenterPoint compute it: each is (b + sqrt(b² - 4ac))/2
    where the root of a r² - b r + c would be divided by 2a.
    """
    total, area = length + width, length * width
    cases = (
        (1.0, total, area * (1 - min_overlap) / (1 + min_overlap)),
        (4.0, 2 * total, (1 - min_overlap) * area),
        (4 * min_overlap, -2 * min_overlap * total, (min_overlap - 1) * area),
    )
    return min((b + math.sqrt(max(b * b - 4 * a * c, 0.0))) / 2 for a, b, c in cases)


def _draw(heat: Tensor, row: int, column: int, radius: int) -> None:
    """Raise a map `(H, W)` to a Gaussian of standard deviation (2 radius + 1)/6 around a cell, cut at the radius."""
    deviation = (2 * radius + 1) / 6
    rows = slice(max(row - radius, 0), min(row + radius + 1, heat.shape[0]))
    columns = slice(max(column - radius, 0), min(column + radius + 1, heat.shape[1]))
    y = torch.arange(rows.start, rows.stop, device=heat.device) - row
    x = torch.arange(columns.start, columns.stop, device=heat.device) - column
    bump = (-(y[:, None] ** 2 + x**2) / (2 * deviation**2)).exp()
    heat[rows, columns] = torch.maximum(heat[rows, columns], bump)
