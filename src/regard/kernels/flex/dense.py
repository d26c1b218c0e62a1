"""Dense attention as a FlexAttention: where a log-sum-exp is wanted, or causality between unequal lengths."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from regard.kernels.flex.core import WORTH, Mod, attend, block_mask, declines


def causal_mask(later: int) -> Mod:
    """Mask: query i sees keys up to i + later."""

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key <= query + later

    return mask_mod


def dense_bias(bias: Tensor | None, mask: Tensor | None) -> Mod:
    """Adds a bias and hides pairs where a mask is False; both broadcastable to (batch, heads, queries, keys)."""
    added, seen = (None if x is None else _entry(x) for x in (bias, mask))

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if added is not None:
            score = score + added(batch, head, query, key)
        return score if seen is None else torch.where(seen(batch, head, query, key), score, -math.inf)

    return score_mod


def _entry(x: Tensor) -> Mod:
    axes = [axis for axis in range(-x.dim(), 0) if x.shape[axis] > 1]
    table = x.squeeze()
    return lambda *places: table[tuple(places[axis] for axis in axes)] if axes else table


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See `regard.ops.attention`."""
    spatial, dtype = q.shape[1:-2], q.dtype
    q, k, v = (x.flatten(1, -3) for x in (q, k, v))
    queries, keys = q.shape[1], k.shape[1]
    result = attend(
        q,
        k,
        v,
        score_mod=None if bias is None and mask is None else dense_bias(None if bias is None else bias.to(dtype), mask),
        blocks=block_mask(causal_mask, (keys - queries,), queries, keys, q) if causal else None,
        scale=scale,
        return_lse=return_lse,
    )
    return tuple(x.unflatten(1, spatial) for x in result) if return_lse else result.unflatten(1, spatial)


def declines_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    return_lse: bool = False,
    **_: Any,
) -> str | None:
    """Why "auto" leaves FlexAttention alone, or None."""
    queries, keys = math.prod(q.shape[1:-2]), math.prod(k.shape[1:-2])
    if q.is_cuda and (bias is not None or mask is not None or not (return_lse or (causal and queries != keys))):
        return "PyTorch's own kernels are as fast"
    if q.is_cuda and min(queries, keys) < WORTH:
        return f"{queries} queries and {keys} keys do not repay its compilation (from {WORTH} on)"
    return declines(q, bias)
