"""Rotated boxes seen from above: exact overlap and non-maximum suppression.

A box is (x, y, z, length, width, height, yaw): its centre, its size along its own axes, and the angle from the x axis to
its length, in radians.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SIGNS = ((0.5, 0.5), (-0.5, 0.5), (-0.5, -0.5), (0.5, -0.5))


def corners(boxes: Tensor) -> Tensor:
    """Corners of `(N, 7)` boxes from above, counterclockwise: `(N, 4, 2)`."""
    local = boxes.new_tensor(_SIGNS) * boxes[:, None, 3:5]
    cos, sin = boxes[:, 6, None].cos(), boxes[:, 6, None].sin()
    x, y = local.unbind(-1)
    return torch.stack([x * cos - y * sin, x * sin + y * cos], -1) + boxes[:, None, :2]


def _inside(points: Tensor, boxes: Tensor, slack: float) -> Tensor:
    """Which of `(N, K, 2)` points lie in the boxes `(N, 7)`, edges included: `(N, K)`."""
    offset = points - boxes[:, None, :2]
    cos, sin = boxes[:, 6, None].cos(), boxes[:, 6, None].sin()
    along, across = offset[..., 0] * cos + offset[..., 1] * sin, offset[..., 1] * cos - offset[..., 0] * sin
    return (along.abs() <= boxes[:, 3, None] / 2 + slack) & (across.abs() <= boxes[:, 4, None] / 2 + slack)


def intersection_area(a: Tensor, b: Tensor) -> Tensor:
    """Area that box i of `a` `(N, 7)` and box i of `b` share, seen from above: `(N,)`.

    The intersection of two convex quadrilaterals is the convex polygon of the corners of each that lie in the other and
    of the crossings of their edges: at most 24 candidates, put in order around their mean.
    """
    dtype, origin = a.dtype, a[:, :2]
    a, b = a.double(), b.double()
    a, b = (torch.cat([box[:, :2] - origin.double(), box[:, 2:]], 1) for box in (a, b))
    slack = 1e-9 * float(torch.cat([a[:, 3:5], b[:, 3:5]]).amax()) if len(a) else 0.0
    ca, cb = corners(a), corners(b)
    start_a, start_b = ca[:, :, None], cb[:, None]
    step_a, step_b = (ca.roll(-1, 1) - ca)[:, :, None], (cb.roll(-1, 1) - cb)[:, None]
    between = start_b - start_a
    cross = _cross(step_a, step_b)
    parallel = cross.abs() <= 1e-12 * step_a.norm(dim=-1) * step_b.norm(dim=-1)
    divisor = torch.where(parallel, 1.0, cross)
    on_a, on_b = _cross(between, step_b) / divisor, _cross(between, step_a) / divisor
    crosses = ~parallel & (on_a >= 0) & (on_a <= 1) & (on_b >= 0) & (on_b <= 1)
    crossings = (start_a + on_a.unsqueeze(-1) * step_a).flatten(1, 2)
    points = torch.cat([ca, cb, crossings], 1)
    real = torch.cat([_inside(ca, b, slack), _inside(cb, a, slack), crosses.flatten(1)], 1)
    middle = (points * real.unsqueeze(-1)).sum(1) / real.sum(1, keepdim=True).clamp(min=1)
    offset = torch.where(real.unsqueeze(-1), points - middle[:, None], 0.0)
    angle = torch.atan2(offset[..., 1], offset[..., 0]).masked_fill(~real, 10.0)
    order = angle.argsort(1)
    polygon = offset.gather(1, order.unsqueeze(-1).expand_as(offset))
    # Slots without a point close the polygon: they repeat its first corner.
    used = real.gather(1, order)
    polygon = torch.where(used.unsqueeze(-1), polygon, polygon[:, :1])
    return (_cross(polygon, polygon.roll(-1, 1)).sum(1) / 2).clamp(min=0).to(dtype)


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def bev_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union from above of box i of `a` and box i of `b`, `(N, 7)` each: `(N,)`."""
    shared = intersection_area(a, b)
    return shared / (a[:, 3] * a[:, 4] + b[:, 3] * b[:, 4] - shared).clamp(min=1e-9)


def iou_3d(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of the volumes of box i of `a` and box i of `b`, `(N, 7)` each: `(N,)`."""
    top = torch.minimum(a[:, 2] + a[:, 5] / 2, b[:, 2] + b[:, 5] / 2)
    bottom = torch.maximum(a[:, 2] - a[:, 5] / 2, b[:, 2] - b[:, 5] / 2)
    shared = intersection_area(a, b) * (top - bottom).clamp(min=0)
    return shared / (a[:, 3:6].prod(1) + b[:, 3:6].prod(1) - shared).clamp(min=1e-9)


def rotated_nms(boxes: Tensor, scores: Tensor, threshold: float, *, most_in: int = 2048, most_out: int = 300) -> Tensor:
    """Keep the best box, drop those that overlap it by more than `threshold` (from above), and so on.

    Args:
        boxes: `(N, 7)`. scores: `(N,)`.
        most_in: so many of the best boxes are looked at. most_out: so many are kept at most.

    Returns:
        Rows that are kept, best first.
    """
    order = scores.argsort(descending=True, stable=True)[:most_in]
    best = boxes[order]
    reach = best[:, 3:5].norm(dim=1) / 2
    near = torch.cdist(best[:, :2], best[:, :2]) < reach[:, None] + reach
    first, second = near.triu(1).nonzero().unbind(1)
    above = bev_iou(best[first], best[second]) > threshold
    rivals: dict[int, list[int]] = {}
    for one, other in zip(first[above].tolist(), second[above].tolist(), strict=True):
        rivals.setdefault(one, []).append(other)
    dropped: set[int] = set()
    kept: list[int] = []
    for row in range(len(best)):
        if row not in dropped and len(kept) < most_out:
            kept.append(row)
            dropped.update(rivals.get(row, ()))
    return order[kept]
