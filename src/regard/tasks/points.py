"""Point clouds in three dimensions: naming shapes (`shapes`), and finding road users in lidar scenes (`detection`).

Batches are ragged: the points of all items stand one after the other, and `offsets` (B + 1,) int64 says that item b has
the points `offsets[b]` to `offsets[b + 1] - 1`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plyfile import PlyData, PlyParseError
from scipy import ndimage
from scipy.spatial.transform import Rotation
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from regard.checks import positive
from regard.tasks.base import EVAL, SPLIT, TRAIN, Generated, Task, fraction, unwrapped, whole


def offsets_of(clouds: Sequence[Tensor]) -> Tensor:
    """Where each of the clouds (n_b, ...) begins in their concatenation: (B + 1,) int64."""
    return F.pad(torch.tensor([len(cloud) for cloud in clouds]).cumsum(0), (1, 0))


# ---------------------------------------------------------------------------------------------- shapes


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


_SURFACES: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "sphere": _sphere,
    "ellipsoid": _ellipsoid,
    "box": _box,
    "cylinder": _cylinder,
    "cone": _cone,
    "pyramid": _pyramid,
    "torus": _torus,
    "plane": _plane,
}


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
        data: a folder with a subfolder for each class, of .npy files (n, 3 or more columns, x y z first) or .ply files
            (vertex x y z). A fifth of each class, drawn by the seed, is for evaluation. Clouds with more than `points`
            points are thinned at random; noise, occlusion and rotation are not applied to them.
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
            self.class_names = list(_SURFACES)
            self.labels = {"train": np.arange(train_items) % 8, "eval": np.arange(eval_items) % 8}
            self.train_set = Generated(partial(self._generated, "train"), train_items, seed, TRAIN)
            self.eval_set = Generated(partial(self._generated, "eval"), eval_items, seed, EVAL)
        else:
            self.class_names, files = _class_files(self.data)
            columns = {file: _read_cloud(file).shape[1] for group in files for file in group}
            first = files[0][0]
            for file, count in columns.items():
                if count != columns[first]:
                    raise ValueError(f"{file} has {count} columns, but {first} has {columns[first]}: make them equal.")
            self.in_channels = columns[first]
            self.files, self.labels = _split_files(files, seed)
            self.train_set = Generated(partial(self._stored, "train"), len(self.files["train"]), seed, TRAIN)
            self.eval_set = Generated(partial(self._stored, "eval"), len(self.files["eval"]), seed, EVAL)
        self.num_classes = len(self.class_names)

    def _generated(self, part: str, rng: np.random.Generator, index: int) -> dict[str, Tensor]:
        label = self.labels[part][index]
        count, hidden = rng.integers(self.points // 2, self.points + 1), rng.uniform(0, self.occlusion)
        points = _SURFACES[self.class_names[label]](rng, int(np.ceil(count / (1 - hidden))))
        points = _into_unit_ball(points)
        depth = points @ _sphere(rng, 1)[0]
        points = points[np.argsort(depth)[:count]]  # the points behind a plane are hidden
        points = points + self.noise * rng.normal(size=points.shape)
        points = points[rng.permutation(len(points))] @ Rotation.from_quat(rng.normal(size=4)).as_matrix()
        return self._item(points, label)

    def _stored(self, part: str, rng: np.random.Generator, index: int) -> dict[str, Tensor]:
        points = _read_cloud(self.files[part][index])
        if len(points) > self.points:
            points = points[np.sort(rng.choice(len(points), self.points, replace=False))]
        return self._item(points, self.labels[part][index])

    def _item(self, points: np.ndarray, label: int) -> dict[str, Tensor]:
        coordinates = _into_unit_ball(points[:, :3])
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


def _into_unit_ball(points: np.ndarray) -> np.ndarray:
    points = points - points.mean(0)
    return points / max(np.linalg.norm(points, axis=1).max(), 1e-12)


def _class_files(folder: Path) -> tuple[list[str], list[list[Path]]]:
    """Names of the subfolders that hold clouds, in order, and their files."""
    if not folder.is_dir():
        raise FileNotFoundError(f"data: there is no folder {folder}.")
    classes = {}
    for sub in sorted(path for path in folder.iterdir() if path.is_dir()):
        files = sorted(path for path in sub.iterdir() if path.suffix.lower() in (".npy", ".ply"))
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


def _split_files(files: list[list[Path]], seed: int) -> tuple[dict[str, list[Path]], dict[str, np.ndarray]]:
    """A fifth of each class, at least one file, for evaluation: files and labels of the two parts."""
    parts: dict[str, list[Path]] = {"train": [], "eval": []}
    labels: dict[str, list[int]] = {"train": [], "eval": []}
    for label, group in enumerate(files):
        order = np.random.default_rng((seed, SPLIT, label)).permutation(len(group))
        held = max(1, len(group) // 5)
        for rank, index in enumerate(order):
            part = "eval" if rank < held else "train"
            parts[part].append(group[index])
            labels[part].append(label)
    return parts, {part: np.array(values) for part, values in labels.items()}


def _read_cloud(file: Path) -> np.ndarray:
    """A cloud (n, 3 or more) float64 from an .npy or .ply file."""
    try:
        if file.suffix.lower() == ".ply":
            vertex = PlyData.read(str(file))["vertex"]
            points = np.stack([vertex[axis] for axis in "xyz"], 1)
        else:
            points = np.load(file, allow_pickle=False)
    except (PlyParseError, ValueError, OSError, EOFError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read as a point cloud: {error}") from error
    if not isinstance(points, np.ndarray) or points.dtype.kind not in "fiu" or points.ndim != 2 or points.shape[1] < 3:
        raise ValueError(f"{file} must hold numbers of shape (n, 3 or more), got {getattr(points, 'shape', None)}.")
    if not len(points) or not np.isfinite(points).all():
        raise ValueError(f"{file} " + ("holds coordinates that are not finite." if len(points) else "holds no point."))
    return points.astype(np.float64)


# ---------------------------------------------------------------------------------------------- detection

CLASSES = ("vehicle", "pedestrian", "cyclist")
_SIZES = np.array([[4.5, 1.9, 1.6], [0.6, 0.6, 1.7], [1.8, 0.6, 1.7]])  # metres, of each class
_SHARES = (0.5, 0.25, 0.25)  # how often each class is drawn
_CLUTTER = np.array([[0.3, 0.3, 4.0], [8.0, 0.3, 2.0], [1.2, 1.2, 0.9]])  # metres: pole, wall, hedge
_SENSOR = np.array([0.0, 0.0, 1.8])  # metres, the ground is z = 0
_RAISED = 0.3  # metres, above which a point is not of the ground for the rules that learn nothing


def cast_rays(directions: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first thing that each ray from the sensor meets: a box, or the ground.

    Args:
        directions: (R, 3), unit vectors.
        boxes: (K, 7), centre x y z, length, width, height (metres), yaw (radians).

    Returns:
        distance (R,) in metres, infinite where there is nothing, and index (R,) of the box, -1 for the ground.
    """
    down = directions[:, 2] < 0
    distance = np.divide(-_SENSOR[2], directions[:, 2], out=np.full(len(directions), np.inf), where=down)
    met = np.full(len(directions), -1)
    for index, (x, y, z, *size, yaw) in enumerate(boxes):
        ahead = directions[:, 0] * x + directions[:, 1] * y
        aside = directions[:, 0] * y - directions[:, 1] * x
        reach = np.hypot(size[0], size[1]) / 2
        rays = np.flatnonzero((np.abs(aside) <= reach) & (ahead > -reach))  # the others pass by
        cos, sin = np.cos(yaw), np.sin(yaw)
        turn = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])  # into the frame of the box
        origin, step = turn @ (_SENSOR - (x, y, z)), directions[rays] @ turn.T
        step = np.where(np.abs(step) < 1e-12, 1e-12, step)
        near, far = (-np.array(size) / 2 - origin) / step, (np.array(size) / 2 - origin) / step  # planes of the faces
        enter, leave = np.minimum(near, far).max(1), np.maximum(near, far).min(1)
        first = (enter <= leave) & (enter > 0) & (enter < distance[rays])
        distance[rays[first]], met[rays[first]] = enter[first], index
    return distance, met


