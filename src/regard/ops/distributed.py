"""Softmax attention over a sequence that is spread over processes, with `torch.distributed`.

Each process (rank) holds a shard of the tokens. Three ways lead to the same result:

    ring   keys and values go round; what each rank has found for its queries is merged (ops.merge_attention)
    heads  an exchange gives each rank all tokens of some heads, another one gives the tokens back
    keys   keys and values stay; queries visit all ranks, and partial sums are reduced with softmax re-scaling

Where several ranks work on one call, all of them have to make it, in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from regard import checks
from regard.flops import counted
from regard.ops.dense import attention, attention_macs
from regard.ops.merge import merge_attention
from regard.ops.shards import LAYOUTS, Layout, Ranges, member_group, places, ranges_of, share, started

Method = Literal["ring", "heads", "keys"]
METHODS = ("ring", "heads", "keys")
_ROWS = 512  # queries whose logits exist at one time


def distributed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    method: Method = "ring",
    layout: Layout = "contiguous",
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    r"""Softmax attention of this rank's queries over the keys of all ranks.

    $$o_i = \sum_r \frac{l_i^{(r)}}{l_i} e^{m_i^{(r)} - m_i}\, o_i^{(r)},\qquad
      m_i = \max_r m_i^{(r)},\quad l_i = \sum_r e^{m_i^{(r)} - m_i}\, l_i^{(r)}$$

    with $o^{(r)}$ the attention to the keys of rank r, $m$ the largest logit and $l$ the sum of exponentials. The backward
    pass computes weights again from the log-sum-exp, so that with "ring" nothing of the size of the whole sequence exists
    on a rank: activations are O(L / ranks), logits 512 queries times the keys of one rank.

    | method | sent by a rank, forward | needs | memory of a rank |
    |---|---|---|---|
    | ring | keys and values of all others, while it computes | nothing | O(L / ranks) |
    | heads | its q, k, v and result, once each | ranks divides heads and kv_heads | O(L / ranks), all tokens of some heads |
    | keys | queries and partial results, not keys: for few queries and many keys | nothing | O(L / ranks) |

    Args:
        q: `(batch, tokens, heads, head_dim)`, this rank's queries. Shards may differ in length, but not be empty.
        k, v: `(batch, tokens_k, kv_heads, ...)`, this rank's keys and values; kv_heads divides heads.
        causal: a query sees its own token and earlier ones of the whole sequence; q and k are then shards of one sequence.
        scale: None is head_dim ** -0.5.
        layout: how shards make up the sequence, see `regard.ops.shards`; it matters only if `causal`. "contiguous" leaves the
            last rank with the most work; "zigzag" gives all ranks the same.
        group: the processes that share the sequence; None is all. Without any (torch.distributed not initialised) the
            tokens here are the whole sequence.

    Returns:
        `(batch, tokens, heads, value_dim)`, this rank's part of the result.

    Raises:
        ValueError: for shapes that do not fit, on every rank alike where it is the shards that do not agree.

    Example:
        Under `torchrun --nproc-per-node 4`, after `torch.distributed.init_process_group()`:

        >>> q, k, v = (shard_sequence(x, layout="zigzag") for x in whole)
        >>> out = distributed_attention(q, k, v, causal=True, layout="zigzag")
    """
    checks.one_of("method", method, METHODS)
    checks.one_of("layout", layout, LAYOUTS)
    if not started():
        return attention(q, k, v, causal=causal, scale=scale)  # type: ignore[return-value]
    if q.dim() != 4:
        raise ValueError(
            f"q must be (batch, tokens, heads, head_dim), got {tuple(q.shape)}: flatten spatial axes first."
        )
    plan = _plan(q, k, v, causal, scale, layout, group)
    checks.heads_last(q, k, v, same_grid=causal)
    checks.no_half_on_cpu("distributed_attention", q)
    if method == "heads":
        return _by_heads(q, k, v, plan)
    both = _Ring if method == "ring" else _Keys

    def macs(q: Tensor, k: Tensor, v: Tensor, plan: _Plan) -> int:
        return attention_macs(q, k, v) // k.shape[1] * sum(plan.k_lengths)

    return counted(macs, both.apply, (q, k, v, plan), {})


# What one rank computes


@dataclass(frozen=True)
class _Plan:
    """Who holds what, and what is asked."""

    group: dist.ProcessGroup
    rank: int
    q_ranges: list[Ranges]
    k_ranges: list[Ranges]
    causal: bool
    scale: float

    @property
    def ranks(self) -> int:
        return len(self.q_ranges)

    @property
    def q_lengths(self) -> list[int]:
        return [sum(stop - start for start, stop in own) for own in self.q_ranges]

    @property
    def k_lengths(self) -> list[int]:
        return [sum(stop - start for start, stop in own) for own in self.k_ranges]

    def peer(self, rank: int) -> int:
        """The number among all processes of a rank of the group."""
        return dist.get_global_rank(self.group, rank % self.ranks)

    def blocks(self, of: int, owner: int) -> list[tuple[slice, int, bool]]:
        """Blocks of the queries of rank `of`, how many keys of `owner` each of them sees, and whether as a triangle.

        Shards are in ascending order, so the keys that a block sees come first in theirs; and where a block meets its own
        tokens, these are the last of them.
        """
        found, begin = [], 0
        for start, stop in self.q_ranges[of]:
            for first in range(start, stop, _ROWS):
                last = min(first + _ROWS, stop)
                seen = self.k_lengths[owner]
                if self.causal:
                    seen = sum(max(0, min(b, last) - a) for a, b in self.k_ranges[owner])
                if seen:
                    place = begin + first - start
                    found.append((slice(place, place + last - first), seen, self.causal and of == owner))
            begin += stop - start
        return found


def _plan(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None, layout: Layout, group: dist.ProcessGroup | None
) -> _Plan:
    group = member_group(group)
    same = [q.shape[0], *q.shape[2:], *k.shape[2:], *v.shape[2:], int(causal), LAYOUTS.index(layout)]
    rows = share([*same, q.shape[1], k.shape[1]], q.device, group)
    for rank, row in enumerate(rows):
        if row[:-2] != rows[0][:-2]:
            raise ValueError(
                f"rank {rank} calls with another batch, heads, widths, causal or layout than rank 0: {row[:-2]} and "
                f"{rows[0][:-2]}; only the tokens may differ."
            )
    queries, keys = [row[-2] for row in rows], [row[-1] for row in rows]
    if min(queries) < 1 or min(keys) < 1:
        raise ValueError(f"every rank needs at least one token, got {queries} queries and {keys} keys on the ranks.")
    if causal and queries != keys:
        raise ValueError(f"causal attention needs q and k of one length on each rank, got {queries} and {keys}.")
    if not causal:
        layout = "contiguous"
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _Plan(group, dist.get_rank(group), ranges_of(queries, layout), ranges_of(keys, layout), causal, scale)


def _attend(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: _Plan, of: int, owner: int) -> None:
    """Merge into `out` and `lse` of the queries of rank `of` what they find among the keys of `owner`."""
    for rows, seen, triangle in plan.blocks(of, owner):
        found = attention(q[:, rows], k[:, :seen], v[:, :seen], causal=triangle, scale=plan.scale, return_lse=True)
        parts = [out[:, rows], found[0].to(out.dtype)], [lse[:, rows], found[1].to(lse.dtype)]
        out[:, rows], lse[:, rows] = merge_attention(*parts)


def _attend_backward(
    asked: tuple[Tensor, ...],
    k: Tensor,
    v: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    plan: _Plan,
    of: int,
    owner: int,
) -> None:
    r"""Add to `grads` of q, k and v what comes from the queries of `of` and the keys of `owner`.

    $$P = e^{S - \mathrm{lse}},\quad dV = P^\top dO,\quad dS = P \odot (dO\,V^\top - \delta),\quad
      dQ = \mathrm{scale}\; dS\,K,\quad dK = \mathrm{scale}\; dS^\top Q$$

    Args:
        asked: q, gradient of the result, lse, and $\delta = \sum dO \odot O$, all of rank `of`.
    """
    heads = k.shape[2]

    def rows_of(x: Tensor, rows: slice) -> Tensor:
        """`(B, N, heads, c)` -> `(B, kv_heads, group * rows, c)`: query heads that share keys become rows."""
        return x[:, rows].unflatten(2, (heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3).to(grads[0].dtype)

    def back(x: Tensor, count: int) -> Tensor:
        return x.unflatten(2, (-1, count)).permute(0, 3, 1, 2, 4).flatten(2, 3)

    for rows, seen, triangle in plan.blocks(of, owner):
        count = rows.stop - rows.start
        query, slope, lse, delta = (rows_of(x, rows) for x in asked)
        keys, values = (x[:, :seen].transpose(1, 2).to(query.dtype) for x in (k, v))
        weights = torch.exp(plan.scale * (query @ keys.transpose(-1, -2)) - lse)
        if triangle:
            past = torch.ones(count, seen, dtype=torch.bool, device=query.device).tril(seen - count)
            weights = weights.unflatten(2, (-1, count)).masked_fill(~past, 0.0).flatten(2, 3)
        grads[2][:, :seen] += (weights.transpose(-1, -2) @ slope).transpose(1, 2)
        weights *= slope @ values.transpose(-1, -2) - delta
        grads[0][:, rows] += plan.scale * back(weights @ keys, count)
        grads[1][:, :seen] += plan.scale * (weights.transpose(-1, -2) @ query).transpose(1, 2)


def _nothing_yet(q: Tensor, v: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Result and log-sum-exp over no keys, for so many queries, in float32 at least."""
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros(q.shape[0], tokens, q.shape[2], v.shape[-1], dtype=wide)
    return out, out.new_full(out.shape[:-1], -torch.inf)


