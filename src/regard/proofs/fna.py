"""Proofs of FNA: both formulations against recordings and the op's reference; growth, memory, products, and speed."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from regard import ops
from regard.kernels.flex.neighborhoods import neighborhood_mask
from regard.layouts.neighborhoods import axis_windows
from regard.layouts.tiles import Axis
from regard.measure import growth, peak_bytes
from regard.proofs.base import Check, Preset, Proofs, Recipe
from regard.proofs.dinat import recipe as dinat_recipe
from regard.proofs.experiments import least_seconds
from regard.proofs.recordings import Recorded
from regard.systems.hardware.fna import (
    FusedDiNAT,
    FusedNeighborhoodAttention,
    fused_attention,
    unfused_attention,
)
from regard.systems.hardware.gna import simulate

Form = Callable[..., Any]


class Operator(nn.Module):
    """A formulation with the pattern of a recording, and the recording's position bias if it has one.

    Gives the result, the log-sum-exp, and what further outputs the form has by name.
    """

    def __init__(self, form: Form, config: dict[str, Any], **options: Any) -> None:
        super().__init__()
        self.form, self.options = form, {"kernel_size": config["kernel_size"], **options}
        self.options |= {name: config[name] for name in ("stride", "dilation") if name in config}
        self.options["causal"] = config["is_causal"]
        self.rpb = nn.Parameter(torch.zeros(2, *(2 * size - 1 for size in config["kernel_size"])))
        if not config.get("rpb"):
            self.rpb = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        bias = {} if self.rpb is None else {"bias": self.rpb}
        return self.form(q, k, v, return_lse=True, **bias, **self.options)


def run_operator(module: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs under their recorded names; weights are recorded with heads first."""
    out, lse, *weights = module(inputs["q"], inputs["k"], inputs["v"])
    return {"out": out, "lse": lse, **({"attn": weights[0].movedim(-2, 1)} if weights else {})}


def recorded_operator(name: str, form: Form, **options: Any) -> Recorded:
    """A recording of the operator, held to one formulation."""
    return Recorded(name, build=lambda config: Operator(form, config, **options), run=run_operator)


def _model(config: dict[str, Any]) -> FusedDiNAT:
    return FusedDiNAT(dim=config["embed_dim"], **{name: value for name, value in config.items() if name != "embed_dim"})


def patterns() -> Iterator[tuple[tuple[Axis, ...], int, bool]]:
    """Patterns where mistakes live, with a number of key heads and whether there is a bias.

    One token, window = size, window * dilation = size and one less, sizes around tiles, even kernels, sizes that the
    dilation does not divide, short last groups of a stride, every combination of causal axes.
    """
    one = Axis
    yield (one(1, 1),), 2, True
    yield (one(16, 16),), 1, False
    yield (one(15, 5, 2, 3),), 2, True
    yield (one(17, 5, 1, 3, True),), 2, True
    yield (one(33, 6, 4),), 2, False
    yield (one(9, 4), one(7, 7)), 2, True
    yield (one(8, 4, 4), one(12, 4, 4)), 1, True
    yield (one(10, 5, 3, 2), one(11, 4, 2, 2, True)), 2, True
    for causal in itertools.product((False, True), repeat=3):
        sizes = zip((4, 7, 6), (2, 3, 5), (2, 1, 3), (1, 2, 1), causal, strict=True)
        yield tuple(one(*size) for size in sizes), 2, not any(causal)


def largest_errors(forms: dict[str, Form], allow_bias: bool = True) -> dict[str, float]:
    """Largest difference of each form from the reference over `patterns`: outputs, log-sum-exp and all gradients.

    A form takes the arguments of `ops.neighborhood_attention` and `q_tile`, `kv_tile`.
    """
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, dtype=torch.float64, generator=generator)
    worst = dict.fromkeys(forms, 0.0)
    for axes, heads, biased in patterns():
        spatial = [axis.length for axis in axes]
        inputs = [draw(2, *spatial, 2, 4), draw(2, *spatial, heads, 4), draw(2, *spatial, heads, 3)]
        if biased and allow_bias:
            inputs.append(draw(2, *(2 * axis.kernel - 1 for axis in axes)))
        cotangents = draw(2, *spatial, 2, 3), draw(2, *spatial, 2)
        names = ("kernel_size", "stride", "dilation", "causal")
        options = dict(zip(names, map(list, list(zip(*axes, strict=True))[1:]), strict=True))
        reference = partial(ops.neighborhood_attention, backend="reference")
        truth = _results(reference, inputs, cotangents, options)
        for tiles in ((3, 2), (2, 5), (None, None)):
            q_tile, kv_tile = (None if side is None else [side + axis for axis in range(len(axes))] for side in tiles)
            for name, form in forms.items():
                ours = _results(form, inputs, cotangents, {**options, "q_tile": q_tile, "kv_tile": kv_tile})
                errors = [float((a - b).abs().max()) for a, b in zip(ours, truth, strict=True)]
                worst[name] = max(worst[name], *errors)
    return worst


