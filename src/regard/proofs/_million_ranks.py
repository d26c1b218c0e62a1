"""What the proofs of the million-scale system run in several processes: every function here is called on all ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from regard import ops
from regard.measure import peak_bytes
from regard.ops.distributed import METHODS, distributed_attention
from regard.ops.shards import LAYOUTS, shard_sequence
from regard.systems.sequence.million_scale import MillionLM, spread
from regard.training import seeded
from regard.training.sequence_parallel import spread_loss, sum_gradients


def groups() -> dict[int, dist.ProcessGroup]:
    """The group of the first 1, 2, 4, ... ranks, as far as this rank is in it."""
    ranks, found = dist.get_world_size(), {}
    size = 1
    while size <= ranks:
        group = dist.new_group(range(size))
        if dist.get_rank() < size:
            found[size] = group
        size *= 2
    return found


def _error(parts: Sequence[Tensor], wholes: Sequence[Tensor], **how: Any) -> float:
    """Largest difference of this rank's parts from the same parts of the whole, over the largest value."""
    pairs = [(part.detach(), whole, shard_sequence(whole, **how)) for part, whole in zip(parts, wholes, strict=True)]
    return max(float((part - here).abs().max() / whole.abs().max()) for part, whole, here in pairs)


CASES = [
    ("contiguous", False, 4, torch.float64),
    ("contiguous", True, 4, torch.float64),
    ("zigzag", True, 2, torch.float64),
    ("zigzag", True, 4, torch.float32),
]
"""Layout, causal, kv_heads and dtype."""


def attention_errors(tokens: int) -> dict[str, float]:
    """How far this rank's result and gradients are from those of one process, by way, ranks and dtype."""
    errors: dict[str, float] = {}
    for (ranks, group), (layout, causal, kv_heads, dtype), method in product(groups().items(), CASES, METHODS):
        if method == "heads" and kv_heads % ranks:
            continue
        generator = torch.Generator().manual_seed(0)
        shapes = [(2, tokens, 4, 8), (2, tokens, kv_heads, 8), (2, tokens, kv_heads, 6), (2, tokens, 4, 6)]
        *inputs, weight = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
        leaves = [x.clone().requires_grad_() for x in inputs]
        whole = ops.attention(*leaves, causal=causal)
        truth = [whole.detach(), *torch.autograd.grad((whole * weight).sum(), leaves)]
        how = {"layout": layout, "group": group}
        mine = [shard_sequence(x, **how).requires_grad_() for x in inputs]
        out = distributed_attention(*mine, causal=causal, method=method, **how)
        parts = [out, *torch.autograd.grad((out * shard_sequence(weight, **how)).sum(), mine)]
        name = f"{method}_{ranks}_ranks_{str(dtype).removeprefix('torch.')}"
        errors[name] = max(errors.get(name, 0.0), _error(parts, truth, **how))
    return errors


def model_errors(tokens: int) -> dict[str, float]:
    """The same for a whole language model: its loss, and the gradients of all parameters."""
    batch = torch.randint(0, 50, (2, tokens + 1), generator=torch.Generator().manual_seed(0))
    build = partial(MillionLM, 50, dim=32, depth=2, num_heads=4)
    one = seeded(build, 0).double()
    truth = F.cross_entropy(one(batch[:, :-1]).flatten(0, 1).float(), batch[:, 1:].flatten())
    truth.backward()
    errors: dict[str, float] = {}
    for (ranks, group), method in product(groups().items(), METHODS):
        layout = "contiguous" if method == "heads" else "zigzag"
        many = seeded(partial(build, method=method, layout=layout), 0).double()
        part = spread_loss(spread(many, group), batch, layout=layout, group=group)
        part.backward()
        sum_gradients(many, group)
        whole = part.detach().clone()
        dist.all_reduce(whole, group=group)
        errors[f"loss_{method}_{ranks}_ranks"] = abs(float(whole / truth.detach()) - 1)
        pairs = zip(many.parameters(), one.parameters(), strict=True)
        error = max(float((a.grad - b.grad).abs().max() / b.grad.abs().max()) for a, b in pairs)
        errors[f"gradients_{method}_{ranks}_ranks"] = error
    return errors


def _pass(run: Callable[..., Tensor], tokens: int, heads: int, width: int) -> None:
    """Forward and backward on fresh inputs."""
    q, k, v = (torch.randn(1, tokens, heads, width, requires_grad=True) for _ in range(3))
    run(q, k, v).sum().backward()


def peaks(tokens: dict[str, int], heads: int, width: int) -> dict[str, dict[int, int]]:
    """Peak bytes of this rank for forward and backward of so many tokens in all, by method and number of ranks."""
    found: dict[str, dict[int, int]] = {method: {} for method in METHODS}
    for (ranks, group), method in product(groups().items(), METHODS):
        run = partial(distributed_attention, method=method, group=group)
        found[method][ranks] = peak_bytes(partial(_pass, run, tokens[method] // ranks, heads, width))
    if dist.get_rank() == 0:
        found["vanilla"] = {1: peak_bytes(partial(_pass, vanilla, tokens["ring"], heads, width))}
    return found


def vanilla(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Multi-head attention that writes its L x L weights out."""
    return ops.attention(q, k, v, backend="reference")  # type: ignore[return-value]


def seconds(tokens: int, heads: int, width: int, rounds: int) -> dict[str, list[float]]:
    """Wall times of forward and backward on one rank and on two, in turns."""
    own = groups()
    calls: dict[str, tuple[int, Callable[..., Tensor]]] = {"vanilla_1": (1, vanilla)}
    for ranks, method in product((1, 2), ("ring", "heads")):
        if ranks in own:
            calls[f"{method}_{ranks}"] = (ranks, partial(distributed_attention, method=method, group=own[ranks]))
    for layout in LAYOUTS:
        run = partial(distributed_attention, causal=True, layout=layout, group=own[2])
        calls[f"causal_{layout}_2"] = (2, run)
    times: dict[str, list[float]] = {}
    for turn in range(rounds + 1):
        for name in (
            "vanilla_1",
            "ring_1",
            "heads_1",
            "ring_2",
            "heads_2",
            *(f"causal_{layout}_2" for layout in LAYOUTS),
        ):
            dist.barrier()
            started = time.perf_counter()
            if name in calls and dist.get_rank() < calls[name][0]:
                ranks, run = calls[name]
                _pass(run, tokens // ranks, heads, width)
            dist.barrier()
            if turn:  # the first warms up
                times.setdefault(name, []).append(time.perf_counter() - started)
    return times
