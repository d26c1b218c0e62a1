"""Tiles of tokens: which key tiles a query tile visits in neighborhood attention, and tokens put in the order of tiles.

A kernel of attention works on a tile of queries and walks over tiles of keys. In several dimensions a tile is a box of
tokens, so what is visited along each axis can be said axis by axis (Faster Neighborhood Attention, arXiv 2403.04690;
Generalized Neighborhood Attention, arXiv 2504.16922). Ranks and dilation groups are those of `layouts.neighborhoods`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from operator import index
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from regard.layouts.neighborhoods import axis_windows
from regard.layouts.tables import table
from regard.layouts.windows import crop, pad_to_multiple

TILE_SIZES = ((64, 64), (32, 128), (64, 128))
"""Tokens in a query tile and in a key tile of the fused forward kernels of FNA."""

TileShapes = tuple[tuple[int, ...], tuple[int, ...]]
"""Shape of a query tile and of a key tile."""


class Axis(NamedTuple):
    """One axis of a pattern of neighborhood attention.

    Attributes:
        length: tokens. kernel, stride, dilation, causal: as in `ops.neighborhood_attention`.
    """

    length: int
    kernel: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False

    @property
    def longest(self) -> int:
        """Tokens in the largest dilation group."""
        return -(-self.length // self.dilation)


class Visits(NamedTuple):
    """What the tiles of one axis visit; see `axis_visits`. All arrays are NumPy's.

    Attributes:
        rank: `(tiles, T)` ranks of the queries; slots past the end of a group repeat its last token.
        start, end: `(tiles, T)` range `[start, end)` of key ranks that each query sees.
        group, size: `(tiles,)` dilation group of a tile, and the tokens in it.
        first: `(tiles,)` rank of the first key that is visited. steps: `(tiles,)` key tiles visited from there on.
    """

    rank: np.ndarray
    start: np.ndarray
    end: np.ndarray
    group: np.ndarray
    size: np.ndarray
    first: np.ndarray
    steps: np.ndarray


def axis_visits(axis: Axis, q_tile: int, kv_tile: int, aligned: bool) -> Visits:
    """Cut the queries of an axis into tiles of `q_tile`, group by group, and find the key tiles that each one visits.

    Args:
        aligned: key tiles start at multiples of `kv_tile`, and every group has as many query tiles as the largest (as in
            kernels on permuted, padded tokens). Otherwise they start at the first key that the query tile needs.
    """
    parts = []
    for group in range(axis.dilation):
        size = len(range(group, axis.length, axis.dilation))
        start, end = axis_windows(size, axis.kernel, axis.stride, axis.causal)
        tiles = -(-(axis.longest if aligned else size) // q_tile)
        rank = np.arange(tiles * q_tile).clip(max=size - 1).reshape(tiles, q_tile)
        parts.append((rank, start[rank], end[rank], np.full(tiles, group), np.full(tiles, size)))
    rank, start, end, groups, sizes = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    first = start.min(1)
    if aligned:
        first = first // kv_tile * kv_tile
    return Visits(rank, start, end, groups, sizes, first, -(-(end.max(1) - first) // kv_tile))


class Step(NamedTuple):
    """The key tile that is visited at one step of the walk along an axis, for each tile that still has one.

    Attributes:
        active: `(a,)` the query tiles. keys: `(a, T')` positions of the keys; past the end of the group its last token.
        tile: `(a, 1)` number of the key tile where tokens are in the order of tiles.
        pattern: `(a,)` index into `offset`: tiles that look alike share a pattern.
        offset: `(patterns, T, T')` key rank - query rank + kernel - 1 where the query sees the key, else 2 * kernel - 1.
    """

    active: Tensor
    keys: Tensor
    tile: Tensor
    pattern: Tensor
    offset: Tensor


class TileWalk(NamedTuple):
    """Query tiles of one axis and their walk over key tiles, as index tables on the device of the tokens.

    Attributes:
        queries: `(tiles, T)` positions on the axis. place: `(length,)` flat slot that computes each position.
        rank, start, end, first: as in `Visits`. steps: the walk.
    """

    queries: Tensor
    place: Tensor
    rank: Tensor
    start: Tensor
    end: Tensor
    first: Tensor
    steps: tuple[Step, ...]


def tile_walk(
    axis: Axis, q_tile: int, kv_tile: int, aligned: bool, device: torch.device, part: tuple[int, int] | None = None
) -> TileWalk:
    """The walk along `axis`; `part` is a range of query tiles (`place` then is of no use)."""
    begin, stop = part or (0, tile_count(axis, q_tile, aligned))
    tables = _tile_walk(*axis, q_tile, kv_tile, aligned, begin, stop)
    queries, place, rank, start, end, first, *rest = (x.to(device) for x in tables)
    steps = tuple(Step(*rest[at : at + 5]) for at in range(0, len(rest), 5))
    return TileWalk(queries, place, rank, start, end, first, steps)


def tile_count(axis: Axis, q_tile: int, aligned: bool) -> int:
    """Query tiles along an axis, over all its dilation groups."""
    sizes = (axis.longest if aligned else len(range(g, axis.length, axis.dilation)) for g in range(axis.dilation))
    return sum(-(-size // q_tile) for size in sizes)


@table
def _tile_walk(
    length: int,
    kernel: int,
    stride: int,
    dilation: int,
    causal: int,
    q_tile: int,
    kv_tile: int,
    aligned: int,
    begin: int,
    stop: int,
) -> tuple[np.ndarray, ...]:
    axis = Axis(length, kernel, stride, dilation, bool(causal))
    seen = axis_visits(axis, q_tile, kv_tile, bool(aligned))
    queries = seen.rank * dilation + seen.group[:, None]
    _, place = np.unique(queries, return_index=True)
    per_group = -(-axis.longest // kv_tile)
    seen, queries = Visits(*(array[begin:stop] for array in seen)), queries[begin:stop]
    tables = [queries, place, seen.rank, seen.start, seen.end, seen.first]
    for step in range(seen.steps.max()):
        active = np.flatnonzero(seen.steps > step)
        rank = seen.first[active, None] + step * kv_tile + np.arange(kv_tile)
        keys = np.minimum(rank, seen.size[active, None] - 1) * dilation + seen.group[active, None]
        tile = seen.group[active, None] * per_group + rank[:, :1] // kv_tile
        key = rank[:, None]
        inside = (key >= seen.start[active, :, None]) & (key < seen.end[active, :, None])
        offset = np.where(inside, key - seen.rank[active, :, None] + kernel - 1, 2 * kernel - 1)
        looks: dict[bytes, int] = {}
        pattern = np.array([looks.setdefault(of_tile.tobytes(), len(looks)) for of_tile in offset])
        _, examples = np.unique(pattern, return_index=True)
        tables += [active, keys, tile, pattern, offset[examples]]
    return tuple(tables)


def legal_tiles(axes: int) -> tuple[TileShapes, ...]:
    """Tile shapes of the fused kernels: powers of two, at least 2 along each axis, key tiles nowhere the narrower."""
    shapes = []
    for queries, keys in TILE_SIZES:
        for q_tile in _factors(queries, axes):
            shapes += [(q_tile, k) for k in _factors(keys, axes) if all(a >= b for a, b in zip(k, q_tile, strict=True))]
    return tuple(shapes)


def _factors(size: int, axes: int) -> list[tuple[int, ...]]:
    if axes == 1:
        return [(size,)]
    powers = [2**power for power in range(1, size.bit_length())]
    return [shape for shape in itertools.product(powers, repeat=axes) if math.prod(shape) == size]


def fitted(tile: Sequence[int], axes: Sequence[Axis]) -> tuple[int, ...]:
    """A tile, no longer along any axis than the longest dilation group."""
    return tuple(min(side, axis.longest) for side, axis in zip(tile, axes, strict=True))


@torch.compiler.assume_constant_result
def best_tiles(axes: Sequence[Axis], aligned: bool) -> TileShapes:
    """The legal tile shapes that multiply the fewest queries and keys; of equals, those with the fewest visits."""
    return _best_tiles(tuple(axis._replace(length=index(axis.length)) for axis in axes), aligned)


@lru_cache(maxsize=1024)
def _best_tiles(axes: tuple[Axis, ...], aligned: bool) -> TileShapes:
    def cost(shapes: TileShapes) -> tuple[int, int]:
        q_tile, kv_tile = shapes
        visits = math.prod(_count(axis, q, k, aligned) for axis, q, k in zip(axes, q_tile, kv_tile, strict=True))
        return visits * math.prod(q_tile) * math.prod(kv_tile), visits

    return min(((fitted(q, axes), fitted(k, axes)) for q, k in legal_tiles(len(axes))), key=cost)


@lru_cache(maxsize=4096)
def _count(axis: Axis, q_tile: int, kv_tile: int, aligned: bool) -> int:
    return int(axis_visits(axis, q_tile, kv_tile, aligned).steps.sum())


def permute_tokens(x: Tensor, tile: Sequence[int], dilation: Sequence[int], reverse: bool = False) -> Tensor:
    """Tokens in the order of tiles: `(B, *S, ...)` -> `(B * prod(dilation), tokens, ...)`.

    Every axis is zero-padded to a multiple of tile * dilation. Dilation groups go to the batch; in each, tiles follow one
    another, row-major, and tokens inside a tile too: every run of prod(tile) tokens is a box.

    Args:
        reverse: the last axis counts slowest, in groups, tiles and tokens.
    """
    axes = len(tile)
    x = pad_to_multiple(x, [side * gap for side, gap in zip(tile, dilation, strict=True)])
    for axis in reversed(range(axes)):
        x = x.unflatten(1 + axis, (-1, tile[axis], dilation[axis]))
    order = range(axes)[::-1] if reverse else range(axes)
    tiles, tokens, groups = ([1 + 3 * axis + part for axis in order] for part in range(3))
    x = x.permute(0, *groups, *tiles, *tokens, *range(1 + 3 * axes, x.dim()))
    return x.flatten(1 + axes, 3 * axes).flatten(0, axes)


def unpermute_tokens(
    x: Tensor, spatial: Sequence[int], tile: Sequence[int], dilation: Sequence[int], reverse: bool = False
) -> Tensor:
    """`(B * prod(dilation), tokens, ...)` -> `(B, *spatial, ...)`: undoes `permute_tokens`, padding cut off."""
    axes = len(tile)
    order = list(range(axes))[::-1] if reverse else list(range(axes))
    counts = [-(-length // (side * gap)) for length, side, gap in zip(spatial, tile, dilation, strict=True)]
    shape = [sizes[axis] for sizes in (dilation, counts, tile) for axis in order]
    x = x.reshape(x.shape[0] // math.prod(dilation), *shape, *x.shape[2:])
    back = [0]
    for axis in range(axes):
        group = 1 + order.index(axis)
        back += [group + axes, group + 2 * axes, group]
    x = x.permute(*back, *range(1 + 3 * axes, x.dim()))
    for axis in range(axes):
        x = x.flatten(1 + axis, 3 + axis)
    return crop(x, spatial)