def _results(
    form: Form, inputs: Sequence[Tensor], cotangents: tuple[Tensor, Tensor], options: dict[str, Any]
) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    q, k, v, *bias = leaves
    out, lse = form(q, k, v, return_lse=True, **({"bias": bias[0]} if bias else {}), **options)
    total = (out * cotangents[0]).sum() + (lse * cotangents[1]).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(total, leaves)]


def _unfused(*args: Any, kv_tile: object, **kwargs: Any) -> Any:
    return unfused_attention(*args, **kwargs)


def forms_equal_the_reference() -> Check:
    """Fused and unfused, with tiles of several shapes: results, log-sum-exps and the gradients of q, k, v and bias."""
    worst = largest_errors({"fused": fused_attention, "unfused": _unfused})
    return Check(
        "Both formulations equal dense attention under the neighborhood mask, log-sum-exp and gradients included",
        holds=max(worst.values()) < 1e-11,
        figures={f"largest_error_{name}": value for name, value in worst.items()},
        setting="float64; 1 to 3 axes, odd and even kernels, strides, dilations that do not divide the size, all "
        "combinations of causal axes, grouped heads, biases, three pairs of tile shapes; limit 1e-11",
    )


def recipe(preset: Preset) -> Recipe:
    """That of DiNAT, by the fused walk."""
    return dinat_recipe(preset, FusedDiNAT)


def _draw(*spatial: int, width: int = 32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, *spatial, 1, width, generator=generator) for _ in range(3)]


