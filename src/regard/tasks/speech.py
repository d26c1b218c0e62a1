"""Speech recognition: a waveform in, the symbols that were said out, one after another.

A batch is a dictionary of

* `waveforms` (B, S) float32, zero past `lengths`; `lengths` (B,) int64, the real samples;
* `targets` (B, M) int64 symbols: 0 ends the answer, i + 1 is `task.alphabet[i]`, -1 is padding.

`model(waveforms, lengths, targets)` returns logits (B, M, task.vocab_size); those of step t may look at `targets[:, :t]`
only. `model.decode(waveforms, lengths, max_length=..., beam=1)` returns symbols (B, M'), read up to the first 0.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from math import gcd
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from scipy.io import wavfile
from scipy.signal import resample_poly
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from torchmetrics import Metric

from regard.checks import one_of
from regard.tasks.base import EVAL, SPLIT, TRAIN, Generated, Task, whole, whole_range
from regard.tasks.formants import DIGITS, LETTERS, synthesise
from regard.tasks.sources import existing_folder

END, PADDING = 0, -1
WORDS = {"digits": DIGITS, "letters": LETTERS}
LOUDNESS = 0.1
"""Root of the mean square of the speech in every item, before noise; full scale is 1."""

# ---------------------------------------------------------------------------------------------- espeak-ng

VOICES = tuple(f"en+{name}" for name in ("m1", "m2", "m3", "m4", "m5", "m6", "m7", "f1", "f2", "f3", "f4", "f5"))
SPEAKERS = tuple((voice, pitch, speed) for voice in VOICES for pitch, speed in ((35, 150), (50, 175), (65, 205)))
"""Voice, pitch (0 to 99) and words a minute of espeak-ng's speakers. Every third voice is heard in evaluation only."""


def espeak() -> str | None:
    """The path of espeak-ng, or of its predecessor, if one is installed."""
    return shutil.which("espeak-ng") or shutil.which("espeak")


