"""GhostNetV2: Enhance Cheap Operation with Long-Range Attention (Tang et al., 2022, arXiv 2211.12905).

A Ghost module makes half of its features by cheap depthwise convolutions of the other half, which see 3 x 3 pixels only. A
gate from a fully connected layer along rows and one along columns, at half the resolution, brings in what is far away
(DFC attention). Both layers share their weights over places, so they are long, thin depthwise convolutions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import checks
from regard.checkpoint import KeyMap
from regard.layers import ConvNorm, DropPath, Mixer, SqueezeExcite, flat_kernels, linear_rates
from regard.registry import System, image_variant, register_mixer, register_system
from regard.skeletons import ImageModel
from regard.skeletons.base import make_head

_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


class DFCGate(nn.Module):
    r"""Decoupled fully connected attention (section 3.2), a gate for each place and channel.

    $$\mathrm{gate} = \uparrow\!\sigma(F^H * (F^W * (W \downarrow\! x)))$$

    The arrows are mean pooling over 2 x 2 places (an odd last place is left out) and repetition. W is pointwise; F^W and
    F^H are depthwise kernels along one axis each. BatchNorm follows each of the three, no activation but the sigmoid.

    Args:
        dim, out_dim: channels in, and of the gate. kernel_size: length of the kernels, odd. axes: number of spatial axes.
    """

    def __init__(self, dim: int, out_dim: int, *, kernel_size: int = 5, axes: int = 2) -> None:
        super().__init__()
        convs = [ConvNorm(dim, out_dim)]
        for along in reversed(range(axes)):
            size = [kernel_size if axis == along else 1 for axis in range(axes)]
            convs.append(ConvNorm(out_dim, out_dim, size, groups=out_dim, axes=axes))
        self.convs = nn.Sequential(*convs)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> `(B, *S, out_dim)` between 0 and 1."""
        spatial = x.shape[1:-1]
        halves = tuple(min(2, length) for length in spatial)
        coarse = self.convs(_POOL[len(spatial)](x.movedim(-1, 1), halves, halves).movedim(1, -1)).sigmoid()
        return F.interpolate(coarse.movedim(-1, 1), tuple(spatial), mode="nearest").movedim(1, -1)


def _of_pair(match: re.Match[str]) -> str:
    """Convolutions and norms in turn, counted by the authors, as parts of `ConvNorm`s."""
    pair, part = divmod(int(match[1]), 2)
    return f"{pair}.{('conv', 'norm')[part]}."


