"""Convolutions on channels-last grids of 1, 2 or 3 spatial axes.

`x.movedim(-1, 1)` of a contiguous channels-last tensor already has PyTorch's channels_last memory format, so nothing is
copied on the way in or out. Only an image that came channels first gives a map that is copied once: without that, all
layers behind a stem would work across memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn


class _ChannelsLast:
    """Mixin: a convolution that takes and gives `(B, *S, C)`."""

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, C_in)` -> `(B, *S', C_out)`."""
        return super().forward(x.movedim(-1, 1)).movedim(1, -1).contiguous()  # type: ignore[misc]


class Conv1d(_ChannelsLast, nn.Conv1d):
    """nn.Conv1d on `(B, L, C)`."""


class Conv2d(_ChannelsLast, nn.Conv2d):
    """nn.Conv2d on `(B, H, W, C)`."""


class Conv3d(_ChannelsLast, nn.Conv3d):
    """nn.Conv3d on `(B, T, H, W, C)`."""


class PixelShuffle(_ChannelsLast, nn.PixelShuffle):
    """nn.PixelShuffle on channels-last maps: `(B, H, W, C r²)` -> `(B, r H, r W, C)` (Shi et al., 2016)."""


def conv(dims: int) -> type[nn.Module]:
    """The channels-last convolution for `dims` spatial axes."""
    return {1: Conv1d, 2: Conv2d, 3: Conv3d}[dims]


def depthwise(dim: int, kernel_size: int, *, dims: int = 2, bias: bool = True) -> nn.Module:
    """Depthwise convolution of odd `kernel_size` that keeps the size of a channels-last grid."""
    return conv(dims)(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, bias=bias)


class SqueezeExcite(nn.Module):
    """x * gate(fc2(act(fc1(mean over space of x)))) (Hu et al., 2018), channels last.

    Args:
        hidden: inner width. gate: sigmoid, or what a system has in its place. bias: of both linear layers.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        act: Callable[[], nn.Module] = nn.ReLU,
        gate: Callable[[], nn.Module] = nn.Sigmoid,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, bias=bias)
        self.act = act()
        self.fc2 = nn.Linear(hidden, dim, bias=bias)
        self.gate = gate()

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        axes = tuple(range(1, x.dim() - 1))
        return x * self.gate(self.fc2(self.act(self.fc1(x.mean(axes, keepdim=True)))))


def pad_same(x: Tensor, kernel_size: int, stride: int) -> Tensor:
    """Zero-pad a channels-last `(B, H, W, C)` as TensorFlow's SAME does: the odd pixel goes to the bottom and right."""
    sides: list[int] = [0, 0]
    for length in (x.shape[2], x.shape[1]):
        total = max((-(-length // stride) - 1) * stride + kernel_size - length, 0)
        sides += [total // 2, total - total // 2]
    return F.pad(x, sides)
