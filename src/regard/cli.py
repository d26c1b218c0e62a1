"""The command line: compare, bench, simulate, verify, train, systems, mixers, models."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from regard.checks import nearest

app = typer.Typer(
    name="regard",
    help="The world's attention mechanisms in one vocabulary: compare, verify, train.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)
console = Console()
notes = Console(stderr=True)

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def _print_json(content: Any) -> None:
    sys.stdout.write(json.dumps(content, indent=1) + "\n")


def _shapes(text: str | None, option: str = "--shapes") -> tuple[tuple[int, ...], ...]:
    if not text:
        return ()
    try:
        shapes = tuple(tuple(int(side) for side in shape.split("x")) for shape in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{option} takes sizes like 16x16,32x32, got {text!r}.") from None
    if any(side < 1 for shape in shapes for side in shape):
        raise typer.BadParameter(f"{option} takes sizes above 0, got {text!r}.")
    return shapes


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip()) if text else ()


class _Bar:
    """Progress of a comparison on the terminal: what is being done, and each result as it arrives."""

    def __init__(self) -> None:
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=notes,
            transient=True,
        )
        self.what = ""
        self.task: TaskID | None = None

    def start(self, what: str, total: int) -> None:
        self.what = what
        self.task = self.bar.add_task(what, total=total, note="")

    def step(self, done: int, note: str = "") -> None:
        if self.task is not None:
            self.bar.update(self.task, completed=done, note=note)

    def finish(self, note: str = "") -> None:
        if self.task is not None:
            self.bar.remove_task(self.task)
            self.task = None
            notes.print(f"[green]done[/] {self.what}" + (f": {note}" if note else ""), highlight=False)


@app.command()
def compare(
    mixers: Annotated[
        str | None,
        typer.Option(help="Names separated by commas, or all; your own as module:Class or file.py:Class."),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="scenes (the default), digits, imagefolder; moving_digits; text, masked_text, denoising; forecast, "
            "completion, translation (these three compare cross attention)."
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Your own folder of images, text file, CSV of a series or folder of videos.")
    ] = None,
    benchmark: Annotated[
        str | None, typer.Option(help="cab: self and cross attention, causal and not, each on its own tasks.")
    ] = None,
    shapes: Annotated[str | None, typer.Option(help="Grids to time each mixer on, like 16x16,32x32.")] = None,
    budget: Annotated[int, typer.Option(help="Training steps for every mixer and seed.")] = 400,
    seeds: Annotated[int, typer.Option(help="Trainings of each mixer.")] = 2,
    out: Annotated[
        Path, typer.Option(help="Where results are kept; start again with the same folder to go on.")
    ] = Path("regard-compare"),
    as_json: JsonFlag = False,
) -> None:
    """Which attention should I use? Train one small model with each mixer, measure speed and memory, write a report."""
    chosen, options = _names(mixers), {"shapes": _shapes(shapes), "budget": budget, "seeds": seeds}
    if benchmark is not None:
        _compare_cab(benchmark, chosen, {"--task": task, "--data": data}, options, out, as_json)
        return
    from regard.workbench.compare import compare as run
    from regard.workbench.compare import default_settings
    from regard.workbench.report import problems, table, write_report

    if task is None:
        task = "scenes" if data is None else _task_for(Path(data))
    settings = default_settings(task, chosen, data=data, **options)
    results = _resumable(partial(run, settings, out), out)
    report = write_report(results, out)
    if as_json:
        _print_json(results)
        return
    console.print(table(results))
    _print_end(problems(results), report, out)


def _compare_cab(
    benchmark: str, mixers: tuple[str, ...], refused: dict[str, Any], options: dict[str, Any], out: Path, as_json: bool
) -> None:
    from regard.checks import one_of
    from regard.workbench.cab import default_benchmark, run
    from regard.workbench.cab_report import problems, tables, write_report

    one_of("benchmark", benchmark, ("cab",))
    for option, value in refused.items():
        if value is not None:
            raise ValueError(f"--benchmark cab has its own tasks and data; leave {option} out.")
    results = _resumable(partial(run, default_benchmark(mixers, **options), out), out)
    report = write_report(results, out)
    if as_json:
        _print_json(results)
        return
    for table in tables(results):
        console.print(table)
    _print_end(problems(results), report, out)


def _resumable(run: Callable[[_Bar], dict[str, Any]], out: Path) -> dict[str, Any]:
    """The results of a run that shows its progress; if it is stopped, how to go on."""
    bar = _Bar()
    try:
        with bar.bar:
            return run(bar)
    except KeyboardInterrupt:
        notes.print(f"Stopped. What is finished is kept: the same command with --out {out} goes on there.")
        raise typer.Exit(130) from None


def _print_end(problems: list[str], report: Path, out: Path) -> None:
    for line in problems:
        console.print(f"* {line}", style="yellow", markup=False)
    console.print(f"Report: {report}  Data: {out / 'results.json'}", highlight=False)


def _task_for(path: Path) -> str:
    """What a user's folder or file is."""
    from regard.tasks.sources import has_images

    if path.is_file():
        return "forecast" if path.suffix.lower() == ".csv" else "text"
    if path.is_dir() and has_images(path):
        return "imagefolder"
    if path.is_dir() and any(path.rglob("*.npy")):
        return "moving_digits"
    raise ValueError(
        f"data={str(path)!r} is neither a folder of images, a folder of .npy videos nor a text or CSV file. Expected for "
        "images: one subfolder per class."
        if path.exists()
        else f"data={str(path)!r} does not exist."
    )


