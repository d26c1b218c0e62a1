"""What the proofs of IA-RED² on images and on clips share: masks against gathering, learning by reward, measured savings."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.flops import MacCounter
from regard.layers import split_qkv
from regard.measure import interleaved_seconds
from regard.systems.backbones._interpreted import Interpreter
from regard.tasks.images import Classification


def masks_against_gathering(model: Any, plain: nn.Module, x: Tensor) -> dict[str, Any]:
    """Errors of logits and gradients between the two forms of an `Interpreted` model, and against `plain`, if all is kept.

    Args:
        model, plain: in float64; the second gets the weights of the first.
    """
    masked, gathered = model.interpret(x), model.forward_gathered(x)
    figures: dict[str, Any] = {"gathered_error": (masked.logits - gathered).abs().max().item()}
    figures["tokens_left"] = [keep.sum(1).int().tolist() for keep in masked.keeps]
    weight = torch.randn(gathered.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    parameters = [parameter for name, parameter in model.named_parameters() if not name.startswith("interpreters")]
    gradients = [torch.autograd.grad((out * weight).sum(), parameters) for out in (masked.logits, gathered)]
    figures["gathered_gradient_error"] = max((a - b).abs().max().item() for a, b in zip(*gradients, strict=True))

    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if not name.startswith("interpreters"):
            state |= split_qkv(name, value)
    plain.load_state_dict(state)
    for interpreter in model.interpreters:  # all queries and keys 1, so all scores above 0.5
        nn.init.zeros_(interpreter.qk.weight)
        nn.init.ones_(interpreter.qk.bias)
    figures["all_kept_error"] = max(
        (out - plain(x)).abs().max().item() for out in (model(x), model.forward_gathered(x), model.stage(0)(x))
    )
    return figures


def agree(figures: dict[str, Any], tokens: int) -> bool:
    """Whether all errors of `masks_against_gathering` are below 1e-10, and some of the `tokens` were dropped."""
    errors = [value for name, value in figures.items() if name.endswith("error")]
    return max(errors) < 1e-10 and min(map(min, figures["tokens_left"])) < tokens


class Rewarded(Classification):
    """Mixed into a task: the loss of what learns, as `Interpreted.stage` names it."""

    learn = "all"

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        reward = model.policy_loss(batch["image"], batch["label"]) if self.learn != "blocks" else 0.0
        return reward + (super().loss(model, batch) if self.learn != "interpreter" else 0.0)


class KeepsShare(Interpreter):
    """Scores as an interpreter, then keeps a fixed share of one sample's tokens, those that score highest."""

    share = 1.0

    def score(self, x: Tensor, queries: Tensor) -> Tensor:
        """0 or 1 for each of the rows `(T, dim)`, the class token first."""
        scores = super().score(x, queries)[1:]
        best = scores.topk(round(self.share * len(scores))).indices
        return F.pad(torch.zeros_like(scores).index_fill(0, best, 1.0), (1, 0), value=1.0)


def speed_ups(model: Any, x: Tensor, published: float, rounds: int) -> tuple[bool, dict[str, float]]:
    """The gathered form with a share of the tokens kept in each group, against the same model without interpreters.

    Args:
        model: an `Interpreted` model with `KeepsShare` for interpreters. x: one image or clip.
        published: a share to try beside 1, 0.75 and 0.5.

    Returns:
        Whether the time falls from 1 to 0.75 to 0.5; `speed_up_keeping_SHARE` and `multiply_adds_keeping_SHARE` (what is
        left of them).
    """
    runs: dict[Any, Callable[[], Any]] = {"dense": partial(copy.deepcopy(model).stage(0), x)}
    runs |= {share: partial(_keeping, model, x, share) for share in (1.0, 0.75, 0.5, published)}
    with torch.no_grad():
        times = {name: median(taken) for name, taken in interleaved_seconds(runs, rounds=rounds, seconds=3).items()}
    macs = {name: counted(run) for name, run in runs.items()}
    figures: dict[str, float] = {}
    for share in list(runs)[1:]:
        figures[f"speed_up_keeping_{share}"] = round(times["dense"] / times[share], 3)
        figures[f"multiply_adds_keeping_{share}"] = round(macs[share] / macs["dense"], 3)
    return times[1.0] > times[0.75] > times[0.5], figures


def nearest_share(model: Any, x: Tensor, wanted: float) -> float:
    """The share of tokens to keep, in steps of 0.01, that leaves nearest to `wanted` of the multiply-adds."""
    whole, low, high = counted(partial(copy.deepcopy(model).stage(0), x)), 0, 100
    while high - low > 1:  # multiply-adds rise with the share
        middle = (low + high) // 2
        less = counted(partial(_keeping, model, x, middle / 100)) < wanted * whole
        low, high = (middle, high) if less else (low, middle)
    return high / 100


def counted(run: Callable[[], Any]) -> int:
    """Multiply-adds of a call."""
    with MacCounter() as counter, torch.no_grad():
        run()
    return counter.macs


def _keeping(model: Any, x: Tensor, share: float) -> Tensor:
    for interpreter in model.interpreters:
        interpreter.share = share
    return model.forward_gathered(x)
