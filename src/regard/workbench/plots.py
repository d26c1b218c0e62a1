"""Plots of a comparison as inline SVG: readable on light and dark pages, no scripts, no files beside the page."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

INK = "#7c8794"
"""Axes and text: has enough contrast on white and on near-black."""
_READS_ACROSS = 9
COLOURS = ("#3f7fd9", "#e0702d", "#2fa36b", "#c34a8e", "#8a66d6", "#b8901f", "#3aa6b9", "#d0504f", "#6f8f2f", "#8d6e63")
MARKERS = "osD^vPX*hd"

_STYLE: Any = {
    "font.size": 10,
    "font.family": "sans-serif",
    "svg.fonttype": "none",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": INK,
    "grid.alpha": 0.25,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
}


def style_of(index: int) -> dict[str, Any]:
    """Colour and marker of row `index`: the same in every plot, told apart without colour too."""
    turn, place = divmod(index, len(COLOURS))
    return {"color": COLOURS[place], "marker": MARKERS[(place + turn) % len(MARKERS)]}


def _canvas(rows: Sequence[Any], height: float) -> tuple[Figure, Axes]:
    """A figure whose texts stay apart: of twice the size beyond a dozen rows."""
    scale = 1.0 if len(rows) <= 12 else 2.0
    return plt.subplots(figsize=(6.4 * scale, height * scale))


def _svg(figure: Figure, label: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # Ids are only unique inside one figure; the page holds several.
    stamp = re.sub(r"\W", "", label)
    text = re.sub(r'id="([^"]+)"', rf'id="{stamp}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{stamp}-\1)", text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{stamp}-\1"', text)
    text = re.sub(r'\s(width|height)="[\d.]+pt"', "", text, count=2)
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def score_against_latency(rows: Sequence[dict[str, Any]], metric: str, trivial: float) -> str:
    """One point a mixer: milliseconds of the whole model on one sample, and the score of every seed."""
    with plt.rc_context(_STYLE):
        figure, axis = _canvas(rows, 4.0)
        for index, row in enumerate(rows):
            timed = row["model"].get("seconds")
            if not timed or not row["scores"]:
                continue
            x, look = 1e3 * timed["median"], style_of(index)
            axis.plot([x] * 2, [min(row["scores"]), max(row["scores"])], color=look["color"], alpha=0.5, lw=2)
            axis.plot(
                [1e3 * timed["low"], 1e3 * timed["high"]], [row["score"]["median"]] * 2, color=look["color"], alpha=0.5
            )
            axis.plot(x, row["score"]["median"], ls="none", ms=8, label=row["mixer"], **look)
            axis.annotate(row["mixer"], (x, row["score"]["median"]), xytext=(8, 5), textcoords="offset points")
        axis.axhline(trivial, ls=":", color=INK)
        axis.annotate(
            "trivial answer", (0.99, trivial), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=9
        )
        axis.set(xlabel="latency of the whole model on one sample, ms", ylabel=metric.replace("_", " "))
        axis.set_xlim(left=0)
        axis.margins(x=0.15, y=0.12)
        axis.grid(True)
        return _svg(figure, f"{metric} against latency")


def growth(rows: Sequence[dict[str, Any]], value: str, label: str, unit: float) -> str:
    """Latency or memory of each mixer alone over tokens, on log axes, with the fitted line."""
    with plt.rc_context(_STYLE):
        figure, axis = _canvas(rows, 4.0)
        fit_name = "time_growth" if value == "seconds" else "memory_growth"
        ticks: set[int] = set()
        for index, row in enumerate(rows):
            points = [(int(np.prod(size["shape"])), size) for size in row["sizes"] if value in size]
            if not points:
                continue
            tokens = np.array([count for count, _ in points], float)
            ticks |= {int(count) for count in tokens}
            middle = np.array([_middle(size[value]) for _, size in points]) * unit
            look, fit = style_of(index), row[fit_name]
            name = row["mixer"] + (f"  N^{fit['exponent']:.2f}" if fit else "")
            axis.plot(tokens, middle, ms=6, lw=0, label=name, **look)
            if value == "seconds":
                low, high = (np.array([size[value][end] for _, size in points]) * unit for end in ("low", "high"))
                axis.fill_between(tokens, low, high, color=look["color"], alpha=0.15, lw=0)
            if fit:
                axis.plot(tokens, np.exp(fit["offset"]) * tokens ** fit["exponent"] * unit, color=look["color"], lw=1.2)
        axis.set(xscale="log", yscale="log", xlabel="tokens N", ylabel=label)
        axis.set_xticks(sorted(ticks), [f"{tick:,}" for tick in sorted(ticks)])
        axis.xaxis.set_minor_formatter(NullFormatter())
        plain = FuncFormatter(lambda y, _: f"{y:g}")
        bottom, top = axis.get_ylim()
        axis.yaxis.set_major_formatter(plain)
        axis.yaxis.set_minor_formatter(plain if top < 10 * bottom else NullFormatter())
        axis.grid(True)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=2 if len(rows) <= 12 else 5)
        return _svg(figure, label)


def _middle(value: Any) -> float:
    return value["median"] if isinstance(value, dict) else value


def losses(rows: Sequence[dict[str, Any]]) -> str:
    """Training loss of every run, smoothed over a twentieth of the run."""
    with plt.rc_context(_STYLE):
        figure, axis = _canvas(rows, 3.6)
        for index, row in enumerate(rows):
            for number, run in enumerate(run for run in row["runs"] if "losses" in run):
                values = np.array(run["losses"])
                width = max(1, len(values) // 12)
                smooth = np.convolve(values, np.ones(width) / width, "valid")
                steps = (np.arange(len(smooth)) + width / 2) * run["losses_every"]
                label = row["mixer"] if number == 0 else None
                axis.plot(
                    steps,
                    smooth,
                    color=style_of(index)["color"],
                    lw=1.4,
                    alpha=0.9 if number == 0 else 0.45,
                    label=label,
                )
        axis.set(xlabel="step", ylabel="training loss")
        axis.grid(True)
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), ncol=1 if len(rows) <= 12 else 2)
        return _svg(figure, "training loss")


def reads(rows: Sequence[dict[str, Any]]) -> str:
    """What each trained model looks at on one sample: pixels that move its answer, tokens that move the middle token."""
    shown = [(row["mixer"], run["reads"]) for row in rows for run in row["runs"][:1] if run.get("reads")]
    if not shown:
        return ""
    across = min(len(shown), _READS_ACROSS)
    with plt.rc_context(_STYLE):
        bands = -(-len(shown) // across)
        figure, axes = plt.subplots(
            2 * bands, across + 1, figsize=(1.5 * (across + 1), 3.5 * bands), squeeze=False, layout="tight"
        )
        for axis in axes.flat:
            axis.set(xticks=[], yticks=[])
        for spare in (*axes[1:, 0], *axes[-2:, 1 + (len(shown) - 1) % across + 1 :].flat):
            spare.set_visible(False)
        image = np.moveaxis(np.array(shown[0][1]["image"]), 0, -1)
        low, high = image.min(), image.max()
        axes[0, 0].imshow(((image - low) / (high - low + 1e-9)).squeeze(), cmap="gray", interpolation="nearest")
        axes[0, 0].set_title(f"sample, label {shown[0][1]['label']}", fontsize=9)
        for index, (name, look) in enumerate(shown):
            band, column = divmod(index, across)
            above, below = axes[2 * band : 2 * band + 2, column + 1]
            above.imshow(np.array(look["pixels"]) ** 0.5, cmap="magma", interpolation="nearest")
            above.set_title(f"{name}: {look['answer']}", fontsize=9)
            tokens = np.array(look["tokens"])
            middle = (tokens.shape[0] // 2, tokens.shape[1] // 2)
            tokens[middle] = 0  # the residual path: brighter than everything that the mixer brings
            below.imshow(tokens**0.5, cmap="magma", interpolation="nearest")
            below.plot(middle[1], middle[0], "x", color="#8fd3ff", ms=5)
            if column == 0:
                above.set_ylabel("answer", fontsize=9)
                below.set_ylabel("middle token", fontsize=9)
        return _svg(figure, "what each mixer reads")
