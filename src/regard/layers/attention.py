"""Mixers of no single paper: dense softmax attention, plain linear attention, and none at all.

They are what every comparison needs beside the published mechanisms.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import checks, ops
from regard.layers.mixer import Mixer, heads_of
from regard.ops import LinearState
from regard.registry import register_mixer


@register_mixer("softmax")
class SoftmaxAttention(Mixer):
    r"""Multi-head softmax attention (Vaswani et al., 2017, eq. 1).

    $$\mathrm{out} = W_o\,[\mathrm{softmax}(d^{-1/2} Q K^\top) V]_{heads},\quad Q, K, V = x W_{qkv}$$

    With `context`, queries come from x and keys and values from the context. `kv_heads` below `num_heads` shares keys and
    values between heads.
    """

    can_causal: ClassVar[bool] = True
    can_cross: ClassVar[bool] = True
    can_stream: ClassVar[bool] = True

    def __init__(
        self, dim: int, num_heads: int, *, kv_heads: int | None = None, qkv_bias: bool = True, causal: bool = False
    ) -> None:
        super().__init__()
        self.head_dim = heads_of(dim, num_heads)
        self.dim, self.num_heads, self.kv_heads, self.causal = dim, num_heads, kv_heads or num_heads, causal
        checks.divisible("num_heads", num_heads, "kv_heads", self.kv_heads)
        width = self.kv_heads * self.head_dim
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * width, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """`(B, *S, dim)` -> `(B, *S, dim)`; context `(B, *S_c, dim)`."""
        self.check(x)
        if context is not None and self.causal:
            raise ValueError("a causal mixer takes no context: build it with causal=False for cross attention.")
        q = self.q(x).unflatten(-1, (self.num_heads, self.head_dim))
        source = x if context is None else context
        k, v = self.kv(source).unflatten(-1, (2, self.kv_heads, self.head_dim)).unbind(-3)
        return self.proj(self.attend(q, k, v, causal=self.causal).flatten(-2))

    def step(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One token `(B, dim)`; the state is the keys and values so far, each `(B, t, kv_heads, head_dim)`."""
        q = self.q(x).unflatten(-1, (1, self.num_heads, self.head_dim))
        k, v = self.kv(x).unflatten(-1, (2, 1, self.kv_heads, self.head_dim)).unbind(-4)
        if state is not None:
            k, v = torch.cat([state[0], k], 1), torch.cat([state[1], v], 1)
        return self.proj(self.attend(q, k, v).flatten(1)), (k, v)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
        """`(B, *S, num_heads, head_dim)` from keys and values `(B, *S_k, kv_heads, head_dim)`; for subclasses to replace."""
        return ops.attention(q, k, v, causal=causal)  # type: ignore[return-value]

    def state_size(self, length: int) -> int:
        """All keys and values: grows with the stream."""
        return 2 * length * self.kv_heads * self.head_dim

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, kv_heads={self.kv_heads}, causal={self.causal}"


def split_qkv(name: str, value: Tensor) -> dict[str, Tensor]:
    """`KeyMap.convert` for checkpoints whose q, k and v are one matrix `qkv`: the `q` and `kv` of `SoftmaxAttention`."""
    if not name.endswith(("qkv.weight", "qkv.bias")):
        return {name: value}
    q, kv = value.split([value.shape[0] // 3, 2 * value.shape[0] // 3])
    return {name.replace("qkv", "q"): q, name.replace("qkv", "kv"): kv}


_FEATURES = {"elu": lambda x: F.elu(x) + 1, "relu": F.relu, "exp": torch.exp}


@register_mixer("linear")
class LinearAttention(Mixer):
    r"""Linear attention with a positive feature map (Katharopoulos et al., 2020, eq. 5).

    $$\mathrm{out}_i = \frac{\phi(q_i)^\top \sum_j \phi(k_j) v_j^\top}{\phi(q_i)^\top \sum_j \phi(k_j)},\quad
      \phi = \mathrm{elu} + 1 \text{ by default}$$
    """

    can_causal: ClassVar[bool] = True
    can_cross: ClassVar[bool] = True
    can_stream: ClassVar[bool] = True

    def __init__(
        self, dim: int, num_heads: int, *, feature: str = "elu", qkv_bias: bool = True, causal: bool = False
    ) -> None:
        super().__init__()
        self.head_dim = heads_of(dim, num_heads)
        self.dim, self.num_heads, self.causal = dim, num_heads, causal
        self.feature = checks.one_of("feature", feature, _FEATURES)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """`(B, *S, dim)` -> `(B, *S, dim)`; context `(B, *S_c, dim)`."""
        self.check(x)
        if self.causal and (context is not None or x.dim() != 3):
            raise ValueError(
                f"causal linear attention takes (batch, length, dim) and no context, got {tuple(x.shape)}."
            )
        q, k, v = self._qkv(x) if context is None else (self._qkv(x)[0], *self._qkv(context)[1:])
        return self.proj(ops.linear_attention(q, k, v, causal=self.causal).flatten(-2))  # type: ignore[union-attr]

    def _qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        phi = _FEATURES[self.feature]
        return phi(q), phi(k), v

    def step(self, x: Tensor, state: LinearState | None = None) -> tuple[Tensor, LinearState]:
        """One token `(B, dim)`; the state has a constant size."""
        out, state = ops.linear_attention_step(*self._qkv(x), state)
        return self.proj(out.flatten(1)), state

    def state_size(self, length: int) -> int:
        """Constant: one matrix and one vector a head."""
        return self.num_heads * self.head_dim * (self.head_dim + 1)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, feature={self.feature}, causal={self.causal}"


@register_mixer("identity")
class Identity(Mixer):
    """No mixing: out = x. What a comparison needs to show that mixing matters at all."""

    has_heads: ClassVar[bool] = False
    can_causal: ClassVar[bool] = True
    can_stream: ClassVar[bool] = True

    def __init__(self, dim: int, num_heads: int = 1, *, causal: bool = False) -> None:
        super().__init__()
        self.dim, self.num_heads, self.causal = dim, num_heads, causal

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same tensor."""
        self.check(x)
        return x

    def step(self, x: Tensor, state: None = None) -> tuple[Tensor, None]:
        """One token `(B, dim)`, unchanged."""
        return x, None

    def state_size(self, length: int) -> int:
        """Nothing is kept."""
        return 0
