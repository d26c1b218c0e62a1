"""What claims share: equal budgets over seeds, growth of cost, Jacobians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from regard.flops import count_macs
from regard.layers import Block, PatchEmbed, vit_init
from regard.measure import growth, interleaved_seconds, median_seconds
from regard.skeletons import Isotropic, MixerAt, SwinPyramid, places
from regard.tasks.base import Task
from regard.tasks.images import DrawnImages, LabelledImages
from regard.training import TrainConfig, seeded, train


def over_seeds(
    build: Callable[[], nn.Module], task: Task, config: TrainConfig, seeds: Sequence[int]
) -> list[dict[str, float]]:
    """Final metrics of the same recipe for each seed (of weights, order and dropout)."""
    return [train(seeded(build, seed), task, replace(config, seed=seed), cpu=True).metrics for seed in seeds]


def headline(task: Task, runs: Sequence[dict[str, float]]) -> list[float]:
    """The headline metric of each run, rounded for reports."""
    return [round(run[task.metric], 4) for run in runs]


TINY_DEIT = {"dim": 48, "depth": 2, "num_heads": 3, "mlp_ratio": 2.0, "patch_size": 4, "img_size": 24, "in_chans": 1}
"""A DeiT of 36 tokens, for digits of 24 pixels."""


def tiny_grid_deit(mixer: MixerAt, **options: Any) -> Isotropic:
    """`TINY_DEIT` without a class token, for mixers of grids: the logits are read from the mean over its 6 x 6 tokens.

    Args:
        mixer: builds the mixer of each block. options: replace those of `TINY_DEIT`.
    """
    at = {**TINY_DEIT, **options}
    dim, patch = at["dim"], at["patch_size"]
    (stage,) = places([dim], [at["depth"]], [at["num_heads"]], [patch], at["img_size"], 0.0)
    model = Isotropic(
        stem=PatchEmbed(at["in_chans"], dim, patch, norm=False),
        blocks=[Block(dim, mixer(place), mlp_ratio=at["mlp_ratio"]) for place in stage],
        dim=dim,
        grid=stage[0].grid,
        stride=patch,
        num_classes=10,
        in_chans=at["in_chans"],
        position=True,
    )
    return model.apply(vit_init)


def tiny_deit_config(preset: str) -> TrainConfig:
    """The recipe of `TINY_DEIT`.

    The rate was chosen for softmax attention, the baseline of the claims that use it: best of 3e-3, 6e-3 and 1e-2 in trials
    with one seed. The training is short (about 7 epochs), so those claims compare how well mixers learn in that time.
    """
    return TrainConfig(steps=2 if preset == "smoke" else 300, batch_size=32, lr=1e-2)


def over_variants(
    builds: Mapping[str, Callable[[], nn.Module]], task: Task, config: TrainConfig, seeds: Sequence[int]
) -> tuple[dict[str, float | list[float]], dict[str, float]]:
    """The same recipe and seeds for models that differ in one thing.

    Returns:
        Figures for a report (`NAME`, the headline metric of each seed, and `NAME_mean`), and the means by name.
    """
    figures: dict[str, float | list[float]] = {}
    means = {}
    for name, build in builds.items():
        values = headline(task, over_seeds(build, task, config, seeds))
        means[name] = statistics.fmean(values)
        figures |= {name: values, f"{name}_mean": round(means[name], 4)}
    return figures, means


def cost_growth(
    mixers: Mapping[str, Callable[[int], nn.Module]], sides: Sequence[int], *, dim: int, repeats: int = 5
) -> dict[str, float | list[float]]:
    """How multiply-adds and forward time of mixers grow with the tokens of square maps, in one run.

    Args:
        mixers: name -> side of the map -> the mixer, or several in a row. dim: their channels.

    Returns:
        `NAME_macs_growth` and `NAME_time_growth`, fitted exponents of the number of tokens, and `NAME_time_ratios`, the
        times over that of the smallest map.
    """
    tokens = [side * side for side in sides]
    figures: dict[str, float | list[float]] = {}
    for name, build in mixers.items():
        times, macs = [], []
        for side in sides:
            mixer, x = build(side).eval(), torch.randn(1, side, side, dim)
            macs.append(count_macs(mixer, x))
            with torch.no_grad():
                times.append(median_seconds(partial(mixer, x), repeats))
        figures[f"{name}_macs_growth"] = round(growth(tokens, macs), 3)
        figures[f"{name}_time_growth"] = round(growth(tokens, times), 2)
        figures[f"{name}_time_ratios"] = [round(seconds / times[0], 2) for seconds in times]
    return figures


def least_seconds(runs: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    """The least processor time of each run over `rounds` turns through all of them, without gradients.

    Wall time would count what else the machine does.
    """
    best = [float("inf")] * len(runs)
    with torch.no_grad():
        for _ in range(rounds):
            for index, run in enumerate(runs):
                started = time.process_time()
                run()
                best[index] = min(best[index], time.process_time() - started)
    return best


def time_ratio(slow: nn.Module, fast: nn.Module, x: Tensor, rounds: int) -> float:
    """Median forward time of `slow` over that of `fast`, taken in turns, without gradients."""
    with torch.no_grad():
        times = interleaved_seconds({"slow": partial(slow, x), "fast": partial(fast, x)}, rounds=rounds, seconds=60)
    return round(statistics.median(times["slow"]) / statistics.median(times["fast"]), 3)


def reach(function: Callable[[Tensor], Tensor], x: Tensor, index: tuple[int, ...], *, above: float = 0.0) -> Tensor:
    """Which input positions output position `index` depends on: `(*spatial)` boolean, from a gradient.

    Args:
        function: `(1, *spatial, dim)` -> the same grid. x: the point at which it is differentiated.
        above: derivatives up to this size count as none (transforms leave rounding errors everywhere).
    """
    x = x.clone().requires_grad_()
    out = function(x)[(0, *index)]
    (gradient,) = torch.autograd.grad(out.square().sum(), x)
    return gradient[0].abs().amax(-1) > above


def with_batch_statistics(model: nn.Module, x: Tensor) -> nn.Module:
    """`model` in evaluation mode with drawn weights and biases of its norms, and BatchNorm statistics taken from `x`.

    Fresh norms leave so much at zero or one that most mistakes would not show.
    """
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)):
            for parameter, middle in ((module.weight, 1.0), (module.bias, 0.0)):
                nn.init.normal_(parameter, middle, 0.5, generator=generator)
    with torch.no_grad():
        model.train()(x)
    return model.eval()


class CornerReader(SwinPyramid):
    """Patches of 2 x 2 pixels, a few blocks, and the answer read in the upper left corner: mixers have to bring it there.

    Args:
        mixer: builds the mixer of each block. depth: number of blocks. dim, num_heads, mlp_ratio: of all blocks.
        read: the answer is read from the mean of so many tokens along each axis.
    """

    def __init__(
        self,
        mixer: MixerAt,
        *,
        depth: int = 1,
        dim: int = 24,
        num_heads: int = 2,
        mlp_ratio: float = 2.0,
        read: int = 1,
        img_size: int = 24,
        num_classes: int = 4,
    ) -> None:
        super().__init__(
            mixer=mixer,
            dim=dim,
            depths=(depth,),
            num_heads=(num_heads,),
            mlp_ratio=mlp_ratio,
            patch_size=2,
            img_size=img_size,
            num_classes=num_classes,
        )
        self.read = read
        # Swin's deviation of 0.02 suits hundreds of channels; with 24 the signal would take long to grow.
        self.apply(lambda module: module.reset_parameters() if isinstance(module, nn.Linear) else None)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Normalised tokens -> logits from the upper left ones."""
        x = self.head_norm(x[:, : self.read, : self.read].mean((1, 2)))
        return x if pre_logits else self.head(x)


