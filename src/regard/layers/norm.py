"""Norms on channels-last tensors beyond nn.LayerNorm and nn.RMSNorm."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class GlobalNorm(nn.GroupNorm):
    """GroupNorm with one group on channels-last grids: statistics over all positions and channels of a sample.

    Not LayerNorm: every position of the sample is coupled to every other.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__(1, dim, eps)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        return super().forward(x.movedim(-1, 1)).movedim(1, -1)


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm over batch and all spatial axes of a channels-last tensor."""

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        return super().forward(x.reshape(-1, x.shape[-1])).view(x.shape)


class SimpleRMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) over the last axis, computed in float32, without parameters (TransNormerLLM)."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps

    def forward(self, x: Tensor) -> Tensor:
        """`(..., dim)` -> the same shape and dtype."""
        wide = x if x.dtype == x.double().dtype else x.float()
        return F.rms_norm(wide, (self.dim,), eps=self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, eps={self.eps}"
