"""What `regard bench` found: tables for the terminal, one page and one JSON file that keep all bars."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from regard.workbench.store import write_json

COLUMNS = ("contender", "ms (quartiles)", "x ours", "differs", "GMAC/s", "of limit", "ktokens/s", "MiB")


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def cells(case: Mapping[str, Any]) -> Iterator[list[str]]:
    """One line of text for each contender that was timed."""
    for index, row in enumerate(case["rows"]):
        if "seconds" in row:
            seconds = row["seconds"]["median"]
            low, middle, high = (_number(1e3 * row["seconds"][key]) for key in ("low", "median", "high"))
            yield [
                row["name"],
                f"{middle} ({low}-{high})",
                f"{row['ratio']['median']:.2f}" if index else "",
                f"{row['difference']:.0e}" if "difference" in row else "",
                _number(row["macs"] / seconds / 1e9),
                f"{row['share']:.0%} {row['bound']}",
                _number(case["size"] / seconds / 1e3),
                f"{row['peak_bytes'] / 2**20:.2f}",
            ]


def remarks(bar: Mapping[str, Any]) -> list[str]:
    """What stands beside the table: growth, and why contenders are missing, each reason once."""
    said = []
    for fit in bar["growth"]:
        memory = f", memory as N^{fit['memory']['exponent']:.2f}" if fit["memory"] else ""
        said.append(f"{fit['series']}, {fit['name']}: time grows as N^{fit['time']['exponent']:.2f}{memory}")
    missing: dict[str, list[str]] = {}
    for case in bar["cases"]:
        for row in ({"name": "regard", "skipped": case.get("error")}, *case["rows"]):
            if row.get("skipped"):
                missing.setdefault(f"{row['name']}: {row['skipped']}", []).append(case["title"])
    for reason, titles in missing.items():
        said.append(reason + (f" ({len(titles)} of {len(bar['cases'])} cases)" if len(bar["cases"]) > 1 else ""))
    return said


def table(case: Mapping[str, Any]) -> Table:
    """A case for the terminal."""
    shown = Table(title=case["title"], title_justify="left")
    for column in COLUMNS:
        shown.add_column(column, justify="left" if column == "contender" else "right", no_wrap=True)
    for line in cells(case):
        shown.add_row(*line)
    return shown


_HEAD = """# What `regard bench` measured

Times are medians of calls taken in turns (A B C A B C ...) within one run, with their quartiles. *x ours*: the time as a
multiple of ours, median over the rounds. *differs*: largest distance from our output and gradients, as a share of our
largest entry; who differs by more than half the digits is not timed. *GMAC/s*: multiply-adds of the definition, not of
the path; training counts three passes. *of limit*: the share of what this machine reached in the same rounds, in a
1024 x 1024 matrix product (GEMM) or in a copy or read of 128 MiB, whichever allows less; what stays in caches may exceed
the copy. *ktokens/s*: thousands a second (of pixels for a model). *MiB*: most memory held beyond the inputs, the output
included. Compiling and building masks are not timed.
"""


def markdown(results: Mapping[str, Any]) -> str:
    """All bars as one readable page."""
    lines = [_HEAD]
    for bar in results["bars"].values():
        facts = bar["machine"]
        lines += [f"## {bar['name']}\n", f"{bar['about']}\n", f"| case | {' | '.join(COLUMNS)} |"]
        lines += ["|---|---|" + "---:|" * (len(COLUMNS) - 1)]
        lines += [f"| {case['title']} | {' | '.join(line)} |" for case in bar["cases"] for line in cells(case)]
        lines += ["", *(f"- {line}" for line in remarks(bar)), ""]
        where = f"{facts['processor']}, {facts['cores']} cores, {facts['threads']} threads, PyTorch {facts['torch']}"
        lines += [f"`{bar['command']}`, {bar['date']}, {where}.\n"]
    notes = {
        row["name"]: row["note"] for bar in results["bars"].values() for case in bar["cases"] for row in case["rows"]
    }
    return "\n".join([*lines, "## Contenders\n", *(f"- {name}: {note}" for name, note in notes.items() if note), ""])


def read(out: Path) -> dict[str, Any]:
    """What `out` holds: bars that are measured again replace those of their name, the others stay.

    Raises:
        ValueError: for a file that is something else.
    """
    if not out.exists():
        return {"bars": {}}
    try:
        return {"bars": dict(json.loads(out.read_text())["bars"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"out={str(out)!r} holds something else than results of bench: name another file.") from error


def save(results: Mapping[str, Any], out: Path) -> None:
    """Write `out` (JSON) and the page beside it (.md)."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, results)
    out.with_suffix(".md").write_text(markdown(results), encoding="utf-8")
