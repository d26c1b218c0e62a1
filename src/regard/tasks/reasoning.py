"""Questions whose answers are worked out in words and can be verified: what reasoning models are trained on, made small.

A question and its worked solution are text. A batch is a dictionary of `inputs` and `targets`, both (B, N) int64, in which
nothing is asked before the solution begins, and `prompt`, the number (B,) of tokens of the question. Besides supervised
training, everything that reinforcement learning needs is here: `prompt(index)`, `reward(prompt, answer)` and `end`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from regard.checks import one_of
from regard.skeletons.sampling import sample_answers
from regard.tasks.base import EVAL, TRAIN, Generated, Task, whole
from regard.tasks.sequences import UNASKED
from regard.tasks.tokenizers import BytePairs

END = "<end>"


class Words:
    """One token for each word, in the order given; words are what stands between blanks."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = list(dict.fromkeys([END, *words]))
        self.index = {word: token for token, word in enumerate(self.words)}
        self.vocab_size = len(self.words)

    def encode(self, text: str) -> list[int]:
        """Text -> tokens."""
        try:
            return [self.index[word] for word in text.split()]
        except KeyError as error:
            raise ValueError(f"the word {error} is not in the vocabulary: {', '.join(self.words)}.") from error

    def decode(self, tokens: Iterable[int]) -> str:
        """Tokens -> text; the end token is left out."""
        return " ".join(self.words[token] for token in tokens if token != 0)


class ReasoningTask(Task):
    """A question, a solution in words, and a verifier of its last word.

    `solved` is the share of questions whose greedy answer the verifier accepts; `token_accuracy` asks for every token of
    one solution in turn, though others may be as good.

    Args:
        length: tokens that a question with its solution may have. tokenizer: "words" or "byte_pairs" (trained on texts of
            this task, with the package `tokenizers`).
        train_items, eval_items: sizes of the two sets. seed: of everything that is drawn.
    """

    metric = "solved"
    end = 0
    """The token that closes an answer, and fills up what is shorter."""
    words: tuple[str, ...]
    """All words of questions and solutions."""

    def __init__(self, length: int, tokenizer: str, train_items: int, eval_items: int, seed: int) -> None:
        self.length = whole("length", length)
        self.train_set = Generated(self._item, whole("train_items", train_items), seed, TRAIN)
        self.eval_set = Generated(self._item, whole("eval_items", eval_items), seed, EVAL)
        if one_of("tokenizer", tokenizer, ("words", "byte_pairs")) == "words":
            self.tokenizer: Words | BytePairs = Words(self.words)
        else:
            rng = np.random.default_rng((seed, TRAIN))
            texts = [" ".join(self.draw(rng)) for _ in range(500)]
            self.tokenizer = BytePairs([" ".join(self.words), *texts], 400, special=[END])
        self.vocab_size = self.tokenizer.vocab_size

    @abstractmethod
    def draw(self, rng: np.random.Generator) -> tuple[str, str]:
        """A question and one worked solution of it."""

    @abstractmethod
    def verify(self, question: str, answer: str) -> bool:
        """Whether an answer, any text, ends in what the question asks for."""

    @abstractmethod
    def conclusion(self, answer: str) -> str:
        """The part of an answer that the verifier looks at, as an answer of its own."""

    def _item(self, rng: np.random.Generator, index: int) -> dict[str, Tensor]:
        question, solution = self.draw(rng)
        # The blank belongs to the solution, as byte pairs see it; words do not mind.
        prompt = self.tokenizer.encode(question)
        tokens = [*prompt, *self.tokenizer.encode(" " + solution), self.end]
        if len(tokens) > self.length + 1:
            raise ValueError(
                f"a question with its solution has {len(tokens)} tokens: length must be at least {len(tokens) - 1}, "
                f"got {self.length}."
            )
        targets = [*([UNASKED] * (len(prompt) - 1)), *tokens[len(prompt) :]]
        return {
            "inputs": torch.tensor(tokens[:-1] + [self.end] * (self.length + 1 - len(tokens))),
            "targets": torch.tensor(targets + [UNASKED] * (self.length + 1 - len(tokens))),
            "prompt": torch.tensor(len(prompt)),
        }

    def prompt(self, index: int) -> Tensor:
        """The tokens `(N,)` of training question `index`; any whole number, beyond the set it begins again."""
        item = self.train_set[index % len(self.train_set)]  # type: ignore[arg-type]
        return item["inputs"][: int(item["prompt"])]

    def reward(self, prompt: Tensor, answer: Tensor) -> float:
        """1 if the verifier accepts the tokens of an answer that was brought to its end, else 0."""
        if self.end not in answer.tolist():
            return 0.0
        return float(self.verify(self.tokenizer.decode(prompt.tolist()), self.tokenizer.decode(answer.tolist())))

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch["inputs"]).flatten(0, 1).float(), batch["targets"].flatten())

    def metrics(self) -> dict[str, Metric]:
        return {"solved": MeanMetric(), "token_accuracy": MeanMetric()}

    def update(self, metrics: Mapping[str, Metric], model: nn.Module, batch: dict[str, Tensor]) -> None:
        asked = batch["targets"] != UNASKED
        right = model(batch["inputs"]).argmax(-1) == batch["targets"]
        metrics["token_accuracy"].update(right.float(), weight=asked.float())
        prompts = [row[:n] for row, n in zip(batch["inputs"], batch["prompt"].tolist(), strict=True)]
        room = self.length + 1 - min(len(prompt) for prompt in prompts)
        tokens, said = sample_answers(model, prompts, room, end=self.end, temperature=0)
        for prompt, row, part in zip(prompts, tokens, said, strict=True):
            metrics["solved"].update(self.reward(prompt, row[part]))

    def trivial(self) -> dict[str, float]:
        texts = []
        for index in range(len(self.eval_set)):  # type: ignore[arg-type]
            item = self.eval_set[index]
            tokens, prompt = [*item["inputs"].tolist(), self.end], int(item["prompt"])
            texts.append((self.tokenizer.decode(tokens[:prompt]), self.tokenizer.decode(tokens[prompt:])))
        usual = Counter(self.conclusion(solution) for _, solution in texts).most_common(1)[0][0]
        return {"solved": float(np.mean([self.verify(question, usual) for question, _ in texts]))}

    @property
    def trivial_answer(self) -> str:
        return "the most frequent last words, whatever the question"


