"""A small source-filter synthesiser: words from phones, said by a drawn speaker. It needs no recordings and no program.

A train of glottal pulses and a noise pass through resonances that move from phone to phone (Fant, 1960). It is intelligible
at best, but what a recogniser has to cope with is there: durations, pitch, vocal tracts and loudness differ, and phones
run into one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.ndimage import uniform_filter1d

FRAME = 0.01
"""Seconds between two settings of the filters."""


class Phone(NamedTuple):
    """How a phone sounds, for a man's voice.

    Attributes:
        formants: the lowest three resonances in Hz. voice, noise: amplitudes of the two sources.
        band: middle of the noise in Hz; 0 for noise that passes through the resonances. seconds: mean length.
    """

    formants: tuple[int, int, int]
    voice: float
    noise: float
    band: int
    seconds: float


# Vowels near the means of Peterson and Barney (1952), consonants near the targets of Klatt (1980).
PHONES = {
    "iy": Phone((270, 2290, 3010), 1.0, 0.0, 0, 0.12),
    "ih": Phone((390, 1990, 2550), 1.0, 0.0, 0, 0.08),
    "eh": Phone((530, 1840, 2480), 1.0, 0.0, 0, 0.10),
    "ah": Phone((640, 1190, 2390), 1.0, 0.0, 0, 0.09),
    "aa": Phone((730, 1090, 2440), 1.0, 0.0, 0, 0.10),
    "ao": Phone((570, 840, 2410), 1.0, 0.0, 0, 0.11),
    "uh": Phone((440, 1020, 2240), 1.0, 0.0, 0, 0.07),
    "uw": Phone((300, 870, 2240), 1.0, 0.0, 0, 0.13),
    "w": Phone((290, 610, 2150), 0.6, 0.0, 0, 0.06),
    "y": Phone((260, 2070, 3020), 0.6, 0.0, 0, 0.05),
    "r": Phone((310, 1060, 1380), 0.6, 0.0, 0, 0.06),
    "l": Phone((310, 1050, 2880), 0.6, 0.0, 0, 0.06),
    "m": Phone((270, 900, 2200), 0.4, 0.0, 0, 0.08),
    "n": Phone((270, 1700, 2600), 0.4, 0.0, 0, 0.08),
    "v": Phone((220, 1100, 2080), 0.3, 0.1, 5000, 0.06),
    "z": Phone((240, 1390, 2530), 0.3, 0.4, 5800, 0.08),
    "f": Phone((340, 1100, 2080), 0.0, 0.15, 5000, 0.10),
    "th": Phone((320, 1290, 2540), 0.0, 0.12, 6500, 0.09),
    "s": Phone((320, 1390, 2530), 0.0, 0.6, 5800, 0.11),
    "ch": Phone((300, 1840, 2750), 0.0, 0.6, 3200, 0.08),
    "j": Phone((260, 1840, 2750), 0.3, 0.4, 3200, 0.06),
    "p": Phone((400, 1100, 2150), 0.0, 0.3, 1000, 0.03),
    "t": Phone((400, 1600, 2600), 0.0, 0.5, 4200, 0.04),
    "k": Phone((300, 1990, 2850), 0.0, 0.5, 2400, 0.04),
    "b": Phone((200, 1100, 2150), 0.3, 0.2, 1000, 0.02),
    "d": Phone((200, 1600, 2600), 0.3, 0.3, 4200, 0.02),
}
CLOSURE, GAP = "_", " "
SILENCE = {CLOSURE: 0.05, GAP: 0.08}
"""Seconds of the silence before a stop's burst, and between words."""

DIGITS = {
    "zero": "z ih r ao uh",
    "one": "w ah n",
    "two": "_ t uw",
    "three": "th r iy",
    "four": "f ao r",
    "five": "f aa ih v",
    "six": "s ih _ k s",
    "seven": "s eh v ah n",
    "eight": "eh ih _ t",
    "nine": "n aa ih n",
}
LETTERS = {
    "a": "eh ih",
    "b": "_ b iy",
    "c": "s iy",
    "d": "_ d iy",
    "e": "iy",
    "f": "eh f",
    "g": "_ j iy",
    "h": "eh ih _ ch",
    "i": "aa ih",
    "j": "_ j eh ih",
    "k": "_ k eh ih",
    "l": "eh l",
    "m": "eh m",
    "n": "eh n",
    "o": "ao uh",
    "p": "_ p iy",
    "q": "_ k y uw",
    "r": "aa r",
    "s": "eh s",
    "t": "_ t iy",
    "u": "y uw",
    "v": "v iy",
    "w": "_ d ah _ b ah l y uw",
    "x": "eh _ k s",
    "y": "w aa ih",
    "z": "z iy",
}


