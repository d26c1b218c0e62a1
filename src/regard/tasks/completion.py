"""Point cloud completion: the whole surface from the points of one side."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from regard.tasks.base import EVAL, TRAIN, Generated, Task, whole
from regard.tasks.measures import measure
from regard.tasks.shapes import SURFACES, into_unit_ball


class CompletionTask(Task):
    """Where is the rest of the surface, of which only the half towards the viewer is seen?

    Surfaces are those of the task `shapes`, turned about their axis and seen from anywhere. The cloud to be said and the
    half that is seen are different points of one surface, in the frame of the whole: centred, scaled into the unit ball.

    An item is `partial` (points // 2, 3) and `whole` (points, 3), float32, in no order. A model maps partial clouds
    (B, points // 2, 3) to whole ones (B, points, 3). With d the distance of a point to the nearest of the other cloud, the
    metrics are `chamfer_l1`, the mean of d (over the points of a cloud, then both clouds), which is also the loss;
    `chamfer_l2`, the sum over both clouds of the mean of d squared; and `f_score` in [0, 1], the harmonic mean of the
    shares of both clouds' points with d below `near`.

    Args:
        points: of a whole cloud, even. near: what counts as found, in radii of the shape.
        train_items, eval_items: sizes of the two sets. seed: of everything that is drawn.
    """

    name = "completion"
    metric = "chamfer_l1"
    higher_is_better = False

    def __init__(
        self,
        points: int = 256,
        near: float = 0.1,
        train_items: int = 100_000,
        eval_items: int = 256,
        seed: int = 0,
    ) -> None:
        if whole("points", points, 2) % 2:
            raise ValueError(f"points must be even, got {points}: half of them are seen.")
        if near <= 0:
            raise ValueError(f"near must be above 0, got {near}.")
        self.points, self.near = points, near
        self.train_set = Generated(self._item, whole("train_items", train_items), seed, TRAIN)
        self.eval_set = Generated(self._item, whole("eval_items", eval_items), seed, EVAL)

    def _item(self, rng: np.random.Generator, index: int) -> dict[str, Tensor]:
        surface = list(SURFACES.values())[rng.integers(len(SURFACES))]
        points = into_unit_ball(surface(rng, 2 * self.points))
        turn = rng.uniform(0, 2 * np.pi)
        points[:, :2] = points[:, :2] @ [[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]
        points = points[rng.permutation(len(points))]
        wanted, others = points[: self.points], points[self.points :]
        seen = others[np.argsort(others @ rng.normal(size=3))[: self.points // 2]]
        pair = {"partial": seen[rng.permutation(len(seen))], "whole": wanted}
        return {name: torch.from_numpy(cloud.astype(np.float32)) for name, cloud in pair.items()}

    @property
    def description(self) -> str:
        return f"{self.points // 2} points of the near side of one of {len(SURFACES)} surfaces: {self.points} of all of it."

    @property
    def trivial_answer(self) -> str:
        return "what is seen, twice"

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        to_whole, to_said = _distances(model(batch["partial"]), batch["whole"])
        return (to_whole.mean() + to_said.mean()) / 2

    def metrics(self) -> dict[str, Metric]:
        return {"chamfer_l1": MeanMetric(), "chamfer_l2": MeanMetric(), "f_score": MeanMetric()}

    def update(self, metrics: Mapping[str, Metric], model: nn.Module, batch: dict[str, Tensor]) -> None:
        pair = _distances(model(batch["partial"]), batch["whole"])
        metrics["chamfer_l1"].update(sum(distance.mean(1) for distance in pair) / 2)
        metrics["chamfer_l2"].update(sum(distance.square().mean(1) for distance in pair))
        precision, recall = ((distance < self.near).float().mean(1) for distance in pair)
        metrics["f_score"].update(2 * precision * recall / (precision + recall).clamp(min=1e-12))

    def trivial(self) -> dict[str, float]:
        return measure(self, Twice())


class Twice(nn.Module):
    """Every point twice."""

    def forward(self, partial: Tensor) -> Tensor:
        """`(B, n, 3)` -> `(B, 2 n, 3)`."""
        return partial.repeat(1, 2, 1)


def _distances(said: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """From each point (B, n, 3) to the nearest of the other cloud (B, m, 3): (B, n) and (B, m)."""
    if said.shape != truth.shape:
        raise ValueError(f"the model must return clouds {tuple(truth.shape)}, got {tuple(said.shape)}.")
    apart = torch.cdist(said, truth, compute_mode="donot_use_mm_for_euclid_dist")
    return apart.amin(2), apart.amin(1)
