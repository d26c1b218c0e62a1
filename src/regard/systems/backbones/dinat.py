"""Dilated Neighborhood Attention Transformer, DiNAT (Hassani and Shi, 2022, arXiv 2209.15001), with its parent NAT
(Hassani et al., 2022, arXiv 2204.07143).

Every pixel attends to its k x k nearest pixels, so the cost is linear in the image. Every second layer does the same
among pixels of equal position modulo a dilation, so that as many keys span the whole map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import checks, ops
from regard.checkpoint import KeyMap
from regard.layers import Block, Conv2d, Mixer, PatchEmbed, heads_of, vit_init
from regard.layouts.windows import crop, pad_to_multiple
from regard.registry import System, Variant, register_mixer, register_system
from regard.skeletons import Hierarchical, Isotropic, Place, SwinPyramid, places

KeysValues = tuple[Tensor, Tensor]


@register_mixer("neighborhood")
class NeighborhoodAttention(Mixer):
    r"""(Dilated) neighborhood attention for 1, 2 or 3 spatial axes (NAT, eq. 1-3; DiNAT, eq. 1-4).

    $$\mathrm{out}_i = W_o \sum_{j \in \rho(i)} \mathrm{softmax}_j(d^{-1/2} q_i^\top k_j + b_{j-i})\, v_j$$

    ρ(i) holds the `kernel_size` nearest positions along each axis, itself included, among those of equal position
    modulo `dilation`; at a border it is pushed inwards, so no key is missing. b is indexed by the offset in steps of
    the dilation.

    A map smaller than kernel_size * dilation along an axis is zero-padded at its end to that length before the
    projection, and the padding takes part in the softmax with the projection's bias as key and value: the authors'
    rule, which their published models meet on small images. Along a causal axis padding is never seen.

    Beyond the paper: `stride` queries may share a window (Generalized Neighborhood Attention, arXiv 2504.16922), any
    axis may be causal, and a causal sequence may be streamed by `step`.

    Args:
        dim: channels. num_heads: divides dim. axes: number of spatial axes.
        kernel_size, dilation, stride, causal: one value or one for each of `axes`; stride at most kernel_size.
        rel_pos_bias: learn `rpb`, `(heads, 2 kernel - 1, ...)`, the bias b. Causal axes use its first half only.
    """

    can_causal: ClassVar[bool] = True
    can_stream: ClassVar[bool] = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        kernel_size: int | Sequence[int] = 7,
        dilation: int | Sequence[int] = 1,
        stride: int | Sequence[int] = 1,
        causal: bool | Sequence[bool] = False,
        axes: int = 2,
        rel_pos_bias: bool = True,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        self.head_dim = heads_of(dim, num_heads)
        self.dim, self.num_heads = dim, num_heads
        self.axes = int(checks.one_of("axes", str(axes), ("1", "2", "3")))
        self.kernel_size = checks.tuple_of("kernel_size", kernel_size, axes)
        self.dilation = checks.tuple_of("dilation", dilation, axes)
        self.stride = checks.tuple_of("stride", stride, axes)
        self.causal = checks.tuple_of_bools("causal", causal, axes)
        if any(step > width for step, width in zip(self.stride, self.kernel_size, strict=True)):
            raise ValueError(f"stride must not exceed kernel_size, got {self.stride} and {self.kernel_size}.")
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.rpb = None
        if rel_pos_bias:
            self.rpb = nn.Parameter(torch.empty(num_heads, *(2 * width - 1 for width in self.kernel_size)))
            nn.init.trunc_normal_(self.rpb, std=0.02)
        self.proj = nn.Linear(dim, dim)

    @classmethod
    def in_stack(cls, index: int, input_size: tuple[int, ...], dim: int, num_heads: int, **options: Any) -> Mixer:
        """Kernels no wider than the grid; unless given, dilation 1 in even blocks and the largest that fits in odd."""
        kernel = checks.tuple_of("kernel_size", options.pop("kernel_size", 7), len(input_size))
        fitting = [
            width if width <= length else length - 1 + length % 2
            for width, length in zip(kernel, input_size, strict=True)
        ]
        widest = [length // width for width, length in zip(fitting, input_size, strict=True)]
        options.setdefault("dilation", widest if index % 2 else 1)
        return cls(dim, num_heads, kernel_size=fitting, axes=len(input_size), **options)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        spatial = self.check(x)
        q, k, v = self.project(x)
        return self.proj(crop(self.attend(q, k, v), spatial).flatten(-2))

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """q, k and v of the map, padded where it is smaller than the window: each `(B, *S', heads, head_dim)`."""
        needed = [width * gap for width, gap in zip(self.kernel_size, self.dilation, strict=True)]
        # Up to the next multiple of what is needed where the map is smaller, and of 1 elsewhere.
        x = pad_to_multiple(x, [need if need > size else 1 for need, size in zip(needed, x.shape[1:-1], strict=True)])
        return self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The mechanism without its projections, `(B, *S, heads, head_dim)` -> the same shape."""
        return ops.neighborhood_attention(  # type: ignore[return-value]
            q,
            k,
            v,
            kernel_size=self.kernel_size,
            dilation=self.dilation,
            stride=self.stride,
            causal=self.causal,
            bias=self.rpb,
        )

    def step(self, x: Tensor, state: KeysValues | None = None) -> tuple[Tensor, KeysValues]:
        """One token `(B, dim)`; the state is the last (kernel - 1) * dilation keys and values `(B, t, heads, width)`.

        Raises:
            ValueError: unless the mixer is causal with one axis and stride 1 (with a longer stride, what a token sees
                depends on whether later tokens exist).
        """
        if self.axes != 1 or not self.causal[0] or self.stride[0] != 1:
            raise ValueError(
                f"step needs axes=1, causal=True and stride=1, got axes={self.axes}, causal={self.causal}, "
                f"stride={self.stride}."
            )
        (width,), (gap,) = self.kernel_size, self.dilation
        memory = (width - 1) * gap
        q, k, v = self.qkv(x).unflatten(-1, (3, 1, self.num_heads, self.head_dim)).unbind(-4)
        if state is not None:
            k, v = torch.cat([state[0], k], 1), torch.cat([state[1], v], 1)
        group = slice((k.shape[1] - 1) % gap, None, gap)  # every gap-th token, ending with the new one
        seen = (k.shape[1] - 1) // gap + 1
        bias = None if self.rpb is None else self.rpb[:, None, width - seen : width]
        out = ops.attention(q, k[:, group], v[:, group], bias=bias)
        rest = max(k.shape[1] - memory, 0)
        return self.proj(out.flatten(1)), (k[:, rest:], v[:, rest:])  # type: ignore[union-attr]

    def state_size(self, length: int) -> int | None:
        """Constant once the window is full; None where `step` is refused."""
        if self.axes != 1 or not self.causal[0] or self.stride[0] != 1:
            return None
        return 2 * min(length, (self.kernel_size[0] - 1) * self.dilation[0]) * self.dim

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, kernel_size={self.kernel_size}, dilation={self.dilation}, "
            f"stride={self.stride}, causal={self.causal}, rel_pos_bias={self.rpb is not None}"
        )


