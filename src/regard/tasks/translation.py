"""Translation between two drawn languages: other words, in another order."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from regard.skeletons.encoder_decoder import END
from regard.tasks.base import EVAL, TRAIN, Generated, Task, whole


class TranslationTask(Task):
    """Say a sentence in a language that has its own word for each word, and says them in the opposite order.

    The dictionary is a permutation of the words, the same for all sentences. Sentences are words drawn uniformly, all of
    one length, so that nothing but the source tells what to say.

    An item is `inputs` (length,) int64, words from 0, and `targets` (length + 1,) int64: words from 1, then the end
    symbol 0. `model(inputs, None, targets)` returns logits (B, M, 1 + words), those of step t from `targets[:, :t]`;
    `model.search(inputs, None, max_length=M)` says a whole answer (see `EncoderDecoder`).

    Metrics: `accuracy` of each symbol after the right ones before it, and `exact`, the share of sentences that are right
    as a whole when the model goes on from its own symbols, always the most probable.

    Args:
        length: words of a sentence. words: of either language.
        train_items, eval_items: sizes of the two sets. seed: of the dictionary and the sentences.
    """

    name = "translation"
    metric = "accuracy"

    def __init__(
        self, length: int = 24, words: int = 32, train_items: int = 100_000, eval_items: int = 256, seed: int = 0
    ) -> None:
        self.length, self.words, self.num_classes = whole("length", length), whole("words", words), words + 1
        self.dictionary = np.random.default_rng(whole("seed", seed, 0)).permutation(words)
        self.train_set = Generated(self._item, whole("train_items", train_items), seed, TRAIN)
        self.eval_set = Generated(self._item, whole("eval_items", eval_items), seed, EVAL)

    def _item(self, rng: np.random.Generator, index: int) -> dict[str, Tensor]:
        source = rng.integers(0, self.words, self.length)
        target = np.append(1 + self.dictionary[source[::-1]], END)
        return {"inputs": torch.from_numpy(source), "targets": torch.from_numpy(target)}

    @property
    def description(self) -> str:
        return (
            f"Sentences of {self.length} words, each one of {self.words}: the other word for each, from last to first."
        )

    @property
    def trivial_answer(self) -> str:
        return "any word, and the end where it must be"

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = model(batch["inputs"], None, batch["targets"])
        return F.cross_entropy(logits.flatten(0, 1).float(), batch["targets"].flatten())

    def metrics(self) -> dict[str, Metric]:
        return {"accuracy": MeanMetric(), "exact": MeanMetric()}

    def update(self, metrics: Mapping[str, Metric], model: nn.Module, batch: dict[str, Tensor]) -> None:
        targets = batch["targets"]
        said = model(batch["inputs"], None, targets).argmax(-1)
        metrics["accuracy"].update((said == targets).float())
        answers, _ = model.search(batch["inputs"], None, max_length=targets.shape[1])
        short = targets.shape[1] - answers.shape[2]
        metrics["exact"].update((F.pad(answers[:, 0], (0, short), value=END) == targets).all(1).float())

    def trivial(self) -> dict[str, float]:
        # Of whole sentences it is words**-length, which is none.
        return {"accuracy": (self.length / self.words + 1) / (self.length + 1), "exact": 0.0}
