"""Spoken strings: the same in every run, at their noise, by espeak-ng where it is, from a folder; error rates by hand."""

import stat
import sys

import numpy as np
import pytest
import torch
from scipy.io import wavfile
from torch import nn

from regard.tasks import create_task
from regard.tasks.formants import CLOSURE, DIGITS, LETTERS, PHONES, synthesise
from regard.tasks.speech import read_wave
from regard.training import TrainConfig, evaluate, train

SMALL = {"train_items": 6, "eval_items": 5}


class Says(nn.Module):
    """Answers with fixed symbols; logits favour nothing."""

    def __init__(self, answer, vocab_size):
        super().__init__()
        self.answer, self.bias = answer, nn.Parameter(torch.zeros(vocab_size))

    def forward(self, waveforms, lengths, targets):
        return self.bias.expand(*targets.shape, -1)

    def decode(self, waveforms, lengths, max_length, beam=1):
        return torch.tensor([self.answer] * len(waveforms))


@pytest.fixture
def program(tmp_path, monkeypatch):
    """A stand-in for espeak-ng: a tone whose length tells the word, between silences."""
    home = tmp_path / "bin"
    home.mkdir()
    file = home / "espeak-ng"
    file.write_text(
        f"#!{sys.executable}\n"
        "import sys\n"
        "from pathlib import Path\n"
        f"Path({str(tmp_path / 'calls')!r}).open('a').write(' '.join(sys.argv[1:]) + chr(10))\n"
        "if '--version' in sys.argv: print('stand-in 1'); sys.exit()\n"
        "import array, math, wave\n"
        "tone = [int(9000 * math.sin(t / 9)) for t in range(1000 * len(sys.argv[-1]))]\n"
        "with wave.open(sys.argv[sys.argv.index('-w') + 1], 'wb') as file:\n"
        "    file.setnchannels(1), file.setsampwidth(2), file.setframerate(22050)\n"
        "    file.writeframes(array.array('h', [0] * 4000 + tone + [0] * 4000).tobytes())\n"
    )
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_every_word_is_made_of_known_phones_and_can_be_told_apart():
    for table in (DIGITS, LETTERS):
        assert all(set(phones.split()) <= {*PHONES, CLOSURE} for phones in table.values())
        assert len(set(table.values())) == len(table)
        for phones in table.values():
            for rate in (8000, 16000):
                sound = synthesise([phones], np.random.default_rng(0), rate)
                assert sound.dtype == np.float32
                assert np.isfinite(sound).all()
                assert 0.1 < len(sound) / rate < 1.5
                assert np.square(sound).mean() > 1e-4


def test_formants_stand_where_they_are_put():
    sound = synthesise(["aa aa aa aa"], np.random.default_rng(1))
    power = np.abs(np.fft.rfft(sound)) ** 2
    at = np.fft.rfftfreq(len(sound), 1 / 16000)

    def mean(low, high):
        return power[(at > low) & (at < high)].mean()

    assert mean(550, 1300) > 20 * mean(1700, 2000)
    hiss = synthesise(["s s s"], np.random.default_rng(1))
    power, at = np.abs(np.fft.rfft(hiss)) ** 2, np.fft.rfftfreq(len(hiss), 1 / 16000)
    assert mean(5000, 6500) > 100 * mean(200, 2000)


def test_items_are_the_same_in_every_run_and_new_in_evaluation():
    first, again = (create_task("speech", source="formants", **SMALL) for _ in range(2))
    assert torch.equal(first.train_set[3]["waveform"], again.train_set[3]["waveform"])
    assert first.train_set[3] is first.train_set[3]
    other = create_task("speech", source="formants", seed=1, **SMALL)
    for different in (first.eval_set[3], other.train_set[3], first.train_set[2]):
        assert not torch.equal(first.train_set[3]["waveform"], different["waveform"])
    batch = first.collate([first.train_set[index] for index in range(6)])
    assert batch["waveforms"].shape == (6, batch["lengths"].max())
    assert (batch["targets"] == 0).sum(1).eq(1).all()
    with pytest.raises(IndexError):
        first.train_set[6]


@pytest.mark.parametrize("snr", [0, 10])
def test_noise_is_as_loud_as_it_says(snr):
    clean, noisy = (
        create_task("speech", source="formants", snr=at, **SMALL).train_set[0]["waveform"].float() for at in (None, snr)
    )
    ratio = clean.square().mean() / (noisy - clean).square().mean()
    assert 10 * torch.log10(ratio).item() == pytest.approx(snr, abs=0.5)


