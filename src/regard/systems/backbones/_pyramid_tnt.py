"""PyramidTNT: Improved Transformer-in-Transformer Baselines with Pyramid Architecture (Han et al., 2022, arXiv 2201.00978).

TNT with a convolutional stem, four stages of shrinking maps, a learned bias for each pair of tokens, and words that only
the first one or two blocks of a stage work on. It follows the authors' published code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import ops
from regard.checkpoint import KeyMap
from regard.layers import BatchNorm, ContextBlock, Conv2d, Mixer, SoftmaxAttention, fan_out_init, heads_of, resize_map
from regard.layouts.windows import pad_to_multiple, partition
from regard.skeletons import Hierarchical, Place, places
from regard.systems.backbones._words import AUTHORS_WORDS, WordBlock

WORDS = 4
"""Words along each side of a patch."""


class PooledAttention(Mixer):
    r"""Dense attention whose keys and values come from averages over r x r tokens, with a bias given from outside.

    $$\mathrm{out} = W_o\,\mathrm{softmax}(d^{-1/2} Q K^\top + B)\,V,\quad
      K, V = \mathrm{LN}(W\,\mathrm{pool}_r(x))\,W_{kv}$$

    With r = 1 keys and values come from the tokens themselves.
    """

    dims = (2,)

    def __init__(self, dim: int, num_heads: int, *, reduction: int = 1) -> None:
        super().__init__()
        self.head_dim = heads_of(dim, num_heads)
        self.dim, self.num_heads, self.reduction = dim, num_heads, reduction
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(dim, 2 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.reduce = nn.Sequential(nn.Linear(dim, dim), nn.LayerNorm(dim)) if reduction > 1 else nn.Identity()

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """`(B, H, W, dim)`, bias `(1, heads, H W, ⌈H / r⌉ ⌈W / r⌉)` -> the shape of x."""
        self.check(x)
        coarse = x
        if self.reduction > 1:
            image = x.movedim(-1, 1)
            coarse = F.avg_pool2d(image, self.reduction, ceil_mode=True, count_include_pad=False).movedim(1, -1)
        q = self.q(x).unflatten(-1, (self.num_heads, self.head_dim))
        k, v = self.kv(self.reduce(coarse)).unflatten(-1, (2, self.num_heads, self.head_dim)).unbind(-3)
        return self.proj(ops.attention(q, k, v, bias=bias).flatten(-2))  # type: ignore[union-attr]


class PairBias(nn.Module):
    """A learned number for each head, query and key on the built grid; interpolated on others.

    `table` is `(1, heads, H W, (H / r) (W / r))`.
    """

    def __init__(self, num_heads: int, grid: Sequence[int], reduction: int) -> None:
        super().__init__()
        self.grid, self.reduction = tuple(grid), reduction
        self.table = nn.Parameter(torch.randn(1, num_heads, math.prod(grid), math.prod(self._coarse(grid))))

    def _coarse(self, grid: Sequence[int]) -> list[int]:
        return [-(-side // self.reduction) for side in grid]

    def forward(self, grid: Sequence[int]) -> Tensor:
        """The bias among the tokens of `grid`: `(1, heads, queries, keys)`."""
        if tuple(grid) == self.grid:
            return self.table
        keys = self.table[0].unflatten(-1, self._coarse(self.grid))
        table = resize_map(keys, self._coarse(grid)).flatten(2)
        queries = table.mT.unflatten(-1, self.grid)
        return resize_map(queries, grid).flatten(2).mT[None]


class WordsNorm(nn.LayerNorm):
    """LayerNorm over all words of a patch at once: `(patches, words, dim)` -> the same shape."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalised over the last two axes."""
        return super().forward(x.flatten(-2)).view(x.shape)


