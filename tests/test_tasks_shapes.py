"""Shapes: points lie on their surfaces, folders are divided by class, damaged files are named."""

import numpy as np
import pytest
import torch
from plyfile import PlyData, PlyElement
from torch import nn
from torch.utils.data import DataLoader

from regard.tasks import create_task
from regard.training import TrainConfig, evaluate, train


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
