"""S2AFormer: Strip Self-Attention for Efficient Vision Transformer (Xu et al., 2025, arXiv 2505.22195).

Attention is made shorter in two directions at once: keys and values come from a coarser map, and queries and keys have fewer
channels, while values keep them all. Convolutions before and after it restore local detail. A reconstruction: no code was
released, and sizes and inner layers that are not known to us were chosen, as each part says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from regard import checks, ops
from regard.layers import ConvStem, Mixer, Mlp, PositionedBlock, conv, depthwise, fan_out_init, heads_of
from regard.layouts.windows import pad_to_multiple
from regard.registry import System, Variant, register_mixer, register_system
from regard.skeletons import ConvPyramid, Place


@register_mixer("strip")
class StripAttention(Mixer):
    r"""Strip self-attention (SSA): fewer keys, and fewer channels to compare them by, for 1, 2 or 3 spatial axes.

    $$\mathrm{out} = W_o\,\mathrm{softmax}(Q K^\top / \sqrt{C'/h})\,V,\quad Q = x W_q,\quad K = x' W_k,\quad V = x' W_v,\quad
      x' = \mathrm{LN}(\mathrm{DWConv}_{R, \mathrm{stride} R}(x))$$

    for N tokens with Q `(N, C')`, K `(N / R², C')` and V `(N / R², C)`, C' < C. The affinities have rank C' before the
    softmax; the output is not limited by it. Q K^T costs N (N / R²) C' multiply-adds, A V costs N (N / R²) C.

    Chosen: the norm of x', kernels of R x R, the scale, W_o, and heads (one is the paper's form, as far as it is known).
    With R = 1 there is no x', and with C' = C it is plain attention. A side that is no multiple of R is zero-padded at its
    end.

    Args:
        num_heads: h, divides dim and C'. qk_dim: C' of all heads together; None is a quarter of dim, at least num_heads.
        reduction: R. axes: number of spatial axes.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        qk_dim: int | None = None,
        reduction: int = 2,
        axes: int = 2,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        checks.positive("reduction", reduction)
        head_dim = heads_of(dim, num_heads)
        qk_dim = max(head_dim // 4, 1) * num_heads if qk_dim is None else qk_dim
        checks.positive("qk_dim", qk_dim)
        checks.divisible("qk_dim", qk_dim, "num_heads", num_heads)
        self.dim, self.num_heads, self.qk_dim, self.reduction = dim, num_heads, qk_dim, reduction
        self.axes = axes if reduction > 1 else None
        self.q = nn.Linear(dim, qk_dim, bias=qkv_bias)
        self.k = nn.Linear(dim, qk_dim, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.reduce: nn.Module = nn.Identity()
        if reduction > 1:
            self.reduce = nn.Sequential(
                conv(axes)(dim, dim, reduction, stride=reduction, groups=dim), nn.LayerNorm(dim, eps=1e-6)
            )

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        spatial = self.check(x)
        coarse = self.reduce(pad_to_multiple(x, (self.reduction,) * len(spatial)))
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)) for part in (self.q(x), self.k(coarse), self.v(coarse)))
        return self.proj(ops.attention(q, k, v).flatten(-2))  # type: ignore[union-attr]

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, qk_dim={self.qk_dim}, reduction={self.reduction}"


class LocalInteraction(nn.Module):
    """The local interaction module (LIM): W' GELU(DWConv 3 x 3(W x)), all C channels wide.

    Chosen: its layers. Known is only that it is convolutional and is there for borders, shifts and rotations.
    """

    def __init__(self, dim: int, *, axes: int = 2) -> None:
        super().__init__()
        self.expand, self.local, self.act = nn.Linear(dim, dim), depthwise(dim, 3, dims=axes), nn.GELU()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        return self.proj(self.act(self.local(self.expand(x))))


class HybridPerceptionBlock(PositionedBlock):
    r"""The hybrid perception block (HPB): four residual parts.

    $$x \leftarrow x + \mathrm{DWConv}(x),\quad x \leftarrow x + \mathrm{SSA}(\mathrm{LN}(x)),\quad
      x \leftarrow x + \mathrm{LIM}(\mathrm{LN}(x)),\quad x \leftarrow x + \mathrm{MLP}(\mathrm{LN}(x))$$

    Chosen: 3 x 3 for DWConv, and which LayerNorm.

    Args:
        mixer, options: as in `PositionedBlock`.
    """

    def __init__(self, dim: int, mixer: nn.Module, *, axes: int = 2, **options: Any) -> None:
        super().__init__(dim, mixer, axes=axes, **options)
        self.norm_local = nn.LayerNorm(dim, eps=1e-6)
        self.local = LocalInteraction(dim, axes=axes)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        x = x + self.position(x)
        x = x + self.drop_path(self.scale1(self.mixer(self.norm1(x))))
        x = x + self.drop_path(self.local(self.norm_local(x)))
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))