def _products(run: Callable[[], Any]) -> int:
    """Multiply-adds of all matrix products that `run` makes, those of masked entries included."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """What PyTorch offers without a kernel of its own: dense attention with a mask."""
    spatial = q.shape[1:-2]
    q, k, v = (x.flatten(1, -3).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).unflatten(1, spatial)


def _mask(spatial: Sequence[int], kernel: int) -> Tensor:
    axes, place = len(spatial), torch.arange(math.prod(spatial))
    seen = neighborhood_mask(spatial, [kernel] * axes, [1] * axes, [1] * axes, [False] * axes)
    return seen(place, place, place[:, None], place)


def linear_growth(preset: Preset) -> Check:
    """Multiply-adds, time and memory of the fused walk over growing maps, against dense attention with a mask."""
    sides = [16, 32] if preset == "smoke" else [64, 96, 128, 192, 256]
    dense_sides = [16, 32] if preset == "smoke" else [32, 48, 64, 96]
    kernel, tokens, rounds = 7, [side**2 for side in sides], 2 if preset == "smoke" else 7
    run = partial(fused_attention, kernel_size=kernel, q_tile=8, kv_tile=8)
    figures: dict[str, float | list[float]] = {}
    with torch.no_grad():
        inputs = {side: _draw(side, side) for side in {*sides, *dense_sides}}
        walks = {side: partial(run, *inputs[side]) for side in inputs}
        figures["fused_macs_growth"] = round(growth(tokens, [_products(walks[side]) for side in sides]), 3)
        figures["fused_memory_growth"] = round(growth(tokens, [peak_bytes(walks[side]) for side in sides]), 3)
        times = least_seconds([walks[side] for side in sides], rounds)
        figures["fused_time_growth"] = round(growth(tokens, times), 3)
        ratios, dense_macs = [], []
        for side in dense_sides:
            dense = partial(_masked, *inputs[side], _mask((side, side), kernel))
            dense_macs.append(side**4 * 2 * inputs[side][0].shape[-1])
            slow, fast = least_seconds([dense, walks[side]], rounds)
            ratios.append(round(slow / fast, 2))
    figures["dense_macs_growth"] = round(growth([side**2 for side in dense_sides], dense_macs), 3)
    figures["dense_time_over_fused"] = ratios
    return Check(
        "At a fixed kernel the fused walk costs time and memory in proportion to the tokens, and beats dense attention "
        "with a mask from some size on",
        holds=all(abs(figures[f"fused_{what}_growth"] - 1) <= 0.1 for what in ("macs", "time", "memory"))  # type: ignore[operator]
        and ratios[-1] > 1,
        figures=figures,
        setting=f"exponents of tokens over maps of {sides} squared; ratios at {dense_sides} squared; kernel {kernel}, "
        "tiles of 8 x 8, one head of 32, forward, float32, processor time; holds if the three exponents are within 0.1 of 1 "
        "and the last ratio is above 1",
    )


def memory_without_weights(preset: Preset) -> Check:
    """Peak memory of a forward and a backward pass as the kernel grows: the fused walk keeps no weights."""
    side, kernels = (16, (3, 7)) if preset == "smoke" else (64, (7, 15, 23, 31))
    inputs = [x.requires_grad_() for x in _draw(side, side)]

    def step(form: Form, kernel: int) -> Tensor:
        out = form(*inputs, kernel_size=kernel)
        torch.autograd.grad(out.sum(), inputs)
        return out

    fused = partial(fused_attention, q_tile=8, kv_tile=8)
    peaks = {
        name: [peak_bytes(partial(step, form, kernel)) for kernel in kernels]
        for name, form in {"fused": fused, "unfused": partial(unfused_attention, q_tile=8)}.items()
    }
    weights = side**2 * kernels[-1] ** 2 * 4
    gained = {name: values[-1] / values[0] for name, values in peaks.items()}
    return Check(
        "The fused walk needs no memory for attention weights: its peak does not grow with the kernel (O(n), not O(n k))",
        holds=gained["fused"] <= 1.1 and peaks["unfused"][-1] - peaks["unfused"][0] >= weights / 2,
        figures={
            **{f"{name}_megabytes": [round(value / 2**20, 2) for value in values] for name, values in peaks.items()},
            **{f"{name}_last_over_first": round(value, 3) for name, value in gained.items()},
            "weights_at_the_last_megabytes": round(weights / 2**20, 2),
        },
        setting=f"peak of the allocator in a forward and a backward pass on {side} x {side} tokens, one head of 32, kernels "
        f"{kernels}, tiles of 8 x 8; holds if the fused peak grows by at most 10 % and the unfused one by at least half of "
        "the weights of the largest kernel",
    )


def tiles_in_space(preset: Preset) -> Check:
    """Products made by the walk against those counted from the tiles; square tiles against long ones."""
    side, kernels = (16, (3,)) if preset == "smoke" else (64, (7, 15, 31))
    inputs, figures = _draw(side, side, width=8), {}
    equal = best = True
    for kernel in kernels:
        visits = {}
        for tile in ((8, 8), (16, 4), (4, 16), (32, 2), (2, 32)):
            tile = (min(tile[0], side), min(tile[1], side))
            run = partial(fused_attention, *inputs, kernel_size=kernel, q_tile=tile, kv_tile=tile)
            seen = simulate((side, side), kernel, q_tile=tile, kv_tile=tile, walk="dynamic")
            made, expected = _products(run), seen.visits * math.prod(tile) ** 2 * 2 * inputs[0].shape[-1]
            useful = side**2 * kernel**2 * 2 * inputs[0].shape[-1] / made
            equal &= made == expected and abs(useful - seen.useful) < 1e-9
            visits[tile] = seen.visits * math.prod(tile) ** 2
            figures[f"useful_kernel_{kernel}_tile_{tile[0]}x{tile[1]}"] = round(useful, 4)
        best &= visits[min(visits, key=lambda tile: max(tile))] == min(visits.values())
    return Check(
        "The products that the walk makes are those counted from its tiles, and square tiles waste the fewest of them",
        holds=equal and best,
        figures={**figures, "measured_equals_counted": int(equal)},
        setting=f"share of useful products on {side} x {side} tokens, square kernels, query tile = key tile of 64 tokens "
        "(walk from the first key needed), every product counted where PyTorch makes it; holds if all counts are equal and "
        "8 x 8 is never beaten",
    )


def _naive(q: Tensor, k: Tensor, v: Tensor, index: Tensor) -> Tensor:
    """Query by query: gather the window's keys and values, `(N, window)` token numbers, and attend."""
    spatial = q.shape[1:-2]
    q, k, v = (x.flatten(1, -3) for x in (q, k, v))
    logits = torch.einsum("bnhd,bnwhd->bnhw", q * q.shape[-1] ** -0.5, k[:, index])
    return torch.einsum("bnhw,bnwhd->bnhd", logits.softmax(-1), v[:, index]).unflatten(1, spatial)


