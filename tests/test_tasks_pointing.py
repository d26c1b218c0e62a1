"""Convex hulls and tours: exact answers against slow independent ones, metrics on answers made by hand, own files."""

from itertools import permutations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from regard.tasks import create_task
from regard.tasks.pointing import (
    around_centroid,
    convex_hull,
    held_karp,
    is_simple,
    nearest_neighbour,
    polygon_area,
    read_symbols,
    tour_length,
)
from regard.training import TrainConfig, evaluate, train

SQUARE = np.array([[0, 0], [1, 0], [1, 1], [0, 1], [0.5, 0.5]], np.float32)


class Oracle(nn.Module):
    """Says `rule(points)` and gives logits that favour nothing."""

    def __init__(self, rule):
        super().__init__()
        self.rule, self.bias = rule, nn.Parameter(torch.zeros(()))
        self.asked = []

    def forward(self, points, lengths, targets):
        logits = self.bias.expand(*targets.shape, 1 + points.shape[1])
        allowed = torch.arange(1 + points.shape[1]) <= lengths[:, None]
        return logits.masked_fill(~allowed[:, None], float("-inf"))

    def decode(self, points, lengths, max_length, beam=1, tour=False):
        self.asked.append((max_length, beam, tour))
        said = torch.zeros(len(points), max_length, dtype=torch.int64)
        for row, length in enumerate(lengths.tolist()):
            answer = [index + 1 for index in self.rule(points[row, :length].numpy())]
            said[row, : len(answer)] = torch.tensor(answer)
        return said


def test_hull_is_the_set_of_edges_with_all_points_on_their_left():
    rng = np.random.default_rng(0)
    for count in (3, 4, 5, 8, 12, 30):
        for _ in range(20):
            points = rng.random((count, 2))
            follows = {}
            for a, b in permutations(range(count), 2):
                (ux, uy), others = points[b] - points[a], points - points[a]
                left = ux * others[:, 1] - uy * others[:, 0]
                if all(left[c] > 0 for c in range(count) if c not in (a, b)):
                    follows[a] = b
            hull = convex_hull(points)
            assert hull[0] == min(hull)
            assert len(hull) == len(follows)
            assert all(follows[a] == b for a, b in zip(hull, hull[1:] + hull[:1], strict=True))


@pytest.mark.parametrize("count", [3, 4, 5, 6, 7, 8])
def test_held_karp_is_the_best_of_all_orders(count):
    rng = np.random.default_rng(count)
    for _ in range(3 if count == 8 else 10):
        points = rng.random((count, 2))
        tour = held_karp(np.linalg.norm(points[:, None] - points, axis=-1))
        assert tour[0] == 0
        assert sorted(tour) == list(range(count))
        assert tour[1] < tour[-1]
        best = min(tour_length(points, [0, *rest]) for rest in permutations(range(1, count)))
        assert tour_length(points, tour) == pytest.approx(best, abs=1e-12)


def test_held_karp_takes_distances_that_are_not_planar():
    distances = np.array(
        [[0, 9, 1, 9], [9, 0, 1, 1], [1, 1, 0, 9], [9, 1, 9, 0.0]]
    )  # 0-2-1-3-0 costs 12, others 20, 28
    assert held_karp(distances) == [0, 2, 1, 3]


def test_simple_polygons_and_their_area():
    assert is_simple(SQUARE[:4])
    assert polygon_area(SQUARE[:4]) == pytest.approx(1)
    assert polygon_area(SQUARE[[3, 2, 1, 0]]) == pytest.approx(1)
    assert is_simple(SQUARE[[0, 1, 2]])
    assert polygon_area(SQUARE[[0, 1, 2]]) == pytest.approx(0.5)
    assert is_simple(SQUARE[[0, 1, 4, 3]])
    assert polygon_area(SQUARE[[0, 1, 2, 4, 3]]) == pytest.approx(0.75)
    assert not is_simple(SQUARE[[0, 2, 1, 3]])  # a bow tie
    assert not is_simple(SQUARE[[0, 1]])
    assert not is_simple(np.array([[0, 0], [2, 0], [2, 1], [1, 0], [0, 1]]))  # a corner that touches an edge
    steps = np.array([[0, 0], [1, 0], [1, 1], [2, 1], [2, 0], [3, 0], [3, 2], [0, 2]])  # two edges on one line, apart
    assert is_simple(steps)


