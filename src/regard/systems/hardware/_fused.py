"""The fused kernels of (generalized) neighborhood attention, as a walk of query tiles over key tiles in plain PyTorch.

All query tiles take a step together, so a step is one batched product; no step holds more than a bounded number of
logits. Nothing of the size of the attention weights is kept: the backward pass computes them again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from regard.layouts.neighborhoods import offset_biases
from regard.layouts.tiles import Axis, Step, TileWalk, tile_count, tile_walk

_CHUNK = 1 << 22
"""Most logits that are held at once (numbers, over batch and heads) unless a single row of tiles needs more."""
_LOG2_E = math.log2(math.e)


class Problem(NamedTuple):
    """What is attended to, and in which tiles.

    Attributes:
        axes: the pattern. q_tile, kv_tile: shapes.
        permuted: keys are in the order of tiles and visited in tiles that start at multiples of `kv_tile`; otherwise they
            are on their grid and the walk starts at the first key that a tile needs.
    """

    axes: tuple[Axis, ...]
    q_tile: tuple[int, ...]
    kv_tile: tuple[int, ...]
    permuted: bool = False


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, problem: Problem) -> tuple[Tensor, Tensor]:
    """Attention of all query tiles.

    Args:
        q: `(B, n1, n2, .., heads, T, head_dim)`, tiles of T queries, scaled.
        k, v: `(B, *N, 1, heads, head_dim)` on their grid, or `(B, *tiles, T', heads, head_dim)` if permuted.
        bias: `(heads, 2 kernel - 1, ..)` or None.

    Returns:
        `(B, n1, n2, .., heads, T, value_dim)` and the log-sum-exp `(.., T, 1)`.
    """
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, bias)):
        return _Fused.apply(q, k, v, bias, problem)
    return _forward(q, k, v, bias, problem)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, problem: Problem
    ) -> tuple[Tensor, Tensor]:
        out, lse = _forward(q, k, v, bias, problem)
        ctx.save_for_backward(q, k, v, bias, out, lse)
        ctx.problem = problem
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, out, lse = ctx.saved_tensors
        return *_backward(q, k, v, bias, out, lse, d_out, d_lse, ctx.problem), None


def _forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, problem: Problem) -> tuple[Tensor, Tensor]:
    """Online softmax: the highest logit, the sum of exponentials and the weighted sum of values grow tile by tile."""
    outs, lses = [], []
    for part, walks in _parts(q, problem):
        queries = q[:, part]
        top = queries.new_full((*queries.shape[:-1], 1), -math.inf, dtype=_accumulator(q))
        total, out = torch.zeros_like(top), top.new_zeros(*queries.shape[:-1], v.shape[-1])
        for steps in itertools.product(*(walk.steps for walk in walks)):
            at, keys = _active(steps, walks), _keys(steps, problem)
            logits = _logits(queries[at], boxes(k, keys), bias, steps, problem)
            highest = torch.maximum(top[at], logits.amax(-1, keepdim=True))
            safe = highest.masked_fill(highest == -math.inf, 0.0)  # of a query that has met no key yet
            weights, faded = _exp(logits - safe), _exp(top[at] - safe)
            top[at] = highest
            total[at] = total[at] * faded + weights.sum(-1, keepdim=True)
            out[at] = out[at] * faded + weights.to(v.dtype) @ boxes(v, keys)
        outs.append((out / total).to(q.dtype))
        lses.append(top + total.log())
    return torch.cat(outs, 1), torch.cat(lses, 1)


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    d_lse: Tensor,
    problem: Problem,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The same walk with weights P = exp(logits - lse): dV = P^T dO, dS = P (dO V^T - rowsum(dO O) + dlse)."""
    kind = _accumulator(q)
    d_q, d_k, d_v = (torch.zeros_like(x, dtype=kind, memory_format=torch.contiguous_format) for x in (q, k, v))
    d_bias = None if bias is None else torch.zeros_like(bias, dtype=kind)
    offset = (d_out * out).sum(-1, keepdim=True, dtype=kind) - d_lse
    for part, walks in _parts(q, problem):
        queries, d_queries = q[:, part], d_q[:, part]
        for steps in itertools.product(*(walk.steps for walk in walks)):
            at, keys = _active(steps, walks), _keys(steps, problem)
            q_box, k_box, v_box, d_box = queries[at], boxes(k, keys), boxes(v, keys), d_out[:, part][at]
            weights = _exp(_logits(q_box, k_box, bias, steps, problem) - lse[:, part][at])
            _add_boxes(d_v, weights.to(v.dtype).transpose(-1, -2) @ d_box, keys)
            d_logits = weights * (d_box @ v_box.transpose(-1, -2) - offset[:, part][at])
            if d_bias is not None:
                _add_biases(d_bias, d_logits.sum(0), steps)
            d_logits = d_logits.to(q.dtype)
            d_queries[at] += d_logits @ k_box
            _add_boxes(d_k, d_logits.transpose(-1, -2) @ q_box, keys)
    return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), None if d_bias is None else d_bias.to(bias.dtype)  # type: ignore[union-attr]


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _parts(q: Tensor, problem: Problem) -> Iterator[tuple[slice, list[TileWalk]]]:
    """Ranges of tiles along the first axis, and the walks of all axes for them."""
    sizes = list(zip(problem.axes, problem.q_tile, problem.kv_tile, strict=True))
    others = [tile_walk(*size, problem.permuted, q.device) for size in sizes[1:]]
    per_tile = math.prod(q.shape[:-1]) // q.shape[1] * math.prod(problem.kv_tile)
    count = tile_count(*sizes[0][:2], problem.permuted)
    chunk = max(1, _CHUNK // max(per_tile, 1))
    for begin in range(0, count, chunk):
        stop = min(begin + chunk, count)
        yield slice(begin, stop), [tile_walk(*sizes[0], problem.permuted, q.device, (begin, stop)), *others]


def _active(steps: Sequence[Step], walks: Sequence[TileWalk]) -> Any:
    """Index of the tiles that still walk at this step; a plain slice where all do, so that nothing is copied."""
    if all(len(step.active) == len(walk.queries) for step, walk in zip(steps, walks, strict=True)):
        return slice(None)
    return (slice(None), *torch.meshgrid(*(step.active for step in steps), indexing="ij"))


def _keys(steps: Sequence[Step], problem: Problem) -> list[Tensor]:
    return [step.tile if problem.permuted else step.keys for step in steps]


def _logits(q: Tensor, k: Tensor, bias: Tensor | None, steps: Sequence[Step], problem: Problem) -> Tensor:
    """Products and bias, -inf where a query does not see a key. The table of biases is built for each pattern only."""
    logits = (q @ k.transpose(-1, -2)).to(_accumulator(q))
    if bias is None:
        bias = logits.new_zeros([1, *(2 * axis.kernel - 1 for axis in problem.axes)])
    table = offset_biases(bias.to(logits.dtype), [step.offset for step in steps])
    for axis, step in enumerate(steps):
        table = table.index_select(axis, step.pattern)
    return logits + table


def _exp(x: Tensor) -> Tensor:
    """By powers of two, which are many times as fast where a logit is -inf."""
    return torch.exp2(x * _LOG2_E)


def _add_biases(total: Tensor, values: Tensor, steps: Sequence[Step]) -> None:
    """Add gradients `(a1, a2, .., heads, T, T')` to the entries of the bias that `_logits` used."""
    axes = len(steps)
    for axis, step in enumerate(steps):  # first over the tiles of each pattern
        shape = [*values.shape]
        shape[axis] = len(step.offset)
        values = values.new_zeros(shape).index_add(axis, step.pattern, values)
    sides = [step.offset.shape[part] for part in (1, 2) for step in steps]
    values = values.reshape(*values.shape[: axes + 1], *sides)
    order = [axes]
    for axis in range(axes):
        order += [axis, 1 + axes + axis, 1 + 2 * axes + axis]
    values = values.permute(order)
    for axis in range(axes):
        values = values.flatten(1 + axis, 3 + axis)
    padded = F.pad(torch.zeros_like(total), (0, 1) * axes)
    _scatter(padded, values, [step.offset for step in steps])
    total += padded[(slice(None), *(slice(size) for size in total.shape[1:]))]


def boxes(x: Tensor, positions: Sequence[Tensor]) -> Tensor:
    """Gather boxes of tokens: `(B, *N, T, heads, d)` at `(a, t)` on each axis -> `(B, a1, a2, .., heads, t1 t2 .. T, d)`."""
    axes = len(positions)
    for axis, place in enumerate(positions):
        x = x.index_select(1 + axis, place.flatten())
    for axis in reversed(range(axes)):
        x = x.unflatten(1 + axis, positions[axis].shape)
    tiles, tokens = range(1, 1 + 2 * axes, 2), range(2, 2 + 2 * axes, 2)
    return x.permute(0, *tiles, 2 + 2 * axes, *tokens, 1 + 2 * axes, 3 + 2 * axes).flatten(2 + axes, 2 + 2 * axes)


def _add_boxes(total: Tensor, values: Tensor, positions: Sequence[Tensor]) -> None:
    """Add `(B, a1, a2, .., heads, t1 t2 .. T, d)` to the tokens that `boxes` reads; `total` is `(B, *N, T, heads, d)`."""
    axes = len(positions)
    values = values.unflatten(2 + axes, (*(place.shape[1] for place in positions), total.shape[-3]))
    order = [0]
    for axis in range(axes):
        order += [1 + axis, 2 + axes + axis]
    values = values.permute(*order, 2 + 2 * axes, 1 + axes, 3 + 2 * axes)
    for axis in range(axes):
        values = values.flatten(1 + axis, 2 + axis)
    _scatter(total, values, positions)


def _scatter(total: Tensor, values: Tensor, places: Sequence[Tensor]) -> None:
    """`total[:, i, j, ..] += values[:, p, q, ..]` where i, j, .. = places[0][p], places[1][q], .."""
    for axis in range(len(places) - 1, 0, -1):
        shape = [*values.shape]
        shape[1 + axis] = total.shape[1 + axis]
        values = values.new_zeros(shape).index_add(1 + axis, places[axis].flatten(), values)
    total.index_add_(1, places[0].flatten(), values.to(total.dtype))