def _windows(spatial: Sequence[int], kernel: int) -> Tensor:
    index = torch.zeros(1, 1, dtype=torch.long)
    for length in spatial:
        start = torch.from_numpy(axis_windows(length, kernel, 1, False)[0])
        along = start[:, None] + torch.arange(kernel)
        index = (index[:, None, :, None] * length + along[None, :, None]).flatten(2).flatten(0, 1)
    return index


def products_beat_gathering(preset: Preset) -> Check:
    """Forward time of naive neighborhood attention over that of the two formulations, in 1-D and 2-D."""
    cases = {"1d": ((4096,), (31, 63, 127)), "2d": ((56, 56), (7, 11, 15))}
    if preset == "smoke":
        cases = {"1d": ((64,), (7,)), "2d": ((12, 12), (3,))}
    figures: dict[str, float | list[float]] = {}
    for name, (spatial, kernels) in cases.items():
        gains: dict[str, list[float]] = {"unfused": [], "fused": []}
        for kernel in kernels:
            inputs = _draw(*spatial)
            naive, *ours = least_seconds(
                [
                    partial(_naive, *inputs, _windows(spatial, kernel)),
                    partial(unfused_attention, *inputs, kernel_size=kernel),
                    partial(fused_attention, *inputs, kernel_size=kernel),
                ],
                2 if preset == "smoke" else 7,
            )
            for values, seconds in zip(gains.values(), ours, strict=True):
                values.append(naive / seconds)
        for form, values in gains.items():
            figures[f"{name}_naive_over_{form}"] = [round(value, 2) for value in values]
            figures[f"{name}_{form}_improvement_percent"] = round(100 * (statistics.fmean(values) - 1))
    improvement = {key: value for key, value in figures.items() if key.endswith("percent")}
    return Check(
        "As matrix products of tiles, neighborhood attention is faster than gathered query by query, and fused it is faster "
        "than unfused (on average, in 1-D and 2-D)",
        holds=all(value > 0 for value in improvement.values())  # type: ignore[operator]
        and all(figures[f"{d}_fused_improvement_percent"] > figures[f"{d}_unfused_improvement_percent"] for d in cases),  # type: ignore[operator]
        figures=figures,
        setting="; ".join(f"{name}: {spatial} tokens, kernels {kernels}" for name, (spatial, kernels) in cases.items())
        + "; one head of 32, forward, float32, processor time; improvement = mean of naive / new - 1, as the paper counts",
    )


def _weights_too(form: Form, recorded: bool) -> dict[str, Any]:
    return {"return_weights": True} if form is unfused_attention and recorded else {}


PROOFS = Proofs(
    recordings=(
        *(
            recorded_operator(f"fna.{case}", form, **_weights_too(form, case in ("na1d", "na2d_causal_axis")))
            for case in ("na1d", "na2d_causal_axis", "na2d_rpb", "na3d", "na2d_even")
            for form in (fused_attention, unfused_attention)
        ),
        *(
            Recorded(
                "fna.module2d",
                build=partial(lambda form, config: FusedNeighborhoodAttention(**config, form=form), form),
            )
            for form in FusedNeighborhoodAttention.forms
        ),
        Recorded("fna.model_nat", build=_model),
    ),
    checks=(forms_equal_the_reference,),
    recipe=recipe,
    claims=(linear_growth, memory_without_weights, tiles_in_space, products_beat_gathering),
)