class ModularArithmetic(ReasoningTask):
    """Digits joined by plus, minus and times, from left to right, each result modulo `modulus`.

    The solution says one step after the other, in one of two sentences that begin with one of several words, so that how
    to go on is open at the beginning of a step and settled within it: `7 + 5 - 9 ?` becomes
    `first 7 plus 5 is 2 . then take 9 from 2 to get 3 . so 3`.

    Args:
        terms: digits in a question. modulus: 2 to 10.
    """

    name = "modular_arithmetic"
    words = (
        *map(str, range(10)),
        *("+", "-", "*", "?", ".", "first", "then", "next", "now", "so"),
        *("plus", "minus", "times", "is", "add", "take", "multiply", "to", "from", "by", "get"),
    )
    _openings = (("first", "now"), ("then", "next", "now"))

    def __init__(
        self,
        terms: int = 4,
        modulus: int = 10,
        tokenizer: str = "words",
        train_items: int = 100_000,
        eval_items: int = 256,
        seed: int = 0,
    ) -> None:
        self.terms, self.modulus = whole("terms", terms, 2), whole("modulus", modulus, 2)
        if modulus > 10:
            raise ValueError(f"modulus must be at most 10, so that every number is one digit, got {modulus}.")
        length = 2 * terms + 9 * (terms - 1) + 2  # the question, its steps, "so", the result; the end is a target only
        if tokenizer == "byte_pairs":
            length += 4 * (terms - 1) + 1  # the blank before a digit is a token of its own
        super().__init__(length, tokenizer, train_items, eval_items, seed)

    @property
    def description(self) -> str:
        return (
            f"{self.terms} digits joined by plus, minus and times, worked out from left to right modulo {self.modulus} in "
            "sentences that end in the result, which is verified."
        )

    def draw(self, rng: np.random.Generator) -> tuple[str, str]:
        digits, signs = rng.integers(0, self.modulus, self.terms), rng.choice(list("+-*"), self.terms - 1)
        question = " ".join([str(digits[0]), *(f"{s} {d}" for s, d in zip(signs, digits[1:], strict=True)), "?"])
        value, steps = int(digits[0]), []
        for index, (sign, digit) in enumerate(zip(signs, digits[1:].tolist(), strict=True)):
            opening, plain = rng.choice(self._openings[min(index, 1)]), rng.integers(0, 2) == 1
            result = _joined(value, sign, digit) % self.modulus
            steps.append(f"{opening} {self._step(value, sign, digit, result, plain)} .")
            value = result
        return question, " ".join([*steps, "so", str(value)])

    @staticmethod
    def _step(value: int, sign: str, digit: int, result: int, plain: bool) -> str:
        if plain:
            return f"{value} {dict(zip('+-*', ('plus', 'minus', 'times'), strict=True))[sign]} {digit} is {result}"
        asked = {"+": f"add {digit} to {value}", "-": f"take {digit} from {value}", "*": f"multiply {value} by {digit}"}
        return f"{asked[sign]} to get {result}"

    def verify(self, question: str, answer: str) -> bool:
        parts = question.split()
        value = int(parts[0])
        for sign, digit in zip(parts[1:-1:2], parts[2::2], strict=True):
            value = _joined(value, sign, int(digit)) % self.modulus
        return answer.split()[-2:] == ["so", str(value)]

    def conclusion(self, answer: str) -> str:
        return " ".join(answer.split()[-2:])