class FarMark(DrawnImages):
    """A mark of one of four colours over noise, far from the upper left corner: which colour is it?

    Args:
        aligned: it lies in the first rows or the first columns; otherwise anywhere so far off.
        tokens: of 2 x 2 pixels, along each side of the image. nearest: rows or columns between the mark and the corner.
        size: tokens that the mark covers along each axis.
    """

    num_classes = 4

    def __init__(
        self,
        aligned: bool = False,
        *,
        tokens: int = 12,
        nearest: int = 8,
        size: int = 1,
        train_items: int = 4096,
        eval_items: int = 512,
        seed: int = 0,
    ) -> None:
        super().__init__(2 * tokens, train_items, eval_items, seed)
        self.aligned, self.tokens, self.nearest, self.size = aligned, tokens, nearest, size

    @property
    def description(self) -> str:
        where = "in the first row or column of" if self.aligned else "among"
        return (
            f"The colour of a mark of {self.size} x {self.size} tokens {where} {self.tokens} x {self.tokens}, at least "
            f"{self.nearest} from the corner where the answer is read."
        )

    def draw(self, rng: np.random.Generator, count: int) -> LabelledImages:
        """Noise and one mark."""
        colours = np.array([[1, 0.2, 0.2], [0.2, 1, 0.2], [0.2, 0.2, 1], [1, 1, 0.2]])
        side, last = self.sample_shape[1], self.tokens - self.size
        images, labels = rng.uniform(0, 0.4, (count, 3, side, side)), rng.integers(0, 4, count)
        far = rng.integers(self.nearest, last + 1, count)
        other = 0 if self.aligned else rng.integers(0, last + 1, count)
        upright, length = rng.integers(0, 2, count) == 1, 2 * self.size
        rows, columns = 2 * np.where(upright, far, other), 2 * np.where(upright, other, far)
        for image, row, column, label in zip(images, rows, columns, labels, strict=True):
            image[:, row : row + length, column : column + length] = colours[label][:, None, None]
        return LabelledImages((255 * images).round().astype(np.uint8), labels.astype(np.int64), mean=0.22, std=0.16)


