"""What TNT and PyramidTNT share: blocks over the words of a patch, and how words become a token."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from regard.layers import Block

AUTHORS_WORDS = (
    (r"\binner_attn\.", "words.inner.mixer."),
    (r"\binner_(norm\d|mlp)\.", r"words.inner.\1."),
    (r"\bouter_attn\.", "outer.mixer."),
    (r"\bouter_(norm\d|mlp)\.", r"outer.\1."),
    (r"(\bblocks\.\d+\.|^)proj_norm1\.", r"\1words.project.0."),
    (r"(\bblocks\.\d+\.|^)proj\.", r"\1words.project.1."),
    (r"(\bblocks\.\d+\.|^)proj_norm2\.", r"\1words.project.2."),
)
"""The authors' names inside of blocks -> ours."""


class WordsToSentence(nn.Sequential):
    r"""$\mathrm{LN}(W\,\mathrm{LN}(\mathrm{Vec}(Y)))$: the words of a patch, end to end, as one token."""

    def __init__(self, words: int, inner_dim: int, dim: int, *, bias: bool = False) -> None:
        super().__init__(
            nn.LayerNorm(words * inner_dim), nn.Linear(words * inner_dim, dim, bias=bias), nn.LayerNorm(dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        """`(..., words, inner_dim)` -> `(..., dim)`."""
        return super().forward(x.flatten(-2))


class WordBlock(nn.Module):
    """A transformer block over the words of each patch, and what they say to the token of the patch.

    Args:
        words, inner_dim: words of a patch and their channels. dim: channels of the token.
        mixer: attention on `(patches, words, inner_dim)`.
    """

    def __init__(
        self,
        words: int,
        inner_dim: int,
        dim: int,
        mixer: nn.Module,
        *,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
    ) -> None:
        super().__init__()
        self.inner = Block(inner_dim, mixer, mlp_ratio=mlp_ratio, drop_path=drop_path, norm=norm)
        self.project = WordsToSentence(words, inner_dim, dim)

    def forward(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """`(B, N, words, inner_dim)` -> the same shape, and `(B, N, dim)` for the tokens."""
        words = self.inner(words.flatten(0, 1)).view(words.shape)
        return words, self.project(words)
