"""Which keys a query sees in (generalized, dilated, causal) neighborhood attention, one axis at a time.

The rule of Generalized Neighborhood Attention (arXiv 2504.16922), of which NA (stride 1), DiNA (dilation above 1) and
blocked attention (stride = kernel size) are cases. On each axis the tokens fall into `dilation` groups by their
position modulo the dilation; a token's rank is its place inside its group. Everything is said in ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from regard.layouts.tables import table


class AxisTiles(NamedTuple):
    """Queries of one axis in tiles, and for each tile the shortest run of keys that holds all their windows.

    Tiles are numbered group by group (`dilation` groups of tokens). Tiles that look alike share a pattern.

    Attributes:
        queries: `(tiles, T)` positions on the axis; slots past the end of a group repeat its last token.
        keys: `(tiles, E)` positions on the axis.
        place: `(length,)` flat slot (tile * T + offset) that computes each position.
        pattern: `(tiles,)` index into `offset`.
        offset: `(patterns, T, E)` key rank - query rank + kernel - 1 where the query sees the key, else 2 * kernel - 1.
    """

    queries: Tensor
    keys: Tensor
    place: Tensor
    pattern: Tensor
    offset: Tensor


class QueryTiles(Protocol):
    """The tiles of queries along an axis, `(tiles, T)` positions, and the slot that computes each position."""

    @property
    def queries(self) -> Tensor: ...
    @property
    def place(self) -> Tensor: ...


def restore(x: Tensor, tiles: Sequence[QueryTiles]) -> Tensor:
    """Tiles of queries back on their grid: `(B, n1, n2, .., heads, T1 T2 .., d)` -> `(B, *S, heads, d)`."""
    axes = len(tiles)
    x = x.unflatten(2 + axes, [t.queries.shape[1] for t in tiles])
    order = [0]
    for axis in range(axes):
        order += [1 + axis, 2 + axes + axis]
    x = x.permute(*order, 1 + axes, 2 + 2 * axes)
    x = x.reshape(x.shape[0], *[t.queries.numel() for t in tiles], *x.shape[-2:])
    for axis, tile in enumerate(tiles):
        x = x.index_select(1 + axis, tile.place)
    return x


def offset_biases(bias: Tensor, offsets: Sequence[Tensor]) -> Tensor:
    """The bias of every pair of a tile: `(heads, 2 kernel - 1, ..)` -> `(p1, p2, .., heads, T1 T2 .., E1 E2 ..)`.

    Args:
        offsets: for each axis `(p, T, E)`, key rank - query rank + kernel - 1, or 2 kernel - 1 for an unseen key: -inf.
    """
    axes = len(offsets)
    bias = F.pad(bias, (0, 1) * axes, value=-math.inf)
    for axis in reversed(range(axes)):  # the last first: later axes then copy whole rows
        bias = bias.index_select(1 + axis, offsets[axis].flatten())
    shape = [bias.shape[0]]
    for offset in offsets:
        shape += offset.shape
    patterns, queries, keys = (range(first, 1 + 3 * axes, 3) for first in (1, 2, 3))
    bias = bias.view(shape).permute(*patterns, 0, *queries, *keys)
    return bias.flatten(1 + 2 * axes).flatten(1 + axes, 2 * axes)


def axis_tiles(length: int, kernel: int, stride: int, dilation: int, causal: bool, tile: int) -> AxisTiles:
    """Tile one axis of `length` tokens for windows of `kernel` keys; needs kernel * dilation <= length."""
    return AxisTiles(*_axis_tiles(length, kernel, stride, dilation, causal, tile))


def axis_windows(length: int, kernel: int, stride: int, causal: bool) -> tuple[np.ndarray, np.ndarray]:
    """Key range `[start, end)` of each query rank in a group of `length` tokens: two `(length,)` arrays.

    Queries come in groups of `stride` that share the window of their leader: the middle one (right of the middle for an
    even stride), or the last one if causal. The window reaches kernel // 2 to the left of the leader and is pushed
    inwards at the borders, so every query has exactly `kernel` keys; a causal window ends at the query itself.
    """
    query = np.arange(length)
    leader = np.minimum(query // stride * stride + (stride - 1 if causal else stride // 2), length - 1)
    if causal:
        return np.maximum(leader - kernel + 1, 0), query + 1
    start = np.clip(leader - kernel // 2, 0, length - kernel)
    return start, start + kernel


@table
def _axis_tiles(
    length: int, kernel: int, stride: int, dilation: int, causal: bool, tile: int
) -> tuple[np.ndarray, ...]:
    groups = []
    for remainder in range(dilation):
        count = (length - remainder + dilation - 1) // dilation
        start, end = axis_windows(count, kernel, stride, bool(causal))
        rank = np.arange(-(-count // tile) * tile).clip(max=count - 1).reshape(-1, tile)
        groups.append((rank, start[rank], end[rank], np.full(len(rank), remainder), np.full(len(rank), count)))
    rank, start, end, group, size = (np.concatenate(parts) for parts in zip(*groups, strict=True))
    first = start.min(1)
    extent = (end.max(1) - first).max()
    # A run may not pass the end of its group: pull it back; if the group is shorter than the run, repeat the last key.
    first = np.minimum(first, (size - extent).clip(min=0))
    key = first[:, None] + np.arange(extent)
    seen = (key[:, None] >= start[:, :, None]) & (key[:, None] < end[:, :, None])
    offset = np.where(seen, key[:, None] - rank[:, :, None] + kernel - 1, 2 * kernel - 1)
    looks: dict[bytes, int] = {}
    pattern = np.array([looks.setdefault(of_tile.tobytes(), len(looks)) for of_tile in offset])
    _, examples = np.unique(pattern, return_index=True)
    queries = rank * dilation + group[:, None]
    keys = np.minimum(key, size[:, None] - 1) * dilation + group[:, None]
    _, place = np.unique(queries, return_index=True)
    return queries, keys, place, pattern, offset[examples]
