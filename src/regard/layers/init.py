"""Initialisations that papers share."""

from __future__ import annotations

from torch import nn


def vit_init(module: nn.Module, std: float = 0.02) -> None:
    """Linear weights from a normal of `std` cut at ±2, Linear biases zero; everything else keeps PyTorch's default.

    Pass to `model.apply`.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
