"""Neighborhood attention in 1, 2 and 3 dimensions: strided, dilated, causal, with relative position bias."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from regard import checks
from regard.kernels import OpPath, flex, natten, register, run
from regard.kernels.cpu import paths as cpu
from regard.layouts.neighborhoods import AxisTiles, axis_tiles, offset_biases, restore
from regard.ops import reference

_CHUNK = 1 << 22
"""Most logits that are held at once (numbers, over batch and heads) unless a single row of tiles needs more."""


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Softmax attention of every token over its neighborhood.

    $$o_i = \sum_{j \in \rho(i)} \mathrm{softmax}_j(\mathrm{scale} \cdot q_i^\top k_j + b_{j - i})\, v_j$$

    where $\rho(i)$ is a product of one window an axis. Along an axis the tokens with equal position modulo the dilation
    form a group; inside its group a token sees the `kernel_size` tokens around its leader (itself for stride 1, else
    the middle of its `stride` neighbours), pushed inwards at the borders so that no key is missing. On a causal axis
    the window ends at the token itself. Stride 1 is neighborhood attention (arXiv 2204.07143), dilation above 1 DiNA
    (2209.15001), stride = kernel size blocked attention, the rest Generalized Neighborhood Attention (2504.16922).

    Args:
        q: `(batch, *spatial, heads, head_dim)` with 1, 2 or 3 spatial axes; so k and v (their heads may be fewer).
        kernel_size: window width per axis, odd or even; kernel_size * dilation must fit into the axis.
        stride: queries that share a window, at most kernel_size.
        dilation: gap between the tokens of a window.
        causal: per axis.
        bias: `(heads, 2 kernel - 1, ...)`, one axis for each spatial axis, indexed by (key rank - query rank) +
            kernel - 1 within the dilation group.
        scale: None is head_dim ** -0.5.
        return_lse: also return the log of the softmax denominator, `(batch, *spatial, heads)`.

    Returns:
        `(batch, *spatial, heads, value_dim)`, with the log-sum-exp if asked for.

    Raises:
        ValueError: for a window that does not fit into the map, a stride above the window, or shapes that do not agree.
    """
    kernel, steps, gaps, past = neighborhood_arguments(q, k, v, kernel_size, stride, dilation, causal, bias)
    return run(
        "neighborhood_attention",
        backend,
        q,
        k,
        v,
        kernel_size=kernel,
        stride=steps,
        dilation=gaps,
        causal=past,
        bias=bias,
        scale=scale,
        return_lse=return_lse,
    )


def neighborhood_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    dilation: int | Sequence[int],
    causal: bool | Sequence[bool],
    bias: Tensor | None,
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[bool, ...]]:
    """Check the arguments of `neighborhood_attention`; kernel size, stride, dilation and causality of each axis."""
    checks.heads_last(q, k, v, ranks=(1, 2, 3))
    checks.no_half_on_cpu("neighborhood_attention", q)
    spatial = q.shape[1:-2]
    kernel = checks.tuple_of("kernel_size", kernel_size, len(spatial))
    steps = checks.tuple_of("stride", stride, len(spatial))
    gaps = checks.tuple_of("dilation", dilation, len(spatial))
    past = checks.tuple_of_bools("causal", causal, len(spatial))
    for length, width, step, gap in zip(spatial, kernel, steps, gaps, strict=True):
        if width * gap > length:
            raise ValueError(
                f"kernel_size * dilation must fit into every axis, got kernel_size={kernel}, dilation={gaps} for "
                f"spatial sizes {tuple(spatial)}. Use a smaller window or dilation, or pad the map."
            )
        if step > width:
            raise ValueError(f"stride must not exceed kernel_size, got stride={steps}, kernel_size={kernel}.")
    table = (q.shape[-2], *(2 * width - 1 for width in kernel))
    if bias is not None and tuple(bias.shape) != table:
        raise ValueError(f"bias must be (heads, 2 * kernel - 1, ...) = {table}, got {tuple(bias.shape)}.")
    return kernel, steps, gaps, past


