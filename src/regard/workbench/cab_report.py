"""The page of the benchmark cab: one table a pattern, for the terminal, as Markdown and as HTML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from regard.systems.sequence._cab_scores import Pattern
from regard.workbench import plots, report
from regard.workbench.cab import FULL, TASKS, folder_of
from regard.workbench.report import environment, label, markdown_table, mib


def lines(results: dict[str, Any], pattern: Pattern, *, brief: bool = False) -> tuple[list[str], list[list[str]]]:
    """Column names and one line of text per mixer, best index first, then the trivial answer.

    Args:
        brief: leave out the indices of single tasks, all metrics of a task but the first, and how good the fits are.
    """
    part = results["patterns"][pattern]
    indexed = list(part["tasks"]) if len(part["tasks"]) > 1 and not brief else []
    longest = f"{results['settings']['lengths'][-1]:,}"
    most = 1 if brief else None
    metrics = [(task, metric) for task in part["tasks"] for metric in list(TASKS[pattern][task])[:most]]
    header = ["mixer", "index", *(_words(task, "index") for task in indexed), *(_words(*pair) for pair in metrics)]
    header += [f"ms at {longest}", f"MiB at {longest}", "faster from", "smaller from"]
    body = []
    for row in part["rows"]:
        index, last = row["index"], row["sizes"][-1] if row["sizes"] else {}
        cells = [label(row["mixer"]) + (" *" if row["errors"] else ""), f"{index['total']:+.2f}" if index else "-"]
        cells += [f"{index['tasks'][task]:+.2f}" if index else "-" for task in indexed]
        cells += [_score(row["scores"][task], metric) for task, metric in metrics]
        cells += [f"{1e3 * last['seconds']['median']:.3g}" if "seconds" in last else "-", mib(last.get("peak_bytes"))]
        cells += [_length(row["efficiency_length"].get(cost), results, brief) for cost in ("time", "memory")]
        body.append(cells)
    trivial = [f"{part['tasks'][task]['trivial_metrics'][metric]:.3g}" for task, metric in metrics]
    body.append(["(trivial)", "", *[""] * len(indexed), *trivial, "", "", "", ""])
    return header, body


def _words(task: str, metric: str) -> str:
    return f"{task} {metric}".replace("_", " ")


def _score(scores: dict[str, dict[str, float]] | None, metric: str) -> str:
    return "-" if scores is None else f"{scores[metric]['median']:.3g}"


def _length(found: dict[str, Any] | None, results: dict[str, Any], brief: bool) -> str:
    if found is None or found["length"] is None:
        return "-"
    if found["length"] == 0:
        return "always"
    about = "~" if found["length"] > results["settings"]["lengths"][-1] else ""
    poor = f" (R² {found['r_squared']:.2f})" if found["r_squared"] < 0.95 and not brief else ""
    return f"{about}{found['length']:,.0f}{poor}"


def tables(results: dict[str, Any]) -> list[Table]:
    """The patterns, and what each mixer can do, as terminal tables."""
    shown = []
    for pattern, part in results["patterns"].items():
        header, body = lines(results, pattern, brief=True)
        title = f"{pattern}: {', '.join(part['tasks'])}"
        shown.append(_table(title, header, body))
    matrix = results["matrix"]
    body = [[label(row["mixer"]), *("yes" if row[name] else "-" for name in list(row)[1:])] for row in matrix]
    return [*shown, _table("what each can do, as it ran just now", list(matrix[0]), body)]


def _table(title: str, header: list[str], body: list[list[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in header:
        table.add_column(column, justify="left" if column == "mixer" else "right", no_wrap=column == "mixer")
    for line in body:
        table.add_row(*line)
    return table


def problems(results: dict[str, Any], pattern: str | None = None) -> list[str]:
    """What went wrong, one line a pattern, mixer and reason."""
    return [
        f"{label(row['mixer'])}, {name}: {error}"
        for name, part in results["patterns"].items()
        if pattern in (None, name)
        for row in part["rows"]
        for error in row["errors"]
    ]


def findings(results: dict[str, Any]) -> list[str]:
    """What the numbers say, in sentences made from them."""
    said = []
    for pattern, part in results["patterns"].items():
        ranked = [row for row in part["rows"] if row["index"]]
        if not ranked:
            able = len(part["rows"])
            said.append(
                f"{pattern.capitalize()}: no index; it takes two mixers with all scores, {able} can take this place."
            )
            continue
        best, worst = ranked[0], ranked[-1]
        said.append(
            f"{pattern.capitalize()}: {label(best['mixer'])} has the highest index ({best['index']['total']:+.2f}), "
            f"{label(worst['mixer'])} the lowest ({worst['index']['total']:+.2f}), of {len(ranked)}."
        )
    absent = [pattern for pattern in TASKS if pattern not in results["patterns"]]
    if absent:
        said.append(f"No mixer of these takes the place {' or '.join(absent)}.")
    return said


def notes(results: dict[str, Any]) -> list[str]:
    """How to read the columns."""
    facts = results["machine"]
    return [
        "Index: each metric in standard deviations from the mean of the mixers in the table, better is higher; the mean of a "
        "task's metrics, then of the tasks. It depends on who takes part, and two mixers alone are always equally far apart.",
        "Faster from, smaller from (CAB's efficiency length): where a straight line through the mixer's times or memory "
        f"falls below a parabola through those of {FULL}. always: it is cheaper at every length. ~: beyond the lengths "
        f"measured. R² of the line, where it is poor. -: the cost of {FULL} has no quadratic part to speak of (its kernel "
        "need not hold the N x N matrix).",
        "Small models, short training, and tasks that stand in for the paper's: these indices cannot be compared with "
        "those of the paper.",
        f"{facts['processor']}, {facts['threads']} threads; PyTorch {facts['torch']}, regard {facts['regard']}.",
    ]


def command(settings: dict[str, Any]) -> str:
    """The command line that makes this again."""
    lengths = ",".join(map(str, settings["lengths"]))
    return (
        f"regard compare --benchmark cab --mixers {','.join(settings['mixers'])} --shapes {lengths} "
        f"--budget {settings['budget']} --seeds {settings['seeds']}"
    )


def write_report(results: dict[str, Any], out: Path) -> Path:
    """Write `out/report.html`, the same words and tables as `out/report.md`, and the report of every single comparison."""
    parts = []
    for pattern, part in results["patterns"].items():
        header, body = lines(results, pattern)
        tasks = [
            {"link": f"{folder_of(pattern, name)}/report.html"} | task  # type: ignore[arg-type]
            for name, task in part["tasks"].items()
        ]
        for task in part["tasks"]:
            folder = out / folder_of(pattern, task)  # type: ignore[arg-type]
            report.write_report(json.loads((folder / "results.json").read_text()), folder)
        known = {row["mixer"]: row for row in part["rows"]}
        # In the order asked for, with gaps, so that a mixer has one colour on the whole page.
        rows = [known.get(name, {"sizes": []}) | {"mixer": label(name)} for name in results["settings"]["mixers"]]
        plot = plots.growth(rows, "seconds", f"latency in {pattern}, ms", 1e3)
        parts.append({"pattern": pattern, "tasks": tasks, "header": header, "body": body, "plot": plot})
        parts[-1]["problems"] = problems(results, pattern)
    matrix = [row | {"mixer": label(row["mixer"])} for row in results["matrix"]]
    (out / "report.md").write_text(_markdown(results, parts, matrix), encoding="utf-8")
    page = (
        environment()
        .get_template("cab.html.j2")
        .render(
            settings=results["settings"],
            findings=findings(results),
            parts=parts,
            matrix=matrix,
            notes=notes(results),
            command=command(results["settings"]),
        )
    )
    path = out / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _markdown(results: dict[str, Any], parts: list[dict[str, Any]], matrix: list[dict[str, Any]]) -> str:
    told = [
        f"# {len(matrix)} mixers in the four patterns of CAB",
        f"`{command(results['settings'])}`",
        "\n".join(f"- {finding}" for finding in findings(results)),
    ]
    for part in parts:
        told.append(f"## {part['pattern'].capitalize()}")
        told.append("\n".join(f"- {task['name']}: {task['description']}" for task in part["tasks"]))
        told.append(markdown_table(part["header"], part["body"]))
        told += ["\n".join(f"- {line}" for line in part["problems"])] if part["problems"] else []
    told.append("## What each can do")
    cells = [[row["mixer"], *("yes" if can else "-" for can in list(row.values())[1:])] for row in matrix]
    told.append(markdown_table(list(matrix[0]), cells))
    told.append("\n".join(f"- {note}" for note in notes(results)))
    return "\n\n".join(told) + "\n"
