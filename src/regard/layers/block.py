"""The residual block that most transformers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from regard.layers.conv import depthwise
from regard.layers.drop import DropPath, LayerScale
from regard.layers.mlp import Mlp


class Block(nn.Module):
    r"""Pre-norm residual block.

    $$x \leftarrow x + \gamma_1\,\mathrm{mixer}(n_1(x)),\qquad x \leftarrow x + \gamma_2\,\mathrm{mlp}(n_2(x))$$

    Args:
        mixer: any module on channels-last grids. mlp: None is `Mlp` with `mlp_ratio * dim` hidden channels.
        layer_scale: initial γ, or None for no γ.
        drop_path: stochastic depth of both branches.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        *,
        mlp: nn.Module | None = None,
        mlp_ratio: float = 4.0,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        act: Callable[[], nn.Module] = nn.GELU,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = norm(dim)
        self.mixer = mixer
        self.scale1: nn.Module = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm2 = norm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act=act) if mlp is None else mlp
        self.scale2: nn.Module = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        x = x + self.drop_path(self.scale1(self.mixer(self.norm1(x))))
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))


class PositionedBlock(Block):
    r"""A `Block` that learns positions from a depthwise convolution before it (Chu et al., 2021, arXiv 2102.10882).

    $$x \leftarrow x + \mathrm{DWConv}_{3 \times 3}(x), \quad\text{then as in Block}$$

    Args:
        mlp_norm: the norm before the MLP, where it is another kind than the first.
        axes: number of spatial axes. options: those of `Block`.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        *,
        mlp_norm: Callable[[int], nn.Module] | None = None,
        axes: int = 2,
        **options: Any,
    ) -> None:
        super().__init__(dim, mixer, **options)
        self.position = depthwise(dim, 3, dims=axes)
        if mlp_norm is not None:
            self.norm2 = mlp_norm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        return super().forward(x + self.position(x))


class ContextBlock(Block):
    """A `Block` whose mixer gets more than the tokens: queries, biases or whatever a host shares among its blocks."""

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:  # type: ignore[override]
        """`(B, *S, dim)` and what the mixer takes besides -> the same shape."""
        x = x + self.drop_path(self.scale1(self.mixer(self.norm1(x), *context)))
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))
