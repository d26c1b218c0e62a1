"""Neighborhood attention as a FlexAttention over flat, row-major token numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from operator import and_
from typing import Any

import torch
from torch import Tensor

from regard.kernels.flex.core import WORTH, Mod, attend, block_mask, declines


def neighborhood_mask(
    spatial: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    causal: Sequence[bool],
) -> Mod:
    """Mask of flat row-major token numbers: does the key lie in the query's neighborhood on every axis?"""
    axes = list(zip(spatial, kernel_size, stride, dilation, causal, strict=True))

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (
            _sees(_position(query, spatial, place), _position(key, spatial, place), *axis)
            for place, axis in enumerate(axes)
        )
        return reduce(and_, seen)

    return mask_mod


def _sees(query: Tensor, key: Tensor, length: int, kernel: int, stride: int, dilation: int, causal: bool) -> Tensor:
    """Whether positions see each other along one axis: the rule that `regard.ops.neighborhood_attention` states."""
    rank, key_rank = query // dilation, key // dilation
    last = (length - 1 - query % dilation) // dilation  # rank of the last token of the query's group
    leader = torch.minimum(rank // stride * stride + (stride - 1 if causal else stride // 2), last)
    if causal:
        start, end = leader - kernel + 1, rank
    else:
        start = torch.minimum((leader - kernel // 2).clamp(min=0), last - kernel + 1)
        end = start + kernel - 1
    return (key_rank >= start) & (key_rank <= end) & (query % dilation == key % dilation)


def neighborhood_bias(bias: Tensor, spatial: Sequence[int], kernel_size: Sequence[int], dilation: Sequence[int]) -> Mod:
    """Adds `bias[head, key rank - query rank + kernel - 1, ...]`; pairs beyond the table are masked ones."""

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        offsets = []
        for axis, (width, gap) in enumerate(zip(kernel_size, dilation, strict=True)):
            offset = _position(key, spatial, axis) // gap - _position(query, spatial, axis) // gap + width - 1
            offsets.append(offset.clamp(0, 2 * width - 2))
        return score + bias[(head, *offsets)]

    return score_mod


def _position(token: Tensor, spatial: Sequence[int], axis: int) -> Tensor:
    place = token // math.prod(spatial[axis + 1 :])
    return place % spatial[axis] if axis else place


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    causal: Sequence[bool],
    bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See `regard.ops.neighborhood_attention`."""
    spatial = tuple(q.shape[1:-2])
    tokens = math.prod(spatial)
    sizes = (spatial, tuple(kernel_size), tuple(stride), tuple(dilation), tuple(causal))
    result = attend(
        *(x.flatten(1, -3) for x in (q, k, v)),
        score_mod=None if bias is None else neighborhood_bias(bias.to(q.dtype), spatial, kernel_size, dilation),
        blocks=block_mask(neighborhood_mask, sizes, tokens, tokens, q),
        scale=scale,
        return_lse=return_lse,
    )
    return tuple(x.unflatten(1, spatial) for x in result) if return_lse else result.unflatten(1, spatial)


def declines_neighborhood(q: Tensor, *args: Any, bias: Tensor | None = None, **kwargs: Any) -> str | None:
    """Why "auto" leaves FlexAttention alone, or None."""
    tokens = math.prod(q.shape[1:-2])
    if q.is_cuda and tokens < WORTH:
        return f"{tokens} tokens do not repay its compilation (from {WORTH} on)"
    return declines(q, bias)
