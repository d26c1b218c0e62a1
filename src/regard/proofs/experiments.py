"""What claims share: equal budgets over seeds, fitted growth, Jacobians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

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


def reach(function: Callable[[Tensor], Tensor], x: Tensor, index: tuple[int, ...]) -> Tensor:
    """Which input positions output position `index` depends on: `(*spatial)` boolean, from a gradient.

    Args:
        function: `(1, *spatial, dim)` -> the same grid. x: the point at which it is differentiated.
    """
    x = x.clone().requires_grad_()
    out = function(x)[(0, *index)]
    (gradient,) = torch.autograd.grad(out.square().sum(), x)
    return gradient[0].abs().amax(-1) > 0
