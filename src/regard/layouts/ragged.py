"""Ragged batches: groups of any size laid end to end, described by offsets `(groups + 1,)`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


def check_offsets(argument: str, offsets: Tensor, rows: int) -> None:
    """Raise a ValueError unless `offsets` starts at 0, never decreases and ends at `rows`.

    A compiler sees no numbers: what it traces is left to the kernel, which looks again.
    """
    if offsets.dim() != 1 or len(offsets) < 1 or offsets.is_floating_point():
        raise ValueError(
            f"{argument} must be a (groups + 1,) integer tensor, got {offsets.dtype} {tuple(offsets.shape)}."
        )
    if torch.compiler.is_compiling():
        return
    if int(offsets[0]) != 0 or int(offsets[-1]) != rows or bool((offsets.diff() < 0).any()):
        raise ValueError(f"{argument} must rise from 0 to the number of rows, {rows}, got {offsets.tolist()[:12]}.")


def offsets_from_ids(ids: Tensor, groups: int) -> Tensor:
    """Offsets of sorted group numbers `ids` `(N,)`: `(groups + 1,)`.

    Raises:
        ValueError: if `ids` is not sorted or out of range.
    """
    if bool((ids.diff() < 0).any()) or (len(ids) and (int(ids[0]) < 0 or int(ids[-1]) >= groups)):
        raise ValueError(f"group numbers must be sorted and lie in 0..{groups - 1}.")
    return torch.cat([ids.new_zeros(1), torch.bincount(ids, minlength=groups).cumsum(0)])


class Bucket(NamedTuple):
    """Groups of similar size as one padded batch.

    Attributes:
        rows: `(g, R)` row of q in each slot (padding repeats a row). row_exists: `(g, R)` which slots are real.
        keys, key_exists: the same for k and v, `(g, K)`.
    """

    rows: Tensor
    row_exists: Tensor
    keys: Tensor
    key_exists: Tensor


def buckets(offsets: Tensor, key_offsets: Tensor) -> Iterator[Bucket]:
    """Put groups with rows and keys into buckets: sizes are rounded up to the next power of two."""
    row_count, key_count = offsets.diff(), key_offsets.diff()
    used = (row_count > 0) & (key_count > 0)

    def level(count: Tensor) -> Tensor:
        return torch.ceil(torch.log2(count.clamp(min=1).double())).long()

    kind = level(row_count) * 64 + level(key_count)
    for value in torch.unique(kind[used]).tolist():
        group = torch.nonzero(used & (kind == value)).squeeze(1)
        rows, row_exists = slots(offsets[group], row_count[group])
        keys, key_exists = slots(key_offsets[group], key_count[group])
        yield Bucket(rows, row_exists, keys, key_exists)


def slots(start: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Groups as one batch padded to the largest, from their first rows `(g,)` and their sizes `(g,)`.

    Returns:
        `(g, R)` row in each slot (padding repeats a group's last row), and which slots are real.
    """
    slot = torch.arange(int(count.max()), device=start.device)
    exists = slot < count[:, None]
    return start[:, None] + torch.minimum(slot, count[:, None] - 1), exists
