"""The patterns of Combiner that cut a sequence into segments, the rows of an image: fixed, axial and mixture."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import checks, ops
from regard.registry import register_mixer
from regard.systems.sequence._combiner_core import (
    Part,
    Segmented,
    Summary,
    appended,
    attend,
    largest,
    merged,
    others,
    past,
    read,
    renamed,
    turn,
)

Running = Literal["max", "sum"]


@register_mixer("combiner_fixed")
class CombinerFixed(Segmented):
    """Combiner-Fixed: the own segment directly, each other one by one summary that all queries share (section 4.1).

    N tokens in segments of m cost N (m + N / m). Causal queries see summaries of strictly earlier segments. A stream keeps
    two vectors for every segment that ended.
    """

    authors_keys = renamed()

    def join(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, seen: Tensor | None) -> Tensor:
        """A segment's queries share their keys, so these are joined before the softmax."""
        segments, size = q.shape[1:3]
        pairs = zip((k, v), self.summarise(q, k, v, seen), strict=True)
        keys, values = (torch.cat([own, far[:, None].expand(-1, segments, -1, -1, -1)], 2) for own, far in pairs)
        near, far = past(size, q) if self.causal else None, self._reachable(segments, q)
        mask = q.new_ones(segments, size, size + segments, dtype=torch.bool)
        if near is not None:
            mask[..., :size] = near
        if far is not None:
            mask[..., size:] = far[:, None]
        mask = mask.expand(len(q), -1, -1, -1)
        if seen is not None:
            exist = torch.cat([seen, seen.any(2)[:, None].expand(-1, segments, -1)], 2)
            mask = mask & exist[:, :, None]
        out: Any = ops.attention(*(part.flatten(0, 1) for part in (q, keys, values)), mask=mask.flatten(0, 1)[:, None])
        return out.view_as(q)

    def summarise(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Summary:
        """Key and value of every segment, each `(B, S, heads, head_dim)`."""
        value = read(largest(q, seen, 2), k, v, None, seen)
        return largest(k, seen, 2).squeeze(2), value.squeeze(2)

    def remember(self, memory: tuple[Tensor, ...], x: Tensor) -> tuple[Tensor, ...]:
        """One key and one value a segment."""
        return appended(memory, self.summarise(*self._qkv(x)))

    def recall(self, memory: tuple[Tensor, ...], place: int) -> list[Summary]:
        """All summaries."""
        return [(memory[0], memory[1])]

    def memory_size(self, segments: int, size: int) -> int:
        """Two vectors a segment."""
        return 2 * self.dim * segments


class RowKey(nn.Module):
    """Key of a row's summary: `to_key(norm(proj(read) + x))`."""

    def __init__(self, dim: int, *, bias: bool, norm_eps: float) -> None:
        super().__init__()
        self.proj, self.norm = nn.Linear(dim, dim, bias=bias), nn.LayerNorm(dim, norm_eps)
        self.to_key = nn.Linear(dim, dim, bias=bias)

    def forward(self, read: Tensor, x: Tensor) -> Tensor:
        """What a token read in its row, and the token itself, each `(..., dim)` -> the key, likewise."""
        return self.to_key(self.norm(self.proj(read) + x))


@register_mixer("combiner_axial")
class CombinerAxial(Segmented):
    r"""Combiner-Axial, row-major: the own row directly, other rows as the token in the query's column read them (section 4.3).

    $$\bar v_{T,u} = \sum_j \mathrm{softmax}_j(q_{T,u} \cdot k_{T,j})\, v_{T,j},\quad
      \bar k_{T,u} = W_k\,\mathrm{LN}(W_r \bar v_{T,u} + x_{T,u})$$

    Query (S, u) sees summaries (T, u), T < S if causal. They read the whole row, later columns included: only later rows use
    them. A stream keeps two vectors for every token of rows that ended.

    Args:
        norm_eps: of the norm in the key (1e-6 in JAX, 1e-5 in TensorFlow).
        options: those of `Segmented`, and causal and bias.
    """

    authors_keys = renamed(
        (r"^DenseGeneral_2\.", "proj."),
        (r"^(?:rowmajor_param_post\.dense|DenseGeneral_0)\.", "row.proj."),
        (r"^(?:rowmajor_param_post\.dense_1|DenseGeneral_1)\.", "row.to_key."),
        (r"^(?:rowmajor_param_post\.pre_norm|LayerNorm_0)\.", "row.norm."),
    )

    def __init__(self, dim: int, num_heads: int, *, norm_eps: float = 1e-6, bias: bool = False, **options: Any) -> None:
        super().__init__(dim, num_heads, bias=bias, **options)
        self.row = RowKey(dim, bias=bias, norm_eps=norm_eps)

    def join(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, seen: Tensor | None) -> Tensor:
        """The own row, and the summaries in the own column."""
        own = attend(q, k, v, past(q.shape[2], q) if self.causal else None, seen)
        rows = None if seen is None else seen.any(2)[:, None].expand(-1, q.shape[2], -1)
        key, value = self.summarise(q, k, v, x, seen)
        out, lse = attend(turn(q), turn(key), turn(value), self._reachable(q.shape[1], q), rows)
        return merged([own, (turn(out), turn(lse))])

    def summarise(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, seen: Tensor | None = None) -> Summary:
        """Key and value of every row for every column, each `(B, S, m, heads, head_dim)`."""
        value = read(q, k, v, None, seen)
        return self._split(self.row(value.flatten(-2), x)), value

    def remember(self, memory: tuple[Tensor, ...], x: Tensor) -> tuple[Tensor, ...]:
        """Keys and values of every row for every column."""
        return appended(memory, self.summarise(*self._qkv(x), x))

    def recall(self, memory: tuple[Tensor, ...], place: int) -> list[Summary]:
        """The summaries in one column."""
        return [(memory[0][:, :, place], memory[1][:, :, place])]

    def memory_size(self, segments: int, size: int) -> int:
        """Two vectors for every token."""
        return 2 * self.dim * segments * size


def running_max(x: Tensor) -> Tensor:
    """Cumulative maximum along axis 1."""
    # On CPU, several times faster along the axis that is contiguous in memory.
    return x.movedim(1, -1).contiguous().cummax(-1).values.movedim(-1, 1)


class Directional(NamedTuple):
    """Summaries of everything up to a place along axis 1 of a grid `(B, n, m, heads, head_dim)`, that place included.

    Attributes:
        key, value: as the grid. seen: `(B, n, m)`, False where the region is empty; None if none is.
    """

    key: Tensor
    value: Tensor
    seen: Tensor | None


@register_mixer("combiner_mixture")
class CombinerMixture(Segmented):
    r"""Combiner-Mixture: own row and column directly, all else by summaries of rows and of columns, in one softmax.

    (The release's `_AxialMixtureAtt`; the paper, which reports it, names it in its experiments.)

    Five groups of keys of causal query (S, u): tokens (S, <= u); tokens (< S, u); for every other column the summary of its
    rows < S; for every earlier row the summary of its columns < u; likewise > u. So tokens off the own row and column count
    twice, by design. The regions grow along rows and columns; their $\bar q$ and $\bar k$ are cumulative maxima.

    Bidirectional: also the summaries of rows > S, all of the row and of the column, and T != S in place of T < S.

    A stream keeps six vectors for every token of rows that ended, and three for every column.

    Args:
        running: "max", or "sum", which the release's TensorFlow code takes in place of cumulative maxima.
        options: those of `Segmented`, and causal and bias. With `authors_quirks` even empty regions count bidirectionally:
            their key is 0, and their value the mean of the whole row or column.
    """

    authors_keys = renamed()

    def __init__(self, dim: int, num_heads: int, *, running: Running = "max", **options: Any) -> None:
        super().__init__(dim, num_heads, **options)
        self.running = checks.one_of("running", running, ("max", "sum"))

    def join(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, seen: Tensor | None) -> Tensor:
        """Own row, own column, and the directions: down, rightwards, leftwards, and up unless causal."""
        quirks = self.authors_quirks and not self.causal
        if quirks and seen is not None:
            raise ValueError(
                "authors_quirks takes whole segments without a mask: empty regions are means over all of them."
            )
        rows, columns = q.shape[1:3]
        turned = turn(q), turn(k), turn(v)
        turned_seen = None if seen is None else turn(seen)
        own_row = past(columns, q) if self.causal else None
        other_rows = past(rows, q, strict=True) if self.causal else None if quirks else others(rows, q)
        other_columns = None if quirks else others(columns, q)
        by_row = [attend(q, k, v, own_row, seen)]
        by_column = [attend(*turned, other_rows, turned_seen)]
        for reverse in (False, True):
            by_column.append(self._beyond(*turned, other_rows, turned_seen, reverse, quirks))
            if not (reverse and self.causal):
                by_row.append(self._beyond(q, k, v, other_columns, seen, reverse, quirks))
        return merged([*by_row, *((turn(out), turn(lse)) for out, lse in by_column)])

    def _beyond(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pairs: Tensor | None,
        seen: Tensor | None,
        reverse: bool,
        quirks: bool,
    ) -> Part:
        """Every line of a grid, as queries, on the summaries of all lines before it (reverse: after it)."""
        if reverse:
            q, k, v = (part.flip(1) for part in (q, k, v))
            seen = None if seen is None else seen.flip(1)
        region = self.summarise(q, k, v, seen)
        if quirks:
            key = F.pad(region.key[:, :-1], (0,) * 6 + (1, 0))
            value = torch.cat([v.mean(1, True), region.value[:, :-1]], 1)
            out, lse = attend(q, key, value, pairs)
        else:
            found = None if region.seen is None else region.seen[:, :-1]
            out, lse = attend(q[:, 1:], region.key[:, :-1], region.value[:, :-1], pairs, found)
            out, lse = F.pad(out, (0,) * 6 + (1, 0)), F.pad(lse, (0,) * 4 + (1, 0), value=-math.inf)
        return (out.flip(1), lse.flip(1)) if reverse else (out, lse)

    def summarise(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Directional:
        """Summaries of the lines up to each line of a grid `(B, n, m, heads, head_dim)`, itself included."""
        found = None if seen is None else seen.cumsum(1) > 0
        query, key = (self._accumulate(part, seen, found) for part in (q, k))
        value = read(turn(query), turn(k), turn(v), past(q.shape[1], q), None if seen is None else turn(seen))
        return Directional(key, turn(value), found)

    def _accumulate(self, x: Tensor, seen: Tensor | None, found: Tensor | None) -> Tensor:
        if seen is None or found is None:
            return running_max(x) if self.running == "max" else x.cumsum(1)
        seen, found = seen[..., None, None], found[..., None, None]
        if self.running == "sum":
            return x.where(seen, 0.0).cumsum(1)
        return running_max(x.masked_fill(~seen, -math.inf)).where(found, 0.0)

    def remember(self, memory: tuple[Tensor, ...], x: Tensor) -> tuple[Tensor, ...]:
        """Keys and values of tokens, of what lies left of each and right of each (itself included); columns' q, k and v."""
        q, k, v = self._qkv(x)
        left = self.summarise(turn(q), turn(k), turn(v))
        right = self.summarise(*(turn(part).flip(1) for part in (q, k, v)))
        sides = (left.key, left.value, right.key.flip(1), right.value.flip(1))
        grids = appended(memory[:6], (k, v, *map(turn, sides)))
        tops = [self._accumulate(part, None, None)[:, -1:] for part in (q, k)]
        if memory:
            join = torch.maximum if self.running == "max" else torch.add
            tops = [join(old, new) for old, new in zip(memory[6:8], tops, strict=True)]
        return (*grids, *tops, turn(read(turn(tops[0]), turn(grids[0]), turn(grids[1]))))

    def recall(self, memory: tuple[Tensor, ...], place: int) -> list[Summary]:
        """The own column; what lies left and right of it in each row; the other columns."""
        k, v, left_k, left_v, right_k, right_v, _, column_k, column_v = memory
        columns = [torch.cat([part[:, 0, :place], part[:, 0, place + 1 :]], 1) for part in (column_k, column_v)]
        found = [(k[:, :, place], v[:, :, place]), (columns[0], columns[1])]
        if place > 0:
            found.append((left_k[:, :, place - 1], left_v[:, :, place - 1]))
        if place + 1 < k.shape[2]:
            found.append((right_k[:, :, place + 1], right_v[:, :, place + 1]))
        return found

    def memory_size(self, segments: int, size: int) -> int:
        """Six vectors for every token, and three for every column."""
        return self.dim * (6 * segments * size + (3 * size if segments else 0))
