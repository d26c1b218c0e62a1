"""What a task is: data, a loss, metrics, and the trivial answer that a trained model has to beat."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics import Metric


class Task(ABC):
    """A kind of problem on concrete data.

    A task owns two map-style data sets whose item `i` is a pure function of the task's options, its seed and `i`, so that
    a run can be stopped anywhere and continued with the very batches that it would have seen.
    """

    name: ClassVar[str]
    """Registered name, as in `regard train --task NAME`."""
    metric: ClassVar[str]
    """The headline among `metrics()`."""
    higher_is_better: ClassVar[bool] = True

    train_set: Dataset[Any]
    eval_set: Dataset[Any]
    collate: Callable[[list[Any]], Any] | None = None
    """How items become a batch; None is torch's default."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The scalar to minimise on one training batch."""

    @abstractmethod
    def metrics(self) -> dict[str, Metric]:
        """Fresh metrics by name; `self.metric` is among them."""

    @abstractmethod
    def update(self, metrics: Mapping[str, Metric], model: nn.Module, batch: Any) -> None:
        """Add one evaluation batch to `metrics`."""

    @abstractmethod
    def trivial(self) -> dict[str, float]:
        """The same metrics for the trivial answer named in `trivial_answer` (majority class, last frame, bicubic ...)."""

    @property
    @abstractmethod
    def trivial_answer(self) -> str:
        """What the trivial answer is, in a few words."""

    @property
    @abstractmethod
    def description(self) -> str:
        """The data and the question in one sentence, for reports."""

    def better(self, a: float, b: float) -> bool:
        """Whether headline value `a` beats `b`."""
        return a > b if self.higher_is_better else a < b


TRAIN, EVAL, SPLIT = 0, 1, 2
"""Streams of random numbers: training items, evaluation items, and the division of a user's data into the two."""


class Generated(Dataset[Any]):
    """`length` items, made when asked for: item `i` is `make(rng, i)`, with `rng` seeded by `(seed, stream, i)`.

    Items are the same in every order, process and run, and leave the global random generators alone.
    """

    def __init__(self, make: Callable[[np.random.Generator, int], Any], length: int, seed: int, stream: int) -> None:
        self.make, self.length, self.seed, self.stream = make, length, seed, stream

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < self.length:
            raise IndexError(f"item {index} of a data set of {self.length} items.")
        return self.make(np.random.default_rng((self.seed, self.stream, index)), index)


def whole(argument: str, value: int, minimum: int = 1) -> int:
    """Return `value` if it is an integer of at least `minimum`; otherwise raise a ValueError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{argument} must be an integer of at least {minimum}, got {value!r}.")
    return value


def whole_range(argument: str, value: int | tuple[int, int], minimum: int = 1) -> tuple[int, int]:
    """One integer, or a pair (lowest, highest), both included, as a pair of integers of at least `minimum`."""
    low, high = value if isinstance(value, (tuple, list)) and len(value) == 2 else (value, value)
    whole(f"the lowest of {argument}", low, minimum)
    if whole(f"the highest of {argument}", high, minimum) < low:
        raise ValueError(f"{argument} must be (lowest, highest), got {value!r}: swap the two.")
    return low, high


def fraction(argument: str, value: float) -> float:
    """Return `value` if it is a number of at least 0 and below 1; otherwise raise a ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"{argument} must be at least 0 and below 1, got {value!r}.")
    return float(value)
