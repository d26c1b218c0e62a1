"""The training loop: deterministic batches, exact resume, any task, one process or many."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, send_to_device, set_seed
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, Sampler

from regard.checks import divisible, one_of, positive
from regard.tasks.base import Task


@dataclass(frozen=True)
class TrainConfig:
    """A recipe: everything besides data and model that decides how training goes.

    Args:
        steps: optimiser steps.
        batch_size: items per step over all processes.
        lr: peak learning rate; it rises linearly over `warmup` (a fraction of `steps`), then follows `schedule`.
        weight_decay: applied to matrices and kernels only (parameters of two or more axes that the model does not
            list in `no_weight_decay()`), never to norms, biases and position tables.
        clip_norm: gradients are scaled down to this global norm; None leaves them.
        seed: of the batch order, of dropout and of whatever else draws in training. The model is built by the caller.
        save_every: steps between checkpoints. num_workers: processes that load data, for each that trains.
    """

    steps: int = 300
    batch_size: int = 32
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.1
    schedule: Literal["cosine", "constant"] = "cosine"
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float | None = 1.0
    seed: int = 0
    save_every: int | None = None
    num_workers: int = 0
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"

    def __post_init__(self) -> None:
        positive("steps", self.steps)
        positive("batch_size", self.batch_size)
        positive("lr", self.lr)
        one_of("schedule", self.schedule, ("cosine", "constant"))
        one_of("optimizer", self.optimizer, ("adamw", "adam", "sgd"))


@dataclass
class TrainResult:
    """What came out: the loss of every step, the final metrics, and the seconds spent in training steps."""

    losses: list[float] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    steps: int = 0
    finished: bool = False


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A model built with its own seed, without touching the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


class StepSampler(Sampler[list[int]]):
    """Batches of indices by step: epoch e is the permutation drawn from `(seed, e)`, so step n is always the same."""

    def __init__(self, length: int, batch_size: int, start: int, stop: int, seed: int) -> None:
        if length < 1:
            raise ValueError("the training set is empty.")
        self.length, self.start, self.stop, self.seed = length, start, stop, seed
        self.batch_size = batch_size
        self.drop_last = True

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        order: list[int] = []
        epoch_of_order = -1
        for step in range(self.start, self.stop):
            batch = []
            for position in range(step * self.batch_size, (step + 1) * self.batch_size):
                epoch, index = divmod(position, self.length)
                if epoch != epoch_of_order:
                    generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                    order, epoch_of_order = torch.randperm(self.length, generator=generator).tolist(), epoch
                batch.append(order[index])
            yield batch


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: decayed (two or more axes) and not (norms, biases, and names in `model.no_weight_decay()`)."""
    exempt = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (plain if parameter.dim() < 2 or name in exempt else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The recipe's optimiser, with weight decay for matrices and kernels only."""
    groups = parameter_groups(model, config.weight_decay)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=0.0)
    if config.optimizer == "adam":
        return torch.optim.Adam(groups, lr=config.lr, betas=config.betas)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)


def lr_factor(step: int, config: TrainConfig) -> float:
    """What the peak learning rate is multiplied with at a step."""
    warm = round(config.warmup * config.steps)
    if step < warm:
        return (step + 1) / warm
    if config.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, config.steps - warm)))