class GhostModule(nn.Module):
    """Half of the channels by a pointwise convolution, the others by a depthwise 3 x 3 of those; gated if `attention`.

    Args:
        dim, out_dim: channels in and out. act: ReLU after both convolutions. axes: number of spatial axes.
    """

    authors_keys = KeyMap(
        rules=[
            (r"\bprimary_conv\.0\.", "primary.conv."),
            (r"\bprimary_conv\.1\.", "primary.norm."),
            (r"\bcheap_operation\.0\.", "cheap.conv."),
            (r"\bcheap_operation\.1\.", "cheap.norm."),
            (r"\bshort_conv\.(\d)\.", lambda m: f"gate.convs.{_of_pair(m)}"),
        ],
        convert=flat_kernels,
    )

    def __init__(self, dim: int, out_dim: int, *, act: bool = True, attention: bool = False, axes: int = 2) -> None:
        super().__init__()
        half = -(-out_dim // 2)
        self.out_dim = out_dim
        self.primary = ConvNorm(dim, half)
        self.cheap = ConvNorm(half, half, 3, groups=half, axes=axes)
        self.act = nn.ReLU() if act else nn.Identity()
        self.gate = DFCGate(dim, out_dim, axes=axes) if attention else None

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> `(B, *S, out_dim)`."""
        primary = self.act(self.primary(x))
        out = torch.cat([primary, self.act(self.cheap(primary))], -1)[..., : self.out_dim]
        return out if self.gate is None else out * self.gate(x)


@register_mixer("dfc")
class DFCAttention(Mixer):
    r"""A Ghost module of its own features, gated by decoupled fully connected attention (section 3.3).

    $$\mathrm{out} = [y, \mathrm{relu}(\mathrm{BN}(\mathrm{DW}(y)))] \odot \mathrm{gate}(x),\quad
      y = \mathrm{relu}(\mathrm{BN}(W x))$$

    with the gate of `DFCGate`.

    Args:
        dim: channels. num_heads: taken so that every mixer is built alike; there are none.
        axes: number of spatial axes.
    """

    has_heads: ClassVar[bool] = False

    def __init__(self, dim: int, num_heads: int = 1, *, axes: int = 2) -> None:
        super().__init__()
        checks.positive("dim", dim)
        self.dim, self.num_heads, self.axes = dim, num_heads, axes
        self.ghost = GhostModule(dim, dim, attention=True, axes=axes)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        self.check(x)
        return self.ghost(x)


def rounded(channels: float, divisor: int = 4) -> int:
    """The multiple of `divisor` next to `channels`, at least one, and never more than a tenth below."""
    nearest = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < 0.9 * channels else nearest


class GhostBottleneck(nn.Module):
    """Expand by a (gated) Ghost module, stride, squeeze-and-excitation, project by a Ghost module; a residual around.

    Args:
        dim, hidden, out_dim: channels in, inside and out. kernel_size, stride: of the strided convolution, and of the
            shortcut's where the shape changes. se_ratio: hidden channels of squeeze-and-excitation over `hidden`, or 0.
        attention: the first Ghost module is gated.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        out_dim: int,
        *,
        kernel_size: int = 3,
        stride: int = 1,
        se_ratio: float = 0.0,
        attention: bool = True,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.ghost1 = GhostModule(dim, hidden, attention=attention)
        self.reduce: nn.Module = nn.Identity()
        if stride > 1:
            self.reduce = ConvNorm(hidden, hidden, kernel_size, stride=stride, groups=hidden)
        self.se: nn.Module = nn.Identity()
        if se_ratio:
            self.se = SqueezeExcite(hidden, rounded(hidden * se_ratio), gate=nn.Hardsigmoid)
        self.ghost2 = GhostModule(hidden, out_dim, act=False)
        self.shortcut: nn.Module = nn.Identity()
        if dim != out_dim or stride > 1:
            along = ConvNorm(dim, dim, kernel_size, stride=stride, groups=dim)
            self.shortcut = nn.Sequential(along, ConvNorm(dim, out_dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, W, dim)` -> `(B, H / stride, W / stride, out_dim)`, sizes rounded up."""
        return self.shortcut(x) + self.drop_path(self.ghost2(self.se(self.reduce(self.ghost1(x)))))


Row = tuple[int, int, int, float, int]
"""A bottleneck: kernel size, hidden channels, channels out, ratio of squeeze-and-excitation, stride."""

BLOCKS: tuple[tuple[Row, ...], ...] = (
    ((3, 16, 16, 0, 1),),
    ((3, 48, 24, 0, 2),),
    ((3, 72, 24, 0, 1),),
    ((5, 72, 40, 0.25, 2),),
    ((5, 120, 40, 0.25, 1),),
    ((3, 240, 80, 0, 2),),
    ((3, 200, 80, 0, 1), (3, 184, 80, 0, 1), (3, 184, 80, 0, 1), (3, 480, 112, 0.25, 1), (3, 672, 112, 0.25, 1)),
    ((5, 672, 160, 0.25, 2),),
    ((5, 960, 160, 0, 1), (5, 960, 160, 0.25, 1), (5, 960, 160, 0, 1), (5, 960, 160, 0.25, 1)),
)
"""The published network, in the groups of the authors' code."""


class GhostNetV2(ImageModel):
    """A 3 x 3 convolution of stride 2, bottlenecks, pointwise convolution, mean, linear and ReLU, dropout, linear.

    `layers.fuse` gives the deployed form.

    Args:
        blocks: groups of bottlenecks, see `Row`. Feature maps are taken before each stride, and at the end.
        width: multiplies all channels but those of the last hidden layer.
        gated_from: the bottlenecks from this one on have DFC attention; None is the first GhostNet, without any.
        hidden: channels of the last hidden layer. dropout: before the classifier.
    """

    authors_keys = KeyMap(
        rules=[
            (r"^conv_stem\.", "stem.0.conv."),
            (r"^bn1\.", "stem.0.norm."),
            (r"^blocks\.\d+\.0\.conv\.", "norm.0.conv."),
            (r"^blocks\.\d+\.0\.bn1\.", "norm.0.norm."),
            (r"^blocks\.", "groups."),
            (r"^conv_head\.", "head_norm.0."),
            (r"^classifier\.", "head."),
            (r"\bconv_dw\.", "reduce.conv."),
            (r"\bbn_dw\.", "reduce.norm."),
            (r"\bse\.conv_reduce\.", "se.fc1."),
            (r"\bse\.conv_expand\.", "se.fc2."),
            (r"\bshortcut\.(\d)\.", lambda m: f"shortcut.{_of_pair(m)}"),
            *GhostModule.authors_keys.rules,
        ],
        convert=flat_kernels,
    )

    def __init__(
        self,
        blocks: Sequence[Sequence[Sequence[Any]]] = BLOCKS,
        width: float = 1.0,
        gated_from: int | None = 2,
        hidden: int = 1280,
        dropout: float = 0.2,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        checks.positive("width", width)
        self.in_chans, self.num_classes, self.num_features = in_chans, num_classes, hidden
        rates = iter(linear_rates(drop_path_rate, sum(map(len, blocks))))
        dim, stride, count = rounded(16 * width), 2, 0
        self.stem = nn.Sequential(ConvNorm(in_chans, dim, 3, stride=2), nn.ReLU())
        groups, dims, strides = [], [], []
        for group in blocks:
            parts = []
            for size, inner, out, se_ratio, step in group:
                wide, out_dim = rounded(inner * width), rounded(out * width)
                parts.append(
                    GhostBottleneck(
                        dim,
                        wide,
                        out_dim,
                        kernel_size=size,
                        stride=step,
                        se_ratio=se_ratio,
                        attention=gated_from is not None and count >= gated_from,
                        drop_path=next(rates),
                    )
                )
                dim, stride, count = out_dim, stride * step, count + 1
            groups.append(nn.Sequential(*parts))
            dims.append(dim)
            strides.append(stride)
        self.groups = nn.ModuleList(groups)
        self.last = [index for index in range(len(strides)) if strides[index] not in strides[index + 1 :]]
        self.feature_dims = tuple(dims[index] for index in self.last)
        self.feature_strides = tuple(strides[index] for index in self.last)
        self.norm = nn.Sequential(ConvNorm(dim, wide), nn.ReLU())
        self.head_norm = nn.Sequential(nn.Linear(wide, hidden), nn.ReLU(), nn.Dropout(dropout))
        self.head = make_head(hidden, num_classes)

    def stages_forward(self, x: Tensor) -> list[Tensor]:
        """`(B, in_chans, H, W)` -> channels-last maps at strides 2, 4, 8, 16 and 32."""
        x = self.stem(x.movedim(1, -1))
        maps = []
        for index, group in enumerate(self.groups):
            x = group(x)
            if index in self.last:
                maps.append(x)
        return maps


_SOURCE = "class of the authors' repository; multiply-adds of convolutions and linear layers, as in the paper's table"

SYSTEM = register_system(
    System(
        slug="ghostnetv2",
        title="GhostNetV2: Enhance Cheap Operation with Long-Range Attention",
        year=2022,
        arxiv="2211.12905",
        evidence="authors_code",
        repo="huawei-noah/Efficient-AI-Backbones",
        idea="Cheap features are gated by long thin convolutions along rows and columns at half the resolution.",
        mixers=("dfc",),
        variants=tuple(
            image_variant(f"ghostnetv2_{name}", GhostNetV2, params, gmacs, source=_SOURCE, width=width)
            for name, width, params, gmacs in (
                ("100", 1.0, 6_156_908, 0.1671),
                ("130", 1.3, 8_960_404, 0.2693),
                ("160", 1.6, 12_392_698, 0.3986),
            )
        ),
        reports=(
            "ImageNet-1K top-1 of the 1.0x model: 75.3 at 167 M multiply-adds; GhostNet 74.5 at a like cost (abstract)",
        ),
    )
)
