"""How scenes are composed of digits. The functions turn rows of uniform numbers into scenes or answers, one row each.

`u` is (n, COLUMNS) in [0, 1); `tiles` (N, side, side) uint8 are digits, `classes` (N,) what they show. Scenes are
(n, channels, size, size) uint8 of any `shape = (channels, size, size)`, answers (n,) int64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

COLUMNS = 48
"""Uniform numbers that a scene of any kind may use."""
MAX_KEPT = 2**29
"""Scenes that would take more bytes than this are drawn each time anew."""

Shape = tuple[int, int, int]
"""Channels, height and width; both sides are equal."""

_COLOURS = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
_GREYS = np.array([[0.25], [0.6], [1.0]])
_GROUND = 110  # brightest value of the ground behind a digit in colour; ink is 255


def cued(u: np.ndarray, tiles: np.ndarray, classes: np.ndarray, shape: Shape, alone: float = 0.0) -> np.ndarray:
    """Digits on grounds of three colours in three quadrants; a square in the corner of the fourth has one of the colours.

    Args:
        alone: share of the scenes where only the digit that is asked for is there.
    """
    scenes, everywhere = np.zeros((len(u), *shape), np.uint8), np.arange(len(u))
    size, side, square = shape[1], tiles.shape[-1], shape[1] // 4
    colours = _COLOURS if shape[0] == 3 else _GREYS
    shown, asked = _cued_answer(u)
    rows, columns = np.divmod(u[:, 11:15].argsort(axis=1), 2)
    inset = _integer(u[:, 19:27], size // 16 + 1)
    crowded = u[:, 18] >= alone
    for i in range(3):
        there = np.flatnonzero(crowded | (asked == i))
        digit = tiles[_digit(classes, shown[there, i], u[there, 15 + i])]
        top = _from_edge(rows[there, i], inset[there, 2 * i], size - side)
        left = _from_edge(columns[there, i], inset[there, 2 * i + 1], size - side)
        _paste(scenes, there, digit, top, left, _GROUND * colours[i])
    top = _from_edge(rows[:, 3], inset[:, 6], size - square)
    left = _from_edge(columns[:, 3], inset[:, 7], size - square)
    _paste(scenes, everywhere, np.zeros((len(u), square, square)), top, left, 255 * colours[asked])
    return scenes


def cued_answers(u: np.ndarray) -> np.ndarray:
    """The class of the digit whose ground has the colour of the square."""
    shown, asked = _cued_answer(u)
    return np.take_along_axis(shown, asked[:, None], axis=1)[:, 0]


def _cued_answer(u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return u[:, :10].argsort(axis=1)[:, :3], _integer(u[:, 10], 3)


def local(u: np.ndarray, tiles: np.ndarray, classes: np.ndarray, shape: Shape, alone: float = 0.0) -> np.ndarray:
    """One whole digit over eight quarters of other digits."""
    scenes, everywhere = np.zeros((len(u), *shape), np.uint8), np.arange(len(u))
    size, half = shape[1], tiles.shape[-1] // 2
    for i in range(8):
        source, down, right, top, left = u[:, 5 * i : 5 * i + 5].T
        rows = _integer(down, 2)[:, None, None] * half + np.arange(half)[:, None]
        columns = _integer(right, 2)[:, None, None] * half + np.arange(half)
        quarter = tiles[_integer(source, len(tiles))[:, None, None], rows, columns]
        _paste(scenes, everywhere, quarter, _integer(top, size - half + 1), _integer(left, size - half + 1))
    step = size // 8
    top, left = step * _integer(u[:, 42], 5), step * _integer(u[:, 43], 5)
    _paste(scenes, everywhere, tiles[_digit(classes, local_answers(u), u[:, 41])], top, left)
    return scenes


def local_answers(u: np.ndarray) -> np.ndarray:
    """The class of the whole digit."""
    return _integer(u[:, 40], 10)


def same(u: np.ndarray, tiles: np.ndarray, classes: np.ndarray, shape: Shape, alone: float = 0.0) -> np.ndarray:
    """Two digits in opposite corners, of one class in half of the scenes."""
    scenes, everywhere = np.zeros((len(u), *shape), np.uint8), np.arange(len(u))
    first = _integer(u[:, 1], 10)
    second = np.where(same_answers(u) == 1, first, (first + 1 + _integer(u[:, 2], 9)) % 10)
    column = _integer(u[:, 3], 2)
    inset = _integer(u[:, 6:10], shape[1] // 16 + 1)
    for row, label in enumerate((first, second)):
        top = _from_edge(np.full(len(u), row), inset[:, 2 * row], shape[1] - tiles.shape[-1])
        left = _from_edge((column + row) % 2, inset[:, 2 * row + 1], shape[1] - tiles.shape[-1])
        _paste(scenes, everywhere, tiles[_digit(classes, label, u[:, 4 + row])], top, left)
    return scenes


def same_answers(u: np.ndarray) -> np.ndarray:
    """1 where both digits are of one class."""
    return _integer(u[:, 0], 2)


class Kind(NamedTuple):
    draw: Callable[..., np.ndarray]
    answers: Callable[[np.ndarray], np.ndarray]
    num_classes: int


KINDS = {
    "cued": Kind(cued, cued_answers, 10),
    "local": Kind(local, local_answers, 10),
    "same": Kind(same, same_answers, 2),
}


class SceneSet(Dataset[dict[str, Tensor]]):
    """Scenes by the rows of a table of uniform numbers: row i decides scene i. Kept once drawn where memory allows."""

    def __init__(self, kind: Kind, table: np.ndarray, **drawing: Any) -> None:
        self.kind, self.table, self.drawing = kind, table, drawing
        self.labels = torch.from_numpy(kind.answers(table))
        self.kept = len(table) * math.prod(drawing["shape"]) <= MAX_KEPT

    @cached_property
    def images(self) -> Tensor:
        """All scenes, (n, channels, size, size) uint8."""
        return self._drawn(self.table)

    def _drawn(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(self.kind.draw(rows, **self.drawing))

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image = self.images[index] if self.kept else self._drawn(self.table[index][None])[0]
        # Constants near the scenes' own mean and deviation: taken from the data, they would tie every item to all.
        return {"image": (image.float() - 0.15 * 255) / (0.25 * 255), "label": self.labels[index]}


def _from_edge(end: np.ndarray, inset: np.ndarray, free: int) -> np.ndarray:
    """Where a thing begins that lies `inset` pixels from the near edge (end 0) or the far one (end 1)."""
    return np.where(end == 0, inset, free - inset)


def _integer(u: np.ndarray, below: int) -> np.ndarray:
    return (u * below).astype(np.int64)


def _digit(classes: np.ndarray, wanted: np.ndarray, u: np.ndarray) -> np.ndarray:
    """For each scene, the index of one of the digits of the wanted class."""
    order = classes.argsort(kind="stable")
    first = np.searchsorted(classes[order], wanted)
    count = np.bincount(classes)[wanted]
    return order[first + (u * count).astype(np.int64)]


def _paste(
    scenes: np.ndarray,
    which: np.ndarray,
    tiles: np.ndarray,
    top: np.ndarray,
    left: np.ndarray,
    ground: np.ndarray | float = 0.0,
) -> None:
    """Put one (h, w) tile into each of the scenes `which`: white ink over a ground, one for each channel (and scene)."""
    _, h, w = tiles.shape
    rows = top[:, None, None] + np.arange(h)[:, None]
    columns = left[:, None, None] + np.arange(w)
    grounds = np.broadcast_to(ground, (len(which), scenes.shape[1]))
    for channel in range(scenes.shape[1]):
        below = grounds[:, channel, None, None]
        scenes[which[:, None, None], channel, rows, columns] = (below + (255 - below) * (tiles / 255)).astype(np.uint8)
