"""Proofs of Kronecker attention: the definition written out; triples, the low-rank form and what it costs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from regard.flops import count_params
from regard.layers import run_stream
from regard.measure import growth
from regard.proofs.base import Check, Preset, Proofs, Recipe
from regard.proofs.experiments import least_seconds, over_variants
from regard.systems.sequence.kron_attention import (
    KroneckerAttention,
    KroneckerTransformer,
    kronecker_attention,
    kronecker_attention_low_rank,
    monomials,
)
from regard.tasks import create_task
from regard.training import TrainConfig, seeded


def _khatri_rao(matrices: list[Tensor]) -> Tensor:
    """Column-wise Kronecker product of matrices `(n, d)`: rows (j, k, ...) are products of their rows j, k, ..."""
    return torch.stack([math.prod(rows[1:], start=rows[0]) for rows in itertools.product(*matrices)])


def _as_defined(q: Tensor, keys: list[Tensor], values: list[Tensor], causal: bool = False) -> Tensor:
    """D^-1 exp(Q (K1 (/) K2)^T / d) (V1 (/) V2) for each sample and head, with all n^(t-1) columns."""
    out = torch.empty_like(q)
    for b, h in itertools.product(range(q.shape[0]), range(q.shape[2])):
        a = torch.exp(q[b, :, h] @ _khatri_rao([k[b, :, h] for k in keys]).T / q.shape[-1])
        if causal:
            latest = torch.tensor([max(places) for places in itertools.product(range(len(a)), repeat=len(keys))])
            a = a * (latest <= torch.arange(len(a))[:, None])
        out[b, :, h] = (a @ _khatri_rao([v[b, :, h] for v in values])) / a.sum(1, keepdim=True)
    return out


def _drawn(count: int, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, dtype=dtype, generator=generator) for _ in range(count)]


def as_defined() -> Check:
    """Orders 2 to 4 against the matrices of the definition, with gradients; order 2 against softmax attention."""
    worst = 0.0
    for order, length, causal in (
        (2, 6, False),
        (3, 6, False),
        (3, 5, True),
        (3, 1, True),
        (4, 4, False),
        (4, 4, True),
    ):
        tensors = _drawn(2 * order, 2, length, 2, 3, seed=order)
        weight = tensors.pop()
        results = []
        for form in (kronecker_attention, _as_defined):
            leaves = [x.clone().requires_grad_() for x in tensors]
            q, keys, values = leaves[0], leaves[1:order], leaves[order:]
            out = form(q, keys, values, causal=causal)
            results.append([out, *torch.autograd.grad((out * weight).sum(), leaves)])
        worst = max(worst, *(float((a - b).detach().abs().max()) for a, b in zip(*results, strict=True)))
    q, k, v = _drawn(3, 2, 7, 2, 4)
    plain = nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    ordinary = float((kronecker_attention(q, [k], [v], scale=0.5) - plain).abs().max())
    return Check(
        "nested attention = the definition with all pairs (triples) of keys, outputs and gradients; order 2 = softmax",
        holds=max(worst, ordinary) <= 1e-12,
        figures={"largest_error": worst, "largest_error_of_order_2_to_softmax": ordinary},
        setting="float64, orders 2 to 4, 1 to 7 tokens, causal and not, limit 1e-12",
    )


def low_rank_form() -> Check:
    """The identity behind the low-rank form, its limit, its causal form, and streams of both forms."""
    u2, u3, v1, v2 = (x[0, :, 0] for x in _drawn(4, 1, 6, 1, 5))
    pairs = _khatri_rao([u2, u3]).T @ _khatri_rao([v1, v2])
    identity = float((pairs - (u2.T @ v1) * (u3.T @ v2)).abs().max())
    q, k1, k2, v1, v2 = (x.tanh() for x in _drawn(5, 2, 10, 2, 3))  # more than a block
    limit = 0.0
    for causal in (False, True):
        exact = _as_defined(q, [k1, k2], [v1, v2], causal)
        limit = max(
            limit,
            float((kronecker_attention_low_rank(q, [k1, k2], [v1, v2], degree=14, causal=causal) - exact).abs().max()),
        )
    ranks = all(
        monomials(torch.ones(1, d), g).shape[-1] == math.comb(d + g, g) for d, g in ((1, 3), (3, 2), (4, 6), (8, 2))
    )
    streamed = 0.0
    for order, degree in ((3, None), (3, 4), (4, None), (4, 2)):
        mixer = seeded(partial(KroneckerAttention, 6, 2, order=order, degree=degree, causal=True), 0).double()
        (x,) = _drawn(1, 2, 19, 6)
        streamed = max(streamed, float((run_stream(mixer, x)[0] - mixer(x)).detach().abs().max()))
    return Check(
        "(U2 (/) U3)^T (V1 (/) V2) = (U2^T V1) * (U3^T V2); the polynomial of degree 14 = the exponential; token by token = "
        "all at once",
        holds=max(identity, limit, streamed) <= 1e-12 and ranks,
        figures={
            "largest_error_of_the_identity": identity,
            "largest_error_of_degree_14": limit,
            "largest_error_of_streaming": streamed,
        },
        setting="float64, entries within 1, 6 and 10 tokens, causal and not, orders 3 and 4; streams of 19 tokens; limit 1e-12",
    )


def _config(preset: Preset) -> TrainConfig:
    return TrainConfig(steps=2 if preset == "smoke" else 600, batch_size=64, lr=3e-3, weight_decay=0.0)


def _reader(bits: int, order: int = 3) -> KroneckerTransformer:
    # Order 3 has two matrices of dim x dim more than order 2, which gets them back as a wider MLP.
    return KroneckerTransformer(bits, dim=32, num_heads=2, order=order, mlp_ratio=2 if order == 3 else 3)


def recipe(preset: Preset) -> Recipe:
    """Which tokens complete a triple? There is no recipe of the paper's: "paper" is this one, ten times as long."""
    task = create_task("match3", eval_items=32 if preset == "smoke" else 512)
    config = _config(preset)
    if preset == "paper":
        config = TrainConfig(steps=6000, batch_size=64, lr=3e-3, weight_decay=0.0)
    return Recipe(seeded(lambda: _reader(task.num_features), 0), task, config)


