"""BiFormer: Vision Transformer with Bi-Level Routing Attention (Zhu et al., 2023, arXiv 2303.08810).

The map is cut into regions. Each region finds, by products of mean queries and mean keys, the few regions that matter
to it; its tokens then attend to all tokens of those regions. What is looked at follows the content, at a fixed price.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from regard import checks, ops
from regard.checkpoint import KeyMap
from regard.layers import (
    BatchNorm,
    Block,
    ConvStem,
    Mixer,
    Mlp,
    PatchEmbed,
    depthwise,
    heads_of,
    vit_init,
)
from regard.layouts.windows import crop, pad_to_multiple, partition, unpartition
from regard.registry import System, image_variant, register_mixer, register_system
from regard.skeletons import ConvPyramid, Hierarchical, MixerAt, Place, places


@register_mixer("bi_level_routing")
class BiLevelRoutingAttention(Mixer):
    r"""Attention of each region to the tokens of its `topk` regions (section 3.2).

    $$I_r = \mathrm{topk}_s\; \bar q_r^\top \bar k_s,\qquad
      \mathrm{out}_i = W_o \big(\textstyle\sum_{j \in I_{r(i)}} \mathrm{softmax}_j(C^{-1/2} q_i^\top k_j)\, v_j
      + \mathrm{DWConv}(V)_i\big)$$

    Means are taken over the tokens and over all channels C of a region, so heads share their regions. The choice itself
    has no gradient: regions come to be found because the attention inside them is trained with the same q and k. The
    scale is that of the authors' code, C^(-1/2) and not head_dim^(-1/2).

    Departure: a side that `num_regions` does not divide has fewer regions, of ceil(side / num_regions) tokens, the last
    of them smaller; the authors refuse such maps, or fill them with zeros that take part in the softmax.

    Args:
        dim: channels. num_heads: divides dim.
        num_regions: along each axis, at any size of the map; one integer or one for each of `axes`.
        topk: regions that each region attends to; all, if there are fewer.
        kernel_size: of the depthwise convolution of the values.
        axes: number of spatial axes.
    """

    authors_keys = KeyMap(rules=[(r"\bqkv\.qkv\.", "qkv."), (r"\blepe\.", "local."), (r"\bwo\.", "proj.")])

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_regions: int | Sequence[int] = 7,
        topk: int = 4,
        kernel_size: int = 5,
        axes: int = 2,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        self.head_dim = heads_of(dim, num_heads)
        checks.positive("topk", topk)
        self.dim, self.num_heads, self.topk, self.axes = dim, num_heads, topk, axes
        self.num_regions = checks.tuple_of("num_regions", num_regions, axes)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.local = depthwise(dim, kernel_size, dims=axes)
        self.proj = nn.Linear(dim, dim)

    @classmethod
    def in_stack(cls, index: int, input_size: tuple[int, ...], dim: int, num_heads: int, **options: Any) -> Mixer:
        """Unless given, as many regions up to 7 as divide a side into more than single tokens, else 7 at most."""
        if "num_regions" not in options:
            options["num_regions"] = tuple(
                next((count for count in (7, 6, 5, 4, 3, 2) if side % count == 0 and count < side), min(side, 7))
                for side in input_size
            )
        return cls(dim, num_heads, axes=len(input_size), **options)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        spatial = self.check(x)
        q, k, v = self.qkv(x).chunk(3, -1)
        local = self.local(v)
        size = self.region_size(spatial)
        padded = [-(-length // side) * side for length, side in zip(spatial, size, strict=True)]
        q, k, v = (partition(pad_to_multiple(t, size), size) for t in (q, k, v))  # (B, R, T, C)
        real = partition(pad_to_multiple(x.new_ones(1, *spatial, 1), size), size)  # 1 where there is a token
        index = self.route(*(t.detach().sum(2) / real.sum(2) for t in (q, k)))
        q, k, v = (t.unflatten(-1, (self.num_heads, self.head_dim)) for t in (q, k, v))
        if list(spatial) != padded:
            # One more channel takes keys that are no tokens out of the softmax.
            absent = ((real - 1) * 1e4 * self.dim**0.5).unsqueeze(-2)
            q = torch.cat([q, torch.ones_like(q[..., :1])], -1)
            k = torch.cat([k, absent.expand_as(k[..., :1])], -1)
        out = ops.routed_attention(q, k, v, index, scale=self.dim**-0.5).flatten(-2)
        return self.proj(crop(unpartition(out, size, padded), spatial) + local)

    def region_size(self, spatial: Sequence[int]) -> list[int]:
        """Tokens of a region along each axis."""
        return [-(-length // count) for length, count in zip(spatial, self.num_regions, strict=True)]

    def route(self, q: Tensor, k: Tensor) -> Tensor:
        """Mean queries and keys of the regions, `(B, R, dim)` each -> the regions each attends to, `(B, R, topk)`."""
        return (q @ k.transpose(-1, -2)).topk(min(self.topk, k.shape[1])).indices

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, num_regions={self.num_regions}, topk={self.topk}"


class GlobalAttention(Mixer):
    r"""Dense attention plus a depthwise convolution of its input; the last stage, whose regions would be single tokens.

    $$\mathrm{out} = W_o\,(\mathrm{softmax}(d^{-1/2} Q K^\top) V + \mathrm{DWConv}(x))$$

    As in the authors' code the scale is that of a head here, and the projection to q, k and v has no bias.
    """

    def __init__(self, dim: int, num_heads: int = 8, *, kernel_size: int = 5, axes: int = 2) -> None:
        super().__init__()
        self.head_dim = heads_of(dim, num_heads)
        self.dim, self.num_heads, self.axes = dim, num_heads, axes
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.local = depthwise(dim, kernel_size, dims=axes)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        self.check(x)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        return self.proj(ops.attention(q, k, v).flatten(-2) + self.local(x))  # type: ignore[union-attr]

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}"


def _routing(topks: Sequence[int | None], num_regions: int, global_heads: int) -> MixerAt:
    """Bi-level routing with the `topk` of each stage, dense attention where it is None."""

    def mixer(at: Place) -> nn.Module:
        topk = topks[at.stage]
        if topk is None:
            return GlobalAttention(at.dim, global_heads)
        return BiLevelRoutingAttention(at.dim, at.num_heads, num_regions=num_regions, topk=topk)

    return mixer


def _heads(dims: Sequence[int], head_dim: int) -> list[int]:
    for dim in dims:
        checks.divisible("dims", dim, "head_dim", head_dim)
    return [dim // head_dim for dim in dims]


_BLOCK_RULES = (
    (r"\.attn\.", ".mixer."),
    *BiLevelRoutingAttention.authors_keys.rules,
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.[23]\.", ".mlp.fc2."),
)


class BiFormer(ConvPyramid):
    """Two convolutions to a quarter of the image, blocks with a depthwise convolution for position, BatchNorm, mean.

    Args:
        dims, depths: channels and blocks of each stage. mlp_ratio: hidden width of the MLPs.
        head_dim: channels a head, where attention is routed. global_heads: heads where it is dense.
        num_regions: along each side, in all stages. topks: regions to attend to in each stage, None for dense attention.
            At 224 pixels a query sees 64 keys in each of the first three stages.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0.
    """

    authors_keys = KeyMap(
        rules=[
            (r"^downsample_layers\.0\.", "stem."),
            (r"^downsample_layers\.", "downs."),
            (r"\.pos_embed\.", ".position."),
            *_BLOCK_RULES,
        ]
    )

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 8, 2),
        head_dim: int = 32,
        global_heads: int = 8,
        num_regions: int = 7,
        topks: Sequence[int | None] = (1, 4, 16, None),
        mlp_ratio: float = 3.0,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        super().__init__(
            mixer=_routing(topks, num_regions, global_heads),
            stem=ConvStem(in_chans, [dims[0] // 2, dims[0]], [2, 2]),
            dims=dims,
            depths=depths,
            num_heads=_heads(dims, head_dim),
            mlp_ratios=[mlp_ratio] * len(dims),
            mlp=Mlp,
            drop_path_rate=drop_path_rate,
            num_classes=num_classes,
            in_chans=in_chans,
        )
        self.apply(vit_init)


class BiFormerSTL(Hierarchical):
    """The layout of Swin-T with routed attention in place of shifted windows: the model of the paper's ablations.

    No convolution tells positions besides that of the values. Arguments as for `BiFormer`.
    """

    authors_keys = KeyMap(
        rules=[
            (r"^downsample_layers\.0\.0\.", "stem.0.proj."),
            (r"^downsample_layers\.0\.1\.", "stem.1."),
            (r"^downsample_layers\.(\d)\.0\.", r"downs.\1.0."),
            (r"^downsample_layers\.(\d)\.1\.", r"downs.\1.1.proj."),
            (r"^stages\.(\d)\.blocks\.", r"stages.\1."),
            *_BLOCK_RULES,
        ]
    )

    def __init__(
        self,
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 6, 2),
        head_dim: int = 32,
        global_heads: int = 8,
        num_regions: int = 7,
        topks: Sequence[int | None] = (1, 4, 16, None),
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        mixer, norm = _routing(topks, num_regions, global_heads), partial(nn.LayerNorm, eps=1e-6)
        strides = [4 * 2**stage for stage in range(len(dims))]
        super().__init__(
            stem=nn.Sequential(PatchEmbed(in_chans, dims[0], 4, norm=False), BatchNorm(dims[0])),
            downs=[
                nn.Identity(),
                *(nn.Sequential(BatchNorm(a), PatchEmbed(a, b, 2, norm=False)) for a, b in pairwise(dims)),
            ],
            stages=[
                [Block(at.dim, mixer(at), mlp_ratio=mlp_ratio, norm=norm, drop_path=at.drop_path) for at in blocks]
                for blocks in places(dims, depths, _heads(dims, head_dim), strides, 224, drop_path_rate)
            ],
            dims=dims,
            strides=strides,
            norm=BatchNorm(dims[-1]),
            num_classes=num_classes,
            in_chans=in_chans,
        )
        self.apply(vit_init)


_DEEP = (4, 4, 18, 4)
_SOURCE = "parameters of the authors' code in the released configuration, multiply-adds counted in it; README: {} G"

SYSTEM = register_system(
    System(
        slug="biformer",
        title="BiFormer: Vision Transformer with Bi-Level Routing Attention",
        year=2023,
        arxiv="2303.08810",
        evidence="authors_code",
        repo="rayleizhu/BiFormer",
        idea="Each region of the map finds the few regions that matter to it; its tokens attend to the tokens there.",
        mixers=("bi_level_routing",),
        variants=(
            image_variant("biformer_tiny", BiFormer, 13_142_760, 2.228, 0.1, source=_SOURCE.format(2.2)),
            image_variant(
                "biformer_small", BiFormer, 25_536_232, 4.487, 0.15, source=_SOURCE.format(4.5), depths=_DEEP
            ),
            image_variant(
                "biformer_base",
                BiFormer,
                56_804_968,
                9.795,
                0.4,
                source=_SOURCE.format(9.8),
                dims=(96, 192, 384, 768),
                depths=_DEEP,
            ),
            image_variant("biformer_stl", BiFormerSTL, 28_372_552, 4.590, 0.1, source=_SOURCE.format(4.6)),
        ),
        reports=(
            "ImageNet-1K top-1 at 224 px: T 81.4, S 83.8, B 84.3; in the layout of Swin-T 82.7, where Swin has 81.3",
            "COCO Mask R-CNN 1x box / mask AP: S 47.8 / 43.2, B 48.6 / 43.7",
        ),
    )
)