@app.command()
def bench(
    target: Annotated[
        str | None, typer.Argument(help="An op, mixer or model; with --suite one of its bars (default: all).")
    ] = None,
    suite: Annotated[bool, typer.Option("--suite", help="The bars that this library is judged by.")] = False,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            help="Op: batch x spatial x heads x head_dim, as 8x56x56x3x32. Mixer: 1x56x56x96. Model: 8x3x224x224. "
            "Several, to see growth: repeat it or use commas."
        ),
    ] = None,
    kernel_size: Annotated[str | None, typer.Option(help="As 7 or 3x7x7.")] = None,
    window_size: Annotated[str | None, typer.Option(help="As 7 or 8x7x7.")] = None,
    dilation: Annotated[str | None, typer.Option(help="As 4 or 1x2x2.")] = None,
    causal: Annotated[bool, typer.Option("--causal", help="See the past only.")] = False,
    bias: Annotated[bool, typer.Option("--bias", help="With a bias on the logits.")] = False,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float64.")] = "float32",
    mode: Annotated[str, typer.Option(help="forward, or training: a forward and a backward pass.")] = "forward",
    threads: Annotated[int | None, typer.Option(help="PyTorch's threads; as they are by default.")] = None,
    peers: Annotated[
        str | None, typer.Option(help="Names separated by commas, or none; by default all that are installed.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Rounds at most; slow cases take fewer, but three.")] = 15,
    out: Annotated[Path, typer.Option(help="Results, and a page beside it; bars that it holds already stay.")] = Path(
        "regard-bench.json"
    ),
    as_json: JsonFlag = False,
) -> None:
    """How fast, on my shapes? Times an op, mixer or model beside what people would use instead, in turns, checked."""
    import torch

    from regard.checks import one_of, positive
    from regard.workbench.bench import run_bar, with_threads
    from regard.workbench.bench_cases import OPS, Way, make_case
    from regard.workbench.bench_report import read, remarks, save, table
    from regard.workbench.bench_suite import BARS

    positive("repeats", repeats)
    one_of("dtype", dtype, ("float32", "bfloat16", "float64"))
    way = Way(one_of("mode", mode, ("forward", "training")), getattr(torch, dtype), target or "")
    sizes = {"--kernel-size": kernel_size, "--window-size": window_size, "--dilation": dilation}
    options: dict[str, Any] = {name[2:].replace("-", "_"): _sizes(name, text) for name, text in sizes.items() if text}
    options |= {name: True for name, asked in (("causal", causal), ("bias", bias)) if asked}
    if suite and (options or shape or (mode, dtype) != ("forward", "float32")):
        raise ValueError("the bars of --suite have their own shapes and options; leave yours out.")
    if suite:
        bars = {name: BARS[one_of("bar", name, BARS)]() for name in ([target] if target else BARS)}
    elif target is None:
        raise ValueError(f"name an op ({', '.join(OPS)}), a mixer (`regard mixers`) or a model (`regard models`).")
    else:
        shapes = [one for text in shape or [] for one in _shapes(text, "--shape")] or [()]
        bars = {target: [make_case(target, one, way, **options) for one in shapes]}
    known = {contender.name for cases in bars.values() for case in cases for contender in case.contenders[1:]}
    chosen = None if peers is None else [one_of("peer", name, [*known, "none"]) for name in _names(peers)]
    results = read(out)
    with with_threads(threads):
        for name, cases in bars.items():
            about = (BARS[name].__doc__ or "") if suite else ""
            note = partial(notes.print, highlight=False)
            bar = run_bar(name, cases, about, peers=chosen, repeats=repeats, note=note)
            results["bars"][name] = bar
            save(results, out)
            if not as_json:
                console.print(f"{name}: {about}" if about else "", highlight=False)
                for case in bar["cases"]:
                    console.print(table(case))
                for line in remarks(bar):
                    console.print(f"* {line}", style="yellow", markup=False)
    if as_json:
        _print_json({name: results["bars"][name] for name in bars})
    else:
        console.print(f"Page: {out.with_suffix('.md')}  Data: {out}", highlight=False)