def _delta(grad: Tensor, out: Tensor) -> Tensor:
    return (grad.to(out.dtype) * out).sum(-1, keepdim=True)


# Keys and values go round


def _pass_on(tensors: Sequence[Tensor], length: int, plan: _Plan, tag: int) -> tuple[list[Tensor], list[Any]]:
    """Send to the next rank and receive the same from the one before, where they have `length` tokens; not awaited."""
    received = [x.new_empty(x.shape[0], length, *x.shape[2:]) for x in tensors]
    send, receive = (partial(dist.P2POp, op, group=plan.group) for op in (dist.isend, dist.irecv))
    following, before = plan.peer(plan.rank + 1), plan.peer(plan.rank - 1)
    asks = [send(x, following, tag=tag + index) for index, x in enumerate(tensors)]
    asks += [receive(x, before, tag=tag + index) for index, x in enumerate(received)]
    return received, dist.batch_isend_irecv(asks)


def _wait(works: Sequence[Any]) -> None:
    for work in works:
        work.wait()


class _Ring(torch.autograd.Function):
    """In step s the keys here are those of rank - s; the next ones arrive meanwhile."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: _Plan) -> Tensor:
        out, lse = _nothing_yet(q, v, q.shape[1])
        here: list[Tensor] = [k.contiguous(), v.contiguous()]
        for step in range(plan.ranks):
            owner = (plan.rank - step) % plan.ranks
            last = step + 1 == plan.ranks
            coming, works = (here, []) if last else _pass_on(here, plan.k_lengths[owner - 1], plan, tag=0)
            _attend(q, here[0], here[1], out, lse, plan, plan.rank, owner)
            _wait(works)
            here = coming
        ctx.plan = plan
        ctx.save_for_backward(q, k, v, out, lse)
        return out.to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # The gradients of keys and values travel with them, and are home after a full round.
        q, k, v, out, lse = ctx.saved_tensors
        plan: _Plan = ctx.plan
        asked = (q, grad, lse[..., None], _delta(grad, out))
        dq = torch.zeros_like(q, dtype=out.dtype)
        here = [k.contiguous(), v.contiguous()]
        slopes = [torch.zeros_like(x, dtype=out.dtype, memory_format=torch.contiguous_format) for x in here]
        for step in range(plan.ranks):
            owner = (plan.rank - step) % plan.ranks
            last = step + 1 == plan.ranks
            coming, works = (here, []) if last else _pass_on(here, plan.k_lengths[owner - 1], plan, tag=0)
            _attend_backward(asked, here[0], here[1], (dq, slopes[0], slopes[1]), plan, plan.rank, owner)
            if plan.ranks > 1:
                slopes, others = _pass_on(slopes, plan.k_lengths[owner - 1], plan, tag=2)
                _wait([*others, *works])
            here = coming
        return dq.to(q.dtype), slopes[0].to(k.dtype), slopes[1].to(v.dtype), None


# Queries visit the keys


def _announce(x: Tensor, length: int, owner: int, plan: _Plan) -> Tensor:
    """The tensor of rank `owner`, where it has `length` tokens, on all ranks."""
    x = x.contiguous() if owner == plan.rank else x.new_empty(x.shape[0], length, *x.shape[2:])
    dist.broadcast(x, plan.peer(owner), group=plan.group)
    return x


class _Keys(torch.autograd.Function):
    """The queries of one rank after the other; maxima and sums of the partial results are reduced to their owner."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: _Plan) -> Tensor:
        mine: tuple[Tensor, Tensor] = _nothing_yet(q, v, q.shape[1])
        for owner, length in enumerate(plan.q_lengths):
            asked = _announce(q, length, owner, plan)
            out, lse = _nothing_yet(q, v, length)
            _attend(asked, k, v, out, lse, plan, owner, plan.rank)
            top = lse.clone()
            dist.all_reduce(top, dist.ReduceOp.MAX, group=plan.group)
            share = torch.exp(lse - top)[..., None]
            sums = torch.cat([share * out, share], -1)
            dist.reduce(sums, plan.peer(owner), group=plan.group)
            if owner == plan.rank:
                mine = sums[..., :-1] / sums[..., -1:], top + sums[..., -1].log()
        ctx.plan = plan
        ctx.save_for_backward(q, k, v, *mine)
        return mine[0].to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        plan: _Plan = ctx.plan
        sizes = [q.shape[-1], grad.shape[-1], 1, 1]
        mine = torch.cat([q.to(out.dtype), grad.to(out.dtype), lse[..., None], _delta(grad, out)], -1)
        dq, dk, dv = (torch.zeros_like(x, dtype=out.dtype) for x in (q, k, v))
        for owner, length in enumerate(plan.q_lengths):
            asked = _announce(mine, length, owner, plan).split(sizes, -1)
            slope = out.new_zeros(q.shape[0], length, *q.shape[2:])
            _attend_backward(asked, k, v, (slope, dk, dv), plan, owner, plan.rank)
            dist.reduce(slope, plan.peer(owner), group=plan.group)
            if owner == plan.rank:
                dq = slope
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None


