"""`regard bench`: peers are held to our numbers before they are timed, failures stay in their rows, bars are kept."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from regard.checkpoint import KeyMap
from regard.cli import app
from regard.kernels import backends, dispatch
from regard.measure import interleaved_seconds
from regard.registry import create_mixer, create_model
from regard.workbench import bench, bench_cases
from regard.workbench.bench import Contender, Skip, run_bar, run_case
from regard.workbench.bench_cases import OPS, TIMM, Way, explained, make_case
from regard.workbench.bench_report import markdown, read, remarks, save, table
from regard.workbench.bench_suite import BARS

TINY = {
    "attention": (1, 12, 2, 8),
    "decode": (1, 300, 2, 8),
    "window_attention": (1, 14, 14, 2, 8),
    "neighborhood_attention": (1, 9, 8, 2, 8),
    "linear_attention": (1, 20, 2, 8),
    "selective_scan": (1, 20, 4, 3),
    "routed_attention": (1, 5, 4, 2, 8),
    "grouped_attention": (3, 4, 2, 8),
}


def quick(case, **options):
    return run_case(case, **{"repeats": 3, "seconds": 0.0, **options})


@pytest.fixture(autouse=True)
def small_probes(monkeypatch):
    """The machine's limits measured on next to nothing."""
    x = torch.ones(8, 8)
    probes = {"GEMM": (lambda: x @ x, 512), "copy": (x.clone, 512), "read": (x.sum, 256)}
    monkeypatch.setattr(bench, "_probes", lambda dtype: probes)


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("name", OPS)
def test_every_op_beside_its_peers(name, mode):
    """Whoever takes part agrees with us; whoever does not says why."""
    peers = [contender.name for contender in make_case(name).contenders if contender.name != "flex_attention"]
    causal = {"causal": True} if name == "linear_attention" else {}
    result = quick(make_case(name, TINY[name], Way(mode), **causal), peers=peers)
    ours, *others = result["rows"]
    assert ours["name"] == "regard"
    assert ours["seconds"]["count"] == 3
    assert ours["ratio"]["median"] == 1
    assert ours["macs"] > 0
    assert ours["peak_bytes"] > 0
    for row in others:
        assert "skipped" in row or row["difference"] < 1e-4
    assert not OPS[name].peers or any("seconds" in row for row in others)
    assert not any("numbers" in row.get("skipped", "") for row in others)


def test_multiply_adds_and_bytes_are_the_definition():
    row = quick(make_case("window_attention", (2, 14, 14, 3, 8), window_size=7), peers=[])["rows"][0]
    assert row["macs"] == 2 * 14 * 14 * 3 * 49 * 16
    assert row["bytes"] == 4 * (4 * 2 * 14 * 14 * 3 * 8)
    trained = quick(make_case("window_attention", (2, 14, 14, 3, 8), Way("training"), window_size=7), peers=[])["rows"][
        0
    ]
    assert trained["macs"] == 3 * row["macs"]


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"kernel_size": 3}, (1, 9, 8, 2, 8)),
        ({"kernel_size": (2, 3), "dilation": (3, 2)}, (1, 9, 8, 2, 8)),
        ({"kernel_size": 4, "causal": True}, (2, 9, 1, 8)),
        ({"kernel_size": (3, 2, 5)}, (1, 4, 3, 5, 1, 8)),
    ],
)
def test_masks_of_peers_mean_the_op(options, shape):
    row = quick(make_case("neighborhood_attention", shape, **options), peers=["sdpa_mask"])["rows"][1]
    assert row["difference"] < 1e-5


def test_bias_and_bfloat16():
    case = make_case("window_attention", (2, 6, 4, 2, 8), Way(dtype=torch.bfloat16), window_size=2, bias=True)
    assert [tuple(x.shape) for x in case.inputs()][-1] == (2, 4, 4)
    rows = quick(case, peers=["sdpa_windows"])["rows"]
    assert 0 < rows[1]["difference"] < 0.05


