"""FcaFormer: Forward Cross Attention in Hybrid Vision Transformer (Zhang et al., 2022, arXiv 2211.07198).

Attention made denser instead of sparser: every block merges its tokens into a few, and all later blocks of the stage read
these "cross tokens" beside their own keys and values. The first two stages are convolutional.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import checks, ops
from regard.checkpoint import KeyMap
from regard.layers import (
    LEVIT_NAMES,
    Block,
    ConvNorm,
    DistanceBias,
    LayerScale,
    Mixer,
    Mlp,
    Residual,
    conv,
    depthwise,
    flat_kernels,
    heads_of,
    resize_map,
    vit_init,
)
from regard.registry import System, image_variant, register_mixer, register_system
from regard.skeletons import Hierarchical, Place, places

MERGE = 4
"""Tokens of a side that become one cross token."""


@register_mixer("forward_cross")
class ForwardCrossAttention(Mixer):
    r"""Attention over the own tokens and over cross tokens of earlier blocks (figure 1).

    $$\mathrm{out} = W_o\,\mathrm{softmax}\big([\,Q K_x^\top / \sqrt d + B,\; Q K_s^\top / \sqrt d + b\,]\big)\,[V_x; V_s]$$

    Both kinds of tokens share one projection; s = LSF * LN(cross tokens), with a learned factor for each. B depends on the
    distance along each axis, b on the cross token.

    The authors' code multiplies before the LayerNorm, which takes the factors away again; `authors_quirks` keeps that.
    Without `sources` this is attention with a distance bias.

    Args:
        input_size: the grid for which tables are built; other grids run with interpolated ones.
        sources: number of earlier blocks whose cross tokens come in.
    """

    authors_keys = KeyMap(
        rules=(
            (r"(^|\.)attention_biases$", r"\1bias.table"),
            (r"(^|\.)s_token_bias$", r"\1cross_bias"),
            (r"(^|\.)s_scale_factors$", r"\1cross_scale"),
            (r"(^|\.)s_norm\.", r"\1cross_norm."),
        )
    )

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        input_size: Sequence[int] = (14, 14),
        sources: int = 0,
        qkv_bias: bool = True,
        authors_quirks: bool = False,
    ) -> None:
        super().__init__()
        self.head_dim = heads_of(dim, num_heads)
        self.dim, self.num_heads, self.axes, self.sources = dim, num_heads, len(input_size), sources
        self.authors_quirks = authors_quirks
        self.coarse = tuple(-(-length // MERGE) for length in input_size)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.bias = DistanceBias(input_size, num_heads)
        self.proj = nn.Linear(dim, dim)
        if sources:
            tokens = sources * math.prod(self.coarse)
            self.cross_norm = nn.LayerNorm(dim)
            self.cross_scale = nn.Parameter(torch.ones(1, tokens))
            self.cross_bias = nn.Parameter(torch.zeros(num_heads, tokens))

    @classmethod
    def in_stack(cls, index: int, input_size: tuple[int, ...], dim: int, num_heads: int, **options: Any) -> Mixer:
        """Tables for the grid. In a host whose blocks pass nothing but x on, there are no cross tokens."""
        return cls(dim, num_heads, **{"input_size": input_size, **options})

    def forward(self, x: Tensor, cross: Tensor | None = None) -> Tensor:
        """`(B, *S, dim)` -> the same shape; cross tokens `(B, sources, *C, dim)` if there are `sources`."""
        spatial = self.check(x)
        if (0 if cross is None else cross.shape[1]) != self.sources:
            came = "none" if cross is None else tuple(cross.shape)
            raise ValueError(f"cross must hold cross tokens of {self.sources} earlier blocks, got {came}.")
        heads = (self.num_heads, self.head_dim)
        q, k, v = self.qkv(x.flatten(1, -2)).unflatten(-1, (3, *heads)).unbind(-3)
        bias = self.bias(spatial)
        if cross is not None:
            scale, cross_bias = (self._at(table, cross.shape[2:-1]) for table in (self.cross_scale, self.cross_bias))
            tokens, scale = cross.flatten(1, -2), scale.t()
            tokens = self.cross_norm(tokens * scale) if self.authors_quirks else self.cross_norm(tokens) * scale
            no_query = None if self.qkv.bias is None else self.qkv.bias[self.dim :]
            pair = F.linear(tokens, self.qkv.weight[self.dim :], no_query).unflatten(-1, (2, *heads))
            k, v = torch.cat([k, pair[:, :, 0]], 1), torch.cat([v, pair[:, :, 1]], 1)
            bias = torch.cat([bias, cross_bias.unsqueeze(1).expand(-1, q.shape[1], -1)], 2)
        out = ops.attention(q, k, v, bias=bias).flatten(-2)  # type: ignore[union-attr]
        return self.proj(out).unflatten(1, spatial)

    def _at(self, table: Tensor, coarse: Sequence[int]) -> Tensor:
        """`(rows, sources * built cross tokens)` for cross tokens of another size."""
        return resize_map(table.unflatten(1, (self.sources, *self.coarse)), coarse).flatten(1)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, sources={self.sources}"


class FcaBlock(Block):
    r"""Forward cross attention, token merge and enhancement, MLP (figure 1).

    $$x \leftarrow x + \gamma_1\,\mathrm{mixer}(n_1(x), s),\quad s' = \mathrm{DW}_{7\times7,\,\mathrm{stride}\,4}(x),\quad
      x \leftarrow \mathrm{BN}(\mathrm{DW}_{3\times3}(x)),\quad x \leftarrow x + \gamma_2\,\mathrm{mlp}(n_2(x))$$

    The enhancement by the 3 x 3 convolution has no shortcut around it, and the MLP begins with a LayerNorm of its own.

    Args:
        merges: whether the block gives cross tokens s'; the last of a stage does not.
        options: those of `Block`.
    """

    def __init__(
        self, dim: int, mixer: ForwardCrossAttention, *, merges: bool, mlp_ratio: float, **options: Any
    ) -> None:
        mlp = nn.Sequential(nn.LayerNorm(dim), Mlp(dim, int(dim * mlp_ratio)))
        super().__init__(dim, mixer, mlp=mlp, **options)
        self.merge = conv(2)(dim, dim, 7, stride=MERGE, padding=3, groups=dim, bias=False) if merges else None
        self.enhance = ConvNorm(dim, dim, 3, groups=dim)

    def forward(self, x: Tensor, cross: Tensor | None = None) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        """`(B, H, W, dim)`, cross tokens `(B, sources, H / 4, W / 4, dim)` -> that map, and new ones `(B, 1, ...)`."""
        x = x + self.drop_path(self.scale1(self.mixer(self.norm1(x), cross)))
        merged = None if self.merge is None else self.merge(x).unsqueeze(1)
        x = self.enhance(x)
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x)))), merged


class FcaStage(nn.Module):
    """Blocks of which each reads the cross tokens of up to `max_sources` blocks before it."""

    def __init__(
        self, stage: Sequence[Place], *, max_sources: int, mlp_ratio: float, layer_scale: float, authors_quirks: bool
    ) -> None:
        super().__init__()
        self.max_sources = max_sources
        blocks = []
        for at in stage:
            sources = min(at.index, max_sources)
            mixer = ForwardCrossAttention(
                at.dim, at.num_heads, input_size=at.grid, sources=sources, authors_quirks=authors_quirks
            )
            merges = max_sources > 0 and at.index < len(stage) - 1
            options = {"mlp_ratio": mlp_ratio, "layer_scale": layer_scale, "drop_path": at.drop_path}
            blocks.append(FcaBlock(at.dim, mixer, merges=merges, **options))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, W, dim)` -> the same shape."""
        kept: list[Tensor] = []
        for block in self.blocks:
            x, merged = block(x, torch.cat(kept, 1) if kept else None)
            if merged is not None:
                kept = [*kept, merged][-self.max_sources :]
        return x


