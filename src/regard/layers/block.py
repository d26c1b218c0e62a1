"""The residual block that most transformers share."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

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
        self.scale1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm2 = norm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act=act) if mlp is None else mlp
        self.scale2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        x = x + self.drop_path(self.scale1(self.mixer(self.norm1(x))))
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))
