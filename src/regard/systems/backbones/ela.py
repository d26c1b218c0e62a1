"""ELA: Efficient Local Attention for Deep Convolutional Neural Networks (Xu and Wan, 2024, arXiv 2403.01123).

Where along each axis of a feature map does a channel matter? The map is averaged over the other axis, a short convolution
and a GroupNorm look along the one that is left, and the two profiles weight the map. No channel is squeezed away.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from regard import checks
from regard.checkpoint import KeyMap
from regard.layers import Conv1d, Mixer, Residual, flat_kernels
from regard.registry import System, Variant, image_variant, register_mixer, register_system
from regard.systems.backbones.ulsam import MobileNetV2


class Version(NamedTuple):
    """Taps of the convolution, channels that each of its groups mixes, and groups of the norm."""

    kernel_size: int
    width: int
    norm_groups: int


VERSIONS = {"t": Version(5, 1, 32), "b": Version(7, 1, 16), "s": Version(5, 8, 16), "l": Version(7, 8, 16)}


@register_mixer("ela")
class EfficientLocalAttention(Mixer):
    r"""A map weighted by one profile for each axis (section 3.5).

    $$y = x \odot \prod_a \sigma(\mathrm{GN}(\mathrm{Conv1d}(z_a))),\quad z_a = \text{mean of } x \text{ over all axes but } a$$

    The convolution has no bias and zeros beyond the ends. Every weight lies between 0 and 1, so y is smaller than x: a block
    that wants to keep the scale adds a residual. Not self-attention; "local" are the taps along an axis.

    With one axis z is x itself. On maps of any size; parameters: (taps x channels a group + 2) dim.

    Args:
        dim: channels, a multiple of the norm's groups. num_heads: taken so that every mixer is built alike; there are none.
        version: "t", "b", "s" or "l": depthwise convolutions of 5 and 7 taps, and such of 8 channels a group.
        norm_groups: replaces those of the version, for channels that they do not divide.
        share: one convolution and norm for all axes, as released; otherwise each axis has its own.
        axes: number of spatial axes.
    """

    has_heads: ClassVar[bool] = False
    authors_keys = KeyMap(rules=[(r"\bconv\.", "convs.0."), (r"\bgn\.", "norms.0.")])

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        version: str = "b",
        norm_groups: int | None = None,
        share: bool = True,
        axes: int = 2,
    ) -> None:
        super().__init__()
        checks.positive("dim", dim)
        size, width, groups = VERSIONS[checks.one_of("version", version, VERSIONS)]
        groups = groups if norm_groups is None else norm_groups
        checks.positive("norm_groups", groups)
        checks.divisible("dim", dim, f"the channels a group of version {version!r}", width)
        if dim % groups:
            raise ValueError(
                f"dim={dim} must be a multiple of the {groups} groups of the norm: choose norm_groups, for instance "
                f"{math.gcd(dim, groups)}."
            )
        self.dim, self.num_heads, self.version, self.share, self.axes = dim, num_heads, version, share, axes
        copies = range(1 if share else axes)
        self.convs = nn.ModuleList(
            Conv1d(dim, dim, size, padding=size // 2, groups=dim // width, bias=False) for _ in copies
        )
        self.norms = nn.ModuleList(nn.GroupNorm(groups, dim) for _ in copies)

    @classmethod
    def in_stack(cls, index: int, input_size: tuple[int, ...], dim: int, num_heads: int, **options: Any) -> Mixer:
        """The norm has the largest number of groups that divides both the version's and the channels."""
        version = VERSIONS[checks.one_of("version", options.get("version", "b"), VERSIONS)]
        options.setdefault("norm_groups", math.gcd(dim, version.norm_groups))
        return cls(dim, num_heads, axes=len(input_size), **options)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        self.check(x)
        y = x
        for axis, profile in enumerate(self.profiles(x)):
            shape = [1] * self.axes
            shape[axis] = profile.shape[1]
            y = y * profile.view(x.shape[0], *shape, self.dim)
        return y

    def profiles(self, x: Tensor) -> list[Tensor]:
        """The weights along each axis, `(B, S_axis, dim)`."""
        spatial, weights = range(1, 1 + self.axes), []
        for axis in spatial:
            others = tuple(other for other in spatial if other != axis)
            copy = 0 if self.share else axis - 1
            norm = self.norms[copy]
            z = self.convs[copy](x.mean(others) if others else x).movedim(-1, 1)
            # Not norm(z), which refuses a single value: on one token the norm leaves its bias.
            z = torch.group_norm(z, norm.num_groups, norm.weight, norm.bias, norm.eps)
            weights.append(z.sigmoid().movedim(1, -1))
        return weights

    def extra_repr(self) -> str:
        return f"dim={self.dim}, version={self.version}, share={self.share}, axes={self.axes}"


