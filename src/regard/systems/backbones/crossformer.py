"""CrossFormer: A Versatile Vision Transformer Hinging on Cross-scale Attention (Wang et al., 2021, arXiv 2108.00154).

Tokens are made of patches of several sizes. Blocks take turns: attention among neighbours, then among tokens a fixed
interval apart. A small network turns offsets into position biases, so that groups may have any size.
CrossFormer++ (Wang et al., 2023, arXiv 2303.06908) lets groups grow with depth and cools amplitudes down in between.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from regard import checks, ops
from regard.checkpoint import KeyMap
from regard.layers import Block, Conv2d, DynamicPositionBias, Mixer, depthwise, heads_of, vit_init
from regard.layouts.windows import crop, pad_to_multiple, partition, unpartition
from regard.registry import README_FLOPS, System, image_variant, register_mixer, register_system
from regard.skeletons import Hierarchical, Place, places


@register_mixer("long_short")
class LongShortAttention(Mixer):
    r"""Attention in groups of neighbours, or of tokens a fixed interval apart, for 1, 2 or 3 spatial axes (section 3.2).

    $$\mathrm{out} = W_o\,\mathrm{softmax}(d^{-1/2} Q K^\top + B)\,V \quad\text{within each group}$$

    With interval I and group size G, the map is cut into squares of I G tokens a side, and the tokens of a square whose
    places are equal modulo I make a group: G x G tokens that are I apart. I = 1 is short-distance attention (SDA), a
    larger one long-distance attention (LDA); they alternate in a stack. B comes from a `DynamicPositionBias` of the
    offset in the group. A map that is no multiple of I G is padded at its end, and no query sees padding. On a map
    not larger than G along its shorter side, G is that side and I is 1, as in the authors' code.

    Args:
        dim: channels. num_heads: divides dim. group_size: G. interval: I.
        hidden: width of the position network; None is dim / 16 as in the published models, but at least 4.
        axes: number of spatial axes.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        group_size: int = 7,
        interval: int = 1,
        hidden: int | None = None,
        axes: int = 2,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        self.head_dim = heads_of(dim, num_heads)
        self.dim, self.num_heads, self.axes = dim, num_heads, axes
        (self.group_size,) = checks.tuple_of("group_size", group_size, 1)
        (self.interval,) = checks.tuple_of("interval", interval, 1)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.bias = DynamicPositionBias(num_heads, max(dim // 16, 4) if hidden is None else hidden, axes=axes)
        self.proj = nn.Linear(dim, dim)

    @classmethod
    def in_stack(cls, index: int, input_size: tuple[int, ...], dim: int, num_heads: int, **options: Any) -> Mixer:
        """Every second block is long-distance, over the whole map. Unless given, G is 7 or divides the longest side."""
        side = max(input_size)
        size = options.pop(
            "group_size", next((size for size in (7, 8, 6, 5, 4) if side % size == 0 and size < side), 7)
        )
        interval = -(-side // size) if index % 2 else 1
        options = {"interval": interval, "axes": len(input_size), **options}
        return cls(dim, num_heads, group_size=size, **options)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        spatial, size, step = self.check(x), self.group_size, self.interval
        if min(spatial) <= size:
            size, step = min(spatial), 1
        sizes, squares = [size] * self.axes, [size * step] * self.axes
        padded = [-(-length // side) * side for length, side in zip(spatial, squares, strict=True)]
        groups = self._group(x, squares, sizes)  # (B squares groups, tokens, dim)
        there = None
        if tuple(padded) != spatial:
            there = self._group(x.new_ones(1, *spatial, 1, dtype=torch.bool), squares, sizes).squeeze(-1)
        out = self.attend(groups, sizes, None if there is None else there.repeat(x.shape[0], 1))
        count = math.prod(padded) // math.prod(squares)
        out = unpartition(out.unflatten(0, (x.shape[0] * count, step**self.axes)), sizes, squares, "grid")
        return crop(unpartition(out.flatten(1, self.axes).unflatten(0, (x.shape[0], count)), squares, padded), spatial)

    def attend(self, x: Tensor, size: Sequence[int], there: Tensor | None = None) -> Tensor:
        """Groups `(N, tokens, dim)` of `size` tokens along each axis -> the same shape.

        Args:
            there: `(N, tokens)`, False where a token is padding.
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        mask = None if there is None else there[:, None, None]
        return self.proj(ops.attention(q, k, v, bias=self.bias(size), mask=mask).flatten(-2))  # type: ignore[union-attr]

    @staticmethod
    def _group(x: Tensor, squares: Sequence[int], sizes: Sequence[int]) -> Tensor:
        x = partition(pad_to_multiple(x, squares), squares).flatten(0, 1).unflatten(1, squares)
        return partition(x, sizes, "grid").flatten(0, 1)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, group_size={self.group_size}, interval={self.interval}"


class CrossScaleEmbed(nn.Module):
    """The cross-scale embedding layer: convolutions of several sizes at the same places, concatenated (section 3.1).

    The first of n kernels gives half of the channels, the next a quarter, and so on; the last as many as the one before.
    A side that is no multiple of the stride is zero-padded at its end.
    """

    def __init__(self, in_chans: int, dim: int, kernels: Sequence[int], stride: int) -> None:
        super().__init__()
        widths = [dim // 2 ** min(index + 1, len(kernels) - 1) for index in range(len(kernels))]
        self.stride = stride
        self.projs = nn.ModuleList(
            Conv2d(in_chans, width, kernel, stride=stride, padding=(kernel - stride) // 2)
            for width, kernel in zip(widths, kernels, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, W, in_chans)` -> `(B, H / stride, W / stride, dim)`."""
        x = pad_to_multiple(x, (self.stride, self.stride))
        return torch.cat([proj(x) for proj in self.projs], -1)


class CrossFormerBlock(Block):
    """A `Block`; with `cool`, an amplitude cooling layer after it: depthwise convolution and LayerNorm, no shortcut."""

    def __init__(self, dim: int, mixer: nn.Module, *, cool: bool = False, **options: Any) -> None:
        super().__init__(dim, mixer, **options)
        self.cool = nn.Sequential(depthwise(dim, 3), nn.LayerNorm(dim)) if cool else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, W, dim)` -> the same shape."""
        return self.cool(super().forward(x))


class CrossFormer(Hierarchical):
    """Patches of four sizes, stages of SDA and LDA in turn, cross-scale embeddings between them, LayerNorm, mean, linear.

    Args:
        dim: channels of the first stage; they double from stage to stage.
        group_size, intervals: G and I of each stage; every second block has interval 1.
        mlp_ratio: hidden width of the MLPs, one number or one for each stage.
        patch_sizes: kernels of the stem, the first being its stride. merge_sizes: kernels between stages.
        cooling: an amplitude cooling layer after every third block of a stage but its last (CrossFormer++).
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0.
    """

    authors_keys = KeyMap(
        rules=[
            (r"^patch_embed\.projs\.", "stem.0.projs."),
            (r"^patch_embed\.norm\.", "stem.1."),
            (r"^layers\.(\d+)\.downsample\.norm\.", lambda m: f"downs.{int(m[1]) + 1}.0."),
            (r"^layers\.(\d+)\.downsample\.reductions\.", lambda m: f"downs.{int(m[1]) + 1}.1.projs."),
            (r"^layers\.(\d+)\.blocks\.", r"stages.\1."),
            (r"(^|\.)attn\.", r"\1mixer."),
            (r"(^|\.)pos\.pos_proj\.", r"\1bias.embed."),
            (r"(^|\.)pos\.pos(\d)\.", lambda m: f"{m[1]}bias.layers.{int(m[2]) - 1}."),
            (r"\.ex_conv\.", ".cool.0."),
            (r"\.ex_ln\.", ".cool.1."),
        ]
    )

    def __init__(
        self,
        *,
        dim: int = 64,
        depths: Sequence[int] = (1, 1, 8, 6),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        group_size: Sequence[int] = (7, 7, 7, 7),
        intervals: Sequence[int] = (8, 4, 2, 1),
        mlp_ratio: float | Sequence[float] = 4.0,
        patch_sizes: Sequence[int] = (4, 8, 16, 32),
        merge_sizes: Sequence[int] = (2, 4),
        cooling: bool = False,
        img_size: int = 224,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        dims = [dim * 2**stage for stage in range(len(depths))]
        strides = [patch_sizes[0] * 2**stage for stage in range(len(depths))]
        ratios = [mlp_ratio] * len(dims) if isinstance(mlp_ratio, (int, float)) else mlp_ratio

        def block(at: Place) -> CrossFormerBlock:
            mixer = LongShortAttention(
                at.dim,
                at.num_heads,
                group_size=group_size[at.stage],
                interval=intervals[at.stage] if at.index % 2 else 1,
                hidden=max(at.dim // 16, 1),
            )
            cool = cooling and at.index % 3 == 2 and at.index < depths[at.stage] - 1
            return CrossFormerBlock(at.dim, mixer, cool=cool, mlp_ratio=ratios[at.stage], drop_path=at.drop_path)

        super().__init__(
            stem=nn.Sequential(CrossScaleEmbed(in_chans, dim, patch_sizes, patch_sizes[0]), nn.LayerNorm(dim)),
            downs=[
                nn.Identity(),
                *(nn.Sequential(nn.LayerNorm(a), CrossScaleEmbed(a, b, merge_sizes, 2)) for a, b in pairwise(dims)),
            ],
            stages=[
                [block(at) for at in blocks]
                for blocks in places(dims, depths, num_heads, strides, img_size, drop_path_rate)
            ],
            dims=dims,
            strides=strides,
            norm=nn.LayerNorm(dims[-1]),
            num_classes=num_classes,
            in_chans=in_chans,
        )
        self.apply(vit_init)


_S = {"dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)}
_B = {**_S, "depths": (2, 2, 18, 2)}
_L = {**_B, "dim": 128, "num_heads": (4, 8, 16, 32)}
_PP = {"group_size": (4, 4, 14, 7), "intervals": (4, 2, 1, 1), "cooling": True, "source": README_FLOPS}
_PP_S = {
    **_PP,
    "depths": (2, 2, 18, 2),
    "source": "parameters of the authors' code; its README states 4.9 GFLOPs as for S, but the configuration computes 4.4",
}

SYSTEM = register_system(
    System(
        slug="crossformer",
        title="CrossFormer: A Versatile Vision Transformer Hinging on Cross-scale Attention",
        year=2021,
        arxiv="2108.00154",
        evidence="authors_code",
        repo="cheerss/CrossFormer",
        idea="Tokens from patches of several sizes; attention among neighbours and among tokens far apart take turns.",
        mixers=("long_short",),
        variants=(
            image_variant("crossformer_tiny", CrossFormer, 27_776_794, 2.870, 0.1),
            image_variant("crossformer_small", CrossFormer, 30_657_394, 4.925, 0.2, **_S),
            image_variant("crossformer_base", CrossFormer, 51_971_554, 9.189, 0.3, **_B),
            image_variant("crossformer_large", CrossFormer, 91_971_184, 16.146, 0.5, **_L),
            image_variant("crossformer_pp_small", CrossFormer, 23_325_340, None, 0.2, **_PP_S),
            image_variant("crossformer_pp_base", CrossFormer, 51_994_594, 9.5, 0.3, **_B, **_PP),
            image_variant("crossformer_pp_large", CrossFormer, 92_001_904, 16.6, 0.5, **_L, **_PP),
            image_variant(
                "crossformer_pp_huge", CrossFormer, 95_962_944, 21.8, 0.5, **_L | {"depths": (6, 6, 18, 2)}, **_PP
            ),
        ),
        reports=(
            "ImageNet-1K top-1 at 224 px: T 81.5, S 82.5, B 83.4, L 84.0; ++S 83.2, ++B 84.2, ++L 84.7, ++H 84.9 (README)",
            "COCO Mask R-CNN 1x box / mask AP: S 45.4 / 41.4, B 47.2 / 42.7",
            "ADE20K UPerNet mIoU: S 47.6, B 49.7, L 50.4",
        ),
    )
)
