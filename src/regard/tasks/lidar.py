"""Simulated lidar: road users and other things on flat ground, and the points that the rays of one sensor return."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from regard.checks import positive
from regard.tasks.base import whole

CLASSES = ("vehicle", "pedestrian", "cyclist")
_SIZES = np.array([[4.5, 1.9, 1.6], [0.6, 0.6, 1.7], [1.8, 0.6, 1.7]])  # metres, of each class
_SHARES = (0.5, 0.25, 0.25)  # how often each class is drawn
_CLUTTER = np.array([[0.3, 0.3, 4.0], [8.0, 0.3, 2.0], [1.2, 1.2, 0.9]])  # metres: pole, wall, hedge
_SENSOR = np.array([0.0, 0.0, 1.8])  # metres, the ground is z = 0


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


@dataclass(frozen=True)
class LidarScenes:
    """Scenes around a lidar at the origin, 1.8 m above the ground.

    Args:
        extent: points and objects have |x| and |y| below it, in metres.
        beams, azimuths: rays of the lidar, up-down and around.
        objects: most road users of a scene; between a third of it and all of it are drawn.
        clutter: most other things of a scene: poles, walls, hedges.
        min_points: an object that fewer rays meet is left out, with its points.
    """

    extent: float = 20.0
    beams: int = 20
    azimuths: int = 300
    objects: int = 10
    clutter: int = 6
    min_points: int = 4

    def __post_init__(self) -> None:
        positive("extent", self.extent)
        if self.extent < 8:
            raise ValueError(f"extent must be at least 8 metres for objects to have room, got {self.extent}.")
        whole("beams", self.beams, 2)
        whole("azimuths", self.azimuths, 8)
        whole("objects", self.objects)
        whole("clutter", self.clutter, 0)
        whole("min_points", self.min_points)

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One scene.

        Returns:
            points (n, 4): x, y, z in metres and intensity from 0 to 1; boxes (K, 7): centre, length, width, height, yaw;
            labels (K,), indices of `CLASSES`.
        """
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
        return np.concatenate([points, intensity[:, None]], 1)[seen], boxes[found], labels[found]

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
                    # A box has no front: half a turn leaves its points as they are, so half a circle has all there is to tell.
                    yaw = rng.uniform(-np.pi / 2, np.pi / 2)
                    boxes = np.vstack([boxes, [x, y, size[2] / 2, *size, yaw]])
                    labels.append(label)
                    break
        return boxes, np.array(labels, np.int64)
