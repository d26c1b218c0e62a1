"""Where a token is: relative position bias tables, fixed sine codes, slopes of linear decay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.layouts import tables


def relative_index(window_size: Sequence[int], sign: Literal["query-key", "key-query"] = "query-key") -> Tensor:
    """Flat table index of every (query, key) pair of a window: `(M, M)` int64 into prod(2 size - 1) entries."""
    index = torch.zeros(1, 1, dtype=torch.long)
    for size in window_size:
        place = torch.arange(size)
        offset = place[:, None] - place if sign == "query-key" else place - place[:, None]
        wide = index[:, None, :, None] * (2 * size - 1) + (offset + size - 1)[None, :, None, :]
        index = wide.flatten(2, 3).flatten(0, 1)
    return index


class RelativePositionBias(nn.Module):
    """A learned bias for each head and relative offset in a window.

    `table` is `(prod(2 size - 1), heads)`; calling the module gives `(heads, M, M)` with M = prod(window_size), or the
    part of it among the tokens of a smaller window.
    """

    index: Tensor

    def __init__(
        self,
        window_size: Sequence[int],
        num_heads: int,
        *,
        sign: Literal["query-key", "key-query"] = "query-key",
        std: float = 0.02,
    ) -> None:
        super().__init__()
        self.window_size = tuple(window_size)
        self.table = nn.Parameter(torch.empty(math.prod(2 * size - 1 for size in window_size), num_heads))
        nn.init.trunc_normal_(self.table, std=std)
        self.register_buffer("index", relative_index(window_size, sign), persistent=False)

    def forward(self, size: Sequence[int] | None = None) -> Tensor:
        """The bias of every head and (query, key) pair of a window of `size`, by default the whole: `(heads, M, M)`."""
        bias = self.table[self.index].permute(2, 0, 1)
        if size is None or tuple(size) == self.window_size:
            return bias
        axes = len(self.window_size)
        bias = bias.unflatten(2, self.window_size).unflatten(1, self.window_size)
        for axis, length in enumerate(size):
            bias = bias.narrow(1 + axis, 0, length).narrow(1 + axes + axis, 0, length)
        return bias.flatten(1 + axes, 2 * axes).flatten(1, axes)

    def extra_repr(self) -> str:
        return f"window_size={self.window_size}, num_heads={self.table.shape[1]}"


@tables.table
def _offsets(*window_size: int) -> tuple[np.ndarray, np.ndarray]:
    """All offsets in a window `(prod(2 size - 1), axes)`, and which of them every (query, key) pair has `(M, M)`."""
    wide = [2 * size - 1 for size in window_size]
    offsets = np.stack(np.unravel_index(np.arange(math.prod(wide)), wide), -1) - np.array(window_size) + 1
    places = np.stack(np.unravel_index(np.arange(math.prod(window_size)), window_size))
    index = np.ravel_multi_index(
        tuple(places[:, :, None] - places[:, None] + np.array(window_size)[:, None, None] - 1), wide
    )
    return offsets.astype(np.float32), index


@tables.table
def _distance_index(*grid: int) -> tuple[np.ndarray]:
    """Which of prod(grid) distances every pair of places has, `(N, N)`: distances along the axes, row-major."""
    places = np.stack([axis.ravel() for axis in np.indices(grid)])
    return (np.ravel_multi_index(tuple(np.abs(places[:, :, None] - places[:, None])), grid),)


class DistanceBias(nn.Module):
    """A learned bias for each head and distance along each axis of a grid (LeViT, Graham et al., 2021, section 4.2).

    `table` is `(heads, prod(grid))`, zero at first. On grids of another size it is interpolated.
    """

    def __init__(self, grid: Sequence[int], num_heads: int) -> None:
        super().__init__()
        self.grid = tuple(grid)
        self.table = nn.Parameter(torch.zeros(num_heads, math.prod(grid)))

    def forward(self, spatial: Sequence[int]) -> Tensor:
        """The bias of every head and (query, key) pair: `(heads, N, N)` with N = prod(spatial)."""
        table = resize_map(self.table.unflatten(1, self.grid)[None], spatial)[0].flatten(1)
        (index,) = _distance_index(*spatial)
        return table[:, index.to(table.device)]

    def extra_repr(self) -> str:
        return f"grid={self.grid}, num_heads={self.table.shape[0]}"


class DynamicPositionBias(nn.Module):
    r"""A bias for each head and relative offset that a small network computes from the offset (CrossFormer, section 3.3).

    $$b = f_3(f_2(f_1(W o))),\quad f_i(x) = W_i\,\mathrm{ReLU}(\mathrm{LN}(x)) + b_i$$

    with o the offset `(axes,)` of query minus key and b `(heads,)`. The same weights serve windows of every size.

    Args:
        hidden: width of the network. With fewer than 3 channels its norms leave hardly any of the offset.
        axes: number of spatial axes.
    """

    def __init__(self, num_heads: int, hidden: int, *, axes: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(axes, hidden)
        self.layers = nn.Sequential(
            *(
                nn.Sequential(nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, width))
                for width in (hidden, hidden, num_heads)
            )
        )

    def forward(self, window_size: Sequence[int]) -> Tensor:
        """The bias of every head and (query, key) pair of a window: `(heads, M, M)`."""
        offsets, index = _offsets(*window_size)
        biases = self.layers(self.embed(offsets.to(self.embed.weight)))
        return biases[index.to(biases.device)].permute(2, 0, 1)


def resize_table(table: Tensor, old: Sequence[int], new: Sequence[int], mode: str = "bicubic") -> Tensor:
    """Interpolate a bias table `(prod(2 old - 1), heads)` of windows `old` to windows `new`: `(prod(2 new - 1), heads)`."""
    if tuple(old) == tuple(new):
        return table
    grid = table.t().unflatten(1, [2 * size - 1 for size in old])[None]
    resized = F.interpolate(grid, [2 * size - 1 for size in new], mode=mode, align_corners=False)
    return resized[0].flatten(1).t().contiguous()


def resize_bias_tables(state: dict[str, Tensor], own: dict[str, Tensor], mode: str = "bicubic") -> dict[str, Tensor]:
    """`state` with every `RelativePositionBias` table of square windows resized to the window that `own` has there."""
    for key, table in state.items():
        if key.endswith("bias.table") and key in own and own[key].shape[1:] == table.shape[1:]:
            old, new = (int(t.shape[0] ** 0.5 + 1) // 2 for t in (table, own[key]))
            state[key] = resize_table(table, (old, old), (new, new), mode)
    return state


def resize_map(x: Tensor, size: Sequence[int]) -> Tensor:
    """(Bi-, tri-)linear interpolation of `(B, C, *S)` to `(B, C, *size)`; pixel centres keep their place."""
    if tuple(x.shape[2:]) == tuple(size):
        return x
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(size)]
    return F.interpolate(x, tuple(size), mode=mode, align_corners=False)


def resize_sequence_table(table: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """Interpolate (bicubic) the position table `(1, first + prod(old), dim)` of a sequence that ends with a 2d grid.

    The `first` entries, of class tokens, stay as they are.
    """
    if tuple(old) == tuple(new):
        return table
    first = table.shape[1] - math.prod(old)
    grid = table[:, first:].unflatten(1, tuple(old)).movedim(-1, 1)
    grid = F.interpolate(grid, tuple(new), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    return torch.cat([table[:, :first], grid], 1)


class PositionTable(nn.Module):
    """A learned vector for each place of a grid, added to the tokens; on grids of another size it is interpolated.

    `table` is `(1, prod(grid), dim)`, places in row-major order.
    """

    def __init__(self, grid: Sequence[int], dim: int, *, std: float = 0.02) -> None:
        super().__init__()
        self.grid = tuple(grid)
        self.table = nn.Parameter(torch.empty(1, math.prod(grid), dim))
        nn.init.trunc_normal_(self.table, std=std)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        table = self.table.unflatten(1, self.grid).movedim(-1, 1)
        return x + resize_map(table, x.shape[1:-1]).movedim(1, -1)

    def extra_repr(self) -> str:
        return f"grid={self.grid}, dim={self.table.shape[-1]}"


@tables.table
def _rows_of_offsets(buckets: int, *sizes: int) -> tuple[np.ndarray]:
    """Rows of an `OffsetTable` for every offset of a grid, `(*(2 spatial - 1))`; `sizes` are the table's, then the grid's."""
    axes = len(sizes) // 2
    rows = np.zeros((), np.int64)
    for size, length in zip(sizes[:axes], sizes[axes:], strict=True):
        offset = np.arange(1 - length, length)
        if buckets:
            half, exact = buckets // 2, buckets // 4
            steps = np.log(np.maximum(np.abs(offset), exact) / exact) / np.log(size / exact) * (half - exact)
            near = np.abs(offset) < exact
            bucket = np.sign(offset) * np.where(near, np.abs(offset), np.minimum(exact + steps.astype(int), half - 1))
            row, count = np.where(bucket >= 0, bucket + 2, bucket) + half - 1, buckets + 1
        else:
            row, count = np.clip(offset, 1 - size, size - 1) + size - 1, 2 * size - 1
        rows = rows[..., None] * count + row
    return (rows,)


class OffsetTable(nn.Module):
    """A learned number for each head and each offset of a key from its query (key minus query), on grids of any size.

    `table` is `(prod(2 size - 1), heads)`, offsets in row-major order from 1 - size to size - 1 along each axis. Offsets
    beyond the table have its outermost entries.

    Args:
        size: places along each axis. num_heads: columns.
        value: all entries at first; None draws them from N(0, std^2).
        buckets: on one axis, share entries between distant offsets: exact below a quarter of `buckets`, then
            logarithmically up to `size` (T5's rule, with one half of the buckets for either side). `buckets` + 1 rows.
    """

    def __init__(
        self,
        size: Sequence[int],
        num_heads: int,
        *,
        value: float | None = None,
        std: float = 0.02,
        buckets: int | None = None,
    ) -> None:
        super().__init__()
        self.size, self.buckets = tuple(size), buckets or 0
        if buckets is not None and (len(self.size) != 1 or buckets % 4 or not 4 <= buckets < 4 * self.size[0]):
            raise ValueError(
                f"buckets must be a multiple of 4 below 4 size, on one axis, got buckets={buckets} with size={self.size}."
            )
        rows = buckets + 1 if buckets else math.prod(2 * side - 1 for side in self.size)
        self.table = nn.Parameter(torch.empty(rows, num_heads))
        if value is None:
            nn.init.normal_(self.table, std=std)
        else:
            nn.init.constant_(self.table, value)

    def forward(self, spatial: Sequence[int]) -> Tensor:
        """The numbers of all offsets on a grid, from 1 - S to S - 1 along each axis: `(heads, *(2 spatial - 1))`."""
        (rows,) = _rows_of_offsets(self.buckets, *self.size, *spatial)
        return self.table[rows.to(self.table.device)].movedim(-1, 0)

    def matrix(self, spatial: Sequence[int]) -> Tensor:
        """The numbers of all (query, key) pairs of a grid, a (block) Toeplitz matrix: `(heads, N, N)`, N = prod(spatial)."""
        values, axes = self(spatial), len(spatial)
        for axis, length in enumerate(spatial):
            # Query i sees the offsets -i .. S - 1 - i: windows of the offsets, the last one for query 0.
            values = values.unfold(1 + axis, length, 1).flip(1 + axis)
        return values.flatten(1 + axes).flatten(1, axes)

    def extra_repr(self) -> str:
        return f"size={self.size}, num_heads={self.table.shape[1]}" + (f", buckets={self.buckets}" * bool(self.buckets))


def sincos(positions: Tensor, dim: int, *, base: float = 10000.0, interleaved: bool = True) -> Tensor:
    """Sine and cosine code of positions `(...,)`: `(..., dim)` (Vaswani et al., 2017, section 3.5).

    Channel pair i turns with frequency base^(-2i/dim). Interleaved: sine on even, cosine on odd channels; otherwise all
    sines, then all cosines. `dim` must be even.
    """
    if dim % 2:
        raise ValueError(f"dim must be even for a sine code, got {dim}.")
    rates = base ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim)
    angles = positions.double()[..., None] * rates
    pair = torch.stack([angles.sin(), angles.cos()], -1 if interleaved else -2)
    return pair.flatten(-2).float()


def alibi_slopes(num_heads: int) -> list[float]:
    """Rates at which heads forget with distance, from fast to slow (ALiBi, Press et al., 2022, section 3).

    For a power of two H: 2^(-8 (h + 1) / H), h = 0 .. H-1. For other numbers, the slopes of the power of two below, then
    every second slope of the power of two above.
    """
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (head + 1) / power) for head in range(power)]
    return slopes + [2.0 ** (-4 * (2 * head + 1) / power) for head in range(num_heads - power)]
