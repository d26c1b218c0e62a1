"""Masked language modelling: which bytes (or characters) stood where the text has holes?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from regard.tasks.base import EVAL, TRAIN, Generated, fraction
from regard.tasks.language import Text, Unigram, Windows
from regard.tasks.measures import measure
from regard.tasks.sequences import UNASKED


class MaskedText(Text):
    """Some tokens of each window are hidden behind one further symbol: say them, from both sides. (Devlin et al., 2019.)

    Windows are those of the task `text`. Each token is hidden with probability `mask_rate`, at least one in a window; all
    hidden tokens become the symbol `num_classes` (none is replaced by another token or left as it is).

    An item is `inputs` and `targets`, both (length,) int64; targets are UNASKED where nothing is hidden. A model maps
    inputs (B, N) to logits (B, N, num_classes). The measures are those of `text`, of hidden tokens only.

    Args:
        mask_rate: share of hidden tokens. length, unit, data: as for `text`. seed: of what is hidden.
    """

    name = "masked_text"

    def __init__(
        self,
        length: int = 256,
        unit: str = "byte",
        mask_rate: float = 0.15,
        data: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(length=length, unit=unit, data=data, seed=seed)
        self.mask_rate, self.num_classes = fraction("mask_rate", mask_rate), self.vocab_size
        self.vocab_size += 1
        train, held_out = self.train_set, self.eval_set
        self.train_set = Generated(partial(self._item, train), len(train), seed, TRAIN)  # type: ignore[arg-type,assignment]
        self.eval_set = Generated(partial(self._item, held_out), len(held_out), seed, EVAL)  # type: ignore[arg-type,assignment]

    def _item(self, windows: Windows, rng: np.random.Generator, index: int) -> dict[str, Tensor]:
        tokens = windows[index]["tokens"][:-1]
        hidden = torch.from_numpy(rng.random(self.length) < self.mask_rate)
        hidden[rng.integers(self.length)] |= not bool(hidden.any())
        return {
            "inputs": tokens.masked_fill(hidden, self.num_classes),
            "targets": tokens.masked_fill(~hidden, UNASKED),
        }

    @property
    def description(self) -> str:
        return (
            f"{self.mask_rate:.0%} of the {self.unit}s in {self.length} of {self.corpus} "
            f"({len(self.train_tokens):,} to train) are hidden: which?"
        )

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = model(batch["inputs"])
        return F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), ignore_index=UNASKED)

    def update(self, metrics: Mapping[str, Metric], model: nn.Module, batch: dict[str, Tensor]) -> None:
        asked = batch["targets"] != UNASKED
        logits, truth = model(batch["inputs"])[asked].float(), batch["targets"][asked]
        nats = F.cross_entropy(logits, truth, reduction="none")
        bytes_of = self.bytes_of.to(truth.device)[truth]
        metrics["bits_per_byte"].update(nats / math.log(2) / bytes_of, weight=bytes_of)
        metrics["perplexity"].update(nats)
        metrics["accuracy"].update((logits.argmax(-1) == truth).float())

    def trivial(self) -> dict[str, float]:
        return measure(self, Unigram(self.train_tokens, self.num_classes))