def test_who_gives_other_numbers_is_not_timed():
    case = make_case("attention", (1, 12, 2, 8))

    def breaks(inputs):
        raise Skip("no wheels")

    others = [
        Contender("wrong", lambda inputs: lambda q, k, v: v),
        Contender("nan", lambda inputs: lambda q, k, v: v * math.nan),
        Contender("flat", lambda inputs: lambda q, k, v: v.flatten()),
        Contender("fails", lambda inputs: lambda q, k, v: 1 / 0),
        Contender("skips", breaks),
        Contender("another", lambda inputs: lambda q, k, v: v.clone(), same=False),
    ]
    result = quick(replace(case, contenders=[case.contenders[0], *others]))
    rows = {row["name"]: row for row in result["rows"]}
    for name in ("wrong", "nan", "flat"):
        assert "other numbers" in rows[name]["skipped"]
        assert "seconds" not in rows[name]
    assert rows["fails"]["skipped"].startswith("ZeroDivisionError")
    assert rows["skips"]["skipped"] == "no wheels"
    assert rows["another"]["seconds"]["count"] == 3
    assert rows["another"]["macs"] == 0


def test_wrong_gradients_count():
    """The same output with half the gradient is another computation."""
    case = make_case("attention", (1, 12, 2, 8), Way("training"))
    run = case.contenders[0].build(())

    def half(q, k, v):
        out = run(q, k, v)
        return (out + out.detach()) / 2

    result = quick(replace(case, contenders=[case.contenders[0], Contender("half", lambda inputs: half)]))
    assert "by 5.0e-01" in result["rows"][1]["skipped"]


def test_a_backend_is_never_compared_with_itself():
    case = make_case("window_attention", (1, 14, 14, 2, 8))
    inputs = case.inputs()
    said = explained(lambda: case.contenders[0].build(inputs)(*inputs))["window_attention"]
    taken = [name for name in backends("window_attention") if said[name] == "taken"]
    rows = {row["name"]: row for row in quick(case)["rows"]}
    assert rows[f"regard/{taken[0]}"]["skipped"] == "regard takes this path here"


def test_mixers_beside_their_plain_paths():
    choose = dispatch._choose
    result = quick(make_case("window", (1, 14, 14, 64), Way("training"), window_size=7))
    plain = result["rows"][1]
    assert "skipped" in plain or plain["difference"] < 1e-4
    assert dispatch._choose is choose
    module = create_mixer("window", dim=32, num_heads=1)
    x = torch.randn(1, 14, 14, 32)
    assert set(explained(lambda: bench_cases.Plain(module)(x))) == {"window_attention"}


def test_threads_are_set_and_given_back():
    before = torch.get_num_threads()
    seen = []
    case = make_case("attention", (1, 12, 2, 8))
    run = case.contenders[0].build(())

    def watched(*inputs):
        seen.append(torch.get_num_threads())
        return run(*inputs)

    pair = [Contender("two", lambda inputs: watched), Contender("one", lambda inputs: watched, threads=1)]
    result = quick(replace(case, contenders=pair, threads=2))
    assert set(seen) == {1, 2}
    assert result["threads"] == 2
    assert torch.get_num_threads() == before


def test_growth_pages_and_merging(tmp_path):
    way = Way(series="linear")
    cases = [make_case("linear_attention", (1, n, 1, 8), way, causal=True) for n in (16, 32, 64)]
    bar = run_bar("linear", cases, "about it", peers=["regard/torch"], repeats=3)
    assert {fit["name"] for fit in bar["growth"]} >= {"regard"}
    assert all(fit["time"] and fit["memory"]["exponent"] > 0 for fit in bar["growth"])
    out = tmp_path / "evidence" / "bench.json"
    save({"bars": {"old": bar, "linear": bar}}, out)
    assert read(out) == json.loads(json.dumps({"bars": {"old": bar, "linear": bar}}))
    page = out.with_suffix(".md").read_text()
    assert page == markdown(read(out))
    assert page.count("## ") == 3
    assert "| linear_attention 1x64x1x8 causal float32 | regard |" in page
    assert any("time grows as N^" in line for line in remarks(bar))
    assert table(bar["cases"][0]).row_count >= 1
    out.write_text("[]")
    with pytest.raises(ValueError, match="name another file"):
        read(out)


def test_quick_calls_are_repeated():
    calls = []
    times = interleaved_seconds({"a": lambda: calls.append(1)}, rounds=3, seconds=0.0, least=0.001)["a"]
    assert len(times) == 3
    assert len(calls) > 30
    assert max(times) < 0.001


