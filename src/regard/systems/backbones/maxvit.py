"""MaxViT: Multi-Axis Vision Transformer (Tu et al., 2022, arXiv 2204.01697).

Each block is a mobile convolution, attention inside windows, and attention inside a sparse grid: a fixed number of
tokens spread evenly over the whole map. Both attentions have linear cost; together they connect all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from regard import checks, ops
from regard.checkpoint import KeyMap
from regard.layers import (
    BatchNorm,
    Block,
    Conv2d,
    MBConv,
    Mixer,
    RelativePositionBias,
    heads_of,
    linear_rates,
    pad_same,
    resize_bias_tables,
)
from regard.layouts.windows import Partition
from regard.registry import System, Variant, register_mixer, register_system
from regard.skeletons import Hierarchical

_gelu = partial(nn.GELU, approximate="tanh")


def _batch_norm(momentum: float) -> Callable[[int], nn.Module]:
    return partial(BatchNorm, eps=1e-3, momentum=momentum)


@register_mixer("grid")
class GridAttention(Mixer):
    r"""Attention among tokens spread evenly over the map ("grid"), or among neighbours ("window") (section 3.2).

    $$\mathrm{out} = W_o\,\mathrm{softmax}(d^{-1/2} Q K^\top + B)\,V \quad\text{within each group}$$

    A grid group holds the tokens that are a multiple of `length / window_size` apart along each axis, so that it spans
    the map. B[i, j] depends on the offset j - i of the places in the group. Grids alone never connect neighbours, and
    windows (the paper's block attention) nothing but neighbours: one after the other they connect all tokens, and so
    they alternate in a stack.

    Departure: on a map that is no multiple of the size, groups are cut at its end; the authors refuse such maps.

    Args:
        dim: channels. num_heads: divides dim.
        window_size: tokens of a group along each axis, one integer or one for each of `axes`.
        partition: "grid" or "window".
        axes: number of spatial axes.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window_size: int | Sequence[int] = 7,
        partition: Partition = "grid",
        axes: int = 2,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        self.head_dim = heads_of(dim, num_heads)
        self.dim, self.num_heads, self.axes = dim, num_heads, axes
        checks.one_of("partition", partition, ("grid", "window"))
        self.partition: Partition = partition
        self.window_size = checks.tuple_of("window_size", window_size, axes)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.bias = RelativePositionBias(self.window_size, num_heads, sign="key-query")
        self.proj = nn.Linear(dim, dim)

    @classmethod
    def in_stack(cls, index: int, input_size: tuple[int, ...], dim: int, num_heads: int, **options: Any) -> Mixer:
        """Windows and grids take turns (unless `partition` says which); neither is larger than the map."""
        size = checks.tuple_of("window_size", options.pop("window_size", 7), len(input_size))
        size = tuple(min(own, length) for own, length in zip(size, input_size, strict=True))
        partition = options.pop("partition", "grid" if index % 2 else "window")
        return cls(dim, num_heads, window_size=size, partition=partition, axes=len(input_size), **options)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        self.check(x)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        out = ops.window_attention(q, k, v, window_size=self.window_size, partition=self.partition, bias=self.bias())
        return self.proj(out.flatten(-2))

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, window_size={self.window_size}, partition={self.partition!r}"
        )


