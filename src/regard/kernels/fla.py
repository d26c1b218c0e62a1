"""Causal linear attention by flash-linear-attention (fla, version 0.3 or later): Triton kernels for CUDA.

Linear attention with one decay a head is fla's "simple GLA" with log decay -λ. fla's own normaliser knows neither decay nor
eps, so the normaliser travels as one more column of v: Σ w_ij · 1, in the state too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard.kernels import libraries


def refuses_linear(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, **_: Any) -> str | None:
    """Why fla cannot take these arguments, or None."""
    if not causal:
        return "fla computes causal linear attention, causal is False"
    reason = libraries.not_here("fla", "fla", q, "pip install flash-linear-attention[cuda]")
    if reason:
        return reason
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"q is {q.dtype}, fla takes float32, float16 and bfloat16"
    return libraries.lacks("fla.ops.simple_gla", "chunk_simple_gla", "g_gamma", "initial_state", "output_final_state")


def declines_linear(q: Tensor, *args: Any, **kwargs: Any) -> str | None:
    """Why "auto" leaves fla alone, or None."""
    if q.dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32:
        return "fla multiplies float32 in TF32, which torch.backends.cuda.matmul.allow_tf32 does not allow"
    if torch.compiler.is_compiling():
        return "fla breaks a graph that is being compiled"
    return None


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    decay: Tensor | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
    state: tuple[Tensor, Tensor] | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
    """`fla.ops.simple_gla.chunk_simple_gla`: see `regard.ops.linear_attention`."""
    from fla.ops.simple_gla import chunk_simple_gla

    repeat = q.shape[-2] // k.shape[-2]
    if repeat > 1:
        k, v = k.repeat_interleave(repeat, -2), v.repeat_interleave(repeat, -2)
    tallied = normalize or return_state
    if tallied:
        v = torch.cat([v, v.new_ones(*v.shape[:-1], 1)], -1)
    start = None
    if state is not None:
        kv, total = state
        start = torch.cat([kv, total[..., None]], -1) if tallied else kv
    out, end = chunk_simple_gla(
        q,
        k,
        v,
        g_gamma=None if decay is None else -decay.detach().float(),
        scale=1.0,
        initial_state=None if start is None else start.float(),
        output_final_state=return_state,
    )
    if tallied:
        out, weights = out[..., :-1], out[..., -1:]
        out = out / (weights + eps) if normalize else out
    if not return_state:
        return out
    end = end.to(q.dtype)
    return out, (end[..., :-1], end[..., -1])
