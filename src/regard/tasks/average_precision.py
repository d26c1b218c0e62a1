"""Average precision of detected boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric


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
