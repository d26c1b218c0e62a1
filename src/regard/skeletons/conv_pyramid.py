"""A pyramid that leaves positions to convolutions, as a host: what BiFormer, RMT, RAVLT and STViT share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar

from torch import Tensor, nn

from regard.layers import BatchNorm, ConvMlp, ConvStem, PositionedBlock, flat_kernels
from regard.skeletons.hierarchical import Hierarchical
from regard.skeletons.place import MixerAt, places


class ConvPyramid(Hierarchical):
    """3 x 3 convolutions down to a quarter of the image, stages of `PositionedBlock`, one convolution of stride 2 between.

    After the last stage comes BatchNorm, or, with `projection`, a linear layer to that width, BatchNorm and SiLU; then
    mean and linear.

    Args:
        mixer: builds the mixer of each block. stem: image -> tokens at a quarter of its sides.
        dims, depths, num_heads, mlp_ratios: of each stage.
        layer_scales: initial layer scale of each stage, None for none; None for all stages.
        mlp: of channels and hidden channels -> the feed-forward network of a block.
        mlp_norm: the norm before it; None is LayerNorm.
        block: a `PositionedBlock`, or a kind of it.
        projection: channels before the classifier.
        img_size: where mixers depend on the size of their map, they are built for it.
    """

    host_rules: ClassVar = (
        (r"^patch_embed\.proj\.", "stem."),
        (r"^layers\.(\d+)\.blocks\.(\d+)\.", r"stages.\1.\2."),
        (r"^layers\.(\d+)\.downsample\.reduction\.", lambda m: f"downs.{int(m[1]) + 1}.0."),
        (r"^layers\.(\d+)\.downsample\.norm\.", lambda m: f"downs.{int(m[1]) + 1}.1."),
        (r"^layers\.(\d+)\.downsample\.proj\.", lambda m: f"downs.{int(m[1]) + 1}."),
        (r"\.gamma_([12])$", r".scale\1.gamma"),
        (r"\.norm([12])\.norm\.", r".norm\1."),
        (r"^norm\.", "norm.1."),
        (r"^proj\.", "norm.0."),
    )
    """The names that the authors of RMT, RAVLT and STViT share."""

    @staticmethod
    def host_convert(name: str, value: Tensor) -> dict[str, Tensor]:
        """`KeyMap.convert`: layer scales and linear layers that are stored as maps and 1 x 1 convolutions."""
        return {name: value.flatten()} if name.endswith(".gamma") else flat_kernels(name, value)

    def __init__(
        self,
        *,
        mixer: MixerAt,
        stem: nn.Module,
        dims: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        mlp_ratios: Sequence[float],
        layer_scales: Sequence[float | None] | None = None,
        mlp: Callable[[int, int], nn.Module] = ConvMlp,
        mlp_norm: Callable[[int], nn.Module] | None = None,
        block: type[PositionedBlock] = PositionedBlock,
        projection: int | None = None,
        img_size: int = 224,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        strides = [4 * 2**stage for stage in range(len(dims))]
        stages = places(dims, depths, num_heads, strides, img_size, drop_path_rate)
        scales = [None] * len(dims) if layer_scales is None else layer_scales
        norm: nn.Module = BatchNorm(dims[-1])
        if projection is not None:
            norm = nn.Sequential(nn.Linear(dims[-1], projection), BatchNorm(projection), nn.SiLU())
        super().__init__(
            stem=stem,
            downs=[nn.Identity(), *(ConvStem(a, [b], [2]) for a, b in zip(dims[:-1], dims[1:], strict=True))],
            stages=[
                [
                    block(
                        at.dim,
                        mixer(at),
                        mlp=mlp(at.dim, int(at.dim * ratio)),
                        mlp_norm=mlp_norm,
                        norm=partial(nn.LayerNorm, eps=1e-6),
                        layer_scale=scale,
                        drop_path=at.drop_path,
                    )
                    for at in blocks
                ]
                for blocks, ratio, scale in zip(stages, mlp_ratios, scales, strict=True)
            ],
            dims=dims,
            strides=strides,
            norm=norm,
            num_features=projection,
            num_classes=num_classes,
            in_chans=in_chans,
        )
