"""The pattern of Combiner that halves a sequence again and again: logsparse."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from regard import ops
from regard.registry import register_mixer
from regard.systems.sequence._combiner_core import Combiner, Part, attend_one, largest, merged, read, renamed


class BlockSummary(NamedTuple):
    """Query, key and value of one block of a binary counter, each `(B, 1, heads, head_dim)`."""

    query: Tensor
    key: Tensor
    value: Tensor


class LogsparseState(NamedTuple):
    """What a stream remembers.

    Attributes:
        keys, values: of all tokens `(B, t, heads, head_dim)`; a block's value has to be read anew when two blocks become one.
        blocks: level -> the summary of the block of 2^level tokens that the binary digits of t count.
    """

    keys: Tensor
    values: Tensor
    blocks: dict[int, BlockSummary]


@register_mixer("combiner_logsparse")
class CombinerLogsparse(Combiner):
    """Combiner-Logsparse: itself directly, all before it by blocks of 1, 2, 4, ... tokens that halve towards it (section 4.2).

    For every binary digit l of place i that is 1, the region is the block of 2^l tokens numbered (i >> l) - 1: its left
    sibling in a binary tree. They tile [0, i) exactly, so there are at most log2 N summaries; cost N log N.

    Bidirectional (ours): the sibling on every level, left or right; they tile all other tokens. Departure: the release misses a
    level where N = 2^n + 1, so that the last token reads itself alone.

    A stream keeps all keys and values, as blocks that merge are read anew.
    """

    authors_keys = renamed()

    def mix(self, x: Tensor, mask: Tensor | None, width: int | None = None) -> Tensor:
        """`(B, N, dim)` -> `(B, N, heads, head_dim)`."""
        q, k, v = self._qkv(x)
        length = x.shape[1]
        own, lse = attend_one(q, k, v)
        parts = [(own, lse if mask is None else lse.masked_fill(~mask[..., None], -math.inf))]
        seen = x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None and not self.causal else mask
        for level in range((length - 1).bit_length()):
            parts.append(self._siblings(q, k, v, seen, 2**level))
        return merged(parts)

    def _siblings(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, size: int) -> Part:
        """Every token on the summary of the block of `size` tokens beside its own, if it is one to be seen."""
        length = q.shape[1]
        extra = -length % (2 * size)
        pairs = (-1, 2, size)
        q, k, v = (F.pad(part, (0, 0, 0, 0, 0, extra)).unflatten(1, pairs) for part in (q, k, v))
        if seen is not None:
            seen = F.pad(seen, (0, extra)).unflatten(1, pairs)
        if self.causal:  # second halves read first halves
            readers, q, k, v = q[:, :, 1:], q[:, :, :1], k[:, :, :1], v[:, :, :1]
            seen = None if seen is None else seen[:, :, :1]
        else:  # and the other way round
            readers = q.flip(2)
        query, key = largest(q, seen, 3), largest(k, seen, 3)
        inside = None if seen is None else seen.flatten(1, 2)
        value = read(query.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), None, inside).view_as(key)
        out, lse = attend_one(readers, key, value)
        if seen is not None:
            lse = lse.masked_fill(~seen.any(3)[..., None, None], -math.inf)
        if self.causal:
            out, lse = F.pad(out, (0,) * 6 + (1, 0)), F.pad(lse, (0,) * 4 + (1, 0), value=-math.inf)
        else:
            out, lse = out.flip(2), lse.flip(2)
        return out.flatten(1, 3)[:, :length], lse.flatten(1, 3)[:, :length]

    def prefill(self, x: Tensor) -> tuple[Tensor, LogsparseState]:
        """Causal `forward` on the first tokens `(B, N, dim)` of a stream, and the state after them."""
        self._check_stream()
        q, k, v = self._qkv(x)
        blocks, stop = {}, 0
        for level in reversed(range(x.shape[1].bit_length())):
            if x.shape[1] >> level & 1:
                block, stop = slice(stop, stop + 2**level), stop + 2**level
                blocks[level] = self._summarise(
                    q[:, block].amax(1, True), k[:, block].amax(1, True), k[:, block], v[:, block]
                )
        return self(x), LogsparseState(k, v, blocks)

    def step(self, x: Tensor, state: LogsparseState | None = None) -> tuple[Tensor, LogsparseState]:
        """One token `(B, dim)`; a block of 2^l tokens ends, and is read, every 2^l tokens."""
        self._check_stream()
        q, k, v = self._qkv(x[:, None])
        blocks = {} if state is None else dict(state.blocks)
        near = [
            torch.cat([one, *(getattr(block, name) for block in blocks.values())], 1)
            for one, name in ((k, "key"), (v, "value"))
        ]
        out: Any = ops.attention(q, *near)
        keys, values = (k, v) if state is None else (torch.cat([state.keys, k], 1), torch.cat([state.values, v], 1))
        level, query, key = 0, q, k
        while level in blocks:
            block = blocks.pop(level)
            query, key = torch.maximum(block.query, query), torch.maximum(block.key, key)
            level += 1
        blocks[level] = self._summarise(query, key, keys[:, -(2**level) :], values[:, -(2**level) :])
        return self.proj(out.flatten(1)), LogsparseState(keys, values, blocks)

    @staticmethod
    def _summarise(query: Tensor, key: Tensor, k: Tensor, v: Tensor) -> BlockSummary:
        value: Any = ops.attention(query, k, v)
        return BlockSummary(query, key, value)

    def state_size(self, length: int) -> int:
        """Two vectors for every token, three for every 1 in the binary number of tokens."""
        return self.dim * (2 * length + 3 * length.bit_count())
