"""Mixing in the frequency domain."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import checks


class GlobalFilter(nn.Module):
    r"""A learned factor for each frequency and channel (GFNet, Rao et al., 2021, arXiv 2107.00645).

    $$\mathrm{out} = \mathcal{F}^{-1}(W \odot \mathcal{F}(x))$$

    F is the orthonormal discrete Fourier transform over all spatial axes. This is a depthwise circular convolution with
    kernels as large as the grid, F^-1(W) up to the factor sqrt(N), for N log N products a channel. The factors belong to one
    `grid`; on another they are interpolated (linear in each axis, corners kept). Products are in float32 at least.

    `weight` is `(*grid[:-1], grid[-1] // 2 + 1, dim, 2)`, real and imaginary parts last: the spectrum of real numbers is
    symmetric, so half of it is kept.
    """

    def __init__(self, dim: int, grid: Sequence[int]) -> None:
        super().__init__()
        checks.positive("dim", dim)
        self.grid = checks.tuple_of("grid", grid, len(grid))
        self.weight = nn.Parameter(0.02 * torch.randn(*self.grid[:-1], self.grid[-1] // 2 + 1, dim, 2))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape and dtype."""
        spatial = x.shape[1:-1]
        if len(spatial) != len(self.grid):
            raise ValueError(f"x must have {len(self.grid)} spatial axes, as grid={self.grid}, got {tuple(x.shape)}.")
        if x.shape[0] == 0:  # MKL refuses to transform nothing
            return torch.zeros_like(x)
        axes = tuple(range(1, x.dim() - 1))
        spectrum = torch.fft.rfftn(x if x.dtype == torch.float64 else x.float(), dim=axes, norm="ortho")
        factors = torch.view_as_complex(self.factors(spectrum.shape[1:-1]).contiguous())
        return torch.fft.irfftn(spectrum * factors, s=spatial, dim=axes, norm="ortho").to(x.dtype)

    def factors(self, frequencies: Sequence[int]) -> Tensor:
        """The weight at so many frequencies along each axis: `(*frequencies, dim, 2)`, float32 at least."""
        weight = self.weight if self.weight.dtype == torch.float64 else self.weight.float()
        if tuple(frequencies) == tuple(weight.shape[:-2]):
            return weight
        mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(self.grid)]
        planes = weight.movedim(-1, 0).movedim(-1, 1)  # (2, dim, *frequencies)
        return F.interpolate(planes, tuple(frequencies), mode=mode, align_corners=True).movedim(1, -1).movedim(0, -1)

    def kernel(self) -> Tensor:
        """The equivalent convolution kernel `(*grid, dim)`: out[i] = sum_j kernel[(i - j) mod grid] x[j]."""
        axes = tuple(range(len(self.grid)))
        spectrum = torch.view_as_complex(self.factors(self.weight.shape[:-2]).contiguous())
        return torch.fft.irfftn(spectrum, s=self.grid, dim=axes, norm="ortho") / math.sqrt(math.prod(self.grid))

    def extra_repr(self) -> str:
        return f"dim={self.weight.shape[-2]}, grid={self.grid}"
