"""FlatFormer: the detector learns scenes by heart, and the encoder is trained on a user's own folders."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from regard.cli import app
from regard.proofs.flatformer import _small_detector
from regard.systems.points.flatformer import FlatFormerClassifier
from regard.tasks import create_task
from regard.training import seeded


def regard(*arguments):
    """What the command line prints as JSON; its errors as they are, before `main` makes one line of them."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    return json.loads(result.stdout)


def test_scenes_are_learned_by_heart():
    """Targets, loss, decoding and matching fit together: two scenes are found again almost perfectly."""
    task = create_task("detection", extent=10, azimuths=100, objects=6, clutter=3, seed=11)
    model = seeded(lambda: _small_detector(task), 0)
    batch = task.collate([task.train_set[0], task.train_set[1]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
    for _ in range(60):
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
    metrics = task.metrics()
    with torch.no_grad():
        task.update(metrics, model.eval(), batch)
    assert float(metrics["ap"].compute()) > 0.9


def test_classifier_pools_each_cloud_by_itself():
    model = seeded(lambda: FlatFormerClassifier(4, 16, 2, 1, 5, 12, vfe_dims=(8, 16), in_chans=2), 0).eval()
    generator = torch.Generator().manual_seed(0)
    places, values = torch.rand(90, 3, generator=generator) * 2 - 1, torch.randn(90, 2, generator=generator)
    offsets = torch.tensor([0, 40, 40, 90])
    logits = model(features=values, coordinates=places, offsets=offsets)
    alone = model(features=values[40:], coordinates=places[40:], offsets=torch.tensor([0, 50]))
    assert logits.shape == (3, 4)
    assert torch.allclose(logits[2:], alone, atol=1e-5)
    assert torch.isfinite(logits).all()
    model.reset_classifier(0)
    assert model(features=values, coordinates=places, offsets=offsets).shape == (3, 32)
    with pytest.raises(ValueError, match="coordinates must be"):
        model(features=values, coordinates=places[:, :2], offsets=offsets)
    with pytest.raises(ValueError, match="no point lies in the range"):
        model(features=values, coordinates=places + 9, offsets=offsets)


def test_a_folder_of_clouds_from_the_command_line(tmp_path):
    rng = np.random.default_rng(0)
    for name, flat in (("ball", 1.0), ("sheet", 0.02)):
        (tmp_path / "own" / name).mkdir(parents=True)
        for index in range(15):
            np.save(tmp_path / "own" / name / f"{index}.npy", rng.normal(size=(60, 3)) * [1, 1, flat])
    command = ["train", "flatformer", "--task", "shapes", "--data", tmp_path / "own"]
    accuracy = regard(*command, "--steps", 25, "--out", tmp_path / "run")["metrics"]["accuracy"]
    assert accuracy["trivial"] == 0.5
    assert accuracy["model"] > 0.9
    model = FlatFormerClassifier.from_pretrained(tmp_path / "run" / "model")
    assert model.num_classes == 2
    (tmp_path / "own" / "ball" / "3.npy").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"3\.npy cannot be read as a point cloud"):
        regard(*command, "--preset", "smoke")


def test_own_scenes_from_the_command_line(tmp_path):
    drawn = create_task("detection", extent=10, azimuths=60, train_items=5).train_set
    for index in range(5):
        scene = drawn[index]
        np.save(tmp_path / f"{index}.npy", scene["points"])
        named = zip(scene["boxes"].tolist(), scene["labels"].tolist(), strict=True)
        lines = [" ".join([*map(str, box), f"class{label}"]) for box, label in named]
        (tmp_path / f"{index}.txt").write_text("\n".join(lines))
    result = regard("train", "flatformer", "--data", tmp_path, "--preset", "smoke")
    assert {"ap", "ap_class0"} <= set(result["metrics"])


def test_mistakes_teach(tmp_path):
    for arguments, message in (
        (["--data", tmp_path], "at least two scenes"),
        (["--task", "shapes", "--data", tmp_path], "subfolder for each class"),
        (["--task", "shaps"], "Did you mean 'shapes'"),
    ):
        with pytest.raises(ValueError, match=message):
            regard("train", "flatformer", *arguments)
