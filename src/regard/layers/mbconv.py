"""The inverted residual of mobile networks, in its pre-activation form."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from regard import checks
from regard.layers.conv import Conv2d, SqueezeExcite, pad_same
from regard.layers.drop import DropPath
from regard.layers.norm import BatchNorm


class MBConv(nn.Module):
    r"""Norm, expand, depthwise convolution, squeeze-and-excitation, project; plus a pooled shortcut (CoAtNet, MaxViT).

    $$y = s(x) + W_2\,\mathrm{SE}(a(n_2(\mathrm{DW}(a(n_1(W_1\,n_0(x)))))))$$

    n are norms, a the activation, W 1 x 1 convolutions; DW carries the stride. The shortcut s is average pooling if
    there is a stride, then a 1 x 1 convolution if the channels change. Padding is TensorFlow's SAME: with a stride the
    odd pixel goes to the bottom and right, and pooling takes the mean over the pixels that exist.

    Args:
        dim, out_dim: channels in and out; out_dim None keeps dim.
        expand_ratio: inner channels as a multiple of out_dim.
        se_ratio: hidden channels of squeeze-and-excitation as a multiple of out_dim (not of the inner channels); 0
            leaves it out. Its inner activation is SiLU.
        norm: of channels -> module; in the convolution branch only.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int | None = None,
        *,
        kernel_size: int = 3,
        stride: int = 1,
        expand_ratio: float = 4.0,
        se_ratio: float = 0.25,
        norm: Callable[[int], nn.Module] = BatchNorm,
        act: Callable[[], nn.Module] = nn.GELU,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        out_dim = dim if out_dim is None else out_dim
        for argument, value in (("dim", dim), ("out_dim", out_dim), ("kernel_size", kernel_size), ("stride", stride)):
            checks.positive(argument, value)
        inner = int(out_dim * expand_ratio)
        self.kernel_size, self.stride = kernel_size, stride
        self.pre_norm = norm(dim)
        self.expand = nn.Linear(dim, inner, bias=False)
        self.norm1 = norm(inner)
        self.depthwise = Conv2d(inner, inner, kernel_size, stride=stride, groups=inner, bias=False)
        self.norm2 = norm(inner)
        self.act = act()
        self.se = SqueezeExcite(inner, max(int(out_dim * se_ratio), 1), act=nn.SiLU) if se_ratio else nn.Identity()
        self.project = nn.Linear(inner, out_dim)
        self.shortcut = nn.Linear(dim, out_dim) if dim != out_dim else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, W, dim)` -> `(B, H / stride, W / stride, out_dim)`, sizes rounded up."""
        y = self.act(self.norm1(self.expand(self.pre_norm(x))))
        y = self.act(self.norm2(self.depthwise(pad_same(y, self.kernel_size, self.stride))))
        y = self.project(self.se(y))
        if self.stride > 1:
            x = F.avg_pool2d(x.movedim(-1, 1), self.stride, ceil_mode=True, count_include_pad=False).movedim(1, -1)
        return self.shortcut(x) + self.drop_path(y)