def test_hull_metrics_of_answers_made_by_hand():
    task = create_task("convex_hull")
    target = [0, 1, 2, 3]
    assert task.measure(SQUARE, [0, 1, 2, 3], target) == {"accuracy": 1, "area": pytest.approx(1), "failures": 0}
    assert task.measure(SQUARE, [2, 3, 0, 1], target)["accuracy"] == 1  # a rotation is the same polygon
    assert task.measure(SQUARE, [3, 2, 1, 0], target)["accuracy"] == 0  # the wrong way round
    assert task.measure(SQUARE, [0, 1, 2], target) == {"accuracy": 0, "area": pytest.approx(0.5), "failures": 0}
    for wrong in ([], [0, 1], [0, 2, 1, 3], [0, 1, 2, 2], [0, 1, 2, 7], [0, 1, -3]):
        measured = task.measure(SQUARE, wrong, target)
        assert measured["failures"] == 1
        assert measured["accuracy"] == 0
        assert np.isnan(measured["area"])


def test_tour_metrics_of_answers_made_by_hand():
    task = create_task("tour")
    target = [0, 1, 2, 3]
    assert task.measure(SQUARE[:4], [2, 3, 0, 1], target) == {"length_ratio": pytest.approx(1), "valid": 1}
    crossed = task.measure(SQUARE[:4], [0, 2, 1, 3], target)
    assert crossed["length_ratio"] == pytest.approx((2 + 2 * 2**0.5) / 4)
    assert crossed["valid"] == 1
    for wrong in ([], [0, 1, 2], [0, 1, 2, 2], [0, 1, 2, 3, 0], [0, 1, 2, 4]):
        assert task.measure(SQUARE[:4], wrong, target)["valid"] == 0


def test_symbols_are_read_up_to_the_end():
    assert read_symbols([3, 1, 2, 0, 2]) == [2, 0, 1]
    assert read_symbols([1, 2, -1]) == [0, 1]
    assert read_symbols([0]) == []


@pytest.mark.parametrize("name", ["convex_hull", "tour"])
def test_batches_pad_and_the_loss_ignores_padding(name):
    task = create_task(name, points=(5, 8), train_items=50, eval_items=10)
    batch = next(iter(DataLoader(task.train_set, 16, collate_fn=task.collate)))
    points, lengths, targets = batch["points"], batch["lengths"], batch["targets"]
    assert points.shape == (16, 8, 2)
    assert lengths.min() == 5
    assert lengths.max() == 8
    for row in range(16):
        count = int(batch["target_lengths"][row])
        assert targets[row, count - 1] == 0
        assert (targets[row, count:] == -1).all()
        assert targets[row, : count - 1].min() >= 1
        assert targets[row, : count - 1].max() <= lengths[row]
        assert not points[row, lengths[row] :].any()
        assert points[row, : lengths[row]].min() >= 0
    model = Oracle(around_centroid)
    loss = task.loss(model, batch)
    expected = (batch["target_lengths"] * (1 + lengths).log()).sum()
    assert loss.item() == pytest.approx(float(expected / batch["target_lengths"].sum()), rel=1e-5)
    loss.backward()
    assert torch.isfinite(model.bias.grad)
    with pytest.raises(ValueError, match=r"1 \+ N"):
        task.loss(lambda *_: torch.zeros(2, 3), batch)


def test_the_right_answer_scores_perfectly_and_the_trivial_one_as_stated():
    task = create_task("convex_hull", eval_items=60, train_items=64)
    assert evaluate(Oracle(convex_hull), task) == {"accuracy": 1, "area": pytest.approx(1), "failures": 0}
    assert evaluate(Oracle(around_centroid), task) == pytest.approx(task.trivial())
    assert 0 < task.trivial()["accuracy"] < 0.3
    assert 0.5 < task.trivial()["area"] < 1
    assert evaluate(Oracle(lambda points: [0, 0]), task) == {"accuracy": 0, "area": 0, "failures": 1}

    task = create_task("tour", eval_items=60, beam=4, constrained=True)
    best = Oracle(lambda points: held_karp(np.linalg.norm(points[:, None] - points, axis=-1)))
    assert evaluate(best, task) == {"length_ratio": pytest.approx(1), "valid": 1}
    assert best.asked[0][1:] == (4, True)
    assert best.asked[0][0] == 9
    assert evaluate(Oracle(nearest_neighbour), task) == pytest.approx(task.trivial())
    assert 1 < task.trivial()["length_ratio"] < task.baselines["input order"]["length_ratio"]
    nothing = evaluate(Oracle(lambda points: []), task)
    assert nothing == {"length_ratio": float("inf"), "valid": 0}
    assert task.better(2.0, nothing["length_ratio"])


