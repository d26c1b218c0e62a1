"""`regard compare`: the same small model with each mixer, trained alike, measured alike.

The work is cut into pieces that are kept as they finish: training of one mixer with one seed, timing of all mixers at
one size, a look at what one mixer reads. A mixer that fails somewhere says why in its row; the others go on.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from regard import checks
from regard.flops import count_macs, count_params
from regard.measure import fit_growth, interleaved_seconds, peak_bytes, spread
from regard.registry import list_mixers, mixer_class
from regard.skeletons.host import build_in_stack
from regard.tasks import Task, create_task
from regard.training import TrainConfig, seeded, train
from regard.workbench import machine
from regard.workbench.setups import DEFAULT_MIXERS, DEFAULT_SHAPES, SETUPS, Mixer, Setup
from regard.workbench.store import Store, why, write_json

_COST_DIM, _COST_HEADS = 64, 4

Mixers = dict[str, Mixer]
"""Mixers by the name that the user gave: a registered name, or a class."""


@dataclass(frozen=True)
class Settings:
    """What to compare, and how much of it.

    Args:
        mixers: registered names, or `module:Class` and `file.py:Class` for a user's own.
        task: one of `SETUPS`; `data` replaces its built-in data by a folder or file.
        shapes: grid sizes at which each mixer alone is timed.
        budget: training steps of every mixer and seed. batch_size, lr: the same for all.
        seeds: how many; seeds 0, 1, ... set weights and batch order.
    """

    mixers: tuple[str, ...]
    task: str = "scenes"
    data: str | None = None
    shapes: tuple[tuple[int, ...], ...] = ()
    budget: int = 400
    batch_size: int = 32
    lr: float = 2e-3
    seeds: int = 2
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checks.one_of("task", self.task, SETUPS)
        checks.positive("budget", self.budget)
        checks.positive("seeds", self.seeds)
        if not self.mixers:
            raise ValueError("mixers is empty: name at least one, for instance softmax.")
        if len(set(self.mixers)) != len(self.mixers):
            raise ValueError(f"mixers holds a name twice: {', '.join(self.mixers)}.")
        for shape in self.shapes:
            if len(shape) != self.axes:
                raise ValueError(
                    f"shapes of task {self.task!r} need {self.axes} sizes each, like {'x'.join(['16'] * self.axes)}; "
                    f"got {'x'.join(map(str, shape))}."
                )

    @property
    def axes(self) -> int:
        """Spatial axes of the mixers."""
        return self.setup.axes

    @property
    def setup(self) -> Setup:
        """How mixers are compared on the task."""
        return SETUPS[self.task]


def default_settings(task: str = "scenes", mixers: Sequence[str] = (), **options: Any) -> Settings:
    """Settings with the task's default mixers and shapes where none are given; mixers ("all",) are all that fit the task."""
    setup = SETUPS[checks.one_of("task", task, SETUPS)]
    shapes = options.pop("shapes", ()) or DEFAULT_SHAPES[setup.axes]
    usual = DEFAULT_MIXERS[setup.axes, setup.pattern]
    chosen = fitting_mixers(task) if tuple(mixers) == ("all",) else tuple(mixers) or usual
    return Settings(mixers=chosen, task=task, shapes=tuple(shapes), **options)


def fitting_mixers(task: str) -> tuple[str, ...]:
    """Every registered mixer that takes grids with the task's number of axes, and the task's place of attention."""
    return tuple(name for name in list_mixers() if SETUPS[task].fits(mixer_class(name)))


class Progress(Protocol):
    """Where a run says what it is doing; the command line shows it, a notebook may ignore it."""

    def start(self, what: str, total: int) -> None: ...
    def step(self, done: int, note: str = "") -> None: ...
    def finish(self, note: str = "") -> None: ...


class Silent:
    """Progress that nobody sees."""

    def start(self, what: str, total: int) -> None:
        pass

    def step(self, done: int, note: str = "") -> None:
        pass

    def finish(self, note: str = "") -> None:
        pass


