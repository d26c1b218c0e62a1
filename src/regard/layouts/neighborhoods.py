"""Which keys a query sees in (generalized, dilated, causal) neighborhood attention, one axis at a time.

The rule of Generalized Neighborhood Attention (arXiv 2504.16922), of which NA (stride 1), DiNA (dilation above 1) and
blocked attention (stride = kernel size) are cases. On each axis the tokens fall into `dilation` groups by their position
modulo the dilation; a token's rank is its place inside its group. Everything is said in ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


def axis_windows(length: int, kernel: int, stride: int = 1, causal: bool = False) -> tuple[Tensor, Tensor]:
    """Key range `[start, end)` of each query rank in a group of `length` tokens: two `(length,)` int64 tensors.

    Queries come in groups of `stride` that share the window of their leader: the middle one (right of the middle for an
    even stride), or the last one if causal. The window reaches kernel // 2 to the left of the leader and is pushed
    inwards at the borders, so every query has exactly `kernel` keys; a causal window ends at the query itself.
    """
    query = torch.arange(length)
    leader = query // stride * stride + (stride - 1 if causal else stride // 2)
    leader = leader.clamp(max=length - 1)
    if causal:
        return (leader - kernel + 1).clamp(min=0), query + 1
    start = (leader - kernel // 2).clamp(0, length - kernel)
    return start, start + kernel


@dataclass(frozen=True)
class AxisTiles:
    """Queries of one axis in tiles, and for each tile the shortest run of keys that holds all their windows.

    Tiles are numbered group by group (`dilation` groups of tokens). Tiles that look alike share a pattern.

    Attributes:
        queries: `(tiles, T)` positions on the axis; slots past the end of a group repeat its last token.
        keys: `(tiles, E)` positions on the axis.
        place: `(length,)` flat slot (tile * T + offset) that computes each position.
        pattern: `(tiles,)` index into the two tables below.
        allowed: `(patterns, T, E)` whether a query sees a key.
        offset: `(patterns, T, E)` key rank - query rank + kernel - 1, clamped to the 2 * kernel - 1 entries of a table.
    """

    queries: Tensor
    keys: Tensor
    place: Tensor
    pattern: Tensor
    allowed: Tensor
    offset: Tensor


@lru_cache(maxsize=256)
def axis_tiles(length: int, kernel: int, stride: int, dilation: int, causal: bool, tile: int) -> AxisTiles:
    """Tile one axis of `length` tokens for windows of `kernel` keys; needs kernel * dilation <= length.

    The tables live on the CPU whatever the default device is: they are computed once and shared by all calls.
    """
    with torch.device("cpu"):
        return _axis_tiles(length, kernel, stride, dilation, causal, tile)


def _axis_tiles(length: int, kernel: int, stride: int, dilation: int, causal: bool, tile: int) -> AxisTiles:
    queries, starts, offsets_of_group, windows = [], [], [], []
    for group in range(dilation):
        size = (length - group + dilation - 1) // dilation
        start, end = axis_windows(size, kernel, stride, causal)
        rank = torch.arange(-(-size // tile) * tile).clamp(max=size - 1).view(-1, tile)
        queries.append(rank)
        windows.append((start[rank], end[rank]))
        starts.append(start[rank].amin(1))
        offsets_of_group.append(torch.full((len(rank),), group))
    rank, first, group = torch.cat(queries), torch.cat(starts), torch.cat(offsets_of_group)
    start, end = torch.cat([w[0] for w in windows]), torch.cat([w[1] for w in windows])
    extent = int((end.amax(1) - first).max())
    size = (length - group + dilation - 1) // dilation
    # A run may not pass the end of its group: pull it back; if the group is shorter than the run, repeat the last key
    # (repeats are marked as not allowed).
    first = torch.minimum(first, (size - extent).clamp(min=0))
    unclamped = first[:, None] + torch.arange(extent)
    key = torch.minimum(unclamped, size[:, None] - 1)
    allowed = (unclamped[:, None] >= start[:, :, None]) & (unclamped[:, None] < end[:, :, None])
    offset = (key[:, None] - rank[:, :, None] + kernel - 1).clamp(0, 2 * kernel - 2)
    look = torch.cat([allowed.flatten(1).long(), offset.flatten(1)], 1)
    _, pattern = torch.unique(look, dim=0, return_inverse=True)
    representative = torch.zeros(int(pattern.max()) + 1, dtype=torch.long).scatter_(0, pattern, torch.arange(len(rank)))
    query_position = rank * dilation + group[:, None]
    slots = torch.arange(query_position.numel())
    place = torch.full((length,), query_position.numel()).scatter_reduce_(0, query_position.flatten(), slots, "amin")
    return AxisTiles(
        queries=query_position,
        keys=key * dilation + group[:, None],
        place=place,
        pattern=pattern,
        allowed=allowed[representative],
        offset=offset[representative],
    )
