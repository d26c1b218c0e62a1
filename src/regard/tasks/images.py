"""Image classification: handwritten digits, scenes composed of them, and users' own folders."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from regard.checks import one_of
from regard.tasks import scenes
from regard.tasks.base import EVAL, SPLIT, TRAIN, Task, fraction, whole
from regard.tasks.sources import existing_folder, handwritten_digits, has_images, image_files, read_images

MAX_BYTES = 4 * 2**30
"""Most that an image folder may take in memory."""
VAL_NAMES = ("val", "validation", "valid", "test")

Files = dict[str, list[Path]]
"""Image files by class."""


class LabelledImages(Dataset[dict[str, Tensor]]):
    """Images kept as bytes, given out normalised: `dict(image=(C, H, W) float32, label=() int64)`."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, mean: float, std: float) -> None:
        self.images, self.labels = torch.from_numpy(images), torch.from_numpy(labels)
        self.mean, self.std = 255 * mean, 255 * std

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"image": (self.images[index].float() - self.mean) / self.std, "label": self.labels[index]}


class Classification(Task):
    """One label for an image: cross entropy, accuracy. Subclasses make the two sets."""

    metric = "accuracy"
    train_set: LabelledImages | scenes.SceneSet
    eval_set: LabelledImages | scenes.SceneSet
    num_classes: int
    sample_shape: tuple[int, int, int]
    """Channels, height and width of an image."""

    def __init__(self, size: int, channels: int, label_smoothing: float) -> None:
        whole("size", size)
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 (grey) or 3 (colour), got {channels!r}.")
        self.sample_shape = (channels, size, size)
        self.label_smoothing = fraction("label_smoothing", label_smoothing)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch["image"]), batch["label"], label_smoothing=self.label_smoothing)

    def metrics(self) -> dict[str, Metric]:
        return {"accuracy": MulticlassAccuracy(self.num_classes, average="micro")}

    def update(self, metrics: Mapping[str, Metric], model: nn.Module, batch: dict[str, Tensor]) -> None:
        metrics["accuracy"].update(model(batch["image"]), batch["label"])

    def trivial(self) -> dict[str, float]:
        majority = self.train_set.labels.bincount(minlength=self.num_classes).argmax()
        return {"accuracy": (self.eval_set.labels == majority).double().mean().item()}

    @property
    def trivial_answer(self) -> str:
        return "the most frequent class"


class DrawnImages(Classification):
    """Images made by a rule: subclasses say in `draw` how."""

    def __init__(self, size: int, train_items: int, eval_items: int, seed: int = 0) -> None:
        super().__init__(size, 3, 0.0)
        self.items, self.seed = {TRAIN: train_items, EVAL: eval_items}, seed

    @cached_property
    def train_set(self) -> LabelledImages:  # type: ignore[override]
        return self._drawn(TRAIN)

    @cached_property
    def eval_set(self) -> LabelledImages:  # type: ignore[override]
        return self._drawn(EVAL)

    def _drawn(self, stream: int) -> LabelledImages:
        return self.draw(np.random.default_rng((self.seed, stream)), self.items[stream])

    @abstractmethod
    def draw(self, rng: np.random.Generator, count: int) -> LabelledImages:
        """`count` images and their labels."""


class Digits(Classification):
    """Scikit-learn's 8 x 8 scans of handwritten digits, enlarged; the last 360 of 1,797 are held out.

    Args:
        size: pixels of a side, at least 8.
        channels: 1, or 3 equal ones.
        seed: taken as by every task; the split is fixed, so nothing depends on it.
    """

    name = "digits"
    num_classes = 10

    def __init__(
        self,
        size: int = 32,
        channels: int = 3,
        label_smoothing: float = 0.0,
        seed: int = 0,
        data: str | Path | None = None,
    ) -> None:
        super().__init__(size, channels, label_smoothing)
        _built_in(self.name, data)
        whole("size", size, 8)
        images, labels = handwritten_digits(held_out=False)
        images = _enlarged(images, size, channels)
        mean, std = images.mean() / 255, images.std() / 255
        self.train_set = LabelledImages(images, labels, mean, std)
        images, labels = handwritten_digits(held_out=True)
        self.eval_set = LabelledImages(_enlarged(images, size, channels), labels, mean, std)

    @property
    def description(self) -> str:
        return (
            f"Handwritten digits (scikit-learn), {len(self.train_set):,} to train and {len(self.eval_set)} to evaluate."
        )


