"""Dense attention over fewer keys: keys and values come from a coarser copy of the grid."""

from __future__ import annotations

from torch import Tensor, nn

from regard import checks, ops
from regard.layers.conv import conv
from regard.layers.mixer import Mixer, heads_of
from regard.layouts.windows import pad_to_multiple


class SpatialReductionAttention(Mixer):
    r"""Attention of all tokens over patches of R x R tokens (PVT, Wang et al., 2021, arXiv 2102.12122).

    $$\mathrm{out} = W_o\,\mathrm{softmax}(d^{-1/2} Q K^\top) V,\quad Q = x W_q,\quad
      K, V = \mathrm{LN}(\mathrm{conv}_{R, \mathrm{stride} R}(x)) W_{kv}$$

    With R = 1 it is plain attention. A side that is no multiple of R is zero-padded at its end.

    Args:
        reduction: R. axes: number of spatial axes.
    """

    def __init__(self, dim: int, num_heads: int, *, reduction: int = 1, axes: int = 2, qkv_bias: bool = True) -> None:
        super().__init__()
        checks.positive("reduction", reduction)
        self.head_dim = heads_of(dim, num_heads)
        self.dim, self.num_heads, self.reduction = dim, num_heads, reduction
        self.axes = axes if reduction > 1 else None
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.reduce: nn.Module = nn.Identity()
        if reduction > 1:
            self.reduce = nn.Sequential(conv(axes)(dim, dim, reduction, stride=reduction), nn.LayerNorm(dim))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        spatial = self.check(x)
        coarse = self.reduce(pad_to_multiple(x, (self.reduction,) * len(spatial)))
        q = self.q(x).unflatten(-1, (self.num_heads, self.head_dim))
        k, v = self.kv(coarse).unflatten(-1, (2, self.num_heads, self.head_dim)).unbind(-3)
        return self.proj(ops.attention(q, k, v).flatten(-2))  # type: ignore[union-attr]

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, reduction={self.reduction}"