class Stem(nn.Module):
    """Two 3 x 3 convolutions, the first with stride 2, BatchNorm and GELU between them."""

    def __init__(self, in_chans: int, dim: int, norm: Callable[[int], nn.Module] = BatchNorm) -> None:
        super().__init__()
        self.conv1 = Conv2d(in_chans, dim, 3, stride=2)
        self.norm1 = norm(dim)
        self.act = _gelu()
        self.conv2 = Conv2d(dim, dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, W, in_chans)` -> `(B, H / 2, W / 2, dim)`, sizes rounded up."""
        x = self.act(self.norm1(self.conv1(pad_same(x, 3, 2))))
        return self.conv2(pad_same(x, 3, 1))


class MaxViTBlock(nn.Sequential):
    """MBConv, then a transformer block for each of `partitions`."""

    def __init__(
        self,
        dim: int,
        out_dim: int,
        num_heads: int,
        *,
        stride: int = 1,
        window_size: int = 7,
        partitions: Sequence[Partition] = ("window", "grid"),
        mlp_ratio: float = 4.0,
        se_ratio: float = 0.25,
        norm: Callable[[int], nn.Module] = BatchNorm,
        drop_path: float = 0.0,
    ) -> None:
        conv = MBConv(dim, out_dim, stride=stride, se_ratio=se_ratio, norm=norm, act=_gelu, drop_path=drop_path)
        attend = (
            Block(
                out_dim,
                GridAttention(out_dim, num_heads, window_size=window_size, partition=partition),
                mlp_ratio=mlp_ratio,
                act=_gelu,
                drop_path=drop_path,
            )
            for partition in partitions
        )
        super().__init__(conv, *attend)


def _ours(name: str, value: Tensor) -> dict[str, Tensor]:
    """Tensors of the published PyTorch port in our layout: 1 x 1 convolutions are linear, bias tables are flat."""
    if name.endswith("bias.table"):
        return {name: value.flatten(1).t()}
    return {name: value.flatten(1) if value.shape[2:] == (1, 1) and "depthwise" not in name else value}


def _init(module: nn.Module) -> None:
    """The authors draw all kernels from a normal of deviation 0.02 and start biases at zero."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class MaxViT(Hierarchical):
    """Stem at stride 2, four stages whose first MBConv halves the map, mean, LayerNorm, linear and tanh, linear.

    Args:
        dims, depths: channels and blocks of each stage. stem_dim: channels of the stem.
        head_dim: channels a head. window_size: of windows and of grids; the paper takes image size / 32.
        partitions: the attentions of a block. mlp_ratio, se_ratio: see `Block` and `MBConv`.
        bn_momentum: weight of a batch in the running statistics of BatchNorm; the paper's 0.01 suits long training, 0.1
            suits some hundred steps.
        drop_path_rate: stochastic depth of the last block's three parts; it rises linearly from 0.
    """

    authors_keys = KeyMap(
        rules=[
            (r"^stages\.(\d+)\.blocks\.(\d+)\.", r"stages.\1.\2."),
            (r"\.conv\.conv1_1x1\.", ".0.expand."),
            (r"\.conv\.conv2_kxk\.", ".0.depthwise."),
            (r"\.conv\.conv3_1x1\.", ".0.project."),
            (r"\.conv\.shortcut\.expand\.", ".0.shortcut."),
            (r"\.conv\.", ".0."),
            (r"\battn_block\.", "1."),
            (r"\battn_grid\.", "2."),
            (r"\.attn\.rel_pos\.relative_position_bias_table$", ".mixer.bias.table"),
            (r"\.attn\.", ".mixer."),
            (r"^head\.norm\.", "head_norm.0."),
            (r"^head\.pre_logits\.fc\.", "head_norm.1."),
            (r"^head\.fc\.", "head."),
        ],
        drop=[r"relative_position_index$", r"rel_pos\.(height|width)_lookup$"],
        convert=_ours,
    )

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 5, 2),
        stem_dim: int = 64,
        head_dim: int = 32,
        window_size: int = 7,
        partitions: Sequence[Partition] = ("window", "grid"),
        mlp_ratio: float = 4.0,
        se_ratio: float = 0.25,
        bn_momentum: float = 0.01,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        norm = _batch_norm(bn_momentum)
        rates = iter(linear_rates(drop_path_rate, sum(depths)))
        for width in dims:
            checks.divisible("dims", width, "head_dim", head_dim)

        def block(index: int, before: int, width: int) -> MaxViTBlock:
            return MaxViTBlock(
                width if index else before,
                width,
                width // head_dim,
                stride=1 if index else 2,
                window_size=window_size,
                partitions=partitions,
                mlp_ratio=mlp_ratio,
                se_ratio=se_ratio,
                norm=norm,
                drop_path=next(rates),
            )

        super().__init__(
            stem=Stem(in_chans, stem_dim, norm),
            downs=[nn.Identity() for _ in dims],
            stages=[
                [block(index, before, width) for index in range(depth)]
                for before, width, depth in zip((stem_dim, *dims[:-1]), dims, depths, strict=True)
            ],
            dims=dims,
            strides=[4 * 2**stage for stage in range(len(dims))],
            head_norm=nn.Sequential(nn.LayerNorm(dims[-1]), nn.Linear(dims[-1], dims[-1]), nn.Tanh()),
            num_classes=num_classes,
            in_chans=in_chans,
        )
        self.apply(_init)

    def no_weight_decay(self) -> set[str]:
        """The position tables."""
        return {name for name, _ in self.named_parameters() if name.endswith("bias.table")}

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Resize bias tables of another window size (bilinear, as the authors do for finer resolutions)."""
        return resize_bias_tables(state, self.state_dict(), "bilinear")


_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"drop_path_rate": 0.2},
    "small": {"dims": (96, 192, 384, 768), "drop_path_rate": 0.3},
    "base": {"dims": (96, 192, 384, 768), "depths": (2, 6, 14, 2), "drop_path_rate": 0.4},
    "large": {"dims": (128, 256, 512, 1024), "depths": (2, 6, 14, 2), "stem_dim": 128, "drop_path_rate": 0.6},
    "xlarge": {"dims": (192, 384, 768, 1536), "depths": (2, 6, 14, 2), "stem_dim": 192},
}
# Parameters with 1000 classes, and multiply-adds of the README, at 224, 384 and 512 pixels.
_COUNTS: dict[str, tuple[tuple[int, float], ...]] = {
    "tiny": ((30_916_528, 5.6), (30_977_008, 17.7), (31_049_584, 33.7)),
    "small": ((68_927_956, 11.7), (69_018_676, 36.1), (69_127_540, 67.6)),
    "base": ((119_467_708, 24.2), (119_653_468, 74.2), (119_876_380, 138.5)),
    "large": ((211_785_560, 43.9), (212_033_240, 133.1), (212_330_456, 245.4)),
    "xlarge": ((474_951_952, 97.8), (475_323_472, 293.7), (475_769_296, 535.2)),
}


def _variant(name: str, size: int, params: int, gmacs: float) -> Variant:
    options = {"dims": (64, 128, 256, 512), "depths": (2, 2, 5, 2), **_SIZES[name], "window_size": size // 32}
    # The authors find biases by products with one-hot matrices, which profilers count; ours are looked up.
    heads = 2 * sum(depth * width // 32 for depth, width in zip(options["depths"], options["dims"], strict=True))
    tokens, offsets = options["window_size"] ** 2, 2 * options["window_size"] - 1
    lookup = heads * (tokens * offsets**2 + tokens**2 * offsets) / 1e9
    return Variant(
        f"maxvit_{name}_{size}",
        MaxViT,
        params,
        round(gmacs - lookup, 3),
        inputs=((1, 3, size, size),),
        source=f"parameters: class of the PyTorch port (timm maxvit_{name}_tf_{size}); multiply-adds: README of the "
        f"authors, {gmacs}, less {lookup:.3f} for looking biases up",
        options=options,
    )


SYSTEM = register_system(
    System(
        slug="maxvit",
        title="MaxViT: Multi-Axis Vision Transformer",
        year=2022,
        arxiv="2204.01697",
        evidence="authors_code",
        repo="google-research/maxvit",
        idea="Attention inside windows, then among a fixed number of tokens spread over the map: all at linear cost.",
        mixers=("grid",),
        variants=tuple(
            _variant(name, size, *counts)
            for name, sizes in _COUNTS.items()
            for size, counts in zip((224, 384, 512), sizes, strict=True)
        ),
        reports=(
            "ImageNet-1K top-1 at 224 px: T 83.62, S 84.45, B 84.95, L 85.17; at 512 px: T 85.72, L 86.70 (README)",
            "ImageNet-1K top-1 of XL at 512 px, pre-trained on ImageNet-21K: 88.7 (abstract)",
        ),
    )
)
