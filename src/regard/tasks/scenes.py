"""How scenes are composed of digits: every function turns rows of uniform numbers into scenes, one row each.

`u` is (n, columns) in [0, 1), `tiles` (N, side, side) uint8 are digits and `classes` (N,) what they show. Scenes come back
as (n, channels, size, size) uint8 with size = 4 side, beside the answers (n,) int64.
"""

from __future__ import annotations

import numpy as np

_COLOURS = np.array([[1.0, 0.25, 0.25], [0.25, 1.0, 0.25], [0.35, 0.35, 1.0]])
_GREYS = np.array([[0.4], [0.7], [1.0]])

COLUMNS = 48
"""Uniform numbers that a scene of any kind may use."""


def cued(u: np.ndarray, tiles: np.ndarray, classes: np.ndarray, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Three digits in three colours in three quadrants; a square near the outer corner of the fourth has the asked colour."""
    scenes, size, side = _canvas(u, tiles, channels)
    colours = _COLOURS if channels == 3 else _GREYS
    by_class, which, shift, by_quadrant, away, asked = np.split(u[:, :26], [10, 13, 19, 23, 25], axis=1)
    shown = by_class.argsort(axis=1)[:, :3]
    rows, columns = np.divmod(by_quadrant.argsort(axis=1), 2)
    for i in range(3):
        top, left = _integer(shift[:, 2 * i], size // 4 + 1), _integer(shift[:, 2 * i + 1], size // 4 + 1)
        digit = tiles[_digit(classes, shown[:, i], which[:, i])]
        _paste(scenes, digit, rows[:, i] * size // 2 + top, columns[:, i] * size // 2 + left, colours[i])
    answer = _integer(asked[:, 0], 3)
    square = np.full((len(u), side // 2, side // 2), 255, np.uint8)
    top, left = (
        np.where(near == 0, inset, size - side // 2 - inset)
        for near, inset in (
            (rows[:, 3], _integer(away[:, 0], size // 16 + 1)),
            (columns[:, 3], _integer(away[:, 1], size // 16 + 1)),
        )
    )
    _paste(scenes, square, top, left, colours[answer])
    return scenes, np.take_along_axis(shown, answer[:, None], axis=1)[:, 0]


def local(u: np.ndarray, tiles: np.ndarray, classes: np.ndarray, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """One whole digit over eight quarters of other digits."""
    scenes, size, side = _canvas(u, tiles, channels)
    half = side // 2
    for i in range(8):
        source, down, right, top, left = u[:, 5 * i : 5 * i + 5].T
        rows = _integer(down, half + 1)[:, None, None] + np.arange(half)[:, None]
        columns = _integer(right, half + 1)[:, None, None] + np.arange(half)
        quarter = tiles[_integer(source, len(tiles))[:, None, None], rows, columns]
        _paste(scenes, quarter, _integer(top, size - half + 1), _integer(left, size - half + 1))
    answer = _integer(u[:, 40], 10)
    top, left = _integer(u[:, 42], size - side + 1), _integer(u[:, 43], size - side + 1)
    _paste(scenes, tiles[_digit(classes, answer, u[:, 41])], top, left)
    return scenes, answer


def same(u: np.ndarray, tiles: np.ndarray, classes: np.ndarray, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Two digits in opposite corners, of one class in half of the scenes (answer 1)."""
    scenes, size, side = _canvas(u, tiles, channels)
    answer = _integer(u[:, 0], 2)
    first = _integer(u[:, 1], 10)
    second = np.where(answer == 1, first, (first + 1 + _integer(u[:, 2], 9)) % 10)
    mirrored = u[:, 3] < 0.5
    for end, (shown, at) in enumerate(((first, 4), (second, 7))):
        inset = [_integer(u[:, at + axis], side // 2 + 1) for axis in (1, 2)]
        top, left = (size - side - inset[0], size - side - inset[1]) if end else inset
        left = np.where(mirrored, size - side - left, left)
        _paste(scenes, tiles[_digit(classes, shown, u[:, at])], top, left)
    return scenes, answer


KINDS = {"cued": cued, "local": local, "same": same}


def _canvas(u: np.ndarray, tiles: np.ndarray, channels: int) -> tuple[np.ndarray, int, int]:
    side = tiles.shape[-1]
    return np.zeros((len(u), channels, 4 * side, 4 * side), np.uint8), 4 * side, side


def _integer(u: np.ndarray, below: int) -> np.ndarray:
    return (u * below).astype(np.int64)


def _digit(classes: np.ndarray, wanted: np.ndarray, u: np.ndarray) -> np.ndarray:
    """For each scene, the index of one of the digits of the wanted class."""
    order = classes.argsort(kind="stable")
    first = np.searchsorted(classes[order], wanted)
    count = np.bincount(classes)[wanted]
    return order[first + (u * count).astype(np.int64)]


def _paste(
    scenes: np.ndarray, tiles: np.ndarray, top: np.ndarray, left: np.ndarray, colour: np.ndarray | float = 1.0
) -> None:
    """Put one (h, w) tile into each scene; `colour` is a factor for all, for each channel, or for each scene and channel."""
    n, h, w = tiles.shape
    rows = top[:, None, None] + np.arange(h)[:, None]
    columns = left[:, None, None] + np.arange(w)
    factors = np.broadcast_to(colour, (n, scenes.shape[1]))
    for channel in range(scenes.shape[1]):
        ink = (tiles * factors[:, channel, None, None]).round().astype(np.uint8)
        scenes[np.arange(n)[:, None, None], channel, rows, columns] = ink