def convnext_block(dim: int, layer_scale: float, drop_path: float) -> Residual:
    """x + γ W' GELU(W LN(DW 7 x 7(x))), four times as wide inside (ConvNeXt, Liu et al., 2022, arXiv 2201.03545)."""
    norm = nn.LayerNorm(dim, eps=1e-6)
    return Residual(nn.Sequential(depthwise(dim, 7), norm, Mlp(dim, 4 * dim), LayerScale(dim, layer_scale)), drop_path)


def _down(dim: int, out_dim: int) -> nn.Sequential:
    """1 x 1, depthwise 3 x 3 of stride 2, 1 x 1, each with BatchNorm, GELU between them."""
    wide = partial(ConvNorm, out_dim, out_dim)
    return nn.Sequential(ConvNorm(dim, out_dim), nn.GELU(), wide(3, stride=2, groups=out_dim), nn.GELU(), wide(1))


def _init(module: nn.Module) -> None:
    vit_init(module)
    if isinstance(module, nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _ours(name: str, value: Tensor) -> dict[str, Tensor]:
    if name.endswith(".cross_bias") or name == "cross_bias":
        return {name: value[0, :, 0]}
    if name.endswith(".cross_scale") or name == "cross_scale":
        return {name: value[..., 0]}
    return flat_kernels(name, value)


class FcaFormer(Hierarchical):
    """Two 3 x 3 convolutions of stride 2, stages of ConvNeXt or of Fca blocks, mean, LayerNorm, linear.

    Args:
        num_heads: of each stage; a stage of 0 heads has ConvNeXt blocks.
        max_sources: how many earlier blocks a block reads at most; 0 leaves cross tokens out.
        mlp_ratio: of the Fca blocks. layer_scale: initial γ of all branches.
        img_size: tables are built for it; images of other sizes run with interpolated ones.
        authors_quirks: calibrate cross tokens as released, see `ForwardCrossAttention`; published weights need it.
    """

    authors_keys = KeyMap(
        rules=(
            (r"^patch_embed\.seq\.", "stem."),
            (r"^layer_(\d)\.downsample\.conv(\d)\.", lambda m: f"downs.{int(m[1]) + 1}.{2 * int(m[2]) - 2}."),
            (r"^layer_(\d)\.blocks\.(\d+)\.dwconv\.", r"stages.\1.\2.branch.0."),
            (r"^layer_(\d)\.blocks\.(\d+)\.norm\.", r"stages.\1.\2.branch.1."),
            (r"^layer_(\d)\.blocks\.(\d+)\.pwconv(\d)\.", r"stages.\1.\2.branch.2.fc\3."),
            (r"^layer_(\d)\.blocks\.(\d+)\.gamma$", r"stages.\1.\2.branch.3.gamma"),
            (r"^layer_(\d)\.blocks\.", r"stages.\1.0.blocks."),
            (r"(^|\.)gamma_(\d)$", r"\1scale\2.gamma"),
            (r"(^|\.)mlp\.norm\.", r"\1mlp.0."),
            (r"(^|\.blocks\.\d+\.)mlp\.fc", r"\1mlp.1.fc"),
            (r"(^|\.)dw_conv\.", r"\1merge."),
            (r"(^|\.)local_conv\.", r"\1enhance."),
            (r"(^|\.blocks\.\d+\.)(qkv|proj|s_norm)\.", r"\1mixer.\2."),
            (r"(^|\.blocks\.\d+\.)(attention_biases|s_token_bias|s_scale_factors)$", r"\1mixer.\2"),
            *ForwardCrossAttention.authors_keys.rules,
            *LEVIT_NAMES,
            (r"^norm_head\.", "head_norm."),
        ),
        convert=_ours,
    )

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 192, 320),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (0, 0, 6, 10),
        max_sources: int = 12,
        mlp_ratio: float = 4.0,
        layer_scale: float = 1e-6,
        img_size: int = 224,
        authors_quirks: bool = False,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        checks.divisible("dims[0]", dims[0], "the stem's halving", 2)
        strides = [4 * 2**stage for stage in range(len(dims))]
        stages: list[list[nn.Module]] = []
        for stage in places(dims, depths, num_heads, strides, img_size, drop_path_rate):
            if stage[0].num_heads == 0:
                stages.append([convnext_block(at.dim, layer_scale, at.drop_path) for at in stage])
            else:
                options = {"max_sources": max_sources, "mlp_ratio": mlp_ratio, "layer_scale": layer_scale}
                stages.append([FcaStage(stage, authors_quirks=authors_quirks, **options)])
        first = dims[0] // 2
        super().__init__(
            stem=nn.Sequential(
                ConvNorm(in_chans, first, 3, stride=2), nn.GELU(), ConvNorm(first, dims[0], 3, stride=2)
            ),
            downs=[nn.Identity(), *(_down(a, b) for a, b in zip(dims[:-1], dims[1:], strict=True))],
            stages=stages,
            dims=dims,
            strides=strides,
            head_norm=nn.LayerNorm(dims[-1]),
            num_classes=num_classes,
            in_chans=in_chans,
        )
        self.apply(_init)


