"""MetaMixer Is All You Need (Yun et al., 2024, arXiv 2406.02021): FFNet, Fast-Forward Networks without attention.

A feed-forward network is a memory too: its first layer compares with keys, its second adds up values. So what makes a
mixer is the pattern query, key, value, not softmax. Here keys and values are large static depthwise kernels, and GELU
stands for softmax ("FFNified attention"); networks of it classify, enlarge images and forecast series.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from regard import checks
from regard.checkpoint import KeyMap
from regard.layers import (
    LEVIT_NAMES,
    BatchNorm,
    Conv2d,
    ConvNorm,
    DropPath,
    LayerScale,
    Mixer,
    PixelShuffle,
    RepConv,
    depthwise,
    flat_kernels,
    kernel_init,
    linear_rates,
)
from regard.layers.conv_norm import scale_and_shift, with_weights
from regard.registry import System, Variant, register_mixer, register_system
from regard.skeletons import Hierarchical, Model


class NormedSkip(nn.Module):
    """x + W BN(x), one linear layer once folded."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = BatchNorm(dim)
        self.linear = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        return x + self.linear(self.norm(x))

    def fused(self) -> nn.Module:
        """One linear layer: W and the identity."""
        scale, shift = scale_and_shift(self.norm)
        weight = self.linear.weight
        return with_weights(self.linear, weight * scale + torch.eye(len(weight)).to(weight), weight @ shift)


@register_mixer("ffnified")
class FFNifiedAttention(Mixer):
    r"""Query, static keys, GELU, static values: attention's pattern with a feed-forward network's parts (FFNification).

    $$\mathrm{out} = \mathrm{DW}_v(\mathrm{GELU}(\mathrm{DW}_k(q))),\quad q = \mathrm{BN}(W_q\,x)$$

    DW are depthwise convolutions: each channel has one spatial pattern as its key, whose responses at all places are the
    coefficients of one spatial pattern as its value. Kernels from 7 on are `RepConv`, smaller ones plain.

    Args:
        dim: channels. num_heads: taken so that every mixer is built alike; there are none.
        kernel_size: of both convolutions, odd. norm: BN after W_q; without it W_q has a bias (super-resolution).
        axes: number of spatial axes.
    """

    has_heads: ClassVar[bool] = False
    authors_keys = KeyMap(
        rules=[
            (r"\bfc\.", "query."),
            (r"\bconv1\.(?!c\.|bn\.)", "key."),
            (r"\bconv2\.", "value."),
            (r"\b(key|value)\.conv\.", r"\1.large."),
            (r"\b(key|value)\.conv1\.", r"\1.small."),
            *LEVIT_NAMES,
        ],
        convert=flat_kernels,
    )

    def __init__(self, dim: int, num_heads: int = 1, *, kernel_size: int = 7, norm: bool = True, axes: int = 2) -> None:
        super().__init__()
        checks.positive("dim", dim)
        checks.odd("kernel_size", kernel_size)
        self.dim, self.num_heads, self.kernel_size, self.axes = dim, num_heads, kernel_size, axes
        self.query = ConvNorm(dim, dim) if norm else nn.Linear(dim, dim)
        self.key = local(dim, kernel_size, axes)
        self.act = nn.GELU()
        self.value = local(dim, kernel_size, axes)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        self.check(x)
        return self.value(self.act(self.key(self.query(x))))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, kernel_size={self.kernel_size}"


def local(dim: int, kernel_size: int, axes: int = 2) -> nn.Module:
    """Depthwise convolution: from kernels of 7 on a `RepConv`."""
    return (
        RepConv(dim, kernel_size=kernel_size, axes=axes) if kernel_size >= 7 else depthwise(dim, kernel_size, dims=axes)
    )


class ChannelMixer(nn.Module):
    """fc2(GELU(fc1(local(x)))): a depthwise convolution of any kind, then an MLP over channels."""

    def __init__(self, dim: int, hidden: int, local: nn.Module) -> None:
        super().__init__()
        self.local = local
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        return self.fc2(self.act(self.fc1(self.local(x))))