class DetectionTask(Task):
    """Find vehicles, pedestrians and cyclists in the points of a simulated lidar.

    A lidar at the origin, 1.8 m above flat ground, sends `beams` x `azimuths` rays; each returns the first box or the
    ground that it meets, so that points form rings that thin out with distance and things hide what is behind them.
    Poles, walls and hedges stand about and are no answer. An object that fewer than `min_points` rays meet is left out,
    with its points.

    A batch is `points` (N, 4) float: x, y, z in metres and intensity from 0 to 1; `offsets` (B + 1,) int64; `boxes`
    (B, K, 7) float: centre x, y, z, length, width, height in metres, yaw in radians, zero past `counts` (B,) int64;
    `labels` (B, K) int64, indices of `class_names`, -1 past `counts`.

    A detector owns its targets and its decoding: `model(points, offsets)` returns predictions of any kind,
    `model.loss(predictions, batch)` a scalar, and `model.decode(predictions)` a list of B dictionaries with `boxes`
    (D, 7), `scores` (D,) and `labels` (D,).

    Metrics: `ap`, average precision by distance of centres (see `AveragePrecision`), the mean over the classes, and the
    same for each class as `ap_vehicle` and so on.

    Args:
        extent: points and objects have |x| and |y| below it, in metres.
        beams, azimuths: rays of the lidar, up-down and around.
        objects: most road users of a scene; between a third of it and all of it are drawn.
        clutter: most other things of a scene.
        min_points: fewest points of an object that is to be found.
        train_items, eval_items: sizes of the two sets.
        seed: of everything that is drawn.
    """

    name = "detection"
    metric = "ap"
    class_names = CLASSES
    num_classes = len(CLASSES)
    in_channels = 4
    train_set: Generated
    eval_set: Generated

    def __init__(
        self,
        *,
        extent: float = 20.0,
        beams: int = 20,
        azimuths: int = 300,
        objects: int = 10,
        clutter: int = 6,
        min_points: int = 4,
        train_items: int = 2000,
        eval_items: int = 100,
        seed: int = 0,
    ) -> None:
        positive("extent", extent)
        if extent < 8:
            raise ValueError(f"extent must be at least 8 metres for objects to have room, got {extent}.")
        self.extent, self.min_points = float(extent), whole("min_points", min_points)
        self.beams, self.azimuths = whole("beams", beams, 2), whole("azimuths", azimuths, 8)
        self.objects, self.clutter = whole("objects", objects), whole("clutter", clutter, 0)
        self.point_range = (-self.extent, -self.extent, -0.5, self.extent, self.extent, 5.0)
        whole("seed", seed, 0)
        self.train_set = Generated(self._scene, whole("train_items", train_items), seed, TRAIN)
        self.eval_set = Generated(self._scene, whole("eval_items", eval_items), seed, EVAL)

    def _scene(self, rng: np.random.Generator, index: int) -> dict[str, Tensor]:
        boxes, labels = self._things(rng)
        up = np.radians(np.linspace(-24, 2, self.beams))[:, None]
        around = (np.arange(self.azimuths) + rng.random()) * 2 * np.pi / self.azimuths
        rays = np.stack(np.broadcast_arrays(np.cos(up) * np.cos(around), np.cos(up) * np.sin(around), np.sin(up)), -1)
        rays = rays.reshape(-1, 3)
        distance, hit = cast_rays(rays, boxes)
        back = np.isfinite(distance) & (rng.random(len(rays)) > 0.05)  # one ray in twenty is lost
        rays, distance, hit = rays[back], distance[back], hit[back]
        points = _SENSOR + rays * (distance + 0.02 * rng.normal(size=len(rays)))[:, None]
        shine = np.append(rng.uniform(0.1, 0.9, len(boxes)), 0.2)[hit]  # the last entry is the ground
        intensity = np.clip(shine + 0.05 * rng.normal(size=len(rays)), 0, 1)
        seen = (np.abs(points[:, :2]) < self.extent).all(1)
        hits = np.bincount(hit[seen & (hit >= 0)], minlength=len(boxes))
        found = (hits >= self.min_points) & (labels >= 0)
        seen &= ~np.append((labels >= 0) & ~found, False)[hit]
        cloud = np.concatenate([points, intensity[:, None]], 1)[seen]
        return {
            "points": torch.from_numpy(cloud.astype(np.float32)),
            "boxes": torch.from_numpy(boxes[found].astype(np.float32)),
            "labels": torch.from_numpy(labels[found]),
        }

    def _things(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Boxes (K, 7) on the ground that do not touch each other or the sensor, and labels (K,), -1 for clutter."""
        wanted = rng.choice(3, rng.integers(max(1, self.objects // 3), self.objects + 1), p=_SHARES).tolist()
        wanted += [-1] * int(rng.integers(0, self.clutter + 1))
        boxes, labels = np.zeros((0, 7)), []
        for label in wanted:
            size = (_SIZES[label] if label >= 0 else rng.choice(_CLUTTER)) * rng.uniform(0.85, 1.15, 3)
            reach = np.hypot(*size[:2]) / 2
            for _ in range(20):
                x, y = rng.uniform(-1, 1, 2) * (self.extent - reach)
                apart = (
                    np.hypot(boxes[:, 0] - x, boxes[:, 1] - y) > reach + np.hypot(boxes[:, 3], boxes[:, 4]) / 2 + 0.3
                )
                if apart.all() and np.hypot(x, y) > reach + 2:
                    boxes = np.vstack([boxes, [x, y, size[2] / 2, *size, rng.uniform(-np.pi, np.pi)]])
                    labels.append(label)
                    break
        return boxes, np.array(labels, np.int64)

    def collate(self, items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Put clouds one after the other and pad the boxes."""
        return {
            "points": torch.cat([item["points"] for item in items]),
            "offsets": offsets_of([item["points"] for item in items]),
            "boxes": pad_sequence([item["boxes"] for item in items], batch_first=True),
            "labels": pad_sequence([item["labels"] for item in items], batch_first=True, padding_value=-1),
            "counts": torch.tensor([len(item["labels"]) for item in items]),
        }

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """What the detector itself says of its predictions."""
        predictions = model(batch["points"], batch["offsets"])
        return unwrapped(model).loss(predictions, batch)

    def metrics(self) -> dict[str, Metric]:
        alone = {f"ap_{name}": AveragePrecision([label]) for label, name in enumerate(CLASSES)}
        return {"ap": AveragePrecision(range(len(CLASSES))), **alone}

    def update(self, metrics: Mapping[str, Metric], model: nn.Module, batch: dict[str, Tensor]) -> None:
        detections = unwrapped(model).decode(model(batch["points"], batch["offsets"]))
        if len(detections) != len(batch["counts"]):
            raise ValueError(f"model.decode must return {len(batch['counts'])} scenes, got {len(detections)}.")
        for one, boxes, labels, count in zip(detections, batch["boxes"], batch["labels"], batch["counts"], strict=True):
            for metric in metrics.values():
                metric.update(one, boxes[:count], labels[:count])

    @cached_property
    def _mean_sizes(self) -> Tensor:
        """Mean length, width and height of each class over the first training scenes: (3, 3)."""
        scenes = [self.train_set[index] for index in range(min(50, len(self.train_set)))]
        boxes, labels = torch.cat([s["boxes"] for s in scenes]), torch.cat([s["labels"] for s in scenes])
        return torch.stack([boxes[labels == label, 3:6].mean(0) for label in range(len(CLASSES))]).nan_to_num(1.0)

    def densest_pillars(self, points: Tensor, count: int = 20) -> dict[str, Tensor]:
        """Detections by a rule: the metre-square pillars of points (n, 4) with most points above the ground.

        Each of the `count` pillars is said to be of every class, at the mean of its points, with its share as score.
        """
        raised = points[points[:, 2] > _RAISED]
        pillars, member, size = raised[:, :2].floor().unique(dim=0, return_inverse=True, return_counts=True)
        centres = torch.zeros(len(pillars), 3).index_add_(0, member, raised[:, :3]) / size[:, None]
        best = size.argsort(descending=True, stable=True)[:count]
        labels = torch.arange(len(CLASSES)).repeat_interleave(len(best))
        centres, scores = centres[best].repeat(len(CLASSES), 1), (size[best] / len(points)).repeat(len(CLASSES))
        boxes = torch.cat([centres, self._mean_sizes[labels], torch.zeros(len(labels), 1)], 1)
        return {"boxes": boxes, "scores": scores, "labels": labels}

    def clusters(self, points: Tensor, cell: float = 0.5) -> dict[str, Tensor]:
        """Detections by a rule: touching cells with points above the ground are a thing, of the class nearest in size.

        Cells are squares of side `cell` metres. The box is centred on the extent of the thing's points (n, 4); the
        score falls with the difference d of that extent from the mean size of the class, as exp(-d / metre).
        """
        raised = points[points[:, 2] > _RAISED, :3].double().numpy()
        rows, columns = ((raised[:, :2] + self.extent) / cell).astype(int).T
        taken = np.zeros((int(2 * self.extent / cell) + 1,) * 2, bool)
        taken[rows, columns] = True
        things, count = ndimage.label(taken, np.ones((3, 3)))
        member = things[rows, columns] - 1
        low, high = np.full((count, 3), np.inf), np.full((count, 3), -np.inf)
        np.minimum.at(low, member, raised)
        np.maximum.at(high, member, raised)
        size = high - low
        size = np.stack([size[:, :2].max(1), size[:, :2].min(1), high[:, 2]], 1)
        off = np.linalg.norm(size[:, None] - self._mean_sizes.numpy(), axis=-1)
        labels = torch.from_numpy(off.argmin(1))
        centres = torch.from_numpy((low + high) / 2).float()
        boxes = torch.cat([centres, self._mean_sizes[labels], torch.zeros(count, 1)], 1)
        return {"boxes": boxes, "scores": torch.from_numpy(np.exp(-off.min(1))), "labels": labels}

    @cached_property
    def baselines(self) -> dict[str, dict[str, float]]:
        """The metrics of two rules that know no more than the mean size of each class."""
        results = {}
        for name, rule in (("densest pillars", self.densest_pillars), ("clusters by size", self.clusters)):
            metrics = self.metrics()
            for index in range(len(self.eval_set)):
                scene = self.eval_set[index]
                said = rule(scene["points"])
                for metric in metrics.values():
                    metric.update(said, scene["boxes"], scene["labels"])
            results[name] = {key: float(metric.compute()) for key, metric in metrics.items()}
        return results

    def trivial(self) -> dict[str, float]:
        return dict(self.baselines[self.trivial_answer])

    @property
    def trivial_answer(self) -> str:
        return "clusters by size"

    @property
    def description(self) -> str:
        return (
            f"Simulated lidar of {self.beams} x {self.azimuths} rays within {self.extent:g} m: find up to "
            f"{self.objects} vehicles, pedestrians and cyclists among poles, walls and hedges."
        )


class AveragePrecision(Metric):
    """Average precision of boxes by distance of centres in the ground plane, after the nuScenes benchmark.

    For each class and each distance d of `thresholds` (metres): detections, best score first, take the nearest box of
    their class in their scene that nobody took yet; closer than d is a hit. Precision is interpolated linearly at
    recalls 0.01, 0.02 ... 1, and is 0 beyond the highest recall reached; recalls up to 0.1 are left out, precision
    counts from 0.1 upwards, and the mean is scaled to 1 for perfect detection. The result is the mean over thresholds,
    and over those of `classes` that occur in the truth.
    """

    full_state_update = False
    scores: list[Tensor]
    labels: list[Tensor]
    hits: list[Tensor]
    truths: Tensor

    def __init__(
        self, classes: Sequence[int], thresholds: Sequence[float] = (0.5, 1.0, 2.0), most_per_scene: int = 500
    ) -> None:
        super().__init__()
        self.classes, self.thresholds, self.most_per_scene = list(classes), list(thresholds), most_per_scene
        self.add_state("scores", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")
        self.add_state("hits", [], dist_reduce_fx="cat")
        self.add_state("truths", torch.zeros(len(self.classes), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, detections: Mapping[str, Any], boxes: Tensor, labels: Tensor) -> None:
        """Add one scene.

        Args:
            detections: `boxes` (D, 2 or more), x and y first, `scores` (D,) and `labels` (D,).
            boxes: (K, 2 or more), the truth, with its `labels` (K,).
        """
        said, scores = detections["boxes"][:, :2].detach(), detections["scores"].detach()
        best = scores.argsort(descending=True, stable=True)[: self.most_per_scene]
        for slot, label in enumerate(self.classes):
            mine = best[detections["labels"][best] == label]
            truth = boxes[labels == label][:, :2]
            self.truths[slot] += len(truth)
            hits = self._match(said[mine].double().cpu().numpy(), truth.double().cpu().numpy())
            self.scores.append(scores[mine].float())
            self.labels.append(torch.full_like(mine, label))
            self.hits.append(torch.from_numpy(hits).to(scores.device))

    def _match(self, said: np.ndarray, truth: np.ndarray) -> np.ndarray:
        """Whether each of `said` (D, 2), best first, takes one of `truth` (K, 2), for each threshold: (D, T) bool."""
        hits = np.zeros((len(said), len(self.thresholds)), bool)
        if not len(truth):
            return hits
        distances = np.linalg.norm(said[:, None] - truth[None], axis=-1)
        for column, threshold in enumerate(self.thresholds):
            free = np.ones(len(truth), bool)
            for row in np.flatnonzero(distances.min(1) < threshold):
                nearest = np.where(free, distances[row], np.inf).argmin()
                if free[nearest] and distances[row, nearest] < threshold:
                    hits[row, column], free[nearest] = True, False
        return hits

    def compute(self) -> Tensor:
        def gathered(state: Any) -> np.ndarray:
            return (torch.cat(state) if isinstance(state, list) else state).cpu().numpy()

        values = []
        if self.truths.sum() > 0:
            scores, labels, hits = gathered(self.scores), gathered(self.labels), gathered(self.hits)
            for label, truths in zip(self.classes, self.truths.tolist(), strict=True):
                if truths:
                    mine = labels == label
                    order = np.argsort(-scores[mine], kind="stable")
                    values += [average_precision(column, truths) for column in hits[mine][order].T]
        return torch.tensor(float(np.mean(values)) if values else 0.0, device=self.truths.device)


def average_precision(hits: np.ndarray, truths: int, floor: float = 0.1) -> float:
    """Area under precision over recall above `floor` in both, scaled to at most 1.

    Args:
        hits: (D,) bool, whether each detection is right, best score first.
        truths: how many there are to find.
    """
    if not len(hits):
        return 0.0
    found = np.cumsum(hits)
    recalls = np.linspace(0, 1, 101)
    precision = np.interp(recalls, found / truths, found / np.arange(1, len(hits) + 1), right=0)
    above = np.clip(precision[recalls > floor + 1e-9] - floor, 0, None)
    return float(above.mean() / (1 - floor))
