r"""The two figures that CAB gives a method: the compositional index and the efficiency length (arXiv 2210.07661, section 3).

Pure arithmetic on scores and costs that somebody else has measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

Pattern = Literal["noncausal self", "causal self", "noncausal cross", "causal cross"]


@dataclass(frozen=True)
class ScoredMetric:
    """One metric of one task, with the mean and the standard deviation by which scores are normalised."""

    name: str
    task: str
    mean: float = 0.0
    sigma: float = 1.0
    higher_is_better: bool = False

    def normalised(self, value: float) -> float:
        """How many standard deviations better than the mean; 0 where all methods of the norm were equal."""
        if self.sigma == 0:
            return 0.0
        return (value - self.mean) / self.sigma * (1 if self.higher_is_better else -1)


def _metrics(*rows: tuple[str, str, float, float]) -> tuple[ScoredMetric, ...]:
    """Rows of task, name, mean and sigma; the measures of summaries, images and completed clouds that are to be high."""
    high = ("R1", "R2", "RL", "PSNR", "SSIM", "F-score")
    return tuple(ScoredMetric(name, task, mean, sigma, name in high) for task, name, mean, sigma in rows)


CONSTANTS: dict[Pattern, tuple[ScoredMetric, ...]] = {
    "noncausal self": _metrics(
        ("TTS", "FastSpeech2 MCD", 3.4245, 0.06832),
        ("TTS", "FastSpeech2 MSD", 1.97429, 0.0361768),
        ("TTS", "Transformer-TTS MCD", 4.06947, 0.09422),
        ("TTS", "Transformer-TTS MSD", 2.19021, 0.03866),
        ("Sum", "R1", 34.88667, 1.39697),
        ("Sum", "R2", 6.79333, 1.41078),
        ("Sum", "RL", 31.96889, 1.31499),
        ("SR", "PSNR", 23.208, 0.27499),
        ("SR", "SSIM", 0.6758, 0.01557),
        ("MLM", "MLM PPL", 36.292, 62.30827),
    ),
    "causal self": _metrics(
        ("TTS", "TTTS MCD", 4.08325, 0.04529),
        ("TTS", "TTTS MSD", 2.20085, 0.01372),
        ("Sum", "R1", 32.9575, 1.92754),
        ("Sum", "R2", 6.0925, 0.41007),
        ("Sum", "RL", 30.2575, 1.61951),
        ("LM", "LM PPL", 22.26, 8.29944),
    ),
    "noncausal cross": _metrics(
        ("PCC", "CD-l1", 7.7025, 0.64789),
        ("PCC", "CD-l2", 0.24775, 0.03366),
        ("PCC", "F-score", 0.7625, 0.03906),
        ("LSTF", "ETT MSE", 1.18933, 0.05615),
        ("LSTF", "ETT MAE", 0.80625, 0.02193),
        ("LSTF", "ECL MSE", 0.47575, 0.01057),
        ("LSTF", "ECL MAE", 0.511, 0.00601),
        ("LSTF", "Weather MSE", 0.62025, 0.18948),
        ("LSTF", "Weather MAE", 0.58075, 0.10312),
    ),
    "causal cross": _metrics(
        ("TTS", "TTTS MCD", 5.5037, 1.29239),
        ("TTS", "TTTS MSD", 2.6278, 0.42726),
        ("Sum", "R1", 31.35, 3.77103),
        ("Sum", "R2", 5.26, 1.26028),
        ("Sum", "RL", 28.8, 3.28638),
    ),
}
"""The frozen norm of the paper's leaderboard, for each pattern in the order of the authors' files. It was computed over
the methods of the paper; later methods are scored by the same constants, so that old indices stay as they are."""


@dataclass(frozen=True)
class CompositionalIndex:
    """What came out for one method: each metric, each task, and the total."""

    metrics: dict[str, float]
    tasks: dict[str, float]
    total: float


def compositional_index(
    scores: Mapping[str, float] | Sequence[float], norm: Pattern | Sequence[ScoredMetric]
) -> CompositionalIndex:
    r"""One number for a method's scores in many tasks (CAB, section 3.3).

    $$z_k = s_k \frac{x_k - \mu_k}{\sigma_k},\qquad
      \mathrm{CI} = \operatorname*{mean}_{t} \operatorname*{mean}_{k \in t} z_k,\qquad
      s_k = -1 \text{ where lower is better}$$

    Args:
        scores: by the metrics' names, or in their order.
        norm: a pattern of the paper, or the metrics with their constants (`norm_of` computes them over methods at hand).

    Raises:
        ValueError: for an unknown pattern, or scores that are not those of the metrics.
    """
    if isinstance(norm, str):
        if norm not in CONSTANTS:
            raise ValueError(f"norm must be one of {', '.join(CONSTANTS)}, or a list of metrics; got {norm!r}.")
        norm = CONSTANTS[norm]
    names = [metric.name for metric in norm]
    if not isinstance(scores, Mapping):
        if len(scores) != len(names):
            raise ValueError(f"scores must be {len(names)} numbers ({', '.join(names)}), got {len(scores)}.")
        scores = dict(zip(names, scores, strict=True))
    if set(scores) != set(names):
        raise ValueError(f"scores must be those of {', '.join(names)}, got {', '.join(scores) or 'none'}.")
    values = {metric.name: metric.normalised(scores[metric.name]) for metric in norm}
    tasks = {
        task: float(np.mean([values[metric.name] for metric in norm if metric.task == task]))
        for task in dict.fromkeys(metric.task for metric in norm)
    }
    return CompositionalIndex(values, tasks, float(np.mean(list(tasks.values()))))


def norm_of(
    table: Mapping[str, Mapping[str, float]] | Sequence[Mapping[str, float]], metrics: Sequence[ScoredMetric]
) -> tuple[ScoredMetric, ...]:
    """The metrics with mean and (sample) standard deviation over the methods at hand, as the paper's own were computed.

    Args:
        table: the scores of every method, by the metrics' names.

    Raises:
        ValueError: for fewer than two methods, among which nothing can be normalised.
    """
    methods = list(table.values()) if isinstance(table, Mapping) else list(table)
    if len(methods) < 2:
        raise ValueError(f"table must hold the scores of at least two methods to normalise among, got {len(methods)}.")
    columns = {metric.name: np.array([scores[metric.name] for scores in methods], float) for metric in metrics}
    return tuple(
        replace(
            metric,
            mean=float(columns[metric.name].mean()),
            # Equal scores have no spread; rounding in the mean must not make one up.
            sigma=float(columns[metric.name].std(ddof=1)) if np.ptp(columns[metric.name]) else 0.0,
        )
        for metric in metrics
    )


@dataclass(frozen=True)
class EfficiencyLength:
    """From which length a method is cheaper than full attention, and the fits behind it.

    Args:
        length: in tokens; 0 if the method is cheaper at every length, None if the costs of full attention do not grow
            faster than linearly, so that there is no such length.
        full: a, b, c of a N^2 + b N + c. efficient: d, e of d N + e. r_squared: of the latter fit.
    """

    length: float | None
    full: tuple[float, float, float]
    efficient: tuple[float, float]
    r_squared: float


def efficiency_length(
    lengths: Sequence[float], full: Sequence[float], efficient: Sequence[float], *, skip: int = 0
) -> EfficiencyLength:
    r"""The length from which an efficient method costs less than full attention (CAB, section 3.4).

    Least squares of the two growths that are assumed, and the larger root of their difference:

    $$a N^2 + b N + c \;=\; d N + e$$

    The paper times 256 to 8,192 tokens and leaves the first out of the line for times (`skip=1`), not for memory.

    Args:
        lengths: tokens, at least three different. full, efficient: cost (seconds, bytes, ...) at each of them.
        skip: how many of the first lengths the line leaves out, where overhead still rules.

    Raises:
        ValueError: for sequences of different lengths, or too few points for the fits.
    """
    x, y, z = (np.asarray(values, float) for values in (lengths, full, efficient))
    if not x.shape == y.shape == z.shape:
        raise ValueError(f"lengths, full and efficient must be as many, got {x.size}, {y.size} and {z.size}.")
    if len(np.unique(x)) < 3 or skip < 0 or len(np.unique(x[skip:])) < 2:
        raise ValueError(
            f"lengths must hold at least three different ones, and two after skip={skip}; got {list(lengths)}."
        )
    a, b, c = (float(value) for value in np.polyfit(x, y, 2))
    d, e = (float(value) for value in np.polyfit(x[skip:], z[skip:], 1))
    rest = z[skip:] - (d * x[skip:] + e)
    spread = np.square(z[skip:] - z[skip:].mean()).sum()
    r_squared = 1.0 if spread == 0 else float(1 - np.square(rest).sum() / spread)
    length = None
    if a > 0:
        discriminant = (b - d) ** 2 - 4 * a * (c - e)
        length = 0.0 if discriminant < 0 else max(0.0, (d - b + discriminant**0.5) / (2 * a))
    return EfficiencyLength(length, (a, b, c), (d, e), r_squared)
