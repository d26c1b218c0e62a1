"""DaViT: Dual Attention Vision Transformers (Ding et al., 2022, arXiv 2204.03645).

Blocks take turns: attention among the tokens of a window, then attention among channels, where a token is a channel and
its features are the whole map. Channels attend in groups, so a block that sees the whole image costs linear time.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from regard import checks, ops
from regard.checkpoint import KeyMap
from regard.layers import Conv2d, ConvEmbed, DropPath, Mixer, Mlp, depthwise, heads_of, linear_rates, vit_init
from regard.layouts.windows import crop, pad_to_multiple
from regard.registry import System, Variant, register_mixer, register_system
from regard.skeletons import Hierarchical


@register_mixer("channel")
class ChannelAttention(Mixer):
    r"""Channel group attention: softmax attention whose tokens are channels (section 3.3).

    $$\mathrm{out} = W_o\,[\mathrm{softmax}(d^{-1/2} Q_g^\top K_g)\, V_g^\top]^\top_{groups},\quad
      Q_g, K_g, V_g \in R^{N \times d}$$

    The d channels of a group attend to each other by products over all N positions, so every output position depends on
    every input position, at N d products a channel. The scale uses d although the products run over N, as published.

    The authors name the thirds of the projection by what they hold in attention over positions; in the equation's terms
    they are, in their order, values, queries and keys.

    Args:
        dim: channels. num_heads: number of groups; divides dim.
        qkv_bias: whether the projection to values, queries and keys has a bias.
    """

    authors_keys = KeyMap(rules=[(r"^qkv\.", "vqk.")])

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool = True) -> None:
        super().__init__()
        self.group_dim = heads_of(dim, num_heads)
        self.dim, self.num_heads = dim, num_heads
        self.vqk = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        self.check(x)
        grouped = self.vqk(x.flatten(1, -2)).unflatten(-1, (3, self.num_heads, self.group_dim))
        # Group by group, whose products take rows of the map as they lie: no transposed copy of the map is made.
        out = [
            v @ (self.group_dim**-0.5 * (q.transpose(1, 2) @ k)).softmax(-1).transpose(1, 2)
            for v, q, k in (group.unbind(2) for group in grouped.unbind(3))
        ]
        return self.proj(torch.cat(out, -1).view(x.shape))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}"


class SpatialAttention(Mixer):
    r"""Attention inside windows, without position bias and without shift (section 3.2).

    A map that is no multiple of the window is padded with zeros at its end before the projection, and the padding takes
    part in the softmax (its keys and values are the projection's bias), as in the authors' code. One to three axes.
    """

    def __init__(self, dim: int, num_heads: int, *, window_size: int = 7, qkv_bias: bool = True) -> None:
        super().__init__()
        self.head_dim = heads_of(dim, num_heads)
        checks.positive("window_size", window_size)
        self.dim, self.num_heads, self.window_size = dim, num_heads, window_size
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        spatial = self.check(x)
        padded = pad_to_multiple(x, [self.window_size] * len(spatial))
        q, k, v = self.qkv(padded).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        out = ops.window_attention(q, k, v, window_size=self.window_size)
        return self.proj(crop(out.flatten(-2), spatial))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, window_size={self.window_size}"


class DualBlock(nn.Module):
    r"""One of the two kinds of block, with a depthwise convolution before each branch that tells positions.

    $x \leftarrow x + c_1(x)$, $x \leftarrow x + \mathrm{mixer}(n_1(x))$,
    $x \leftarrow x + c_2(x)$, $x \leftarrow x + \mathrm{mlp}(n_2(x))$ with depthwise 3 x 3 convolutions c.
    """

    def __init__(self, dim: int, mixer: nn.Module, *, mlp_ratio: float = 4.0, drop_path: float = 0.0) -> None:
        super().__init__()
        self.position1 = depthwise(dim, 3)
        self.norm1 = nn.LayerNorm(dim)
        self.mixer = mixer
        self.position2 = depthwise(dim, 3)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, W, dim)` -> the same shape."""
        x = x + self.position1(x)
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        x = x + self.position2(x)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Downsample(nn.Module):
    """LayerNorm, then a 2 x 2 convolution of stride 2; an odd side is zero-padded."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.proj = Conv2d(dim, out_dim, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, W, dim)` -> `(B, H/2, W/2, out_dim)`."""
        return self.proj(pad_to_multiple(self.norm(x), (2, 2)))


class DaViT(Hierarchical):
    """Stem, four stages of `blocks` in turn, mean over positions, LayerNorm, linear.

    Args:
        dims, num_heads: channels of each stage; heads of its window attention, which are also its channel groups.
        depths: repetitions of `blocks` in each stage.
        blocks: the kinds of block that take turns, "spatial" and "channel" in the paper.
        window_size: of the spatial blocks. mlp_ratio: hidden width of the MLPs.
        patch_size: pixels per token of the first stage; patches are 2 patch_size - 1 pixels wide and overlap.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0.
    """

    authors_keys = KeyMap(
        rules=[
            (r"^patch_embeds\.0\.", "stem."),
            (r"^patch_embeds\.(\d+)\.", r"downs.\1."),
            (r"^main_blocks\.(\d+)\.(\d+)\.(\d+)\.", lambda m: f"stages.{m[1]}.{2 * int(m[2]) + int(m[3])}."),
            (r"\.cpe\.0\.proj\.", ".position1."),
            (r"\.cpe\.1\.proj\.", ".position2."),
            (r"\.attn\.", ".mixer."),
            (r"^(stages\.\d+\.\d*[13579]\.mixer)\.qkv\.", r"\1.vqk."),  # every second block is a channel block
            (r"^norms\.", "head_norm."),
        ]
    )

    def __init__(
        self,
        dims: Sequence[int] = (96, 192, 384, 768),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        depths: Sequence[int] = (1, 1, 3, 1),
        blocks: Sequence[str] = ("spatial", "channel"),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        patch_size: int = 4,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        def mixer(kind: str, dim: int, heads: int) -> Mixer:
            checks.one_of("blocks", kind, ("spatial", "channel"))
            if kind == "channel":
                return ChannelAttention(dim, heads)
            return SpatialAttention(dim, heads, window_size=window_size)

        rates = iter(linear_rates(drop_path_rate, len(blocks) * sum(depths)))
        super().__init__(
            stem=ConvEmbed(in_chans, dims[0], 2 * patch_size - 1, patch_size, patch_size - 1),
            downs=[nn.Identity(), *(Downsample(a, b) for a, b in pairwise(dims))],
            stages=[
                [
                    DualBlock(width, mixer(kind, width, heads), mlp_ratio=mlp_ratio, drop_path=next(rates))
                    for _ in range(depth)
                    for kind in blocks
                ]
                for width, heads, depth in zip(dims, num_heads, depths, strict=True)
            ],
            dims=dims,
            strides=[patch_size * 2**stage for stage in range(len(dims))],
            head_norm=nn.LayerNorm(dims[-1]),
            num_classes=num_classes,
            in_chans=in_chans,
        )
        self.apply(vit_init)


_DEEP = (1, 1, 9, 1)


def _variant(name: str, params: int, gmacs: float, size: int = 224, **options: Any) -> Variant:
    source = "comments and class of the authors' repository"
    return Variant(
        name,
        DaViT,
        params,
        gmacs,
        inputs=((1, 3, size, size),),
        source=source,
        options={**options, "drop_path_rate": 0.1},
    )


SYSTEM = register_system(
    System(
        slug="davit",
        title="DaViT: Dual Attention Vision Transformers",
        year=2022,
        arxiv="2204.03645",
        evidence="authors_code",
        repo="dingmyu/davit",
        idea="Attention among tokens of a window and attention among channels, which sees the whole image, take turns.",
        mixers=("channel",),
        variants=(
            _variant("davit_tiny", 28_360_168, 4.540244736),
            _variant("davit_small", 49_745_896, 8.800488192, depths=_DEEP),
            _variant(
                "davit_base",
                87_954_408,
                15.51043072,
                dims=(128, 256, 512, 1024),
                num_heads=(4, 8, 16, 32),
                depths=_DEEP,
            ),
            _variant(
                "davit_large_384",
                196_811_752,
                102.966676992,
                size=384,
                dims=(192, 384, 768, 1536),
                num_heads=(6, 12, 24, 48),
                depths=_DEEP,
                window_size=12,
            ),
        ),
        reports=(
            "ImageNet-1K top-1: Tiny 82.8, Small 84.2, Base 84.6 at 224 px; Giant 90.4, trained on 1.5 billion pairs",
            "COCO Mask R-CNN 3x box / mask AP: Tiny 47.4 / 42.9, Small 49.5 / 44.3, Base 49.9 / 44.6",
            "ADE20K UPerNet mIoU: Tiny 46.3, Small 48.8, Base 49.4",
        ),
    )
)