class S2AFormer(ConvPyramid):
    """Three 3 x 3 convolutions, the first of stride 2, then four stages of patch embedding and `HybridPerceptionBlock`s.

    Chosen: patch embeddings (3 x 3 of stride 2, BatchNorm), the norm at the end, and every size. R follows PVT; widths and
    depths were chosen so that parameters and multiply-adds come near the published ones.

    Args:
        dims, depths: of each stage. num_heads, reductions: h and R of each stage. qk_share: C / C'.
        host: further arguments of `ConvPyramid`: drop_path_rate, num_classes, ...
    """

    def __init__(
        self,
        *,
        dims: Sequence[int] = (24, 48, 112, 320),
        depths: Sequence[int] = (2, 2, 2, 3),
        num_heads: Sequence[int] = (1, 1, 1, 1),
        reductions: Sequence[int] = (8, 4, 2, 1),
        qk_share: int = 4,
        mlp_ratio: float = 4.0,
        in_chans: int = 3,
        **host: Any,
    ) -> None:
        checks.positive("qk_share", qk_share)
        for argument, given in (("depths", depths), ("num_heads", num_heads), ("reductions", reductions)):
            if len(given) != len(dims):
                raise ValueError(f"{argument} must have one entry for each of the {len(dims)} stages, got {given!r}.")

        def mixer(at: Place) -> nn.Module:
            checks.divisible("dims", at.dim, "qk_share", qk_share)
            return StripAttention(at.dim, at.num_heads, qk_dim=at.dim // qk_share, reduction=reductions[at.stage])

        half = max(dims[0] // 2, 1)
        super().__init__(
            mixer=mixer,
            block=HybridPerceptionBlock,
            stem=ConvStem(in_chans, (half, half, half, dims[0]), (2, 1, 1, 2)),
            dims=dims,
            depths=depths,
            num_heads=num_heads,
            mlp_ratios=[mlp_ratio] * len(dims),
            mlp=Mlp,
            in_chans=in_chans,
            **host,
        )
        self.apply(fan_out_init)


def _variant(name: str, dims: Sequence[int], depths: Sequence[int], params: str, gmacs: float) -> Variant:
    source = (
        f"published: {params} million parameters, {gmacs} G (a later comparison); widths and depths are ours, chosen to come "
        "near both"
    )
    options = {"dims": tuple(dims), "depths": tuple(depths)}
    return Variant(f"s2aformer_{name}_reconstructed", S2AFormer, None, gmacs, source=source, options=options)


SYSTEM = register_system(
    System(
        slug="s2aformer",
        title="S2AFormer: Strip Self-Attention for Efficient Vision Transformer",
        year=2025,
        arxiv="2505.22195",
        evidence="abstract_only",
        idea="Keys and values from a coarser map, queries and keys with fewer channels; convolutions around it.",
        mixers=("strip",),
        variants=(
            _variant("mini", (24, 48, 112, 320), (2, 2, 2, 3), "5.02", 0.43),
            _variant("tiny", (24, 48, 120, 240), (2, 3, 8, 5), "5.8", 0.655),
            _variant("xsmall", (32, 64, 160, 320), (2, 2, 5, 3), "6.54", 0.786),
            _variant("small", (40, 80, 200, 400), (2, 3, 6, 3), "10.69", 1.38),
            _variant("medium", (72, 144, 288, 576), (3, 4, 8, 3), "24.87", 4.12),
        ),
        reports=(
            "no code was released: a reconstruction from the abstract and the block's equations",
            "ImageNet-1K top-1 at 224 px: mini 75.1, T 77.7, XS 78.9, S 80.8, M 82.3",
            "ADE20K mIoU with Semantic FPN: 36.7, 38.0, 39.2, 40.8, 43.7; COCO box AP with RetinaNet: 33.4, 36.7, 37.9, 40.0, "
            "41.7 (mini to M)",
        ),
    )
)
