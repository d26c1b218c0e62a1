"""Answers that point at their inputs: the convex hull of points in the plane, and the shortest tour through them.

Both tasks speak one format. A batch is a dictionary of

* `points` (B, N, 2) float, in the unit square, rows past `lengths` zero; `lengths` (B,) int64, the real points;
* `targets` (B, M) int64 symbols: 0 ends the answer, i + 1 is point i, -1 is padding; `target_lengths` (B,) int64, how
  many symbols are real, the end included.

`model(points, lengths, targets)` returns logits (B, M, 1 + N) over the symbols; those of step t may look at
`targets[:, :t]` only, and symbols of padded points should have -inf. `model.decode(points, lengths, max_length=N + 1,
beam=1)` returns symbols (B, M'), read up to the first 0. The task `tour` with `constrained=True` adds the argument
`tour=True`, for which every answer must visit each point once.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.spatial import ConvexHull, QhullError
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torchmetrics import MeanMetric, Metric

from regard.tasks.base import EVAL, SPLIT, TRAIN, Generated, Task, whole, whole_range

END, PADDING = 0, -1


# ---------------------------------------------------------------------------------------------- exact answers


def convex_hull(points: np.ndarray) -> list[int]:
    """Indices of the hull of points (n, 2), counter-clockwise from the hull point with the lowest index."""
    corners = ConvexHull(points.astype(np.float64)).vertices.tolist()  # in the plane, SciPy goes counter-clockwise
    first = corners.index(min(corners))
    return corners[first:] + corners[:first]


def held_karp(distances: np.ndarray) -> list[int]:
    """The shortest closed tour for distances (n, n), exactly, in O(2^n n^2): the dynamic programme of Held and Karp.

    `best[S, j]` is the shortest path from point 0 through all points of the set S (a bit mask over points 1 .. n-1),
    ending in j: `best[S, j] = min over i in S - j of best[S - j, i] + d(i, j)`, for all sets of one size at once.

    Returns:
        A tour from point 0, in the direction in which its second point has a lower index than its last one.
    """
    others = len(distances) - 1
    bits, step = 1 << np.arange(others), distances[1:, 1:]
    best = np.full((1 << others, others), np.inf)
    before = np.zeros((1 << others, others), np.int64)
    best[bits, np.arange(others)] = distances[0, 1:]
    holds = (np.arange(1 << others)[:, None] & bits) > 0
    size = holds.sum(1)
    for members in range(2, others + 1):
        sets, last = np.nonzero(holds & (size == members)[:, None])
        lengths = best[sets - bits[last]] + step[:, last].T
        before[sets, last], best[sets, last] = lengths.argmin(1), lengths.min(1)
    left, end = (1 << others) - 1, int((best[-1] + distances[1:, 0]).argmin())
    path = []
    while left:
        path.append(end + 1)
        left, end = left - (1 << end), int(before[left, end])
    return [0, *path] if path[0] < path[-1] else [0, *path[::-1]]


def tour_length(points: np.ndarray, tour: Sequence[int]) -> float:
    """Length of the closed tour through points (n, 2)."""
    path = points[list(tour)].astype(np.float64)
    return float(np.linalg.norm(path - np.roll(path, -1, axis=0), axis=1).sum())


def polygon_area(corners: np.ndarray) -> float:
    """Area of a simple polygon (m, 2) by the shoelace formula: |sum of x_k y_{k+1} - x_{k+1} y_k| / 2."""
    x, y = (corners.astype(np.float64) - corners[0]).T
    return float(abs(x @ np.roll(y, -1) - np.roll(x, -1) @ y) / 2)


def is_simple(corners: np.ndarray) -> bool:
    """Whether a closed polygon (m, 2) has three corners or more and no two edges meet, save neighbours in a corner."""
    count = len(corners)
    if count < 3:
        return False
    start = corners.astype(np.float64)
    stop = np.roll(start, -1, axis=0)
    a, b = np.triu_indices(count, k=2)
    a, b = a[b - a < count - 1], b[b - a < count - 1]  # the last edge is a neighbour of the first

    def side(tail: np.ndarray, head: np.ndarray, point: np.ndarray) -> np.ndarray:
        (ux, uy), (vx, vy) = (head - tail).T, (point - tail).T
        return ux * vy - uy * vx

    straddle = (side(start[a], stop[a], start[b]) * side(start[a], stop[a], stop[b]) <= 0) & (
        side(start[b], stop[b], start[a]) * side(start[b], stop[b], stop[a]) <= 0
    )
    low, high = np.minimum(start, stop), np.maximum(start, stop)
    near = ((low[a] <= high[b]) & (low[b] <= high[a])).all(1)  # edges on one line meet only if their boxes do
    return not bool((straddle & near).any())


# ---------------------------------------------------------------------------------------------- what both tasks share


class MeanOr(MeanMetric):
    """A mean over the values that are numbers; `empty` if there was none."""

    def __init__(self, empty: float) -> None:
        super().__init__(nan_strategy="ignore")
        self.empty = empty

    def compute(self) -> Tensor:
        return super().compute() if self.weight > 0 else torch.tensor(self.empty, device=self.weight.device)


class PointingTask(Task):
    """Points in, a sequence of their indices out.

    Args:
        points: how many points an item has: one number, or (fewest, most), drawn per item.
        data: an .npy file instead of uniform points: an array (k, n, 2) holds k problems, of which a fifth, drawn by
            the seed, is for evaluation; an array (n, 2) is a pool of places from which every item draws its points,
            four fifths of the places for training and the others for evaluation. All coordinates of the file are
            shifted and scaled together into the unit square.
        train_items, eval_items: sizes of the two sets (for k problems the file decides).
        beam: beam width of decoding in evaluation.
        seed: of everything that is drawn.
    """

    fewest, most = 3, 1000

    def __init__(
        self,
        *,
        points: int | tuple[int, int],
        data: str | Path | None = None,
        train_items: int = 100_000,
        eval_items: int = 1000,
        beam: int = 1,
        seed: int = 0,
    ) -> None:
        self.points = whole_range("points", points, self.fewest)
        self._at_most("points", self.points[1])
        self.beam = whole("beam", beam)
        whole("seed", seed, 0)
        whole("train_items", train_items)
        whole("eval_items", eval_items)
        self.data = None if data is None else Path(data)
        if self.data is None:
            self.train_set = Generated(self._uniform, train_items, seed, TRAIN)
            self.eval_set = Generated(self._uniform, eval_items, seed, EVAL)
            return
        array = _read(self.data)
        if array.ndim == 3:
            self._check_problems(array)
            kept, held = _split(len(array), seed)
            self.points = (array.shape[1], array.shape[1])
            self.train_set = Generated(partial(self._stored, array[kept]), len(kept), seed, TRAIN)
            self.eval_set = Generated(partial(self._stored, array[held]), len(held), seed, EVAL)
            return
        places = np.unique(array, axis=0)
        needed = 5 * self.points[1]
        if len(places) < needed:
            raise ValueError(
                f"{self.data} holds {len(places)} different places, but points={self.points} needs at least {needed}: "
                "a fifth of them is for evaluation. Lower points or give more places."
            )
        kept, held = _split(len(places), seed)
        self.train_set = Generated(partial(self._from_pool, places[kept]), train_items, seed, TRAIN)
        self.eval_set = Generated(partial(self._from_pool, places[held]), eval_items, seed, EVAL)

    @abstractmethod
    def answer(self, points: np.ndarray) -> list[int]:
        """The exact answer for points (n, 2), as indices in the order in which a model has to say them."""

    def _at_most(self, argument: str, count: int) -> None:
        if count > self.most:
            raise ValueError(f"{argument} must be at most {self.most} for {self.name}, got {count}.")

    def _check_problems(self, problems: np.ndarray) -> None:
        if len(problems) < 2 or problems.shape[1] < self.fewest:
            raise ValueError(
                f"{self.data} holds {len(problems)} problems of {problems.shape[1]} points: it takes at least two "
                f"problems of {self.fewest} points."
            )
        self._at_most(f"the number of points of each problem in {self.data}", problems.shape[1])

    def _uniform(self, rng: np.random.Generator, index: int) -> dict[str, Tensor]:
        count = rng.integers(self.points[0], self.points[1] + 1)
        return self._item(rng.random((count, 2), dtype=np.float32))

    def _stored(self, problems: np.ndarray, rng: np.random.Generator, index: int) -> dict[str, Tensor]:
        return self._item(problems[index])

    def _from_pool(self, places: np.ndarray, rng: np.random.Generator, index: int) -> dict[str, Tensor]:
        for _ in range(100):
            count = rng.integers(self.points[0], self.points[1] + 1)
            try:
                return self._item(places[rng.choice(len(places), count, replace=False)])
            except QhullError:  # all points on one line: draw again
                continue
        raise ValueError(f"{self.data} keeps giving points on one line, which have no hull: give places in the plane.")

    def _item(self, points: np.ndarray) -> dict[str, Tensor]:
        symbols = [index + 1 for index in self.answer(points)] + [END]
        return {"points": torch.from_numpy(points.copy()), "targets": torch.tensor(symbols)}

    def collate(self, items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Pad the items to the longest: the batch described at the top of the module."""
        points, targets = [item["points"] for item in items], [item["targets"] for item in items]
        return {
            "points": pad_sequence(points, batch_first=True),
            "lengths": torch.tensor([len(one) for one in points]),
            "targets": pad_sequence(targets, batch_first=True, padding_value=PADDING),
            "target_lengths": torch.tensor([len(one) for one in targets]),
        }

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Mean over unpadded steps of -log p(target symbol)."""
        logits = model(batch["points"], batch["lengths"], batch["targets"])
        expected = (*batch["targets"].shape, 1 + batch["points"].shape[1])
        if logits.shape != expected:
            raise ValueError(f"the model must return logits (B, M, 1 + N) = {expected}, got {tuple(logits.shape)}.")
        return F.cross_entropy(logits.flatten(0, 1).float(), batch["targets"].flatten(), ignore_index=PADDING)

    def update(self, metrics: Mapping[str, Metric], model: nn.Module, batch: dict[str, Tensor]) -> None:
        points, lengths = batch["points"], batch["lengths"]
        symbols = model.decode(points, lengths, max_length=points.shape[1] + 1, **self._decoding())
        for row, length, target, said in zip(
            points.cpu().numpy(), lengths.tolist(), batch["targets"].tolist(), symbols.tolist(), strict=True
        ):
            self._score(metrics, row[:length], read_symbols(said), read_symbols(target))

    def _decoding(self) -> dict[str, Any]:
        return {"beam": self.beam}

    def _score(self, metrics: Mapping[str, Metric], points: np.ndarray, said: list[int], target: list[int]) -> None:
        for name, value in self.measure(points, said, target).items():
            metrics[name].update(value)

    @abstractmethod
    def measure(self, points: np.ndarray, said: list[int], target: list[int]) -> dict[str, float]:
        """The metrics of one answer `said` for points (n, 2); NaN where a metric does not apply."""

    def score_rule(self, rule: Callable[[np.ndarray], list[int]]) -> dict[str, float]:
        """The metrics on the evaluation set of `rule`, a function from points (n, 2) to indices."""
        metrics = self.metrics()
        for index in range(len(self.eval_set)):  # type: ignore[arg-type]
            item = self.eval_set[index]
            points = item["points"].numpy()
            self._score(metrics, points, rule(points), read_symbols(item["targets"].tolist()))
        return {name: float(metric.compute()) for name, metric in metrics.items()}

    def _source(self) -> str:
        count = str(self.points[0]) if self.points[0] == self.points[1] else f"{self.points[0]} to {self.points[1]}"
        return f"{count} points " + ("drawn in the unit square" if self.data is None else f"of {self.data.name}")


def read_symbols(symbols: Sequence[int]) -> list[int]:
    """Point indices of one answer: the symbols before the first end or padding, less one."""
    indices = []
    for symbol in symbols:
        if symbol in (END, PADDING):
            break
        indices.append(symbol - 1)
    return indices


def _read(file: Path) -> np.ndarray:
    """Coordinates (n, 2) or (k, n, 2) of an .npy file, in the unit square, float32."""
    if not file.is_file():
        raise FileNotFoundError(f"data: there is no file {file}.")
    try:
        array = np.load(file, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{file} cannot be read as an .npy file: {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise ValueError(f"{file} must hold one array of numbers.")
    if array.ndim not in (2, 3) or array.shape[-1] != 2 or array.size == 0:
        raise ValueError(f"{file} must hold an array (n, 2) or (k, n, 2) of planar points, got shape {array.shape}.")
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{file} holds coordinates that are not finite.")
    low = array.reshape(-1, 2).min(0)
    extent = (array.reshape(-1, 2).max(0) - low).max()
    if extent == 0:
        raise ValueError(f"{file} holds one place only, again and again.")
    return ((array - low) / extent).astype(np.float32)


def _split(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices for training and for evaluation: a fifth, at least one, for the latter."""
    order = np.random.default_rng((seed, SPLIT)).permutation(count)
    held = max(1, count // 5)
    return np.sort(order[held:]), np.sort(order[:held])


# ---------------------------------------------------------------------------------------------- the two tasks


class ConvexHullTask(PointingTask):
    """Name the corners of the convex hull, counter-clockwise, from the corner with the lowest index.

    Metrics: `accuracy`, the share of answers that are the hull, started anywhere; `area`, the mean share of the hull's
    area that the answered polygon covers, over simple polygons; `failures`, the share of answers that are no simple
    polygon (edges cross, a point comes twice, fewer than three points). Takes the options of `PointingTask`.
    """

    name = "convex_hull"
    metric = "accuracy"

    def __init__(self, *, points: int | tuple[int, int] = (5, 12), **options: Any) -> None:
        super().__init__(points=points, **options)

    def _check_problems(self, problems: np.ndarray) -> None:
        super()._check_problems(problems)
        spread = np.linalg.svd(problems.astype(np.float64) - problems.mean(1, keepdims=True), compute_uv=False)
        flat = np.flatnonzero(spread[:, 1] <= 1e-6 * spread[:, 0])
        if len(flat):
            raise ValueError(f"{self.data}: the points of problem {flat[0]} lie on one line and have no hull.")

    def answer(self, points: np.ndarray) -> list[int]:
        return convex_hull(points)

    def metrics(self) -> dict[str, Metric]:
        return {"accuracy": MeanMetric(), "area": MeanOr(empty=0.0), "failures": MeanMetric()}

    def measure(self, points: np.ndarray, said: list[int], target: list[int]) -> dict[str, float]:
        known = len(set(said)) == len(said) and all(0 <= index < len(points) for index in said)
        if not known or not is_simple(points[said]):
            return {"accuracy": 0.0, "area": float("nan"), "failures": 1.0}
        first = said.index(target[0]) if target[0] in said else 0
        same = said[first:] + said[:first] == target
        area = polygon_area(points[said]) / polygon_area(points[target])
        return {"accuracy": float(same), "area": area, "failures": 0.0}

    def trivial(self) -> dict[str, float]:
        return self.score_rule(around_centroid)

    @property
    def trivial_answer(self) -> str:
        return "all points, by angle around their mean"

    @property
    def description(self) -> str:
        return f"{self._source()}; name the corners of their convex hull in order."


class TourTask(PointingTask):
    """Say the shortest closed tour, from point 0, towards the neighbour with the lower index.

    Labels are exact (Held-Karp), which bounds the number of points. Metrics: `length_ratio`, the mean of the tour's
    length over the optimum's, over answers that are tours (infinite if there is none); `valid`, the share of answers
    that are tours, that is, visit every point once.

    Args:
        constrained: ask `model.decode` for tours only, with `tour=True`.
        options: those of `PointingTask`.
    """

    name = "tour"
    metric = "length_ratio"
    higher_is_better = False
    most = 13

    def __init__(self, *, points: int | tuple[int, int] = (5, 8), constrained: bool = False, **options: Any) -> None:
        self.constrained = constrained
        super().__init__(points=points, **options)

    def answer(self, points: np.ndarray) -> list[int]:
        return held_karp(_distances(points))

    def metrics(self) -> dict[str, Metric]:
        return {"length_ratio": MeanOr(empty=float("inf")), "valid": MeanMetric()}

    def measure(self, points: np.ndarray, said: list[int], target: list[int]) -> dict[str, float]:
        if sorted(said) != list(range(len(points))):
            return {"length_ratio": float("nan"), "valid": 0.0}
        shortest = tour_length(points, target)
        return {"length_ratio": tour_length(points, said) / shortest if shortest else 1.0, "valid": 1.0}

    def _decoding(self) -> dict[str, Any]:
        return super()._decoding() | ({"tour": True} if self.constrained else {})

    @cached_property
    def baselines(self) -> dict[str, dict[str, float]]:
        """The metrics of two rules that learn nothing: the input's order, and always the nearest unvisited point."""
        rules = {"input order": lambda points: list(range(len(points))), "nearest neighbour": nearest_neighbour}
        return {name: self.score_rule(rule) for name, rule in rules.items()}

    def trivial(self) -> dict[str, float]:
        return dict(self.baselines[self.trivial_answer])

    @property
    def trivial_answer(self) -> str:
        return "nearest neighbour"

    @property
    def description(self) -> str:
        return f"{self._source()}; say the shortest closed tour through them."


def around_centroid(points: np.ndarray) -> list[int]:
    """All points (n, 2) in the order of their angle around their mean: a simple polygon, but seldom the hull."""
    x, y = (points.astype(np.float64) - points.mean(0)).T
    return np.argsort(np.arctan2(y, x)).tolist()


def nearest_neighbour(points: np.ndarray) -> list[int]:
    """The tour through points (n, 2) that starts at point 0 and always goes to the nearest point not yet visited."""
    distances = _distances(points)
    tour = [0]
    while len(tour) < len(points):
        distances[:, tour[-1]] = np.inf
        tour.append(int(distances[tour[-1]].argmin()))
    return tour


def _distances(points: np.ndarray) -> np.ndarray:
    points = points.astype(np.float64)
    return np.linalg.norm(points[:, None] - points[None], axis=-1)
