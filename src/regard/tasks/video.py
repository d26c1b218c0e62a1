"""Video: what comes next where handwritten digits move and bounce, or in own frames; and which way a digit moves."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics import MeanMetric, Metric

from regard.tasks.base import EVAL, TRAIN, Task, whole
from regard.tasks.images import Classification, LabelledImages
from regard.tasks.measures import measure, ssim
from regard.tasks.sources import existing_folder, handwritten_digits

SPEED = 0.1
"""How far a digit moves in a frame, as a share of the free way from one wall to the other."""


class Clips(Dataset[dict[str, Tensor]]):
    """Clips kept as bytes, given out as `dict(past=(T, 1, H, W), future=(T', 1, H, W))` in [0, 1]."""

    def __init__(self, frames: np.ndarray, frames_in: int) -> None:
        self.frames, self.frames_in = torch.from_numpy(frames), frames_in

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        frames = self.frames[index][:, None].float() / 255
        return {"past": frames[: self.frames_in], "future": frames[self.frames_in :]}


class MovingDigits(Task):
    """Given the first frames of a clip, draw the next ones.

    Made as Moving MNIST is, from scikit-learn's digits: each of `digits` starts anywhere, moves in a direction of its
    own by a tenth of its free way a frame and bounces off the walls; a digit is 28/64 of the canvas, and where two
    overlap the brighter pixel shows. Evaluation clips show digits that no training clip shows.

    `mse` and `mae` are reported as for Moving MNIST: squared and absolute errors in [0, 1] summed over the pixels of
    a frame, `sum_hw (answer - truth)^2`, then averaged over frames and clips. They grow with the area of the canvas.

    Args:
        size: pixels of a side of the canvas; 32 unless given. Not with `data`, whose frames keep their size.
        frames_in, frames_out: frames shown, frames asked for.
        train_items, eval_items: clips in the two sets, without `data`. Clip i stays the same whatever their number.
        data: folder of .npy arrays of grey frames, (T, H, W) or (N, T, H, W), uint8 or floats in [0, 1]. They are cut,
            in order, into clips that share no frame; the last fifth of the clips is held out.
    """

    name = "moving_digits"
    metric = "mse"
    higher_is_better = False

    def __init__(
        self,
        size: int | None = None,
        frames_in: int = 10,
        frames_out: int = 10,
        digits: int = 2,
        train_items: int = 2048,
        eval_items: int = 256,
        seed: int = 0,
        data: str | Path | None = None,
    ) -> None:
        self.frames_in, self.frames_out = whole("frames_in", frames_in), whole("frames_out", frames_out)
        self.digits, self.seed = whole("digits", digits), whole("seed", seed, 0)
        self.items = {TRAIN: whole("train_items", train_items), EVAL: whole("eval_items", eval_items)}
        self.folder = None if data is None else existing_folder("data", data)
        if self.folder is None:
            self.size = (whole("size", 32 if size is None else size, 16),) * 2
        else:
            if size is not None:
                raise ValueError("size and data exclude each other: the frames in the folder keep their size.")
            clips = _own_clips(self.folder, frames_in + frames_out)
            cut = len(clips) - max(1, len(clips) // 5)
            self.train_set, self.eval_set = Clips(clips[:cut], frames_in), Clips(clips[cut:], frames_in)
            self.size = clips.shape[2:]

    @cached_property
    def train_set(self) -> Clips:  # type: ignore[override]
        return self._generated(TRAIN)

    @cached_property
    def eval_set(self) -> Clips:  # type: ignore[override]
        return self._generated(EVAL)

    @property
    def description(self) -> str:
        what = f"{self.digits} moving digits" if self.folder is None else f"Clips in {self.folder.name}"
        return (
            f"{what}, {self.size[0]} x {self.size[1]} pixels: {self.frames_in} frames are shown, "
            f"the next {self.frames_out} asked for."
        )

    @property
    def trivial_answer(self) -> str:
        return "the last frame, repeated"

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(self._answer(model, batch), batch["future"])

    def metrics(self) -> dict[str, Metric]:
        return {"mse": MeanMetric(), "mae": MeanMetric(), "ssim": MeanMetric()}

    def update(self, metrics: Mapping[str, Metric], model: nn.Module, batch: dict[str, Tensor]) -> None:
        # Frames of all clips side by side; a value outside [0, 1] is shown as the nearest inside.
        answer, truth = self._answer(model, batch).float().clamp(0, 1).flatten(0, 1), batch["future"].flatten(0, 1)
        metrics["mse"].update((answer - truth).square().sum((1, 2, 3)))
        metrics["mae"].update((answer - truth).abs().sum((1, 2, 3)))
        metrics["ssim"].update(ssim(answer, truth))

    def trivial(self) -> dict[str, float]:
        return measure(self, LastFrame(self.frames_out))

    def _answer(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        answer, asked = model(batch["past"]), batch["future"].shape
        if answer.shape != asked:
            raise ValueError(f"the model answered with shape {tuple(answer.shape)} where {tuple(asked)} was asked for.")
        return answer

    def _generated(self, stream: int) -> Clips:
        # Clip i is decided by row i of one table of uniform numbers, so it depends on the seed and i alone.
        table = np.random.default_rng((self.seed, stream)).random((self.items[stream], self.digits, 4))
        frames = moving(
            table, handwritten_digits(held_out=stream == EVAL)[0], self.size[0], self.frames_in + self.frames_out
        )
        return Clips(frames, self.frames_in)


class LastFrame(nn.Module):
    """The last frame, repeated: what a model must beat."""

    def __init__(self, frames_out: int) -> None:
        super().__init__()
        self.frames_out = frames_out

    def forward(self, past: Tensor) -> Tensor:
        return past[:, -1:].expand(-1, self.frames_out, -1, -1, -1)


class MovingDirection(Classification):
    """In which of eight directions does the digit cross the canvas?

    It passes the middle half way, give or take a few pixels, so any frame fits two opposite directions: where the digit is
    does not tell without when. `image` holds a clip `(frames, 1, size, size)`. Evaluation clips show digits that no training
    clip shows.

    Args:
        size: pixels of a side. frames: of a clip.
    """

    name = "moving_direction"
    num_classes = 8

    def __init__(
        self, size: int = 32, frames: int = 8, train_items: int = 4096, eval_items: int = 512, seed: int = 0
    ) -> None:
        super().__init__(whole("size", size, 16), 1, 0.0)
        self.frames, self.seed = whole("frames", frames, 2), whole("seed", seed, 0)
        self.items = {TRAIN: whole("train_items", train_items), EVAL: whole("eval_items", eval_items)}

    @cached_property
    def train_set(self) -> LabelledImages:  # type: ignore[override]
        return self._drawn(TRAIN)

    @cached_property
    def eval_set(self) -> LabelledImages:  # type: ignore[override]
        return self._drawn(EVAL)

    @property
    def description(self) -> str:
        return f"{self.frames} frames of {self.sample_shape[1]} pixels: in which of 8 directions does the digit cross them?"

    def _drawn(self, stream: int) -> LabelledImages:
        # Clip i is decided by row i of one table of uniform numbers, so it depends on the seed and i alone.
        table = np.random.default_rng((self.seed, stream)).random((self.items[stream], 4))
        tiles = _tiles(handwritten_digits(held_out=stream == EVAL)[0], self.sample_shape[1])
        labels = (8 * table[:, 3]).astype(np.int64)
        clips = np.zeros((len(table), self.frames, 1, *self.sample_shape[1:]), np.uint8)
        side, progress = tiles.shape[1], np.linspace(-1, 1, self.frames)
        for clip, (which, row, column, _), label in zip(clips, table, labels, strict=True):
            down, right = np.round(np.sin(label * np.pi / 4)), np.round(np.cos(label * np.pi / 4))
            for frame, done in zip(clip[:, 0], progress, strict=True):
                # The free way is [0, 1]: the digit goes from 0.15 to 0.85 of it, moved by at most 0.15.
                top, left = (
                    int((frame.shape[0] - side) * (0.35 + 0.3 * off + 0.35 * way * done))
                    for off, way in ((row, down), (column, right))
                )
                frame[top : top + side, left : left + side] = tiles[int(which * len(tiles))]
        return LabelledImages(clips, labels, mean=0.05, std=0.18)


def moving(u: np.ndarray, images: np.ndarray, size: int, length: int) -> np.ndarray:
    """Clips of bouncing digits.

    Args:
        u: (clips, digits, 4) in [0, 1): which image, start row, start column, direction.
        images: (N, 8, 8) in [0, 1].

    Returns:
        (clips, length, size, size) uint8.
    """
    tiles = _tiles(images, size)
    side = tiles.shape[1]
    frames = np.zeros((len(u), length, size, size), np.uint8)
    clip = np.arange(len(u))[:, None, None]
    for which, row, column, direction in u.transpose(1, 2, 0):
        tile = tiles[(which * len(tiles)).astype(np.int64)]
        for t in range(length):
            # The free way is [0, 1]; a way that ignores the walls is folded back into it, which is what bouncing does.
            top, left = (
                ((size - side) * (1 - np.abs(1 - (start + SPEED * t * step) % 2))).astype(np.int64)[:, None, None]
                for start, step in ((row, np.sin(2 * np.pi * direction)), (column, np.cos(2 * np.pi * direction)))
            )
            place = clip, t, top + np.arange(side)[:, None], left + np.arange(side)
            frames[place] = np.maximum(frames[place], tile)
    return frames


def _tiles(images: np.ndarray, size: int) -> np.ndarray:
    """Digits `(N, 8, 8)` in [0, 1] -> `(N, side, side)` uint8, 28/64 of a canvas of `size` pixels."""
    side = round(size * 28 / 64)
    larger = F.interpolate(torch.from_numpy(images)[:, None], size=(side, side), mode="bilinear")[:, 0]
    return (255 * larger).round().byte().numpy()


def _own_clips(folder: Path, length: int) -> np.ndarray:
    """(clips, length, H, W) uint8 from the .npy files of a folder, in the order of their names."""
    paths = sorted(folder.rglob("*.npy"))
    if not paths:
        raise ValueError(f"{folder} holds no .npy files.")
    clips = [clip for path in paths for video in _videos(path) for clip in _windows(video, length)]
    if len(clips) < 2:
        raise ValueError(
            f"{folder} holds {len(clips)} clips of {length} frames; at least 2 are needed, one to evaluate on."
        )
    sizes = sorted({clip.shape[1:] for clip in clips})
    if len(sizes) > 1:
        raise ValueError(f"the frames in {folder} must have one size, got {sizes[0]} and {sizes[1]}.")
    if min(sizes[0]) < 11:
        raise ValueError(
            f"frames must have at least 11 pixels a side (structural similarity needs them), got {sizes[0]}."
        )
    return np.stack(clips)


def _videos(path: Path) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a .npy array: {error}.") from error
    if array.ndim not in (3, 4):
        raise ValueError(f"{path} must be (T, H, W) or (N, T, H, W), got shape {array.shape}.")
    if array.dtype != np.uint8:
        if not np.issubdtype(array.dtype, np.floating) or not ((array >= 0) & (array <= 1)).all():
            raise ValueError(f"{path} must hold uint8, or floats from 0 to 1, got {array.dtype} with other values.")
        array = (255 * array).round().astype(np.uint8)
    return array[None] if array.ndim == 3 else array


def _windows(video: np.ndarray, length: int) -> list[np.ndarray]:
    return [video[start : start + length] for start in range(0, len(video) - length + 1, length)]
