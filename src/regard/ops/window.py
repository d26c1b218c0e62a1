"""Attention inside windows, shifted windows and grids."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from regard import checks
from regard.kernels import OpPath, flex, register, run
from regard.kernels.cpu import paths as cpu
from regard.layouts import windows
from regard.ops import reference


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window_size: int | Sequence[int],
    shift: int | Sequence[int] = 0,
    partition: windows.Partition = "window",
    bias: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Softmax attention among the tokens of each window.

    $$o_i = \sum_{j \in w(i)} \mathrm{softmax}_j(\mathrm{scale} \cdot q_i^\top k_j + b_{s(i) s(j)})\, v_j$$

    with w(i) the window of token i and s(i) its place in the window. Any size works: a map that is no multiple of the
    window is treated as padded at its end, and padding is never attended to.

    Args:
        q: `(batch, *spatial, heads, head_dim)` with 1, 2 or 3 spatial axes; likewise k and v (their heads may be fewer).
        window_size: tokens in a window along each axis; with `partition="grid"`, the number of tokens of each group
            along each axis, spread evenly over the map (MaxViT's grid attention).
        shift: windows start at this offset (Swin's shifted windows). Windows that reach around the edge are cut there.
        bias: `(heads, M, M)` or `(1, M, M)` with M = prod(window_size), added to the logits of every window.
        scale: None is head_dim ** -0.5.

    Returns:
        `(batch, *spatial, heads, value_dim)`.

    Raises:
        ValueError: for sizes that do not fit, a shift not below the window, or a shifted grid.
    """
    checks.heads_last(q, k, v, ranks=(1, 2, 3))
    checks.no_half_on_cpu("window_attention", q)
    axes = q.dim() - 3
    sizes = checks.tuple_of("window_size", window_size, axes)
    steps = checks.tuple_of("shift", shift, axes, minimum=0)
    checks.one_of("partition", partition, ("window", "grid"))
    if any(step >= size for step, size in zip(steps, sizes, strict=True)):
        raise ValueError(
            f"shift must be smaller than the window on every axis, got shift={steps}, window_size={sizes}."
        )
    if partition == "grid" and any(steps):
        raise ValueError(f"a grid partition has no shift, got shift={steps}.")
    tokens = math.prod(sizes)
    if bias is not None and (
        bias.dim() != 3 or bias.shape[0] not in (1, q.shape[-2]) or bias.shape[1:] != (tokens, tokens)
    ):
        raise ValueError(
            f"bias must be (heads, M, M) = {(q.shape[-2], tokens, tokens)} for window_size={sizes}, got {tuple(bias.shape)}."
        )
    return run(
        "window_attention",
        backend,
        q,
        k,
        v,
        window_size=sizes,
        shift=steps,
        partition=partition,
        bias=bias,
        scale=scale,
    )


def _torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window_size: Sequence[int],
    shift: Sequence[int],
    partition: windows.Partition = "window",
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    spatial = q.shape[1:-2]
    axes = tuple(range(1, 1 + len(spatial)))
    padded = tuple(-(-length // size) * size for length, size in zip(spatial, window_size, strict=True))
    repeat = q.shape[-2] // k.shape[-2]
    if repeat > 1:
        k, v = k.repeat_interleave(repeat, -2), v.repeat_interleave(repeat, -2)

    def group(x: Tensor) -> Tensor:
        x = windows.pad_to_multiple(x, window_size)
        if any(shift):
            x = x.roll([-step for step in shift], axes)
        return windows.partition(x, window_size, partition).transpose(2, 3)  # (B, windows, heads, M, dim)

    q, k, v = group(q * (q.shape[-1] ** -0.5 if scale is None else scale)), group(k), group(v)
    # Windows are small: plain products and softmax beat a fused kernel that needs the bias spread over all windows.
    logits = q @ k.transpose(-1, -2)
    if bias is not None:
        logits = logits + bias.to(q.dtype)
    if any(shift) or padded != tuple(spatial):
        regions = windows.shift_regions(spatial, padded, window_size, shift).to(q.device)
        region = windows.partition(regions[None], window_size, partition)[0]  # (windows, M)
        apart = (region[:, :, None] != region[:, None, :])[:, None]  # (windows, 1, M, M)
        logits = logits.masked_fill(apart, -math.inf)
    out = windows.unpartition((logits.softmax(-1) @ v).transpose(2, 3), window_size, padded, partition)
    if any(shift):
        out = out.roll(list(shift), axes)
    return windows.crop(out, spatial)


def _macs(q: Tensor, k: Tensor, v: Tensor, *, window_size: Sequence[int], **_: object) -> int:
    """M (head_dim + value_dim) products a head and token, tokens of partial windows counted in full windows."""
    padded = math.prod(-(-length // size) * size for length, size in zip(q.shape[1:-2], window_size, strict=True))
    return q.shape[0] * q.shape[-2] * padded * math.prod(window_size) * (q.shape[-1] + v.shape[-1])


register("window_attention", OpPath("cpu", cpu.window_attention, cpu.refuses))
register("window_attention", OpPath("flex", flex.window_attention, flex.refuses, flex.declines_window))
register("window_attention", OpPath("torch", _torch), macs=_macs)
register("window_attention", OpPath("reference", reference.window_attention))
