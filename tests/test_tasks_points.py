"""Point cloud tasks: points lie on their surfaces, rays end where they should, and average precision by hand."""

import numpy as np
import pytest
import torch
from plyfile import PlyData, PlyElement
from torch import nn
from torch.utils.data import DataLoader

from regard.tasks import create_task
from regard.tasks.points import AveragePrecision, average_precision, cast_rays
from regard.training import TrainConfig, evaluate, train

# ---------------------------------------------------------------------------------------------- shapes


class Constant(nn.Module):
    """Says the first class of every cloud."""

    def __init__(self, classes):
        super().__init__()
        self.bias = nn.Parameter(torch.eye(classes)[0])

    def forward(self, *, features, coordinates, offsets):
        assert len(features) == len(coordinates) == offsets[-1]
        return self.bias.expand(len(offsets) - 1, -1)


def test_clouds_vary_in_size_fill_the_unit_ball_and_batch_raggedly():
    task = create_task("shapes", points=64, train_items=32)
    batch = next(iter(DataLoader(task.train_set, 16, collate_fn=task.collate)))
    sizes = batch["offsets"].diff()
    assert sizes.min() >= 32
    assert sizes.max() <= 64
    assert len(sizes.unique()) > 4
    assert batch["label"].tolist() == [*range(8), *range(8)]
    assert batch["features"].shape == (len(batch["coordinates"]), task.in_channels)
    for cloud in batch["coordinates"].split(sizes.tolist()):
        assert torch.allclose(cloud.mean(0), torch.zeros(3), atol=1e-5)
        assert cloud.norm(dim=1).max() == pytest.approx(1, abs=1e-5)


def test_clean_spheres_are_round_and_planes_flat_in_any_pose():
    task = create_task("shapes", points=2000, noise=0.0, occlusion=0.0)
    names = task.class_names
    sphere = task.train_set[names.index("sphere")]["coordinates"]
    assert sphere.norm(dim=1).std() < 0.03
    planes = [task.train_set[names.index("plane") + 8 * step]["coordinates"] for step in range(3)]
    normals = []
    for plane in planes:
        _, spread, axes = torch.linalg.svd(plane, full_matrices=False)
        assert spread[2] < 1e-4 * spread[0]
        normals.append(axes[2])
    assert abs(normals[0] @ normals[1]) < 0.999
    assert abs(normals[0] @ normals[2]) < 0.999
    box = task.train_set[names.index("box")]["coordinates"]
    ellipsoid = task.train_set[names.index("ellipsoid")]["coordinates"]
    for cloud in (box, ellipsoid):
        assert torch.linalg.svdvals(cloud)[2] > 0.1 * torch.linalg.svdvals(cloud)[0]


def test_occlusion_and_noise_do_what_they_say():
    clean, hidden, noisy = (
        create_task("shapes", points=1000, noise=n, occlusion=o).train_set
        for n, o in ((0.0, 0.0), (0.0, 0.9), (0.1, 0.0))
    )
    spread = [torch.stack([s[8 * i]["coordinates"].norm(dim=1).std() for i in range(5)]).mean() for s in (clean, noisy)]
    assert spread[1] > 3 * spread[0]  # a sphere with noise is less round
    lost = torch.stack([torch.linalg.svdvals(hidden[8 * i]["coordinates"]) for i in range(5)])
    assert (lost[:, 2] / lost[:, 0]).min() < 0.7  # what is left of a sphere is a cap


def test_trivial_is_counted_and_a_model_that_says_it_scores_the_same():
    task = create_task("shapes", points=32, train_items=20, eval_items=30)
    assert task.trivial() == {"accuracy": pytest.approx(4 / 30)}
    assert evaluate(Constant(8), task) == pytest.approx(task.trivial())
    result = train(Constant(8), task, TrainConfig(steps=2, batch_size=4), cpu=True)
    assert len(result.losses) == 2
    with pytest.raises(ValueError, match="logits"):
        task.loss(Constant(3), task.collate([task.train_set[0]]))


def write_folder(folder, columns=3):
    rng = np.random.default_rng(0)
    for name, count in (("chair", 10), ("table", 5)):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            points = rng.normal(size=(40 + index, columns)).astype(np.float32)
            if index % 2 and columns == 3:
                vertex = np.array([tuple(p) for p in points], dtype=[(axis, "f4") for axis in "xyz"])
                PlyData([PlyElement.describe(vertex, "vertex")], text=index % 4 == 1).write(
                    str(folder / name / f"{index}.ply")
                )
            else:
                np.save(folder / name / f"{index}.npy", points)
    (folder / "readme").mkdir()


