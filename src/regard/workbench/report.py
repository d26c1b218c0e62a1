"""The report of a comparison: a table for the terminal and one self-contained HTML page."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from rich import box
from rich.table import Table

from regard.workbench import plots
from regard.workbench.compare import fitting_mixers


def _score(row: dict[str, Any]) -> str:
    if not row["scores"]:
        return "-"
    values = sorted(row["scores"])
    if len(values) == 1:
        return f"{values[0]:.3g}"
    return f"{row['score']['median']:.3g} ({values[0]:.3g}-{values[-1]:.3g})"


def _seconds(timed: dict[str, float] | None) -> str:
    if not timed:
        return "-"
    return f"{1e3 * timed['median']:.3g} ({1e3 * timed['low']:.3g} to {1e3 * timed['high']:.3g})"


def _largest(row: dict[str, Any]) -> dict[str, Any]:
    return row["sizes"][-1] if row["sizes"] else {}


def _growth(fit: dict[str, float] | None) -> str:
    return "-" if fit is None else f"N^{fit['exponent']:.2f} ± {fit['error']:.2f}"


def mib(count: float | None) -> str:
    """Bytes in MiB."""
    return "-" if count is None else f"{count / 2**20:.2f}"


def lines(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Column names and one line of text per mixer, best score first; for the page."""
    task = results["task"]
    shape = "x".join(map(str, results["settings"]["shapes"][-1])) if results["settings"]["shapes"] else ""
    seeds = results["settings"]["seeds"]
    header = [
        "mixer",
        f"{task['metric'].replace('_', ' ')}, " + (f"median of {seeds} seeds (range)" if seeds > 1 else "1 seed"),
        "parameters",
        "model on one sample, ms (quartiles)",
        f"mixer at {shape}, ms (quartiles)",
        f"peak memory at {shape}, MiB",
        "time grows",
        "memory grows",
        "",
    ]
    body = [
        [
            label(row["mixer"]),
            _score(row),
            f"{row['params']:,}" if row["params"] else "-",
            _seconds(row["model"].get("seconds")),
            _seconds(_largest(row).get("seconds")),
            mib(_largest(row).get("peak_bytes")),
            _growth(row["time_growth"]),
            _growth(row["memory_growth"]),
            "; ".join(row["errors"]),
        ]
        for row in _ranked(results)
    ]
    if not any(line[-1] for line in body):
        header, body = header[:-1], [line[:-1] for line in body]
    return header, body