def triples(preset: Preset) -> Check:
    """One layer of order 3 and one of ordinary attention with as many parameters, same budget and seeds."""
    smoke = preset == "smoke"
    task = create_task("match3", eval_items=32 if smoke else 512)
    seeds = (0,) if smoke else (0, 1)
    builds: dict[str, Callable[[], nn.Module]] = {
        "order_3": partial(_reader, task.num_features, 3),
        "ordinary": partial(_reader, task.num_features, 2),
    }
    figures, _ = over_variants(builds, task, _config(preset), seeds)
    trivial = round(task.trivial()["accuracy"], 4)
    return Check(
        "One layer of order 3 finds triples, which one layer of ordinary attention cannot",
        holds=min(figures["order_3"]) > 0.95 and max(figures["ordinary"]) < trivial + 0.1,
        figures={
            **figures,
            "trivial": trivial,
            **{f"{name}_parameters": count_params(build()) for name, build in builds.items()},
        },
        setting=f"{task.description} One block of 32 channels, 2 heads, {_config(preset).steps} steps of 64, seeds "
        f"{list(seeds)}, accuracy on new sequences; holds if order 3 is above 0.95 with every seed and ordinary attention "
        "never 0.1 above the trivial answer; task, scale and start, the same for both, were changed when neither had learned",
    )


