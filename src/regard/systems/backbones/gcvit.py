"""GC ViT: Global Context Vision Transformers (Hatamizadeh et al., 2022, arXiv 2206.09959).

Blocks of window attention take turns: in every second one the queries are not the window's own, but a small summary of
the whole map, the same for all windows. So information travels between windows without shifts or masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from regard import checks, ops
from regard.checkpoint import KeyMap
from regard.layers import (
    Block,
    ContextBlock,
    Conv2d,
    Mixer,
    RelativePositionBias,
    SqueezeExcite,
    conv,
    depthwise,
    heads_of,
    resize_bias_tables,
    resize_map,
    vit_init,
)
from regard.layouts.windows import crop
from regard.registry import README_FLOPS, System, image_variant, register_mixer, register_system
from regard.skeletons import Hierarchical, Place, places
from regard.systems.backbones.swin import WindowAttention

_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


class FusedMBConv(nn.Module):
    r"""$x + \mathrm{Conv}_{1 \times 1}(\mathrm{SE}(\mathrm{GELU}(\mathrm{DWConv}_{3 \times 3}(x))))$, all without biases."""

    def __init__(self, dim: int, *, axes: int = 2) -> None:
        super().__init__()
        self.depthwise = depthwise(dim, 3, dims=axes, bias=False)
        self.act = nn.GELU()
        self.se = SqueezeExcite(dim, max(dim // 4, 1), act=nn.GELU, bias=False)
        self.project = conv(axes)(dim, dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        return x + self.project(self.se(self.act(self.depthwise(x))))


class GlobalQuery(nn.Module):
    """The global query generator: `FusedMBConv`, halving the map by max pooling after each, until it fits a window.

    A map that does not come out at the size of the window is interpolated to it (bicubic in the plane, as in the
    authors' detector; otherwise linear).

    Args:
        window_size: of the windows whose queries are made. grid: the usual map; says how often to halve.
    """

    def __init__(self, dim: int, window_size: Sequence[int], grid: Sequence[int]) -> None:
        super().__init__()
        axes = len(window_size)
        windows = max(-(-length // size) for length, size in zip(grid, window_size, strict=True))
        self.window_size, self.halvings = tuple(window_size), (windows - 1).bit_length()
        self.features = nn.ModuleList(FusedMBConv(dim, axes=axes) for _ in range(max(self.halvings, 1)))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> `(B, *window, dim)`, where the window is not larger than the map."""
        size, axes = tuple(map(min, x.shape[1:-1], self.window_size)), len(self.window_size)
        for feature in self.features:
            x = feature(x)
            if self.halvings:
                x = _MAX_POOL[axes](x.movedim(-1, 1), 3, 2, 1).movedim(1, -1)
        if tuple(x.shape[1:-1]) == size:
            return x
        if axes == 2:
            return F.interpolate(x.movedim(-1, 1), size, mode="bicubic", align_corners=False).movedim(1, -1)
        return resize_map(x.movedim(-1, 1), size).movedim(1, -1)

    def extra_repr(self) -> str:
        return f"window_size={self.window_size}, halvings={self.halvings}"


@register_mixer("global_query")
class GlobalQueryAttention(Mixer):
    r"""Window attention whose queries are a summary of the whole map, for 1, 2 or 3 axes (section 3, "Global Self-Attention").

    $$\mathrm{out} = W_o\,\mathrm{softmax}(d^{-1/2} Q_g K^\top + B)\,V \quad\text{within each window}$$

    Keys and values are the window's own, $K, V = x W_{kv}$; the queries `(B, *window, dim)` come without a projection
    from a `GlobalQuery` and are the same for all windows of a sample. B[i, j] depends on the offset i - j only.

    In the paper a stage computes its queries once, from its input, for all of its global blocks: pass them as `query`.
    Alone, the mixer owns a generator and computes them from its input. In a stack, plain windows and this take turns.

    Departure: on a map that is no multiple of the window, the windows at its end are smaller; the authors' classifier
    refuses such maps, their detector fills them with zeros that take part in the softmax.

    Args:
        dim: channels. num_heads: divides dim. window_size: one integer or one for each of `axes`.
        input_size: the usual map, for which the generator is built; None is as many windows as tokens in a window.
        generator: False leaves it out, where `query` always comes from outside.
    """

    authors_keys = KeyMap(
        rules=[(r"^qkv\.", "kv."), (r"^relative_position_bias_table$", "bias.table")],
        drop=[r"relative_position_index$"],
    )

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window_size: int | Sequence[int] = 7,
        input_size: Sequence[int] | None = None,
        generator: bool = True,
        axes: int = 2,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        self.head_dim = heads_of(dim, num_heads)
        self.dim, self.num_heads, self.axes = dim, num_heads, axes
        self.window_size = checks.tuple_of("window_size", window_size, axes)
        usual = [size**2 for size in self.window_size] if input_size is None else input_size
        grid = checks.tuple_of("input_size", usual, axes)
        self.query = GlobalQuery(dim, self.window_size, grid) if generator else None
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.bias = RelativePositionBias(self.window_size, num_heads)
        self.proj = nn.Linear(dim, dim)

    @classmethod
    def in_stack(cls, index: int, input_size: tuple[int, ...], dim: int, num_heads: int, **options: Any) -> Mixer:
        """Every second block has global queries. Unless given, windows are chosen as for shifted windows."""
        local = WindowAttention.in_stack(0, input_size, dim, num_heads, **options)
        if index % 2 == 0:
            return local
        options |= {"window_size": local.window_size, "input_size": input_size, "axes": len(input_size)}
        return cls(dim, num_heads, **options)

    def forward(self, x: Tensor, query: Tensor | None = None) -> Tensor:
        """`(B, *S, dim)`, queries `(B, *window, dim)` -> the shape of x. A window is never larger than the map."""
        spatial = self.check(x)
        size = tuple(map(min, spatial, self.window_size))
        if query is None:
            if self.query is None:
                raise ValueError(
                    "query is missing: this mixer was built with generator=False, pass the global queries."
                )
            query = self.query(x)
        if query.shape != (x.shape[0], *size, self.dim):
            raise ValueError(f"query must be {(x.shape[0], *size, self.dim)}, got {tuple(query.shape)}.")
        windows = [-(-length // side) for length, side in zip(spatial, size, strict=True)]
        q = crop(query.repeat(1, *windows, 1), spatial).unflatten(-1, (self.num_heads, self.head_dim))
        k, v = self.kv(x).unflatten(-1, (2, self.num_heads, self.head_dim)).unbind(-3)
        return self.proj(ops.window_attention(q, k, v, window_size=size, bias=self.bias(size)).flatten(-2))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, window_size={self.window_size}"


class GlobalContextStage(nn.Module):
    """Blocks of which every second one attends with global queries, computed once from the input of the stage."""

    def __init__(
        self, blocks: Sequence[Place], window_size: int, *, mlp_ratio: float = 4.0, layer_scale: float | None = None
    ) -> None:
        super().__init__()
        window, first = (window_size, window_size), blocks[0]
        self.query = GlobalQuery(first.dim, window, first.grid)
        self.blocks = nn.ModuleList()
        for at in blocks:
            options = {"mlp_ratio": mlp_ratio, "layer_scale": layer_scale, "drop_path": at.drop_path}
            if at.index % 2:
                mixer = GlobalQueryAttention(at.dim, at.num_heads, window_size=window, generator=False)
                self.blocks.append(ContextBlock(at.dim, mixer, **options))
            else:
                self.blocks.append(Block(at.dim, WindowAttention(at.dim, at.num_heads, window_size=window), **options))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, W, dim)` -> the same shape."""
        query = self.query(x)
        for block in self.blocks:
            x = block(x, query) if isinstance(block, ContextBlock) else block(x)
        return x


class ReduceSize(nn.Module):
    """The paper's downsampler: LayerNorm, `FusedMBConv`, 3 x 3 convolution of stride 2, LayerNorm; sides rounded up."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.conv = FusedMBConv(dim)
        self.reduction = Conv2d(dim, out_dim, 3, stride=2, padding=1, bias=False)
        self.norm2 = nn.LayerNorm(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, W, dim)` -> `(B, H / 2, W / 2, out_dim)`."""
        return self.norm2(self.reduction(self.conv(self.norm1(x))))


class GCViT(Hierarchical):
    """Stem of stride 4, four `GlobalContextStage`s with `ReduceSize` between them, LayerNorm, mean, linear.

    Args:
        dim: channels of the first stage; they double from stage to stage.
        window_size: of each stage; None is the paper's for `img_size`: 1/32 of it, and twice that in the third stage.
        layer_scale: initial factor of each branch, or None for no factors.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0.
    """

    authors_keys = KeyMap(
        rules=[
            (r"^patch_embed\.proj\.", "stem.0."),
            (r"^patch_embed\.conv_down\.", "stem.1."),
            (r"^levels\.(\d+)\.downsample\.", lambda m: f"downs.{int(m[1]) + 1}."),
            (r"^levels\.(\d+)\.blocks\.", r"stages.\1.0.blocks."),
            (r"^levels\.(\d+)\.q_global_gen\.to_q_global\.(\d+)\.conv\.", r"stages.\1.0.query.features.\2."),
            (r"(\.conv|\.features\.\d+)\.0\.", r"\1.depthwise."),
            (r"(\.conv|\.features\.\d+)\.2\.fc\.0\.", r"\1.se.fc1."),
            (r"(\.conv|\.features\.\d+)\.2\.fc\.2\.", r"\1.se.fc2."),
            (r"(\.conv|\.features\.\d+)\.3\.", r"\1.project."),
            (r"\.attn\.relative_position_bias_table$", ".attn.bias.table"),
            (r"(\.blocks\.\d*[13579])\.attn\.qkv\.", r"\1.attn.kv."),  # every second block has global queries
            (r"\.attn\.", ".mixer."),
            (r"\.gamma([12])$", r".scale\1.gamma"),
        ],
        drop=[r"relative_position_index$"],
    )

    def __init__(
        self,
        *,
        dim: int = 64,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        window_size: Sequence[int] | None = None,
        mlp_ratio: float = 3.0,
        layer_scale: float | None = None,
        img_size: int = 224,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        dims = [dim * 2**stage for stage in range(len(depths))]
        strides = [4 * 2**stage for stage in range(len(depths))]
        if window_size is None:
            side = -(-img_size // 32)
            window_size = [2 * side if stage == 2 else side for stage in range(len(depths))]
        stages = places(dims, depths, num_heads, strides, img_size, drop_path_rate)
        super().__init__(
            stem=nn.Sequential(Conv2d(in_chans, dim, 3, stride=2, padding=1), ReduceSize(dim, dim)),
            downs=[nn.Identity(), *(ReduceSize(a, b) for a, b in pairwise(dims))],
            stages=[
                [GlobalContextStage(blocks, window, mlp_ratio=mlp_ratio, layer_scale=layer_scale)]
                for blocks, window in zip(stages, window_size, strict=True)
            ],
            dims=dims,
            strides=strides,
            norm=nn.LayerNorm(dims[-1]),
            num_classes=num_classes,
            in_chans=in_chans,
        )
        self.apply(vit_init)

    def no_weight_decay(self) -> set[str]:
        """The position tables."""
        return {name for name, _ in self.named_parameters() if name.endswith("bias.table")}

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Resize bias tables of another window size (bicubic)."""
        return resize_bias_tables(state, self.state_dict())


_SMALL = {"dim": 96, "num_heads": (3, 6, 12, 24), "layer_scale": 1e-5}
_LARGE = {
    "dim": 192,
    "depths": (3, 4, 19, 5),
    "num_heads": (6, 12, 24, 48),
    "mlp_ratio": 2.0,
    "layer_scale": 1e-5,
}
_BASE = {**_LARGE, "dim": 128, "num_heads": (4, 8, 16, 32)}
_FINER = (
    "parameters of the authors' code; the FLOPs of its README (120.4 at 384 px, 245.0 at 512) are more than the released "
    "configuration computes (103.9 and 202.1), so no figure is held to them"
)

SYSTEM = register_system(
    System(
        slug="gcvit",
        title="Global Context Vision Transformers",
        year=2022,
        arxiv="2206.09959",
        evidence="authors_code",
        repo="NVlabs/GCVit",
        idea="Window attention in which every second block asks with queries that summarise the whole map.",
        mixers=("global_query",),
        variants=(
            image_variant("gcvit_xxtiny", GCViT, 11_995_428, 2.140, 0.2),
            image_variant("gcvit_xtiny", GCViT, 19_981_294, 2.936, 0.2, depths=(3, 4, 6, 5)),
            image_variant("gcvit_tiny", GCViT, 28_221_974, 4.791, 0.2, depths=(3, 4, 19, 5)),
            image_variant("gcvit_tiny2", GCViT, 34_535_654, 6.213, 0.25, depths=(3, 4, 29, 5)),
            image_variant("gcvit_small", GCViT, 51_092_173, 8.575, 0.3, depths=(3, 4, 19, 5), mlp_ratio=2.0, **_SMALL),
            image_variant("gcvit_small2", GCViT, 68_615_197, 11.586, 0.35, depths=(3, 4, 23, 5), **_SMALL),
            image_variant("gcvit_base", GCViT, 90_320_836, 14.877, 0.5, **_BASE),
            image_variant("gcvit_large", GCViT, 202_075_570, 32.6, 0.5, source=README_FLOPS, **_LARGE),
            image_variant("gcvit_large_384", GCViT, 202_860_610, None, 0.1, 384, source=_FINER, **_LARGE),
            image_variant("gcvit_large_512", GCViT, 203_795_362, None, 0.1, 512, source=_FINER, **_LARGE),
        ),
        reports=(
            "ImageNet-1K top-1 at 224 px: XXT 79.9, XT 82.0, T 83.5, T2 83.7, S 84.3, S2 84.8, B 85.0, L 85.7 (README)",
            "ImageNet-1K top-1 of L, pre-trained on ImageNet-21K: 86.6 at 224 px, 87.4 at 384, 87.6 at 512",
        ),
    )
)