def test_a_failing_case_does_not_end_a_bar():
    good = make_case("attention", (1, 12, 2, 8))

    def fails(inputs):
        raise RuntimeError("out of luck")

    bad = replace(good, contenders=[Contender("regard", fails)])
    bar = run_bar("two", [bad, good], peers=[], repeats=3)
    assert bar["cases"][0]["error"] == "RuntimeError: out of luck"
    assert "seconds" in bar["cases"][1]["rows"][0]
    assert "regard: RuntimeError: out of luck (1 of 2 cases)" in remarks(bar)
    assert "out of luck" in markdown({"bars": {"two": bar}})
    with pytest.raises(RuntimeError):
        run_bar("one", [bad], repeats=3)


@pytest.mark.parametrize(
    ("target", "shape", "options", "message"),
    [
        ("windw_attention", (), {}, "Did you mean 'window_attention'"),
        ("window_attention", (8, 56, 56), {}, "batch x spatial x heads x head_dim, like 8x56x56x3x32"),
        ("selective_scan", (1, 8, 4, 4, 4), {}, "batch x length x channels x states"),
        ("attention", (), {"kernel_size": 3}, "attention takes no kernel_size"),
        ("linear_attention", (), {"bias": True}, "takes no bias"),
        ("window_attention", (), {"window_size": (7, 7, 7)}, "window_size must be one integer or 2 integers"),
        ("window", (1, 96), {}, "like 1x56x56x96"),
        ("swin_tiny", (1, 224, 224), {}, "like 8x3x224x224"),
        ("flatformer_waymo", (), {}, "models of images"),
    ],
)
def test_mistakes_teach(target, shape, options, message):
    with pytest.raises(ValueError, match=message):
        make_case(target, shape, **options)


def test_models_train_and_timm_is_optional():
    """A whole model at a small size; timm's model joins or says why not."""
    result = quick(make_case("poolformer_s12", (1, 3, 32, 32), Way("training")))
    assert result["size"] == 32 * 32
    timm = result["rows"][2]
    assert timm["name"] == "timm"
    assert "skipped" in timm or timm["difference"] < 1e-3


@pytest.mark.parametrize("name", ["swin_tiny", "maxvit_tiny_224", "davit_tiny", "poolformer_s12"])
def test_timm_has_the_same_models(name):
    """Its parameters, under the names that it has now, are all of ours."""
    timm = pytest.importorskip("timm", exc_type=ImportError)
    pattern = next(pattern for pattern in TIMM if re.fullmatch(pattern, name))
    theirs, rules = TIMM[pattern]
    with torch.device("meta"):
        own, model = create_model(name), timm.create_model(re.sub(pattern, theirs, name))
    renamed = own.authors_keys.apply(KeyMap(rules).apply(model.state_dict()))
    assert {key: x.shape for key, x in renamed.items()} == {key: x.shape for key, x in own.state_dict().items()}


def test_the_suite_stands():
    """Every bar builds its cases; nothing is drawn or run yet."""
    for name, bar in BARS.items():
        cases = bar()
        assert cases, name
        assert bar.__doc__
        assert all(case.contenders[0].name == "regard" for case in cases)


def test_the_command(tmp_path):
    out = tmp_path / "found" / "bench.json"

    def call(*arguments):
        return CliRunner().invoke(app, ["bench", *map(str, arguments), "--repeats", "3", "--out", str(out)])

    grids = ["--shape", "1x14x14x1x8,1x7x7x1x8", "--shape", "1x21x7x1x8"]
    done = call("window_attention", *grids, "--window-size", 7, "--bias", "--peers", "sdpa_windows", "--json")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("{")
    cases = json.loads(done.stdout)["window_attention"]["cases"]
    assert [case["size"] for case in cases] == [196, 49, 147]
    assert [[row["name"] for row in case["rows"]] for case in cases] == [["regard", "sdpa_windows"]] * 3
    again = call("neighborhood", "--shape", "1x9x8x16", "--kernel-size", "3x5", "--peers", "none", "--mode", "training")
    assert again.exit_code == 0, again.output
    assert "neighborhood 1x9x8x16 kernel_size=3x5 training float32" in again.stdout
    assert set(read(out)["bars"]) == {"window_attention", "neighborhood"}
    for arguments, message in (
        ((), "name an op"),
        (("--suite", "speed"), "Did you mean|Known: decode"),
        (("--suite", "decode", "--bias"), "have their own shapes"),
        (("attention", "--peers", "sdpq"), "Did you mean 'sdpa'"),
        (("attention", "--dtype", "float8"), "Known: bfloat16"),
    ):
        with pytest.raises(ValueError, match=message):
            raise call(*arguments).exception
