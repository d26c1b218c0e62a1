"""The attention matrix that a Combiner pattern stands for, written out query by query and region by region."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from regard.systems.sequence.combiner import CombinerAxial, CombinerFixed, CombinerLogsparse, CombinerMixture

AnyCombiner = CombinerFixed | CombinerLogsparse | CombinerAxial | CombinerMixture


def regions_of(mixer: AnyCombiner, i: int, n: int) -> tuple[list[int], list[list[int]]]:
    """Which of n tokens token i attends directly, and the regions that are summarised for it."""
    if isinstance(mixer, CombinerLogsparse):
        blocks = []
        for level in range(n.bit_length()):
            own, sibling = i >> level, (i >> level) ^ 1
            if sibling < own or not mixer.causal:
                blocks.append(list(range(sibling << level, (sibling + 1) << level)))
        return [i], blocks
    size = mixer.segment_size
    assert size is not None
    row, column = divmod(i, size)
    columns, later = range(size), [] if mixer.causal else range(row + 1, -(-n // size))
    rows = [*range(row), *later]
    near = [row * size + c for c in columns if c <= column or not mixer.causal]
    if not isinstance(mixer, CombinerMixture):
        return near, [[r * size + c for c in columns] for r in rows]
    near += [r * size + column for r in rows]
    upright = [[r * size + c for r in part] for c in columns if c != column for part in (range(row), later)]
    sideways = [[r * size + c for c in part] for r in rows for part in (range(column), range(column + 1, size))]
    return near, upright + sideways


def matrix_of(mixer: AnyCombiner, x: Tensor, seen: Sequence[bool] | None = None) -> tuple[Tensor, Tensor]:
    """What the mixer multiplies the values by, `(heads, n, n)`, and the values, `(heads, n, head_dim)`.

    Args:
        x: inputs `(n, dim)`. seen: which of them exist; None is all.
    """
    n, size = len(x), getattr(mixer, "segment_size", 1)
    x = torch.cat([x, x.new_zeros(-n % size, x.shape[1])])
    if seen is not None:
        x = torch.stack([token if index >= n or seen[index] else 0 * token for index, token in enumerate(x)])
    q, k, v = (part(x).view(len(x), mixer.num_heads, -1).transpose(0, 1) for part in (mixer.q, mixer.k, mixer.v))
    q = q / mixer.head_dim**0.5

    def real(tokens: list[int]) -> list[int]:
        return [token for token in tokens if token < n and (seen is None or seen[token])]

    def pool(rows: Tensor) -> Tensor:
        return rows.sum(0) if getattr(mixer, "running", "max") == "sum" else rows.amax(0)

    def row_key(token: int) -> Tensor:  # (heads, head_dim), of an axial summary
        row = real(list(range(token // size * size, (token // size + 1) * size)))
        read = torch.cat([(k[h, row] @ q[h, token]).softmax(0) @ v[h, row] for h in range(mixer.num_heads)])
        return mixer.row(read, x[token]).view(mixer.num_heads, -1)  # type: ignore[union-attr]

    axial = isinstance(mixer, CombinerAxial)
    keys = [row_key(token) for token in range(len(x))] if axial else []
    heads = []
    for h in range(mixer.num_heads):
        rows = []
        for i in range(n):
            direct, regions = regions_of(mixer, i, n)
            logits, parts = [], []
            for tokens in [*([token] for token in real(direct)), *regions]:
                alone, tokens = len(tokens) == 1 and tokens[0] in direct, real(tokens)
                if not tokens:
                    continue
                query, key = (k[h, tokens[0]],) * 2 if alone else (pool(q[h, tokens]), pool(k[h, tokens]))
                if axial and not alone:
                    above = tokens[0] // size * size + i % size
                    query, key = q[h, above], keys[above][h]
                logits.append(q[h, i] @ key)
                inside = (k[h, tokens] @ query).softmax(0)
                parts.append(torch.zeros_like(x[:n, 0]).scatter(0, torch.tensor(tokens), inside))
            rows.append(torch.stack(logits).softmax(0) @ torch.stack(parts) if parts else torch.zeros_like(x[:n, 0]))
        heads.append(torch.stack(rows))
    return torch.stack(heads), v[:, :n]