def synthesise(words: Sequence[str], rng: np.random.Generator, sample_rate: int = 16000) -> np.ndarray:
    """Words, each as phones ("s ih _ k s"), said one after another by one drawn speaker: `(samples,)` float32.

    Drawn are pitch (80 to 240 Hz), the length of the vocal tract (formants times 0.88 to 1.2), tempo, how long each phone
    and gap lasts, and melody.
    """
    pitch, tract, tempo = 80 * 3 ** rng.random(), rng.uniform(0.88, 1.2), rng.uniform(0.8, 1.2)
    phones = [GAP, *(phone for word in words for phone in (*word.split(), GAP))]
    track = _track(phones, tempo, rng)
    track[:, :3] *= tract
    frames, hop = len(track), round(FRAME * sample_rate)
    time = np.arange((frames + 1) * hop) / sample_rate
    melody = 1 + 0.15 * np.sin(2 * np.pi * (rng.random() + rng.uniform(0.3, 1.5) * time)) - 0.2 * time / time[-1]
    turns = np.floor(np.cumsum(pitch * melody) / sample_rate)
    pulses = np.diff(turns, prepend=turns[0]) * np.sqrt(sample_rate / pitch)  # as strong as a noise of deviation 1
    sources = np.stack([pulses, rng.standard_normal(len(time))]).astype(np.float32)

    # Frames of two hops overlap by half; the filters change their magnitudes and leave the phases.
    cut = np.lib.stride_tricks.sliding_window_view(sources, 2 * hop, axis=1)[:, ::hop]
    taper = np.hanning(2 * hop + 1)[:-1].astype(np.float32)
    spectra = np.fft.rfft(cut * taper)  # (2, frames, hop + 1)
    response = _response(track, np.linspace(0, sample_rate / 2, hop + 1, dtype=np.float32), tract)
    parts = np.fft.irfft((spectra * response).sum(0)).astype(np.float32)
    said = np.zeros((frames + 1, hop), np.float32)
    said[:-1] += parts[:, :hop]
    said[1:] += parts[:, hop:]
    return said.ravel()


def _track(phones: Sequence[str], tempo: float, rng: np.random.Generator) -> np.ndarray:
    """Formants, voice, noise and band over frames, smoothed as tongues and lips are slow: `(frames, 6)` float32."""
    rows, lengths = [], []
    formants = PHONES["ah"].formants
    for phone in reversed(phones):  # in silence the mouth is ready for what comes next
        at = PHONES.get(phone)
        if at is not None:
            formants = at.formants
        rows.append((*formants, at.voice, at.noise, at.band) if at else (*formants, 0.0, 0.0, 0))
        seconds = (at.seconds if at else SILENCE[phone]) * tempo * rng.uniform(0.7, 1.4)
        lengths.append(max(1, round(seconds / FRAME)))
    track = np.repeat(np.array(rows[::-1], np.float32), lengths[::-1], axis=0)
    track[:, :3] = uniform_filter1d(track[:, :3], 7, axis=0, mode="nearest")
    track[:, 3:5] = uniform_filter1d(track[:, 3:5], 3, axis=0, mode="nearest")
    return track


def _response(track: np.ndarray, frequencies: np.ndarray, tract: float) -> np.ndarray:
    r"""Magnitudes that both sources are multiplied by: `(2, frames, bins)`.

    The vocal tract is a product of resonances F with bandwidths W, each $F^2 / |F^2 - f^2 + i f W|$.
    """
    higher = np.broadcast_to(np.array([3500 * tract, 4500 * tract], np.float32), (len(track), 2))
    centres = np.concatenate([track[:, :3], higher], 1)[:, :, None]  # (frames, 5, 1)
    widths = np.array([70, 100, 150, 250, 300], np.float32)[:, None]
    squares = frequencies**2
    power = (centres**2 - squares) ** 2 + squares * widths**2
    tract_gain = (centres**4 / power).prod(1) ** 0.5  # (frames, bins)
    glottis = 1 / (1 + frequencies / 200)  # pulses are round: high harmonics are weak
    band = track[:, 5:]
    hiss = np.where(band > 0, np.exp(-0.5 * ((frequencies - band) / 1200) ** 2), tract_gain * glottis)
    return np.stack([track[:, 3:4] * tract_gain * glottis, track[:, 4:5] * hiss]).astype(np.float32)
