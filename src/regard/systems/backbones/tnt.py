"""TNT: Transformer in Transformer (Han et al., 2021, arXiv 2103.00112).

Every patch ("sentence") keeps smaller pieces of itself ("words"). A block lets the words of a patch attend to each
other, adds what they say to the token of the patch, and then lets the patches attend to each other as in a ViT.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from regard import checks, ops
from regard.checkpoint import KeyMap
from regard.layers import Block, Conv2d, Mixer, heads_of, linear_rates, vit_init
from regard.layouts.windows import pad_to_multiple, partition
from regard.registry import System, image_variant, register_mixer, register_system
from regard.skeletons import Isotropic
from regard.systems.backbones._pyramid_tnt import PyramidTNT
from regard.systems.backbones._words import AUTHORS_WORDS, WordBlock, WordsToSentence


class WordAttention(Mixer):
    """Dense attention with one matrix for q and k and one for v, without biases (the paper's MSA, inner and outer)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.head_dim = heads_of(dim, num_heads)
        self.dim, self.num_heads = dim, num_heads
        self.qk = nn.Linear(dim, 2 * dim, bias=False)
        self.v = nn.Linear(dim, dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        self.check(x)
        q, k = self.qk(x).unflatten(-1, (2, self.num_heads, self.head_dim)).unbind(-3)
        v = self.v(x).unflatten(-1, (self.num_heads, self.head_dim))
        return self.proj(ops.attention(q, k, v).flatten(-2))  # type: ignore[union-attr]

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}"


@register_mixer("tnt")
class InnerOuterAttention(Mixer):
    r"""Attention inside each token, then among tokens, for 1, 2 or 3 spatial axes (section 2.2, eq. 1 to 5).

    $$Y \leftarrow Y + \mathrm{MSA}(\mathrm{LN}(Y)),\ Y \leftarrow Y + \mathrm{MLP}(\mathrm{LN}(Y));\quad
      s = \mathrm{LN}(W\,\mathrm{LN}(\mathrm{Vec}(Y)));\quad \mathrm{out} = s + \mathrm{MSA}(\mathrm{LN}(x + s))$$

    with Y the m words of a token x, `(m, dim / m)`. The first attention never leaves a token, so it costs m² a token.

    Departure: in the model (`TNTBlock`) words come from the pixels of a patch and are carried from block to block beside
    the tokens. A mixer has only its tokens, so here it makes the words from them: Y = x W_y + positions.

    Args:
        dim: channels. num_heads: of the outer attention; divides dim.
        words: m; None is the largest of 16, 8, 4, 2, 1 that leaves words of at least 8 channels (the paper has 16 of
            dim / 16). inner_heads: of the inner attention; None is the largest of 4, 2, 1 that divides dim / m.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        words: int | None = None,
        inner_heads: int | None = None,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        heads_of(dim, num_heads)
        if words is None:
            words = next((m for m in (16, 8, 4, 2) if dim % m == 0 and dim // m >= 8), 1)
        (words,) = checks.tuple_of("words", words, 1)
        checks.divisible("dim", dim, "words", words)
        self.dim, self.num_heads, self.words, width = dim, num_heads, words, dim // words
        if inner_heads is None:
            inner_heads = next(heads for heads in (4, 2, 1) if width % heads == 0)
        self.split = nn.Linear(dim, dim)
        self.position = nn.Parameter(nn.init.trunc_normal_(torch.empty(words, width), std=0.02))
        self.inner = WordBlock(words, width, dim, WordAttention(width, inner_heads), mlp_ratio=mlp_ratio)
        self.norm = nn.LayerNorm(dim)
        self.outer = WordAttention(dim, num_heads)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        self.check(x)
        words = self.split(x).flatten(1, -2).unflatten(-1, self.position.shape) + self.position
        said = self.inner(words)[1].view(x.shape)
        return said + self.outer(self.norm(x + said))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, words={self.words}"


class TNTBlock(nn.Module):
    """A transformer block over the words of each patch, what they say added to its token, and one over the tokens.

    Args:
        words, inner_dim, inner_heads: words of a patch, their channels and heads; 0 words leaves the inner block out.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        words: int,
        inner_dim: int,
        inner_heads: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        options = {"mlp_ratio": mlp_ratio, "drop_path": drop_path}
        self.words = None
        if words:
            self.words = WordBlock(words, inner_dim, dim, WordAttention(inner_dim, inner_heads), **options)
        self.outer = Block(dim, WordAttention(dim, num_heads), **options)

    def forward(self, words: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Words `(B, N, m, c)` and tokens `(B, 1 + N, dim)`, class token first -> the same shapes."""
        if self.words is not None:
            words, said = self.words(words)
            x = torch.cat([x[:, :1], x[:, 1:] + said], 1)
        return words, self.outer(x)


class WordEmbed(nn.Module):
    """A 7 x 7 convolution inside each patch, which sees zeros beyond it: `(B, H, W, C)` -> `(B, H/p, W/p, m, inner_dim)`.

    A side that is no multiple of the patch is zero-padded at its end.
    """

    def __init__(self, in_chans: int, inner_dim: int, patch_size: int, stride: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = Conv2d(in_chans, inner_dim, 7, stride=stride, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        """Channels-last image in, words by patches out."""
        sizes = (self.patch_size, self.patch_size)
        x = pad_to_multiple(x, sizes)
        batch, grid = x.shape[0], [side // self.patch_size for side in x.shape[1:3]]
        patches = partition(x, sizes).flatten(0, 1).unflatten(1, sizes)
        return self.proj(patches).flatten(1, 2).unflatten(0, (batch, *grid))


class TNT(Isotropic):
    """Words from each patch, tokens from their words, class token, position tables, `TNTBlock`s, LayerNorm, linear.

    Args:
        inner_dim, inner_heads: channels and heads of the words. inner_stride: pixels per word.
        inner_blocks: how many blocks, counted from the first, have an inner one; None is all.
        img_size: position tables are built for it; images of other sizes run too.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0.
    """

    authors_keys = KeyMap(
        rules=[
            (r"^patch_embed\.", "stem."),
            (r"^outer_pos$", "pos_embed"),
            (r"^inner_pos$", "word_position"),
            *AUTHORS_WORDS,
            (r"^words\.project\.", "project."),  # the projection before the first block
        ],
        drop=[r"^outer_tokens$"],  # zeros that the released code keeps and never uses
    )

    def __init__(
        self,
        *,
        dim: int = 384,
        inner_dim: int = 24,
        depth: int = 12,
        num_heads: int = 6,
        inner_heads: int = 4,
        mlp_ratio: float = 4.0,
        patch_size: int = 16,
        inner_stride: int = 4,
        inner_blocks: int | None = None,
        img_size: int = 224,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        words, side = (-(-patch_size // inner_stride)) ** 2, -(-img_size // patch_size)
        blocks = [
            TNTBlock(
                dim,
                num_heads,
                words=words if inner_blocks is None or index < inner_blocks else 0,
                inner_dim=inner_dim,
                inner_heads=inner_heads,
                mlp_ratio=mlp_ratio,
                drop_path=rate,
            )
            for index, rate in enumerate(linear_rates(drop_path_rate, depth))
        ]
        super().__init__(
            stem=WordEmbed(in_chans, inner_dim, patch_size, inner_stride),
            blocks=blocks,
            dim=dim,
            grid=(side, side),
            stride=patch_size,
            num_classes=num_classes,
            in_chans=in_chans,
            position=True,
            class_token=True,
        )
        self.word_position = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, words, inner_dim), std=0.02))
        self.project = WordsToSentence(words, inner_dim, dim, bias=True)
        self.apply(vit_init)

    def no_weight_decay(self) -> set[str]:
        """Class token and position tables."""
        return super().no_weight_decay() | {"word_position"}

    def _sequences(self, x: Tensor) -> Iterator[tuple[Tensor, tuple[int, int]]]:
        """Tokens `(B, 1 + H W, dim)` after each block, and the grid."""
        words = self.stem(x.movedim(1, -1)) + self.word_position
        x, grid = self._enter(self.project(words))
        words = words.flatten(1, 2)
        for block in self.blocks:
            words, x = block(words, x)
            yield x, grid

    def stages_forward(self, x: Tensor) -> list[Tensor]:
        """`(B, in_chans, H, W)` -> the tokens after each block, as grids without the class token."""
        return [tokens[:, 1:].unflatten(1, grid) for tokens, grid in self._sequences(x)]

    def forward_features(self, x: Tensor) -> Tensor:
        """`(B, in_chans, H, W)` -> normalised tokens `(B, 1 + H' W', dim)`, class token first."""
        self.check_image(x)
        *_, (tokens, _) = self._sequences(x)
        return self.norm(tokens)


_PYRAMID = (
    "parameters of the authors' code in the released configuration; FLOPs of its README (2201.00978), one decimal"
)
_ROUNDED = "parameters of the authors' code; the 0.6 GFLOPs of its README are too coarse to compare with"
_FROZEN = "trainable parameters of the authors' code (it carries unused zeros besides), and its multiply-adds"
_S = {"dims": (128, 256, 512, 512), "depths": (2, 8, 4, 2), "num_heads": (4, 8, 16, 16), "inner_dims": (8, 16, 32, 32)}
_S |= {"inner_heads": (2, 4, 8, 8)}
_M = {**_S, "dims": (192, 384, 768, 768), "depths": (2, 8, 6, 2), "inner_dims": (12, 24, 48, 48)}
_B = {**_S, "dims": (256, 512, 1024, 1024), "depths": (2, 10, 6, 2), "inner_dims": (16, 32, 64, 64)}

SYSTEM = register_system(
    System(
        slug="tnt",
        title="Transformer in Transformer",
        year=2021,
        arxiv="2103.00112",
        evidence="authors_code",
        repo="huawei-noah/Efficient-AI-Backbones",
        idea="A small transformer over the pieces of each patch feeds the transformer over patches.",
        mixers=("tnt",),
        variants=(
            image_variant(
                "tnt_tiny",
                TNT,
                6_076_408,
                1.418,
                0.1,
                dim=192,
                inner_dim=12,
                num_heads=3,
                inner_heads=2,
                source=_FROZEN,
            ),
            image_variant("tnt_small", TNT, 23_768_584, 5.245, 0.1, source=_FROZEN),
            image_variant(
                "tnt_base", TNT, 65_428_680, 14.096, 0.1, dim=640, inner_dim=40, num_heads=10, source=_FROZEN
            ),
            image_variant("pyramid_tnt_tiny", PyramidTNT, 10_578_529, None, 0.1, 192, source=_ROUNDED),
            image_variant("pyramid_tnt_small", PyramidTNT, 31_953_200, 3.3, 0.1, 256, source=_PYRAMID, **_S),
            image_variant("pyramid_tnt_medium", PyramidTNT, 84_943_572, 8.2, 0.1, 256, source=_PYRAMID, **_M),
            image_variant("pyramid_tnt_base", PyramidTNT, 156_990_072, 16.0, 0.1, 256, source=_PYRAMID, **_B),
        ),
        reports=(
            "ImageNet-1K top-1 at 224 px: TNT-S 81.5, TNT-B 82.9; DeiT-S 79.8 with 22.1M parameters and 4.6 GFLOPs",
            "ImageNet-1K top-1 of PyramidTNT: Ti 75.2, S 82.0, M 83.5, B 84.1 (README)",
        ),
    )
)
