"""Translation, and the model that compares cross attention on it: all steps at once equal one after another."""

import pytest
import torch
from torch import nn

from regard.skeletons.sequence import MixerTranslator
from regard.tasks import create_task
from regard.tasks.measures import measure


class Knows(nn.Module):
    """Says the right sentence, whatever it is given of it."""

    def __init__(self, task):
        super().__init__()
        self.words = torch.from_numpy(1 + task.dictionary)

    def forward(self, inputs, lengths, targets):
        said = nn.functional.pad(self.words[inputs.flip(1)], (0, 1))
        return nn.functional.one_hot(said, len(self.words) + 1).float()

    def search(self, inputs, lengths, *, max_length):
        return self(inputs, lengths, None).argmax(-1)[:, None, : max_length - 1], None  # the end may be left out


def test_every_word_has_its_own():
    task = create_task("translation", length=5, words=7)
    word_of = {}
    for index in range(40):
        item = task.train_set[index]
        assert item["targets"][-1] == 0
        for word, said in zip(item["inputs"].flip(0).tolist(), item["targets"][:-1].tolist(), strict=True):
            assert word_of.setdefault(word, said) == said
    assert sorted(word_of.values()) == list(range(1, 8))
    assert measure(task, Knows(task)) == {"accuracy": 1, "exact": 1}
    assert task.trivial() == {"accuracy": pytest.approx((5 / 7 + 1) / 6), "exact": 0}
    with pytest.raises(ValueError, match="words"):
        create_task("translation", words=0)


@pytest.mark.parametrize("mixer", ["softmax", "linear"])
def test_steps_equal_all_at_once(mixer):
    task = create_task("translation", length=6, words=5)
    model = MixerTranslator(mixer, 5, 6, length=7, dim=16, num_heads=2).eval()
    batch = {name: torch.stack([task.train_set[i][name] for i in range(3)]) for name in ("inputs", "targets")}
    whole = model(batch["inputs"], None, batch["targets"])
    memory, state = model.encode(batch["inputs"], None)
    outs = []
    for symbols in model.shifted(batch["targets"]).unbind(1):
        out, state = model.advance(symbols, memory, state)
        outs.append(out)
    torch.testing.assert_close(torch.stack(outs, 1), whole)
    other = batch["targets"].clone()
    other[:, 3:] = 2
    assert torch.equal(model(batch["inputs"], None, other)[:, :4], whole[:, :4])
    answers, scores = model.search(batch["inputs"], None, max_length=7, beam=2)
    assert answers.shape[:2] == scores.shape == (3, 2)
    task.loss(model, batch).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_models_refuse_what_they_cannot():
    with pytest.raises(ValueError, match="takes no context"):
        MixerTranslator("window", 5, 6)
    with pytest.raises(ValueError, match="lengths must be None"):
        MixerTranslator("softmax", 5, 6).encode(torch.zeros(1, 3, dtype=torch.long), torch.tensor([3]))
