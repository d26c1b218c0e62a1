"""Measuring on a shared machine: interleaved repeats, medians with spread, peak memory, fitted growth."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch.profiler import ProfilerActivity, profile


def interleaved_seconds(
    runs: Mapping[str, Callable[[], Any]], *, rounds: int = 9, seconds: float = 1.0, least: float = 0.0
) -> dict[str, list[float]]:
    """Wall times of several candidates, taken in turns (A B C A B C ...), so that drift hits all of them alike.

    Every candidate is run once to warm up. Rounds stop early (never below three) once `seconds` per candidate are spent.
    A turn lasts at least about `least` seconds: what is quicker is called several times, and the mean counts, so that
    it does not pay for the caches that the candidate before it has filled.
    """
    calls = {name: _calls(run, least) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    started = time.perf_counter()
    for index in range(rounds):
        if index >= 3 and time.perf_counter() - started > seconds * len(runs):
            break
        for name, run in runs.items():
            begin = time.perf_counter()
            for _ in range(calls[name]):
                run()
            times[name].append((time.perf_counter() - begin) / calls[name])
    return times


def _calls(run: Callable[[], Any], least: float) -> int:
    """Warm up; how many calls last `least` seconds."""
    for _ in range(2):  # the first may pay for what is set up once
        begin = time.perf_counter()
        run()
        taken = time.perf_counter() - begin
        if taken >= least:
            return 1
    return math.ceil(least / taken)


def median_seconds(run: Callable[[], Any], repeats: int = 5) -> float:
    """Median wall time of `run()` after one warm-up."""
    return statistics.median(interleaved_seconds({"": run}, rounds=repeats, seconds=math.inf)[""])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and number of measurements."""
    low, high = np.quantile(values, [0.25, 0.75])
    return {"median": statistics.median(values), "low": float(low), "high": float(high), "count": len(values)}


def peak_bytes(run: Callable[[], Any]) -> int:
    """Most bytes that PyTorch's allocator held at once during `run()`, beyond what it held before.

    Counted from the allocator's own records, so it includes temporaries inside kernels and what autograd keeps, and no
    noise from the operating system.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler greets on the console otherwise
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        kept = run()
    events = [
        (event.start_ns(), event.nbytes())
        for event in record.profiler.kineto_results.events()  # type: ignore[union-attr]
        if event.name() == "[memory]"
    ]
    del kept
    events.sort(key=lambda event: event[0])
    held, peak = 0, 0
    for _, size in events:
        held += size
        peak = max(peak, held)
    return peak


def _line(sizes: Sequence[float], values: Sequence[float]) -> Any:
    return stats.linregress(np.log(np.asarray(sizes, float)), np.log(np.asarray(values, float)))


def growth(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Exponent p of values ~ sizes^p: the slope of a straight line through the logarithms."""
    return float(_line(sizes, values).slope)


def fit_growth(sizes: Sequence[float], values: Sequence[float]) -> dict[str, float] | None:
    """The exponent of `growth` with its standard error, and the line's offset; None below 3 points or at a value of 0."""
    if len(sizes) < 3 or min(values) <= 0:
        return None
    line = _line(sizes, values)
    return {"exponent": float(line.slope), "error": float(line.stderr), "offset": float(line.intercept)}
