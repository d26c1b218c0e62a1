"""Linear attention: the products in the other order, with a carried state when causal."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regard import checks
from regard.kernels import OpPath, fla, register, run
from regard.kernels.cpu import paths as cpu
from regard.ops import reference

_CHUNK = 128


class LinearState(NamedTuple):
    """What a causal stream remembers: constant in the number of tokens seen.

    Attributes:
        kv: `(batch, heads, head_dim, value_dim)`, the decayed sum of k_j v_jᵀ.
        k: `(batch, heads, head_dim)`, the decayed sum of k_j (the normaliser).
    """

    kv: Tensor
    k: Tensor


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    decay: Tensor | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
    state: LinearState | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, LinearState]:
    r"""Attention whose weights are plain products of (already mapped) features.

    $$o_i = \sum_j w_{ij} v_j,\quad w_{ij} = q_i^\top k_j\ (\cdot\, e^{-\lambda (i - j)}\,[j \le i]\text{ if causal})$$

    divided by $\sum_j w_{ij} + \epsilon$ if `normalize`. Costs N head_dim value_dim. The causal form runs block by block:
    ordinary products inside a block, a head_dim x value_dim state across blocks (Lightning Attention, arXiv 2405.17381).

    Args:
        q: `(batch, *spatial, heads, head_dim)` after the feature map (and any scale); for `causal`, one spatial axis.
        k: `(batch, *spatial_k, kv_heads, head_dim)`. v: `(batch, *spatial_k, kv_heads, value_dim)`.
        decay: `(heads,)` rates λ ≥ 0 per token, for causal attention. No gradient flows to it.
        normalize: needs features that are not negative (a sum near zero blows up).
        state: carried from an earlier part of the stream; the tokens here follow it.
        return_state: also return the state after the last token.

    Returns:
        `(batch, *spatial, heads, value_dim)`, with the state if asked for.

    Raises:
        ValueError: for shapes that do not agree, or decay / state / several spatial axes where they have no meaning.
    """
    checks.heads_last(q, k, v, same_grid=causal)
    checks.no_half_on_cpu("linear_attention", q)
    if causal and q.dim() != 4:
        raise ValueError(
            f"causal linear attention runs along one axis, got {q.dim() - 3} spatial axes: flatten them first."
        )
    if not causal and (decay is not None or state is not None or return_state):
        raise ValueError("decay, state and return_state need causal=True.")
    if decay is not None and decay.shape != (q.shape[-2],):
        raise ValueError(f"decay must be one rate per head, ({q.shape[-2]},), got shape {tuple(decay.shape)}.")
    if state is not None and state.kv.shape != (q.shape[0], q.shape[-2], q.shape[-1], v.shape[-1]):
        raise ValueError(
            f"state.kv must be (batch, heads, head_dim, value_dim) = "
            f"{(q.shape[0], q.shape[-2], q.shape[-1], v.shape[-1])}, got {tuple(state.kv.shape)}."
        )
    extra = {"state": state, "return_state": return_state} if state is not None or return_state else {}
    return run("linear_attention", backend, q, k, v, causal=causal, decay=decay, normalize=normalize, eps=eps, **extra)


def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: LinearState | None = None,
    *,
    decay: Tensor | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
) -> tuple[Tensor, LinearState]:
    """One token of the causal form: q, k `(batch, heads, head_dim)`, v `(batch, heads, value_dim)`.

    Returns:
        o `(batch, heads, value_dim)` and the new state. Feeding tokens one by one equals the parallel form.
    """
    fade = q.new_ones(q.shape[1]) if decay is None else torch.exp(-decay).to(q.dtype)
    if state is None:
        state = LinearState(q.new_zeros(*k.shape, v.shape[-1]), torch.zeros_like(k))
    kv = state.kv * fade[:, None, None] + k[..., :, None] * v[..., None, :]
    total = state.k * fade[:, None] + k
    out = (q[..., None, :] @ kv).squeeze(-2)
    if normalize:
        out = out / ((q * total).sum(-1, keepdim=True) + eps)
    return out, LinearState(kv, total)


def _torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    decay: Tensor | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
    state: LinearState | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, LinearState]:
    spatial, repeat = q.shape[1:-2], q.shape[-2] // k.shape[-2]
    q, k, v = (x.flatten(1, -3).transpose(1, 2) for x in (q, k, v))  # (B, h, N, d)
    if repeat > 1:
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    if causal:
        out, after = _blocks(q, k, v, decay, normalize, eps, state)
    else:
        out, after = q @ (k.transpose(-1, -2) @ v), None
        if normalize:
            out = out / (q @ k.sum(-2).unsqueeze(-1) + eps)
    out = out.transpose(1, 2).unflatten(1, spatial)
    return (out, after) if return_state and after is not None else out


def _blocks(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, normalize: bool, eps: float, state: LinearState | None
) -> tuple[Tensor, LinearState]:
    length, block = q.shape[2], min(_CHUNK, q.shape[2])
    rate = (q.new_zeros(q.shape[1]) if decay is None else decay.to(q.dtype)).view(-1, 1, 1)  # (h, 1, 1)
    place = torch.arange(block, dtype=q.dtype, device=q.device).view(-1, 1)  # (block, 1)
    distance = place - place.transpose(0, 1)
    # exp of a clamped distance: exp(-rate * negative) would overflow before the mask could remove it.
    inside = torch.where(distance >= 0, torch.exp(-rate * distance.clamp(min=0)), 0.0)  # (h, block, block)
    reach = torch.exp(-rate * (place + 1))  # what the incoming state has faded to at each place
    if state is None:
        kv, total = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]), q.new_zeros(*q.shape[:2], q.shape[-1])
    else:
        kv, total = state
    outs = []
    for start in range(0, length, block):
        size = min(block, length - start)
        part = slice(start, start + size)
        qs, ks, vs = q[:, :, part], k[:, :, part], v[:, :, part]
        weights = (qs @ ks.transpose(-1, -2)) * inside[:, :size, :size]
        faded = qs * reach[:, :size]
        out = weights @ vs + faded @ kv
        if normalize:
            out = out / (weights.sum(-1, keepdim=True) + faded @ total.unsqueeze(-1) + eps)
        outs.append(out)
        left = ks * torch.exp(-rate * (size - 1 - place[:size]))
        fade = torch.exp(-rate * size)
        kv = kv * fade + left.transpose(-1, -2) @ vs
        total = total * fade.squeeze(-1) + left.sum(-2)
    return torch.cat(outs, 2) if len(outs) > 1 else outs[0], LinearState(kv, total)


def _with_state(path: Callable[..., Any]) -> Callable[..., Tensor | tuple[Tensor, LinearState]]:
    def call(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor | tuple[Tensor, LinearState]:
        result = path(q, k, v, **options)
        return (result[0], LinearState(*result[1])) if isinstance(result, tuple) else result

    return call


def _refuses_state(*_: object, state: object = None, return_state: bool = False, **__: object) -> str | None:
    return "the reference carries no state" if state is not None or return_state else None


def _macs(q: Tensor, k: Tensor, v: Tensor, **_: object) -> int:
    """head_dim value_dim products a key and as many a query, per head."""
    per_head = (math.prod(q.shape[1:-2]) + math.prod(k.shape[1:-2])) * q.shape[-1] * v.shape[-1]
    return q.shape[0] * q.shape[-2] * per_head


register("linear_attention", OpPath("cpu", _with_state(cpu.linear_attention), cpu.refuses_linear))
register("linear_attention", OpPath("fla", _with_state(fla.linear_attention), fla.refuses_linear, fla.declines_linear))
register("linear_attention", OpPath("torch", _torch), macs=_macs)
register("linear_attention", OpPath("reference", reference.linear_attention, _refuses_state))
