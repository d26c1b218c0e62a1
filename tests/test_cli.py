"""The command line: what it prints, and what it says when asked for something that is not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest


def regard(*arguments, cwd=None, **environment):
    """Run the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "regard", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "COLUMNS": "120", "OMP_NUM_THREADS": "1", **environment},
        timeout=300,
    )


def test_compare_to_report(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\nclass Mine(nn.Linear):\n    def __init__(self, dim):\n        super().__init__(dim, dim)\n"
    )
    size = ["--budget", 2, "--seeds", 1, "--shapes", "4x4,6x6"]
    command = ["compare", "--mixers", "identity,mine:Mine", *size, "--out", "out"]
    done = regard(*command, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert [row["mixer"] for row in results["rows"]] == ["identity", "mine:Mine"]
    assert (tmp_path / "out" / "report.html").exists()
    again = regard(*command, cwd=tmp_path, NO_COLOR="1")
    assert "Mine" in again.stdout
    assert "\x1b[3" not in again.stdout
    assert "train" not in again.stderr, "everything was finished already"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "--mixers", "sofmax"], "Did you mean 'softmax'"),
        (["compare", "--task", "scnes"], "Did you mean 'scenes'"),
        (["compare", "--shapes", "16by16"], "sizes like 16x16"),
        (["compare", "--data", "/nowhere/at/all"], "does not exist"),
        (["verify", "swim"], "Did you mean 'swin'"),
        (["verify", "swin", "--proof", "exakt"], "Did you mean 'exact'"),
        (["train", "swin", "--preset", "huge"], "not known"),
        (["models", "*swim*"], "no model matches"),
        (["simulate", "flux_4"], "Did you mean 'flux_4k'"),
        (["simulate", "64x64", "--kernel-size", "65"], "must fit into input_size"),
    ],
)
def test_mistakes_are_one_line_and_teach(tmp_path, arguments, message):
    done = regard(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_empty_and_corrupt_folders(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    done = regard("compare", "--data", empty, cwd=tmp_path)
    assert done.returncode == 2
    assert "neither a folder of images" in " ".join(done.stderr.split())
    for name in ("cats", "dogs"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "one.png").write_bytes(b"not an image")
    done = regard("compare", "--data", tmp_path / "images", cwd=tmp_path)
    assert done.returncode == 2
    assert "one.png" in " ".join(done.stderr.split())


def test_verify_writes_evidence_and_systems_reads_it(tmp_path):
    done = regard("verify", "swin", "--proof", "exact", "--out", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    evidence = json.loads((tmp_path / "swin.json").read_text())
    assert evidence["proofs"]["exact"]["holds"] is True
    assert evidence["proofs"]["exact"]["command"] == "regard verify swin --proof exact --preset small"
    rows = {row["slug"]: row for row in json.loads(regard("systems", "--out", tmp_path, "--json").stdout)}
    assert rows["swin"]["exact"] == "2/2"
    assert rows["swin"]["whole"] == "missing"
    assert rows["dinat"]["exact"] == "missing"


def test_train_goes_on(tmp_path):
    first = regard("train", "swin", "--preset", "smoke", "--out", tmp_path / "run", "--json")
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout)["steps"] == 2
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    second = regard("train", "swin", "--preset", "smoke", "--steps", 5, "--out", tmp_path / "run")
    assert second.returncode == 2
    assert "another recipe" in " ".join(second.stderr.split())


def test_simulate_finds_the_published_stride():
    done = regard(
        "simulate", "30x48x80", "--kernel-size", "18x24x24", "--q-tile", "2x8x8", "--kv-tile", "2x8x8", "--json"
    )
    assert done.returncode == 0, done.stderr
    sliding, strided = json.loads(done.stdout)
    assert (sliding["stride"], strided["stride"]) == ([1, 1, 1], [2, 8, 8])
    assert sliding["bound"] < strided["bound"] == pytest.approx(strided["flop_bound"])
    assert strided["block_sparse"]
    table = regard("simulate", "sequence_32k", "--stride", "192,256", NO_COLOR="1").stdout
    assert "16.00x" in table
    assert "13.84x" in table


def test_models_lists_counts():
    rows = json.loads(regard("models", "swin_*", "--json").stdout)
    assert {"model": "swin_tiny", "system": "swin", "params": 28288354, "gmacs": 4.494} in rows


def test_import_is_quick():
    """Importing the package costs next to nothing beyond PyTorch: no system, no workbench, no hub is loaded."""
    code = "import torch, sys; before = set(sys.modules); import regard; print(len(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 10
