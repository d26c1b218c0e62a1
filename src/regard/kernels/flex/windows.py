"""Window attention as a FlexAttention: tokens sorted by window are ragged groups."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from regard import checks
from regard.kernels.flex.core import BLOCK, Mod, attend, declines
from regard.kernels.flex.groups import runs, runs_blocks

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class Windows(NamedTuple):
    """Tokens by window.

    Attributes:
        order: `(N,)` tokens sorted by window. back: its inverse.
        slot: `(N,)` place of each sorted token in its window.
        offsets: `(windows + 1,)` where each window begins.
    """

    order: Tensor
    back: Tensor
    slot: Tensor
    offsets: Tensor


def windows(
    spatial: Sequence[int], window_size: Sequence[int], shift: Sequence[int], partition: str, device: torch.device
) -> Windows:
    """Sort tokens by window; a window that a shift wraps around an edge counts as two."""
    return Windows(*_tables(spatial, window_size, shift, partition, device))


@torch.compiler.assume_constant_result
def _tables(
    spatial: Sequence[int], window_size: Sequence[int], shift: Sequence[int], partition: str, device: torch.device
) -> tuple[Tensor, ...]:
    home, slot = np.zeros((), np.int64), np.zeros((), np.int64)
    for length, size, step in zip(spatial, window_size, shift, strict=True):
        count, position = -(-length // size), np.arange(length)
        if partition == "grid":
            window, place = position % count, position // count
        else:
            rolled = (position - step) % (count * size)
            window, place = rolled // size * 2 + (position < step), rolled % size
        home, slot = home[..., None] * (2 * count) + window, slot[..., None] * size + place
    order = np.argsort(home, axis=None, kind="stable")
    _, counts = np.unique(home, return_counts=True)
    tables = order, np.argsort(order), slot.ravel()[order], np.concatenate([[0], np.cumsum(counts)])
    return tuple(torch.as_tensor(part, device=device) for part in tables)


def _plan(*arguments: Any) -> tuple[Windows, BlockMask]:
    by_window = windows(*arguments)
    tokens = len(by_window.order)
    return by_window, runs_blocks(runs(by_window.offsets, by_window.offsets, tokens), tokens)


@lru_cache(maxsize=64)
def _kept_plan(*arguments: Any) -> tuple[Windows, BlockMask]:
    with torch.inference_mode(False):  # kept for calls that train
        return _plan(*arguments)


def window_bias(bias: Tensor, slot: Tensor) -> Mod:
    """Adds `bias[head, place of the query in its window, place of the key]`."""

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + bias[head, slot[query], slot[key]]

    return score_mod


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window_size: Sequence[int],
    shift: Sequence[int],
    partition: str = "window",
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """See `regard.ops.window_attention`."""
    spatial, heads = q.shape[1:-2], q.shape[-2]
    plan = _plan if torch.compiler.is_compiling() else _kept_plan
    at, blocks = plan(tuple(spatial), tuple(window_size), tuple(shift), partition, q.device)
    out = attend(
        *(x.flatten(1, -3).index_select(1, at.order) for x in (q, k, v)),
        score_mod=None if bias is None else window_bias(bias.to(q.dtype).expand(heads, -1, -1).contiguous(), at.slot),
        blocks=blocks,
        scale=scale,
    )
    return out.index_select(1, at.back).unflatten(1, spatial)


def declines_window(
    q: Tensor, *args: Any, window_size: int | Sequence[int], bias: Tensor | None = None, **kwargs: Any
) -> str | None:
    """Why "auto" leaves FlexAttention alone, or None."""
    tokens = math.prod(checks.tuple_of("window_size", window_size, q.dim() - 3))
    if q.is_cuda and tokens < BLOCK:
        return f"windows of {tokens} tokens leave its blocks of {BLOCK} half empty"
    return declines(q, bias)
