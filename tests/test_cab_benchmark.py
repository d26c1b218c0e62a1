"""CAB's two scores against the authors' figures, the four patterns in the workbench, and the benchmark as a whole."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from torch import nn
from typer.testing import CliRunner

from regard import registry
from regard.cli import app
from regard.layers import SoftmaxAttention
from regard.systems.sequence._cab_scores import (
    CONSTANTS,
    ScoredMetric,
    compositional_index,
    efficiency_length,
    norm_of,
)
from regard.workbench import compare as compare_module
from regard.workbench import matrix, plots
from regard.workbench.cab import DEFAULT_MIXERS, SIZES, TASKS, Benchmark, default_benchmark, run
from regard.workbench.cab_report import findings, lines, problems, tables, write_report
from regard.workbench.compare import Settings, compare
from regard.workbench.matrix import patterns

GOLDEN = Path(__file__).parent / "golden"

SMALL = {
    "masked_text": {"length": 16},
    "text": {"length": 16},
    "denoising": {"length": 16, "train_items": 8, "eval_items": 4},
    "forecast": {"length": 24, "horizon": 8, "period": 12, "steps": 150, "columns": 2},
    "completion": {"points": 8, "train_items": 8, "eval_items": 4},
    "translation": {"length": 4, "words": 5, "train_items": 8, "eval_items": 4},
}


@pytest.fixture
def short_text(monkeypatch):
    monkeypatch.setattr("regard.tasks.language.python_documentation", lambda: b"The quick brown fox. " * 40)


@pytest.fixture(scope="module")
def index():
    return json.loads((GOLDEN / "cab.index.json").read_text())


@pytest.mark.parametrize("pattern", CONSTANTS)
def test_index_is_the_authors(index, pattern):
    key = pattern.title()
    result = compositional_index(index["input"][key], pattern)
    assert list(result.metrics) == index["metrics"][key]
    assert list(result.metrics.values()) == pytest.approx(index["metric_scores"][key], rel=1e-12)
    expected = dict(index["output"][key])
    total = expected.pop("total")
    assert result.tasks == pytest.approx(expected, abs=index["tolerance"])
    assert result.total == pytest.approx(total, abs=index["tolerance"])


def test_norm_over_methods_at_hand():
    metrics = (ScoredMetric("loss", "a"), ScoredMetric("hits", "b", higher_is_better=True), ScoredMetric("same", "b"))
    table = {
        "x": {"loss": 1.0, "hits": 0.9, "same": 0.1},
        "y": {"loss": 3.0, "hits": 0.5, "same": 0.1},
        "z": {"loss": 2.0, "hits": 0.7, "same": 0.1},
    }
    norm = norm_of(table, metrics)
    assert [metric.sigma for metric in norm] == pytest.approx([1.0, 0.2, 0.0])
    indices = {name: compositional_index(scores, norm) for name, scores in table.items()}
    assert indices["x"].tasks == pytest.approx({"a": 1.0, "b": 0.5})
    assert indices["x"].total == pytest.approx(0.75)
    assert sum(index.total for index in indices.values()) == pytest.approx(0)
    with pytest.raises(ValueError, match="at least two methods"):
        norm_of({"x": table["x"]}, metrics)


@pytest.mark.parametrize(
    ("scores", "norm", "message"),
    [
        ([1.0, 2.0], "causal cross", "must be 5 numbers"),
        ({"R1": 1.0}, "causal cross", "must be those of TTTS MCD"),
        ([1.0], "causal sideways", "one of noncausal self"),
    ],
)
def test_wrong_scores_teach(scores, norm, message):
    with pytest.raises(ValueError, match=message):
        compositional_index(scores, norm)


@pytest.mark.parametrize(("cost", "skip", "unit"), [("memory", 0, 1), ("time", 1, 1000)])
def test_efficiency_length_is_the_authors(cost, skip, unit):
    record = json.loads((GOLDEN / "cab.efficiency_length.json").read_text())
    full = [unit * value for value in record["vanilla"][cost]]
    efficient = [unit * value for value in record["input"][cost]["abc"]]
    result = efficiency_length(record["lengths"], full, efficient, skip=skip)
    expected = record["output"][cost]["abc"]
    assert round(result.length) == pytest.approx(expected["efficiency_length"], abs=record["tolerance"])
    assert result.r_squared == pytest.approx(expected["r_squared"], rel=1e-9)


def test_efficiency_length_of_known_curves():
    lengths = [100, 200, 400, 800]
    square = [n * n / 100 for n in lengths]
    assert efficiency_length(lengths, square, [3 * n + 100 for n in lengths]).length == pytest.approx(330.277564)
    always = efficiency_length(lengths, [n * n / 100 + 2 * n + 50 for n in lengths], lengths)
    assert always.length == 0
    assert efficiency_length(lengths, [2.0 * n - n * n / 1e4 for n in lengths], lengths).length is None
    with pytest.raises(ValueError, match="three different"):
        efficiency_length([1, 2], [1, 2], [1, 2])
    with pytest.raises(ValueError, match="as many"):
        efficiency_length(lengths, square, [1.0])


class Leaky(SoftmaxAttention):
    """Says of itself that it can be everything, and looks at the whole sequence always."""

    def forward(self, x, context=None):
        self.causal = False
        return super().forward(x, context) + (0 if context is None else x.mean(1, keepdim=True))


class Forgets(SoftmaxAttention):
    """Takes a context, and does not read it."""

    def forward(self, x, context=None):
        return super().forward(x)


@pytest.mark.parametrize(
    ("mixer", "expected"),
    [
        ("softmax", "1111"),
        ("linear", "1111"),
        ("window", "1000"),
        ("identity", "1100"),
        ("lightning", "0100"),  # always decays into the past
        ("gna", "1110"),  # its context comes beside the neighbourhood of the queries
        ("factorized", "0000"),  # takes no sequences
        (Leaky, "1010"),
        (Forgets, "1100"),
        (lambda dim: nn.Linear(dim, dim), "1000"),
        # The paper's table; its own Performer is not offered as causal, for want of a sum over the past.
        ("local", "1100"),
        ("abc", "1111"),
        ("nystrom", "1000"),
        ("performer", "1111"),
        ("lara", "1000"),
        ("cosformer", "1010"),
        ("probsparse", "1000"),
        ("s4d", "1100"),
        ("transformer_ls", "1000"),
        ("causal_transformer_ls", "0100"),
    ],
)
def test_patterns_are_found_by_running(mixer, expected):
    assert list(patterns(mixer)) == list(CONSTANTS)
    assert "".join(str(int(can)) for can in patterns(mixer).values()) == expected


def test_capabilities_hold_the_patterns():
    row = matrix._row("linear", compile_too=False)
    assert all(row[pattern] for pattern in CONSTANTS)
    assert row["streaming"]
    assert next(iter(row)) == "mixer"


def test_models_that_saw_the_answers_have_no_score(tmp_path, short_text, monkeypatch):
    monkeypatch.setitem(registry._MIXERS, "leaky", Leaky)
    for task in ("translation", "text"):
        settings = Settings(("leaky",), task, budget=2, seeds=1, batch_size=2, options=SMALL[task])
        (row,) = compare(settings, tmp_path / task)["rows"]
        assert row["scores"] == []
        assert "depend on later tokens" in row["errors"][0]


def tiny(*mixers, **options):
    options = {"budget": 2, "seeds": 1, "batch_size": 4, "lengths": (8, 16, 24), "options": SMALL} | options
    return Benchmark(mixers=mixers, **options)


def test_benchmark_from_end_to_end(tmp_path, short_text, monkeypatch):
    monkeypatch.setattr(
        plots, "_svg", lambda figure, label: plots.plt.close(figure) or "<svg></svg>"
    )  # drawing is slow
    results = run(tiny("softmax", "linear", "window"), tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))
    assert list(results["patterns"]) == list(CONSTANTS)
    assert [row["mixer"] for row in results["matrix"]] == ["softmax", "linear", "window"]
    for pattern, part in results["patterns"].items():
        assert list(part["tasks"]) == list(TASKS[pattern])
        assert len(part["rows"]) == (3 if pattern == "noncausal self" else 2)
        totals = [row["index"]["total"] for row in part["rows"]]
        assert totals == sorted(totals, reverse=True)
        assert sum(totals) == pytest.approx(0, abs=1e-9)
        for row in part["rows"]:
            assert not row["errors"]
            assert [size["shape"] for size in row["sizes"]] == [[8], [16], [24]]
            assert set(row["efficiency_length"]) == (set() if row["mixer"] == "softmax" else {"time", "memory"})
            for task, metrics in TASKS[pattern].items():
                assert list(row["scores"][task]) == list(metrics)
    page = write_report(results, tmp_path).read_text()
    links = re.findall(r'href="([^#"]+)"', page)
    assert len(links) == 1 + sum(len(tasks) for tasks in TASKS.values())
    assert all((tmp_path / link).is_file() for link in links if not link.startswith("https://arxiv.org"))
    assert page.count("<svg") == 4
    assert "## Causal cross" in (tmp_path / "report.md").read_text()
    assert [table.row_count for table in tables(results)] == [4, 3, 3, 3, 3]

    def again(*arguments, **options):
        raise AssertionError("everything was finished already")

    monkeypatch.setattr(compare_module, "train", again)
    monkeypatch.setattr(compare_module, "_timed", again)
    assert run(tiny("softmax", "linear", "window"), tmp_path)["patterns"] == results["patterns"]


def test_benchmark_goes_on_without_what_fails(tmp_path, short_text, monkeypatch):
    """A mixer that fails in one task has no index there, and the others are normalised without it."""
    real = compare_module.train

    def sometimes(model, task, config, **options):
        if task.name == "forecast" and "LinearAttention" in str(model):
            raise RuntimeError("out of luck")
        return real(model, task, config, **options)

    monkeypatch.setattr(compare_module, "train", sometimes)
    for pattern in ("noncausal self", "causal self", "causal cross"):
        monkeypatch.delitem(TASKS, pattern)
    results = run(tiny("softmax", "linear"), tmp_path)
    rows = {row["mixer"]: row for row in results["patterns"]["noncausal cross"]["rows"]}
    assert rows["linear"]["scores"]["forecast"] is None
    assert rows["linear"]["index"] is None
    assert rows["softmax"]["index"] is None, "alone there is nothing to normalise among"
    assert problems(results) == ["linear, noncausal cross: RuntimeError: out of luck"]
    header, body = lines(results, "noncausal cross")
    assert body[0][:2] == ["softmax", "-"]
    assert body[1][0] == "linear *"
    assert len(header) == len(body[0])
    assert "no index" in findings(results)[0]


def test_default_mixers_exist():
    assert set(DEFAULT_MIXERS) <= set(registry.list_mixers())
    assert default_benchmark(["all"]).mixers == tuple(registry.list_mixers())
    assert default_benchmark(shapes=[(8,), (16,)]).lengths == (8, 16)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda out: run(tiny("sofmax"), out), "Did you mean 'softmax'"),
        (lambda out: run(tiny(), out), "at least one"),
        (lambda out: run(tiny("factorized"), out), "none of these mixers works"),
        (lambda out: run(tiny("softmax", "softmax"), out), "twice"),
        (lambda out: run(tiny("softmax", budget=0), out), "budget must be above 0"),
        (lambda out: run(tiny("softmax", options={"txt": {}}), out), "Did you mean 'text'"),
        (lambda out: default_benchmark(shapes=[(8, 8)]), "lengths of sequences"),
    ],
)
def test_wrong_benchmarks_teach(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path)
    assert not list(tmp_path.iterdir()), "nothing has run"


@pytest.fixture
def command(tmp_path):
    def invoke(*arguments):
        return CliRunner(env={"COLUMNS": "100"}).invoke(app, ["compare", "--out", str(tmp_path / "out"), *arguments])

    return invoke


def test_command_line(command, tmp_path, monkeypatch):
    for pattern in ("noncausal self", "causal self", "noncausal cross"):
        monkeypatch.delitem(TASKS, pattern)
    monkeypatch.setitem(SIZES, "translation", SMALL["translation"])
    size = ["--budget", "2", "--seeds", "1", "--shapes", "8,16,24"]
    done = command("--benchmark", "cab", "--mixers", "softmax,abc,window", *size)
    assert done.exit_code == 0, done.output
    assert "causal cross: translation" in done.stdout
    assert "window" in done.stdout, "in the matrix, if nowhere else"
    assert (tmp_path / "out" / "causal_cross" / "translation" / "report.html").is_file()
    again = command("--benchmark", "cab", "--mixers", "softmax,abc,window", *size, "--json")
    assert list(json.loads(again.stdout)["patterns"]) == ["causal cross"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--benchmark", "cub"], "Did you mean 'cab'"),
        (["--benchmark", "cab", "--task", "text"], "leave --task out"),
        (["--benchmark", "cab", "--data", "book.txt"], "leave --data out"),
        (["--benchmark", "cab", "--shapes", "8x8"], "lengths of sequences"),
        (["--task", "forcast"], "Did you mean 'forecast'"),
        (["--task", "forecast", "--shapes", "8x8"], "need 1 sizes"),
    ],
)
def test_wrong_commands_teach(command, arguments, message):
    done = command(*arguments)
    assert isinstance(done.exception, ValueError)
    assert message in str(done.exception)


def test_a_csv_file_is_a_series(command, tmp_path):
    (tmp_path / "own.csv").write_text("\n".join(str(index % 24) for index in range(400)))
    size = ["--budget", "2", "--seeds", "1", "--shapes", "8,16,24", "--json"]
    done = command("--data", str(tmp_path / "own.csv"), "--mixers", "linear", *size)
    results = json.loads(done.stdout)
    assert results["task"]["name"] == "forecast"
    assert results["task"]["trivial"] == pytest.approx(0, abs=1e-9)
    assert results["rows"][0]["scores"]
