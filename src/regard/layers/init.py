"""Initialisations that papers share."""

from __future__ import annotations

import math

from torch import nn


def vit_init(module: nn.Module, std: float = 0.02) -> None:
    """Linear weights from a normal of `std` cut at ±2, Linear biases zero; everything else keeps PyTorch's default.

    Pass to `model.apply`.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def kernel_init(module: nn.Module, std: float = 0.02) -> None:
    """As `vit_init`, for convolutions as well as Linear layers."""
    if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
        nn.init.trunc_normal_(module.weight, std=std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def fan_out_init(module: nn.Module) -> None:
    """As `vit_init`, and kernels from a normal of deviation sqrt(2 / fan-out), their biases zero (as PVT v2 has it)."""
    vit_init(module)
    if isinstance(module, nn.modules.conv._ConvNd):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