# The authors' code, of which the multiply-adds are, also projects queries of cross tokens that nothing uses: up to 2 %.
_L3 = {"depths": (3, 6, 12, 3)}

SYSTEM = register_system(
    System(
        slug="fcaformer",
        title="FcaFormer: Forward Cross Attention in Hybrid Vision Transformer",
        year=2022,
        arxiv="2211.07198",
        evidence="authors_code",
        repo="hkzhang-git/FcaFormer",
        idea="Blocks merge their tokens into a few, which all later blocks of the stage attend to besides their own.",
        mixers=("forward_cross",),
        variants=(
            image_variant("fcaformer_l1", FcaFormer, 6_187_560, 1.374297),
            image_variant(
                "fcaformer_l2",
                FcaFormer,
                16_275_870,
                3.602234,
                0.1,
                dims=(96, 192, 320, 480),
                depths=(2, 2, 7, 2),
                num_heads=(0, 0, 10, 15),
            ),
            image_variant(
                "fcaformer_l3",
                FcaFormer,
                27_894_484,
                6.650570,
                0.2,
                dims=(96, 192, 320, 512),
                num_heads=(0, 0, 10, 16),
                **_L3,
            ),
            image_variant(
                "fcaformer_l4",
                FcaFormer,
                65_638_204,
                14.491791,
                0.4,
                dims=(128, 256, 512, 768),
                num_heads=(0, 0, 16, 24),
                **_L3,
            ),
        ),
        reports=(
            "ImageNet-1K top-1: L0 74.3 (DeiT-T 72.2), L1 80.3, L2 83.1 (Swin-T 81.3, ConvNeXt-T 82.1), L3 84.2, L4 84.9; "
            "L0, a plain DeiT with cross tokens of 5.9 M parameters, is described in the paper but not released",
            "COCO, Mask R-CNN 3x, box / mask AP: L2 47.0 / 42.1 (Swin-T 46.0 / 41.6); ADE20K, UPerNet, mIoU: L2 47.6 "
            "(Swin-T 45.8)",
        ),
    )
)