class Scenes(Classification):
    """Handwritten digits composed into scenes; evaluation scenes show digits that no training scene shows.

    A digit takes 7/16 of the side. `kind` says what is asked:

    - "cued": three digits of different classes on red, green and blue ground, each somewhere in a quadrant of its own,
      and a square of one of the colours near the corner of the fourth. What is the digit on that colour? At least 3/16
      of the side lie between the square and any digit, so the answer has to be found where the question is not: who
      reads all three digits, but not which is meant, is right in 1/3. In half of the training scenes the other two
      digits are missing, so that reading is learned first; in evaluation all are there. With one channel the colours
      are three greys.
    - "local": one digit among quarters of others. Which? Nothing far apart has to be put together.
    - "same": two digits in opposite corners. Are they of one class? The hardest: nothing rewards reading alone.

    Only typical handwriting is used (the quarter of each class that is nearest to the class's mean), because a
    comparison of mixers should turn on what they bring together, not on reading.

    Args:
        size: pixels of a side, a multiple of 16 from 32 on.
        train_items, eval_items: scenes in the two sets. Scene i stays the same whatever their number.
    """

    name = "scenes"

    def __init__(
        self,
        size: int = 32,
        kind: str = "cued",
        channels: int = 3,
        train_items: int = 8192,
        eval_items: int = 1024,
        label_smoothing: float = 0.0,
        seed: int = 0,
        data: str | Path | None = None,
    ) -> None:
        super().__init__(size, channels, label_smoothing)
        _built_in(self.name, data)
        if size < 32 or size % 16:
            raise ValueError(f"size must be a multiple of 16 from 32 on, got {size}.")
        self.kind = one_of("kind", kind, scenes.KINDS)
        self.num_classes = scenes.KINDS[kind].num_classes
        self.seed = whole("seed", seed, 0)
        self.train_set = self._scenes(TRAIN, whole("train_items", train_items))
        self.eval_set = self._scenes(EVAL, whole("eval_items", eval_items))

    @property
    def description(self) -> str:
        question = {
            "cued": "three digits on three colours; which one has the colour of the square in the far corner?",
            "local": "one digit among quarters of others; which one is it?",
            "same": "two digits in opposite corners; are they of the same class?",
        }[self.kind]
        return f"Scenes of real handwritten digits ({self.sample_shape[1]} pixels, seed {self.seed}): {question}"

    def _scenes(self, stream: int, items: int) -> scenes.SceneSet:
        digits, classes = handwritten_digits(held_out=stream == EVAL, typical=0.25)
        return scenes.SceneSet(
            scenes.KINDS[self.kind],
            np.random.default_rng((self.seed, stream)).random((items, scenes.COLUMNS)),
            tiles=_enlarged(digits, self.sample_shape[1] * 7 // 16)[:, 0],
            classes=classes,
            shape=self.sample_shape,
            alone=0.5 if stream == TRAIN else 0.0,
        )


class ImageFolder(Classification):
    """A folder with one subfolder of images for each class; or with `train/` and `val/`, each of that form.

    Every image is decoded once, when the task is built: a file that cannot be read is found at the start, not hours
    later, and the images stay in memory as bytes.

    Args:
        data: the folder. `validation/`, `valid/` and `test/` are understood as `val/`.
        size: the shorter side is resized to this many pixels and the square in the middle kept.
        channels: 3 (colour) or 1 (grey).
        eval_fraction: share of each class held out where there is no `val/`, drawn by `seed`.
        skip_corrupt: leave out images that cannot be read instead of refusing the folder.
    """

    name = "imagefolder"

    def __init__(
        self,
        data: str | Path | None = None,
        size: int = 64,
        channels: int = 3,
        eval_fraction: float = 0.2,
        skip_corrupt: bool = False,
        label_smoothing: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(size, channels, label_smoothing)
        if data is None:
            raise ValueError("the task 'imagefolder' needs data=FOLDER, with one subfolder of images for each class.")
        self.folder = existing_folder("data", data)
        val = next((self.folder / name for name in VAL_NAMES if (self.folder / name).is_dir()), None)
        if val is not None and (self.folder / "train").is_dir():
            train_files, eval_files = _by_class(self.folder / "train"), _by_class(val)
            if strange := sorted(eval_files.keys() - train_files.keys()):
                raise ValueError(
                    f"{val} holds classes that {self.folder / 'train'} does not: {', '.join(strange[:5])}."
                )
        else:
            train_files, eval_files = _split(
                _by_class(self.folder), fraction("eval_fraction", eval_fraction), whole("seed", seed, 0)
            )
        self.classes = sorted(train_files)
        if len(self.classes) < 2:
            raise ValueError(
                f"{self.folder} holds images of one class only ({self.classes[0]!r}): two subfolders at least."
            )
        self.num_classes = len(self.classes)
        count = sum(map(len, train_files.values())) + sum(map(len, eval_files.values()))
        if count * channels * size**2 > MAX_BYTES:
            raise ValueError(
                f"{count:,} images of {size} x {size} x {channels} bytes take more than {MAX_BYTES / 2**30:.0f} GiB of "
                "memory: choose a smaller size or fewer images."
            )
        images, labels = self._read(train_files, skip_corrupt)
        mean, std = images.mean(dtype=np.float64) / 255, images.std(dtype=np.float64) / 255
        self.train_set = LabelledImages(images, labels, mean, max(std, 1 / 255))
        self.eval_set = LabelledImages(*self._read(eval_files, skip_corrupt), mean, max(std, 1 / 255))

    @property
    def description(self) -> str:
        return (
            f"Images of {self.num_classes} classes in {self.folder.name}, {len(self.train_set):,} to train and "
            f"{len(self.eval_set):,} to evaluate."
        )

    def _read(self, files: Files, skip_corrupt: bool) -> tuple[np.ndarray, np.ndarray]:
        channels, size, _ = self.sample_shape
        paths = [path for name in self.classes for path in files.get(name, [])]
        labels = [label for label, name in enumerate(self.classes) for _ in files.get(name, [])]
        read = read_images(paths, size=size, mode="RGB" if channels == 3 else "L", skip_corrupt=skip_corrupt)
        kept = [i for i, image in enumerate(read) if image is not None]
        if not kept:
            raise ValueError(f"of {len(paths)} images in {self.folder} to train or to evaluate on, none can be used.")
        images = np.stack([np.asarray(read[i]).reshape(size, size, channels).transpose(2, 0, 1) for i in kept])
        return images, np.array(labels)[kept]


def _by_class(folder: Path) -> Files:
    classes = {path.name: image_files(path) for path in folder.iterdir() if path.is_dir() and path.name[0] != "."}
    classes = {name: files for name, files in classes.items() if files}
    if not classes:
        loose = " There are images in it, but not in subfolders." if has_images(folder) else ""
        raise ValueError(f"{folder} has no subfolders with images, one for each class.{loose}")
    return classes


def _split(files: Files, share: float, seed: int) -> tuple[Files, Files]:
    """Hold out a share of each class, at least one image unless the class has only one."""
    train: Files = {}
    held_out: Files = {}
    for name, paths in sorted(files.items()):
        order = np.random.default_rng((seed, SPLIT, len(paths))).permutation(len(paths))
        count = min(len(paths) - 1, max(1, round(share * len(paths))))
        held_out[name] = sorted(paths[i] for i in order[:count])
        train[name] = sorted(paths[i] for i in order[count:])
    return train, held_out


def _enlarged(images: np.ndarray, size: int, channels: int = 1) -> np.ndarray:
    """(N, 8, 8) float in [0, 1] to (N, channels, size, size) uint8."""
    larger = F.interpolate(torch.from_numpy(images)[:, None], size=(size, size), mode="bilinear")
    return (255 * larger).round().byte().expand(-1, channels, -1, -1).contiguous().numpy()


def _built_in(name: str, data: str | Path | None) -> None:
    if data is not None:
        raise ValueError(f"the task {name!r} brings its own data: for your own images use the task 'imagefolder'.")
