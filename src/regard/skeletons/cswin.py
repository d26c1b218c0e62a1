"""CSWin's pyramid (Dong et al., 2021, arXiv 2107.00652) as a host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from torch import nn

from regard.layers import Block, ConvEmbed, vit_init
from regard.skeletons.hierarchical import Hierarchical
from regard.skeletons.place import MixerAt, places


class CSWinPyramid(Hierarchical):
    """7 x 7 convolution of stride 4, stages of blocks, 3 x 3 convolutions of stride 2 between them, norm, mean, linear.

    Args:
        mixer: builds the mixer of each block. dim: channels of the first stage; they double from stage to stage.
        block: builds the residual block around a mixer, with the arguments of `Block`.
        img_size: where mixers depend on the size of their map, they are built for it.
    """

    host_rules: ClassVar = (
        (r"^stage1_conv_embed\.0\.", "stem.proj."),
        (r"^stage1_conv_embed\.2\.", "stem.norm."),
        (r"^merge(\d)\.conv\.", r"downs.\1.proj."),
        (r"^merge(\d)\.norm\.", r"downs.\1.norm."),
        (r"^stage(\d)\.(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.{m[2]}."),
        (r"^(stages\.\d+\.\d+\.)?(qkv|proj)\.", r"\1mixer.\2."),
        (r"^(stages\.\d+\.\d+\.)?attns\.(\d)\.", r"\1mixer.branches.\2."),
        (r"\.get_v\.", ".local."),
    )
    """The authors' names outside of the branches, in a model or one block, and of the convolution of the values."""

    def __init__(
        self,
        *,
        mixer: MixerAt,
        dim: int = 64,
        depths: Sequence[int] = (2, 4, 18, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratio: float = 4.0,
        img_size: int = 224,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
        block: Callable[..., nn.Module] = Block,
    ) -> None:
        dims = [dim * 2**stage for stage in range(len(depths))]
        strides = [4 * 2**stage for stage in range(len(depths))]
        super().__init__(
            stem=ConvEmbed(in_chans, dim, 7, stride=4, padding=2),
            downs=[nn.Identity(), *(ConvEmbed(width, 2 * width, 3, stride=2, padding=1) for width in dims[:-1])],
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
