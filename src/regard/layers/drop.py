"""Regularisation of residual branches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regard import checks


class DropPath(nn.Module):
    """Stochastic depth: in training, zero a sample's whole branch with probability `rate`, scale the others by 1/(1-rate).

    Huang et al., 2016 (arXiv 1603.09382), applied per sample.
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"drop_path rate must be in [0, 1), got {rate}.")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Any shape with the batch first."""
        if self.rate == 0 or not self.training:
            return x
        keep = x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(1 - self.rate)
        return x * keep / (1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


def linear_rates(rate: float, depth: int) -> list[float]:
    """Drop rates rising linearly from 0 to `rate` over `depth` blocks."""
    checks.positive("depth", depth)
    return [rate * index / max(depth - 1, 1) for index in range(depth)]


class LayerScale(nn.Module):
    """Multiply each channel (last axis) by a learned factor (Touvron et al., 2021, arXiv 2103.17239)."""

    def __init__(self, dim: int, initial: float = 1e-5) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), initial))

    def forward(self, x: Tensor) -> Tensor:
        """`(..., dim)` -> the same shape."""
        return x * self.gamma
