"""The forms that proofs take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Literal

from torch import nn

from regard.checks import one_of
from regard.proofs.recordings import Recorded
from regard.tasks.base import Task
from regard.training import TrainConfig

Preset = Literal["smoke", "small", "paper"]
"""smoke: a few steps, shows that it runs. small: minutes on two CPU cores, what the evidence holds. paper: the paper's."""


@dataclass(frozen=True)
class Check:
    """One thing that was checked, and how it came out.

    Args:
        name: what was checked; for a claim, the claim as a sentence.
        holds: whether it came out so.
        figures: everything measured, by name.
        setting: budget, baseline, seeds; whatever a reader needs to judge the figures.
    """

    name: str
    holds: bool
    figures: Mapping[str, float | int | str | list[float]]
    setting: str = ""


@dataclass(frozen=True)
class Recipe:
    """A system on its own task: model, data and how to train it.

    Args:
        note: what a reader of the result should know of how the recipe came about.
    """

    model: nn.Module
    task: Task
    config: TrainConfig
    note: str = ""


@dataclass(frozen=True)
class Proofs:
    """Everything that `regard verify` runs for one system, besides what it reads off the card.

    Args:
        recordings: runs of the authors' code to equal, outputs and gradients.
        checks: further exactness checks (against an independent slow form of the paper's equations, for instance).
        recipe: preset -> model, task and training configuration of the "trains" proof.
        recipes: the same for further tasks, by the task's name.
        claims: preset -> the paper's claim as a controlled experiment.
    """

    recipe: Callable[[Preset], Recipe]
    claims: tuple[Callable[[Preset], Check], ...]
    recordings: tuple[Recorded, ...] = ()
    checks: tuple[Callable[[], Check], ...] = field(default=())
    recipes: Mapping[str, Callable[[Preset], Recipe]] = field(default_factory=dict)

    def recipe_for(self, task: str | None) -> Callable[[Preset], Recipe]:
        """The recipe for a task; None is the system's own.

        Raises:
            ValueError: for a task that the system has no recipe for.
        """
        if task is None or task in self.recipes:
            return self.recipe if task is None else self.recipes[task]
        own = self.recipe("smoke").task.name
        one_of("task", task, (own, *self.recipes))
        return self.recipe


def get_proofs(slug: str) -> Proofs | None:
    """The proofs of a system, or None if nothing is written yet."""
    name = f"regard.proofs.{slug}"
    return import_module(name).PROOFS if find_spec(name) is not None else None
