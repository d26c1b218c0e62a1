"""ULSAM: Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural Networks (Saini et al., 2020, arXiv
2006.15102).

The channels are cut into a few subspaces, and each gets one map over all positions that says where it matters. The module
costs five parameters a channel, so that it can stand in for whole late layers of a MobileNet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import checks
from regard.layers import BatchNorm, ConvNorm, Mixer, Residual, conv, depthwise, heads_of, linear_rates
from regard.registry import System, Variant, image_variant, register_mixer, register_system
from regard.skeletons import Hierarchical
from regard.skeletons.base import make_head

_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


class Subspace(nn.Module):
    r"""The map of one subspace.

    $$A = \mathrm{softmax}_{\text{positions}}\,g(\mathrm{PW}(\mathrm{maxpool}_3(g(\mathrm{DW}(x)))))$$

    DW scales and shifts each channel, PW maps all of them to one, and g is ReLU of BatchNorm, which is in the authors'
    code only. The ReLU before the softmax gives equal weight to all positions below 0.
    """

    def __init__(self, dim: int, *, axes: int = 2, bn_momentum: float = 0.9) -> None:
        super().__init__()
        self.axes = axes
        self.conv_dws, self.conv_point = depthwise(dim, 1, dims=axes), conv(axes)(dim, 1, 1)
        self.bn_dws, self.bn_point = BatchNorm(dim, momentum=bn_momentum), BatchNorm(1, momentum=bn_momentum)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> `(B, *S, 1)`, positive, sum 1."""
        x = F.relu(self.bn_dws(self.conv_dws(x)))
        x = _MAX_POOL[self.axes](x.movedim(-1, 1), 3, stride=1, padding=1).movedim(1, -1)
        x = F.relu(self.bn_point(self.conv_point(x)))
        return x.flatten(1, -2).softmax(1).view(x.shape)


@register_mixer("subspace")
class SubspaceAttention(Mixer):
    r"""ULSAM: every subspace of channels is weighted by a map of its own.

    $$y_n = A_n \odot x_n + x_n, \quad x = [x_1, \dots, x_g]$$

    A sums to 1 over the positions, so y is close to x on large grids. Parameters: 5 dim + 3 g.

    Args:
        num_heads: g, the number of subspaces; divides dim.
        bn_momentum: of the BatchNorms. With the authors' 0.9 running statistics are nearly those of the last batch.
        axes: number of spatial axes.
    """

    def __init__(self, dim: int, num_heads: int = 4, *, axes: int = 2, bn_momentum: float = 0.9) -> None:
        super().__init__()
        width = heads_of(dim, num_heads)
        self.dim, self.num_heads, self.axes = dim, num_heads, axes
        self.subspaces = nn.ModuleList(Subspace(width, axes=axes, bn_momentum=bn_momentum) for _ in range(num_heads))

    def maps(self, x: Tensor) -> Tensor:
        """The map of every subspace: `(B, *S, num_heads)`."""
        parts = x.chunk(self.num_heads, -1)
        return torch.cat([subspace(part) for subspace, part in zip(self.subspaces, parts, strict=True)], -1)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        self.check(x)
        return (x.unflatten(-1, (self.num_heads, -1)) * (1 + self.maps(x).unsqueeze(-1))).flatten(-2)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}"


class MobileNet(Hierarchical):
    """What both hosts share: a stem, blocks in one row, of which ULSAM stands after some or in place of some.

    Args:
        layers: output channels and stride of each block; a stage begins at each stride above 1.
        block: builds block number i from i, its input and output channels and its stride.
        after, instead: numbers of the blocks that ULSAM follows or replaces. A replaced block must have stride 1; the
            channels then stay as they are.
        subspaces: g of every ULSAM.
    """

    def __init__(
        self,
        *,
        layers: Sequence[tuple[int, int]],
        block: Callable[[int, int, int, int], nn.Module],
        dim: int,
        act: Callable[[], nn.Module],
        stem_stride: int,
        after: Sequence[int],
        instead: Sequence[int],
        subspaces: int,
        num_classes: int,
        in_chans: int,
        **parts: Any,
    ) -> None:
        for name, places in (("after", after), ("instead", instead)):
            if any(not 0 <= place < len(layers) for place in places):
                raise ValueError(
                    f"{name} must hold numbers of blocks from 0 to {len(layers) - 1}, got {tuple(places)}."
                )
        stem = nn.Sequential(ConvNorm(in_chans, dim, 3, stride=stem_stride), act())
        stages: list[list[nn.Module]] = [[]]
        dims, strides = [dim], [stem_stride]
        for index, (out_dim, stride) in enumerate(layers):
            if stride > 1:
                stages.append([])
                dims.append(dim)
                strides.append(strides[-1] * stride)
            if index in instead:
                if stride > 1:
                    raise ValueError(
                        f"instead={tuple(instead)} names block {index}, which halves the map: it must stay."
                    )
                stages[-1].append(SubspaceAttention(dim, subspaces))
            else:
                stages[-1].append(block(index, dim, out_dim, stride))
                dim = out_dim
            if index in after:
                stages[-1].append(SubspaceAttention(dim, subspaces))
            dims[-1] = dim
        super().__init__(
            stem=stem,
            downs=[nn.Identity()] * len(stages),
            stages=stages,
            dims=dims,
            strides=strides,
            num_classes=num_classes,
            in_chans=in_chans,
            **parts,
        )