class BiasedSelfAttention(Mixer):
    """Attention among all tokens of a map with a bias for each relative position: the baseline ViT-rpb (section 4.4).

    Equal to `NeighborhoodAttention` with a window as large as the map. On a map of another size the table is resized
    (bicubic); the authors refuse it.

    Args:
        grid: height and width of the map that `rpb`, `(heads, 2 H - 1, 2 W - 1)`, is learned on.
    """

    dims: ClassVar[tuple[int, ...]] = (2,)

    def __init__(self, dim: int, num_heads: int, *, grid: tuple[int, int]) -> None:
        super().__init__()
        self.head_dim = heads_of(dim, num_heads)
        self.dim, self.num_heads = dim, num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.rpb = nn.Parameter(torch.empty(num_heads, 2 * grid[0] - 1, 2 * grid[1] - 1))
        nn.init.trunc_normal_(self.rpb, std=0.02)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, W, dim)` -> the same shape."""
        height, width = self.check(x)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        table = _resized(self.rpb, (2 * height - 1, 2 * width - 1))
        rows, columns = (torch.arange(size, device=x.device) for size in (height, width))
        down = rows - rows[:, None] + height - 1  # key row - query row, from 0
        right = columns - columns[:, None] + width - 1
        bias = table[:, down[:, None, :, None], right[None, :, None, :]].flatten(3).flatten(1, 2)
        return self.proj(ops.attention(q, k, v, bias=bias).flatten(-2))  # type: ignore[union-attr]


def _resized(table: Tensor, size: Sequence[int]) -> Tensor:
    """A bias table `(heads, *old)` at another size: `(heads, *size)`."""
    if tuple(table.shape[1:]) == tuple(size):
        return table
    return F.interpolate(table[None], tuple(size), mode="bicubic", align_corners=False)[0]


class ConvTokenizer(nn.Module):
    """Two 3 x 3 convolutions of stride 2 without activation, then LayerNorm: `(B, H, W, C)` -> `(B, H/4, W/4, dim)`."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            Conv2d(in_chans, dim // 2, 3, stride=2, padding=1), Conv2d(dim // 2, dim, 3, stride=2, padding=1)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Channels-last image in, channels-last tokens out."""
        return self.norm(self.proj(x))


class ConvDownsampler(nn.Module):
    """A 3 x 3 convolution of stride 2 without bias, then LayerNorm: `(B, H, W, C)` -> `(B, H/2, W/2, 2C)`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """Channels-last tokens in and out."""
        return self.norm(self.reduction(x))


class _Tables:
    """Mixin: what the relative position tables of a model need."""

    def no_weight_decay(self) -> set[str]:
        """The position tables."""
        return {name for name, _ in self.named_parameters() if name.endswith(".rpb")}  # type: ignore[attr-defined]

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Resize tables of another kernel size (bicubic, as the authors do to go from 7 x 7 to 11 x 11)."""
        own = self.state_dict()  # type: ignore[attr-defined]
        return {
            key: _resized(value, own[key].shape[1:]) if key.endswith(".rpb") and key in own else value
            for key, value in state.items()
        }


_LEVELS = KeyMap(
    rules=[
        (r"^patch_embed\.", "stem."),
        (r"^(levels|layers)\.(\d+)\.downsample\.", lambda m: f"downs.{int(m[2]) + 1}."),
        (r"^(levels|layers)\.(\d+)\.blocks\.(\d+)\.", r"stages.\2.\3."),
        (r"^(stages\.\d+\.\d+)\.attn\.", r"\1.mixer."),
        (r"\.gamma(\d)$", r".scale\1.gamma"),
    ]
)


def _mixer(
    at: Place, kernel_size: int, dilations: Sequence[int], kind: type[NeighborhoodAttention] = NeighborhoodAttention
) -> NeighborhoodAttention:
    """The mixer of a block; the dilations take turns."""
    dilation = dilations[at.index % len(dilations)]
    return kind(at.dim, at.num_heads, kernel_size=kernel_size, dilation=dilation, rel_pos_bias=True)


class DiNAT(_Tables, Hierarchical):
    """Convolutional tokenizer, four levels of `Block(NeighborhoodAttention)`, convolutional downsampling between them,
    LayerNorm, mean, linear (NAT, fig. 3; DiNAT, section 4.3). NAT is the case of all dilations 1.

    Images of any size run; dilations that no longer fit are met by zero padding, so give `dilations` for another size.

    Args:
        dim: channels of the first level; they double from level to level.
        depths, num_heads: blocks and heads of each level.
        dilations: for each level, the dilations that its blocks take in turn. By default those of 224 x 224 images and
            7 x 7 kernels, where the dilated layers span the whole map.
        mlp_ratio: hidden width of the MLP. layer_scale: initial value of the channel factors, or None for none.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0.
    """

    authors_keys = _LEVELS
    mixer: ClassVar[type[NeighborhoodAttention]] = NeighborhoodAttention
    """Class of the mixers."""

    def __init__(
        self,
        dim: int = 64,
        depths: Sequence[int] = (3, 4, 18, 5),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        kernel_size: int = 7,
        dilations: Sequence[Sequence[int]] = ((1, 8), (1, 4), (1, 2), (1,)),
        mlp_ratio: float = 3.0,
        layer_scale: float | None = None,
        drop_path_rate: float = 0.2,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        dims = [dim * 2**level for level in range(len(depths))]
        strides = [4 * 2**level for level in range(len(depths))]
        super().__init__(
            stem=ConvTokenizer(in_chans, dim),
            downs=[nn.Identity(), *(ConvDownsampler(width) for width in dims[:-1])],
            stages=[
                [
                    Block(
                        at.dim,
                        _mixer(at, kernel_size, turns, self.mixer),
                        mlp_ratio=mlp_ratio,
                        layer_scale=layer_scale,
                        drop_path=at.drop_path,
                    )
                    for at in level
                ]
                for turns, level in zip(
                    dilations, places(dims, depths, num_heads, strides, 224, drop_path_rate), strict=True
                )
            ],
            dims=dims,
            strides=strides,
            norm=nn.LayerNorm(dims[-1]),
            num_classes=num_classes,
            in_chans=in_chans,
        )
        self.apply(vit_init)


class DiNATs(_Tables, SwinPyramid):
    """DiNAT_s (section 4.3): Swin's architecture, its windows replaced by neighborhoods, its shifts by dilations.

    Args:
        dilations: for each stage, the dilations that its blocks take in turn. host: arguments of `SwinPyramid`.
    """

    authors_keys = _LEVELS

    def __init__(
        self,
        *,
        kernel_size: int = 7,
        dilations: Sequence[Sequence[int]] = ((1, 8), (1, 4), (1, 2), (1,)),
        drop_path_rate: float = 0.2,
        **host: Any,
    ) -> None:
        super().__init__(
            mixer=lambda at: _mixer(at, kernel_size, dilations[at.stage]), drop_path_rate=drop_path_rate, **host
        )


class IsotropicDiNAT(_Tables, Isotropic):
    """A plain ViT with neighborhood attention, or with full attention and the same kind of bias (section 4.4).

    No position table besides the biases, no class token: LayerNorm, mean over the tokens, linear.

    Args:
        kernel_size: None is full attention (ViT-rpb), with a bias table for maps of img_size / patch_size.
        dilations: taken by the blocks in turn.
    """

    authors_keys = KeyMap(
        rules=[
            (r"^patch_embed\.", "stem."),
            (r"^layers\.(\d+)\.attn\.", r"blocks.\1.mixer."),
            (r"^layers\.(\d+)\.", r"blocks.\1."),
        ],
        drop=[r"relative_position_index$"],
    )

    def __init__(
        self,
        dim: int = 384,
        depth: int = 12,
        num_heads: int = 12,
        kernel_size: int | None = 7,
        dilations: Sequence[int] = (1, 2),
        mlp_ratio: float = 4.0,
        patch_size: int = 16,
        img_size: int = 224,
        drop_path_rate: float = 0.1,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        (stage,) = places([dim], [depth], [num_heads], [patch_size], img_size, drop_path_rate)
        grid = stage[0].grid

        def mixer(at: Place) -> Mixer:
            if kernel_size is None:
                return BiasedSelfAttention(dim, num_heads, grid=grid)
            return _mixer(at, kernel_size, dilations)

        blocks = [Block(dim, mixer(at), mlp_ratio=mlp_ratio, drop_path=at.drop_path) for at in stage]
        super().__init__(
            stem=PatchEmbed(in_chans, dim, patch_size),
            blocks=blocks,
            dim=dim,
            grid=grid,
            stride=patch_size,
            num_classes=num_classes,
            in_chans=in_chans,
        )
        self.apply(vit_init)


_CODE = "count of the authors' code, table of their README"
_NEAR = {"dilations": ((1,), (1,), (1,), (1,))}
_MINI = {"depths": (3, 4, 6, 5)}
_SMALL = {"dim": 96, "num_heads": (3, 6, 12, 24), "mlp_ratio": 2.0, "drop_path_rate": 0.3}
_BASE = {"dim": 128, "num_heads": (4, 8, 16, 32), "mlp_ratio": 2.0, "layer_scale": 1e-5, "drop_path_rate": 0.5}
_LARGE = {"dim": 192, "num_heads": (6, 12, 24, 48), "mlp_ratio": 2.0, "drop_path_rate": 0.35}
_AT_384 = {"dilations": ((1, 13), (1, 6), (1, 3), (1,))}
_S_LARGE = {"dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48), "drop_path_rate": 0.35}
_ISO_BASE = {"dim": 768, "num_heads": 24, "drop_path_rate": 0.4}


def _variant(name: str, build: type[nn.Module], params: int, gmacs: float | None, side: int = 224, **options: Any):
    return Variant(name, build, params, gmacs, inputs=((1, 3, side, side),), source=_CODE, options=options)


SYSTEM = register_system(
    System(
        slug="dinat",
        title="Dilated Neighborhood Attention Transformer",
        year=2022,
        arxiv="2209.15001",
        evidence="authors_code",
        repo="SHI-Labs/Neighborhood-Attention-Transformer",
        idea="Attention to the k x k nearest pixels, in every second layer among pixels a dilation apart.",
        mixers=("neighborhood",),
        variants=(
            _variant("nat_mini", DiNAT, 19_984_174, 2.713, **_MINI, **_NEAR),
            _variant("nat_tiny", DiNAT, 27_901_582, 4.321, **_NEAR),
            _variant("nat_small", DiNAT, 50_743_297, 7.8, **_SMALL, **_NEAR, layer_scale=1e-5),
            _variant("nat_base", DiNAT, 89_769_652, 13.728, **_BASE, **_NEAR),
            _variant("dinat_mini", DiNAT, 19_984_174, 2.713, **_MINI),
            _variant("dinat_tiny", DiNAT, 27_901_582, 4.321),
            _variant("dinat_small", DiNAT, 50_719_681, 7.81, **_SMALL),
            _variant("dinat_base", DiNAT, 89_769_652, 13.728, **_BASE),
            _variant("dinat_large", DiNAT, 200_943_514, 30.534, **_LARGE),
            _variant("dinat_large_384", DiNAT, 200_943_514, 89.73, 384, **_LARGE, **_AT_384),
            _variant("dinat_large_384_11x11", DiNAT, 201_144_250, 92.4, 384, **_LARGE, kernel_size=11),
            # Trained on ImageNet-22K; the authors' constructors default to 1000 classes all the same.
            _variant("dinat_large_21k", DiNAT, 200_943_514, 30.534, **{**_LARGE, "drop_path_rate": 0.2}),
            _variant(
                "dinat_large_21k_11x11", DiNAT, 201_144_250, None, **{**_LARGE, "drop_path_rate": 0.2}, kernel_size=11
            ),
            _variant("dinat_s_tiny", DiNATs, 28_288_354, 4.511),
            _variant("dinat_s_small", DiNATs, 49_606_258, 8.7, depths=(2, 2, 18, 2), drop_path_rate=0.3),
            _variant(
                "dinat_s_base",
                DiNATs,
                87_768_224,
                15.4,
                dim=128,
                depths=(2, 2, 18, 2),
                num_heads=(4, 8, 16, 32),
                drop_path_rate=0.5,
            ),
            _variant("dinat_s_large", DiNATs, 196_532_476, 34.5, **_S_LARGE),
            _variant("dinat_s_large_384", DiNATs, 196_532_476, 101.5, 384, **_S_LARGE, **_AT_384),
            _variant("dinat_s_large_21k", DiNATs, 196_532_476, 34.5, **{**_S_LARGE, "drop_path_rate": 0.2}),
            _variant("vitrpb_small", IsotropicDiNAT, 22_080_376, 4.6, kernel_size=None),
            _variant("vitrpb_base", IsotropicDiNAT, 86_627_080, 17.5, kernel_size=None, **_ISO_BASE),
            _variant("nat_isotropic_small", IsotropicDiNAT, 21_999_736, 4.3, dilations=(1,)),
            _variant("nat_isotropic_base", IsotropicDiNAT, 86_465_800, 16.9, dilations=(1,), **_ISO_BASE),
            _variant("dinat_isotropic_small", IsotropicDiNAT, 21_999_736, 4.3),
            _variant("dinat_isotropic_base", IsotropicDiNAT, 86_465_800, 16.9, **_ISO_BASE),
        ),
        reports=(
            "ImageNet-1K top-1 at 224 px: NAT-M/T/S/B 81.8/83.2/83.7/84.3; DiNAT-M/T/S/B 81.8/82.7/83.8/84.4 (README)",
            "DiNAT-L, pre-trained on ImageNet-22K: 86.6 at 224 px, 87.4 at 384 px, 87.5 with 11 x 11 kernels (README)",
            "Isotropic, small: NAT 80.0, DiNAT 80.8, ViT-rpb 81.2; base: 81.6, 82.1, 82.5 (README)",
        ),
    )
)
