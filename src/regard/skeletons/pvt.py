"""PVT (Wang et al., 2021, arXiv 2102.12122) as a host: stages with patches and a position table each."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

from torch import nn

from regard.layers import Block, PatchEmbed, PositionTable, vit_init
from regard.skeletons.hierarchical import Hierarchical
from regard.skeletons.place import MixerAt, places


class PVT(Hierarchical):
    """Patch embedding and position table before each stage, blocks, mean, linear (no final norm).

    Args:
        mixer: builds the mixer of each block. mlp_ratios: of each stage.
        img_size: position tables are built for it; images of other sizes run too.
    """

    host_rules: ClassVar = (
        (r"^patch_embed1\.", "stem.0."),
        (r"^pos_embed1$", "stem.1.table"),
        (r"^patch_embed(\d)\.", lambda m: f"downs.{int(m[1]) - 1}.0."),
        (r"^pos_embed(\d)$", lambda m: f"downs.{int(m[1]) - 1}.1.table"),
        (r"^block(\d)\.(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.{m[2]}."),
        (r"^(stages\.\d+\.\d+)\.attn\.", r"\1.mixer."),
        (r"\.mixer\.sr\.", ".mixer.reduce.0."),
        (r"\.mixer\.norm\.", ".mixer.reduce.1."),
    )
    """The authors' names, with those of PVT's own attention."""

    def __init__(
        self,
        *,
        mixer: MixerAt,
        dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        patch_size: int = 4,
        img_size: int = 224,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        strides = [patch_size * 2**stage for stage in range(len(dims))]
        stages = list(places(dims, depths, num_heads, strides, img_size, drop_path_rate))
        entries = [
            nn.Sequential(
                PatchEmbed(width, blocks[0].dim, patch_size if index == 0 else 2),
                PositionTable(blocks[0].grid, blocks[0].dim),
            )
            for index, (width, blocks) in enumerate(zip([in_chans, *dims[:-1]], stages, strict=True))
        ]
        norm = partial(nn.LayerNorm, eps=1e-6)
        super().__init__(
            stem=entries[0],
            downs=[nn.Identity(), *entries[1:]],
            stages=[
                [Block(at.dim, mixer(at), mlp_ratio=ratio, norm=norm, drop_path=at.drop_path) for at in blocks]
                for blocks, ratio in zip(stages, mlp_ratios, strict=True)
            ],
            dims=dims,
            strides=strides,
            num_classes=num_classes,
            in_chans=in_chans,
        )
        self.apply(vit_init)

    def no_weight_decay(self) -> set[str]:
        """The position tables."""
        return {name for name, _ in self.named_parameters() if name.endswith(".1.table")}