class PyramidBlock(nn.Module):
    """Optionally words and what they say to the tokens, then a block over tokens."""

    def __init__(self, at: Place, reduction: int, mlp_ratio: float, inner: tuple[int, int] | None) -> None:
        super().__init__()
        self.words = None
        options = {"mlp_ratio": mlp_ratio, "drop_path": at.drop_path}
        if inner is not None:
            width, heads = inner
            mixer = SoftmaxAttention(width, heads, qkv_bias=False)
            self.words = WordBlock(WORDS**2, width, at.dim, mixer, norm=_words_norm, **options)
        self.outer = ContextBlock(at.dim, PooledAttention(at.dim, at.num_heads, reduction=reduction), **options)

    def forward(self, words: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Words `(B, H W, m, c)` and tokens `(B, H, W, dim)` -> the same shapes."""
        if self.words is not None:
            words, said = self.words(words)
            x = x + said.view(x.shape)
        return words, self.outer(x, bias)


def _words_norm(width: int) -> WordsNorm:
    return WordsNorm(WORDS**2 * width)


class PyramidStage(nn.Module):
    """Blocks that share one `PairBias`."""

    def __init__(self, blocks: Sequence[Place], inner: tuple[int, int], reduction: int, mlp_ratio: float) -> None:
        super().__init__()
        # Words are worked on by the first block, and in long stages by the second.
        with_words = 2 if len(blocks) > 6 else 1
        self.blocks = nn.ModuleList(
            PyramidBlock(at, reduction, mlp_ratio, inner if at.index < with_words else None) for at in blocks
        )
        self.bias = PairBias(blocks[0].num_heads, blocks[0].grid, reduction)

    def forward(self, words: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Words `(B, H W, m, c)` and tokens `(B, H, W, dim)` -> the same shapes."""
        bias = self.bias(x.shape[1:3])
        for block in self.blocks:
            words, x = block(words, x, bias)
        return words, x


class Aggregation(nn.Module):
    """The step between stages, of words and of tokens: LayerNorm and a 3 x 3 convolution of stride 2 each.

    The words of 2 x 2 patches are put side by side first, so that a patch keeps their number. An odd side of the map is
    filled up with patches of zeros.
    """

    def __init__(self, inner_dim: int, inner_out: int, dim: int, out_dim: int) -> None:
        super().__init__()
        self.word_norm, self.norm = nn.LayerNorm(inner_dim), nn.LayerNorm(dim)
        self.word_conv = Conv2d(inner_dim, inner_out, 3, stride=2, padding=1)
        self.conv = Conv2d(dim, out_dim, 3, stride=2, padding=1)

    def forward(self, words: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Words `(B, H W, m, c)` and tokens `(B, H, W, dim)` -> those of a map of half the sides."""
        grid = pad_to_multiple(self.word_norm(words).unflatten(1, x.shape[1:3]), (2, 2))
        batch, height, width, _, channels = grid.shape
        grid = grid.view(batch, height // 2, 2, width // 2, 2, WORDS, WORDS, channels).permute(0, 1, 3, 2, 5, 4, 6, 7)
        merged = self.word_conv(grid.reshape(-1, 2 * WORDS, 2 * WORDS, channels))
        words = merged.flatten(1, 2).unflatten(0, (batch, height * width // 4))
        return words, self.conv(self.norm(x))


def _conv(in_chans: int, dim: int, stride: int) -> list[nn.Module]:
    return [Conv2d(in_chans, dim, 3, stride=stride, padding=1), BatchNorm(dim), nn.ReLU()]


class PyramidStem(nn.Module):
    """Convolutions to words of 2 x 2 pixels, and to tokens of 8 x 8; with a position table each.

    A side that is no multiple of 8 is zero-padded at its end.
    """

    def __init__(self, in_chans: int, inner_dim: int, dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.common = nn.Sequential(*_conv(in_chans, 2 * inner_dim, 2))
        self.to_words = nn.Sequential(*_conv(2 * inner_dim, inner_dim, 1))
        self.to_tokens = nn.Sequential(
            *_conv(2 * inner_dim, 4 * inner_dim, 2),
            *_conv(4 * inner_dim, 8 * inner_dim, 2),
            *_conv(8 * inner_dim, dim, 1),
        )
        self.word_position = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, WORDS**2, inner_dim), std=0.02))
        self.position = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, math.prod(grid), dim), std=0.02))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`(B, H, W, in_chans)` -> words `(B, H W / 64, m, c)` and tokens `(B, H / 8, W / 8, dim)`."""
        x = self.common(pad_to_multiple(x, (8, 8)))
        tokens = self.to_tokens(x)
        position = resize_map(self.position.unflatten(1, self.grid).movedim(-1, 1), tokens.shape[1:3]).movedim(1, -1)
        return partition(self.to_words(x), (WORDS, WORDS)) + self.word_position, tokens + position


class PyramidTNT(Hierarchical):
    """Stem of stride 8, four stages with an `Aggregation` between them, LayerNorm, mean, linear.

    Args:
        dims, depths, num_heads: of the tokens of each stage. inner_dims, inner_heads: of the words.
        reductions: of the keys of each stage.
        img_size: tables of positions and pairs are built for it; images of other sizes interpolate them.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0.
    """

    authors_keys = KeyMap(
        rules=[
            (r"^outer_pos$", "stem.position"),
            (r"^inner_pos$", "stem.word_position"),
            (r"^patch_embed\.common_conv\.", "stem.common."),
            (r"^patch_embed\.inner_convs\.", "stem.to_words."),
            (r"^patch_embed\.outer_convs\.", "stem.to_tokens."),
            (r"^word_merges\.(\d)\.(norm|conv)\.(?:0\.)?", lambda m: f"downs.{int(m[1]) + 1}.word_{m[2]}."),
            (r"^sentence_merges\.(\d)\.(norm|conv)\.(?:0\.)?", lambda m: f"downs.{int(m[1]) + 1}.{m[2]}."),
            (r"\.relative_pos$", ".bias.table"),
            *AUTHORS_WORDS,
            (r"outer\.mixer\.linear\.", "outer.mixer.reduce.0."),
            (r"outer\.mixer\.norm\.", "outer.mixer.reduce.1."),
            (r"^stages\.(\d)\.", r"stages.\1.0."),
        ]
    )

    def __init__(
        self,
        *,
        dims: Sequence[int] = (80, 160, 320, 320),
        depths: Sequence[int] = (2, 6, 3, 2),
        num_heads: Sequence[int] = (2, 4, 8, 8),
        inner_dims: Sequence[int] = (5, 10, 20, 20),
        inner_heads: Sequence[int] = (1, 2, 4, 4),
        reductions: Sequence[int] = (4, 2, 1, 1),
        mlp_ratio: float = 4.0,
        img_size: int = 192,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        strides = [8 * 2**stage for stage in range(len(dims))]
        stages = list(places(dims, depths, num_heads, strides, img_size, drop_path_rate))
        inner = list(zip(inner_dims, inner_heads, strict=True))
        merges = [
            Aggregation(*pairs) for pairs in zip(inner_dims[:-1], inner_dims[1:], dims[:-1], dims[1:], strict=True)
        ]
        super().__init__(
            stem=PyramidStem(in_chans, inner_dims[0], dims[0], stages[0][0].grid),
            downs=[nn.Identity(), *merges],
            stages=[
                [PyramidStage(blocks, words, reduction, mlp_ratio)]
                for blocks, words, reduction in zip(stages, inner, reductions, strict=True)
            ],
            dims=dims,
            strides=strides,
            norm=nn.LayerNorm(dims[-1]),
            num_classes=num_classes,
            in_chans=in_chans,
        )
        self.apply(fan_out_init)

    def no_weight_decay(self) -> set[str]:
        """The position tables."""
        return {"stem.position", "stem.word_position"}

    def stages_forward(self, x: Tensor) -> list[Tensor]:
        """`(B, in_chans, H, W)` -> channels-last maps of all stages."""
        words, x = self.stem(x.movedim(1, -1))
        maps: list[Tensor] = []
        for down, stage in zip(self.downs, self.stages, strict=True):
            if maps:
                words, x = down(words, x)
            words, x = stage[0](words, x)  # type: ignore[index]
            maps.append(x)
        return maps