def test_own_folders_are_divided_by_class(tmp_path):
    write_folder(tmp_path / "own")
    task = create_task("shapes", data=tmp_path / "own", points=32)
    assert task.class_names == ["chair", "table"]
    assert (len(task.train_set), len(task.eval_set), task.num_classes) == (12, 3, 2)
    assert not set(task.files["train"]) & set(task.files["eval"])
    assert sorted(task.labels["eval"].tolist()) == [0, 0, 1]
    for index in range(12):
        item = task.train_set[index]
        assert item["coordinates"].shape == (32, 3)
        assert task.files["train"][index].parent.name == task.class_names[item["label"]]
        assert torch.equal(item["coordinates"], task.train_set[index]["coordinates"])
    assert task.trivial() == {"accuracy": pytest.approx(2 / 3)}
    assert "own" in task.description


def test_further_columns_become_features(tmp_path):
    write_folder(tmp_path, columns=5)
    task = create_task("shapes", data=tmp_path, points=1000)
    item = task.train_set[0]
    stored = np.load(task.files["train"][0])
    assert task.in_channels == 5
    assert np.allclose(item["features"][:, 3:], stored[:, 3:])
    assert torch.equal(item["features"][:, :3], item["coordinates"])
    np.save(tmp_path / "chair" / "wider.npy", np.zeros((4, 6)))
    with pytest.raises(ValueError, match=r"wider\.npy has 6 columns"):
        create_task("shapes", data=tmp_path)


def test_wrong_options_and_folders_are_refused_by_name(tmp_path):
    for options, said in (
        ({"points": 4}, "points"),
        ({"noise": -1}, "noise"),
        ({"occlusion": 1.0}, "occlusion"),
        ({"seed": 1.5}, "seed"),
    ):
        with pytest.raises(ValueError, match=said):
            create_task("shapes", **options)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        create_task("shapes", data=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="subfolder for each class"):
        create_task("shapes", data=tmp_path)
    write_folder(tmp_path / "own")
    bad = tmp_path / "own" / "chair" / "bad.npy"
    for content, said in (
        (np.zeros((4, 2)), r"\(4, 2\)"),
        (np.zeros((0, 3)), "no point"),
        (np.full((2, 3), np.inf), "finite"),
        (np.array([["x"] * 3]), "numbers"),
    ):
        np.save(bad, content)
        with pytest.raises(ValueError, match=rf"bad\.npy.*{said}"):
            create_task("shapes", data=tmp_path / "own")
    for content in (b"", b"nonsense"):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.npy cannot be read"):
            create_task("shapes", data=tmp_path / "own")
    bad.unlink()
    bad = bad.with_suffix(".ply")
    header = b"ply\nformat ascii 1.0\nelement vertex 3\nproperty float x\nproperty float y\nend_header\n"
    for content in (b"", b"nonsense", b"\xff\xfe\x00ply", header + b"0 0\n1 1\n2 2\n", header + b"0 0\n1"):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.ply cannot be read"):
            create_task("shapes", data=tmp_path / "own")
    bad.unlink()
    (tmp_path / "own" / "lamp").mkdir()
    np.save(tmp_path / "own" / "lamp" / "only.npy", np.zeros((4, 3)))
    with pytest.raises(ValueError, match="lamp holds one cloud"):
        create_task("shapes", data=tmp_path / "own")


# ---------------------------------------------------------------------------------------------- detection


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
            assert within.sum() >= task.min_points
        apart = torch.cdist(boxes[:, :2], boxes[:, :2]) + 100 * torch.eye(len(boxes))
        assert apart.min() > 0.5
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


@pytest.mark.parametrize(("name", "key"), [("shapes", "coordinates"), ("detection", "points")])
def test_items_are_functions_of_seed_and_index(name, key):
    first, again, other = (create_task(name, seed=seed) for seed in (3, 3, 4))
    expected = [first.train_set[index] for index in range(4)]
    torch.manual_seed(5)
    for index in reversed(range(4)):
        item = again.train_set[index]
        assert all(torch.equal(item[part], expected[index][part]) for part in item)
        for others in (other.train_set, first.eval_set):
            assert not torch.equal(item[key][:9], others[index][key][:9])


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