def _bounded(bound: float, length: int, width: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """q, k1, k2, v1, v2 with entries uniform within ± bound (values within ± 1)."""
    draws = torch.rand(5, 1, length, 1, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    draws = (2 * draws - 1) * torch.tensor([bound] * 3 + [1.0] * 2, dtype=torch.float64).view(5, 1, 1, 1, 1)
    return tuple(draws.to(dtype).unbind(0))


def _error(bound: float, degree: int, length: int = 24, width: int = 3) -> float:
    """Largest error of the low-rank output."""
    q, k1, k2, v1, v2 = _bounded(bound, length, width)
    exact = kronecker_attention(q, [k1, k2], [v1, v2])
    return float((kronecker_attention_low_rank(q, [k1, k2], [v1, v2], degree=degree) - exact).abs().max())


def near_linear_time(preset: Preset) -> Check:
    """Error against degree for entries within 1, and growth of time with length, exact and low-rank."""
    smoke, degrees, bound = preset == "smoke", (1, 2, 4, 6), 1.0
    errors = [_error(bound, degree) for degree in degrees]
    # The remainder of the Taylor series at scores up to B^3, relative to weights of at least exp(-B^3), in both sums.
    limits = [2 * math.exp(2 * bound**3) * bound ** (3 * (g + 1)) / math.factorial(g + 1) for g in degrees]
    lengths = {
        "low_rank": [64, 128, 256] if smoke else [256, 512, 1024, 2048, 4096],
        "exact": [16, 32, 64] if smoke else [64, 128, 256, 384],
    }
    figures: dict[str, float | list[float]] = {}
    for name, sizes in lengths.items():
        form = partial(kronecker_attention_low_rank, degree=4) if name == "low_rank" else kronecker_attention
        inputs = [_bounded(bound, length, 6, torch.float32) for length in sizes]
        times = least_seconds([partial(form, x[0], x[1:3], x[3:]) for x in inputs], 3 if smoke else 7)
        figures[f"{name}_time_growth"] = round(growth(sizes, times), 3)
        figures[f"{name}_milliseconds"] = [round(1000 * seconds, 2) for seconds in times]
    return Check(
        "Where entries are bounded, a polynomial gives the same output in nearly linear time, not cubic",
        holds=all(error <= limit for error, limit in zip(errors, limits, strict=True))
        and errors == sorted(errors, reverse=True)
        and figures["low_rank_time_growth"] < 1.3
        and figures["exact_time_growth"] > 2.4,
        figures={
            **{f"error_at_degree_{g}": error for g, error in zip(degrees, errors, strict=True)},
            **{f"limit_at_degree_{g}": round(limit, 7) for g, limit in zip(degrees, limits, strict=True)},
            **{f"rank_at_degree_{g}": math.comb(3 + g, g) for g in degrees},
            **figures,
        },
        setting=f"entries uniform within {bound}; error: 24 tokens, 3 channels, float64, largest; time: 6 channels, degree 4 "
        f"(rank 210), {lengths['low_rank']} tokens, exact {lengths['exact']}, float32, least processor time; holds if every "
        "error is within 2 e^(2 B^3) B^(3 (g + 1)) / (g + 1)! and falls with the degree, and exponents below 1.3, above 2.4",
    )


def entries_must_be_bounded(preset: Preset) -> Check:
    """The least degree, and so the rank, for a fixed error, as the bound of the entries grows."""
    bounds = (0.5, 1.0) if preset == "smoke" else (0.5, 1.0, 1.5, 2.0, 2.5)
    tolerance, ranks = 1e-3, []
    for bound in bounds:
        degree = next((g for g in range(2, 61, 2) if _error(bound, g) <= tolerance), None)
        ranks.append(math.inf if degree is None else math.comb(3 + degree, degree))
    return Check(
        "The rank that the low-rank form needs explodes with the size of the entries",
        holds=ranks == sorted(ranks) and ranks[-1] > 20 * ranks[0],
        figures={
            f"rank_at_bound_{bound}": rank if rank < math.inf else "none up to degree 60"
            for bound, rank in zip(bounds, ranks, strict=True)
        },
        setting=f"least even degree with an error of at most {tolerance}, 24 tokens, 3 channels, float64; holds if the rank "
        "never falls and ends above 20 times its start",
    )


PROOFS = Proofs(
    checks=(as_defined, low_rank_form),
    recipe=recipe,
    claims=(triples, near_linear_time, entries_must_be_bounded),
)
