"""Masked text: what is hidden, what counts, and what the trivial answer is worth."""

import math
from collections import Counter

import pytest
import torch

from regard.skeletons.sequence import MixerEncoder
from regard.tasks import create_task
from regard.tasks.measures import measure
from regard.tasks.sequences import UNASKED

OWN = "Fünf Äpfel für zwölf €. " * 60


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text(OWN, encoding="utf-8")
    return path


@pytest.mark.parametrize("unit", ["byte", "character"])
def test_hidden_tokens_are_asked_and_the_others_shown(file, unit):
    task = create_task("masked_text", data=file, length=20, unit=unit)
    text = create_task("text", data=file, length=20, unit=unit)
    assert task.vocab_size == task.num_classes + 1 == text.vocab_size + 1
    hidden = 0
    for index in range(50):
        item, whole = task.train_set[index], text.train_set[index]["tokens"][:-1]
        asked = item["targets"] != UNASKED
        assert asked.any()
        assert torch.equal(asked, item["inputs"] == task.num_classes)
        assert torch.equal(torch.where(asked, item["targets"], item["inputs"]), whole)
        hidden += int(asked.sum())
    assert 0.11 < hidden / 1000 < 0.2
    assert torch.equal(task.train_set[7]["inputs"], task.train_set[7]["inputs"])
    other = create_task("masked_text", data=file, length=20, unit=unit, seed=1)
    assert any(not torch.equal(task.eval_set[i]["inputs"], other.eval_set[i]["inputs"]) for i in range(4))


def test_unigram_by_hand(file):
    task = create_task("masked_text", data=file, length=10)
    symbols = OWN.encode()
    cut = len(symbols) - int(0.1 * len(symbols))
    counts, total = Counter(symbols[:cut]), cut + 256
    asked = [t for i in range(len(task.eval_set)) for t in task.eval_set[i]["targets"].tolist() if t != UNASKED]
    bits = sum(-math.log2((counts[s] + 1) / total) for s in asked) / len(asked)
    assert task.trivial()["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert task.trivial()["perplexity"] == pytest.approx(2**bits, rel=1e-4)


def test_only_hidden_tokens_count(file):
    task = create_task("masked_text", data=file, length=10)
    items = {tuple(task.eval_set[i]["inputs"].tolist()): task.eval_set[i]["targets"] for i in range(len(task.eval_set))}

    def knows(inputs):
        right = torch.stack([items[tuple(row.tolist())].clamp(min=0) for row in inputs])
        return 50.0 * torch.nn.functional.one_hot(right, 256).float()

    assert measure(task, knows) == {"bits_per_byte": pytest.approx(0, abs=1e-6), "perplexity": 1, "accuracy": 1}
    model = MixerEncoder("softmax", task.vocab_size, task.num_classes, length=10, dim=16, depth=1)
    batch = {name: value[None] for name, value in task.train_set[0].items()}
    task.loss(model, batch).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("rate", [1.0, -0.1, True])
def test_mask_rate_is_refused_at_the_door(file, rate):
    with pytest.raises(ValueError, match="mask_rate must be at least 0 and below 1"):
        create_task("masked_text", data=file, length=10, mask_rate=rate)
