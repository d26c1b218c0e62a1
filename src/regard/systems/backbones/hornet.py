"""HorNet: Efficient High-Order Spatial Interactions with Recursive Gated Convolutions (Rao et al., 2022, arXiv 2207.14284).

Attention multiplies features of different places, weights by values. So does a gate: a token times what a convolution
gathered around it. Gating n times in a row, in ever wider channels, makes products of n + 1 features without attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from regard import checks
from regard.checkpoint import KeyMap
from regard.layers import (
    Block,
    GlobalFilter,
    Mixer,
    PatchEmbed,
    conv,
    depthwise,
    flat_kernels,
    kernel_init,
    linear_rates,
)
from regard.registry import System, image_variant, register_mixer, register_system
from regard.skeletons import Hierarchical

_norm = partial(nn.LayerNorm, eps=1e-6)


class GlobalLocalFilter(nn.Module):
    r"""A depthwise 3 x 3 convolution on half of the channels, a `GlobalFilter` on the others; norms around (GF).

    $$\mathrm{out} = \mathrm{LN}(\mathrm{interleave}(\mathrm{DW}(u_1), \mathrm{filter}(u_2))),\quad
      [u_1, u_2] = \mathrm{LN}(x)$$
    """

    def __init__(self, dim: int, grid: Sequence[int]) -> None:
        super().__init__()
        checks.divisible("the channels of the filter", dim, "its halves", 2)
        axes = len(grid)
        self.norm1 = _norm(dim)
        self.local = conv(axes)(dim // 2, dim // 2, 3, padding=1, groups=dim // 2, bias=False)
        self.filter = GlobalFilter(dim // 2, grid)
        self.norm2 = _norm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        local, rest = self.norm1(x).chunk(2, -1)
        return self.norm2(torch.stack([self.local(local), self.filter(rest)], -1).flatten(-2))


def _ours(name: str, value: Tensor) -> dict[str, Tensor]:
    """The authors' tensors in our layout: channels of the filter behind its frequencies, 1 x 1 convolutions as linear."""
    return {name: value.permute(1, 2, 0, 3)} if name.endswith("filter.weight") else flat_kernels(name, value)


@register_mixer("gnconv")
class RecursiveGatedConv(Mixer):
    r"""n gates in a row, each from one long depthwise convolution, in channels that double (g^n Conv, section 3.1).

    $$[p_0, r_0, \dots, r_{n-1}] = W_{in}\,x,\quad p_{k+1} = s\,f_k(r_k) \odot g_k(p_k),\quad
      \mathrm{out} = W_{out}\,p_n$$

    r_k has dim / 2^(n-1-k) channels, p_0 as many as r_0. All f_k together are one depthwise convolution of `kernel_size`,
    or, with `filter_grid`, a `GlobalLocalFilter`. g_0 is the identity, g_k a linear layer from the width of r_{k-1} to that
    of r_k. There is no activation: out is a polynomial of degree n + 1 in x.

    Args:
        dim: channels, a multiple of 2^(order-1). num_heads: taken so that every mixer is built alike; there are none.
        order: n. scale: s. kernel_size: odd.
        filter_grid: the grid of the global filter's frequencies; None is the convolution.
        axes: number of spatial axes.
    """

    has_heads: ClassVar[bool] = False
    authors_keys = KeyMap(
        rules=[
            (r"\bdwconv\.complex_weight$", "spatial.filter.weight"),
            (r"\bdwconv\.dw\.", "spatial.local."),
            (r"\bdwconv\.pre_norm\.", "spatial.norm1."),
            (r"\bdwconv\.post_norm\.", "spatial.norm2."),
            (r"\bdwconv\.", "spatial."),
        ],
        convert=_ours,
    )

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        order: int = 3,
        scale: float = 1 / 3,
        kernel_size: int = 7,
        filter_grid: Sequence[int] | None = None,
        axes: int = 2,
    ) -> None:
        super().__init__()
        checks.positive("dim", dim)
        checks.positive("order", order)
        checks.divisible("dim", dim, "2 ** (order - 1)", 2 ** (order - 1))
        checks.odd("kernel_size", kernel_size)
        if filter_grid is not None:
            checks.tuple_of("filter_grid", filter_grid, axes)
        self.dim, self.num_heads, self.order, self.scale, self.axes = dim, num_heads, order, scale, axes
        self.widths = [dim >> step for step in reversed(range(order))]
        self.proj_in = nn.Linear(dim, 2 * dim)
        if filter_grid is None:
            self.spatial = depthwise(sum(self.widths), kernel_size, dims=axes)
        else:
            self.spatial = GlobalLocalFilter(sum(self.widths), filter_grid)
        self.pws = nn.ModuleList(nn.Linear(width, wider) for width, wider in pairwise(self.widths))
        self.proj_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        self.check(x)
        p, rest = self.proj_in(x).split([self.widths[0], sum(self.widths)], -1)
        first, *gates = (self.spatial(rest) * self.scale).split(self.widths, -1)
        p = p * first
        for widen, gate in zip(self.pws, gates, strict=True):
            p = widen(p) * gate
        return self.proj_out(p)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, order={self.order}, scale={self.scale:.4f}"


