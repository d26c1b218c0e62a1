"""The plain vision transformer: one patch embedding, then blocks at one resolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from regard.layers import resize_sequence_table
from regard.skeletons.base import ImageModel, make_head


class Isotropic(ImageModel):
    """stem -> (+ position map) -> blocks -> norm -> mean or class token -> head.

    Without a class token the blocks see grids `(B, H, W, dim)`. With one they see sequences `(B, 1 + H W, dim)`, class
    token first, and the logits are read from it.

    Args:
        stem: image `(B, H, W, in_chans)` -> tokens. blocks: modules that keep the shape.
        grid: tokens along height and width at the trained resolution.
        position: learned position table at the trained grid (bicubic at other sizes), or False for none.
        stride: pixels per token.
    """

    def __init__(
        self,
        *,
        stem: nn.Module,
        blocks: Sequence[nn.Module],
        dim: int,
        grid: tuple[int, int],
        stride: int,
        num_classes: int,
        in_chans: int,
        norm: nn.Module | None = None,
        position: bool = False,
        class_token: bool = False,
    ) -> None:
        super().__init__()
        self.in_chans, self.num_classes, self.num_features = in_chans, num_classes, dim
        self.grid, self.feature_dims, self.feature_strides = grid, (dim,) * len(blocks), (stride,) * len(blocks)
        self.stem = stem
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        tokens = grid[0] * grid[1] + class_token
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, dim)) if position else None
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(dim) if norm is None else norm
        self.head_norm = nn.Identity()
        self.head = make_head(dim, num_classes)
        for table in (self.cls_token, self.pos_embed):
            if table is not None:
                nn.init.trunc_normal_(table, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """Class token and position table."""
        return {"cls_token", "pos_embed"}

    def _embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Image -> what the blocks take, and the grid."""
        return self._enter(self.stem(x.movedim(1, -1)))

    def _enter(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens on their grid -> what the blocks take, and the grid."""
        grid = (x.shape[1], x.shape[2])
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x.flatten(1, 2)], 1)
        if self.pos_embed is not None:
            position = resize_sequence_table(self.pos_embed, self.grid, grid)
            x = x + (position if self.cls_token is not None else position.unflatten(1, grid))
        return x, grid

    def stages_forward(self, x: Tensor) -> list[Tensor]:
        """`(B, in_chans, H, W)` -> the tokens after each block, as grids without the class token."""
        x, grid = self._embed(x)
        maps = []
        for block in self.blocks:
            x = block(x)
            maps.append(x if x.dim() == 4 else x[:, 1:].unflatten(1, grid))
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        """`(B, in_chans, H, W)` -> normalised tokens: a grid `(B, H', W', dim)`, or `(B, 1 + H' W', dim)` with class token."""
        self.check_image(x)
        x, _ = self._embed(x)
        return self.norm(self.blocks(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Normalised tokens -> logits `(B, num_classes)`, or `(B, dim)` before the classifier."""
        x = self.head_norm(x.mean((1, 2)) if x.dim() == 4 else x[:, 0])
        return x if pre_logits else self.head(x)