class MobileNetV1(MobileNet):
    """Depthwise separable convolutions in a row (Howard et al., 2017, arXiv 1704.04861), mean, linear.

    Args:
        layers: as in `MobileNet`. width: multiplies all channels. dim: channels of the stem.
        after, instead, subspaces: where ULSAM stands, see `MobileNet`.
    """

    def __init__(
        self,
        layers: Sequence[tuple[int, int]] = (
            *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
            *((512, 1), (512, 1), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1)),
        ),
        dim: int = 32,
        width: float = 1.0,
        stem_stride: int = 2,
        after: Sequence[int] = (),
        instead: Sequence[int] = (),
        subspaces: int = 4,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        def block(index: int, dim: int, out_dim: int, stride: int) -> nn.Module:
            local = ConvNorm(dim, dim, 3, stride=stride, groups=dim)
            return nn.Sequential(local, nn.ReLU(), ConvNorm(dim, out_dim), nn.ReLU())

        checks.positive("width", width)
        super().__init__(
            layers=[(int(out_dim * width), stride) for out_dim, stride in layers],
            block=block,
            dim=int(dim * width),
            act=nn.ReLU,
            stem_stride=stem_stride,
            after=after,
            instead=instead,
            subspaces=subspaces,
            num_classes=num_classes,
            in_chans=in_chans,
        )


class MobileNetV2(MobileNet):
    """Inverted residuals in a row (Sandler et al., 2018, arXiv 1801.04381), 1 x 1 convolution, mean, dropout, linear.

    Args:
        layers: as in `MobileNet`. expand_ratio: inner channels of a block as a multiple; the first block has 1.
        features: channels of the last convolution. dropout: before the classifier.
        after, instead, subspaces: where ULSAM stands, see `MobileNet`.
        gate: of the inner channels of a block that expands them -> a module before its last convolution, for other systems.
    """

    def __init__(
        self,
        layers: Sequence[tuple[int, int]] = (
            *((16, 1), (24, 2), (24, 1), (32, 2), (32, 1), (32, 1), (64, 2), (64, 1), (64, 1), (64, 1)),
            *((96, 1), (96, 1), (96, 1), (160, 2), (160, 1), (160, 1), (320, 1)),
        ),
        dim: int = 32,
        expand_ratio: int = 6,
        features: int = 1280,
        dropout: float = 0.2,
        stem_stride: int = 2,
        after: Sequence[int] = (),
        instead: Sequence[int] = (),
        subspaces: int = 4,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
        gate: Callable[[int], nn.Module] | None = None,
    ) -> None:
        rates = linear_rates(drop_path_rate, len(layers))

        def block(index: int, dim: int, out_dim: int, stride: int) -> nn.Module:
            inner = dim * (expand_ratio if index else 1)
            wide = [ConvNorm(dim, inner), nn.ReLU6()] if inner != dim else []
            local = ConvNorm(inner, inner, 3, stride=stride, groups=inner)
            gates = [gate(inner)] if wide and gate is not None else []
            branch = nn.Sequential(*wide, local, nn.ReLU6(), *gates, ConvNorm(inner, out_dim))
            return Residual(branch, rates[index]) if stride == 1 and dim == out_dim else branch

        super().__init__(
            layers=layers,
            block=block,
            dim=dim,
            act=nn.ReLU6,
            stem_stride=stem_stride,
            after=after,
            instead=instead,
            subspaces=subspaces,
            num_classes=num_classes,
            in_chans=in_chans,
            head_norm=nn.Dropout(dropout),
        )
        self.norm = nn.Sequential(ConvNorm(self.num_features, features), nn.ReLU6())
        self.num_features = features
        self.head = make_head(features, num_classes)


def _module(dim: int, subspaces: int, params: int) -> Variant:
    source = "parameters of the authors' class"
    options = {"dim": dim, "num_heads": subspaces}
    return Variant(f"ulsam_{dim}_g{subspaces}", SubspaceAttention, params, None, ((1, 14, 14, dim),), source, options)


_COUNTS = {
    32: (163, 166, 172, 184, 208),
    512: (2563, 2566, 2572, 2584, 2608),
    1024: (5123, 5126, 5132, 5144, 5168),
}
_HOST = "the host alone, as published"

SYSTEM = register_system(
    System(
        slug="ulsam",
        title="ULSAM: Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural Networks",
        year=2020,
        arxiv="2006.15102",
        evidence="authors_code",
        repo="Nandan91/ULSAM",
        idea="Channels in a few subspaces, each weighted by one map over all positions, for next to no parameters.",
        mixers=("subspace",),
        variants=(
            *(
                _module(dim, subspaces, count)
                for dim, counts in _COUNTS.items()
                for subspaces, count in zip((1, 2, 4, 8, 16), counts, strict=True)
            ),
            image_variant("mobilenet_v1", MobileNetV1, 4_231_976, 0.569, source=_HOST),
            image_variant("mobilenet_v2", MobileNetV2, 3_504_872, 0.3008, source=_HOST),
            Variant("ulsam_mobilenet_v1", MobileNetV1, options={"instead": (10,)}),
            Variant("ulsam_mobilenet_v2", MobileNetV2, options={"instead": (15, 16)}),
        ),
        reports=(
            "ImageNet-1K on MobileNet-V2: about 13 % fewer multiply-adds and 25 % fewer parameters at +0.27 points of top-1; "
            "the authors released the module only, so the places of ours in the MobileNets are our choice",
            "three fine-grained data sets: more than one point of top-1 at the same savings",
        ),
    )
)