@lru_cache(maxsize=4096)
def espeak_word(program: str, word: str, speaker: tuple[str, int, int], sample_rate: int) -> np.ndarray:
    """A word as `program` says it: `(samples,)` float32 without the silence around it. Recordings are kept on disk."""
    voice, pitch, speed = speaker
    key = hashlib.sha256(repr((_version(program), word, speaker)).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "regard" / "speech"
    file = cache / f"{word}-{key}.wav"
    if not file.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            fresh = Path(folder) / "word.wav"
            command = [program, "-v", voice, "-p", str(pitch), "-s", str(speed), "-w", str(fresh), word.upper()]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
            if done.returncode or not fresh.is_file():
                raise ValueError(
                    f"{program} could not say {word!r} with voice {voice!r} ({done.stderr.strip()}): repair its "
                    "installation, or pass source='formants'."
                )
            os.replace(fresh, file)  # whole or not there, for other processes
    sound = read_wave(file, sample_rate)
    loud = np.flatnonzero(np.abs(sound) > 0.01 * np.abs(sound).max(initial=0))
    return sound[loud[0] : loud[-1] + 1] if len(loud) else sound


@lru_cache(maxsize=4)
def _version(program: str) -> str:
    return subprocess.run(
        [program, "--version"], capture_output=True, text=True, timeout=60, check=False
    ).stdout.strip()


def read_wave(file: Path, sample_rate: int) -> np.ndarray:
    """A WAV file in mono at `sample_rate`: `(samples,)` float32, full scale 1."""
    try:
        rate, sound = wavfile.read(file)
    except (ValueError, OSError, struct.error) as error:
        raise ValueError(f"{file} cannot be read as a WAV file: {error}") from error
    if sound.size == 0:
        raise ValueError(f"{file} holds no sound.")
    if sound.dtype == np.uint8:
        sound = sound.astype(np.float32) / 128 - 1
    elif sound.dtype.kind == "i":
        sound = sound.astype(np.float32) / -float(np.iinfo(sound.dtype).min)
    sound = sound.astype(np.float32)
    sound = sound if sound.ndim == 1 else sound.mean(1)
    common = gcd(rate, sample_rate)
    return sound if rate == sample_rate else resample_poly(sound, sample_rate // common, rate // common)


# ---------------------------------------------------------------------------------------------- the task


class Kept(Dataset[Any]):
    """A data set whose items are made once and then stay in memory; of a large one, the first `most`."""

    def __init__(self, items: Generated, most: int = 5000) -> None:
        self.items, self.most = items, most
        self.kept: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        if index in self.kept:
            return self.kept[index]
        item = self.items[index]
        if index < self.most:
            self.kept[index] = item
        return item


class Speech(Task):
    """What was said? Drawn strings of digits or letters by drawn speakers, or your own recordings.

    Metrics: `symbol_error_rate`, the edits (substitutions, deletions, insertions) that answers need over the symbols that
    were said; `word_error_rate` and `character_error_rate`, the same over words and characters of the text.

    Args:
        words: "digits" or "letters": what one symbol is.
        symbols: how many are said: one number, or (fewest, most), drawn per item.
        snr: decibels of speech over white noise: one number, or (lowest, highest), drawn per item; None adds no noise.
            "auto" is 10 to 30 for drawn strings and none for recordings.
        source: who speaks: "espeak" (espeak-ng must be installed), "formants" (`tasks.formants`, which is always there),
            or "auto", the first of the two that is there.
        data: a folder of .wav files, each beside a .txt file of the same name with what is said in it, anywhere below.
            A fifth of them, drawn by the seed, is for evaluation. Texts are read in lower case.
        unit: for `data`: "character" or "word", what one symbol is.
        sample_rate: of the waveforms. train_items, eval_items: sizes of the two sets (for `data` the folder decides).
        beam: beam width of decoding in evaluation. seed: of everything that is drawn.
    """

    name = "speech"
    metric = "symbol_error_rate"
    higher_is_better = False

    def __init__(
        self,
        *,
        words: str = "digits",
        symbols: int | tuple[int, int] = (1, 3),
        snr: float | tuple[float, float] | Literal["auto"] | None = "auto",
        source: str = "auto",
        data: str | Path | None = None,
        unit: str = "character",
        sample_rate: int = 16000,
        train_items: int = 2000,
        eval_items: int = 200,
        beam: int = 1,
        seed: int = 0,
    ) -> None:
        one_of("words", words, WORDS)
        one_of("source", source, ("auto", "espeak", "formants"))
        one_of("unit", unit, ("character", "word"))
        whole("seed", seed, 0)
        self.beam, self.sample_rate = whole("beam", beam), whole("sample_rate", sample_rate, 4000)
        self.symbols, self.words = whole_range("symbols", symbols), words
        self.program = espeak() if source in ("auto", "espeak") else None
        if source == "espeak" and self.program is None:
            raise ValueError("source='espeak' needs the program espeak-ng on the PATH: install it, or use 'formants'.")
        self.data = None if data is None else existing_folder("data", data)
        self.snr = _decibels(((10.0, 30.0) if data is None else None) if snr == "auto" else snr)
        if self.data is None:
            self.separator, self.alphabet = " ", list(WORDS[words])
            self.longest = self.symbols[1]
            make, counts = self._drawn, (whole("train_items", train_items), whole("eval_items", eval_items))
            makers: list[Callable[..., Any]] = [partial(make, speakers) for speakers in _speakers()]
        else:
            self.separator = " " if unit == "word" else ""
            recordings = _transcribed(self.data, unit)
            self.alphabet = sorted({symbol for _, said in recordings for symbol in said})
            self.longest = max(len(said) for _, said in recordings)
            order = np.random.default_rng((seed, SPLIT)).permutation(len(recordings)).tolist()
            held = max(1, len(order) // 5)
            sets = [[recordings[index] for index in sorted(part)] for part in (order[held:], order[:held])]
            counts = (len(sets[0]), len(sets[1]))
            makers = [partial(self._recorded, one) for one in sets]
        self.vocab_size = 1 + len(self.alphabet)
        self._index = {symbol: index + 1 for index, symbol in enumerate(self.alphabet)}
        self.train_set, self.eval_set = (
            Kept(Generated(make, count, seed, stream))
            for make, count, stream in zip(makers, counts, (TRAIN, EVAL), strict=True)
        )

    @property
    def description(self) -> str:
        noise = "" if self.snr is None else f" under white noise at {self.snr[0]:g} to {self.snr[1]:g} dB"
        if self.data is not None:
            return f"What is said in the recordings in {self.data.name}{noise}?"
        count = "to".join(f" {number} " for number in dict.fromkeys(self.symbols))
        by = "the formant synthesiser" if self.program is None else f"{Path(self.program).name}"
        return f"{count.strip()} English {self.words}, said by {by} with drawn speakers{noise}: which?"

    @property
    def trivial_answer(self) -> str:
        return "the best of 50 constant answers"

    def _drawn(self, speakers: Sequence[Any], rng: np.random.Generator, index: int) -> dict[str, Tensor]:
        count = rng.integers(self.symbols[0], self.symbols[1] + 1)
        said = [self.alphabet[place] for place in rng.integers(0, len(self.alphabet), count)]
        if self.program is None:
            sound = synthesise([WORDS[self.words][word] for word in said], rng, self.sample_rate)
        else:
            speaker = speakers[int(rng.integers(len(speakers)))]
            gaps = (rng.uniform(0.03, 0.15, count + 1) * self.sample_rate).astype(int)
            parts = [np.zeros(gaps[0], np.float32)]
            for word, gap in zip(said, gaps[1:], strict=True):
                parts += [espeak_word(self.program, word, speaker, self.sample_rate), np.zeros(gap, np.float32)]
            sound = np.concatenate(parts)
        return self._item(sound, said, rng)

    def _recorded(self, recordings: Sequence[Any], rng: np.random.Generator, index: int) -> dict[str, Tensor]:
        file, said = recordings[index]
        return self._item(read_wave(file, self.sample_rate), said, rng)

    def _item(self, sound: np.ndarray, said: Sequence[str], rng: np.random.Generator) -> dict[str, Tensor]:
        """At one loudness, with its noise, in 16 bits; and the symbols."""
        power = float(np.mean(np.square(sound)))
        sound = sound * (LOUDNESS / max(power, 1e-12) ** 0.5)
        if self.snr is not None:
            sound = sound + LOUDNESS * 10 ** (-rng.uniform(*self.snr) / 20) * rng.standard_normal(len(sound))
        bits = (32767 * sound.clip(-1, 1)).round().astype(np.int16)
        targets = [*(self._index[symbol] for symbol in said), END]
        return {"waveform": torch.from_numpy(bits), "targets": torch.tensor(targets)}

    def collate(self, items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Pad the items to the longest: the batch described at the top of the module."""
        sounds, targets = [item["waveform"] for item in items], [item["targets"] for item in items]
        return {
            "waveforms": pad_sequence(sounds, batch_first=True).float() / 32767,
            "lengths": torch.tensor([len(sound) for sound in sounds]),
            "targets": pad_sequence(targets, batch_first=True, padding_value=PADDING),
        }

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Mean over unpadded steps of -log p(target symbol)."""
        logits = model(batch["waveforms"], batch["lengths"], batch["targets"])
        expected = (*batch["targets"].shape, self.vocab_size)
        if logits.shape != expected:
            raise ValueError(
                f"the model must return logits (B, M, vocab_size) = {expected}, got {tuple(logits.shape)}."
            )
        return F.cross_entropy(logits.flatten(0, 1).float(), batch["targets"].flatten(), ignore_index=PADDING)

    def metrics(self) -> dict[str, Metric]:
        from torchmetrics.text import CharErrorRate, WordErrorRate  # seconds to import

        # The rate over words, of symbols written as numbers, is that over symbols.
        return {
            "symbol_error_rate": WordErrorRate(),
            "word_error_rate": WordErrorRate(),
            "character_error_rate": CharErrorRate(),
        }

    def update(self, metrics: Mapping[str, Metric], model: nn.Module, batch: dict[str, Tensor]) -> None:
        said = model.decode(batch["waveforms"], batch["lengths"], max_length=self.longest + 2, beam=self.beam)
        self.score(metrics, said.tolist(), batch["targets"].tolist())

    def score(
        self, metrics: Mapping[str, Metric], said: Sequence[Sequence[int]], truth: Sequence[Sequence[int]]
    ) -> None:
        """Add answers, as symbols up to the first 0, to the metrics."""
        rows = [[self.read(symbols) for symbols in side] for side in (said, truth)]
        numbers, texts = ([[join(row) for row in side] for side in rows] for join in (_numbers, self.text))
        metrics["symbol_error_rate"].update(*numbers)
        for name in ("word_error_rate", "character_error_rate"):
            metrics[name].update(*texts)

    @staticmethod
    def read(symbols: Sequence[int]) -> list[int]:
        """The symbols of one answer before the first end or padding."""
        stop = next((place for place, symbol in enumerate(symbols) if symbol in (END, PADDING)), len(symbols))
        return list(symbols[:stop])

    def text(self, symbols: Sequence[int]) -> str:
        """Symbols as text."""
        return self.separator.join(self.alphabet[symbol - 1] for symbol in symbols)

    def trivial(self) -> dict[str, float]:
        truth = [self.eval_set[index]["targets"].tolist() for index in range(len(self.eval_set))]  # type: ignore[arg-type]
        answers = {tuple(self.train_set[index]["targets"].tolist()) for index in range(min(49, len(self.train_set)))}  # type: ignore[arg-type]
        best: dict[str, float] = {}
        for answer in sorted(answers | {(END,)}):
            metrics = self.metrics()
            self.score(metrics, [answer] * len(truth), truth)
            row = {name: float(metric.compute()) for name, metric in metrics.items()}
            if not best or self.better(row[self.metric], best[self.metric]):
                best = row
        return best


def _numbers(symbols: Sequence[int]) -> str:
    return " ".join(map(str, symbols))


def _speakers() -> tuple[Sequence[Any], Sequence[Any]]:
    """espeak-ng's speakers of training and of evaluation."""
    held = set(VOICES[2::3])
    return [one for one in SPEAKERS if one[0] not in held], [one for one in SPEAKERS if one[0] in held]


def _decibels(snr: Any) -> tuple[float, float] | None:
    if snr is None:
        return None
    pair = snr if isinstance(snr, (tuple, list)) else (snr, snr)
    if len(pair) != 2 or any(isinstance(at, (bool, str)) for at in pair) or not pair[0] <= pair[1]:
        raise ValueError(f"snr must be decibels, (lowest, highest), None or 'auto', got {snr!r}.")
    return float(pair[0]), float(pair[1])


def _transcribed(folder: Path, unit: str) -> list[tuple[Path, Sequence[str]]]:
    """WAV files with what is said in them, as symbols."""
    found: list[tuple[Path, Sequence[str]]] = []
    for file in sorted(folder.rglob("*.wav")):
        beside = file.with_suffix(".txt")
        if not beside.is_file():
            raise ValueError(f"{file} has no {beside.name} beside it that says what is said in it.")
        words = beside.read_text(encoding="utf-8").lower().split()
        said: Sequence[str] = words if unit == "word" else " ".join(words)
        if not said:
            raise ValueError(f"{beside} is empty: write what is said in {file.name}.")
        found.append((file, said))
    if len(found) < 2:
        raise ValueError(
            f"{folder} holds {len(found)} .wav files with a .txt beside them: it takes two, one to train and one to evaluate."
        )
    return found
