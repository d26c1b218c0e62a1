"""Swin's pyramid (Liu et al., 2021, arXiv 2103.14030) as a host: for its own mixer and for others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from torch import nn

from regard.layers import Block, PatchEmbed, PatchMerging, vit_init
from regard.skeletons.hierarchical import Hierarchical
from regard.skeletons.place import MixerAt, places


class SwinPyramid(Hierarchical):
    """Patch embedding, stages of blocks whose width doubles, patch merging between them, LayerNorm, mean, linear.

    Args:
        mixer: builds the mixer of each block. dim: channels of the first stage.
        block: builds the residual block around a mixer, with the arguments of `Block`.
        img_size: where mixers depend on the size of their map, they are built for it.
    """

    host_rules: ClassVar = (
        (r"^patch_embed\.", "stem."),
        (r"^layers\.(\d+)\.blocks\.(\d+)\.attn\.", r"stages.\1.\2.mixer."),
        (r"^layers\.(\d+)\.blocks\.(\d+)\.", r"stages.\1.\2."),
        (r"^layers\.(\d+)\.downsample\.", lambda m: f"downs.{int(m[1]) + 1}."),
        (r"\.relative_position_bias_table$", ".bias.table"),
    )
    """The authors' names outside of the mixers, and that of Swin's bias tables."""
    host_drop: ClassVar = (r"relative_position_index$", r"attn_mask$")
    """Buffers in the authors' checkpoints."""

    def __init__(
        self,
        *,
        mixer: MixerAt,
        dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        mlp_ratio: float = 4.0,
        patch_size: int = 4,
        img_size: int = 224,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
        block: Callable[..., nn.Module] = Block,
    ) -> None:
        dims = [dim * 2**stage for stage in range(len(depths))]
        strides = [patch_size * 2**stage for stage in range(len(depths))]
        super().__init__(
            stem=PatchEmbed(in_chans, dim, patch_size),
            downs=[nn.Identity(), *(PatchMerging(width) for width in dims[:-1])],
            stages=[
                [block(at.dim, mixer(at), mlp_ratio=mlp_ratio, drop_path=at.drop_path) for at in blocks]
                for blocks in places(dims, depths, num_heads, strides, img_size, drop_path_rate)
            ],
            dims=dims,
            strides=strides,
            norm=nn.LayerNorm(dims[-1]),
            num_classes=num_classes,
            in_chans=in_chans,
        )
        self.apply(vit_init)