def _torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    causal: Sequence[bool],
    bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    # Letters: n tiles, p patterns of tiles, T queries a tile, E keys a tile (the box that holds all windows of the
    # tile), h heads. Each tile is one small dense product; the table of biases is built for each pattern only.
    spatial, axes = q.shape[1:-2], q.dim() - 3
    tiles = [
        axis_tiles(length, width, step, gap, past, _tile(axes, width, -(-length // gap)))
        for length, width, step, gap, past in zip(spatial, kernel_size, stride, dilation, causal, strict=True)
    ]
    tiles = [AxisTiles(*[part.to(q.device) for part in tile]) for tile in tiles]
    repeat = q.shape[-2] // k.shape[-2]
    if repeat > 1:
        k, v = k.repeat_interleave(repeat, -2), v.repeat_interleave(repeat, -2)
    q, k, v = q * (q.shape[-1] ** -0.5 if scale is None else scale), k.contiguous(), v.contiguous()
    if bias is None:
        bias = q.new_zeros([1, *[2 * width - 1 for width in kernel_size]])
    table = offset_biases(bias.to(q.dtype), [t.offset for t in tiles])
    # The first axis is cut into chunks of tiles, so that the memory stays bounded whatever the size of the map.
    inner = math.prod([t.pattern.numel() * t.offset[0].numel() for t in tiles[1:]])
    per_tile = q.shape[0] * q.shape[-2] * inner * tiles[0].offset[0].numel()
    chunk = max(1, _CHUNK // max(per_tile, 1))
    outs, lses = [], []
    for first in range(0, len(tiles[0].pattern), chunk):
        out, lse = _attend([_cut(tiles[0], slice(first, first + chunk)), *tiles[1:]], q, k, v, table, return_lse)
        outs.append(out)
        lses.append(lse)
    out = restore(torch.cat(outs, 1) if len(outs) > 1 else outs[0], tiles)
    if not return_lse:
        return out
    lse = torch.cat(lses, 1) if len(lses) > 1 else lses[0]  # type: ignore[arg-type]
    return out, restore(lse, tiles).squeeze(-1)  # type: ignore[arg-type]


def _tile(axes: int, width: int, group: int) -> int:
    """Queries per tile along an axis: small tiles waste fewer products, large ones copy fewer keys."""
    most = {1: 32, 2: 8, 3: 4}[axes]
    if group <= most:
        return group
    return 4 if axes == 2 and width < 8 else most


def _cut(tiles: AxisTiles, part: slice) -> AxisTiles:
    return tiles._replace(queries=tiles.queries[part], keys=tiles.keys[part], pattern=tiles.pattern[part])


def _rows(positions: Sequence[Tensor], batch: int, spatial: Sequence[int], heads: int) -> Tensor:
    """Rows of `(B * S1 * S2 .. * h, d)` that make up boxes with positions `(n, s)` per axis: `(B, n1, .., h, s1, ..)`."""
    axes = len(positions)

    def along(values: Tensor, *places: int) -> Tensor:
        shape = [1] * (2 + 2 * axes)
        for place, size in zip(places, values.shape, strict=True):
            shape[place] = size
        return values.view(shape)

    device = positions[0].device
    rows = along(torch.arange(batch, device=device), 0)
    for axis, (position, length) in enumerate(zip(positions, spatial, strict=True)):
        rows = rows * length + along(position, 1 + axis, 2 + axes + axis)
    return rows * heads + along(torch.arange(heads, device=device), 1 + axes)


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """Gather boxes: `(B, *S, h, d)` -> `(B, n1, n2, .., h, s1 s2 .., d)`, in one pass over whole rows."""
    boxes = x.reshape(-1, x.shape[-1]).index_select(0, rows.flatten()).view(*rows.shape, x.shape[-1])
    return boxes.flatten(x.dim() - 1, -2)


def _attend(
    tiles: Sequence[AxisTiles], q: Tensor, k: Tensor, v: Tensor, table: Tensor, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Dense attention in every tile: `(B, n1, n2, .., h, T, d)`, and its log-sum-exp `(.., T, 1)` if wanted."""
    batch, *spatial, heads, _ = q.shape
    q = _take(q, _rows([t.queries for t in tiles], batch, spatial, heads))
    rows = _rows([t.keys for t in tiles], batch, spatial, heads)
    k, v = _take(k, rows), _take(v, rows)
    for axis, tile in enumerate(tiles):
        table = table.index_select(axis, tile.pattern)
    logits = (q @ k.transpose(-1, -2)).add_(table)
    lse = logits.logsumexp(-1, keepdim=True) if return_lse else None
    return logits.softmax(-1) @ v, lse


def neighborhood_macs(q: Tensor, k: Tensor, v: Tensor, *, kernel_size: Sequence[int], **_: object) -> int:
    """prod(kernel) (head_dim + value_dim) products a head and token."""
    return q.shape[0] * math.prod(q.shape[1:-1]) * math.prod(kernel_size) * (q.shape[-1] + v.shape[-1])


register("neighborhood_attention", OpPath("cpu", cpu.neighborhood_attention, cpu.refuses))
register("neighborhood_attention", OpPath("natten", natten.neighborhood_attention, natten.refuses_neighborhood))
register(
    "neighborhood_attention", OpPath("flex", flex.neighborhood_attention, flex.refuses, flex.declines_neighborhood)
)
register("neighborhood_attention", OpPath("torch", _torch), macs=neighborhood_macs)
register("neighborhood_attention", OpPath("reference", reference.neighborhood_attention))