def _sizes(option: str, text: str) -> int | tuple[int, ...]:
    """`7` or `3x7x7`."""
    (sizes,) = _shapes(text.replace(",", "x"), option)
    return sizes[0] if len(sizes) == 1 else sizes


@app.command()
def simulate(
    input_size: Annotated[
        str, typer.Argument(help="Tokens along each axis, as 30x48x80; or a published pattern, as hunyuan_video.")
    ],
    kernel_size: Annotated[str | None, typer.Option(help="Window, as 8 or 18x24x24.")] = None,
    stride: Annotated[
        str | None,
        typer.Option(help="As 8 or 16x8x8; several with commas. By default 1 and the smallest that is block-sparse."),
    ] = None,
    dilation: Annotated[str | None, typer.Option(help="As 4 or 1x2x2.")] = None,
    causal: Annotated[str | None, typer.Option(help="Axes that see the past only: all, or numbers, as 0,1.")] = None,
    q_tile: Annotated[
        str | None, typer.Option(help="Queries in a tile, as 4x8x8; by default the best of FNA's.")
    ] = None,
    kv_tile: Annotated[str | None, typer.Option(help="Keys in a tile, as 2x8x8.")] = None,
    layout: Annotated[
        str, typer.Option(help="tiled: tiles are boxes. flat: runs of the row-major sequence.")
    ] = "tiled",
    walk: Annotated[
        str, typer.Option(help="static: key tiles lie fixed. dynamic: from the first key needed.")
    ] = "static",
    as_json: JsonFlag = False,
) -> None:
    """How much faster than dense attention can neighborhood attention be? Counts the key tiles that a kernel visits."""
    from regard.checks import one_of
    from regard.systems.hardware.gna import PATTERNS, smallest_block_sparse_stride
    from regard.systems.hardware.gna import simulate as run

    texts = {"kernel_size": kernel_size, "dilation": dilation, "q_tile": q_tile, "kv_tile": kv_tile}
    options: dict[str, Any] = {}
    if not input_size[:1].isdigit():
        options = dict(PATTERNS[one_of("pattern", input_size, PATTERNS)])
    else:
        options["input_size"] = _sizes("INPUT_SIZE", input_size)
    options |= {name: _sizes("--" + name.replace("_", "-"), text) for name, text in texts.items() if text}
    if "kernel_size" not in options:
        raise ValueError("give the window with --kernel-size, as 8 or 18x24x24.")
    if layout == "flat":  # a published pattern's tiles are boxes
        options |= {name: texts[name] and options[name] for name in ("q_tile", "kv_tile")}
    if causal is not None:
        axes = len(options["input_size"]) if isinstance(options["input_size"], tuple) else 1
        named = [str(axis) for axis in range(axes)] if causal == "all" else list(_names(causal))
        for name in named:
            one_of("axis in --causal", name, ["all", *map(str, range(axes))])
        options["causal"] = [str(axis) in named for axis in range(axes)]
    options |= {"layout": layout, "walk": walk}
    if stride is not None:
        rows = [run(**{**options, "stride": _sizes("--stride", text)}) for text in stride.split(",")]
    else:
        rows = [run(**{**options, "stride": step}) for step in dict.fromkeys((1, options.get("stride", 1)))]
        if layout == "tiled" and (best := smallest_block_sparse_stride(rows[0])) is not None:
            rows.append(run(**{**options, "stride": best}))
    results = list({tuple(row["stride"]): row for row in (row.summary() for row in rows)}.values())
    if as_json:
        _print_json(results)
        return
    first = results[0]
    size, window, gaps, queries, keys = (
        "x".join(map(str, first[name])) for name in ("input_size", "kernel_size", "dilation", "q_tile", "kv_tile")
    )
    title = f"window {window} on {size}, dilation {gaps}; {first['q_tiles']:,} tiles of {queries} queries, "
    title += f"{first['kv_tiles']:,} of {keys} keys, {layout}, {walk}"
    table = Table(title=title, title_justify="left")
    for column in ("stride", "tiles visited", "masked", "useful", "bound by FLOPs", "bound", "block-sparse"):
        table.add_column(column, justify="left" if column in ("stride", "block-sparse") else "right")
    for row in results:
        counts = (f"{row['visits']:,}", f"{row['masked_visits']:,}", f"{row['useful']:.1%}")
        bounds = (f"{row['flop_bound']:.2f}x", f"{row['bound']:.2f}x")
        table.add_row("x".join(map(str, row["stride"])), *counts, *bounds, _cell(row["block_sparse"]))
    console.print(table)


