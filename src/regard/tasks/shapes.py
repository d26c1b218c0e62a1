"""Naming the surface that a cloud of points lies on: generated shapes, or a folder of clouds (`shapes`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from regard.tasks.base import EVAL, TRAIN, Generated, Task, fraction, whole
from regard.tasks.points import cloud_files, divide, offsets_of, read_cloud


def _sphere(rng: np.random.Generator, count: int) -> np.ndarray:
    points = rng.normal(size=(count, 3))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def _ellipsoid(rng: np.random.Generator, count: int) -> np.ndarray:
    return _sphere(rng, count) * [1, rng.uniform(0.4, 0.7), rng.uniform(0.3, 0.6)]


def _box(rng: np.random.Generator, count: int) -> np.ndarray:
    half = rng.uniform(0.4, 1, 3)
    area = np.prod(half) / half
    axis = rng.choice(3, count, p=area / area.sum())
    points = rng.uniform(-1, 1, (count, 3))
    points[np.arange(count), axis] = rng.choice([-1, 1], count)
    return points * half


def _disc(rng: np.random.Generator, count: int, z: float) -> np.ndarray:
    radius, angle = np.sqrt(rng.random(count)), rng.uniform(0, 2 * np.pi, count)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle), np.full(count, z)], 1)


def _cylinder(rng: np.random.Generator, count: int) -> np.ndarray:
    height = rng.uniform(1, 4)
    ends = rng.binomial(count, 1 / (1 + height))  # the two ends have the area 2 pi, the side 2 pi height
    angle = rng.uniform(0, 2 * np.pi, count - ends)
    side = np.stack([np.cos(angle), np.sin(angle), rng.uniform(0, height, count - ends)], 1)
    return np.concatenate([side, _disc(rng, ends // 2, 0), _disc(rng, ends - ends // 2, height)])


def _cone(rng: np.random.Generator, count: int) -> np.ndarray:
    height = rng.uniform(1.2, 3)
    base = rng.binomial(count, 1 / (1 + np.hypot(1, height)))
    side = _disc(rng, count - base, 0)
    side[:, 2] = height * (1 - np.hypot(side[:, 0], side[:, 1]))
    return np.concatenate([side, _disc(rng, base, 0)])


def _pyramid(rng: np.random.Generator, count: int) -> np.ndarray:
    height = rng.uniform(1.2, 3)
    base = rng.binomial(count, 1 / (1 + np.hypot(1, height)))
    points = np.concatenate([rng.uniform(-1, 1, (count, 2)), np.zeros((count, 1))], 1)
    points[base:, 2] = height * (1 - np.abs(points[base:, :2]).max(1))
    return points


def _torus(rng: np.random.Generator, count: int) -> np.ndarray:
    tube = rng.uniform(0.2, 0.5)
    around = rng.uniform(0, 2 * np.pi, 4 * count)
    kept = np.flatnonzero(rng.random(4 * count) * (1 + tube) < 1 + tube * np.cos(around))[:count]  # equal area
    around, along = around[kept], rng.uniform(0, 2 * np.pi, len(kept))
    radius = 1 + tube * np.cos(around)
    return np.stack([radius * np.cos(along), radius * np.sin(along), tube * np.sin(around)], 1)


def _plane(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.uniform(-1, 1, (count, 3)) * [1, rng.uniform(0.4, 1), 0]


SURFACES: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "sphere": _sphere,
    "ellipsoid": _ellipsoid,
    "box": _box,
    "cylinder": _cylinder,
    "cone": _cone,
    "pyramid": _pyramid,
    "torus": _torus,
    "plane": _plane,
}
"""Draw so many points of a surface, whose proportions are drawn as well."""


class ShapesTask(Task):
    """Which surface do these points lie on? Eight parametric surfaces, or one class for each subfolder of your own.

    A batch is `coordinates` (N, 3) float, each cloud centred and scaled into the unit ball; `features` (N, in_channels)
    float, the coordinates followed by further columns of the files; `offsets` (B + 1,) int64; `label` (B,) int64.
    A model is called as `model(features=..., coordinates=..., offsets=...)` and returns logits (B, num_classes).
    Metric: `accuracy`.

    Args:
        points: most points of a cloud; an item has between half of it and all of it.
        noise: standard deviation of the points off their surface, in radii of the shape.
        occlusion: up to this share of a shape is cut away from one side.
        data: a folder with a subfolder for each class, of .npy files (n, 3 or more columns, x y z first), .ply files
            (vertex x y z) or .bin files (float32, x y z intensity). A fifth of each class, drawn by the seed, is for
            evaluation. Clouds with more than `points` points are thinned at random; noise, occlusion and rotation are
            not applied to them.
        train_items, eval_items: sizes of the generated sets (a folder decides for itself).
        seed: of everything that is drawn.
    """

    name = "shapes"
    metric = "accuracy"
    train_set: Generated
    eval_set: Generated

    def __init__(
        self,
        *,
        points: int = 512,
        noise: float = 0.02,
        occlusion: float = 0.3,
        data: str | Path | None = None,
        train_items: int = 8000,
        eval_items: int = 800,
        seed: int = 0,
    ) -> None:
        self.points = whole("points", points, 16)
        self.noise, self.occlusion = fraction("noise", noise), fraction("occlusion", occlusion)
        whole("train_items", train_items)
        whole("eval_items", eval_items)
        whole("seed", seed, 0)
        self.data = None if data is None else Path(data)
        self.in_channels = 3
        if self.data is None:
            self.class_names = list(SURFACES)
            self.labels = {"train": np.arange(train_items) % 8, "eval": np.arange(eval_items) % 8}
            self.train_set = Generated(partial(self._generated, "train"), train_items, seed, TRAIN)
            self.eval_set = Generated(partial(self._generated, "eval"), eval_items, seed, EVAL)
        else:
            self.class_names, files = _class_files(self.data)
            columns = {file: read_cloud(file).shape[1] for group in files for file in group}
            first = files[0][0]
            for file, count in columns.items():
                if count != columns[first]:
                    raise ValueError(f"{file} has {count} columns, but {first} has {columns[first]}: make them equal.")
            self.in_channels = columns[first]
            parts = [divide(group, seed, label) for label, group in enumerate(files)]
            self.files, self.labels = {}, {}
            for slot, part in enumerate(("train", "eval")):
                self.files[part] = [file for groups in parts for file in groups[slot]]
                self.labels[part] = np.repeat(np.arange(len(parts)), [len(groups[slot]) for groups in parts])
            self.train_set = Generated(partial(self._stored, "train"), len(self.files["train"]), seed, TRAIN)
            self.eval_set = Generated(partial(self._stored, "eval"), len(self.files["eval"]), seed, EVAL)
        self.num_classes = len(self.class_names)

    def _generated(self, part: str, rng: np.random.Generator, index: int) -> dict[str, Tensor]:
        label = self.labels[part][index]
        count, hidden = rng.integers(self.points // 2, self.points + 1), rng.uniform(0, self.occlusion)
        points = SURFACES[self.class_names[label]](rng, int(np.ceil(count / (1 - hidden))))
        points = into_unit_ball(points)
        depth = points @ _sphere(rng, 1)[0]
        points = points[np.argsort(depth)[:count]]  # the points behind a plane are hidden
        points = points + self.noise * rng.normal(size=points.shape)
        points = points[rng.permutation(len(points))] @ Rotation.from_quat(rng.normal(size=4)).as_matrix()
        return self._item(points, label)

    def _stored(self, part: str, rng: np.random.Generator, index: int) -> dict[str, Tensor]:
        points = read_cloud(self.files[part][index])
        if len(points) > self.points:
            points = points[np.sort(rng.choice(len(points), self.points, replace=False))]
        return self._item(points, self.labels[part][index])

    def _item(self, points: np.ndarray, label: int) -> dict[str, Tensor]:
        coordinates = into_unit_ball(points[:, :3])
        features = np.concatenate([coordinates, points[:, 3:]], 1)
        return {
            "coordinates": torch.from_numpy(coordinates.astype(np.float32)),
            "features": torch.from_numpy(features.astype(np.float32)),
            "label": torch.tensor(int(label)),
        }

    def collate(self, items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Put clouds one after the other."""
        return {
            "coordinates": torch.cat([item["coordinates"] for item in items]),
            "features": torch.cat([item["features"] for item in items]),
            "offsets": offsets_of([item["coordinates"] for item in items]),
            "label": torch.stack([item["label"] for item in items]),
        }

    def _logits(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = model(features=batch["features"], coordinates=batch["coordinates"], offsets=batch["offsets"])
        expected = (len(batch["label"]), self.num_classes)
        if logits.shape != expected:
            raise ValueError(f"the model must return logits (B, classes) = {expected}, got {tuple(logits.shape)}.")
        return logits

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Mean cross-entropy over the clouds."""
        return F.cross_entropy(self._logits(model, batch), batch["label"])

    def metrics(self) -> dict[str, Metric]:
        return {"accuracy": MulticlassAccuracy(self.num_classes, average="micro")}

    def update(self, metrics: Mapping[str, Metric], model: nn.Module, batch: dict[str, Tensor]) -> None:
        metrics["accuracy"].update(self._logits(model, batch), batch["label"])

    def trivial(self) -> dict[str, float]:
        said = np.bincount(self.labels["train"]).argmax()
        return {"accuracy": float((self.labels["eval"] == said).mean())}

    @property
    def trivial_answer(self) -> str:
        return "most frequent class"

    @property
    def description(self) -> str:
        if self.data is not None:
            return f"Point clouds of {self.data.name} in {self.num_classes} classes, up to {self.points} points each."
        return (
            f"{self.points // 2} to {self.points} noisy points on a surface in any pose, up to {self.occlusion:.0%} of "
            f"it hidden: which of {self.num_classes} surfaces?"
        )


def into_unit_ball(points: np.ndarray) -> np.ndarray:
    """Points (n, 3), centred at their mean and scaled so that the farthest has distance 1."""
    points = points - points.mean(0)
    return points / max(np.linalg.norm(points, axis=1).max(), 1e-12)


def _class_files(folder: Path) -> tuple[list[str], list[list[Path]]]:
    """Names of the subfolders that hold clouds, in order, and their files."""
    if not folder.is_dir():
        raise FileNotFoundError(f"data: there is no folder {folder}.")
    classes = {}
    for sub in sorted(path for path in folder.iterdir() if path.is_dir()):
        files = cloud_files(sub)
        if len(files) == 1:
            raise ValueError(f"{sub} holds one cloud: a class takes at least two, one of them for evaluation.")
        if files:
            classes[sub.name] = files
    if len(classes) < 2:
        raise ValueError(
            f"{folder} must hold a subfolder for each class, at least two, with .npy or .ply files in it; found "
            f"{sorted(classes) or 'none'}."
        )
    return list(classes), list(classes.values())
