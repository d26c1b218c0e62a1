"""Language modelling on plain text: by bytes, by characters or by byte pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics import MeanMetric, Metric

from regard.checks import one_of
from regard.tasks.base import Task, whole
from regard.tasks.measures import measure
from regard.tasks.sources import corpus_name, python_documentation
from regard.tasks.tokenizers import BytePairs

EVAL_SHARE = 0.1


class Windows(Dataset[dict[str, Tensor]]):
    """Stretches of `length + 1` tokens that begin every `stride` tokens: `dict(tokens=(length + 1,) int64)`."""

    def __init__(self, tokens: Tensor, length: int, stride: int) -> None:
        self.tokens, self.length, self.stride = tokens, length, stride

    def __len__(self) -> int:
        return (len(self.tokens) - self.length - 1) // self.stride + 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}.")
        start = index * self.stride
        return {"tokens": self.tokens[start : start + self.length + 1].long()}


class Text(Task):
    """Which byte (or character, or byte pair) comes next?

    Training windows begin anywhere in the first nine tenths of the text. The rest is for evaluation, in windows that
    follow one another, so that each of its tokens is predicted once, from at most `length` before it.

    `bits_per_byte` is the information, `-log2 p`, that the model needs for the text, over the bytes of the text in
    UTF-8: it can be compared between vocabularies, as perplexity (for a token) and accuracy cannot.

    Args:
        unit: "byte" (256 tokens), "character" (one token for each that occurs in the text) or "byte_pair" (`vocab_size` tokens
            of a tokenizer that is trained on the training text; needs the package tokenizers).
        length: tokens of context.
        data: a text file of your own; by default the documentation that Python carries in `pydoc_data`, which differs a
            little between versions of Python.
        seed: taken as by every task; the windows are fixed, so nothing depends on it.
    """

    name = "text"
    metric = "bits_per_byte"
    higher_is_better = False

    def __init__(
        self,
        length: int = 256,
        unit: str = "byte",
        data: str | Path | None = None,
        seed: int = 0,
        vocab_size: int = 1024,
    ) -> None:
        self.length, self.unit = whole("length", length), one_of("unit", unit, ("byte", "character", "byte_pair"))
        self.corpus = corpus_name() if data is None else Path(data).name
        text = python_documentation() if data is None else _own_text(data)
        if unit == "byte":
            tokens, self.vocab_size = torch.frombuffer(bytearray(text), dtype=torch.uint8), 256
            self.bytes_of = torch.ones(256)
        elif unit == "byte_pair":
            characters = _decoded(text, data)
            held_back = int(len(characters) * (1 - EVAL_SHARE))  # about where the evaluation text begins
            pairs = self.tokenizer = BytePairs([characters[:held_back]], whole("vocab_size", vocab_size))
            tokens, self.vocab_size = torch.tensor(pairs.encode(characters), dtype=torch.int32), pairs.vocab_size
            self.bytes_of = torch.tensor(pairs.byte_lengths(), dtype=torch.float32)
        else:
            characters = _decoded(text, data)
            alphabet = sorted(set(characters))
            index = {character: i for i, character in enumerate(alphabet)}
            tokens, self.vocab_size = torch.tensor([index[c] for c in characters], dtype=torch.int32), len(alphabet)
            self.bytes_of = torch.tensor([float(len(c.encode())) for c in alphabet])
        held_out = int(EVAL_SHARE * len(tokens))
        if held_out < length + 1:
            raise ValueError(
                f"the text has {len(tokens):,} tokens; length={length} needs about {(length + 1) / EVAL_SHARE:,.0f} "
                "(a tenth is held out for evaluation and must hold one window). Use a longer text or a smaller length."
            )
        self.train_tokens = tokens[:-held_out]
        self.train_set = Windows(self.train_tokens, length, stride=1)
        self.eval_set = Windows(tokens[-held_out:], length, stride=length)

    @property
    def description(self) -> str:
        size = f"{len(self.train_tokens):,} to train"
        return f"The next {self._unit_name} in {self.corpus} ({size}), from the last {self.length}."

    @property
    def trivial_answer(self) -> str:
        return f"each {self._unit_name} as probable as it is frequent"

    @property
    def _unit_name(self) -> str:
        return self.unit.replace("_", " ")

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = model(batch["tokens"][:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch["tokens"][:, 1:].flatten())

    def metrics(self) -> dict[str, Metric]:
        return {"bits_per_byte": MeanMetric(), "perplexity": Perplexity(), "accuracy": MeanMetric()}

    def update(self, metrics: Mapping[str, Metric], model: nn.Module, batch: dict[str, Tensor]) -> None:
        logits, truth = model(batch["tokens"][:, :-1]).float(), batch["tokens"][:, 1:]
        nats = F.cross_entropy(logits.flatten(0, 1), truth.flatten(), reduction="none").view_as(truth)
        bytes_of = self.bytes_of.to(truth.device)[truth]
        metrics["bits_per_byte"].update(nats / math.log(2) / bytes_of, weight=bytes_of)
        metrics["perplexity"].update(nats)
        metrics["accuracy"].update((logits.argmax(-1) == truth).float())

    def trivial(self) -> dict[str, float]:
        return measure(self, Unigram(self.train_tokens, self.vocab_size))


class Perplexity(MeanMetric):
    """`exp` of the mean of the nats that tokens cost."""

    def compute(self) -> Tensor:
        return super().compute().exp()


class Unigram(nn.Module):
    """Each token as probable as it is frequent in the training text; counts are one higher, for those never seen."""

    def __init__(self, tokens: Tensor, vocab_size: int) -> None:
        super().__init__()
        counts = tokens.int().bincount(minlength=vocab_size).double() + 1
        self.register_buffer("logits", (counts / counts.sum()).log().float())

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits.expand(*tokens.shape, -1)


def _own_text(data: str | Path) -> bytes:
    path = Path(data).expanduser()
    if not path.is_file():
        raise ValueError(f"data={str(data)!r} is {'a folder, not a text file' if path.is_dir() else 'not there'}.")
    return path.read_bytes()


def _decoded(text: bytes, data: str | Path | None) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{data} is not UTF-8 text ({error.reason} at byte {error.start}): use unit='byte'."
        ) from error
