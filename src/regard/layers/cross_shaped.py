"""Stripes along each axis in parallel, and attention that carries its position in a convolution of the values."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from regard import checks, ops
from regard.layers.conv import depthwise
from regard.layers.mixer import Mixer, heads_of
from regard.layouts.windows import map_windows

Branch = Callable[[int, int], nn.Module]
"""(channels, heads) -> a module on q, k, v grids `(B, *S, channels)` that gives a grid of that shape."""


class LePEAttention(nn.Module):
    r"""Dense attention plus a 3 x 3 depthwise convolution of the values (CSWin, Dong et al., 2021).

    $$\mathrm{out} = \mathrm{softmax}(d^{-1/2} Q K^\top) V + \mathrm{DWConv}(V)$$

    The convolution ("locally-enhanced positional encoding") is the only sense of position.
    Projections are the caller's.
    """

    def __init__(self, dim: int, num_heads: int, *, axes: int = 2) -> None:
        super().__init__()
        self.head_dim, self.num_heads = heads_of(dim, num_heads), num_heads
        self.local = depthwise(dim, 3, dims=axes)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Grids `(B, *S, dim)` -> the same shape."""
        split = (x.unflatten(-1, (self.num_heads, self.head_dim)) for x in (q, k, v))
        return ops.attention(*split).flatten(-2) + self.local(v)  # type: ignore[union-attr]


class CrossShaped(Mixer):
    """Heads split into one branch per axis; branch a works in stripes that run along axis a over the whole map.

    Each token thus reaches a cross in one layer (CSWin, arXiv 2107.00652). The heads, and with them the channels of q, k
    and v, are shared out among the branches in their order; where they do not divide, the first branches get one more.
    A map that is no multiple of the stripe has narrower stripes at its end.

    Args:
        stripe: width of the stripes across their axis; None is one branch of all heads over the whole map.
        branch: builds what runs inside a stripe; `LePEAttention` by default.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        stripe: int | None = 7,
        branch: Branch | None = None,
        axes: int = 2,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        head_dim, branches = heads_of(dim, num_heads), 1 if stripe is None else axes
        if stripe is not None:
            checks.tuple_of("stripe", stripe, 1)
        if num_heads < branches:
            raise ValueError(f"num_heads must be at least {branches}, one for each branch, got {num_heads}.")
        heads = [num_heads // branches + (branch < num_heads % branches) for branch in range(branches)]
        self.dim, self.num_heads, self.stripe, self.axes = dim, num_heads, stripe, axes
        self.widths = [share * head_dim for share in heads]
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        make = branch or (lambda width, heads: LePEAttention(width, heads, axes=axes))
        self.branches = nn.ModuleList(make(width, share) for width, share in zip(self.widths, heads, strict=True))
        self.proj = nn.Linear(dim, dim)

    def stripes(self, spatial: Sequence[int]) -> list[tuple[int, ...]]:
        """Size of the stripes of each branch on a map of this size."""
        if self.stripe is None:
            return [tuple(spatial)]
        return [
            tuple(length if axis == along else self.stripe for axis, length in enumerate(spatial))
            for along in range(len(spatial))
        ]

    def forward(self, x: Tensor, **extra: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape. `extra` goes to the branch as it is, if there is one for the whole map."""
        spatial = self.check(x)
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.stripe is None:
            return self.proj(self.branches[0](q, k, v, **extra))
        if extra:
            raise ValueError(f"branches in stripes take q, k and v only, got also {sorted(extra)}: use stripe=None.")
        parts = zip(self.branches, self.stripes(spatial), *(t.split(self.widths, -1) for t in (q, k, v)), strict=True)
        return self.proj(torch.cat([map_windows(branch, size, *qkv) for branch, size, *qkv in parts], -1))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, stripe={self.stripe}"
