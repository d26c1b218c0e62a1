"""What the tests of distributed attention run in several processes; here, so that those need not import pytest."""

from __future__ import annotations

import copy
from itertools import product

import torch
import torch.distributed as dist

from regard import ops
from regard.ops.distributed import METHODS, distributed_attention
from regard.ops.shards import shard_positions, shard_sequence
from regard.systems.sequence.million_scale import DistributedAttention, spread


def everything():
    """All of the below, by name."""
    return {"uneven": uneven(), "told": told(), "grid_and_half": grid_and_half()}


def told():
    """What shards that do not fit are told, on this rank."""
    rank, said = dist.get_rank(), []

    def call(*shapes, **how):
        try:
            distributed_attention(*(torch.randn(shape) for shape in shapes), **how)
            said.append("")
        except ValueError as error:
            said.append(str(error))

    even = (1, 4, 2, 8)
    call(even, even, even, causal=rank == 0)
    call(*[(1, 4 + rank, 2, 8)] * 3, causal=True, layout="zigzag")
    call(*[(1, 4, 3, 8)] * 3, method="heads")
    call(*[(1, rank, 2, 8)] * 3)
    call(even, (1, 5, 2, 8), (1, 5, 2, 8), causal=True)
    return said


def uneven():
    """Errors on contiguous shards of very different lengths; without causal, also with fewer keys than queries."""
    rank, lengths = dist.get_rank(), [3, 700]
    ends = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    here = slice(ends[rank], ends[rank + 1])
    assert torch.equal(shard_positions(lengths[rank]), torch.arange(here.start, here.stop))
    q, k, v, w = torch.randn(4, 1, ends[-1], 4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    errors = []
    for method, causal in product(METHODS, (True, False)):
        left_out = 0 if causal else 2
        kept = torch.cat(
            [torch.arange(start + left_out, stop) for start, stop in zip(ends[:-1], ends[1:], strict=True)]
        )
        whole = [x.clone().requires_grad_() for x in (q, k, v)]
        truth = ops.attention(whole[0], whole[1][:, kept], whole[2][:, kept], causal=causal)
        expected = torch.autograd.grad((truth * w).sum(), whole)
        mine = [x[:, here].clone().requires_grad_() for x in (q, k, v)]
        out = distributed_attention(mine[0], *(x[:, left_out:] for x in mine[1:]), causal=causal, method=method)
        got = torch.autograd.grad((out * w[:, here]).sum(), mine)
        pairs = zip((out, *got), (truth, *expected), strict=True)
        errors.append(max(float((a - b[:, here]).detach().abs().max()) for a, b in pairs))
    return errors


def grid_and_half():
    """A spread mixer on a map that is cut along its first axis, and in bfloat16, beside the whole on one process."""
    torch.manual_seed(0)
    mixer, x = DistributedAttention(16, 2), torch.randn(2, 6, 5, 16)
    whole = mixer(x)
    half = copy.deepcopy(mixer).bfloat16()
    group = dist.group.WORLD
    here = shard_sequence(x, group=group)
    assert copy.deepcopy(spread(mixer, group)).group is None
    out, rough = mixer(here), spread(half, group)(here.bfloat16())
    assert rough.dtype == torch.bfloat16
    return [float((y.float() - shard_sequence(whole, group=group)).detach().abs().max()) for y in (out, rough)]