class FFBlock(nn.Module):
    """Token mixer and channel mixer, each residual, without norms before them.

    Args:
        layer_scale: initial factor of both branches, or None for none.
    """

    def __init__(
        self,
        dim: int,
        token_mixer: nn.Module,
        channel_mixer: nn.Module,
        *,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.token_mixer, self.channel_mixer = token_mixer, channel_mixer
        self.token_scale = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.channel_scale = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        x = x + self.drop_path(self.token_scale(self.token_mixer(x)))
        return x + self.drop_path(self.channel_scale(self.channel_mixer(x)))


def _ours(name: str, value: Tensor) -> dict[str, Tensor]:
    """The authors' tensors in our layout: 1 x 1 convolutions are linear layers, layer scales are vectors."""
    return {name: value.flatten()} if name.endswith("gamma") else flat_kernels(name, value)


class FFNet(Hierarchical):
    """Two strided convolutions, four stages of `FFBlock`, a strided `RepConv` between them, BatchNorm, mean, linear.

    `layers.fuse` gives the deployed form: one kernel for each pair, no BatchNorm but the last.

    Args:
        dims, depths: channels and blocks of each stage.
        token_kernels, channel_kernels: of the token mixers and the channel mixers of each stage; from 7 on `RepConv`.
        mlp_ratio: hidden width of the channel mixers. stem_dim: channels inside the stem.
        layer_scale: initial factor of the residual branches, or None for none.
    """

    authors_keys = KeyMap(
        rules=[
            (r"^patch_embed\.", "stem."),
            (r"^stages\.(\d+)\.0\.proj\.0\.conv\.", r"downs.\1.0.large."),
            (r"^stages\.(\d+)\.0\.proj\.0\.conv1\.", r"downs.\1.0.small."),
            (r"^stages\.(\d+)\.0\.proj\.1\.conv\.bn\.", r"downs.\1.1.norm."),
            (r"^stages\.(\d+)\.0\.proj\.1\.conv\.c\.", r"downs.\1.1.linear."),
            (r"^stages\.([1-9])\.(\d+)\.", lambda m: f"stages.{m[1]}.{int(m[2]) - 1}."),
            (r"\.token_mixer\.0\.layer_scale$", ".token_scale.gamma"),
            (r"\.channel_mixer\.layer_scale$", ".channel_scale.gamma"),
            (r"\.token_mixer\.0\.main\.", ".token_mixer."),
            (r"\.channel_mixer\.main\.conv\.", ".channel_mixer.local."),
            (r"\.channel_mixer\.main\.", ".channel_mixer."),
            (r"\.local\.conv\.", ".local.large."),
            (r"\.local\.conv1\.", ".local.small."),
            *FFNifiedAttention.authors_keys.rules,
        ],
        convert=_ours,
    )

    def __init__(
        self,
        dims: Sequence[int] = (80, 160, 320, 640),
        depths: Sequence[int] = (2, 2, 8, 2),
        token_kernels: Sequence[int] = (3, 3, 7, 7),
        channel_kernels: Sequence[int] = (7, 7, 7, 7),
        mlp_ratio: float = 3.0,
        stem_dim: int = 64,
        layer_scale: float | None = None,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        for argument, given in (
            ("depths", depths),
            ("token_kernels", token_kernels),
            ("channel_kernels", channel_kernels),
        ):
            if len(given) != len(dims):
                raise ValueError(f"{argument} must have one entry for each of the {len(dims)} stages, got {given!r}.")
        rates = iter(linear_rates(drop_path_rate, sum(depths)))

        def block(dim: int, token_kernel: int, kernel: int) -> FFBlock:
            conv = RepConv(dim, kernel_size=kernel) if kernel >= 7 else ConvNorm(dim, dim, kernel, groups=dim)
            return FFBlock(
                dim,
                FFNifiedAttention(dim, kernel_size=token_kernel),
                ChannelMixer(dim, int(dim * mlp_ratio), conv),
                layer_scale=layer_scale,
                drop_path=next(rates),
            )

        super().__init__(
            stem=nn.Sequential(
                ConvNorm(in_chans, stem_dim, 3, stride=2), nn.GELU(), ConvNorm(stem_dim, dims[0], 3, stride=2)
            ),
            downs=[
                nn.Identity(),
                *(nn.Sequential(RepConv(width, wider, stride=2), NormedSkip(wider)) for width, wider in pairwise(dims)),
            ],
            stages=[
                [block(dim, *kernels) for _ in range(depth)]
                for dim, depth, *kernels in zip(dims, depths, token_kernels, channel_kernels, strict=True)
            ],
            dims=dims,
            strides=[4 * 2**stage for stage in range(len(dims))],
            norm=BatchNorm(dims[-1]),
            num_classes=num_classes,
            in_chans=in_chans,
        )
        self.apply(kernel_init)


class FFNetSR(Model):
    """Super-resolution: a 3 x 3 convolution, `FFBlock`s without norms, a 3 x 3 convolution, pixel shuffle.

    It predicts what to add to the image enlarged by repeating its pixels.

    Args:
        scale: enlargement. dim, depth: channels and blocks. mlp_ratio: hidden width of the channel mixers.
    """

    authors_keys = KeyMap(
        rules=[
            (r"^proj\.", "head."),
            (r"^conv_bef_up\.", "last."),
            (r"\.token_mixer\.(\d)\.", lambda m: f".token_mixer.{('query', 'key', '', 'value')[int(m[1])]}."),
            (r"\.channel_mixer\.(\d)\.", lambda m: f".channel_mixer.{('local', 'fc1', '', 'fc2')[int(m[1])]}."),
        ],
        convert=flat_kernels,
    )

    def __init__(
        self, scale: int = 2, dim: int = 96, depth: int = 48, mlp_ratio: float = 2.0, in_chans: int = 3
    ) -> None:
        super().__init__()
        checks.positive("scale", scale)
        self.scale, self.in_chans = scale, in_chans
        self.head = Conv2d(in_chans, dim, 3, padding=1)
        self.body = nn.Sequential(
            *(
                FFBlock(
                    dim,
                    FFNifiedAttention(dim, kernel_size=3, norm=False),
                    ChannelMixer(dim, int(dim * mlp_ratio), depthwise(dim, 3)),
                )
                for _ in range(depth)
            )
        )
        self.last = Conv2d(dim, in_chans * scale**2, 3, padding=1)
        self.shuffle = PixelShuffle(scale)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, in_chans, H, W)` in [0, 1] -> `(B, in_chans, scale H, scale W)`; the values are not clamped."""
        checks.image(x, self.in_chans)
        x = x.movedim(1, -1)
        repeated = x.repeat_interleave(self.scale**2, -1)
        return self.shuffle(self.last(self.body(self.head(x))) + repeated).movedim(-1, 1)


_SOURCE = "class of the authors' repository; multiply-adds counted on it, parallel kernels apart"


def _ffnet(name: str, params: int, gmacs: float, drop: float, side: int = 256, **options: Any) -> Variant:
    return Variant(name, FFNet, params, gmacs, ((1, 3, side, side),), _SOURCE, {**options, "drop_path_rate": drop})


def _ffnet_sr(name: str, params: int, depth: int) -> Variant:
    source = "class of the authors' repository"
    return Variant(name, FFNetSR, params, None, ((1, 3, 96, 96),), source, {"depth": depth})


SYSTEM = register_system(
    System(
        slug="metamixer",
        title="MetaMixer Is All You Need",
        year=2024,
        arxiv="2406.02021",
        evidence="authors_code",
        repo="ysj9909/FFNet",
        idea="The pattern query, key, value makes a mixer, not softmax: large static kernels and GELU do as well.",
        mixers=("ffnified",),
        variants=(
            _ffnet("ffnet_1", 13_775_656, 3.018, 0.1, channel_kernels=(3, 3, 3, 3)),
            _ffnet("ffnet_2", 27_208_408, 6.096, 0.15, dims=(88, 176, 352, 704), depths=(3, 3, 15, 3)),
            _ffnet(
                "ffnet_3",
                48_817_896,
                10.289,
                0.35,
                dims=(96, 192, 384, 768),
                depths=(4, 4, 22, 5),
                layer_scale=1e-6,
            ),
            _ffnet(
                "ffnet_4",
                79_868_968,
                43.596,
                0.4,
                384,
                dims=(128, 256, 512, 1024),
                depths=(4, 4, 27, 3),
                layer_scale=1e-6,
            ),
            _ffnet_sr("ffnet_sr_light", 1_789_452, 36),
            _ffnet_sr("ffnet_sr", 2_381_580, 48),
        ),
        reports=(
            "ImageNet-1K top-1: FFNet-1 81.3, -2 82.9, -3 83.9 at 256 px, -4 85.3 at 384 px (README)",
            "COCO Cascade Mask R-CNN 3x box / mask AP: FFNet-2 51.8 / 44.9, -3 52.8 / 45.6, -4 53.4 / 45.9",
            "ADE20K UPerNet mIoU: FFNet-2 47.1, -3 49.6, -4 50.7",
        ),
    )
)
