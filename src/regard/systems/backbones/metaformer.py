"""MetaFormer Is Actually What You Need for Vision (Yu et al., 2021, arXiv 2111.11418): PoolFormer and its hybrids.

Most of a transformer's success is its layout, two residual branches behind norms, and not its token mixer. Even a 3 x 3
average without parameters works in attention's place; so do other mixers, and hybrids that attend in late stages only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from regard import checks
from regard.checkpoint import KeyMap
from regard.layers import (
    Block,
    Conv2d,
    GlobalNorm,
    Mixer,
    PositionTable,
    linear_rates,
    resize_map,
    split_qkv,
    vit_init,
)
from regard.registry import System, Variant, register_mixer, register_system
from regard.skeletons import Hierarchical
from regard.skeletons.host import build_in_stack


@register_mixer("pooling")
class Pooling(Mixer):
    r"""Average of the neighbours minus the token itself, without parameters (section 3.2, eq. 4).

    $$\mathrm{out}_i = \frac{1}{|n(i)|}\sum_{j \in n(i)} x_j - x_i$$

    n(i) is the box of `pool_size` tokens along each axis around i, cut at the border of the map: the mean is over the
    tokens that are there. The minus takes away what the residual connection around the mixer brings back.

    Args:
        dim: channels. num_heads: taken so that every mixer is built alike; nothing depends on it.
        pool_size: side of the box, odd.
    """

    has_heads: ClassVar[bool] = False

    def __init__(self, dim: int, num_heads: int = 1, *, pool_size: int = 3) -> None:
        super().__init__()
        checks.positive("dim", dim)
        checks.positive("pool_size", pool_size)
        checks.odd("pool_size", pool_size)
        self.dim, self.num_heads, self.pool_size = dim, num_heads, pool_size

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        spatial, size = self.check(x), self.pool_size
        if len(spatial) == 1:
            mean = _box_mean(x[:, :, None], (size, 1))[:, :, 0]
        elif len(spatial) == 2:
            mean = _box_mean(x, (size, size))
        else:  # the mean over a box is a mean over frames of means within frames
            frames = _box_mean(x.flatten(0, 1), (size, size)).reshape(x.shape)
            mean = _box_mean(frames.flatten(2, 3), (size, 1)).reshape(x.shape)
        return mean - x

    def extra_repr(self) -> str:
        return f"dim={self.dim}, pool_size={self.pool_size}"


def _box_mean(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Mean over the box around each position of `(B, H, W, C)`, of those positions that the map has."""
    padding = (size[0] // 2, size[1] // 2)
    return F.avg_pool2d(x.movedim(-1, 1), size, stride=1, padding=padding, count_include_pad=False).movedim(1, -1)


@register_mixer("spatial_fc")
class SpatialFc(Mixer):
    r"""One learned matrix over the positions of the map, shared by all channels (the FC hybrids of the authors).

    $$\mathrm{out}_{ic} = \sum_j W_{ij}\, x_{jc},\quad W \in R^{N \times N},\ N = \prod \mathrm{grid}$$

    Positions are counted row by row. The matrix belongs to one grid, so maps of other sizes are refused.

    Args:
        dim: channels. num_heads: taken so that every mixer is built alike; nothing depends on it.
        grid: size of the map, one integer for each spatial axis (an integer is a square map).
    """

    has_heads: ClassVar[bool] = False

    def __init__(self, dim: int, num_heads: int = 1, *, grid: int | Sequence[int] = 14) -> None:
        super().__init__()
        checks.positive("dim", dim)
        self.grid = checks.tuple_of("grid", grid, 2 if isinstance(grid, int) else len(grid))
        self.dim, self.num_heads = dim, num_heads
        self.fc = nn.Linear(math.prod(self.grid), math.prod(self.grid), bias=False)

    @classmethod
    def in_stack(cls, index: int, input_size: tuple[int, ...], dim: int, num_heads: int, **options: Any) -> Mixer:
        """The matrix of this grid."""
        return cls(dim, num_heads, grid=input_size, **options)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *grid, dim)` -> the same shape."""
        spatial = self.check(x)
        if spatial != self.grid:
            raise ValueError(
                f"x has spatial axes {spatial}, but this matrix mixes the positions of a map of grid={self.grid}: "
                "resize the map, or build the mixer for it."
            )
        return self.fc(x.flatten(1, -2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, grid={self.grid}"


class StridedEmbed(Conv2d):
    """Overlapping patches of 2 stride - 1 pixels, no norm; then a learned map of positions if `grid` is given.

    `(B, H, W, C)` -> `(B, H', W', dim)`. The map belongs to a `grid` of tokens and is interpolated on others.
    """

    def __init__(self, in_chans: int, dim: int, stride: int, grid: tuple[int, ...] | None = None) -> None:
        super().__init__(in_chans, dim, 2 * stride - 1, stride=stride, padding=stride // 2)
        self.position = nn.Identity() if grid is None else PositionTable(grid, dim)

    @staticmethod
    def tokens(pixels: Sequence[int], stride: int) -> tuple[int, ...]:
        """Size of the map that comes out for a map of `pixels`."""
        return tuple((length + 2 * (stride // 2) - (2 * stride - 1)) // stride + 1 for length in pixels)

    def forward(self, x: Tensor) -> Tensor:
        """Channels-last map in and out."""
        return self.position(super().forward(x))


def _ours(name: str, value: Tensor) -> dict[str, Tensor]:
    """The authors' tensors in our layout: 1 x 1 convolutions are linear layers, q stands apart from k and v."""
    if name.endswith("position.table"):
        return {name: value.flatten(2).transpose(1, 2)}
    if name.endswith("qkv.weight"):
        return split_qkv(name, value)
    return {name: value.flatten(1) if "mlp." in name and value.dim() == 4 else value}


_NORMS = {"global": GlobalNorm, "channel": nn.LayerNorm}


class MetaFormer(Hierarchical):
    """Four stages of `Block(any mixer)` at strides 4, 8, 16, 32; strided convolutions without norms before each.

    Args:
        dims, depths: channels and blocks of each stage.
        mixers: one registered mixer name for all stages, or one for each stage. PoolFormer is "pooling" throughout.
        mixer_options: by mixer name, options for its constructor; by default softmax attention has no bias on q, k, v.
        head_dim: channels a head.
        norm: "global" (one GroupNorm group: statistics over positions and channels) or "channel" (LayerNorm).
        position_stage: the stage (0, 1, ...) whose input gets a learned map of positions, or None. The hybrids with
            attention have it before their first attention stage.
        mlp_ratio: hidden width of the MLPs, one number or one for each stage.
        layer_scale: initial factor of the residual branches.
        stem_stride: pixels per token of the first stage; 4 is a 7 x 7 convolution, 2 a 3 x 3.
        img_size: fixes the map of positions (other sizes resize it) and the grids of mixers that have one.
    """

    # Stages, downsamplings and the one map of positions share a numbering in the authors' `network`.
    authors_keys = KeyMap(
        rules=[
            (r"^patch_embed\.proj\.", "stem."),
            (r"^network\.0\.pos_embed$", "stem.position.table"),
            (r"^network\.(\d+)\.pos_embed$", lambda m: f"downs.{(int(m[1]) + 1) // 2}.position.table"),
            (r"^network\.(\d+)\.proj\.", lambda m: f"downs.{(int(m[1]) + 1) // 2}."),
            (r"^network\.(\d+)\.(\d+)\.", lambda m: f"stages.{int(m[1]) // 2}.{m[2]}."),
            (r"\.token_mixer\.", ".mixer."),
            (r"\blayer_scale_(\d)$", r"scale\1.gamma"),
        ],
        convert=_ours,
    )

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 6, 2),
        mixers: str | Sequence[str] = "pooling",
        mixer_options: Mapping[str, Mapping[str, Any]] | None = None,
        head_dim: int = 32,
        norm: str = "global",
        position_stage: int | None = None,
        mlp_ratio: float | Sequence[float] = 4.0,
        layer_scale: float = 1e-5,
        stem_stride: int = 4,
        img_size: int | Sequence[int] = 224,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        names = [mixers] * len(dims) if isinstance(mixers, str) else list(mixers)
        ratios = [mlp_ratio] * len(dims) if isinstance(mlp_ratio, (int, float)) else list(mlp_ratio)
        for argument, given in (("depths", depths), ("mixers", names), ("mlp_ratio", ratios)):
            if len(given) != len(dims):
                raise ValueError(f"{argument} must have one entry for each of the {len(dims)} stages, got {given!r}.")
        if position_stage is not None and not 0 <= position_stage < len(dims):
            raise ValueError(
                f"position_stage must be one of the stages 0..{len(dims) - 1} or None, got {position_stage}."
            )
        norm_layer = _NORMS[checks.one_of("norm", norm, _NORMS)]
        options = {"softmax": {"qkv_bias": False}, **(mixer_options or {})}
        rates = iter(linear_rates(drop_path_rate, sum(depths)))
        grid, widths, strides = checks.tuple_of("img_size", img_size, 2), [in_chans, *dims], [stem_stride]
        embeds, stages = [], []
        for index, (width, depth, name, ratio) in enumerate(zip(dims, depths, names, ratios, strict=True)):
            stride = stem_stride if index == 0 else 2
            grid = StridedEmbed.tokens(grid, stride)
            embeds.append(StridedEmbed(widths[index], width, stride, grid if index == position_stage else None))
            stages.append(
                [
                    Block(
                        width,
                        build_in_stack(name, i, grid, width, max(width // head_dim, 1), **options.get(name, {})),
                        mlp_ratio=ratio,
                        norm=norm_layer,
                        layer_scale=layer_scale,
                        drop_path=next(rates),
                    )
                    for i in range(depth)
                ]
            )
            strides.append(2 * strides[-1])
        super().__init__(
            stem=embeds[0],
            downs=[nn.Identity(), *embeds[1:]],
            stages=stages,
            dims=dims,
            strides=strides[:-1],
            norm=norm_layer(dims[-1]),
            num_classes=num_classes,
            in_chans=in_chans,
        )
        self.apply(vit_init)
        if position_stage is not None:
            nn.init.zeros_(embeds[position_stage].position.table)

    def check_image(self, x: Tensor) -> None:
        """The stem needs an image that its first patch fits on."""
        super().check_image(x)
        stride = self.feature_strides[0]
        smallest = 2 * stride - 1 - 2 * (stride // 2)
        if min(x.shape[2:]) < smallest:
            raise ValueError(f"x must be at least {smallest} pixels high and wide, got {tuple(x.shape)}: enlarge it.")

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Interpolate the (square) map of positions of another image size."""
        for name, module in self.named_modules():
            table = state.get(f"{name}.table")
            if isinstance(module, PositionTable) and table is not None and table.shape != module.table.shape:
                side = int(table.shape[1] ** 0.5)
                resized = resize_map(table.transpose(1, 2).unflatten(2, (side, side)), module.grid)
                state[f"{name}.table"] = resized.flatten(2).transpose(1, 2)
        return state

    def no_weight_decay(self) -> set[str]:
        """The map of positions."""
        return {name for name, _ in self.named_parameters() if name.endswith("position.table")}


_README = "class and table of the authors' repository"
_WIDE = {"dims": (96, 192, 384, 768)}
_P = "pooling"


def _poolformer(name: str, params: int, gmacs: float, drop: float, **options: Any) -> Variant:
    return Variant(name, MetaFormer, params, gmacs, source=_README, options={**options, "drop_path_rate": drop})


def _hybrid(name: str, params: int, gmacs: float | None, **options: Any) -> Variant:
    source = "class of the authors' repository; multiply-adds counted on it"
    return Variant(name, MetaFormer, params, gmacs, source=source, options={**options, "drop_path_rate": 0.1})


SYSTEM = register_system(
    System(
        slug="metaformer",
        title="MetaFormer Is Actually What You Need for Vision",
        year=2021,
        arxiv="2111.11418",
        evidence="authors_code",
        repo="sail-sg/poolformer",
        idea="The layout of a transformer block matters more than its mixer: a 3 x 3 average can replace attention.",
        mixers=("pooling", "spatial_fc"),
        variants=(
            _poolformer("poolformer_s12", 11_915_176, 1.8227, 0.1),
            _poolformer("poolformer_s24", 21_388_968, 3.4129, 0.1, depths=(4, 4, 12, 4)),
            _poolformer("poolformer_s36", 30_862_760, 5.0031, 0.2, depths=(6, 6, 18, 6), layer_scale=1e-6),
            _poolformer("poolformer_m36", 56_172_520, 8.8019, 0.3, depths=(6, 6, 18, 6), layer_scale=1e-6, **_WIDE),
            _poolformer("poolformer_m48", 73_473_448, 11.5907, 0.4, depths=(8, 8, 24, 8), layer_scale=1e-6, **_WIDE),
            _hybrid("metaformer_id_s12", 11_915_176, None, mixers="identity"),
            _hybrid(
                "metaformer_pppa_s12_224",
                14_038_440,
                1.920,
                mixers=(_P, _P, _P, "softmax"),
                norm="channel",
                position_stage=3,
            ),
            _hybrid(
                "metaformer_ppaa_s12_224",
                16_535_592,
                2.549,
                mixers=(_P, _P, "softmax", "softmax"),
                norm="channel",
                position_stage=2,
            ),
            _hybrid("metaformer_pppf_s12_224", 11_919_978, None, mixers=(_P, _P, _P, "spatial_fc")),
            _hybrid("metaformer_ppff_s12_224", 12_150_474, None, mixers=(_P, _P, "spatial_fc", "spatial_fc")),
        ),
        reports=(
            "ImageNet-1K top-1 at 224 px: PoolFormer-S12 77.2, S24 80.3, S36 81.4, M36 82.1, M48 82.5 (README)",
            "COCO Mask R-CNN 1x box / mask AP: S12 37.3 / 34.6, S24 40.1 / 37.0, S36 41.0 / 37.7",
            "ADE20K Semantic FPN mIoU: S12 37.2, S24 40.3, S36 42.0, M36 42.4, M48 42.7",
        ),
    )
)