def test_error_rates_of_answers_made_by_hand():
    task = create_task("speech", source="formants", **SMALL)
    metrics = task.metrics()
    task.score(
        metrics, [[2, 3, 0, 5], [4, 4]], [[2, 0, -1], [4, 5, 0]]
    )  # "one two" for "one"; "three three" for "three four"
    values = {name: metric.compute().item() for name, metric in metrics.items()}
    assert values["symbol_error_rate"] == values["word_error_rate"] == pytest.approx(2 / 3)
    assert values["character_error_rate"] == pytest.approx((4 + 5) / (3 + 10))
    result = evaluate(Says([0], 11), task)
    assert result["symbol_error_rate"] == 1
    trivial = task.trivial()
    assert 0.5 < trivial["symbol_error_rate"] <= 1
    model = Says([1, 0], 11)
    assert train(model, task, TrainConfig(steps=2, batch_size=2), cpu=True).steps == 2
    with pytest.raises(ValueError, match="vocab_size"):
        task.loss(Says([0], 9), task.collate([task.train_set[0]]))


def test_espeak_is_asked_once_for_each_word_and_speaker(program):
    task = create_task("speech", symbols=2, snr=None, **SMALL)
    assert "espeak-ng" in task.description
    item = task.train_set[0]
    said = task.text(task.read(item["targets"].tolist())).split()
    tones = sum(len(word) for word in said) * 1000 / 22050
    assert tones - 0.01 < len(item["waveform"]) / 16000 < tones + 0.5
    calls = (program / "calls").read_text().splitlines()
    assert any(call.startswith("-v en+") and call.endswith(said[0].upper()) for call in calls)
    for index in range(6):
        task.train_set[index]
    spoken = [call for call in (program / "calls").read_text().splitlines() if call.startswith("-v")]
    names = {" ".join(word for word in call.split() if not word.endswith(".wav")) for call in spoken}
    assert len(spoken) == len(names)
    assert len(list((program / "cache" / "regard" / "speech").glob("*.wav"))) == len(spoken)


def test_without_espeak_the_synthesiser_speaks(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert "formant" in create_task("speech", **SMALL).description
    with pytest.raises(ValueError, match="espeak-ng"):
        create_task("speech", source="espeak")


def test_an_espeak_that_fails_is_named(program):
    (program / "bin" / "espeak-ng").write_text("#!/bin/sh\necho no voice >&2\nexit 1\n")
    with pytest.raises(ValueError, match="no voice"):
        create_task("speech", **SMALL).train_set[0]


def test_own_recordings(tmp_path):
    rng = np.random.default_rng(0)
    for index, (text, rate) in enumerate([("Go  left", 8000), ("stop", 22050), ("go on\n", 16000), ("left", 16000)]):
        (tmp_path / f"{index}.txt").write_text(text)
        sound = rng.integers(-3000, 3000, (rate // 4, 1 + index % 2)).astype(np.int16)
        wavfile.write(tmp_path / f"{index}.wav", rate, sound)
    task = create_task("speech", data=tmp_path)
    assert task.alphabet == sorted(set("go left stop on"))
    assert (len(task.train_set), len(task.eval_set)) == (3, 1)
    texts = {
        task.text(task.read(part[i]["targets"].tolist()))
        for part in (task.train_set, task.eval_set)
        for i in range(len(part))
    }
    assert texts == {"go left", "stop", "go on", "left"}
    assert abs(len(task.eval_set[0]["waveform"]) - 4000) <= 1
    assert task.snr is None
    words = create_task("speech", data=tmp_path, unit="word")
    assert words.alphabet == ["go", "left", "on", "stop"]
    assert 0 <= words.trivial()["symbol_error_rate"] <= 1
    (tmp_path / "1.txt").unlink()
    with pytest.raises(ValueError, match=r"1\.txt"):
        create_task("speech", data=tmp_path)
    (tmp_path / "1.wav").write_bytes(b"RIFF")
    with pytest.raises(ValueError, match=r"1\.wav"):
        read_wave(tmp_path / "1.wav", 16000)


@pytest.mark.parametrize(
    "options",
    [
        {"words": "names"},
        {"symbols": 0},
        {"snr": (20, 10)},
        {"snr": "loud"},
        {"source": "radio"},
        {"unit": "phone"},
        {"sample_rate": 100},
        {"data": "/not/there"},
        {"beam": 0},
    ],
)
def test_wrong_options_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        create_task("speech", **options)
