"""Attention inside ragged groups as a FlexAttention over all rows: each row sees one run of keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from regard.kernels.flex.core import BLOCK, Mod, assemble, attend, declines

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class Runs(NamedTuple):
    """Attributes: first, end: `(N,)` the run of keys `first <= key < end` that each row sees, both not decreasing."""

    first: Tensor
    end: Tensor


def runs(offsets: Tensor, key_offsets: Tensor, rows: int) -> Runs:
    """What each of the rows sees, from the offsets of its group."""
    group = torch.searchsorted(offsets, torch.arange(rows, device=offsets.device), right=True) - 1
    return Runs(key_offsets[group], key_offsets[group + 1])


def runs_mask(seen: Runs) -> Mod:
    """Mask: does the key lie in the row's run?"""
    first, end = seen

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= first[query]) & (key < end[query])

    return mask_mod


def runs_blocks(seen: Runs, keys: int) -> BlockMask:
    """The block mask of `runs_mask`; a block of rows may visit keys of a group between theirs that has no rows."""
    rows = len(seen.first)
    top = torch.arange(0, rows, BLOCK, device=seen.first.device)
    bottom = (top + BLOCK - 1).clamp(max=rows - 1)
    start = torch.arange(0, keys, BLOCK, device=seen.first.device)
    some = (start < seen.end[bottom, None]) & (start + BLOCK > seen.first[top, None])
    every = (start >= seen.first[bottom, None]) & (start + BLOCK <= seen.end[top, None])
    every &= (top + BLOCK <= rows)[:, None]
    return assemble(runs_mask(seen), some, every, rows, keys)


def grouped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    *,
    key_offsets: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """See `regard.ops.grouped_attention`."""
    offsets, key_offsets = (x.to(q.device) for x in (offsets, offsets if key_offsets is None else key_offsets))
    blocks = runs_blocks(runs(offsets, key_offsets, len(q)), len(k))
    return attend(q[None], k[None], v[None], blocks=blocks, scale=scale, dynamic=True)[0]


def declines_grouped(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, **_: Any) -> str | None:
    """Why "auto" leaves FlexAttention alone, or None."""
    if q.is_cuda and len(q) < BLOCK * (len(offsets) - 1):
        return f"groups of fewer than {BLOCK} rows on average leave its blocks half empty"
    return declines(q, None)