class HorNet(Hierarchical):
    """Patches of 4 x 4, stages of `Block(RecursiveGatedConv)` whose width doubles, LayerNorm and a 2 x 2 convolution between.

    Args:
        dim: channels of the first stage. depths, orders: blocks, and the order of their mixers, of each stage.
        filter_stages: stages (0, 1, ...) whose mixers have the global filter in place of the 7 x 7 convolution.
        patch_size: pixels per token of the first stage. layer_scale: initial factor of the residual branches.
        img_size: the frequencies of the filters are those of its maps; other sizes interpolate them.
    """

    authors_keys = KeyMap(
        rules=[
            (r"^downsample_layers\.0\.0\.", "stem.0.proj."),
            (r"^downsample_layers\.0\.1\.", "stem.1."),
            (r"^downsample_layers\.(\d+)\.0\.", r"downs.\1.0."),
            (r"^downsample_layers\.(\d+)\.1\.", r"downs.\1.1.proj."),
            (r"\.gnconv\.", ".mixer."),
            (r"\.pwconv([12])\.", r".mlp.fc\1."),
            (r"\.gamma([12])$", r".scale\1.gamma"),
            (r"^norm\.", "head_norm."),
            *RecursiveGatedConv.authors_keys.rules,
        ],
        convert=_ours,
    )

    def __init__(
        self,
        dim: int = 64,
        depths: Sequence[int] = (2, 3, 18, 2),
        orders: Sequence[int] = (2, 3, 4, 5),
        filter_stages: Sequence[int] = (),
        patch_size: int = 4,
        layer_scale: float = 1e-6,
        img_size: int = 224,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        if len(orders) != len(depths):
            raise ValueError(f"orders must have one entry for each of the {len(depths)} stages, got {orders!r}.")
        dims = [dim * 2**stage for stage in range(len(depths))]
        strides = [patch_size * 2**stage for stage in range(len(depths))]
        rates = iter(linear_rates(drop_path_rate, sum(depths)))

        def block(stage: int) -> Block:
            grid = (-(-img_size // strides[stage]),) * 2 if stage in filter_stages else None
            mixer = RecursiveGatedConv(dims[stage], order=orders[stage], filter_grid=grid)
            return Block(dims[stage], mixer, norm=_norm, layer_scale=layer_scale, drop_path=next(rates))

        super().__init__(
            stem=nn.Sequential(PatchEmbed(in_chans, dim, patch_size, norm=False), _norm(dim)),
            downs=[
                nn.Identity(),
                *(nn.Sequential(_norm(width), PatchEmbed(width, 2 * width, 2, norm=False)) for width in dims[:-1]),
            ],
            stages=[[block(stage) for _ in range(depth)] for stage, depth in enumerate(depths)],
            dims=dims,
            strides=strides,
            head_norm=_norm(dims[-1]),
            num_classes=num_classes,
            in_chans=in_chans,
        )
        self.apply(kernel_init)


_TABLE = "class of the authors' repository; multiply-adds of the paper's and README's tables"


def _variants(size: str, dim: int, drop: float, plain: tuple[int, float], filtered: tuple[int, float]) -> list[Any]:
    """The model of one width with 7 x 7 convolutions, and with global filters in the last two stages."""
    options: dict[str, Any] = {"source": _TABLE, "drop": drop, "dim": dim}
    return [
        image_variant(f"hornet_{size}_7x7", HorNet, *plain, **options),
        image_variant(f"hornet_{size}_gf", HorNet, *filtered, **options, filter_stages=(2, 3)),
    ]


SYSTEM = register_system(
    System(
        slug="hornet",
        title="HorNet: Efficient High-Order Spatial Interactions with Recursive Gated Convolutions",
        year=2022,
        arxiv="2207.14284",
        evidence="authors_code",
        repo="raoyongming/HorNet",
        idea="Gates from a depthwise convolution, several in a row: products of many places without attention.",
        mixers=("gnconv",),
        variants=(
            *_variants("tiny", 64, 0.2, (22_409_512, 3.977), (22_991_848, 3.897)),
            *_variants("small", 96, 0.4, (49_528_264, 8.826), (50_401_768, 8.707)),
            *_variants("base", 128, 0.5, (87_256_680, 15.584), (88_421_352, 15.424)),
            image_variant(
                "hornet_base_gf_384", HorNet, 92_099_560, 45.33, 0.5, 384, source=_TABLE, dim=128, filter_stages=(2, 3)
            ),
            *_variants("large", 192, 0.0, (194_542_504, 34.8), (196_289_512, 34.7)),
            image_variant(
                "hornet_large_gf_384",
                HorNet,
                201_806_824,
                101.8,
                0.5,
                384,
                source=_TABLE,
                dim=192,
                filter_stages=(2, 3),
            ),
        ),
        reports=(
            "ImageNet-1K top-1 at 224 px, 7 x 7 / global filter: T 82.8 / 83.0, S 83.8 / 84.0, B 84.2 / 84.3 (README)",
            "COCO Cascade Mask R-CNN 3x box / mask AP (filter): T 52.4 / 45.6, S 53.3 / 46.3, B 54.0 / 46.9",
            "ADE20K UPerNet mIoU (filter): T 49.2, S 50.0, B 50.5",
        ),
    )
)
