"""Convolution and BatchNorm in one piece, as fast networks use them: trained apart, folded together for inference."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import checks
from regard.layers.conv import conv
from regard.layers.drop import DropPath
from regard.layers.norm import BatchNorm

LEVIT_NAMES = ((r"\bc\.weight$", "conv.weight"), (r"\bbn\.", "norm."))
"""`KeyMap.rules` for code that calls the parts of a `ConvNorm` c and bn, as LeViT and its descendants do."""


def flat_kernels(name: str, value: Tensor) -> dict[str, Tensor]:
    """`KeyMap.convert` for checkpoints whose linear layers are 1 x 1 convolutions."""
    return {name: value.flatten(1) if value.shape[2:] == (1, 1) else value}


class ConvNorm(nn.Module):
    """Convolution without bias, then BatchNorm: `(B, *S, dim)` -> `(B, *S', out_dim)`, S' = ceil(S / stride).

    A pointwise one (`kernel_size` 1, no stride, no groups) is a linear layer and takes any number of axes.

    Args:
        kernel_size: odd, one integer or one for each of `axes`.
        weight: initial weight of the BatchNorm; with 0 a residual branch that ends here starts as nothing.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        kernel_size: int | Sequence[int] = 1,
        *,
        stride: int = 1,
        groups: int = 1,
        axes: int = 2,
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        for argument, value in (("dim", dim), ("out_dim", out_dim), ("stride", stride), ("groups", groups)):
            checks.positive(argument, value)
        size = checks.tuple_of("kernel_size", kernel_size, axes)
        checks.odd("kernel_size", *size)
        self.conv: nn.Module
        if set(size) == {1} and stride == groups == 1:
            self.conv = nn.Linear(dim, out_dim, bias=False)
        else:
            padding = tuple(length // 2 for length in size)
            self.conv = conv(axes)(dim, out_dim, size, stride=stride, padding=padding, groups=groups, bias=False)
        self.norm = BatchNorm(out_dim)
        nn.init.constant_(self.norm.weight, weight)

    def forward(self, x: Tensor) -> Tensor:
        """Channels-last grid in and out."""
        return self.norm(self.conv(x))

    def fused(self) -> nn.Module:
        """One convolution (or linear layer) with bias that gives what this gives in evaluation mode."""
        scale, shift = scale_and_shift(self.norm)
        weight = cast(Tensor, self.conv.weight)
        return with_weights(self.conv, weight * scale.view(-1, *[1] * (weight.dim() - 1)), shift)


class RepConv(nn.Module):
    """BN(DW_k(x)) + BN(DW_small(x)): two depthwise convolutions in parallel, one large kernel once folded (RepVGG).

    Args:
        out_dim: a multiple of dim; None keeps dim. kernel_size, small_size: odd, the small one at most as large.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int | None = None,
        *,
        kernel_size: int = 7,
        small_size: int = 3,
        stride: int = 1,
        axes: int = 2,
    ) -> None:
        super().__init__()
        if small_size > kernel_size:
            raise ValueError(f"small_size must be at most kernel_size={kernel_size}, got {small_size}.")
        options: dict[str, Any] = {"stride": stride, "groups": dim, "axes": axes}
        self.large = ConvNorm(dim, out_dim or dim, kernel_size, **options)
        self.small = ConvNorm(dim, out_dim or dim, small_size, **options)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> `(B, *S', out_dim)`, S' = ceil(S / stride)."""
        return self.large(x) + self.small(x)

    def fused(self) -> nn.Module:
        """One convolution: the small kernel goes into the middle of the large one."""
        large, small = cast(nn.Conv2d, self.large), cast(nn.Conv2d, self.small)  # already folded
        margin = (large.kernel_size[0] - small.kernel_size[0]) // 2
        weight = large.weight + F.pad(small.weight, [margin] * 2 * (large.weight.dim() - 2))
        return with_weights(large, weight, cast(Tensor, large.bias) + cast(Tensor, small.bias))


class Residual(nn.Module):
    """x + drop_path(branch(x))."""

    def __init__(self, branch: nn.Module, drop_path: float = 0.0) -> None:
        super().__init__()
        self.branch = branch
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, ...)` -> the same shape."""
        return x + self.drop_path(self.branch(x))

    def fused(self) -> nn.Module:
        """If the branch is one depthwise convolution, the sum goes into the middle of its kernels."""
        branch = self.branch
        if not isinstance(branch, nn.modules.conv._ConvNd) or branch.groups != branch.out_channels:
            return self
        return with_weights(branch, branch.weight + centre_kernel(branch.weight), branch.bias)


def fuse(model: nn.Module) -> nn.Module:
    """A copy of `model` for inference: the same function, with every BatchNorm that follows a convolution folded into it.

    Modules that can be folded have a method `fused()`, which gives their replacement once their own parts are folded.
    """

    def folded(module: nn.Module) -> nn.Module:
        for name, child in module.named_children():
            setattr(module, name, folded(child))
        return module.fused() if hasattr(module, "fused") else module

    with torch.no_grad():
        return folded(copy.deepcopy(model).eval())


def scale_and_shift(norm: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor, Tensor]:
    """What a BatchNorm multiplies by and adds in evaluation mode, for each channel."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias - norm.running_mean * scale


def with_weights(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A copy of a convolution or linear layer with these weights."""
    twin = copy.deepcopy(layer)
    twin.register_parameter("weight", nn.Parameter(weight))
    twin.register_parameter("bias", None if bias is None else nn.Parameter(bias))
    return twin


def centre_kernel(weight: Tensor) -> Tensor:
    """The depthwise kernels `(C, 1, *K)` that leave a grid as it is: 1 in the middle."""
    kernel = weight.new_zeros(weight.shape)
    kernel.flatten(1)[:, weight[0].numel() // 2] = 1  # sides are odd, so the middle of the flat kernel is its middle
    return kernel
