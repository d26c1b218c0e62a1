"""`regard compare --benchmark cab`: mixers in the four places of attention, each on its own tasks, and one number each.

CAB (arXiv 2210.07661) at a scale of minutes: other tasks than the paper's, small models, and the compositional index
normalised over the mixers compared. Every pattern and task is a comparison of its own in a folder of its own, so what is
finished is kept, and each has its own report.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from regard import checks
from regard.registry import list_mixers
from regard.systems.sequence._cab_scores import (
    Pattern,
    ScoredMetric,
    compositional_index,
    efficiency_length,
    norm_of,
)
from regard.workbench import machine
from regard.workbench.compare import Progress, Settings, compare, find_mixer
from regard.workbench.matrix import patterns
from regard.workbench.setups import DEFAULT_SHAPES
from regard.workbench.store import write_json

FULL = "softmax"
"""What the efficiency length compares with."""

TASKS: dict[Pattern, dict[str, dict[str, bool]]] = {
    "noncausal self": {"masked_text": {"perplexity": False}, "denoising": {"psnr": True, "mae": False}},
    "causal self": {"text": {"perplexity": False}},
    "noncausal cross": {
        "forecast": {"mse": False, "mae": False},
        "completion": {"chamfer_l1": False, "chamfer_l2": False, "f_score": True},
    },
    "causal cross": {"translation": {"accuracy": True, "exact": True}},
}
"""Pattern -> task -> metric -> whether higher is better. Small stand-ins for the paper's tasks: language modelling, masked
and causal, forecasting and completion of clouds as there; denoising for super-resolution; translation for speech and
summaries."""

DEFAULT_MIXERS = (
    *("softmax", "local", "abc", "nystrom", "performer", "lara", "cosformer", "probsparse", "s4d"),
    *("transformer_ls", "causal_transformer_ls", "identity"),
)
"""The paper's methods, and no mixing at all."""

SIZES: dict[str, dict[str, Any]] = {
    "masked_text": {"length": 128},
    "denoising": {"length": 128},
    "text": {"length": 128},
    "forecast": {"length": 96, "horizon": 48},
    "completion": {"points": 128},
    "translation": {"length": 16},
}
"""Options of the tasks, so that all of them take minutes."""

_CURVED = 0.1
"""The share of full attention's cost at the longest length that must be quadratic for an efficiency length to mean
something: kernels that never hold the N x N matrix have memory that grows linearly."""


@dataclass(frozen=True)
class Benchmark:
    """What to run.

    Args:
        mixers: as in `compare.Settings`; each takes part in those patterns in which it works.
        lengths: tokens at which each mixer alone is timed; at least three for growth and efficiency length.
        budget, batch_size, lr, seeds: of every training, as in `compare.Settings`.
        options: of single tasks, by name, beside or instead of those in `SIZES`.
    """

    mixers: tuple[str, ...] = DEFAULT_MIXERS
    lengths: tuple[int, ...] = tuple(shape[0] for shape in DEFAULT_SHAPES[1])
    budget: int = 400
    batch_size: int = 32
    lr: float = 2e-3
    seeds: int = 2
    options: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for task in self.options:
            checks.one_of("task in options", task, SIZES)
        self.settings("text", self.mixers)  # what is wrong for one task is said before anything runs

    def settings(self, task: str, mixers: Sequence[str]) -> Settings:
        """The comparison of these mixers on one task."""
        return Settings(
            mixers=tuple(mixers),
            task=task,
            shapes=tuple((length,) for length in self.lengths),
            budget=self.budget,
            batch_size=self.batch_size,
            lr=self.lr,
            seeds=self.seeds,
            options=SIZES[task] | self.options.get(task, {}),
        )


def default_benchmark(mixers: Sequence[str] = (), shapes: Sequence[Sequence[int]] = (), **options: Any) -> Benchmark:
    """The benchmark with default mixers and lengths where none are given; mixers ("all",) are all that are registered."""
    if any(len(shape) != 1 for shape in shapes):
        raise ValueError("shapes of the benchmark cab are lengths of sequences, like 256,512,1024.")
    if shapes:
        options["lengths"] = tuple(shape[0] for shape in shapes)
    if mixers:
        options["mixers"] = tuple(list_mixers()) if tuple(mixers) == ("all",) else tuple(mixers)
    return Benchmark(**options)


def folder_of(pattern: Pattern, task: str = "") -> str:
    """Where a pattern, or one task of it, is kept, below the benchmark's folder."""
    return "/".join([pattern.replace(" ", "_"), *([task] if task else [])])


