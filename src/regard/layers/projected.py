"""The projections around a core that mixes given q, k and v, with or without a class token beside the grid."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from regard.layers.mixer import Mixer


class ProjectedCore(Mixer):
    """out = W_o core(x W_q, x W_k, x W_v); a class token, where there is one, shares the projections.

    The core maps q, k and v `(B, *S, dim)` to that shape; with `first`, the q, k and v `(B, 1, dim)` of a class token, it
    gives a pair of grid and class token. Subclasses may hand it more by `core_inputs`.

    Args:
        class_token: `forward` takes and gives a class token beside the grid.
        joint_qkv: one matrix for q, k and v; otherwise one for q and one for k and v (as PVT has).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        core: nn.Module,
        *,
        axes: int,
        class_token: bool = False,
        qkv_bias: bool = True,
        joint_qkv: bool = True,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads, self.axes, self.class_token = dim, num_heads, axes, class_token
        self.core = core
        if joint_qkv:
            self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        else:
            self.q, self.kv = nn.Linear(dim, dim, bias=qkv_bias), nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.joint_qkv = joint_qkv
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, class_token: Tensor | None = None) -> Any:
        """`(B, *S, dim)` -> the same shape; built for a class token, also `(B, 1, dim)` -> a pair of such."""
        self.check(x)
        if (class_token is not None) != self.class_token:
            raise ValueError(f"this mixer was built with class_token={self.class_token}: call it accordingly.")
        extra = self.core_inputs(x, class_token)
        if class_token is None:
            return self.proj(self.core(*self._project(x), **extra))
        grid, first = self.core(*self._project(x), first=self._project(class_token), **extra)
        return self.proj(grid), self.proj(first)

    def core_inputs(self, x: Tensor, class_token: Tensor | None) -> dict[str, Tensor]:
        """What the core gets besides q, k and v."""
        return {}

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(x).chunk(3, -1) if self.joint_qkv else (self.q(x), *self.kv(x).chunk(2, -1))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, class_token={self.class_token}"
