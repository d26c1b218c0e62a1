"""Time series: how they go on (`forecast`), and what they are without the noise (`denoising`)."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.signal import lfilter
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics import MeanMetric, Metric

from regard.tasks.base import EVAL, TRAIN, Generated, Task, fraction, whole
from regard.tasks.measures import measure


def drawn_series(rng: np.random.Generator, steps: int, columns: int, period: int) -> np.ndarray:
    """Several columns with a short season of `period` steps in one of seven of them, trends and noise: (steps, columns).

    As hourly measurements of electricity have days and weeks: three sources, each with four harmonics of either season
    (those of the short one swell and fade), a slow random walk and noise that forgets by a tenth each step; every column
    is its own mixture of the sources, with a little noise of its own.
    """
    time = np.arange(steps)
    sources = np.zeros((steps, 3))
    for source in range(3):
        for season, size in ((period, 1.0), (7 * period, 0.6)):
            for harmonic in range(1, 5):
                phase, slow = rng.uniform(0, 2 * np.pi, 2)
                strength = size * rng.uniform(0.2, 1) / harmonic
                swell = 1 + 0.4 * np.sin(2 * np.pi * time / (29.5 * period) + slow) if season == period else 1.0
                sources[:, source] += strength * swell * np.sin(2 * np.pi * harmonic * time / season + phase)
        sources[:, source] += rng.normal(scale=0.01, size=steps).cumsum()
        sources[:, source] += lfilter([1], [1, -0.9], rng.normal(scale=0.12, size=steps))
    return sources @ rng.normal(size=(3, columns)) + 0.1 * rng.normal(size=(steps, columns))


class Stretches(Dataset[dict[str, Tensor]]):
    """Windows `past` (L, V) and `future` (H, V) of one series, beginning every `stride` steps."""

    def __init__(self, series: Tensor, past: int, future: int, stride: int) -> None:
        self.series, self.past, self.future, self.stride = series, past, future, stride

    def __len__(self) -> int:
        return (len(self.series) - self.past - self.future) // self.stride + 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}.")
        start = index * self.stride
        now = start + self.past
        return {"past": self.series[start:now], "future": self.series[now : now + self.future]}


class ForecastTask(Task):
    """How do all columns of a series go on?

    One long series, divided in time: the first four fifths are for training, in windows that begin anywhere; the future of
    evaluation windows lies in the rest. Columns are shifted and scaled by mean and deviation of the training part.

    An item is `past` (length, columns) and `future` (horizon, columns), float32. A model maps pasts (B, length, columns) to
    futures (B, horizon, columns). Metrics: `mse` and `mae` over all values, as they are usual in long-term forecasting.

    Args:
        length, horizon: steps that are seen, and asked for.
        period: steps of a season: what the trivial answer repeats, and the drawn series has.
        data: a CSV file of your own with one row a step and, if it likes, a header; columns that are not numbers
            throughout (dates, say) are left out. By default a series is drawn: `steps` of `columns`, with seasons of
            `period` and `7 * period`.
        seed: of the drawn series.
    """

    name = "forecast"
    metric = "mse"
    higher_is_better = False

    def __init__(
        self,
        length: int = 168,
        horizon: int = 48,
        period: int = 24,
        data: str | Path | None = None,
        steps: int = 8000,
        columns: int = 7,
        seed: int = 0,
    ) -> None:
        self.length, self.horizon = whole("length", length), whole("horizon", horizon)
        self.period = whole("period", period)
        if period > length:
            raise ValueError(f"period must be at most length={length}, got {period}: the trivial answer repeats it.")
        if data is None:
            rng = np.random.default_rng((whole("seed", seed, 0), TRAIN))
            values = drawn_series(rng, whole("steps", steps), whole("columns", columns), period)
        else:
            values = _own_series(Path(data).expanduser())
        self.source = "a drawn series" if data is None else Path(data).name
        self.columns, cut = values.shape[1], 4 * len(values) // 5
        if len(values) - cut < horizon or cut < length + horizon:
            raise ValueError(
                f"the series has {len(values)} steps; length={length} and horizon={horizon} need at least "
                f"{max(5 * horizon, -(-5 * (length + horizon) // 4) + 1)} (a fifth is for evaluation). "
                "Use a longer series or smaller windows."
            )
        mean, spread = values[:cut].mean(0), values[:cut].std(0)
        series = torch.from_numpy(((values - mean) / np.where(spread > 0, spread, 1)).astype(np.float32))
        self.train_set = Stretches(series[:cut], length, horizon, stride=1)
        # Windows that overlap by half: each value is asked for twice, from near and from far.
        self.eval_set = Stretches(series[cut - length :], length, horizon, stride=max(1, horizon // 2))

    @property
    def description(self) -> str:
        columns = "1 column" if self.columns == 1 else f"{self.columns} columns"
        return f"The next {self.horizon} steps of {self.source} ({columns}), from the last {self.length}."

    @property
    def trivial_answer(self) -> str:
        return f"the last {self.period} steps again"

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(model(batch["past"]), batch["future"])

    def metrics(self) -> dict[str, Metric]:
        return {"mse": MeanMetric(), "mae": MeanMetric()}

    def update(self, metrics: Mapping[str, Metric], model: nn.Module, batch: dict[str, Tensor]) -> None:
        wrong = model(batch["past"]) - batch["future"]
        metrics["mse"].update(wrong.square())
        metrics["mae"].update(wrong.abs())

    def trivial(self) -> dict[str, float]:
        return measure(self, Seasonal(self.period, self.horizon))


class Seasonal(nn.Module):
    """The last `period` steps, over and over."""

    def __init__(self, period: int, horizon: int) -> None:
        super().__init__()
        self.period, self.horizon = period, horizon

    def forward(self, past: Tensor) -> Tensor:
        """`(B, L, V)` -> `(B, horizon, V)`."""
        season = past[:, -self.period :]
        return season.repeat(1, -(-self.horizon // self.period), 1)[:, : self.horizon]


def _own_series(path: Path) -> np.ndarray:
    """The columns of a CSV file that are numbers throughout: (steps, columns) float64."""
    if not path.is_file():
        raise ValueError(f"data={str(path)!r} is {'a folder, not a CSV file' if path.is_dir() else 'not there'}.")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a CSV file: {error}.") from error
    if rows and not any(_number(cell) for cell in rows[0]):
        rows = rows[1:]
    for line, row in enumerate(rows, 1):
        if len(row) != len(rows[0]):
            raise ValueError(f"{path}: data row {line} has {len(row)} columns, the first has {len(rows[0])}.")
    kept = [column for column in zip(*rows, strict=True) if all(_number(cell) for cell in column)]
    if not kept:
        raise ValueError(f"{path} holds no column that is numbers throughout; missing values must be filled in.")
    return np.array(kept, np.float64).T


def _number(cell: str) -> bool:
    try:
        return bool(np.isfinite(float(cell)))
    except ValueError:
        return False


class DenoisingTask(Task):
    """What was the curve before noise was added?

    A curve is a sum of waves and of steps (levels that hold for a while), scaled to [0, 1]: smoothing loses the steps,
    and waves can be averaged over their repetitions, near and far.

    An item is `inputs` and `targets`, both (length, 1) float32; a model maps (B, N, 1) to the same shape. Metrics: `psnr`
    in decibels (of each curve, then averaged) and `mae`.

    Args:
        length: samples of a curve. noise: deviation of what is added to each sample, the curve spanning 1.
        train_items, eval_items: sizes of the two sets. seed: of everything that is drawn.
    """

    name = "denoising"
    metric = "psnr"

    def __init__(
        self,
        length: int = 256,
        noise: float = 0.15,
        train_items: int = 100_000,
        eval_items: int = 256,
        seed: int = 0,
    ) -> None:
        self.length, self.noise = whole("length", length, 2), fraction("noise", noise)
        self.train_set = Generated(self._item, whole("train_items", train_items), seed, TRAIN)
        self.eval_set = Generated(self._item, whole("eval_items", eval_items), seed, EVAL)

    def _item(self, rng: np.random.Generator, index: int) -> dict[str, Tensor]:
        place = np.arange(self.length) / self.length
        curve = np.zeros(self.length)
        for cycles, phase, size in zip(
            rng.uniform(2, 24, 3), rng.uniform(0, 2 * np.pi, 3), rng.uniform(0.3, 1, 3), strict=True
        ):
            curve += size * np.sin(2 * np.pi * cycles * place + phase)
        cuts = rng.random(5)
        curve += rng.normal(scale=1.5, size=6)[np.searchsorted(np.sort(cuts), place)]
        curve = (curve - curve.min()) / max(np.ptp(curve), 1e-12)
        noisy = curve + self.noise * rng.normal(size=self.length)
        pair = {"inputs": noisy, "targets": curve}
        return {name: torch.from_numpy(values.astype(np.float32))[:, None] for name, values in pair.items()}

    @property
    def description(self) -> str:
        return (
            f"Curves of waves and steps, {self.length} samples, with noise of deviation {self.noise}: what were they?"
        )

    @property
    def trivial_answer(self) -> str:
        return f"running mean of {self._best_mean().width}"

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(model(batch["inputs"]), batch["targets"])

    def metrics(self) -> dict[str, Metric]:
        return {"psnr": MeanMetric(), "mae": MeanMetric()}

    def update(self, metrics: Mapping[str, Metric], model: nn.Module, batch: dict[str, Tensor]) -> None:
        wrong = model(batch["inputs"]) - batch["targets"]
        metrics["psnr"].update(-10 * wrong.square().mean((1, 2)).clamp(min=1e-12).log10())
        metrics["mae"].update(wrong.abs())

    def trivial(self) -> dict[str, float]:
        return measure(self, self._best_mean())

    def _best_mean(self) -> RunningMean:
        """The running mean that does best on the first training curves."""
        items = [self.train_set[index] for index in range(min(64, len(self.train_set)))]  # type: ignore[arg-type]
        noisy, curves = (torch.stack([item[name] for item in items]) for name in ("inputs", "targets"))
        means = [RunningMean(width) for width in (1, 3, 5, 7, 9, 13, 17)]
        return min(means, key=lambda mean: float((mean(noisy) - curves).square().mean()))


class RunningMean(nn.Module):
    """Each sample becomes the mean of the `width` (odd) around it, of those that exist."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        """`(B, N, 1)` -> the same shape."""
        curves = x.movedim(-1, 1)
        return F.avg_pool1d(curves, self.width, 1, self.width // 2, count_include_pad=False).movedim(1, -1)