# Heads instead of tokens


def _to_heads(x: Tensor, lengths: Sequence[int], plan: _Plan) -> Tensor:
    """`(B, own tokens, heads, c)` -> `(B, all tokens, heads / ranks, c)`, shard after shard."""
    pieces = [part.contiguous() for part in x.chunk(plan.ranks, 2)]
    sizes = [x.shape[0] * length * pieces[0].shape[2] * x.shape[3] for length in lengths]
    received = _exchange(pieces, sizes, plan)
    parts = zip(received.split(sizes), lengths, strict=True)
    return torch.cat([part.view(x.shape[0], length, -1, x.shape[3]) for part, length in parts], 1)


def _to_tokens(x: Tensor, lengths: Sequence[int], plan: _Plan) -> Tensor:
    """The way back."""
    pieces = [part.contiguous() for part in x.split(list(lengths), 1)]
    size = pieces[plan.rank].numel()
    received = _exchange(pieces, [size] * plan.ranks, plan)
    own = x.shape[0], lengths[plan.rank], -1, x.shape[3]
    return torch.cat([part.view(own) for part in received.split(size)], 2)


def _exchange(pieces: Sequence[Tensor], sizes: Sequence[int], plan: _Plan) -> Tensor:
    sent = torch.cat([piece.flatten() for piece in pieces])
    received = sent.new_empty(sum(sizes))
    dist.all_to_all_single(received, sent, list(sizes), [piece.numel() for piece in pieces], group=plan.group)
    return received


