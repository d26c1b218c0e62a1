"""`regard bench`: how fast, beside what people would use instead, and how near to what this machine can do at all.

A case is one computation on one set of inputs; its contenders compute it in different ways. Every contender has to give
the numbers of the first (ours) before it is timed. All of them, and three probes of the machine (a matrix product, a
copy, a read), are timed in turns, so that ratios and shares come from one run.
"""

from __future__ import annotations

import math
import shlex
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from regard.flops import MacCounter
from regard.measure import fit_growth, interleaved_seconds, peak_bytes, spread
from regard.workbench import machine
from regard.workbench.store import why

Inputs = Sequence[Tensor]
Run = Callable[..., Tensor]


class Skip(Exception):
    """Why something cannot take part, in one line."""


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, Skip) else why(error)


@dataclass(frozen=True)
class Contender:
    """One way to compute a case.

    Args:
        name: short; what `--peers` takes.
        build: given the inputs, makes the function of these inputs that is timed, or raises `Skip` with the reason why
            it cannot. What it does beforehand (masks, copying weights) is not timed.
        note: what it is.
        same: whether it computes the same numbers as the first contender, and is held to that.
        threads: its own number of threads, where it differs from the case's.
    """

    name: str
    build: Callable[[Inputs], Run]
    note: str = ""
    same: bool = True
    threads: int | None = None


@dataclass(frozen=True)
class Case:
    """One computation on one set of inputs.

    Args:
        inputs: draws them. contenders: ours first. size: tokens, or pixels of a model.
        mode: "forward", or "training" for a forward and a backward pass.
        series: cases of one series differ in size only; their growth is fitted.
    """

    title: str
    inputs: Callable[[], Inputs]
    contenders: Sequence[Contender]
    size: int
    mode: str = "forward"
    threads: int | None = None
    series: str = ""


@contextmanager
def with_threads(count: int | None) -> Iterator[None]:
    """PyTorch's threads set to `count` for a while; None leaves them."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def step(run: Run, inputs: Inputs, mode: str, threads: int | None = None) -> list[Tensor]:
    """The output; in training also the gradients of half its square, for floating inputs and parameters."""
    with with_threads(threads):
        if mode == "forward":
            with torch.no_grad():
                return [run(*inputs)]
        leaves = [x for x in (*inputs, *(run.parameters() if isinstance(run, nn.Module) else ())) if x.requires_grad]
        out = run(*inputs)
        return [out, *(g for g in torch.autograd.grad(out, leaves, out.detach(), allow_unused=True) if g is not None)]


def difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Largest distance between outputs and between gradients, each as a share of our largest entry."""
    if ours[0].shape != theirs[0].shape:
        return math.inf
    if [x.shape for x in ours] != [x.shape for x in theirs]:
        # Models that lay out their parameters in other ways: the output, and the length of the whole gradient.
        ours, theirs = (
            [xs[0], torch.tensor([float(x.double().norm()) for x in xs[1:]]).norm()] for xs in (ours, theirs)
        )
    worst = [((b - a).abs().max() / a.abs().max().clamp(min=1e-30)).item() for a, b in zip(ours, theirs, strict=True)]
    return max(math.inf if math.isnan(value) else value for value in worst)


@lru_cache(maxsize=1)
def _probes(dtype: torch.dtype) -> dict[str, tuple[Callable[[], Any], int]]:
    """What the machine does best: a run and its multiply-adds, or its bytes (128 MiB are more than most caches hold)."""
    square, memory = torch.ones(1024, 1024, dtype=dtype), torch.ones(1 << 25)
    product, target = torch.empty_like(square), torch.empty_like(memory)
    return {
        "GEMM": (partial(torch.mm, square, square, out=product), 1024**3),
        "copy": (partial(target.copy_, memory), 2 * memory.nbytes),
        "read": (memory.sum, memory.nbytes),
    }


def _work(run: Run, inputs: Inputs, mode: str) -> dict[str, Any]:
    """Multiply-adds, and bytes to move at least, of the definition; a backward pass counts as two forward passes."""
    with torch.no_grad(), MacCounter() as counter:
        out = run(*inputs)
    passes, read = 3 if mode == "training" else 1, sum(x.nbytes for x in inputs)
    moved = "read" if mode == "forward" and read > 8 * out.nbytes else "copy"
    return {"macs": passes * counter.macs, "bytes": passes * (read + out.nbytes), "moved": moved}


