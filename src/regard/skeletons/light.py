"""The macro design of light vision transformers (EfficientViT, arXiv 2305.07027; SHViT, arXiv 2401.16456) as a host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from torch import nn

from regard import checks
from regard.layers import BatchNorm, ConvNorm, Residual, SqueezeExcite
from regard.layers.conv_norm import LEVIT_NAMES, scale_and_shift, with_weights
from regard.skeletons.hierarchical import Hierarchical
from regard.skeletons.place import Place, places


def local_mixing(dim: int, *, weight: float = 1.0, drop_path: float = 0.0) -> Residual:
    """x + BN(DW 3 x 3(x))."""
    return Residual(ConvNorm(dim, dim, 3, groups=dim, weight=weight), drop_path)


def feed_forward(dim: int, *, drop_path: float = 0.0) -> Residual:
    """x + BN(W' relu(BN(W x))), twice as wide inside."""
    return Residual(nn.Sequential(ConvNorm(dim, 2 * dim), nn.ReLU(), ConvNorm(2 * dim, dim, weight=0.0)), drop_path)


def _merging(dim: int, out_dim: int) -> nn.Sequential:
    """Expand fourfold, depthwise convolution of stride 2, squeeze-and-excitation, project."""
    wide = 4 * dim
    squeezed = max(8, (dim + 4) // 8 * 8)  # a quarter of the inner channels, rounded to a multiple of 8
    return nn.Sequential(
        ConvNorm(dim, wide),
        nn.ReLU(),
        ConvNorm(wide, wide, 3, stride=2, groups=wide),
        nn.ReLU(),
        SqueezeExcite(wide, squeezed),
        ConvNorm(wide, out_dim),
    )


class LightPyramid(Hierarchical):
    """Convolutions down to a coarse map, stages of blocks, mean, BatchNorm, linear: BatchNorm throughout, so all folds.

    The stem halves the image until `stem_stride` by 3 x 3 convolutions whose width doubles. Between two stages stand local
    mixing and feed-forward, a merging that halves the map, and local mixing and feed-forward again. No positions
    are learned: the depthwise convolutions tell them. `layers.fuse` gives the deployed form.

    Args:
        block: builds each block.
        stem_stride: a power of two, 16 as published; small images need less.
    """

    host_rules: ClassVar = (
        (r"^patch_embed\.", "stem."),
        (r"^blocks([23])\.([02])\.", lambda m: f"downs.{int(m[1]) - 1}.{m[2]}."),
        (r"^blocks([23])\.1\.conv1\.", lambda m: f"downs.{int(m[1]) - 1}.1.0."),
        (r"^blocks([23])\.1\.conv2\.", lambda m: f"downs.{int(m[1]) - 1}.1.2."),
        (r"^blocks([23])\.1\.se\.", lambda m: f"downs.{int(m[1]) - 1}.1.4."),
        (r"^blocks([23])\.1\.conv3\.", lambda m: f"downs.{int(m[1]) - 1}.1.5."),
        (r"^blocks1\.", "stages.0."),
        (r"^blocks([23])\.(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.{int(m[2]) - 3}."),
        (r"\.m\.", ".branch."),
        (r"\.pw1\.", ".0."),
        (r"\.pw2\.", ".2."),
        (r"^head\.bn\.", "head_norm."),
        (r"^head\.l\.", "head."),
        *LEVIT_NAMES,
    )
    """The authors' names outside of the mixers."""

    def __init__(
        self,
        *,
        block: Callable[[Place], nn.Module],
        dims: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        stem_stride: int = 16,
        img_size: int = 224,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        halvings = stem_stride.bit_length() - 1
        if halvings < 1 or stem_stride != 2**halvings:
            raise ValueError(f"stem_stride must be a power of two from 2 on, got {stem_stride!r}.")
        checks.divisible("dims[0]", dims[0], "half of stem_stride", stem_stride // 2)
        widths = [in_chans, *(dims[0] >> step for step in reversed(range(halvings)))]
        stem: list[nn.Module] = []
        for width, wider in zip(widths[:-1], widths[1:], strict=True):
            stem += [ConvNorm(width, wider, 3, stride=2), nn.ReLU()]
        strides = [stem_stride * 2**stage for stage in range(len(dims))]
        super().__init__(
            stem=nn.Sequential(*stem[:-1]),
            downs=[
                nn.Identity(),
                *(
                    nn.Sequential(
                        nn.Sequential(local_mixing(width), feed_forward(width)),
                        _merging(width, wider),
                        nn.Sequential(local_mixing(wider), feed_forward(wider)),
                    )
                    for width, wider in zip(dims[:-1], dims[1:], strict=True)
                ),
            ],
            stages=[
                [block(at) for at in stage]
                for stage in places(dims, depths, num_heads, strides, img_size, drop_path_rate)
            ],
            dims=dims,
            strides=strides,
            head_norm=BatchNorm(dims[-1]),
            num_classes=num_classes,
            in_chans=in_chans,
        )

    def fused(self) -> LightPyramid:
        """For `layers.fuse`: the last BatchNorm goes into the classifier."""
        if isinstance(self.head, nn.Linear) and isinstance(self.head_norm, BatchNorm):
            scale, shift = scale_and_shift(self.head_norm)
            bias = self.head.bias + self.head.weight @ shift
            self.head, self.head_norm = with_weights(self.head, self.head.weight * scale, bias), nn.Identity()
        return self