def find_mixer(name: str) -> Mixer:
    """A registered mixer's name as it is, or the class behind `module:Class` or `path/to/file.py:Class`.

    Raises:
        ValueError: for a name that is not known, a module that cannot be imported, or a class that is not there.
    """
    if ":" not in name:
        mixer_class(name)
        return name
    home, _, attribute = name.rpartition(":")
    try:
        if home.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(home).stem, home)
            if spec is None or spec.loader is None or not Path(home).is_file():
                raise ValueError(f"mixer {name!r}: there is no file {home}.")
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
        else:
            if "" not in sys.path:
                sys.path.insert(0, "")
            module = importlib.import_module(home)
    except ImportError as error:
        raise ValueError(f"mixer {name!r}: cannot import {home} ({error}). Is it in the current folder?") from error
    found = getattr(module, attribute, None)
    if found is None:
        raise ValueError(
            f"mixer {name!r}: {home} has no {attribute}.{checks.nearest(attribute, [n for n in vars(module) if n[0] != '_'])}"
        )
    return found


def build_task(settings: Settings) -> Task:
    """The task with the user's data, if any."""
    options = dict(settings.options)
    if settings.data is not None:
        options["data"] = settings.data
    return create_task(settings.task, **options)


def build_model(settings: Settings, task: Any, mixer: Mixer) -> nn.Module:
    """The host of the task's kind with this mixer; everything else is equal for all mixers."""
    return settings.setup.build(task, mixer)