def test_the_trainer_takes_the_task():
    task = create_task("tour", points=5, train_items=64, eval_items=8)
    result = train(Oracle(nearest_neighbour), task, TrainConfig(steps=3, batch_size=8), cpu=True)
    assert result.metrics["valid"] == 1
    assert len(result.losses) == 3


@pytest.mark.parametrize("name", ["convex_hull", "tour"])
def test_items_are_functions_of_seed_and_index(name):
    first, again, other = (create_task(name, seed=seed) for seed in (3, 3, 4))
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    expected = [first.train_set[index] for index in range(5)]
    np.random.seed(9)  # noqa: NPY002
    for index in reversed(range(5)):
        item = again.train_set[index]
        assert all(torch.equal(item[key], expected[index][key]) for key in item)
        assert not torch.equal(item["points"][:5], other.train_set[index]["points"][:5])
        assert not torch.equal(item["points"][:5], first.eval_set[index]["points"][:5])
    with pytest.raises(IndexError):
        first.train_set[len(first.train_set)]


def test_own_problems_are_divided_and_scaled(tmp_path):
    problems = np.random.default_rng(0).random((10, 6, 2)) * [50, 25] + 100
    np.save(tmp_path / "cities.npy", problems)
    task = create_task("tour", data=tmp_path / "cities.npy")
    assert (len(task.train_set), len(task.eval_set)) == (8, 2)
    assert "cities.npy" in task.description
    items = [item for part in (task.train_set, task.eval_set) for item in (part[i] for i in range(len(part)))]
    seen = torch.stack([item["points"] for item in items])
    assert len(seen.unique(dim=0)) == 10
    assert seen.min() == 0
    assert seen.max() == 1
    assert seen[..., 1].max() < 0.6
    assert task.trivial()["valid"] == 1


def test_own_places_are_divided_between_training_and_evaluation(tmp_path):
    np.save(tmp_path / "places.npy", np.random.default_rng(0).normal(size=(80, 2)))
    for name in ("tour", "convex_hull"):
        task = create_task(name, data=tmp_path / "places.npy", points=(5, 8))
        parts = [
            {tuple(p) for index in range(40) for p in part[index]["points"].tolist()}
            for part in (task.train_set, task.eval_set)
        ]
        assert not parts[0] & parts[1]
        assert len(parts[0]) > 50
        assert len(parts[1]) == 16
        loader = DataLoader(task.train_set, 4, collate_fn=task.collate, num_workers=1, multiprocessing_context="fork")
        assert next(iter(loader))["points"].shape[0] == 4


def test_wrong_options_and_files_are_refused_by_name(tmp_path):
    for options, said in (
        ({"points": (8, 5)}, "swap"),
        ({"points": (2, 5)}, "at least 3"),
        ({"points": 20}, "at most 13"),
        ({"points": 5.5}, "integer"),
        ({"beam": 0}, "beam"),
        ({"seed": -1}, "seed"),
        ({"train_items": 0}, "train_items"),
    ):
        with pytest.raises(ValueError, match=said):
            create_task("tour", **options)
    file = tmp_path / "bad.npy"
    with pytest.raises(FileNotFoundError, match=r"bad\.npy"):
        create_task("tour", data=file)
    file.write_bytes(b"not an array")
    with pytest.raises(ValueError, match=r"bad\.npy"):
        create_task("tour", data=file)
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"bad\.npy"):
        create_task("tour", data=file)
    line = np.stack([np.linspace(0, 1, 6)] * 2, 1)
    for array, said in (
        (np.zeros((4, 3)), r"shape \(4, 3\)"),
        (np.zeros((0, 2)), "shape"),
        (np.full((5, 2), np.nan), "finite"),
        (np.zeros((50, 2)), "one place"),
        (np.array([["a", "b"]]), "numbers"),
        (np.random.default_rng(0).random((9, 2)), "9 different places"),
        (np.random.default_rng(0).random((1, 9, 2)), "1 problems"),
        (np.random.default_rng(0).random((3, 2, 2)), "of 2 points"),
        (np.stack([SQUARE + 0.1, SQUARE, np.pad(line, ((0, 0), (0, 0)))[:5]]), "problem 2 lie on one line"),
    ):
        np.save(file, array)
        with pytest.raises(ValueError, match=rf"bad\.npy.*{said}"):
            create_task("convex_hull", data=file)
    np.save(file, np.random.default_rng(0).random((3, 14, 2)))
    with pytest.raises(ValueError, match=r"bad\.npy must be at most 13"):
        create_task("tour", data=file)
    np.save(file, np.stack([np.arange(60.0)] * 2, 1))
    with pytest.raises(ValueError, match="on one line"):
        create_task("convex_hull", data=file).train_set[0]
