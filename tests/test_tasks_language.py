"""Text: windows, both vocabularies, bits per byte by hand, own files, errors."""

import math
from collections import Counter

import pytest
import torch
from torch import nn

from regard.tasks import create_task
from regard.tasks.measures import measure
from regard.tasks.sources import python_documentation

OWN = "Fünf Äpfel für zwölf €. " * 40


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text(OWN, encoding="utf-8")
    return path


class Uniform(nn.Module):
    """Every token equally probable."""

    def __init__(self, vocab_size):
        super().__init__()
        self.vocab_size = vocab_size

    def forward(self, tokens):
        return torch.zeros(*tokens.shape, self.vocab_size)


class Next(nn.Module):
    """Sure that each token is followed by the next in the alphabet."""

    def forward(self, tokens):
        return 50.0 * nn.functional.one_hot((tokens + 1) % 256, 256).float()


def test_the_built_in_text_is_english_and_large():
    text = python_documentation()
    assert len(text) > 300_000
    words = Counter(text.decode().split())
    assert words.most_common(1)[0][0] == "the"


def test_windows_are_the_text():
    task = create_task("text", length=64)
    text = python_documentation()
    assert task.vocab_size == 256
    assert task.train_set[100]["tokens"].dtype == torch.int64
    assert bytes(task.train_set[100]["tokens"].tolist()) == text[100:165]
    cut = len(text) - int(0.1 * len(text))
    last = task.train_set[len(task.train_set) - 1]["tokens"]
    assert bytes(last.tolist()) == text[cut - 65 : cut]
    assert bytes(task.eval_set[0]["tokens"].tolist()) == text[cut : cut + 65]
    with pytest.raises(IndexError):
        task.eval_set[len(task.eval_set)]


def test_evaluation_predicts_each_token_once(file):
    task = create_task("text", data=file, length=10)
    tail = OWN.encode()[-int(0.1 * len(OWN.encode())) :]
    asked = [token for i in range(len(task.eval_set)) for token in task.eval_set[i]["tokens"][1:].tolist()]
    assert bytes(asked) == tail[1 : len(asked) + 1]
    assert len(tail) - len(asked) <= 10


def test_characters_come_back(file):
    task = create_task("text", data=file, length=10, unit="character")
    alphabet = sorted(set(OWN))
    assert task.vocab_size == len(alphabet)
    assert "".join(alphabet[t] for t in task.train_set[3]["tokens"].tolist()) == OWN[3:14]


@pytest.mark.parametrize("unit", ["byte", "character"])
def test_unigram_bits_per_byte_by_hand(file, unit):
    task = create_task("text", data=file, length=10, unit=unit)
    symbols = list(OWN.encode()) if unit == "byte" else list(OWN)
    alphabet = range(256) if unit == "byte" else sorted(set(OWN))
    cut = len(symbols) - int(0.1 * len(symbols))
    counts, total = Counter(symbols[:cut]), cut + len(alphabet)
    asked = symbols[cut + 1 :][: 10 * len(task.eval_set)]
    bits = sum(-math.log2((counts[s] + 1) / total) for s in asked)
    length = len(asked) if unit == "byte" else len("".join(asked).encode())
    trivial = task.trivial()
    assert trivial["bits_per_byte"] == pytest.approx(bits / length, rel=1e-5)
    assert trivial["perplexity"] == pytest.approx(2 ** (bits / len(asked)), rel=1e-4)
    best = max(alphabet, key=lambda s: counts[s])
    assert trivial["accuracy"] == pytest.approx(sum(s == best for s in asked) / len(asked))


def test_measures_of_known_models(tmp_path):
    path = tmp_path / "count.bin"
    path.write_bytes(bytes(range(256)) * 4)
    task = create_task("text", data=path, length=20)
    uniform, sure = measure(task, Uniform(256)), measure(task, Next())
    assert uniform["bits_per_byte"] == pytest.approx(8)
    assert uniform["perplexity"] == pytest.approx(256, rel=1e-4)
    assert sure == {"bits_per_byte": pytest.approx(0, abs=1e-6), "perplexity": pytest.approx(1), "accuracy": 1}
    assert task.better(1.0, 2.0)
    batch = {"tokens": task.train_set[0]["tokens"][None]}
    assert task.loss(Uniform(256), batch).item() == pytest.approx(math.log(256))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"length": 0}, "length must be an integer of at least 1"),
        ({"unit": "charcter"}, "Did you mean 'character'"),
        ({"data": "no/such/file"}, "is not there"),
        ({"data": "."}, "a folder, not a text file"),
        ({"length": 10**6}, "needs about"),
    ],
)
def test_options_are_refused_at_the_door(options, said):
    with pytest.raises(ValueError, match=said):
        create_task("text", **options)


def test_text_that_is_not_utf8_needs_bytes(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9 " * 100)
    with pytest.raises(ValueError, match=r"not UTF-8 text .* at byte 3.*unit='byte'"):
        create_task("text", data=path, length=8, unit="character")
    assert create_task("text", data=path, length=8).vocab_size == 256


def test_byte_pairs_come_back_and_say_how_many_bytes_they_are(tmp_path):
    pytest.importorskip("tokenizers")
    path = tmp_path / "own.txt"
    path.write_text("".join(f"Der {n}. Apfel kostet {n * n} €. " for n in range(400)), encoding="utf-8")
    task = create_task("text", data=path, unit="byte_pair", vocab_size=270, length=32)
    assert task.vocab_size == 270
    tokens = torch.cat([task.train_tokens, task.eval_set.tokens])
    assert task.tokenizer.decode(tokens.tolist()) == path.read_text(encoding="utf-8")
    assert task.bytes_of[tokens].sum() == path.stat().st_size
    assert len(tokens) < 0.7 * path.stat().st_size, "pairs are longer than bytes"
    trivial = task.trivial()
    assert trivial["bits_per_byte"] < create_task("text", data=path, length=32).trivial()["bits_per_byte"]
    with pytest.raises(ValueError, match="at least 256"):
        create_task("text", data=path, unit="byte_pair", vocab_size=100, length=32)
