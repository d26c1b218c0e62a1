"""DeiT (Touvron et al., 2021, arXiv 2012.12877) as a host: a plain vision transformer with a class token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from regard.layers import Block, PatchEmbed, vit_init
from regard.skeletons.isotropic import Isotropic
from regard.skeletons.place import MixerAt, places


class TokenBlock(Block):
    """A `Block` on a sequence "class token, then the grid", whose mixer or MLP gets the two apart.

    A part with `class_token = True` maps `(grid (B, H, W, dim), class token (B, 1, dim))` to such a pair; another maps the
    sequence.
    """

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:  # type: ignore[override]
        """`(B, 1 + H W, dim)` -> the same shape."""
        x = x + self.drop_path(self.scale1(_run(self.mixer, self.norm1(x), grid)))
        return x + self.drop_path(self.scale2(_run(self.mlp, self.norm2(x), grid)))


def _run(part: nn.Module, x: Tensor, grid: tuple[int, int]) -> Tensor:
    if not _takes_class_token(part):
        return part(x)
    tokens, first = part(x[:, 1:].unflatten(1, grid), x[:, :1])
    return torch.cat([first, tokens.flatten(1, 2)], 1)


def _takes_class_token(part: nn.Module | None) -> bool:
    return bool(getattr(part, "class_token", False))


class DeiT(Isotropic):
    """Patches, class token, position table, blocks at one resolution, LayerNorm, linear on the class token.

    Args:
        mixer: builds the mixer of each block. One with `class_token = True` gets grid and class token apart
            (`TokenBlock`); any other gets the whole sequence.
        mlp: builds the MLP of each block from its width, with the same choice; None is `Mlp`.
        stem: replaces the patch embedding. position: whether there is a position table.
        img_size: position tables are built for it; images of other sizes run too.
    """

    host_rules: ClassVar = ((r"^patch_embed\.", "stem."), (r"^(blocks\.\d+)\.attn\.", r"\1.mixer."))
    """The authors' names outside of the mixers."""

    plain_block: ClassVar[type[Block]] = Block
    """Of parts that take the whole sequence."""

    def __init__(
        self,
        *,
        mixer: MixerAt,
        dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        patch_size: int = 16,
        img_size: int = 224,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
        mlp: Callable[[int], nn.Module] | None = None,
        stem: nn.Module | None = None,
        position: bool = True,
    ) -> None:
        norm = partial(nn.LayerNorm, eps=1e-6)
        (stage,) = places([dim], [depth], [num_heads], [patch_size], img_size, drop_path_rate)
        blocks: list[nn.Module] = []
        for place in stage:
            made, feed = mixer(place), None if mlp is None else mlp(dim)
            kind = TokenBlock if _takes_class_token(made) or _takes_class_token(feed) else self.plain_block
            blocks.append(kind(dim, made, mlp=feed, mlp_ratio=mlp_ratio, norm=norm, drop_path=place.drop_path))
        super().__init__(
            stem=PatchEmbed(in_chans, dim, patch_size, norm=False) if stem is None else stem,
            blocks=blocks,
            dim=dim,
            grid=stage[0].grid,
            stride=patch_size,
            num_classes=num_classes,
            in_chans=in_chans,
            norm=norm(dim),
            position=position,
            class_token=True,
        )
        self.apply(vit_init)

    def _sequences(self, x: Tensor) -> Iterator[tuple[Tensor, tuple[int, int]]]:
        """Tokens `(B, 1 + H W, dim)` after each block, and the grid."""
        x, grid = self._embed(x)
        for block in self.blocks:
            x = block(x, grid) if isinstance(block, TokenBlock) else block(x)
            yield x, grid

    def stages_forward(self, x: Tensor) -> list[Tensor]:
        """`(B, in_chans, H, W)` -> the tokens after each block, as grids without the class token."""
        return [tokens[:, 1:].unflatten(1, grid) for tokens, grid in self._sequences(x)]

    def forward_features(self, x: Tensor) -> Tensor:
        """`(B, in_chans, H, W)` -> normalised tokens `(B, 1 + H' W', dim)`, class token first."""
        self.check_image(x)
        *_, (tokens, _) = self._sequences(x)
        return self.norm(tokens)
