"""How a sequence is cut into shards, one for each process, and put together again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from regard import checks

Layout = Literal["contiguous", "zigzag"]
LAYOUTS = ("contiguous", "zigzag")
Ranges = list[tuple[int, int]]
"""Stretches (start, stop) of a sequence, in ascending order."""


def shard_ranges(length: int, ranks: int, layout: Layout = "contiguous") -> list[Ranges]:
    """For each rank, the stretches (start, stop) of a sequence of `length` tokens that it holds.

    "contiguous" cuts as many pieces as there are ranks; "zigzag" twice as many, of which rank r gets the r-th from the
    front and the r-th from the end. Pieces differ by one token at most.
    """
    checks.one_of("layout", layout, LAYOUTS)
    pieces = ranks if layout == "contiguous" else 2 * ranks
    if length < pieces:
        raise ValueError(
            f"{length} tokens cannot be spread over {ranks} ranks ({layout}): at least {pieces} are needed."
        )
    ends = [0]
    for piece in range(pieces):
        ends.append(ends[-1] + length // pieces + (piece < length % pieces))
    ranges = list(zip(ends[:-1], ends[1:], strict=True))
    if layout == "contiguous":
        return [[one] for one in ranges]
    return [[ranges[rank], ranges[-1 - rank]] for rank in range(ranks)]


def shard_sequence(
    x: Tensor, *, axis: int = 1, layout: Layout = "contiguous", group: dist.ProcessGroup | None = None
) -> Tensor:
    """This rank's shard of a sequence that every rank has whole; without processes, all of it."""
    if not started():
        return x
    group = member_group(group)
    ranges = shard_ranges(x.shape[axis], dist.get_world_size(group), layout)[dist.get_rank(group)]
    return torch.cat([x.narrow(axis, start, stop - start) for start, stop in ranges], axis)


@torch.no_grad()
def gather_sequence(
    x: Tensor, *, axis: int = 1, layout: Layout = "contiguous", group: dist.ProcessGroup | None = None
) -> Tensor:
    """The whole sequence on every rank, from the shards; no gradient flows back."""
    if not started():
        return x
    group = member_group(group)
    lengths = [row[0] for row in share([x.shape[axis]], x.device, group)]
    shape, parts = list(x.shape), []
    for rank, length in enumerate(lengths):
        shape[axis] = length
        parts.append(x.contiguous() if rank == dist.get_rank(group) else x.new_empty(shape))
        dist.broadcast(parts[-1], dist.get_global_rank(group, rank), group=group)
    whole = torch.cat(parts, axis)
    return whole.index_select(axis, places(ranges_of(lengths, layout)).argsort().to(x.device))


def shard_positions(
    length: int,
    *,
    layout: Layout = "contiguous",
    group: dist.ProcessGroup | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """`(length,)` the places in the whole sequence of this rank's `length` tokens."""
    if not started():
        return torch.arange(length, device=device)
    group = member_group(group)
    lengths = [row[0] for row in share([length], device, group)]
    return places([ranges_of(lengths, layout)[dist.get_rank(group)]]).to(device)


def ranges_of(lengths: Sequence[int], layout: Layout) -> list[Ranges]:
    """The ranges of shards of these lengths; zigzag shards have to be those of `shard_ranges`."""
    if layout == "contiguous":
        ends = [0]
        for length in lengths:
            ends.append(ends[-1] + length)
        return [[one] for one in zip(ends[:-1], ends[1:], strict=True)]
    ranges = shard_ranges(sum(lengths), len(lengths), layout)
    expected = [sum(stop - start for start, stop in own) for own in ranges]
    if list(lengths) != expected:
        raise ValueError(
            f"zigzag shards of {sum(lengths)} tokens must have {expected} tokens, got {list(lengths)}: cut them with "
            "shard_sequence(layout='zigzag'), or use layout='contiguous', which takes any lengths."
        )
    return ranges


def places(ranges: Sequence[Ranges]) -> Tensor:
    """Places in the sequence of the tokens of these shards, one shard after the other."""
    return torch.cat([torch.arange(start, stop, device="cpu") for own in ranges for start, stop in own])


def started() -> bool:
    """Whether there are processes to share with."""
    return dist.is_available() and dist.is_initialized()


def member_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """The group, all processes if None; raises unless this one is in it."""
    group = dist.group.WORLD if group is None else group
    if group is None or dist.get_rank(group) < 0:
        raise ValueError("this process is not in `group`: only its members may call.")
    return group


def share(numbers: Sequence[int], device: Any, group: dist.ProcessGroup) -> list[list[int]]:
    """These whole numbers of every rank."""
    mine = torch.tensor(numbers, dtype=torch.long, device=device)
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, mine, group=group)
    return [row.tolist() for row in rows]
