"""Tasks with an answer for every token: the answers themselves, and what the trivial one is worth."""

from itertools import combinations

import pytest
import torch
from torch.nn.functional import one_hot

from regard.tasks import create_task
from regard.tasks.sequences import UNASKED


def test_position_and_even_tokens():
    items = create_task("position", length=5).train_set
    assert items[3]["targets"].tolist() == [0, 1, 2, 3, 4]
    for length in (1, 6, 7):
        task = create_task("even_tokens", length=length, tokens=4)
        item = task.train_set[0]
        said = item["inputs"].tolist()[1::2]
        assert item["targets"].tolist() == said + [4] * (length - len(said))
        assert task.vocab_size == task.num_classes == 5
    assert create_task("even_tokens").trivial()["accuracy"] == pytest.approx(0.5)
    assert create_task("position").trivial()["accuracy"] == pytest.approx(1 / 32)


def test_match3_finds_exactly_the_triples():
    task = create_task("match3", length=9, bits=4)
    for index in range(5):
        item = task.eval_set[index]
        bits = (item["inputs"] < 0).long()
        assert bits.any(-1).all(), "a token is zero"
        found = torch.zeros(9, dtype=torch.long)
        for triple in combinations(range(9), 3):
            if not (bits[list(triple)].sum(0) % 2).any():
                found[list(triple)] = 1
        assert torch.equal(found, item["targets"])


def test_copy_asks_for_what_stood_before():
    task = create_task("copy", length=6, tokens=5, lag=2)
    item = task.train_set[0]
    assert item["targets"].tolist() == [UNASKED] * 2 + item["inputs"].tolist()[:4]
    right = one_hot(item["targets"].clamp(min=0), 5).float()
    metrics = task.metrics()
    task.update(metrics, lambda inputs: right[None], {name: value[None] for name, value in item.items()})
    assert metrics["accuracy"].compute() == 1, "places that are not asked count"
    assert create_task("copy").trivial()["accuracy"] == pytest.approx(1 / 8, abs=0.02)
    with pytest.raises(ValueError, match="lag"):
        create_task("copy", length=4, lag=4)


def test_recall_asks_for_the_value_of_each_key():
    task = create_task("recall", pairs=3, keys=5, values=4)
    item = task.train_set[0]
    tokens, answers = item["inputs"].tolist(), item["targets"].tolist()
    assert len(set(tokens[:6:2])) == 3
    assert all(token < 5 for token in tokens[:6:2] + tokens[6:])
    assert all(5 <= token < 9 for token in tokens[1:6:2])
    pairs = dict(zip(tokens[:6:2], tokens[1:6:2], strict=True))
    assert answers == [UNASKED] * 6 + [pairs[key] - 5 for key in tokens[6:]]
    with pytest.raises(ValueError, match="pairs"):
        create_task("recall", pairs=6, keys=5)


@pytest.mark.parametrize("name", ["position", "even_tokens", "match3", "copy"])
def test_items_depend_on_seed_and_index_alone(name):
    first, again, other = (create_task(name, seed=seed).train_set for seed in (0, 0, 1))
    assert torch.equal(first[7]["inputs"], again[7]["inputs"])
    assert not torch.equal(first[7]["inputs"], other[7]["inputs"])
    assert not torch.equal(first[7]["inputs"], first[8]["inputs"])
    with pytest.raises(ValueError, match="length"):
        create_task(name, length=0)
