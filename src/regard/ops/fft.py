"""Long convolution through the Fourier transform."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from regard import checks
from regard.kernels import OpPath, register, run
from regard.ops import reference


def fft_conv(
    x: Tensor,
    kernel: Tensor,
    *,
    causal: bool | Sequence[bool] = False,
    skip: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Depthwise convolution with a kernel of any size, up to that of the grid and beyond, for N log N products a channel.

    $$y_i = \sum_a k_a\, x_{i - o(a)} + D x_i, \quad x = 0 \text{ outside of the grid}$$

    Along a causal axis tap a lies o(a) = a positions back (0 is the position itself); along another, o(a) = a - K // 2, so
    that the kernel is centred and has to be odd. A causal kernel as long as the axis reaches all of the past, a centred one
    of 2 L - 1 taps everything. With more than one causal axis a position sees the quadrant before it (the corner that
    comes first along all of them). It is a true convolution: `nn.Conv2d` turns its kernel around.

    Transforms are in float32 at least. Their rounding errors are relative to the largest values and spread over the whole
    grid: what lies ahead of a causal position reaches it in that size, and one NaN reaches everything.

    The cost is counted as that of radix-2 transforms: n log2 n products for each of a real signal of n points, padding
    included.

    Args:
        x: `(batch, *spatial, channels)`, 1 to 3 spatial axes.
        kernel: k, `(*taps, channels)`. Taps that reach no position are left out.
        causal: for all axes, or one for each.
        skip: D, `(channels,)`.

    Returns:
        The shape and dtype of x.

    Raises:
        ValueError: for shapes that do not agree, or an even kernel along an axis that is not causal.
    """
    spatial = checks.grid("x", x, (1, 2, 3))
    channels = x.shape[-1]
    if kernel.dim() != len(spatial) + 1 or kernel.shape[-1] != channels or 0 in kernel.shape:
        raise ValueError(
            f"kernel must be (*taps, channels) with {len(spatial)} axes of taps and {channels} channels, got shape "
            f"{tuple(kernel.shape)}."
        )
    if skip is not None and tuple(skip.shape) != (channels,):
        raise ValueError(f"skip must have shape ({channels},), got {tuple(skip.shape)}.")
    past = checks.tuple_of_bools("causal", causal, len(spatial))
    checks.odd(
        "kernel along an axis that is not causal", *(k for k, p in zip(kernel.shape, past, strict=False) if not p)
    )
    return run("fft_conv", backend, x, kernel, causal=past, skip=skip)


def _good_size(least: int) -> int:
    """The next size of the form 2^a or 3 x 2^a: others, powers of 3 and 5 among them, can take several times as long."""
    size = 1
    while size < least:
        size *= 2
    return 3 * size // 4 if 3 * size // 4 >= least else size


def _plan(
    spatial: Sequence[int], taps: Sequence[int], causal: Sequence[bool]
) -> tuple[list[slice], list[int], list[slice]]:
    """For each axis: the taps that reach a position, the points of the transform, and where the results lie in it.

    The transform wraps around, so it needs room for what would fall onto a result; that of a centred kernel may wrap into
    the margin before the results.
    """
    used, sizes, results = [], [], []
    for length, count, past in zip(spatial, taps, causal, strict=True):
        middle = 0 if past else count // 2
        before, after = min(middle, length - 1), min(count - 1 - middle, length - 1)
        used.append(slice(middle - before, middle + after + 1))
        sizes.append(_good_size(length + after))
        results.append(slice(before, before + length))
    return used, sizes, results


def _torch(x: Tensor, kernel: Tensor, *, causal: Sequence[bool], skip: Tensor | None = None) -> Tensor:
    if x.shape[0] == 0:  # MKL refuses to transform nothing
        return torch.zeros_like(x)
    used, sizes, results = _plan(x.shape[1:-1], kernel.shape[:-1], causal)
    wide = torch.promote_types(x.dtype, torch.float32)
    axes = tuple(range(-len(sizes), 0))
    # Channels first and contiguous: along strided axes a transform takes several times as long.
    signal = torch.fft.rfftn(x.movedim(-1, 1).to(wide).contiguous(), s=sizes, dim=axes)
    factors = torch.fft.rfftn(kernel[tuple(used)].movedim(-1, 0).to(wide).contiguous(), s=sizes, dim=axes)
    y = signal * factors
    for axis, size, result in zip(axes[:-1], sizes, results, strict=False):
        # Back axis by axis, so that what is cut off along one is not transformed along the next.
        y = torch.fft.ifft(y, n=size, dim=axis).narrow(axis, result.start, result.stop - result.start)
    y = torch.fft.irfft(y, n=sizes[-1])[..., results[-1]].movedim(1, -1)
    if skip is not None:
        y = y + skip * x
    return y.to(x.dtype)


def _macs(x: Tensor, kernel: Tensor, *, causal: Sequence[bool], **_: object) -> int:
    """Transforms of the signal, the kernel and the result, and the complex products between."""
    points = math.prod(_plan(x.shape[1:-1], kernel.shape[:-1], causal)[1])
    signals = x.shape[0] * x.shape[-1]
    return round((2 * signals + x.shape[-1]) * points * math.log2(points)) + 2 * signals * points


register("fft_conv", OpPath("torch", _torch), macs=_macs)
register("fft_conv", OpPath("reference", reference.fft_conv))