def _train_one(
    settings: Settings, task: Task, name: str, mixer: Mixer, seed: int, progress: Progress
) -> dict[str, Any]:
    progress.start(f"train {name}, seed {seed}", settings.budget)
    model = seeded(lambda: build_model(settings, task, mixer), seed)
    _check_future(settings, task, model)
    config = TrainConfig(steps=settings.budget, batch_size=settings.batch_size, lr=settings.lr, seed=seed)
    result = train(model, task, config, on_step=lambda step, loss: progress.step(step, f"loss {loss:.3f}"))
    progress.finish(f"{task.metric} {result.metrics[task.metric]:.4g}")
    _check_future(settings, task, model)  # again: some look ahead only after they have learned to
    every = max(1, settings.budget // 50)
    return {
        "metrics": result.metrics,
        "losses": [round(loss, 5) for loss in result.losses[::every]],
        "losses_every": every,
        "seconds": result.seconds,
        "params": count_params(model),
        "reads": _reads(settings, task, model) if seed == 0 else None,
    }


def _batch_of_one(settings: Settings, task: Task) -> tuple[Tensor | None, ...]:
    """What a model is called with for the first evaluation item."""
    return tuple(None if part is None else part[None] for part in settings.setup.inputs(task.eval_set[0]))


@torch.no_grad()
def _check_future(settings: Settings, task: Task, model: nn.Module) -> None:
    """A score of a model that has seen the answers says nothing: change the later half of what it reads left to right."""
    if not settings.setup.pattern.startswith("causal"):
        return
    *given, tokens = cast(tuple[Any, ...], _batch_of_one(settings, task))
    half = tokens.shape[1] // 2
    other = tokens.clone()
    other[:, half:] = tokens[:, :1]
    model.eval()
    if not torch.allclose(model(*given, tokens)[:, :half], model(*given, other)[:, :half], rtol=1e-3, atol=1e-3):
        raise ValueError("its outputs depend on later tokens, which are what it has to predict.")


def _reads(settings: Settings, task: Task, model: nn.Module) -> dict[str, Any] | None:
    """What the trained model looks at: on one evaluation image, how much each pixel moves the winning logit, and how
    much each token of the first stage moves the token in the middle."""
    if settings.axes != 2:
        return None
    model.eval()
    image = task.eval_set[0]["image"][None].clone().requires_grad_()
    logits = model(image)
    winner = int(logits[0].argmax())
    (gradient,) = torch.autograd.grad(logits[0, winner], image)
    tokens = model.stem(image.movedim(1, -1)).detach()
    tokens = (tokens + model.position.detach()).requires_grad_()
    stage = cast(nn.ModuleList, model.stages)[0](tokens)
    middle = stage[0, stage.shape[1] // 2, stage.shape[2] // 2]
    (reach,) = torch.autograd.grad(middle.square().sum(), tokens)
    return {
        "image": _rounded(image.detach()[0]),
        "label": int(task.eval_set[0]["label"]),
        "answer": winner,
        "pixels": _rounded(gradient[0].abs().sum(0)),
        "tokens": _rounded(reach[0].norm(dim=-1)),
    }


def _rounded(x: Tensor) -> list[Any]:
    return [_rounded(row) for row in x] if x.dim() > 1 else [float(f"{value:.4g}") for value in x.tolist()]


def _timed(
    what: str,
    mixers: Mixers,
    build: Callable[[Mixer], nn.Module],
    inputs: tuple[Tensor | None, ...],
    progress: Progress,
) -> dict[str, Any]:
    """Forward latency, peak memory and multiply-adds of what `build` makes of each mixer, timed in turns on `inputs`."""
    progress.start(what, len(mixers))
    rows: dict[str, Any] = {}
    runs: dict[str, Callable[[], Any]] = {}
    for index, (name, mixer) in enumerate(mixers.items()):
        try:
            module = build(mixer).eval()
            run = torch.no_grad()(partial(module, *inputs))
            run()
            rows[name] = {"peak_bytes": peak_bytes(run), "macs": _macs(module, inputs)}
            runs[name] = run
        except Exception as error:  # a mixer that cannot run this must not end the comparison
            rows[name] = {"error": why(error)}
        progress.step(index + 1, name)
    for name, times in interleaved_seconds(runs, rounds=11).items():
        rows[name]["seconds"] = spread(times)
    progress.finish()
    return {"rows": rows}


def _macs(module: nn.Module, inputs: tuple[Any, ...]) -> int | None:
    try:
        return count_macs(module, *inputs)
    except Exception:  # the count is an extra: a user's module may do what the counter cannot follow
        return None


def _time_shape(settings: Settings, mixers: Mixers, shape: tuple[int, ...], progress: Progress) -> dict[str, Any]:
    """Each mixer alone on one grid, dim 64, batch 1; cross attention reads a context of the same size."""
    x, context = torch.randn(2, 1, *shape, _COST_DIM, generator=torch.Generator().manual_seed(0))
    inputs = (x, context) if settings.setup.crosses else (x,)

    def build(mixer: Mixer) -> nn.Module:
        module = build_in_stack(mixer, 0, shape, _COST_DIM, _COST_HEADS, **settings.setup.options)
        with torch.no_grad():
            given = tuple(module(*inputs).shape)
        if given != tuple(x.shape):
            raise ValueError(f"forward gives shape {given}, expected {tuple(x.shape)}")
        return module

    return _timed(f"time all mixers at {'x'.join(map(str, shape))}", mixers, build, inputs, progress)


def _time_models(settings: Settings, mixers: Mixers, task: Task, progress: Progress) -> dict[str, Any]:
    """The whole models on one sample of the task."""

    def build(mixer: Mixer) -> nn.Module:
        return seeded(lambda: build_model(settings, task, mixer), 0)

    return _timed("time whole models", mixers, build, _batch_of_one(settings, task), progress)


def compare(
    settings: Settings, out: Path, progress: Progress | None = None, *, timings: Path | None = None
) -> dict[str, Any]:
    """Run what is missing, keep it under `out`, and write `out/results.json`.

    Args:
        timings: where the timing of mixers alone is kept instead, if several tasks share it.

    Returns:
        The content of results.json: settings, machine, task, one row for each mixer.

    Raises:
        ValueError: for settings that cannot work at all (unknown mixer or task, empty data); failures of single mixers
            are reported in their rows instead.
    """
    progress = progress or Silent()
    mixers = {name: find_mixer(name) for name in settings.mixers}
    stamps = {name: _source_stamp(mixer) for name, mixer in mixers.items()}
    store, task = Store(out), build_task(settings)
    timed_store = store if timings is None else Store(timings)
    about = asdict(settings) | {"machine": machine.facts()}
    rows: dict[str, dict[str, Any]] = {name: {"mixer": name, "runs": [], "sizes": []} for name in settings.mixers}

    def piece(
        kind: str, asked: dict[str, Any], make: Callable[[], dict[str, Any]], store: Store = store
    ) -> dict[str, Any]:
        known = store.get(kind, asked)
        if known is None:
            known = make()
            store.put(kind, asked, known)
        return known

    base = {key: about[key] for key in ("task", "data", "budget", "batch_size", "lr", "options")}
    for seed in range(settings.seeds):
        for name, mixer in mixers.items():
            asked = base | {"mixer": name, "seed": seed, "source": stamps[name]}
            try:
                run = piece("train", asked, partial(_train_one, settings, task, name, mixer, seed, progress))
                rows[name]["runs"].append({"seed": seed} | run)
            except Exception as error:
                rows[name]["runs"].append({"seed": seed, "error": why(error)})
                progress.finish("failed")
    names = {"mixers": list(mixers), "sources": list(stamps.values())}
    models = piece("models", base | names, partial(_time_models, settings, mixers, task, progress))
    for shape in settings.shapes:
        asked = names | {"shape": shape, "axes": settings.axes, "threads": torch.get_num_threads()}
        if settings.axes == 1 and settings.setup.pattern != "causal self":  # once the only one: older folders go on
            asked["pattern"] = settings.setup.pattern
        timed = piece("shape", asked, partial(_time_shape, settings, mixers, shape, progress), timed_store)
        for name in settings.mixers:
            rows[name]["sizes"].append({"shape": list(shape)} | timed["rows"][name])
    for name, row in rows.items():
        row["model"] = models["rows"][name]
        row |= _summary(row, task)
    trivial = task.trivial()
    results = {
        "settings": asdict(settings),
        "machine": about["machine"],
        "task": {
            "name": task.name,
            "description": task.description,
            "metric": task.metric,
            "higher_is_better": task.higher_is_better,
            "trivial": trivial[task.metric],
            "trivial_metrics": trivial,
            "trivial_answer": task.trivial_answer,
        },
        "cost_dim": _COST_DIM,
        "rows": list(rows.values()),
    }
    write_json(out / "results.json", results)
    return results


def _source_stamp(mixer: Mixer) -> str:
    """Changes when the file of a user's own mixer changes, so that its results are made anew."""
    if isinstance(mixer, str):
        return ""
    try:
        return hashlib.sha256(Path(inspect.getfile(cast(type, mixer))).read_bytes()).hexdigest()[:12]
    except (OSError, TypeError):
        return ""


def _summary(row: dict[str, Any], task: Task) -> dict[str, Any]:
    scores = [run["metrics"][task.metric] for run in row["runs"] if "metrics" in run]
    good = [size for size in row["sizes"] if "seconds" in size]
    tokens = [math.prod(size["shape"]) for size in good]
    return {
        "scores": scores,
        "score": spread(scores) if scores else None,
        "params": next((run["params"] for run in row["runs"] if "params" in run), None),
        "time_growth": fit_growth(tokens, [size["seconds"]["median"] for size in good]),
        "memory_growth": fit_growth(tokens, [size["peak_bytes"] for size in good]),
        "errors": sorted({part["error"] for part in [*row["runs"], *row["sizes"], row["model"]] if "error" in part}),
    }
