"""`regard compare`: it survives failing mixers and interruption, takes a user's own mixer, and tells the truth."""

from __future__ import annotations

import json
import re

import pytest
import torch

from regard.measure import fit_growth, interleaved_seconds, peak_bytes
from regard.workbench import compare as module
from regard.workbench.compare import Settings, compare, default_settings, find_mixer
from regard.workbench.report import findings, problems, table, write_report

OWN = """
from torch import nn

class Mean(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.out = nn.Linear(dim, dim)

    def forward(self, x):
        return self.out(x.mean((1, 2), keepdim=True)).expand_as(x)

class Small(Mean):
    def forward(self, x):
        if x.shape[1] > 16:
            raise RuntimeError("grids above 16 do not fit")
        return super().forward(x)
"""


def tiny(mixers, **options):
    options = {"budget": 2, "seeds": 1, "batch_size": 4, "shapes": ((4, 4), (6, 6), (8, 8)), **options}
    return Settings(mixers=tuple(mixers), options={"train_items": 16, "eval_items": 8}, **options)


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own_mixers.py"
    path.write_text(OWN)
    return path


def test_rows_hold_everything(tmp_path, own):
    results = compare(tiny(["softmax", f"{own}:Mean"], seeds=2), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "results.json").read_text())["rows"] == json.loads(
        json.dumps(results["rows"])
    )
    for row in results["rows"]:
        assert [run["seed"] for run in row["runs"]] == [0, 1]
        assert len(row["scores"]) == 2
        assert row["params"] > 0
        assert row["model"]["seconds"]["median"] > 0
        assert [size["shape"] for size in row["sizes"]] == [[4, 4], [6, 6], [8, 8]]
        assert row["time_growth"] is not None
        assert not row["errors"]


def test_a_failing_mixer_says_why_and_the_others_go_on(tmp_path, own):
    results = compare(tiny([f"{own}:Small", "linear"], shapes=((8, 8), (20, 20))), tmp_path)
    small, linear = results["rows"]
    assert small["sizes"][1]["error"] == "RuntimeError: grids above 16 do not fit"
    assert "seconds" in small["sizes"][0]
    assert "seconds" in linear["sizes"][1]
    assert problems(results) == ["Small: RuntimeError: grids above 16 do not fit"]
    assert "grids above 16 do not fit" in write_report(results, tmp_path).read_text()


def test_goes_on_where_it_was(tmp_path, monkeypatch):
    trained = []
    real = module.train

    def stopping(model, task, config, **options):
        trained.append(config.seed)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return real(model, task, config, **options)

    monkeypatch.setattr(module, "train", stopping)
    with pytest.raises(KeyboardInterrupt):
        compare(tiny(["softmax", "identity"]), tmp_path)
    assert len(list((tmp_path / "parts").glob("train-*.json"))) == 1
    results = compare(tiny(["softmax", "identity"]), tmp_path)
    assert len(trained) == 3, "only the piece that was cut short is made again"
    assert all(row["scores"] for row in results["rows"])
    again = compare(tiny(["softmax", "identity"]), tmp_path)
    assert len(trained) == 3
    assert again["rows"] == results["rows"]
    compare(tiny(["softmax", "identity"], budget=3), tmp_path)
    assert len(trained) == 5, "another budget is another piece of work"


def test_a_torn_part_is_made_again(tmp_path):
    compare(tiny(["identity"]), tmp_path)
    part = next((tmp_path / "parts").glob("train-*.json"))
    part.write_text(part.read_text()[:40])
    assert compare(tiny(["identity"]), tmp_path)["rows"][0]["scores"]


def test_same_seed_same_result(tmp_path):
    first, second = (compare(tiny(["window"]), tmp_path / name)["rows"][0]["runs"][0] for name in "ab")
    assert first["losses"] == second["losses"]
    assert first["metrics"] == second["metrics"]


def test_edited_mixers_are_measured_anew(tmp_path, own):
    compare(tiny([f"{own}:Mean"]), tmp_path / "out")
    own.write_text(OWN.replace("nn.Linear(dim, dim)", "nn.Linear(dim, dim, bias=False)"))
    import linecache

    linecache.clearcache()
    compare(tiny([f"{own}:Mean"]), tmp_path / "out")
    assert len(list((tmp_path / "out" / "parts").glob("train-*.json"))) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda own: find_mixer("softmaks"), "Did you mean 'softmax'"),
        (lambda own: find_mixer("no_such_module:Thing"), "cannot import no_such_module"),
        (lambda own: find_mixer("nowhere.py:Thing"), "there is no file"),
        (lambda own: find_mixer(f"{own}:Maen"), "Did you mean 'Mean'"),
        (lambda own: default_settings("secnes"), "Did you mean 'scenes'"),
        (lambda own: Settings(mixers=("softmax",), budget=0), "budget must be above 0"),
        (lambda own: Settings(mixers=()), "at least one"),
        (lambda own: Settings(mixers=("linear", "linear")), "twice"),
        (lambda own: Settings(mixers=("linear",), shapes=((8,),)), "need 2 sizes"),
    ],
)
def test_wrong_settings_teach(own, make, message):
    with pytest.raises(ValueError, match=message):
        make(own)


def test_report_is_self_contained(tmp_path):
    results = compare(tiny(["softmax", "identity"]), tmp_path)
    page = write_report(results, tmp_path).read_text()
    links = [link for link in re.findall(r'(?:src|href)="([^"]+)"', page) if not link.startswith(("#", "data:"))]
    assert not links, links
    assert page.count("<svg") == 5
    assert "<script" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)), "ids clash between the plots"
    for used in re.findall(r"url\(#([^)]+)\)", page):
        assert used in ids
    assert table(results).row_count == 2
    assert findings(results)


def test_findings_say_when_seeds_overlap():
    def row(name, scores):
        return {"mixer": name, "scores": scores, "score": {"median": sorted(scores)[len(scores) // 2]}, "sizes": []}

    task = {"metric": "accuracy", "higher_is_better": True, "trivial": 0.1, "trivial_answer": "the most frequent class"}
    apart = findings({"task": task, "rows": [row("a", [0.8, 0.9]), row("b", [0.5, 0.6])]})
    close = findings({"task": task, "rows": [row("a", [0.5, 0.9]), row("b", [0.6, 0.7])]})
    assert "every seed of it ahead" in apart[0]
    assert "overlap" in close[0]
    assert "one seed each" in findings({"task": task, "rows": [row("a", [0.9]), row("b", [0.5])]})[0]
    chance = findings({"task": task, "rows": [row("a", [0.8, 0.9]), row("b", [0.1, 0.1])]})
    assert chance[1] == "No better than the most frequent class: b."


def test_growth_is_a_fitted_exponent():
    fit = fit_growth([100, 200, 400, 800], [1.0, 4.0, 16.0, 64.0])
    assert fit is not None
    assert fit["exponent"] == pytest.approx(2)
    assert fit["error"] == pytest.approx(0, abs=1e-6)
    assert fit_growth([1, 2], [1, 2]) is None


def test_peak_memory_counts_temporaries():
    x = torch.zeros(1 << 18)  # 1 MiB
    assert peak_bytes(lambda: (x + 1) * 2) == pytest.approx(2 << 20, rel=0.01)
    assert peak_bytes(lambda: x.sum()) < 1 << 16


def test_candidates_take_turns():
    order = []
    interleaved_seconds({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, seconds=0)
    assert order == ["a", "b"] * 4
