"""Detection: rays end where they should, own scenes are read, and average precision by hand."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from regard.tasks import create_task
from regard.tasks.average_precision import AveragePrecision, average_precision
from regard.tasks.lidar import cast_rays
from regard.training import TrainConfig, evaluate, train


class Oracle(nn.Module):
    """Knows the scenes of the evaluation set, which come in order."""

    def __init__(self, task, shift=0.0):
        super().__init__()
        self.task, self.shift, self.next, self.weight = task, shift, 0, nn.Parameter(torch.ones(()))

    def forward(self, points, offsets):
        assert offsets[-1] == len(points)
        return self.weight * points.new_ones(len(offsets) - 1)

    def loss(self, predictions, batch):
        return (predictions * batch["counts"]).mean()

    def decode(self, predictions):
        scenes = [self.task.eval_set[self.next + index] for index in range(len(predictions))]
        self.next += len(predictions)
        shift = torch.tensor([self.shift, 0, 0, 0, 0, 0, 0])
        return [
            {"boxes": s["boxes"] + shift, "labels": s["labels"], "scores": torch.ones(len(s["labels"]))} for s in scenes
        ]


def test_rays_end_on_the_nearest_box_or_the_ground():
    down = 1.8 / 5
    rays = np.array([[1, 0, 0], [0, 1, 0], [-1, 0, 0], [1, 0, -down], [0, -1, -down], [0, 0, 1.0]])
    lengths = np.linalg.norm(rays, axis=1)
    boxes = np.array(
        [
            [10, 0, 1, 4, 2, 2, 0],
            [10, 0, 1, 4, 2, 2, np.pi / 2],  # nearer along x: only 2 metres of it lie across
            [0, 6, 1, 2, 2, 2, np.pi / 4],
            [-6, 0, 0.5, 2, 2, 1, 0],  # lower than the ray
        ]
    )
    distance, hit = cast_rays(rays / lengths[:, None], boxes)
    assert hit.tolist() == [0, 2, -1, -1, -1, -1]
    expected = [8, 6 - 2**0.5, np.inf, 5 * lengths[3], 5 * lengths[4], np.inf]
    assert distance == pytest.approx(expected)
    assert cast_rays(rays[:1], boxes[1:2])[0] == pytest.approx([9])
    assert cast_rays(rays, np.zeros((0, 7)))[1].tolist() == [-1] * 6


def test_casting_equals_marching_along_the_rays():
    rng = np.random.default_rng(0)
    boxes = np.concatenate(
        [rng.uniform(-10, 10, (6, 2)), np.ones((6, 1)), rng.uniform(1, 4, (6, 3)), rng.uniform(-3, 3, (6, 1))], 1
    )
    boxes = boxes[np.hypot(boxes[:, 0], boxes[:, 1]) > 4]
    rays = rng.normal(size=(300, 3)) * [1, 1, 0.1]
    rays /= np.linalg.norm(rays, axis=1, keepdims=True)
    steps = np.arange(0, 30, 0.01)
    places = np.array([0, 0, 1.8]) + steps[:, None, None] * rays
    inside = [places[..., 2] < 0]
    for x, y, z, length, width, height, yaw in boxes:
        east, north = places[..., 0] - x, places[..., 1] - y
        along, across = east * np.cos(yaw) + north * np.sin(yaw), north * np.cos(yaw) - east * np.sin(yaw)
        inside.append((abs(along) < length / 2) & (abs(across) < width / 2) & (abs(places[..., 2] - z) < height / 2))
    inside = np.stack(inside)
    first = np.where(inside.any((0, 1)), steps[inside.any(0).argmax(0)], np.inf)
    distance, hit = cast_rays(rays, boxes)
    near = distance < 29
    clipped = ~np.isclose(distance, first, atol=0.02) & near  # marching may step over a corner
    assert clipped.sum() <= 3
    assert len(np.unique(hit[near])) > 4


def test_scenes_hold_what_they_say():
    task = create_task("detection")
    classes = set()
    for index in range(10):
        scene = task.train_set[index]
        points, boxes = scene["points"], scene["boxes"]
        assert 1000 < len(points) <= 6000
        assert points[:, :2].abs().max() < 20
        assert points[:, 3].min() >= 0
        assert points[:, 3].max() <= 1
        assert points[:, 2].min() > task.point_range[2]
        assert points[:, 2].max() < task.point_range[5]
        assert torch.allclose(boxes[:, 2], boxes[:, 5] / 2)
        classes.update(scene["labels"].tolist())
        for x, y, z, length, width, height, yaw in boxes.tolist():
            turn = torch.tensor([[np.cos(yaw), np.sin(yaw)], [-np.sin(yaw), np.cos(yaw)]], dtype=torch.float32)
            local = (points[:, :2] - torch.tensor([x, y])) @ turn.T
            within = (local.abs() < torch.tensor([length, width]) / 2 + 0.1).all(1)
            within &= (points[:, 2] - z).abs() < height / 2 + 0.1
            assert within.sum() >= task.scenes.min_points
        apart = torch.cdist(boxes[:, :2], boxes[:, :2]) + 100 * torch.eye(len(boxes))
        assert apart.min() > 0.5
        assert boxes[:, 6].abs().max() <= np.pi / 2
    assert classes == {0, 1, 2}
    near = torch.cat([task.train_set[index]["points"] for index in range(10)])[:, :2].norm(dim=1)
    rings = torch.histc(near, bins=4, min=4, max=20) / torch.tensor([48.0, 80, 112, 144])  # per area
    assert (rings.diff() < 0).all()
    assert rings[0] > 10 * rings[3]


def test_batches_of_scenes_are_ragged_in_points_and_padded_in_boxes():
    task = create_task("detection", train_items=8)
    batch = next(iter(DataLoader(task.train_set, 4, collate_fn=task.collate)))
    assert batch["offsets"][-1] == len(batch["points"])
    assert batch["boxes"].shape == (4, int(batch["counts"].max()), 7)
    for row in range(4):
        scene = task.train_set[row]
        count = int(batch["counts"][row])
        assert torch.equal(batch["points"][batch["offsets"][row] : batch["offsets"][row + 1]], scene["points"])
        assert torch.equal(batch["boxes"][row, :count], scene["boxes"])
        assert torch.equal(batch["labels"][row, :count], scene["labels"])
        assert (batch["labels"][row, count:] == -1).all()


def test_the_truth_scores_one_and_a_shift_of_it_less():
    task = create_task("detection", eval_items=6, train_items=60)
    assert evaluate(Oracle(task), task, batch_size=4) == {name: pytest.approx(1) for name in task.metrics()}
    assert evaluate(Oracle(task, shift=0.7), task, batch_size=4)["ap"] == pytest.approx(2 / 3, abs=0.05)
    assert evaluate(Oracle(task, shift=30.0), task, batch_size=4)["ap"] == 0
    trivial = task.trivial()
    assert trivial.keys() == task.metrics().keys()
    assert 0 <= task.baselines["densest pillars"]["ap"] < 0.1 < trivial["ap"] < 0.6
    for rule in (task.densest_pillars, task.clusters):
        assert len(rule(torch.zeros(5, 4))["scores"]) == 0  # only ground
    result = train(Oracle(task), task, TrainConfig(steps=2, batch_size=4), cpu=True)
    assert len(result.losses) == 2


def detections(centres, scores, label=0):
    boxes = torch.zeros(len(centres), 7)
    boxes[:, 0] = torch.tensor(centres)
    return {"boxes": boxes, "scores": torch.tensor(scores), "labels": torch.full((len(centres),), label)}


def ap_of(*scenes, classes=(0,), thresholds=(1.0,)):
    metric = AveragePrecision(classes, thresholds)
    for said, truth in scenes:
        truth = truth if isinstance(truth, dict) else detections(truth, [1.0] * len(truth))
        metric.update(said, truth["boxes"], truth["labels"])
    return float(metric.compute())


def test_average_precision_of_cases_made_by_hand():
    nothing = detections([], [])
    assert ap_of((detections([0.0, 5.0], [0.9, 0.8]), [0.2, 5.1])) == pytest.approx(1)
    assert ap_of((nothing, [0.0])) == 0
    assert ap_of((detections([0.0], [0.5]), [])) == 0  # nothing to find
    # A wrong one first: the curve rises from (0, 0) to (1, 1/2), so that the 90 samples k / 100 give k / 200 - 0.1 for
    # k = 20 .. 100, which sums to 16.2.
    assert ap_of((detections([9.0, 0.0], [0.9, 0.8]), [0.0])) == pytest.approx(16.2 / 90 / 0.9)
    # A wrong one last, or a second one of the same thing: only the sample at recall 1 is lower, at precision 1/2.
    assert ap_of((detections([9.0, 0.0], [0.8, 0.9]), [0.0])) == pytest.approx(1 - 0.5 / 90 / 0.9)
    assert ap_of((detections([0.0, 0.1], [0.9, 0.8]), [0.0])) == pytest.approx(1 - 0.5 / 90 / 0.9)
    # Half is found, at precision 1: recalls 0.11 to 0.50 of 0.11 to 1.00.
    assert ap_of((detections([0.0], [0.9]), [0.0, 50.0])) == pytest.approx(40 / 90)
    # Scores order detections over all scenes.
    assert ap_of((detections([9.0], [0.9]), []), (detections([0.0], [0.8]), [0.0])) == pytest.approx(0.2)
    # The distance must be below the threshold; thresholds are averaged.
    assert ap_of((detections([1.0], [0.9]), [0.0])) == 0
    assert ap_of((detections([0.7], [0.9]), [0.0]), thresholds=(0.5, 1.0, 2.0)) == pytest.approx(2 / 3)
    # A detection takes the nearest that is free, though another would be nearer.
    assert ap_of((detections([0.4, 0.3], [0.9, 0.8]), [0.0, 1.0])) == pytest.approx(1)
    # Another class neither finds nor disturbs; classes that do not occur are left out of the mean.
    wrong = detections([0.0], [0.9], label=1)
    assert ap_of((wrong, [0.0]), classes=(0, 1, 2)) == 0
    both = {key: torch.cat([wrong[key], detections([0.0], [0.1])[key]]) for key in wrong}
    assert ap_of((both, [0.0]), classes=(0, 1)) == pytest.approx(1)
    truth = {key: torch.cat([detections([0.0], [1.0])[key], detections([7.0], [1.0], 1)[key]]) for key in wrong}
    assert ap_of((both, truth), classes=(0, 1)) == pytest.approx(0.5)


def test_average_precision_equals_a_literal_reading_of_its_definition():
    rng = np.random.default_rng(0)
    for _ in range(10):
        scenes = []
        for _ in range(4):
            truth = detections(rng.uniform(0, 30, rng.integers(0, 6)).tolist(), [])["boxes"]
            count = int(rng.integers(0, 9))
            scenes.append((detections(rng.uniform(0, 30, count).tolist(), rng.random(count).tolist()), truth))
        everything = sorted(
            (
                (score, number, x)
                for number, (said, _) in enumerate(scenes)
                for score, x in zip(said["scores"].tolist(), said["boxes"][:, 0].tolist(), strict=True)
            ),
            reverse=True,
        )
        free = [truth[:, 0].tolist() for _, truth in scenes]
        total, right, curve = sum(map(len, free)), 0, []
        for rank, (_, number, x) in enumerate(everything, start=1):
            nearest = min(free[number], key=lambda place, x=x: abs(place - x), default=np.inf)
            if abs(nearest - x) < 2:
                free[number].remove(nearest)
                right += 1
            curve.append((right / total, right / rank))
        recall, precision = np.array(curve).T
        samples = [
            max(0, np.interp(level / 100, recall, precision) - 0.1) if level / 100 <= recall[-1] else 0
            for level in range(11, 101)
        ]
        labelled = [(said, {"boxes": t, "labels": torch.zeros(len(t))}) for said, t in scenes]
        assert ap_of(*labelled, thresholds=(2.0,)) == pytest.approx(np.mean(samples) / 0.9, abs=1e-6)
    assert average_precision(np.zeros(0, bool), 3) == 0


def write_scenes(folder, count=10, points="points", labels="labels", ending=".npy"):
    """Scenes of a simulated lidar that stands 1.8 m above the ground, in the frame of the sensor."""
    drawn = create_task("detection", extent=10, azimuths=60, train_items=count).train_set
    for name in (points, labels):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        scene = drawn[index]
        cloud, boxes = (
            scene["points"] - torch.tensor([0, 0, 1.8, 0]),
            scene["boxes"] - torch.tensor([0, 0, 1.8, 0, 0, 0, 0]),
        )
        cloud = cloud.numpy().astype(np.float32)
        cloud.tofile(folder / points / f"{index}.bin") if ending == ".bin" else np.save(
            folder / points / f"{index}", cloud
        )
        names = [("car", "person", "bike")[label] for label in scene["labels"]]
        lines = [" ".join([*(f"{value:.6f}" for value in box), name]) for box, name in zip(boxes, names, strict=True)]
        (folder / labels / f"{index}.txt").write_text("\n".join(lines) + "\n")
    return drawn


@pytest.mark.parametrize(
    ("points", "labels", "ending"), [("points", "labels", ".npy"), (".", ".", ".npy"), ("points", "labels", ".bin")]
)
def test_own_scenes_are_read(tmp_path, points, labels, ending):
    drawn = write_scenes(tmp_path, points=points, labels=labels, ending=ending)
    task = create_task("detection", data=tmp_path)
    assert task.class_names == ["bike", "car", "person"]
    assert (task.num_classes, task.in_channels, len(task.train_set), len(task.eval_set)) == (3, 4, 8, 2)
    assert task.ground == pytest.approx(-1.8, abs=1e-4)
    seen = set()
    for part in (task.train_set, task.eval_set):
        for index in range(len(part)):
            scene = part[index]
            (same,) = [n for n in range(10) if torch.equal(drawn[n]["points"][:, 3], scene["points"][:, 3])]
            seen.add(same)
            assert torch.allclose(scene["points"] + torch.tensor([0, 0, 1.8, 0]), drawn[same]["points"], atol=1e-5)
            assert torch.allclose(scene["boxes"][:, 3:], drawn[same]["boxes"][:, 3:], atol=1e-5)
            assert [task.class_names[n] for n in scene["labels"]] == [
                ("car", "person", "bike")[n] for n in drawn[same]["labels"]
            ]
            if part is task.train_set:
                reach = scene["boxes"][:, 3:5].norm(dim=1, keepdim=True) / 2
                assert (scene["boxes"][:, :2] - reach >= torch.tensor(task.point_range[:2])).all()
                assert (scene["boxes"][:, :2] + reach <= torch.tensor(task.point_range[3:5])).all()
    assert seen == set(range(10))
    assert set(task.metrics()) == {"ap", "ap_bike", "ap_car", "ap_person"}
    assert task.trivial()["ap"] > 0
    assert evaluate(Oracle(task), task)["ap"] == pytest.approx(1)
    assert "bike, car, person" in task.description


def test_own_lists_say_which_scenes_are_for_evaluation(tmp_path):
    write_scenes(tmp_path, 4)
    (tmp_path / "ImageSets").mkdir()
    (tmp_path / "ImageSets" / "train.txt").write_text("2\n0\n")
    (tmp_path / "ImageSets" / "val.txt").write_text("3\n")
    task = create_task("detection", data=tmp_path)
    stored = [np.load(tmp_path / "points" / f"{name}.npy") for name in (2, 0, 3)]
    items = [task.train_set[0], task.train_set[1], task.eval_set[0]]
    assert all(np.allclose(item["points"], cloud) for item, cloud in zip(items, stored, strict=True))
    for content, said in (("7\n", "names 7, which has no cloud"), ("", "names no scene")):
        (tmp_path / "ImageSets" / "val.txt").write_text(content)
        with pytest.raises(ValueError, match=said):
            create_task("detection", data=tmp_path)


def test_wrong_scenes_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        create_task("detection", data=tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"at least two scenes, .*found 0"):
        create_task("detection", data=tmp_path)
    for name in ("chair", "table"):
        (tmp_path / "classes" / name).mkdir(parents=True)
        np.save(tmp_path / "classes" / name / "a.npy", np.zeros((3, 3)))
    with pytest.raises(ValueError, match=r"chair, table look like classes: .*shapes"):
        create_task("detection", data=tmp_path / "classes")
    own = tmp_path / "own"
    write_scenes(own, 4)
    labels = own / "labels" / "1.txt"
    good = labels.read_text()
    for line in ("1 2 3", "0 0 0 1 1 nan 0 car", "0 0 0 1 0 1 0 car", "0 0 0 1 1 1 0", "car 0 0 0 1 1 1 0"):
        labels.write_text(good + "\n" + line)
        with pytest.raises(ValueError, match=r"1\.txt, line \d+: expected x y z length width height yaw class"):
            create_task("detection", data=own)
    labels.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ValueError, match=r"1\.txt cannot be read"):
        create_task("detection", data=own)
    labels.unlink()
    with pytest.raises(ValueError, match=r"1\.npy has no labels: .*1\.txt is missing"):
        create_task("detection", data=own)
    labels.write_text("")  # a scene without objects
    task = create_task("detection", data=own)
    assert sorted(len(part[i]["labels"]) for part in (task.train_set, task.eval_set) for i in range(len(part)))[0] == 0
    clouds = [own / "points" / f"{index}.npy" for index in range(4)]
    for cloud in clouds:
        cloud.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="cannot be read as a point cloud"):
        create_task("detection", data=own)
    for index, cloud in enumerate(clouds):
        np.save(cloud, np.zeros((5, 4 + index)))
    with pytest.raises(ValueError, match="columns"):
        [item for item in create_task("detection", data=own).train_set]
    for path in (own / "labels").iterdir():
        path.write_text("")
    with pytest.raises(ValueError, match="labels of the training scenes are empty"):
        create_task("detection", data=own)


def test_wrong_options_of_detection_are_refused():
    for options, said in (
        ({"extent": 0}, "extent"),
        ({"extent": 3}, "8 metres"),
        ({"beams": 1}, "beams"),
        ({"azimuths": 2.5}, "azimuths"),
        ({"objects": 0}, "objects"),
        ({"clutter": -1}, "clutter"),
    ):
        with pytest.raises(ValueError, match=said):
            create_task("detection", **options)
    task = create_task("detection", eval_items=2)
    model = Oracle(task)
    model.decode = lambda predictions: []
    with pytest.raises(ValueError, match="2 scenes, got 0"):
        evaluate(model, task)
