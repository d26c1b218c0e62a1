"""Windows and grids over 1, 2 or 3 spatial axes.

Tensors are `(batch, *spatial, *rest)`; `sizes` has one entry for each spatial axis, so the rest may be channels or
`(heads, head_dim)`. A window is a box of neighbouring tokens; a grid group holds tokens spread evenly over the whole map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from regard.layouts.tables import table

Partition = Literal["window", "grid"]


def pad_to_multiple(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Zero-pad the end of each spatial axis up to a multiple of `sizes`: `(B, *S, ...)` -> `(B, *S', ...)`."""
    padding = [-x.shape[1 + axis] % size for axis, size in enumerate(sizes)]
    if not any(padding):
        return x
    ends = [0, 0] * (x.dim() - 1 - len(sizes))
    for pad in reversed(padding):
        ends += [0, pad]
    return F.pad(x, ends)


def reflect_to_multiple(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Extend the end of each spatial axis to a multiple of `sizes` by mirroring: `(B, *S, ...)` -> `(B, *S', ...)`.

    The last position is the mirror and is not repeated. An axis shorter than its extension is mirrored to and fro.
    """
    for axis, size in enumerate(sizes):
        length = x.shape[1 + axis]
        total = -(-length // size) * size
        if total != length:
            period = max(2 * (length - 1), 1)
            place = torch.arange(total, device=x.device) % period
            x = x.index_select(1 + axis, torch.where(place < length, place, period - place))
    return x


def crop(x: Tensor, spatial: Sequence[int]) -> Tensor:
    """Cut each spatial axis back to `spatial`: the inverse of `pad_to_multiple`."""
    for axis, size in enumerate(spatial):
        x = x.narrow(1 + axis, 0, size) if x.shape[1 + axis] != size else x
    return x


def partition(x: Tensor, sizes: Sequence[int], kind: Partition = "window") -> Tensor:
    """`(B, *S, ...)` -> `(B, groups, tokens, ...)` with prod(sizes) tokens a group; sizes must divide S.

    kind "window": group = box of `sizes` neighbouring tokens. kind "grid": group = the `sizes` tokens whose distance is
    S / sizes on each axis (MaxViT, eq. 4). Groups and tokens are in row-major order.
    """
    axes = len(sizes)
    batch, spatial, rest = x.shape[0], x.shape[1 : 1 + axes], x.shape[1 + axes :]
    shape = [batch]
    for length, size in zip(spatial, sizes, strict=True):
        shape += [length // size, size] if kind == "window" else [size, length // size]
    outer, inner = [1 + 2 * axis for axis in range(axes)], [2 + 2 * axis for axis in range(axes)]
    groups, tokens = (outer, inner) if kind == "window" else (inner, outer)
    tail = range(1 + 2 * axes, 1 + 2 * axes + len(rest))
    x = x.reshape(*shape, *rest).permute(0, *groups, *tokens, *tail)
    return x.reshape(batch, math.prod(spatial) // math.prod(sizes), math.prod(sizes), *rest)


def unpartition(x: Tensor, sizes: Sequence[int], spatial: Sequence[int], kind: Partition = "window") -> Tensor:
    """`(B, groups, tokens, ...)` -> `(B, *spatial, ...)`: the inverse of `partition`."""
    axes = len(sizes)
    batch, rest = x.shape[0], x.shape[3:]
    counts = [length // size for length, size in zip(spatial, sizes, strict=True)]
    x = x.reshape(batch, *counts, *sizes, *rest)
    order = [0]
    for axis in range(axes):
        pair = [1 + axis, 1 + axes + axis]
        order += pair if kind == "window" else pair[::-1]
    order += range(1 + 2 * axes, x.dim())
    return x.permute(order).reshape(batch, *spatial, *rest)


def map_windows(function: Callable[..., Tensor], sizes: Sequence[int], *grids: Tensor) -> Tensor:
    """Apply `function` inside each window: it gets the windows of all `grids` as batches `(B windows, *sizes, ...)`.

    Where an axis is no multiple of the window, the windows at its end are smaller and `function` is called for them apart.

    Args:
        function: grids -> one grid of the same spatial size. grids: `(B, *S, ...)`, all of one spatial size.
    """
    axes, spatial = len(sizes), grids[0].shape[1 : 1 + len(sizes)]
    sizes = [min(size, length) for size, length in zip(sizes, spatial, strict=True)]
    for axis, (length, size) in enumerate(zip(spatial, sizes, strict=True)):
        if length % size:
            whole = length - length % size
            parts = [
                [grid.narrow(1 + axis, start, count) for grid in grids]
                for start, count in ((0, whole), (whole, length - whole))
            ]
            return torch.cat([map_windows(function, sizes, *part) for part in parts], 1 + axis)
    groups = [partition(grid, sizes).flatten(0, 1).unflatten(1, sizes) for grid in grids]
    out = function(*groups).flatten(1, axes)
    return unpartition(out.unflatten(0, (grids[0].shape[0], math.prod(spatial) // math.prod(sizes))), sizes, spatial)


def shift_regions(spatial: Sequence[int], padded: Sequence[int], sizes: Sequence[int], shift: Sequence[int]) -> Tensor:
    """Region number of each position of a map that was padded and then rolled by -shift: `(*padded,)` int64.

    Positions that the roll brought together from opposite edges get different regions, and so does padding, so that
    tokens may attend to each other exactly where their regions agree (Swin, fig. 4).
    """
    (regions,) = _shift_regions(*spatial, *padded, *shift)
    return regions


@table
def _shift_regions(*numbers: int) -> tuple[np.ndarray]:
    axes = len(numbers) // 3
    spatial, padded, shift = (numbers[first : first + axes] for first in range(0, 3 * axes, axes))
    regions = np.zeros(padded, np.int64)
    for axis, (length, total, step) in enumerate(zip(spatial, padded, shift, strict=True)):
        order = np.arange(total)
        label = np.where((order + step) % total < length, 0, 2)
        if step:  # the last window of the rolled axis holds the end of the map, then its beginning
            label += order >= total - step
        shape = [1] * axes
        shape[axis] = total
        regions = regions * 4 + label.reshape(shape)
    return (regions,)
