"""Training with sequences that are spread over processes: every rank sees all samples, but its shard of their tokens.

    torchrun --nproc-per-node 2 -m regard.training.sequence_parallel --length 2048 --steps 100

trains a small `MillionLM` on the text task, on GPUs with NCCL or on processors with gloo. Without torchrun the same command
(`python -m ...`) runs in one process, with the same losses.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from regard.ops.distributed import METHODS
from regard.ops.shards import LAYOUTS, Layout, shard_sequence
from regard.systems.sequence.million_scale import MillionLM, spread
from regard.tasks import create_task
from regard.tasks.base import Task
from regard.training.trainer import StepSampler, TrainConfig, TrainResult, lr_factor, make_optimizer, seeded


def spread_loss(model: nn.Module, tokens: Tensor, *, layout: Layout, group: dist.ProcessGroup | None) -> Tensor:
    """This rank's part of the mean cross entropy of the next token; the parts of all ranks sum to it.

    Args:
        model: maps a shard of tokens to logits, see `spread`. tokens: `(B, N + 1)`, the same on every rank.
        group: the processes; None for a model that is not spread.
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    if group is not None:
        inputs, targets = (shard_sequence(x, layout=layout, group=group) for x in (inputs, targets))
    total = tokens.shape[0] * (tokens.shape[1] - 1)
    return F.cross_entropy(model(inputs).flatten(0, 1).float(), targets.flatten(), reduction="sum") / total


def sum_gradients(model: nn.Module, group: dist.ProcessGroup | None) -> None:
    """Make every gradient the sum of those of all ranks, in one message; a parameter that a rank did not use counts as 0."""
    if group is None:
        return
    used = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in used:
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    flat = torch.cat([parameter.grad.flatten() for parameter in used])
    dist.all_reduce(flat, group=group)
    for parameter, grad in zip(used, flat.split([parameter.numel() for parameter in used]), strict=True):
        parameter.grad.copy_(grad.view_as(parameter))


def train_spread(
    model: nn.Module,
    task: Task,
    config: TrainConfig,
    *,
    layout: Layout = "zigzag",
    group: dist.ProcessGroup | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> TrainResult:
    """Train a language model in place with the batches, optimiser and schedule of `regard.training.train`.

    Every rank starts from the same weights and ends with the same; losses are those of one process but for rounding.

    Args:
        model: as for `spread_loss`; it is spread over `group`. task: one whose items hold `tokens`, such as "text".
        on_step: called after each step with the number of steps done and the loss of all ranks.
    """
    torch.manual_seed(config.seed)  # of dropped paths, which are samples: all ranks have to drop the same
    device = next(model.parameters()).device
    spread(model, group).train()
    optimizer = make_optimizer(model, config)
    scheduler = LambdaLR(optimizer, lambda step: lr_factor(step, config))
    sampler = StepSampler(len(task.train_set), config.batch_size, 0, config.steps, config.seed)  # type: ignore[arg-type]
    result, started = TrainResult(), time.perf_counter()
    for batch in DataLoader(task.train_set, batch_sampler=sampler, collate_fn=task.collate):
        loss = spread_loss(model, batch["tokens"].to(device), layout=layout, group=group)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        sum_gradients(model, group)
        if config.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        scheduler.step()
        whole = loss.detach().clone()
        if group is not None:
            dist.all_reduce(whole, group=group)
        result.steps += 1
        result.losses.append(whole.item())
        if on_step is not None:
            on_step(result.steps, result.losses[-1])
    result.seconds, result.finished = time.perf_counter() - started, True
    return result


def main(arguments: Sequence[str] | None = None) -> TrainResult:
    """The command; see the top of this module."""
    parser = argparse.ArgumentParser(description="Train a language model whose context is spread over processes.")
    for name, value in (("length", 1024), ("steps", 50), ("batch-size", 4), ("dim", 64), ("depth", 2), ("heads", 4)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--method", choices=METHODS, default="ring")
    parser.add_argument("--layout", choices=LAYOUTS, default="zigzag")
    chosen = parser.parse_args(arguments)
    group, device = None, torch.device("cpu")
    if "RANK" in os.environ:
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        group = dist.group.WORLD
    task = create_task("text", length=chosen.length)
    how = {"method": chosen.method, "layout": chosen.layout}
    model = seeded(lambda: MillionLM(256, chosen.dim, chosen.depth, chosen.heads, **how), 0).to(device)
    config = TrainConfig(steps=chosen.steps, batch_size=chosen.batch_size, lr=3e-3)

    def show(step: int, loss: float) -> None:
        if (step in (1, chosen.steps) or step % 10 == 0) and (group is None or dist.get_rank() == 0):
            print(f"step {step}: loss {loss:.4f}", flush=True)

    try:
        return train_spread(model, task, config, layout=chosen.layout, group=group, on_step=show)
    finally:
        if group is not None:
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