def table(results: dict[str, Any]) -> Table:
    """The comparison as a terminal table: medians only, narrow enough for 80 columns; the page has the spread."""
    task, settings = results["task"], results["settings"]
    shape = "x".join(map(str, settings["shapes"][-1])) if settings["shapes"] else "-"
    shown = Table(
        title=f"{task['description']}\nTrivial answer ({task['trivial_answer']}): {task['trivial']:.3g}",
        title_justify="left",
        caption=f"{settings['seeds']} seed{'s (range)' if settings['seeds'] > 1 else ''}. model: one sample. ms, MiB: the "
        f"mixer alone, {shape} tokens; time and memory grow with the tokens' number N to this power. Medians; spread in "
        "the report.",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    metric = task["metric"].replace("_", " ")
    shown.add_column("mixer", overflow="fold")
    for column in (metric, "params", "model\nms", "\nms", "\nMiB", "time\nN^", "memory\nN^"):
        shown.add_column(column, justify="right", no_wrap=True)
    for row in _ranked(results):
        largest = _largest(row)
        timed, whole = largest.get("seconds"), row["model"].get("seconds")
        shown.add_row(
            label(row["mixer"]) + (" *" if row["errors"] else ""),
            _score(row),
            f"{row['params'] / 1e3:.0f} k" if row["params"] else "-",
            f"{1e3 * whole['median']:.3g}" if whole else "-",
            f"{1e3 * timed['median']:.3g}" if timed else "-",
            mib(largest.get("peak_bytes")),
            *(f"{fit['exponent']:.2f}" if fit else "-" for fit in (row["time_growth"], row["memory_growth"])),
        )
    return shown


def problems(results: dict[str, Any]) -> list[str]:
    """What went wrong, one line a mixer and reason."""
    return [f"{label(row['mixer'])}: {error}" for row in results["rows"] for error in row["errors"]]


def label(name: str) -> str:
    """A mixer's name for tables and plots: the class alone for a user's own."""
    return name.rpartition(":")[2]


def _ranked(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows with the best score first, those without a score last."""
    sign = -1 if results["task"]["higher_is_better"] else 1
    return sorted(results["rows"], key=lambda row: sign * row["score"]["median"] if row["score"] else math.inf)


def write_report(results: dict[str, Any], out: Path) -> Path:
    """Write `out/report.html`: one file, no network, readable in light and dark; and its words and table as `report.md`."""
    (out / "report.md").write_text(_markdown(results), encoding="utf-8")
    task = results["task"]
    rows = [row | {"mixer": label(row["mixer"])} for row in results["rows"]]
    header, body = lines(results)
    command = _command(results["settings"])
    page = (
        environment()
        .get_template("report.html.j2")
        .render(
            task=task,
            header=header,
            body=body,
            settings=results["settings"],
            machine=results["machine"],
            cost_dim=results["cost_dim"],
            command=command,
            score_plot=plots.score_against_latency(rows, task["metric"], task["trivial"]),
            time_plot=plots.growth(rows, "seconds", "latency of the mixer alone, ms", 1e3),
            memory_plot=plots.growth(rows, "peak_bytes", "peak memory of the mixer alone, MiB", 2**-20),
            loss_plot=plots.losses(rows),
            reads_plot=plots.reads(rows),
            findings=findings(results),
        )
    )
    path = out / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def environment() -> Environment:
    """Where the pages' templates are."""
    return Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)


def markdown_table(header: list[str], body: list[list[str]]) -> str:
    """A table whose first column is names and whose others are numbers."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] + ["---:"] * (len(header) - 1), *body])


def _markdown(results: dict[str, Any]) -> str:
    task, facts = results["task"], results["machine"]
    header, body = lines(results)
    asked = task["description"] if task["description"][-1] in ".?!" else task["description"] + "."
    told = [
        f"# {len(body)} mixers on {task['name']}",
        f"{asked} Trivial answer ({task['trivial_answer']}): {task['trivial']:.3g}. "
        f"{results['settings']['budget']} steps each. {facts['processor']}, {facts['threads']} threads.",
        f"`{_command(results['settings'])}`",
        "\n".join(f"- {finding}" for finding in findings(results)),
        markdown_table(header, body),
    ]
    return "\n\n".join(told) + "\n"


def _command(settings: dict[str, Any]) -> str:
    chosen = settings["mixers"]
    every = set(chosen) == set(fitting_mixers(settings["task"]))
    parts = ["regard compare", f"--mixers {'all' if every else ','.join(chosen)}", f"--task {settings['task']}"]
    if settings["data"]:
        parts.append(f"--data {Path(settings['data']).name}")
    shapes = ",".join("x".join(map(str, shape)) for shape in settings["shapes"])
    return " ".join([*parts, f"--shapes {shapes}", f"--budget {settings['budget']}", f"--seeds {settings['seeds']}"])


def findings(results: dict[str, Any]) -> list[str]:
    """What the numbers say, in sentences made from them; differences within the seeds' range are called that."""
    task = results["task"]
    rows = [row for row in results["rows"] if row["score"]]
    said = []
    if len(rows) > 1:
        sign = 1 if task["higher_is_better"] else -1
        ranked = sorted(rows, key=lambda row: -sign * row["score"]["median"])
        best, second = ranked[0], ranked[1]
        apart = min(sign * s for s in best["scores"]) > max(sign * s for s in second["scores"])
        behind = f"{label(second['mixer'])} ({second['score']['median']:.3g})"
        if len(best["scores"]) == 1:
            how = f"then {behind}; one seed each, which says nothing about differences between seeds."
        elif apart:
            how = f"every seed of it ahead of every seed of {behind}."
        else:
            how = f"but the seeds of {behind} overlap with it."
        name = task["metric"].replace("_", " ")
        said.append(f"Best {name}: {label(best['mixer'])} ({best['score']['median']:.3g}), {how}")
        low = [label(row["mixer"]) for row in rows if sign * row["score"]["median"] <= sign * task["trivial"]]
        if low:
            said.append(f"No better than {task['trivial_answer']}: {', '.join(low)}.")
    timed = [row for row in results["rows"] if "seconds" in _largest(row)]
    if len(timed) > 1:
        ordered = sorted(timed, key=lambda row: _largest(row)["seconds"]["median"])
        fast, slow = ordered[0], ordered[-1]
        ratio = _largest(slow)["seconds"]["median"] / _largest(fast)["seconds"]["median"]
        shape = "x".join(map(str, _largest(fast)["shape"]))
        said.append(
            f"At {shape} tokens {label(fast['mixer'])} is the fastest mixer; "
            f"{label(slow['mixer'])} takes {ratio:.3g} times as long."
        )
        steep = [label(row["mixer"]) for row in timed if row["time_growth"] and row["time_growth"]["exponent"] > 1.5]
        if steep:
            said.append(f"Time grows faster than N^1.5: {', '.join(steep)}.")
    return said
