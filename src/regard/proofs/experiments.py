"""What claims share: equal budgets over seeds, growth of cost, Jacobians."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from regard.flops import count_macs
from regard.measure import growth, median_seconds
from regard.tasks.base import Task
from regard.training import TrainConfig, seeded, train


def over_seeds(
    build: Callable[[], nn.Module], task: Task, config: TrainConfig, seeds: Sequence[int]
) -> list[dict[str, float]]:
    """Final metrics of the same recipe for each seed (of weights, order and dropout)."""
    return [train(seeded(build, seed), task, replace(config, seed=seed), cpu=True).metrics for seed in seeds]


def headline(task: Task, runs: Sequence[dict[str, float]]) -> list[float]:
    """The headline metric of each run, rounded for reports."""
    return [round(run[task.metric], 4) for run in runs]


TINY_DEIT = {"dim": 48, "depth": 2, "num_heads": 3, "mlp_ratio": 2.0, "patch_size": 4, "img_size": 24, "in_chans": 1}
"""A DeiT of 36 tokens, for digits of 24 pixels."""


def tiny_deit_config(preset: str) -> TrainConfig:
    """The recipe of `TINY_DEIT`.

    The rate was chosen for softmax attention, the baseline of the claims that use it: best of 3e-3, 6e-3 and 1e-2 in trials
    with one seed. The training is short (about 7 epochs), so those claims compare how well mixers learn in that time.
    """
    return TrainConfig(steps=2 if preset == "smoke" else 300, batch_size=32, lr=1e-2)


def over_variants(
    builds: Mapping[str, Callable[[], nn.Module]], task: Task, config: TrainConfig, seeds: Sequence[int]
) -> tuple[dict[str, float | list[float]], dict[str, float]]:
    """The same recipe and seeds for models that differ in one thing.

    Returns:
        Figures for a report (`NAME`, the headline metric of each seed, and `NAME_mean`), and the means by name.
    """
    figures: dict[str, float | list[float]] = {}
    means = {}
    for name, build in builds.items():
        values = headline(task, over_seeds(build, task, config, seeds))
        means[name] = statistics.fmean(values)
        figures |= {name: values, f"{name}_mean": round(means[name], 4)}
    return figures, means


def cost_growth(
    mixers: Mapping[str, Callable[[int], nn.Module]], sides: Sequence[int], *, dim: int, repeats: int = 5
) -> dict[str, float | list[float]]:
    """How multiply-adds and forward time of mixers grow with the tokens of square maps, in one run.

    Args:
        mixers: name -> side of the map -> the mixer, or several in a row. dim: their channels.

    Returns:
        `NAME_macs_growth` and `NAME_time_growth`, fitted exponents of the number of tokens, and `NAME_time_ratios`, the
        times over that of the smallest map.
    """
    tokens = [side * side for side in sides]
    figures: dict[str, float | list[float]] = {}
    for name, build in mixers.items():
        times, macs = [], []
        for side in sides:
            mixer, x = build(side).eval(), torch.randn(1, side, side, dim)
            macs.append(count_macs(mixer, x))
            with torch.no_grad():
                times.append(median_seconds(partial(mixer, x), repeats))
        figures[f"{name}_macs_growth"] = round(growth(tokens, macs), 3)
        figures[f"{name}_time_growth"] = round(growth(tokens, times), 2)
        figures[f"{name}_time_ratios"] = [round(seconds / times[0], 2) for seconds in times]
    return figures


def reach(function: Callable[[Tensor], Tensor], x: Tensor, index: tuple[int, ...]) -> Tensor:
    """Which input positions output position `index` depends on: `(*spatial)` boolean, from a gradient.

    Args:
        function: `(1, *spatial, dim)` -> the same grid. x: the point at which it is differentiated.
    """
    x = x.clone().requires_grad_()
    out = function(x)[(0, *index)]
    (gradient,) = torch.autograd.grad(out.square().sum(), x)
    return gradient[0].abs().amax(-1) > 0