def run_case(case: Case, peers: Sequence[str] | None = None, repeats: int = 15, seconds: float = 2.0) -> dict[str, Any]:
    """Build, check and time one case; a peer that cannot take part says why in its row.

    Args:
        peers: names of the contenders besides the first; None is all.
        repeats: rounds; fewer, but three at least, once `seconds` per contender are spent.

    Raises:
        Exception: whatever our own contender raises.
    """
    torch.compiler.reset()  # compiled peers of earlier cases count against a limit
    with with_threads(case.threads), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # how peers would like to be called is no result
        inputs = case.inputs()
        ours, *others = case.contenders
        others = [contender for contender in others if peers is None or contender.name in peers]
        own = ours.build(inputs)
        rows: dict[str, dict[str, Any]] = {c.name: {"name": c.name, "note": c.note} for c in (ours, *others)}
        runs: dict[str, Callable[[], list[Tensor]]] = {ours.name: partial(step, own, inputs, case.mode, ours.threads)}
        for peer in others:  # all are built before ours runs: one may bring the weights that ours takes over
            try:
                built = peer.build(inputs)
                rows[peer.name] |= {} if peer.same else _work(built, inputs, case.mode)
                runs[peer.name] = partial(step, built, inputs, case.mode, peer.threads)
            except Exception as error:
                rows[peer.name]["skipped"] = _reason(error)
        work, expected = _work(own, inputs, case.mode), runs[ours.name]()
        tolerance = torch.finfo(expected[0].dtype).eps ** 0.5
        for contender in (ours, *others):
            row = rows[contender.name] = work | rows[contender.name]
            try:
                if contender is not ours and contender.same and "skipped" not in row:
                    row["difference"] = difference(expected, runs[contender.name]())
                    if not row["difference"] <= tolerance:
                        raise Skip(f"gives other numbers than ours, by {row['difference']:.1e} of the largest")
                if contender.name in runs:
                    row["peak_bytes"] = peak_bytes(runs[contender.name])
            except Exception as error:
                row["skipped"] = _reason(error)
                del runs[contender.name]
        probes = _probes(expected[0].dtype)
        measured = {name: run for name, (run, _) in probes.items()} | runs
        timed = interleaved_seconds(measured, rounds=repeats, seconds=seconds, least=0.01)
        limits = {name: count / statistics.median(timed[name]) for name, (_, count) in probes.items()}
        for name in runs:
            row, taken = rows[name], spread(timed[name])
            least = {"GEMM": row["macs"] / limits["GEMM"], row["moved"]: row["bytes"] / limits[row["moved"]]}
            bound = max(least, key=lambda kind: least[kind])
            ratios = [theirs / mine for theirs, mine in zip(timed[name], timed[ours.name], strict=True)]
            row |= {"seconds": taken, "ratio": spread(ratios), "bound": bound, "share": least[bound] / taken["median"]}
        about = {key: getattr(case, key) for key in ("title", "mode", "size", "series")}
        about |= {"dtype": str(expected[0].dtype).removeprefix("torch."), "threads": torch.get_num_threads()}
        return about | {"limits": limits, "rows": list(rows.values())}


def run_bar(
    name: str,
    cases: Sequence[Case],
    about: str = "",
    *,
    peers: Sequence[str] | None = None,
    repeats: int = 15,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The cases that answer one question, as values for JSON. A case that fails says why, unless it is the only one."""
    results = []
    for case in cases:
        note(f"{name}: {case.title}")
        try:
            results.append(run_case(case, peers, repeats))
        except Exception as error:
            if len(cases) == 1:
                raise
            results.append({"title": case.title, "rows": [], "error": why(error)})
    return {
        "name": name,
        "about": about,
        "command": shlex.join(["regard", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": machine.facts(),
        "cases": results,
        "growth": _growth(results),
    }


def _growth(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Exponents of time and memory over size, for each contender of a series with three sizes or more."""
    points: dict[tuple[str, str], list[tuple[int, float, int]]] = {}
    for case in results:
        for row in case["rows"]:
            if case["series"] and "seconds" in row:
                point = (case["size"], row["seconds"]["median"], row["peak_bytes"])
                points.setdefault((case["series"], row["name"]), []).append(point)
    fits = []
    for (series, name), found in points.items():
        sizes, times, held = zip(*found, strict=True)
        time, memory = fit_growth(sizes, times), fit_growth(sizes, held)
        fits += [{"series": series, "name": name, "time": time, "memory": memory}] if time else []
    return fits