def run(benchmark: Benchmark, out: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Run what is missing, keep it under `out`, and write `out/results.json`.

    Returns:
        The content of results.json: settings, machine, the matrix mixer x pattern from running code, and for each pattern
        its tasks and a row a mixer.

    Raises:
        ValueError: for settings that cannot work at all; failures of single mixers are in their rows.
    """
    matrix = {name: patterns(find_mixer(name)) for name in benchmark.mixers}
    planned = {
        pattern: {task: benchmark.settings(task, able) for task in tasks}
        for pattern, tasks in TASKS.items()
        if (able := [name for name, can in matrix.items() if can[pattern]])
    }
    if not planned:
        raise ValueError(f"none of these mixers works in any of the four patterns: {', '.join(benchmark.mixers)}.")
    results: dict[str, Any] = {
        "benchmark": "cab",
        "settings": asdict(benchmark),
        "machine": machine.facts(),
        "matrix": [{"mixer": name} | can for name, can in matrix.items()],
        "patterns": {},
    }
    for pattern, tasks in planned.items():
        timings = out / folder_of(pattern)
        parts = {
            task: compare(settings, out / folder_of(pattern, task), progress, timings=timings)
            for task, settings in tasks.items()
        }
        results["patterns"][pattern] = {
            "tasks": {task: part["task"] for task, part in parts.items()},
            "rows": _rows(TASKS[pattern], parts),
        }
    write_json(out / "results.json", results)
    return results


def _rows(metrics: Mapping[str, Mapping[str, bool]], parts: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a mixer: scores, index, cost and efficiency length in one pattern."""
    by_task = {task: {row["mixer"]: row for row in part["rows"]} for task, part in parts.items()}
    alone = next(iter(by_task.values()))  # all tasks of a pattern share the timing of mixers alone
    rows = []
    for name, timed in alone.items():
        trained = {task: found[name] for task, found in by_task.items()}
        rows.append(
            {
                "mixer": name,
                "scores": {task: _scores(row, metrics[task]) for task, row in trained.items()},
                "params": {task: row["params"] for task, row in trained.items()},
                "efficiency_length": {} if name == FULL else _efficiency_lengths(alone.get(FULL), timed),
                "errors": sorted({error for row in trained.values() for error in row["errors"]}),
            }
            | {key: timed[key] for key in ("sizes", "time_growth", "memory_growth")}
        )
    return _with_index(rows, metrics)


def _scores(row: Mapping[str, Any], metrics: Mapping[str, bool]) -> dict[str, dict[str, float]] | None:
    """The metrics of a task, as medians over seeds with their range; None if no seed was finished."""
    runs = [run["metrics"] for run in row["runs"] if "metrics" in run]
    if not runs:
        return None
    values = {metric: [run[metric] for run in runs] for metric in metrics}
    return {metric: {"median": median(some), "low": min(some), "high": max(some)} for metric, some in values.items()}


def _with_index(rows: list[dict[str, Any]], metrics: Mapping[str, Mapping[str, bool]]) -> list[dict[str, Any]]:
    """The rows with the compositional index, normalised over those that have all scores, best first."""
    plain = [
        ScoredMetric(f"{task} {metric}", task, higher_is_better=high)
        for task, some in metrics.items()
        for metric, high in some.items()
    ]
    table = {
        row["mixer"]: {
            f"{task} {m}": score["median"] for task, some in row["scores"].items() for m, score in some.items()
        }
        for row in rows
        if None not in row["scores"].values()
    }
    norm = norm_of(table, plain) if len(table) > 1 else None
    for row in rows:
        scored = norm is not None and row["mixer"] in table
        row["index"] = asdict(compositional_index(table[row["mixer"]], norm)) if scored and norm else None
    return sorted(rows, key=lambda row: -row["index"]["total"] if row["index"] else math.inf)


def _efficiency_lengths(full: Mapping[str, Any] | None, efficient: Mapping[str, Any]) -> dict[str, Any]:
    """From which length a mixer is cheaper than full attention, in time and in memory, as far as that can be told."""
    pairs = [
        (math.prod(a["shape"]), a, b)
        for a, b in zip(full["sizes"] if full else (), efficient["sizes"], strict=False)
        if "seconds" in a and "seconds" in b
    ]
    found: dict[str, Any] = {}
    if len(pairs) < 3:
        return found
    lengths = [length for length, _, _ in pairs]
    costs = {
        "time": [[one["seconds"]["median"] for one in (a, b)] for _, a, b in pairs],
        "memory": [[float(one["peak_bytes"]) for one in (a, b)] for _, a, b in pairs],
    }
    for cost, values in costs.items():
        ours, others = zip(*values, strict=True)
        # As in the paper: times of the shortest sequences are overhead. (With three lengths none can be spared.)
        fit = efficiency_length(lengths, ours, others, skip=int(cost == "time" and len(lengths) > 3))
        curved = fit.full[0] * lengths[-1] ** 2 > _CURVED * ours[-1]
        found[cost] = {"length": fit.length if curved else None, "r_squared": fit.r_squared}
    return found
