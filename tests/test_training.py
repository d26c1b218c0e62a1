"""The trainer: exact resume, refusals, and parameters that must not decay."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from regard.layers import SimpleRMSNorm
from regard.skeletons.host import MixerPyramid
from regard.tasks import create_task, list_tasks, own_data
from regard.training import TrainConfig, train
from regard.training.trainer import StepSampler, parameter_groups


def small():
    torch.manual_seed(3)
    return MixerPyramid("softmax", dims=(8, 16), depths=(1, 1), patch_size=8, num_classes=10)


@pytest.fixture(scope="module")
def task():
    return create_task("digits")


def test_interrupted_runs_continue_exactly(tmp_path, task):
    config = TrainConfig(steps=8, batch_size=8, save_every=3)
    straight = small()
    expected = train(straight, task, config, cpu=True)

    def stop(step, loss):
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(small(), task, config, out=tmp_path, on_step=stop, cpu=True)
    again = small()
    result = train(again, task, config, out=tmp_path, cpu=True)
    assert result.losses == expected.losses
    for ours, theirs in zip(again.parameters(), straight.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert result.metrics == expected.metrics


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_wait_for_the_end_of_the_step(tmp_path, task, number):
    """A model with dropout sends itself the signal while it computes: the step is finished and kept."""

    class Signalling(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.drop, self.calls, self.at = small(), torch.nn.Dropout(0.5), 0, None

        def forward(self, x):
            self.calls += 1
            if self.calls == self.at:
                os.kill(os.getpid(), number)
            return self.drop(self.inner(x))

    config = TrainConfig(steps=5, batch_size=8)
    expected = train(Signalling(), task, config, cpu=True)
    interrupted = Signalling()
    interrupted.at = 3
    with pytest.raises(KeyboardInterrupt):
        train(interrupted, task, config, out=tmp_path, cpu=True)
    assert [folder.name for folder in (tmp_path / "checkpoint").iterdir()] == ["step-00000003"]
    assert train(Signalling(), task, config, out=tmp_path, cpu=True).losses == expected.losses


def _train_a_language_model(out, processes, kill=False):
    """`regard train` on its command line and a small text; with `kill`, its processes are killed after a checkpoint."""
    text = out.parent / "text.txt"
    text.write_text("".join(f"{number} times {number} is {number * number}. " for number in range(700)))
    train_it = ["-m", "regard", "train", "gam", "--preset", "smoke", "--steps", "40", "--save-every", "3"]
    train_it += ["--data", str(text)]
    launch = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(
        [sys.executable, *launch, *train_it, "--out", str(out)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    if kill:
        while run.poll() is None and not any((out / "checkpoint").glob("step-*")):
            time.sleep(0.01)
        for process in [*psutil.Process(run.pid).children(recursive=True), run]:
            process.kill()
        run.communicate()
        assert run.returncode != 0, "it was killed before it had finished"
        assert not (out / "result.json").exists()
        return None
    _, errors = run.communicate(timeout=900)
    assert run.returncode == 0, errors.decode()
    return json.loads((out / "result.json").read_text())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """What one process and two make of the same recipe."""
    return {n: _train_a_language_model(tmp_path_factory.mktemp("whole") / "out", n) for n in (1, 2)}


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_language_models_go_on_without_a_change_in_the_loss_curve(tmp_path, uninterrupted, processes):
    _train_a_language_model(tmp_path / "out", processes, kill=True)
    resumed, whole = _train_a_language_model(tmp_path / "out", processes), uninterrupted[processes]
    assert len(whole["losses"]) == 40
    assert resumed["losses"] == whole["losses"]
    assert resumed["metrics"] == whole["metrics"]


def test_two_processes_compute_what_one_does(uninterrupted):
    one, two = uninterrupted[1], uninterrupted[2]
    torch.testing.assert_close(torch.tensor(two["losses"]), torch.tensor(one["losses"]), rtol=1e-4, atol=1e-4)
    assert two["metrics"].keys() == one["metrics"].keys()
    for name, row in one["metrics"].items():
        assert two["metrics"][name]["model"] == pytest.approx(row["model"], rel=1e-3), name


def test_checkpoint_of_another_recipe_is_refused(tmp_path, task):
    train(small(), task, TrainConfig(steps=1, batch_size=4), out=tmp_path, cpu=True)
    with pytest.raises(ValueError, match=r"another recipe \(steps was 1, is 2\)"):
        train(small(), task, TrainConfig(steps=2, batch_size=4), out=tmp_path, cpu=True)


def test_loss_that_is_not_finite_stops_with_advice(task):
    model = small()
    torch.nn.init.constant_(model.head.bias, float("nan"))
    with pytest.raises(ValueError, match="lower lr"):
        train(model, task, TrainConfig(steps=1, batch_size=4), cpu=True)


def test_batches_depend_on_the_step_alone():
    whole = list(StepSampler(10, 4, 0, 8, seed=1))
    assert whole[3:] == list(StepSampler(10, 4, 3, 8, seed=1))
    assert sorted(sum(whole, [])[:10]) == list(range(10)), "every item once an epoch"
    assert whole != list(StepSampler(10, 4, 0, 8, seed=2))


def test_norms_biases_and_tables_do_not_decay():
    from regard.systems.backbones.swin import SwinTransformer

    model = SwinTransformer(dim=8, depths=(1,), num_heads=(1,), window_size=4, num_classes=2)
    decayed, plain = parameter_groups(model, 0.05)
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(names[id(p)].endswith("weight") for p in decayed["params"])
    assert any("bias.table" in names[id(p)] for p in plain["params"])
    assert plain["weight_decay"] == 0


@pytest.mark.parametrize("options", [{"steps": 0}, {"lr": -1.0}, {"schedule": "linear"}, {"optimizer": "lion"}])
def test_wrong_recipes(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        TrainConfig(**options)


def test_every_task_is_where_it_is_said_to_be():
    assert "scenes" in list_tasks()
    with pytest.raises(ValueError, match="Did you mean 'scenes'"):
        create_task("scene")


def test_own_data_takes_the_place_of_the_built_in(tmp_path):
    import numpy as np
    from PIL import Image

    for label, name in enumerate(("bright", "dark")):
        (tmp_path / name).mkdir()
        for index in range(6):
            pixels = np.full((40, 50, 3), 200 - 150 * label + index, np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{index}.png")
    with own_data(str(tmp_path)):
        task = create_task("scenes", kind="local", size=32)
    assert task.num_classes == 2
    assert task.sample_shape == (3, 32, 32)
    assert create_task("scenes").num_classes == 10
    with own_data(str(tmp_path)), pytest.raises(ValueError, match="takes no data"):
        create_task("csl")
    with pytest.raises(ValueError, match="Did you mean 'size'"):
        create_task("scenes", sise=3)


def test_rms_norm_is_the_formula():
    x = torch.randn(3, 5)
    torch.testing.assert_close(SimpleRMSNorm(5)(x), x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt())
