"""The unfused, GEMM-based formulation of neighborhood attention: weights over the window are made, kept and applied.

A box of queries and the box of all keys that any of them sees are multiplied as matrices. Of each product only the
window's entries are kept; to apply the weights they are put back among zeros.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from regard.layouts.neighborhoods import offset_biases, restore
from regard.layouts.tiles import Axis, TileWalk, tile_walk
from regard.systems.hardware._fused import boxes


def query_key(q: Tensor, k: Tensor, axes: Sequence[Axis], tile: Sequence[int], bias: Tensor | None = None) -> Tensor:
    """The operator NN (query x neighborhood): logits over the window, `(B, *S, heads, prod(kernel))`.

    The keys of a window are in row-major order from its first; those that a causal axis hides are -inf.

    Args:
        q, k: `(B, *S, heads, head_dim)`, q scaled. tile: queries in a box. bias: `(heads, 2 kernel - 1, ..)`.
    """
    walks = _walks(axes, tile, q.device)
    queries = boxes(q[..., None, :, :], [walk.queries for walk in walks])
    products = queries @ boxes(k[..., None, :, :], _halos(walks)).transpose(-1, -2)
    products = _apart(products, walks, [walk.steps[0].keys.shape[1] for walk in walks])
    count = len(walks)
    hidden = torch.zeros((), dtype=torch.bool, device=q.device)
    for at, (walk, axis) in enumerate(zip(walks, axes, strict=True)):
        products = torch.take_along_dim(products, _along(_window(walk, axis), at, count), 2 + 2 * count + at)
        slots = torch.arange(axis.kernel, device=q.device)
        hidden = hidden | _along(slots >= (walk.end - walk.start)[..., None], at, count)
    if bias is not None:
        offsets = [
            walk.start[..., None] + torch.arange(axis.kernel, device=q.device) - walk.rank[..., None] + axis.kernel - 1
            for walk, axis in zip(walks, axes, strict=True)
        ]
        products = products + _apart(offset_biases(bias, offsets)[None], walks, [axis.kernel for axis in axes])
    logits = products.masked_fill(hidden, -torch.inf).flatten(2 + 2 * count)
    return restore(logits.flatten(2 + count, 1 + 2 * count), walks)


def weights_value(weights: Tensor, v: Tensor, axes: Sequence[Axis], tile: Sequence[int]) -> Tensor:
    """The operator PN (pointwise x neighborhood): `(B, *S, heads, prod(kernel))` and v -> `(B, *S, heads, value_dim)`."""
    walks = _walks(axes, tile, v.device)
    count, kernel = len(walks), [axis.kernel for axis in axes]
    spread = boxes(weights[..., None, :, :], [walk.queries for walk in walks])
    spread = _apart(spread, walks, kernel)
    for at, (walk, axis) in enumerate(zip(walks, axes, strict=True)):
        dim = 2 + 2 * count + at
        shape = [*spread.shape]
        index = _along(_window(walk, axis), at, count).expand(shape)
        shape[dim] = walk.steps[0].keys.shape[1]
        spread = spread.new_zeros(shape).scatter(dim, index, spread)
    spread = spread.flatten(2 + 2 * count).flatten(2 + count, 1 + 2 * count)
    return restore(spread @ boxes(v[..., None, :, :], _halos(walks)), walks)


def _walks(axes: Sequence[Axis], tile: Sequence[int], device: torch.device) -> list[TileWalk]:
    """Walks of one step: a key tile that holds the windows of all queries of a tile."""
    return [
        tile_walk(axis, side, side + axis.kernel + axis.stride - 2, False, device)
        for axis, side in zip(axes, tile, strict=True)
    ]


def _halos(walks: Sequence[TileWalk]) -> list[Tensor]:
    return [walk.steps[0].keys for walk in walks]


def _window(walk: TileWalk, axis: Axis) -> Tensor:
    """Where in the box of keys the window of each query lies: `(n, T, kernel)`."""
    slots = torch.arange(axis.kernel, device=walk.start.device)
    return (walk.start - walk.first[:, None])[..., None] + slots


def _along(x: Tensor, axis: int, axes: int) -> Tensor:
    """`(n, T, e)` as a view that broadcasts against `(B, n1, n2, .., heads, T1, T2, .., e1, e2, ..)`."""
    shape = [1] * (2 + 3 * axes)
    for place, size in zip((1 + axis, 2 + axes + axis, 2 + 2 * axes + axis), x.shape, strict=True):
        shape[place] = size
    return x.view(shape)


def _apart(x: Tensor, walks: Sequence[TileWalk], last: Sequence[int]) -> Tensor:
    """`(B, n1, .., heads, T1 T2 .., e1 e2 ..)` -> `(B, n1, .., heads, T1, T2, .., e1, e2, ..)`."""
    sides = [walk.queries.shape[1] for walk in walks]
    return x.unflatten(-1, last).unflatten(2 + len(walks), sides)