_PARTS = {
    **{"0.": "0.conv.", "1.": "0.norm.", "3.": "2.conv.", "4.": "2.norm.", "7.": "5.conv.", "8.": "5.norm."},
    **{"6.conv.": "4.convs.0.", "6.gn.": "4.norms.0."},
}
"""Parts of a block under the authors' names, and under ours."""


class ELAMobileNetV2(MobileNetV2):
    """MobileNetV2 with ELA in every block that expands its channels, before the convolution that narrows them again.

    Args:
        version, norm_groups: of the modules. With "t" the 32 groups do not divide 144 channels: choose 16 or 48.
        layers, dim, expand_ratio, features, dropout, stem_stride: as in `MobileNetV2`; None is the published row of layers.
    """

    def __init__(
        self,
        version: str = "l",
        norm_groups: int | None = None,
        layers: Sequence[tuple[int, int]] | None = None,
        dim: int = 32,
        expand_ratio: int = 6,
        features: int = 1280,
        dropout: float = 0.1,
        stem_stride: int = 2,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        super().__init__(
            **({} if layers is None else {"layers": layers}),
            dim=dim,
            expand_ratio=expand_ratio,
            features=features,
            dropout=dropout,
            stem_stride=stem_stride,
            drop_path_rate=drop_path_rate,
            num_classes=num_classes,
            in_chans=in_chans,
            gate=lambda inner: EfficientLocalAttention(inner, version=version, norm_groups=norm_groups),
        )

    @property
    def authors_keys(self) -> KeyMap:  # type: ignore[override]
        """The authors count blocks without stages, and a block of ours has another name where it is residual."""
        homes = [
            f"stages.{stage}.{index}." + ("branch." if isinstance(block, Residual) else "")
            for stage, blocks in enumerate(self.stages)
            for index, block in enumerate(blocks.children())
        ]
        return KeyMap(
            rules=[
                (r"^conv\.0\.", "norm.0.conv."),
                (r"^conv\.1\.", "norm.0.norm."),
                (r"^classifier\.1\.", "head."),
                (r"^features\.0\.0\.", "stem.0.conv."),
                (r"^features\.0\.1\.", "stem.0.norm."),
                (r"^features\.(\d+)\.conv\.(\d\.(?:conv\.|gn\.)?)", lambda m: homes[int(m[1]) - 1] + _PARTS[m[2]]),
            ],
            convert=flat_kernels,
        )


def _module(version: str, params: int) -> Variant:
    source = "parameters of the authors' class"
    return Variant(
        f"ela_{version}_64",
        EfficientLocalAttention,
        params,
        None,
        ((1, 56, 56, 64),),
        source,
        dict(dim=64, version=version),
    )


SYSTEM = register_system(
    System(
        slug="ela",
        title="ELA: Efficient Local Attention for Deep Convolutional Neural Networks",
        year=2024,
        arxiv="2403.01123",
        evidence="authors_code",
        repo="Xuwei86/ELA_Code",
        idea="A map weighted by a profile along each axis, from a mean over the other, a short convolution and GroupNorm.",
        mixers=("ela",),
        variants=(
            *(_module(version, params) for version, params in zip("tbsl", (448, 576, 2688, 3712), strict=True)),
            image_variant(
                "ela_mobilenet_v2",
                ELAMobileNetV2,
                3_916_904,
                0.31116,
                source="parameters and multiply-adds of the authors' class",
            ),
        ),
        reports=(
            "better than SE, CBAM, ECA, coordinate and shuffle attention in classification, detection and segmentation on "
            "ResNet, MobileNetV2, YOLOX, YOLOF and DeepLabV3 (abstract; figures not restated here)",
        ),
    )
)
