"""Attention through a few landmark (agent) tokens."""

from __future__ import annotations

import math

from torch import Tensor

from regard import checks
from regard.kernels import OpPath, register, run
from regard.ops import reference
from regard.ops.dense import attention


def landmark_attention(
    q: Tensor,
    landmarks: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    gather_bias: Tensor | None = None,
    read_bias: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Landmarks gather from all keys, then every query reads from the landmarks.

    $$O = \mathrm{softmax}(s\, Q A^\top + B_2)\; \mathrm{softmax}(s\, A K^\top + B_1)\, V$$

    A generalised linear attention of rank at most the number of landmarks (Agent Attention, arXiv 2312.08874, eq. 4).

    Args:
        q: `(batch, *spatial, heads, head_dim)`. landmarks: `(batch, *spatial_a, heads, head_dim)`, n tokens.
        k: `(batch, *spatial_k, heads, head_dim)`. v: `(batch, *spatial_k, heads, value_dim)`.
        gather_bias: B₁, broadcastable to `(batch, heads, n, Nk)`.
        read_bias: B₂, broadcastable to `(batch, heads, Nq, n)`.
        scale: s; None is head_dim ** -0.5.

    Returns:
        `(batch, *spatial, heads, value_dim)`.

    Raises:
        ValueError: for shapes that do not agree.
    """
    checks.heads_last(landmarks, k, v, same_grid=False)
    checks.heads_last(q, landmarks, landmarks, same_grid=False)
    checks.no_half_on_cpu("landmark_attention", q)
    if q.shape[-2] != k.shape[-2] or landmarks.shape[-2] != q.shape[-2]:
        raise ValueError(
            f"q, landmarks and k must have equally many heads, got {q.shape[-2]}, {landmarks.shape[-2]}, {k.shape[-2]}."
        )
    return run(
        "landmark_attention", backend, q, landmarks, k, v, gather_bias=gather_bias, read_bias=read_bias, scale=scale
    )


def _torch(
    q: Tensor,
    landmarks: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    gather_bias: Tensor | None = None,
    read_bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    gathered = attention(landmarks, k, v, bias=gather_bias, scale=scale)
    return attention(q, landmarks, gathered, bias=read_bias, scale=scale)  # type: ignore[arg-type,return-value]


def _macs(q: Tensor, landmarks: Tensor, k: Tensor, v: Tensor, **_: object) -> int:
    tokens = math.prod(q.shape[1:-2]) + math.prod(k.shape[1:-2])
    return q.shape[0] * q.shape[-2] * math.prod(landmarks.shape[1:-2]) * tokens * (q.shape[-1] + v.shape[-1])


register("landmark_attention", OpPath("torch", _torch), macs=_macs)
register("landmark_attention", OpPath("reference", reference.landmark_attention))
