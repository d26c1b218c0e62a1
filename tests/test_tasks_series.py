"""Series: windows in time, users' own files, what trivial answers are worth, errors."""

import math

import numpy as np
import pytest
import torch

from regard.skeletons.sequence import MixerEncoder, MixerReader
from regard.tasks import create_task
from regard.tasks.measures import measure
from regard.tasks.series import RunningMean, Seasonal, drawn_series

SMALL = {"length": 24, "horizon": 10, "period": 12, "steps": 300, "columns": 3}


def test_windows_are_the_series_in_order():
    task = create_task("forecast", **SMALL)
    first, second = task.train_set[0], task.train_set[10]
    assert first["past"].shape == (24, 3)
    assert first["future"].shape == (10, 3)
    assert torch.equal(first["future"], second["past"][14:])
    seen = torch.cat([first["past"], *(task.train_set[i]["future"][:1] for i in range(len(task.train_set)))])
    last = task.train_set[len(task.train_set) - 1]["future"][1:]
    training = torch.cat([seen, last])
    assert len(training) == 240
    torch.testing.assert_close(training.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(training.std(0, correction=0), torch.ones(3), atol=1e-5, rtol=0)
    assert torch.equal(task.eval_set[0]["past"], training[-24:]), "the first future for evaluation is the first unseen"
    with pytest.raises(IndexError):
        task.eval_set[len(task.eval_set)]


def test_drawn_series_have_seasons():
    series = drawn_series(np.random.default_rng(0), 24 * 7 * 8, 4, 24)
    power = np.abs(np.fft.rfft(series - series.mean(0), axis=0)) ** 2
    strongest = power[20:].argmax(0) + 20
    assert not (strongest % 56).any(), "56 days, and their harmonics"
    first, again, other = (create_task("forecast", seed=seed).train_set[5]["past"] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_last_season_again():
    past = torch.arange(6.0)[None, :, None]
    assert Seasonal(3, 7)(past).flatten().tolist() == [3, 4, 5, 3, 4, 5, 3]
    task = create_task("forecast", **SMALL)
    items = [task.eval_set[index] for index in range(len(task.eval_set))]
    wrong = torch.stack([item["past"][-12:-2] - item["future"] for item in items])
    assert task.trivial() == pytest.approx({"mse": wrong.square().mean().item(), "mae": wrong.abs().mean().item()})
    assert task.better(1.0, 2.0)


def test_own_csv(tmp_path):
    path = tmp_path / "own.csv"
    rows = [f"2024-01-{1 + i // 24:02d},{math.sin(i)},{2 * i},x" for i in range(200)]
    path.write_text("\n".join(["date,a,b,comment", *rows]) + "\n")
    task = create_task("forecast", data=path, length=24, horizon=12)
    assert task.columns == 2
    assert "own.csv" in task.description
    steps = task.train_set[0]["past"][:, 1].diff()
    torch.testing.assert_close(steps, steps[:1].expand(23))
    path.write_text("\n".join(str(math.sin(i)) for i in range(200)))
    assert create_task("forecast", data=path, length=24, horizon=12).columns == 1
    model = MixerReader("softmax", 2, 12, 2, dim=16, depth=1)
    assert model(torch.stack([task.train_set[i]["past"] for i in range(3)])).shape == (3, 12, 2)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (None, {}, "is not there"),
        ("a,b\n1,2\n3\n", {}, "data row 2 has 1 columns"),
        ("a,b\nx,y\n", {}, "no column that is numbers"),
        ("1,nan\n2,nan\n" * 100, {"length": 10, "horizon": 5, "period": 2}, None),
        ("1\n2\n" * 20, {"length": 30, "horizon": 8}, "has 40 steps"),
        ("1\n2\n" * 20, {"length": 20, "period": 24}, "period must be at most length=20"),
    ],
)
def test_own_csv_is_checked(tmp_path, content, options, message):
    path = tmp_path / "own.csv"
    if content is not None:
        path.write_text(content)
    if message is None:
        assert create_task("forecast", data=path, **options).columns == 1
        return
    with pytest.raises(ValueError, match=message):
        create_task("forecast", data=path, **options)


def test_enough_steps_is_enough():
    needed = 5 * 48
    with pytest.raises(ValueError, match=f"need at least {needed + 31}"):
        create_task("forecast", steps=100)
    task = create_task("forecast", steps=needed + 31)
    assert len(task.train_set) == len(task.eval_set) == 1


def test_noise_is_all_that_differs():
    task = create_task("denoising", length=512, noise=0.2)
    item = task.train_set[3]
    noise = item["inputs"] - item["targets"]
    assert noise.std().item() == pytest.approx(0.2, rel=0.1)
    assert item["targets"].min() == 0
    assert item["targets"].max() == 1
    assert not torch.equal(item["targets"], task.eval_set[3]["targets"])
    right = measure(create_task("denoising", noise=0.0, eval_items=4), lambda x: x)
    assert right["psnr"] == pytest.approx(120)
    assert right["mae"] == 0
    with pytest.raises(ValueError, match="length"):
        create_task("denoising", length=1)


def test_running_means():
    x = torch.tensor([1.0, 2.0, 6.0])[None, :, None]
    assert RunningMean(3)(x).flatten().tolist() == [1.5, 3.0, 4.0]
    task = create_task("denoising", eval_items=64)
    best = task.trivial()["psnr"]
    assert task.trivial_answer == "running mean of 5"
    assert best > measure(task, RunningMean(1))["psnr"]
    assert best > measure(task, RunningMean(17))["psnr"]
    noisy = task.train_set[0]["inputs"][None]
    assert MixerEncoder("linear", 1, 1, features=True, length=task.length, dim=16)(noisy).shape == noisy.shape
    residual = MixerEncoder("linear", 1, 1, features=True, residual=True, length=task.length, dim=16)
    assert torch.equal(residual(noisy), noisy)
    with pytest.raises(ValueError, match="as many features as outputs"):
        MixerEncoder("linear", 5, 4, residual=True)
