"""Finding things in clouds of points: road users in simulated lidar, or what is labelled in your own scenes (`detection`)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchmetrics import Metric

from regard.tasks.average_precision import AveragePrecision
from regard.tasks.base import EVAL, TRAIN, Generated, Task, whole
from regard.tasks.labelled_clouds import LabelledCloud, find_labelled_clouds
from regard.tasks.lidar import CLASSES, LidarScenes
from regard.tasks.points import offsets_of, read_cloud

_RAISED = 0.3  # metres, above which a point is not of the ground for the rules that learn nothing


class DetectionTask(Task):
    """Find vehicles, pedestrians and cyclists in the points of a simulated lidar, or the objects of your own scenes.

    A lidar at the origin, 1.8 m above flat ground, sends `beams` x `azimuths` rays; each returns the first box or the
    ground that it meets, so that points form rings that thin out with distance and things hide what is behind them.
    Poles, walls and hedges stand about and are no answer. An object that fewer than `min_points` rays meet is left out,
    with its points. Boxes look the same after half a turn, so the yaw is given within half a circle, from -pi/2 to pi/2.

    A batch is `points` (N, in_channels) float: x, y, z in metres and intensity from 0 to 1, or the columns of your files;
    `offsets` (B + 1,) int64; `boxes` (B, K, 7) float: centre x, y, z, length, width, height in metres, yaw in radians,
    zero past `counts` (B,) int64; `labels` (B, K) int64, indices of `class_names`, -1 past `counts`.

    A detector owns its targets and its decoding: `model(points, offsets)` returns predictions of any kind,
    `model.loss(predictions, batch)` a scalar, and `model.decode(predictions)` a list of B dictionaries with `boxes`
    (D, 7), `scores` (D,) and `labels` (D,). It is built for the box `point_range` (x y z lowest, then highest).

    Metrics: `ap`, average precision by distance of centres (see `AveragePrecision`), the mean over the classes, and the
    same for each class as `ap_vehicle` and so on.

    Args:
        extent, beams, azimuths, objects, clutter, min_points: of the simulated scenes, see `regard.tasks.lidar.LidarScenes`.
        data: a folder of your own scenes in place of simulated ones: points/NAME.npy and labels/NAME.txt, see
            `regard.tasks.labelled_clouds`. Classes are those of the labels; `point_range` is where the objects of the training
            scenes are, a metre more on every side, and points outside are for the detector to leave out.
        train_items, eval_items: sizes of the two generated sets (a folder decides for itself).
        seed: of everything that is drawn.
    """

    name = "detection"
    metric = "ap"
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
        data: str | Path | None = None,
        train_items: int = 2000,
        eval_items: int = 100,
        seed: int = 0,
    ) -> None:
        whole("train_items", train_items)
        whole("eval_items", eval_items)
        whole("seed", seed, 0)
        self.data = None if data is None else Path(data)
        self.scenes = LidarScenes(extent, beams, azimuths, objects, clutter, min_points)
        self.class_names, self.in_channels, self.ground = list(CLASSES), 4, 0.0
        self.point_range: tuple[float, ...] = (-float(extent), -float(extent), -0.5, float(extent), float(extent), 5.0)
        if self.data is None:
            self.train_set = Generated(self._drawn, train_items, seed, TRAIN)
            self.eval_set = Generated(self._drawn, eval_items, seed, EVAL)
        else:
            train, held = find_labelled_clouds(self.data, seed)
            self._measure(train, held)
            self.train_set = Generated(partial(self._stored, train), len(train), seed, TRAIN)
            self.eval_set = Generated(partial(self._stored, held), len(held), seed, EVAL)
        self.num_classes = len(self.class_names)

    def _measure(self, train: list[LabelledCloud], held: list[LabelledCloud]) -> None:
        """Classes, columns, ground and range of the user's scenes."""
        boxes = np.concatenate([scene.boxes for scene in train])
        if not len(boxes) or not any(scene.names for scene in held):
            raise ValueError(
                f"{self.data}: the labels of the {'evaluation' if len(boxes) else 'training'} scenes are empty."
            )
        self.class_names = sorted({name for scene in [*train, *held] for name in scene.names})
        self.in_channels = read_cloud(train[0].cloud).shape[1]
        self.ground = float(np.median(boxes[:, 2] - boxes[:, 5] / 2))
        reach = np.hypot(boxes[:, 3], boxes[:, 4])[:, None] / 2
        reach = np.concatenate([reach, reach, boxes[:, 5:6] / 2], 1)
        low, high = (boxes[:, :3] - reach).min(0), (boxes[:, :3] + reach).max(0)
        self.point_range = tuple(map(float, [*np.floor(low - 1), *np.ceil(high + 1)]))

    def _drawn(self, rng: np.random.Generator, index: int) -> dict[str, Tensor]:
        return _item(*self.scenes.draw(rng))

    def _stored(self, scenes: list[LabelledCloud], rng: np.random.Generator, index: int) -> dict[str, Tensor]:
        cloud, boxes, names = scenes[index]
        points = read_cloud(cloud)
        if points.shape[1] != self.in_channels:
            raise ValueError(f"{cloud} has {points.shape[1]} columns, others {self.in_channels}: make them equal.")
        return _item(points, boxes, np.array([self.class_names.index(name) for name in names], np.int64))

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
        return model.loss(predictions, batch)

    def metrics(self) -> dict[str, Metric]:
        alone = {f"ap_{name}": AveragePrecision([label]) for label, name in enumerate(self.class_names)}
        return {"ap": AveragePrecision(range(self.num_classes)), **alone}

    def update(self, metrics: Mapping[str, Metric], model: nn.Module, batch: dict[str, Tensor]) -> None:
        detections = model.decode(model(batch["points"], batch["offsets"]))
        if len(detections) != len(batch["counts"]):
            raise ValueError(f"model.decode must return {len(batch['counts'])} scenes, got {len(detections)}.")
        for one, boxes, labels, count in zip(detections, batch["boxes"], batch["labels"], batch["counts"], strict=True):
            for metric in metrics.values():
                metric.update(one, boxes[:count], labels[:count])

    @cached_property
    def _mean_sizes(self) -> Tensor:
        """Mean length, width and height of each class over the first training scenes: (classes, 3)."""
        scenes = [self.train_set[index] for index in range(min(50, len(self.train_set)))]
        boxes, labels = torch.cat([s["boxes"] for s in scenes]), torch.cat([s["labels"] for s in scenes])
        return torch.stack([boxes[labels == label, 3:6].mean(0) for label in range(self.num_classes)]).nan_to_num(1.0)

    def _raised(self, points: Tensor) -> Tensor:
        """Of points (n, 3 or more), x y z of those in the range that are not of the ground."""
        xyz, low, high = points[:, :3], points.new_tensor(self.point_range[:3]), points.new_tensor(self.point_range[3:])
        return xyz[((xyz >= low) & (xyz < high)).all(1) & (xyz[:, 2] > self.ground + _RAISED)]

    def densest_pillars(self, points: Tensor, count: int = 20) -> dict[str, Tensor]:
        """Detections by a rule: the metre-square pillars of points (n, 3 or more) with most points above the ground.

        Each of the `count` pillars is said to be of every class, at the mean of its points, with its share as score.
        """
        raised = self._raised(points)
        pillars, member, size = raised[:, :2].floor().unique(dim=0, return_inverse=True, return_counts=True)
        centres = torch.zeros(len(pillars), 3).index_add_(0, member, raised) / size[:, None]
        best = size.argsort(descending=True, stable=True)[:count]
        labels = torch.arange(self.num_classes).repeat_interleave(len(best))
        centres, scores = centres[best].repeat(self.num_classes, 1), (size[best] / len(points)).repeat(self.num_classes)
        boxes = torch.cat([centres, self._mean_sizes[labels], torch.zeros(len(labels), 1)], 1)
        return {"boxes": boxes, "scores": scores, "labels": labels}

    def clusters(self, points: Tensor, cell: float = 0.5) -> dict[str, Tensor]:
        """Detections by a rule: touching cells with points above the ground are a thing, of the class nearest in size.

        Cells are squares of side `cell` metres. The box is centred on the extent of the thing's points (n, 3 or more);
        the score falls with the difference d of that extent from the mean size of the class, as exp(-d / metre).
        """
        raised = self._raised(points).double().numpy()
        low_x, low_y, _, high_x, high_y, _ = self.point_range
        rows, columns = ((raised[:, :2] - (low_x, low_y)) / cell).astype(int).T
        taken = np.zeros((int((high_x - low_x) / cell) + 1, int((high_y - low_y) / cell) + 1), bool)
        taken[rows, columns] = True
        things, count = ndimage.label(taken, np.ones((3, 3)))
        member = things[rows, columns] - 1
        low, high = np.full((count, 3), np.inf), np.full((count, 3), -np.inf)
        np.minimum.at(low, member, raised)
        np.maximum.at(high, member, raised)
        size = high - low
        size = np.stack([size[:, :2].max(1), size[:, :2].min(1), high[:, 2] - self.ground], 1)
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
        if self.data is not None:
            sides = [self.point_range[axis + 3] - self.point_range[axis] for axis in (0, 1)]
            return (
                f"Scenes of {self.data.name}, {len(self.train_set)} for training: find {', '.join(self.class_names)} within "
                f"{sides[0]:g} x {sides[1]:g} m."
            )
        scenes = self.scenes
        return (
            f"Simulated lidar of {scenes.beams} x {scenes.azimuths} rays within {scenes.extent:g} m: find up to "
            f"{scenes.objects} vehicles, pedestrians and cyclists among poles, walls and hedges."
        )


def _item(points: np.ndarray, boxes: np.ndarray, labels: np.ndarray) -> dict[str, Tensor]:
    return {
        "points": torch.from_numpy(points.astype(np.float32)),
        "boxes": torch.from_numpy(boxes.astype(np.float32)),
        "labels": torch.from_numpy(labels),
    }
