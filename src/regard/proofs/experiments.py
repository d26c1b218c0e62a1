"""What claims share: equal budgets over seeds, fitted growth, Jacobians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from regard.layers import Mixer
from regard.tasks.base import Task
from regard.training import TrainConfig, train


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A model built with its own seed, without touching the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def over_seeds(
    build: Callable[[], nn.Module], task: Task, config: TrainConfig, seeds: Sequence[int]
) -> list[dict[str, float]]:
    """Final metrics of the same recipe for each seed (of weights, order and dropout)."""
    from dataclasses import replace

    return [train(seeded(build, seed), task, replace(config, seed=seed), cpu=True).metrics for seed in seeds]


def headline(task: Task, runs: Sequence[dict[str, float]]) -> list[float]:
    """The headline metric of each run, rounded for reports."""
    return [round(run[task.metric], 4) for run in runs]


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


def median_seconds(run: Callable[[], object], repeats: int = 5) -> float:
    """Median wall time of `run()` after one warm-up."""
    run()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def growth(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Exponent p of values ~ sizes^p: the slope of a straight line through the logarithms."""
    return float(np.polyfit(np.log(np.asarray(sizes, float)), np.log(np.asarray(values, float)), 1)[0])


def cost_growth(
    mixers: Mapping[str, Callable[[int], Mixer]], sides: Sequence[int], *, repeats: int = 5
) -> dict[str, float | list[float]]:
    """How multiply-adds and forward time of mixers grow with the tokens of square maps, in one run.

    Args:
        mixers: name -> side of the map -> the mixer.

    Returns:
        `NAME_macs_growth` and `NAME_time_growth`, fitted exponents of the number of tokens, and `NAME_time_ratios`, the
        times over that of the smallest map.
    """
    tokens = [side * side for side in sides]
    figures: dict[str, float | list[float]] = {}
    for name, build in mixers.items():
        times, macs = [], []
        for side in sides:
            mixer = build(side).eval()
            macs.append(mixer.cost((side, side)).macs)
            with torch.no_grad():
                x = torch.randn(1, side, side, mixer.dim)
                times.append(median_seconds(lambda m=mixer, x=x: m(x), repeats))
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