class _Swap(torch.autograd.Function):
    """Tokens for heads or back; the gradient takes the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: Sequence[int], plan: _Plan, to_heads: bool) -> Tensor:
        ctx.rest = lengths, plan, to_heads
        return (_to_heads if to_heads else _to_tokens)(x, lengths, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        lengths, plan, to_heads = ctx.rest
        return (_to_tokens if to_heads else _to_heads)(grad, lengths, plan), None, None, None


def _by_heads(q: Tensor, k: Tensor, v: Tensor, plan: _Plan) -> Tensor:
    for name, count in (("heads", q.shape[2]), ("kv_heads", k.shape[2])):
        if count % plan.ranks:
            raise ValueError(
                f"method='heads' gives each rank as many heads: {name}={count} must be a multiple of the {plan.ranks} "
                "ranks. Use method='ring'."
            )
    q = _Swap.apply(q, plan.q_lengths, plan, True)
    k, v = (_Swap.apply(x, plan.k_lengths, plan, True) for x in (k, v))
    in_order = plan.causal and any(len(own) > 1 for own in plan.q_ranges)
    if in_order:
        order = places(plan.q_ranges)
        q, k, v = (x[:, order.argsort().to(x.device)] for x in (q, k, v))
    out = attention(q, k, v, causal=plan.causal, scale=plan.scale)
    if in_order:
        out = out[:, order.to(out.device)]  # type: ignore[call-overload]
    return _Swap.apply(out, plan.q_lengths, plan, False)
