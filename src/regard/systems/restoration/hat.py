"""HAT: Hybrid Attention Transformer for Image Restoration (Chen et al., 2023, arXiv 2309.05239; CVPR version 2205.04437).

Window attention restores few pixels from few pixels. HAT lets more of the image take part: beside every window attention
runs a small convolution with channel attention (HAB), and each group ends with windows whose keys overlap (OCAB).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import checks, ops
from regard.checkpoint import KeyMap
from regard.layers import Block, DropPath, Mixer, SqueezeExcite, conv, heads_of, linear_rates, vit_init
from regard.layouts import windows
from regard.registry import System, Variant, register_mixer, register_system
from regard.skeletons import ResidualGroup, Restoration
from regard.systems.backbones.swin import WindowAttention


class ChannelAttentionBlock(nn.Sequential):
    """CAB: conv3(C -> C / compress), GELU, conv3(C / compress -> C), then squeeze and excitation (section 3.2, fig. 2).

    Args:
        axes: spatial axes of the grid. compress_ratio: narrows the inner channels. squeeze_factor: narrows the hidden
            layer of the channel attention. Both widths are at least 1.
    """

    def __init__(self, dim: int, *, compress_ratio: int = 3, squeeze_factor: int = 30, axes: int = 2) -> None:
        inner = max(dim // compress_ratio, 1)
        super().__init__(
            conv(axes)(dim, inner, 3, padding=1),
            nn.GELU(),
            conv(axes)(inner, dim, 3, padding=1),
            SqueezeExcite(dim, max(dim // squeeze_factor, 1)),
        )


class ShiftedWindows(WindowAttention):
    """Swin's window attention without its rule for small maps: HAT shifts on maps of any size."""

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        shift = [size // 2 for size in self.window_size] if self.shift else 0
        out = ops.window_attention(q, k, v, window_size=self.window_size, shift=shift, bias=self.bias())
        return self.proj(out.flatten(-2))


@register_mixer("hybrid_window")
class HybridAttention(Mixer):
    r"""(Shifted) window attention and, in parallel, a channel attention block (section 3.2, eq. 1).

    $$\mathrm{out} = \mathrm{(S)W\text{-}MSA}(x) + \alpha\,\mathrm{CAB}(x)$$

    The window sees M x M tokens at full detail, CAB the whole map through its channel means. Departure: on a map that is
    no multiple of the window, the windows at its end are smaller (the model pads, so it has none).

    Args:
        window_size: M, one integer or one for each of `axes`. shift: False, or True for half a window.
        conv_scale: α. drop_path: stochastic depth of the attention alone, as in the authors' code.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window_size: int | Sequence[int] = 16,
        shift: bool = False,
        axes: int = 2,
        compress_ratio: int = 3,
        squeeze_factor: int = 30,
        conv_scale: float = 0.01,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads, self.axes, self.conv_scale = dim, num_heads, axes, conv_scale
        self.attention = ShiftedWindows(dim, num_heads, window_size=window_size, shift=shift, axes=axes)
        self.conv = ChannelAttentionBlock(dim, compress_ratio=compress_ratio, squeeze_factor=squeeze_factor, axes=axes)
        self.drop_path = DropPath(drop_path)

    @classmethod
    def in_stack(cls, index: int, input_size: tuple[int, ...], dim: int, num_heads: int, **options: Any) -> Mixer:
        """Every second block is shifted; windows are not larger than the grid."""
        axes = len(input_size)
        window = _fitting(options.pop("window_size", 16), input_size)
        shift = index % 2 == 1 and any(size < length for size, length in zip(window, input_size, strict=True))
        return cls(dim, num_heads, window_size=window, shift=shift, axes=axes, **options)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        self.check(x)
        return self.drop_path(self.attention(x)) + self.conv_scale * self.conv(x)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, conv_scale={self.conv_scale}"


@register_mixer("overlapping_cross")
class OverlappingCrossAttention(Mixer):
    r"""OCA: queries of a window of M x M tokens, keys and values of the M_o x M_o tokens around it (section 3.3, eq. 4).

    $$\mathrm{out} = W_o\,\mathrm{softmax}(d^{-1/2} Q K_o^\top + B)\,V_o,\quad M_o = M + \lfloor \gamma M \rfloor$$

    Beyond the border of the map keys and values are zero *after* their projection and are not masked: such a key has the
    logit B alone and takes its share of the softmax. A map that is no multiple of the window ends in such zeros too.

    Args:
        window_size: M, one integer or one for each of `axes`. overlap_ratio: γ.
    """

    index: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window_size: int | Sequence[int] = 16,
        overlap_ratio: float = 0.5,
        axes: int = 2,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        if overlap_ratio < 0:
            raise ValueError(f"overlap_ratio must be at least 0, got {overlap_ratio}.")
        self.head_dim = heads_of(dim, num_heads)
        self.dim, self.num_heads, self.axes, self.overlap_ratio = dim, num_heads, axes, overlap_ratio
        self.window_size = checks.tuple_of("window_size", window_size, axes)
        self.overlap_size = tuple(size + int(size * overlap_ratio) for size in self.window_size)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        entries = math.prod(a + b - 1 for a, b in zip(self.window_size, self.overlap_size, strict=True))
        self.table = nn.Parameter(torch.empty(entries, num_heads))
        nn.init.trunc_normal_(self.table, std=0.02)
        self.register_buffer("index", overlap_index(self.window_size, self.overlap_size), persistent=False)
        self.proj = nn.Linear(dim, dim)

    @classmethod
    def in_stack(cls, index: int, input_size: tuple[int, ...], dim: int, num_heads: int, **options: Any) -> Mixer:
        """Windows are at most half the grid, so that there is something to overlap with."""
        half = tuple(-(-length // 2) for length in input_size)
        window = _fitting(options.pop("window_size", 16), half)
        return cls(dim, num_heads, window_size=window, axes=len(input_size), **options)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        spatial = self.check(x)
        q, kv = self.qkv(x).split((self.dim, 2 * self.dim), -1)
        q = windows.pad_to_multiple(q, self.window_size)
        padded = q.shape[1:-1]
        q = windows.partition(q, self.window_size)  # (B, n, M, dim)
        kv = self._around(kv, padded)  # (B, n, M_o, 2 dim)
        count = q.shape[1]
        q = q.flatten(0, 1).unflatten(-1, (self.num_heads, self.head_dim))
        k, v = kv.flatten(0, 1).unflatten(-1, (2, self.num_heads, self.head_dim)).unbind(-3)
        bias = self.table[self.index].permute(2, 0, 1)[None]
        out = ops.attention(q, k, v, bias=bias).flatten(-2).unflatten(0, (x.shape[0], count))
        return self.proj(windows.crop(windows.unpartition(out, self.window_size, padded), spatial))

    def _around(self, x: Tensor, padded: Sequence[int]) -> Tensor:
        """The tokens around each window, zeros beyond the map: `(B, *S, C)` -> `(B, windows, prod(M_o), C)`."""
        sides = [0, 0]
        for length, total, size, wide in reversed(
            list(zip(x.shape[1:-1], padded, self.window_size, self.overlap_size, strict=True))
        ):
            before = (wide - size) // 2
            sides += [before, total - length + wide - size - before]
        x = F.pad(x, sides)
        for axis, (size, wide) in enumerate(zip(self.window_size, self.overlap_size, strict=True)):
            x = x.unfold(1 + axis, wide, size)  # (B, n1, n2, .., C, M_o1, M_o2, ..)
        return x.movedim(1 + self.axes, -1).flatten(1 + self.axes, -2).flatten(1, self.axes)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, window={self.window_size}, keys={self.overlap_size}"


def overlap_index(window: Sequence[int], wide: Sequence[int]) -> Tensor:
    """Table row of every (query, key) pair: `(prod(window), prod(wide))` int64.

    On each axis the number is key - query + M - M_o + 1, from 2 - M_o to M, weighted by M + M_o - 1 and summed as the
    authors do. Sums below zero count from the end of the table, as negative indices do; each offset has one row.
    """
    index = torch.zeros(1, 1, dtype=torch.long)
    rows = 1
    for size, reach in zip(window, wide, strict=True):
        offset = torch.arange(reach) - torch.arange(size)[:, None] + size - reach + 1
        rows *= size + reach - 1
        step = index[:, None, :, None] * (size + reach - 1) + offset[None, :, None, :]
        index = step.flatten(2, 3).flatten(0, 1)
    return index % rows


def _fitting(window_size: int | Sequence[int], spatial: Sequence[int]) -> tuple[int, ...]:
    """The window, nowhere larger than the grid."""
    window = checks.tuple_of("window_size", window_size, len(spatial))
    return tuple(min(size, length) for size, length in zip(window, spatial, strict=True))


class HybridBlock(Block):
    """HAB: x + hybrid(norm(x)), then the MLP. Stochastic depth spares the convolution (it acts inside the mixer)."""

    mixer: HybridAttention

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, W, dim)` -> the same shape."""
        x = x + self.mixer(self.norm1(x))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class HybridGroup(nn.Module):
    """HABs, every second one shifted, then one OCAB (without stochastic depth): `(B, H, W, dim)` -> the same shape."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        drop_path: Sequence[float],
        *,
        window_size: int = 16,
        overlap_ratio: float = 0.5,
        mlp_ratio: float = 2.0,
        **hybrid: Any,
    ) -> None:
        super().__init__()
        self.blocks = nn.Sequential()
        for index, rate in enumerate(drop_path):
            mixer = HybridAttention(
                dim, num_heads, window_size=window_size, shift=index % 2 == 1, drop_path=rate, **hybrid
            )
            self.blocks.append(HybridBlock(dim, mixer, mlp_ratio=mlp_ratio, drop_path=rate))
        overlap = OverlappingCrossAttention(dim, num_heads, window_size=window_size, overlap_ratio=overlap_ratio)
        self.overlap = Block(dim, overlap, mlp_ratio=mlp_ratio)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, W, dim)` -> the same shape."""
        return self.overlap(self.blocks(x))


def squeeze_as_linear(name: str, value: Tensor) -> Mapping[str, Tensor]:
    """The channel attention's 1 x 1 convolutions are linear layers here."""
    return {name: value.flatten(1) if ".conv.3.fc" in name and value.dim() == 4 else value}


BLOCK_KEYS = (
    (r"attn\.relative_position_bias_table", "mixer.attention.bias.table"),
    (r"blocks\.(\d+)\.attn\.", r"blocks.\1.mixer.attention."),
    (r"conv_block\.cab\.3\.attention\.1", "mixer.conv.3.fc1"),
    (r"conv_block\.cab\.3\.attention\.3", "mixer.conv.3.fc2"),
    (r"conv_block\.cab\.", "mixer.conv."),
    (r"overlap_mixer\.attention\.bias\.table", "overlap.mixer.table"),
    (r"overlap_attn\.(qkv|proj)", r"overlap.mixer.\1"),
    (r"overlap_attn\.", "overlap."),
)
"""The authors' names inside a group."""


class HAT(Restoration):
    """Groups of HABs and an OCAB on the trunk of restoration, LayerNorm around the body.

    Args:
        dim: channels. depths: HABs of each group. num_heads: heads of every block.
        window_size: M; images are mirrored up to a multiple of it. overlap_ratio: γ of the OCABs.
        compress_ratio, squeeze_factor, conv_scale: of the channel attention blocks.
        scale: 2, 3 or 4 enlarge; 1 restores at the same size (the authors publish no such model).
        width: channels of the reconstruction.
        drop_path_rate: stochastic depth of the last HAB; it rises linearly from 0. Weights were trained with 0.1.
    """

    authors_keys = KeyMap(
        rules=[
            (r"^conv_first\.", "head."),
            (r"^patch_embed\.norm\.", "embed_norm."),
            (r"^layers\.(\d+)\.residual_group\.", r"groups.\1.body."),
            (r"^layers\.(\d+)\.conv\.", r"groups.\1.conv."),
            *BLOCK_KEYS,
            (r"^conv_after_body\.", "fuse."),
            (r"^conv_before_upsample\.", "reconstruction.before."),
            (r"^upsample\.", "reconstruction.up."),
            (r"^conv_last\.", "reconstruction.last."),
        ],
        drop=[r"relative_position_index"],
        convert=squeeze_as_linear,
    )

    def __init__(
        self,
        dim: int = 180,
        depths: Sequence[int] = (6, 6, 6, 6, 6, 6),
        num_heads: int = 6,
        window_size: int = 16,
        compress_ratio: int = 3,
        squeeze_factor: int = 30,
        conv_scale: float = 0.01,
        overlap_ratio: float = 0.5,
        mlp_ratio: float = 2.0,
        scale: int = 4,
        width: int = 64,
        img_range: float = 1.0,
        drop_path_rate: float = 0.1,
        in_chans: int = 3,
    ) -> None:
        rates = iter(linear_rates(drop_path_rate, sum(depths)))
        super().__init__(
            groups=[
                ResidualGroup(
                    dim,
                    HybridGroup(
                        dim,
                        num_heads,
                        [next(rates) for _ in range(depth)],
                        window_size=window_size,
                        overlap_ratio=overlap_ratio,
                        mlp_ratio=mlp_ratio,
                        compress_ratio=compress_ratio,
                        squeeze_factor=squeeze_factor,
                        conv_scale=conv_scale,
                    ),
                )
                for depth in depths
            ],
            dim=dim,
            scale=scale,
            in_chans=in_chans,
            width=width,
            multiple=window_size,
            embed_norm=nn.LayerNorm(dim),
            norm=nn.LayerNorm(dim),
            img_range=img_range,
        )
        self.groups.apply(vit_init)
        for module in self.modules():  # PyTorch's default for what are convolutions in the authors' code
            if isinstance(module, SqueezeExcite):
                module.fc1.reset_parameters()
                module.fc2.reset_parameters()

    def no_weight_decay(self) -> set[str]:
        """The position tables."""
        return {name for name, _ in self.named_parameters() if name.endswith("table")}


_INPUT = ((1, 3, 64, 64),)
_SMALL = {"dim": 144, "compress_ratio": 24, "squeeze_factor": 24}
_LARGE = {"depths": (6,) * 12}
_COUNTED = "counted on the authors' class; multiply-adds from their README"


def _variant(name: str, scale: int, params: int, gmacs: float | None = None, **options: Any) -> Variant:
    return Variant(
        f"{name}_x{scale}", HAT, params, gmacs, inputs=_INPUT, source=_COUNTED, options={**options, "scale": scale}
    )


SYSTEM = register_system(
    System(
        slug="hat",
        title="HAT: Hybrid Attention Transformer for Image Restoration",
        year=2023,
        arxiv="2309.05239",
        evidence="authors_code",
        repo="XPixelGroup/HAT",
        idea="Channel attention beside every window attention, and windows whose keys overlap at the end of each group, "
        "so that more pixels take part in restoring one.",
        mixers=("hybrid_window", "overlapping_cross"),
        variants=(
            _variant("hat_small", 2, 9_473_471, **_SMALL),
            _variant("hat_small", 3, 9_658_111, **_SMALL),
            _variant("hat_small", 4, 9_621_183, 54.9, **_SMALL),
            _variant("hat", 2, 20_624_795),
            _variant("hat", 3, 20_809_435),
            _variant("hat", 4, 20_772_507, 102.4),
            _variant("hat_large", 2, 40_698_863, **_LARGE),
            _variant("hat_large", 3, 40_883_503, **_LARGE),
            _variant("hat_large", 4, 40_846_575, **_LARGE),
        ),
        reports=(
            "x4 PSNR in dB on Set5/Set14/BSD100/Urban100/Manga109 without ImageNet: HAT 33.04/29.23/28.00/27.97/32.48, "
            "HAT-S 32.92/29.15/27.97/27.87/32.35, SwinIR 32.92/29.09/27.92/27.45/32.03 (paper)",
        ),
    )
)