class Objective(nn.Module):
    """The task's loss as one module, so that whatever spreads a model over processes sees all that runs in a step,
    also where a loss calls more of the model than its forward."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model, self.task = model, task

    def forward(self, batch: Any) -> torch.Tensor:
        return self.task.loss(self.model, batch)


def train(
    model: nn.Module,
    task: Task,
    config: TrainConfig,
    *,
    out: Path | None = None,
    on_step: Callable[[int, float], None] | None = None,
    cpu: bool | None = None,
) -> TrainResult:
    """Train `model` in place on `task` and evaluate it, in one process or, started by `torchrun`, in many.

    Every process holds the model and takes its share of each batch; gradients are averaged (DistributedDataParallel).

    With `out`, the state (model, optimiser, schedule, random generators, losses) is kept under `out/checkpoint` every
    `config.save_every` steps, and by one process also when it is interrupted (Ctrl-C, SIGTERM), at the end of the step. A
    later call with the same `out` continues there as if nothing had happened, also after a process was killed, even while
    it was saving. A checkpoint of another recipe is refused.

    Args:
        on_step: called after each step with the number of steps done and the loss; progress bars hang here.
        cpu: True keeps training on the CPU even where there is a GPU.

    Raises:
        ValueError: if the loss is not finite, `batch_size` cannot be shared evenly, or `out` holds a checkpoint of
            another recipe or another number of processes.
    """
    accelerator = _accelerator(config, cpu)
    set_seed(config.seed, device_specific=True)
    result = TrainResult()
    optimizer = make_optimizer(model, config)
    objective, optimizer = accelerator.prepare(Objective(model, task), optimizer)
    scheduler = LambdaLR(optimizer, lambda step: lr_factor(step, config))
    accelerator.register_for_checkpointing(scheduler)
    folder = out / "checkpoint" if out is not None else None
    if folder is not None:
        _restore(accelerator, folder, config, result)
    sampler = StepSampler(_length(task.train_set), config.batch_size, result.steps, config.steps, config.seed)
    loader = DataLoader(
        task.train_set,
        batch_sampler=sampler,
        collate_fn=task.collate,
        num_workers=config.num_workers,
        generator=torch.Generator(),  # a loader draws a seed when it starts: from the global state, resuming would show
    )
    loader = accelerator.prepare(loader)
    objective.train()
    alone = accelerator.num_processes == 1  # several may be at different steps when a signal comes
    started = time.perf_counter()
    with _held_signals(alone) as check_signals:
        for batch in loader:
            with accelerator.autocast():
                loss = objective(batch)
            shown = accelerator.reduce(loss.detach(), "mean").item()  # of all processes: they stop together
            if not math.isfinite(shown):
                raise ValueError(
                    f"the loss is {shown} at step {result.steps + 1}: lower lr (now {config.lr}) or clip_norm "
                    f"(now {config.clip_norm}), or check the data for NaN."
                )
            optimizer.zero_grad(set_to_none=True)
            accelerator.backward(loss)
            if config.clip_norm is not None:
                accelerator.clip_grad_norm_(objective.parameters(), config.clip_norm)
            optimizer.step()
            scheduler.step()
            result.steps += 1
            result.losses.append(shown)
            result.seconds, started = result.seconds + time.perf_counter() - started, time.perf_counter()
            try:
                if on_step is not None:
                    on_step(result.steps, result.losses[-1])
                check_signals()
            except KeyboardInterrupt:
                if folder is not None and alone:
                    _save(accelerator, folder, config, result)
                raise
            if folder is not None and (
                result.steps == config.steps or (config.save_every and result.steps % config.save_every == 0)
            ):
                _save(accelerator, folder, config, result)
                started = time.perf_counter()
    result.finished = True
    result.metrics = evaluate(model, task, batch_size=config.batch_size, accelerator=accelerator)
    return result


def evaluate(
    model: nn.Module, task: Task, *, batch_size: int = 64, accelerator: Accelerator | None = None
) -> dict[str, float]:
    """The task's metrics of `model` on its evaluation set, in evaluation mode and without gradients.

    With an accelerator its processes share the batches; each item counts once, and all processes get the same metrics.
    """
    was_training = model.training
    model.eval()
    length, rank, world = len(task.eval_set), 0, 1  # type: ignore[arg-type]
    metrics = task.metrics()
    if accelerator is not None:
        rank, world = accelerator.process_index, accelerator.num_processes
        metrics = {name: metric.to(accelerator.device) for name, metric in metrics.items()}
    batches = [list(range(start, min(start + batch_size, length))) for start in range(0, length, batch_size)]
    loader: Any = DataLoader(task.eval_set, batch_sampler=batches[rank::world], collate_fn=task.collate)
    with torch.no_grad():
        for batch in loader:
            if accelerator is not None:
                batch = send_to_device(batch, accelerator.device)
            task.update(metrics, model, batch)
    model.train(was_training)
    return {name: float(metric.compute()) for name, metric in metrics.items()}


def is_main_process() -> bool:
    """Whether this process is the one that reports and writes: the only one, or the first of those under torchrun."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def _held_signals(hold: bool) -> Iterator[Callable[[], None]]:
    """Ctrl-C and SIGTERM wait until the function that is given is called: it then raises KeyboardInterrupt.

    Between steps the state is whole; in the middle of one, dropout has drawn and weights may be half updated. A second
    signal does not wait.
    """
    came: list[int] = []

    def note(number: int, frame: Any) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)

    def check() -> None:
        if came:
            raise KeyboardInterrupt

    if not hold or threading.current_thread() is not threading.main_thread():  # only there Python lets signals be set
        yield check
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _accelerator(config: TrainConfig, cpu: bool | None) -> Accelerator:
    accelerator = Accelerator(
        cpu=bool(cpu) or not torch.accelerator.is_available(),  # unless told, Accelerate joins no processes on CPUs
        mixed_precision=config.mixed_precision,
        dataloader_config=DataLoaderConfiguration(split_batches=True, even_batches=True),
    )
    divisible("batch_size", config.batch_size, "number of processes", accelerator.num_processes)
    return accelerator


def _length(dataset: Dataset[Any]) -> int:
    if not hasattr(dataset, "__len__"):
        raise ValueError("a task's train_set must be a map-style data set with a length.")
    return len(dataset)


def refuse_other_recipe(path: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise a ValueError that names each difference, unless what was saved at `path` is of the recipe that is wanted."""
    different = [key for key in wanted if saved.get(key) != wanted[key]]
    if different:
        said = ", ".join(f"{key} was {saved.get(key)!r}, is {wanted[key]!r}" for key in different)
        raise ValueError(f"{path} holds a run with another recipe ({said}). Use the same recipe or another folder.")


def _save(accelerator: Accelerator, folder: Path, config: TrainConfig, result: TrainResult) -> None:
    """A folder for each step, which gets its name when it is whole; then the ones before it go."""
    name = f"step-{result.steps:08d}"
    unfinished = folder / f"unfinished-{name}"
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        progress = {"config": asdict(config), "steps": result.steps, "losses": result.losses, "seconds": result.seconds}
        progress["processes"] = accelerator.num_processes
        (unfinished / "progress.json").write_text(json.dumps(progress))
        unfinished.rename(folder / name)
        for other in folder.iterdir():
            if other.name != name:
                shutil.rmtree(other)
    accelerator.wait_for_everyone()


def _restore(accelerator: Accelerator, folder: Path, config: TrainConfig, result: TrainResult) -> None:
    """Go on from the last whole checkpoint, if there is one."""
    found = sorted(folder.glob("step-*"))
    if not found:
        return
    progress = json.loads((found[-1] / "progress.json").read_text())
    wanted = json.loads(json.dumps(asdict(config))) | {"processes": accelerator.num_processes}
    refuse_other_recipe(folder, progress["config"] | {"processes": progress["processes"]}, wanted)
    accelerator.load_state(str(found[-1]))
    result.steps, result.losses, result.seconds = progress["steps"], progress["losses"], progress["seconds"]