class Countdown(ReasoningTask):
    """Reach a number from several others, each used once, by plus, minus and times: `use 3 8 7 to make 13 ?`.

    The solution names the steps, `3 * 7 = 21 . 21 - 8 = 13`; the verifier follows them, and accepts every way to the
    target. There is one for each question, through numbers from 0 to `largest` only.

    Args:
        numbers: how many are given, each from 1 to 9. largest: of the target and of all that lies between.
    """

    name = "countdown"

    def __init__(
        self,
        numbers: int = 3,
        largest: int = 99,
        tokenizer: str = "words",
        train_items: int = 100_000,
        eval_items: int = 256,
        seed: int = 0,
    ) -> None:
        self.numbers, self.largest = whole("numbers", numbers, 2), whole("largest", largest, 9)
        self.words = (*map(str, range(largest + 1)), *("use", "to", "make", "?", "+", "-", "*", "=", "."))
        length = (numbers + 5) + 6 * (numbers - 1) - 1  # the question and its steps; the end is a target only
        if tokenizer == "byte_pairs":
            said = numbers + 1 + 3 * (numbers - 1)
            length += said * len(str(largest))  # every number is a blank and its digits
        super().__init__(length, tokenizer, train_items, eval_items, seed)

    @property
    def description(self) -> str:
        return (
            f"Reach a number of at most {self.largest} from {self.numbers} others by plus, minus and times, each used once; "
            "every step is verified."
        )

    @property
    def trivial_answer(self) -> str:
        return "the most frequent solution, whatever the question"

    def draw(self, rng: np.random.Generator) -> tuple[str, str]:
        value = int(rng.integers(1, 10))
        given, steps = [value], []
        while len(given) < self.numbers:
            number = int(rng.integers(1, 10))
            ways = {sign: result for sign in "+-*" if 0 <= (result := _joined(value, sign, number)) <= self.largest}
            if ways:  # there always is a number with one
                sign = str(rng.choice(list(ways)))
                steps.append(f"{value} {sign} {number} = {ways[sign]}")
                given.append(number)
                value = ways[sign]
        shown = " ".join(map(str, rng.permutation(given)))
        return f"use {shown} to make {value} ?", " . ".join(steps)

    def verify(self, question: str, answer: str) -> bool:
        parts = question.split()
        left, target = Counter(parts[1:-4]), parts[-2]
        for step in answer.split(" . "):
            said = step.split()
            if len(said) != 5 or said[1] not in tuple("+-*") or said[3] != "=" or not (said[0] + said[2]).isdecimal():
                return False
            left.subtract((said[0], said[2]))
            if min(left.values()) < 0 or str(_joined(int(said[0]), said[1], int(said[2]))) != said[4]:
                return False
            left[said[4]] += 1
        return +left == Counter([target])

    def conclusion(self, answer: str) -> str:
        return answer


def _joined(value: int, sign: str, number: int) -> int:
    return {"+": value + number, "-": value - number, "*": value * number}[sign]