class OppositeHue(DrawnImages):
    """Sixteen striped tiles; which stripes has the one whose hue is opposite to the mean hue of the image?

    Eight tiles lie within 20 degrees of a hue drawn for the image, seven decoys 60 to 110 degrees to either side, one
    opposite. All carry stripes of one of four directions, so that chance is 1/4, and no tile tells by itself.
    """

    num_classes = 4

    def __init__(self, size: int = 32, train_items: int = 4096, eval_items: int = 512, seed: int = 0) -> None:
        super().__init__(size, train_items, eval_items, seed)

    @property
    def description(self) -> str:
        return "Sixteen striped tiles: the direction of the stripes on the one whose hue is opposite to the mean hue?"

    def draw(self, rng: np.random.Generator, count: int) -> LabelledImages:
        """Sixteen tiles in random order."""
        tile = self.sample_shape[1] // 4
        off = np.concatenate(
            [
                rng.uniform(-20, 20, (count, 8)),
                rng.uniform(60, 110, (count, 7)) * rng.choice([-1, 1], (count, 7)),
                rng.uniform(160, 200, (count, 1)),
            ],
            axis=1,
        )
        stripes, order = rng.integers(0, 4, (count, 16)), rng.permuted(np.tile(np.arange(16), (count, 1)), axis=1)
        hue = np.deg2rad(np.take_along_axis(off, order, 1) + rng.uniform(0, 360, (count, 1)))
        labels = stripes[:, 15]
        stripes = np.take_along_axis(stripes, order, 1)
        colour = 0.5 + 0.5 * np.cos(hue[..., None] - 2 * np.pi * np.arange(3) / 3)  # (count, 16, 3)
        rows, columns = np.mgrid[:tile, :tile]
        patterns = np.stack([rows // 2 % 2, columns // 2 % 2, (rows + columns) // 2 % 2, (rows - columns) // 2 % 2])
        lit = 0.4 + 0.6 * patterns[stripes]  # (count, 16, tile, tile)
        tiles = colour[:, :, :, None, None] * lit[:, :, None]
        images = tiles.reshape(count, 4, 4, 3, tile, tile).transpose(0, 3, 1, 4, 2, 5).reshape(count, 3, 4 * tile, -1)
        return LabelledImages((255 * images).round().astype(np.uint8), labels.astype(np.int64), mean=0.35, std=0.3)
