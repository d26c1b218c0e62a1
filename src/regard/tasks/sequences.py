"""Drawn sequences with an answer for every token: small questions that isolate what a token mixer can know.

A batch is a dictionary of `inputs` (B, N) int64, or (B, N, features) float, and `targets` (B, N) int64. A model maps the
inputs to logits (B, N, C) with C at least `num_classes`; tokens and answers share one vocabulary of `vocab_size`. Places
whose target is `UNASKED` count neither for the loss nor for the accuracy.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from regard.tasks.base import EVAL, TRAIN, Generated, Task, whole

UNASKED = -100
"""The target where nothing is asked: what PyTorch's cross entropy leaves out."""


class SequenceTask(Task):
    """A question about a drawn sequence, answered at every token (or at those that are asked).

    Args:
        length: tokens of a sequence. train_items, eval_items: sizes of the two sets.
        seed: of everything that is drawn.
    """

    metric = "accuracy"
    num_classes: int

    def __init__(self, length: int, train_items: int, eval_items: int, seed: int) -> None:
        self.length = whole("length", length)
        self.train_set = Generated(self._item, whole("train_items", train_items), seed, TRAIN)
        self.eval_set = Generated(self._item, whole("eval_items", eval_items), seed, EVAL)

    @abstractmethod
    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """One sequence: `(N,)` whole numbers, or `(N, features)` float32."""

    @abstractmethod
    def answers(self, sequence: np.ndarray) -> np.ndarray:
        """The right answers `(N,)` for such a sequence."""

    def _item(self, rng: np.random.Generator, index: int) -> dict[str, Tensor]:
        sequence = self.draw(rng)
        return {"inputs": torch.from_numpy(sequence), "targets": torch.from_numpy(self.answers(sequence))}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch["inputs"]).flatten(0, 1).float(), batch["targets"].flatten())

    def metrics(self) -> dict[str, Metric]:
        return {"accuracy": MeanMetric()}

    def update(self, metrics: Mapping[str, Metric], model: nn.Module, batch: dict[str, Tensor]) -> None:
        asked = batch["targets"] != UNASKED
        right = model(batch["inputs"]).argmax(-1) == batch["targets"]
        metrics["accuracy"].update(right.float(), weight=asked.float())

    def trivial(self) -> dict[str, float]:
        counts: Any = 0
        for index in range(len(self.eval_set)):  # type: ignore[arg-type]
            targets = self.eval_set[index]["targets"]
            counts = counts + torch.bincount(targets[targets != UNASKED], minlength=self.num_classes)
        return {"accuracy": float(counts.max() / counts.sum())}

    @property
    def trivial_answer(self) -> str:
        return "the most frequent answer everywhere"


class PositionTask(SequenceTask):
    """At which position is each token? (Position identification, Luo et al., 2022, arXiv 2205.13401.)

    Nothing but the ends of the sequence tells: tokens are drawn uniformly from `tokens` different ones.
    """

    name = "position"

    def __init__(
        self, length: int = 32, tokens: int = 10, train_items: int = 100_000, eval_items: int = 256, seed: int = 0
    ) -> None:
        super().__init__(length, train_items, eval_items, seed)
        self.tokens, self.num_classes = whole("tokens", tokens), length
        self.vocab_size = max(tokens, length)

    @property
    def description(self) -> str:
        return f"{self.length} tokens, each one of {self.tokens}: at which position is each of them?"

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        return rng.integers(0, self.tokens, self.length)

    def answers(self, sequence: np.ndarray) -> np.ndarray:
        return np.arange(len(sequence))


class EvenTokensTask(PositionTask):
    """Say every second token, then fill up (Even token prediction, ibid.): place t holds token 2t + 1 of the sequence, or END.

    END is one more symbol of the vocabulary, and half of all answers.
    """

    name = "even_tokens"

    def __init__(
        self, length: int = 32, tokens: int = 10, train_items: int = 100_000, eval_items: int = 256, seed: int = 0
    ) -> None:
        super().__init__(length, tokens, train_items, eval_items, seed)
        self.vocab_size = self.num_classes = tokens + 1

    @property
    def description(self) -> str:
        return f"{self.length} tokens, each one of {self.tokens}: say the 2nd, 4th, ... of them, then END."

    def answers(self, sequence: np.ndarray) -> np.ndarray:
        said = sequence[1::2]
        return np.concatenate([said, np.full(len(sequence) - len(said), self.tokens)])


