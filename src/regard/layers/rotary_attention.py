"""Softmax attention as LLaMA has it: rotary positions, shared key heads, no biases."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from regard import checks, ops
from regard.checkpoint import KeyMap
from regard.layers.mixer import Mixer, heads_of
from regard.layers.rotary import rotate, sequence_angles


class RotaryAttention(Mixer):
    r"""Causal softmax attention whose queries and keys are turned by their places (RoFormer; Touvron et al., 2023).

    $$\mathrm{out} = W_o\,[\mathrm{softmax}_{j \le i}(d^{-1/2} (R_i q_i)^\top R_j k_j)\,V]_{heads}$$

    Args:
        dim: channels. num_heads: of the queries. kv_heads: of keys and values, which query heads share; None is as many.
        head_dim: None is dim / num_heads. bias: of q, k and v. rope_base: see `sequence_angles`.
    """

    dims: ClassVar[tuple[int, ...]] = (1,)
    can_causal: ClassVar[bool] = True
    can_stream: ClassVar[bool] = True
    authors_keys = KeyMap(rules=[(r"\b([qkv])_proj\.", r"\1."), (r"\bo_proj\.", "proj.")])
    """The names of published checkpoints (Hugging Face)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        rope_base: float = 10000.0,
        causal: bool = True,
    ) -> None:
        super().__init__()
        if not causal:
            raise ValueError(
                f"{type(self).__name__} is causal by its idea: use mixer 'softmax' with causal=False instead."
            )
        checks.positive("num_heads", num_heads)
        self.head_dim = heads_of(dim, num_heads) if head_dim is None else head_dim
        self.dim, self.num_heads, self.kv_heads = dim, num_heads, kv_heads or num_heads
        self.causal, self.rope_base = causal, rope_base
        checks.divisible("num_heads", num_heads, "kv_heads", self.kv_heads)
        width, kv_width = num_heads * self.head_dim, self.kv_heads * self.head_dim
        self.q = nn.Linear(dim, width, bias=bias)
        self.k, self.v = (nn.Linear(dim, kv_width, bias=bias) for _ in range(2))
        self.proj = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, N, dim)` -> the same shape."""
        return self.prefill(x)[0]

    def prefill(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """`forward` on tokens that follow `state`, and the state after the last of them."""
        self.check(x)
        heads, state = self.heads(x, state)
        return self.proj(heads.flatten(-2)), state

    def step(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """One token `(B, dim)` -> the same shape, and the new state."""
        out, state = self.prefill(x[:, None], state)
        return out.squeeze(1), state

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q `(B, N, num_heads, head_dim)`, k and v `(B, N, kv_heads, head_dim)`, not turned yet."""
        return tuple(part(x).unflatten(-1, (-1, self.head_dim)) for part in (self.q, self.k, self.v))  # type: ignore[return-value]

    def heads(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """What attention gives before its output projection, `(B, N, num_heads, head_dim)`, and the state after it.

        The state here is the keys, turned, and the values so far, `(B, t, kv_heads, head_dim)` each.
        """
        q, k, v = self.project(x)
        start = 0 if state is None else state[0].shape[1]
        places = torch.arange(start, start + x.shape[1], device=x.device)
        angles = sequence_angles(places, self.head_dim // 2, self.rope_base)[:, None]
        q, k = rotate(q, angles, interleaved=False), rotate(k, angles, interleaved=False)
        if state is not None:
            k, v = torch.cat([state[0], k], 1), torch.cat([state[1], v], 1)
        return ops.attention(q, k, v, causal=True), (k, v)  # type: ignore[return-value]

    def state_size(self, length: int) -> int:
        """All keys and values: grows with the stream."""
        return 2 * length * self.kv_heads * self.head_dim

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, kv_heads={self.kv_heads}, head_dim={self.head_dim}"
