"""Questions with a worked solution: texts, tokens, verifier, metrics."""

import sys

import numpy as np
import pytest
import torch

from regard.tasks import create_task
from regard.tasks.sequences import UNASKED


def parts(task, item):
    tokens, prompt = [*item["inputs"].tolist(), task.end], int(item["prompt"])
    return torch.tensor(tokens[:prompt]), torch.tensor(tokens[prompt:])


@pytest.mark.parametrize("tokenizer", ["words", "byte_pairs"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("modular_arithmetic", {"terms": 2, "modulus": 2}),
        ("modular_arithmetic", {"terms": 4}),
        ("modular_arithmetic", {"terms": 7, "modulus": 9}),
        ("countdown", {}),
        ("countdown", {"numbers": 2, "largest": 9}),
        ("countdown", {"numbers": 6, "largest": 120}),
    ],
)
def test_own_solutions_are_verified_and_others_not(name, options, tokenizer):
    if tokenizer == "byte_pairs":
        pytest.importorskip("tokenizers")
    task = create_task(name, tokenizer=tokenizer, train_items=50, **options)
    for index in range(50):
        item = task.train_set[index]
        prompt, answer = parts(task, item)
        assert torch.equal(prompt, task.prompt(index + 50))
        assert task.reward(prompt, answer) == 1
        assert task.reward(prompt, answer[answer != task.end]) == 0, "an answer that never ends is worth something"
        question = task.tokenizer.decode(prompt.tolist())
        solution = task.tokenizer.decode(answer.tolist())
        kept, value = solution.rsplit(" ", 1)
        assert not task.verify(question, f"{kept} {int(value) + 1}")
        assert not task.verify(question, "")
        # what is asked is the solution and its end, each at the token before it
        asked = item["targets"] != UNASKED
        assert torch.equal(item["targets"][asked], answer[: int(asked.sum())])
        assert item["targets"][asked][-1] == task.end
        assert item["inputs"].shape == item["targets"].shape == (task.length,)


def test_countdown_accepts_every_way_and_no_short_cut():
    verify = create_task("countdown").verify
    question = "use 3 8 7 to make 13 ?"
    assert verify(question, "3 * 7 = 21 . 21 - 8 = 13")
    assert verify(question, "7 * 3 = 21 . 21 - 8 = 13")
    for answer in (
        "3 * 7 = 22 . 21 - 8 = 13",  # a wrong step
        "3 * 7 = 21 . 21 - 8 = 13 . 13 - 0 = 13",  # a number that was not given
        "8 + 7 = 15 . 15 - 2 = 13",
        "3 + 8 = 11",  # not all used
        "13",
        "3 * 7 = 21 . 21 - 8",
        "3 / 7 = 21 . 21 - 8 = 13",
        "3 +- 7 = 21 . 21 - 8 = 13",
        "3 * 7 = x . x - 8 = 13",
    ):
        assert not verify(question, answer), answer
    assert verify("use 4 4 to make 0 ?", "4 - 4 = 0")
    assert not verify("use 4 5 to make 8 ?", "4 + 4 = 8"), "a number was used twice"


def test_the_solution_is_right_at_every_step():
    task = create_task("modular_arithmetic", terms=5)
    rng = np.random.default_rng(0)
    for _ in range(200):
        question, solution = task.draw(rng)
        value = int(question.split()[0])
        for sign, digit, step in zip(
            question.split()[1::2], question.split()[2::2], solution.split(" . "), strict=False
        ):
            numbers = [int(word) for word in step.split() if word.isdigit()]
            result = eval(f"({value} {sign} {digit}) % 10")
            assert numbers[-1] == result
            assert sorted(numbers[:-1]) == sorted((value, int(digit)))
            value = result
        assert solution.endswith(f"so {value}")


def test_solved_and_token_accuracy_of_a_model_that_knows():
    task = create_task("modular_arithmetic", terms=2, eval_items=4)
    known = {}
    for index in range(4):
        item = task.eval_set[index]
        known[tuple(parts(task, item)[0].tolist())] = [*item["inputs"].tolist(), task.end]

    class Knows(torch.nn.Module):
        def forward(self, tokens):
            logits = torch.zeros(*tokens.shape, task.vocab_size)
            for row, line in enumerate(tokens.tolist()):
                text = next(text for prompt, text in known.items() if tuple(line[: len(prompt)]) == prompt)
                for place in range(len(line)):
                    logits[row, place, text[min(place + 1, len(text) - 1)]] = 1
            return logits

    metrics = task.metrics()
    batch = {name: torch.stack([task.eval_set[i][name] for i in range(4)]) for name in ("inputs", "targets", "prompt")}
    task.update(metrics, Knows(), batch)
    assert {name: float(metric.compute()) for name, metric in metrics.items()} == {"solved": 1, "token_accuracy": 1}
    assert torch.isfinite(task.loss(Knows(), batch))


def test_trivial_is_near_chance_and_items_depend_on_the_seed():
    task, other = (create_task("modular_arithmetic", eval_items=64, seed=seed) for seed in (0, 1))
    assert 0.1 <= task.trivial()["solved"] < 0.4
    assert not torch.equal(task.train_set[3]["inputs"], other.train_set[3]["inputs"])
    assert torch.equal(task.train_set[3]["inputs"], create_task("modular_arithmetic").train_set[3]["inputs"])


def test_wrong_input_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="modulus"):
        create_task("modular_arithmetic", modulus=11)
    with pytest.raises(ValueError, match="terms"):
        create_task("modular_arithmetic", terms=1)
    with pytest.raises(ValueError, match="tokenizer"):
        create_task("modular_arithmetic", tokenizer="bytes")
    with pytest.raises(ValueError, match="vocabulary"):
        create_task("modular_arithmetic").tokenizer.encode("9 + eleven")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"regard\[language\]"):
        create_task("modular_arithmetic", tokenizer="byte_pairs")