class Match3Task(SequenceTask):
    """Which tokens complete a triple: are there j and k with x_i + x_j + x_k = 0? (After Sanford, Hsu and Telgarsky, 2023.)

    The sum is that of bits modulo 2 (their problem's is modulo one large number), so that a token is a vector of signs and
    a triple a product of three signs that is 1 in every bit. No token is zero, so only three different tokens sum to zero.

    Args:
        length: tokens; the more, the more of them have a partner pair. bits: of a token.
    """

    name = "match3"
    num_classes = 2

    def __init__(
        self, length: int = 12, bits: int = 6, train_items: int = 100_000, eval_items: int = 512, seed: int = 0
    ) -> None:
        super().__init__(length, train_items, eval_items, seed)
        self.bits = self.num_features = whole("bits", bits)

    @property
    def description(self) -> str:
        return f"{self.length} tokens of {self.bits} bits: for which of them do two others sum to it, modulo 2 in every bit?"

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        numbers = rng.integers(1, 2**self.bits, self.length)
        return (1 - 2 * (numbers[:, None] >> np.arange(self.bits) & 1)).astype(np.float32)

    def answers(self, sequence: np.ndarray) -> np.ndarray:
        numbers = (sequence < 0) @ (1 << np.arange(self.bits))
        sums = numbers[:, None] ^ numbers
        return np.isin(numbers, sums[~np.eye(len(numbers), dtype=bool)]).astype(np.int64)


class CopyTask(SequenceTask):
    """Which token stood `lag` places earlier? The first `lag` places are not asked.

    A causal model answers only if it can reach so far back.
    """

    name = "copy"

    def __init__(
        self,
        length: int = 24,
        tokens: int = 8,
        lag: int = 4,
        train_items: int = 100_000,
        eval_items: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__(length, train_items, eval_items, seed)
        self.tokens = self.vocab_size = self.num_classes = whole("tokens", tokens)
        self.lag = whole("lag", lag, 0)
        if lag >= length:
            raise ValueError(f"lag must be below length={length}, got {lag}: no place would be asked.")

    @property
    def description(self) -> str:
        return f"{self.length} tokens, each one of {self.tokens}: which stood {self.lag} places earlier?"

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        return rng.integers(0, self.tokens, self.length)

    def answers(self, sequence: np.ndarray) -> np.ndarray:
        return np.concatenate([np.full(self.lag, UNASKED), sequence[: len(sequence) - self.lag]])


class RecallTask(SequenceTask):
    """Key, value, key, value, ..., then every key again in another order: which value came with it? Asked at those only.

    (Multi-query associative recall; Arora et al., 2023, arXiv 2312.04927, in its plainest form.) Keys are different
    tokens, drawn from `keys`; values are drawn from as many others as `values` says. Answers count from 0.
    """

    name = "recall"

    def __init__(
        self,
        pairs: int = 6,
        keys: int = 16,
        values: int = 16,
        train_items: int = 100_000,
        eval_items: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__(3 * whole("pairs", pairs), train_items, eval_items, seed)
        self.pairs, self.keys, self.num_classes = pairs, whole("keys", keys), whole("values", values)
        if pairs > keys:
            raise ValueError(f"pairs must be at most keys={keys}, got {pairs}: the keys of a sequence are different.")
        self.vocab_size = keys + values

    @property
    def description(self) -> str:
        return f"{self.pairs} of {self.keys} keys, each followed by one of {self.num_classes} values; which came with each key?"

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        keys = rng.permutation(self.keys)[: self.pairs]
        values = self.keys + rng.integers(0, self.num_classes, self.pairs)
        return np.concatenate([np.stack([keys, values], 1).ravel(), rng.permutation(keys)])

    def answers(self, sequence: np.ndarray) -> np.ndarray:
        asked = 2 * self.pairs
        value_of = dict(zip(sequence[:asked:2], sequence[1:asked:2] - self.keys, strict=True))
        return np.array([UNASKED] * asked + [value_of[key] for key in sequence[asked:]])