@app.command()
def verify(
    slugs: Annotated[list[str], typer.Argument(help="Systems, or `all`.")],
    proof: Annotated[
        list[str] | None,
        typer.Option(help="exact, whole, trains, claim; may be repeated. All by default."),
    ] = None,
    preset: Annotated[str, typer.Option(help="smoke, small (what the evidence holds) or paper.")] = "small",
    out: Annotated[Path | None, typer.Option(help="Folder of the evidence files.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Does a system hold what its paper says? Run its proofs and write evidence/SLUG.json."""
    from regard.checks import one_of
    from regard.registry import get_system, list_systems
    from regard.workbench.verify import PROOFS
    from regard.workbench.verify import verify as run

    one_of("preset", preset, ("smoke", "small", "paper"))
    chosen = [one_of("proof", name, PROOFS) for name in proof or PROOFS]
    wanted = list_systems() if slugs == ["all"] else slugs
    for slug in wanted:
        get_system(slug)
    everything = []
    exact_failed = False
    for slug in wanted:
        evidence = run(
            slug,
            proofs=chosen,
            preset=cast(Any, preset),
            folder=out,
            note=lambda text: notes.print(text, highlight=False),
        )
        everything.append(evidence)
        exact_failed |= any(not evidence["proofs"][name]["holds"] for name in chosen if name in ("exact", "whole"))
        if not as_json:
            console.print(_proofs_table(evidence, chosen))
    if as_json:
        _print_json(everything)
    raise typer.Exit(1 if exact_failed else 0)


def _proofs_table(evidence: dict[str, Any], chosen: list[str]) -> Table:
    table = Table(title=f"{evidence['slug']}: {evidence['title']}", title_justify="left", show_lines=False)
    for column in ("proof", "verdict", "what was checked", "figures"):
        table.add_column(column, overflow="fold")
    for proof in chosen:
        for check in evidence["proofs"][proof]["checks"]:
            figures = ", ".join(f"{name} {value}" for name, value in check["figures"].items())
            verdict = "[green]holds[/]" if check["holds"] else "[red]does not hold[/]"
            table.add_row(proof, verdict, check["name"], figures)
    return table


@app.command()
def systems(
    matrix: Annotated[bool, typer.Option("--matrix", help="What each mixer can do, from running code.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the evidence files.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Every system and what is proven of it, from the evidence files alone."""
    from regard.workbench.verify import PROOFS, summary

    if matrix:
        mixers(as_json)
        return
    rows = summary(out)
    if as_json:
        _print_json(rows)
        return
    table = Table(title=f"{len(rows)} systems; proofs as checks that hold / checks made", title_justify="left")
    for column in ("system", "area", *PROOFS, "follows"):
        table.add_column(column)
    for row in rows:
        cells = [_colour(row[proof]) for proof in PROOFS]
        table.add_row(row["slug"], row["area"], *cells, row["basis"].replace("_", " "))
    console.print(table)


def _colour(text: str) -> str:
    if text == "missing":
        return "[yellow]missing[/]"
    good, _, total = text.partition("/")
    return f"[green]{text}[/]" if good == total and total != "0" else f"[red]{text}[/]"


@app.command()
def mixers(
    compile_too: Annotated[
        bool, typer.Option("--compile", help="Also try torch.compile and torch.export, seconds each.")
    ] = False,
    template: Annotated[
        bool, typer.Option("--template", help="Which are P(X) = M(X) X H, and what their mixing matrices M are like.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Every mixer, and what it can do: tried here and now, not read from a list."""
    if template:
        from regard.systems.sequence.million_scale import template_table

        rows = template_table()
    else:
        from regard.workbench.matrix import capabilities

        rows = capabilities(compile_too)
    if as_json:
        _print_json(rows)
        return
    columns = _TEMPLATE_COLUMNS if template else {column: column for column in rows[0]}
    table = Table(title="mixers, as they ran just now", title_justify="left", caption_justify="left")
    table.caption = _TEMPLATE_CAPTION if template else None
    for column, title in columns.items():
        table.add_column(title, no_wrap=template or column == "mixer", min_width=len(title) if template else None)
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    console.print(table)


_TEMPLATE_COLUMNS = {
    "mixer": "mixer",
    "fits": "fits",
    "data_dependent": "data",
    "rank": "rank",
    "density": "dense",
    "can_causal": "causal",
    "state": "state",
    "exponent": "N^",
}
_TEMPLATE_CAPTION = (
    "fits: is P(X) = M(X) X H, on 16 tokens; data: M depends on them; rank, dense: of M, and its share of entries that are "
    "not 0; state: of a stream; N^: growth of the cost. --json has more."
)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "[green]yes[/]" if value else "-"
    return "" if value is None else str(value)


@app.command()
def models(
    pattern: Annotated[str, typer.Argument(help="Shell pattern, like '*nat*'.")] = "*", as_json: JsonFlag = False
) -> None:
    """Published models by name, with their parameter counts."""
    from regard.registry import find_variant, list_models

    names = list_models(pattern)
    if not names:
        raise ValueError(f"no model matches {pattern!r}.{nearest(pattern.strip('*'), list_models())}")
    rows = []
    for name in names:
        system, variant = find_variant(name)
        rows.append({"model": name, "system": system.slug, "params": variant.params, "gmacs": variant.gmacs})
    if as_json:
        _print_json(rows)
        return
    table = Table()
    for column in ("model", "system", "parameters", "GMACs"):
        table.add_column(column, justify="left" if column in ("model", "system") else "right")
    for row in rows:
        params = f"{row['params']:,}" if row["params"] else ""
        table.add_row(str(row["model"]), str(row["system"]), params, f"{row['gmacs']:g}" if row["gmacs"] else "")
    console.print(table)


@app.command()
def train(
    slug: Annotated[str, typer.Argument(help="A system.")],
    preset: Annotated[str, typer.Option(help="smoke, small (minutes on two cores) or paper.")] = "small",
    task: Annotated[
        str | None, typer.Option(help="Another task that the system has a recipe for, like shapes.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Your own folder or file in place of the task's data.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps instead of the preset's.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights, batch order and dropout.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Keeps checkpoints, model and result.json; start again with it to go on.")
    ] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints; the recipe's, or 100.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Train a system on its own task or on your data; in several processes with torchrun -m regard train ..."""
    import torch

    from regard.checks import one_of
    from regard.proofs import get_proofs
    from regard.registry import get_system
    from regard.tasks import own_data
    from regard.training import is_main_process
    from regard.training import train as run
    from regard.workbench.store import write_json

    one_of("preset", preset, ("smoke", "small", "paper"))
    console.quiet = notes.quiet = not is_main_process()
    get_system(slug)
    proofs = get_proofs(slug)
    if proofs is None:
        raise ValueError(f"system {slug!r} has no recipe yet.")
    torch.manual_seed(seed)
    build = proofs.recipe_for(task)
    with own_data(data):
        recipe = build(cast(Any, preset))
    config = replace(recipe.config, seed=seed, save_every=save_every or recipe.config.save_every or 100)
    if steps is not None:
        config = replace(config, steps=steps)
    bar = _Bar()
    notes.print(recipe.task.description, highlight=False)
    try:
        with bar.bar:
            bar.start(f"train {slug}", config.steps)
            result = run(recipe.model, recipe.task, config, out=out, on_step=lambda n, x: bar.step(n, f"loss {x:.4f}"))
            bar.finish()
    except KeyboardInterrupt:
        kept = f" The same command with --out {out} goes on there." if out else " Nothing is kept without --out."
        notes.print(f"Stopped.{kept}")
        raise typer.Exit(130) from None
    trivial = recipe.task.trivial()  # by every process: metrics add up over all of them
    if not is_main_process():
        return
    rows = {name: {"model": value, "trivial": trivial.get(name)} for name, value in result.metrics.items()}
    summary = {"metrics": rows, "steps": result.steps, "seconds": result.seconds}
    if out is not None:
        write_json(
            out / "result.json", {"system": slug, "recipe": asdict(config)} | summary | {"losses": result.losses}
        )
        if hasattr(recipe.model, "save_pretrained"):
            recipe.model.save_pretrained(out / "model")  # type: ignore[operator]
    if as_json:
        _print_json(summary)
        return
    table = Table(title=f"{slug} on {recipe.task.name} after {result.steps} steps", title_justify="left")
    for column in ("metric", "model", recipe.task.trivial_answer):
        table.add_column(column)
    for name, row in rows.items():
        table.add_row(name, f"{row['model']:.4g}", "" if row["trivial"] is None else f"{row['trivial']:.4g}")
    console.print(table)


def main() -> None:
    """Entry point: errors that a user can act on come as one line, not as a traceback."""
    try:
        app(standalone_mode=True)
    except (ValueError, FileNotFoundError) as error:
        notes.print(f"[red]error:[/] {error}", highlight=False, markup=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
