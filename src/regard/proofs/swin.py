"""Proofs of Swin: recordings of the authors' window attention and model; the shift is what connects windows."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from regard.checkpoint import KeyMap
from regard.layers import Block, SoftmaxAttention
from regard.proofs.base import Check, Preset, Proofs, Recipe
from regard.proofs.experiments import cost_growth, over_variants, reach
from regard.proofs.recordings import Recorded
from regard.systems.backbones.swin import SwinTransformer, WindowAttention
from regard.tasks import create_task
from regard.tasks.images import DrawnImages, LabelledImages
from regard.training import TrainConfig, seeded


def _attention(config: dict) -> WindowAttention:
    return WindowAttention(config["dim"], config["num_heads"], window_size=config["window_size"], shift=True)


def _run_attention(module, inputs):
    # The recording feeds windows and the mask of a shifted 8 x 8 map; our mixer makes both from the map itself. Each
    # window of the rolled map is put back in its place, mixed, and cut out again.
    from regard.layouts.windows import partition, unpartition

    size, spatial = module.window_size, (8, 8)
    steps = [side // 2 for side in size]
    rolled = unpartition(inputs["x"].unflatten(0, (2, 4)), size, spatial)
    mixed = module(rolled.roll(steps, (1, 2)))
    return partition(mixed.roll([-step for step in steps], (1, 2)), size).flatten(0, 1)


def _model(config: dict) -> SwinTransformer:
    return SwinTransformer(
        dim=config["embed_dim"],
        depths=config["depths"],
        num_heads=config["num_heads"],
        window_size=config["window_size"],
        mlp_ratio=config["mlp_ratio"],
        patch_size=config["patch_size"],
        img_size=config["img_size"],
        num_classes=config["num_classes"],
        in_chans=config["in_chans"],
    )


def _run_model(model: SwinTransformer, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    # The authors' stages end with their patch merging; ours begin with it. Tokens are flattened in the recording.
    tokens = model.stem(inputs["x"].movedim(1, -1))
    outputs = {"patch_embed": tokens.flatten(1, 2)}
    for index, stage in enumerate(model.stages):
        tokens = stage(model.downs[index](tokens))
        merged = model.downs[index + 1](tokens) if index + 1 < len(model.stages) else tokens
        outputs[f"layers.{index}"] = merged.flatten(1, 2)
    outputs["logits"] = model(inputs["x"])
    return outputs


def _tiny(shift: bool = True, **options) -> SwinTransformer:
    """One stage on windows of 4 x 4 tokens, with or without the shift of every second block."""
    options = {"dim": 48, "depths": (4,), "num_heads": (3,), "patch_size": 4, **options}
    model = SwinTransformer(window_size=4, img_size=32, **options)
    if not shift:
        for module in model.modules():
            if isinstance(module, WindowAttention):
                module.shift = False
    return model


def recipe(preset: Preset) -> Recipe:
    """Four blocks on 2 x 2 windows of digit scenes; the paper's own recipe needs ImageNet as an image folder."""
    task = create_task("scenes", kind="local")
    steps = {"smoke": 2, "small": 400, "paper": 3000}[preset]
    model = seeded(lambda: _tiny(num_classes=task.num_classes, in_chans=task.sample_shape[0]), 0)
    return Recipe(model, task, TrainConfig(steps=steps, batch_size=32, lr=2e-3))


def _block(shift: bool) -> Block:
    return Block(16, WindowAttention(16, 2, window_size=4, shift=shift))


def shift_connects_windows(preset: Preset) -> Check:
    """Two blocks on a map of 2 x 2 windows: what can a corner token see, with and without the shift?"""
    sizes = {}
    for shift in (False, True):
        blocks = [seeded(partial(_block, shift=shift and index == 1), index) for index in (0, 1)]
        stack = torch.nn.Sequential(*blocks).double()
        x = torch.randn(1, 8, 8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        sizes[shift] = int(reach(stack, x, (3, 3)).sum())
    return Check(
        "Shifting the windows of every second block connects neighbouring windows (section 3.2)",
        holds=sizes[False] == 16 and sizes[True] > 16,
        figures={"tokens_seen_without_shift": sizes[False], "tokens_seen_with_shift": sizes[True], "tokens": 64},
        setting="Jacobian of token (3, 3) after two blocks, window 4, map 8 x 8",
    )


def linear_cost(preset: Preset) -> Check:
    """Multiply-adds and time of one mixer over growing maps, against dense attention."""
    sides = [14, 28] if preset == "smoke" else [28, 42, 56, 84]
    figures = cost_growth(
        {"window": lambda side: WindowAttention(32, 1), "dense": lambda side: SoftmaxAttention(32, 1)}, sides, dim=32
    )
    return Check(
        "The cost of window attention grows linearly with the image, that of dense attention quadratically (eq. 1, 2)",
        holds=abs(figures["window_macs_growth"] - 1) < 0.05 and figures["dense_macs_growth"] > 1.5,
        figures=figures,
        setting=f"exponent of tokens fitted over maps of {sides} squared, dim 32, window 7; verdict on multiply-adds",
    )


class TwoMarks(DrawnImages):
    """Images of 16 x 16 pixels with two marks, red or green, in windows side by side. Are the marks alike?

    A mark is one token (2 x 2 pixels) of the 8 x 8 that the model sees, the two of them next to each other across the
    border of two windows of 4 x 4, over noise that makes every image new.
    """

    num_classes = 2

    def __init__(self, train_items: int = 512, eval_items: int = 256, seed: int = 0) -> None:
        super().__init__(16, train_items, eval_items, seed)

    @property
    def description(self) -> str:
        return "Two marks, red or green, next to each other across the border of two windows: are they alike?"

    def draw(self, rng: np.random.Generator, count: int) -> LabelledImages:
        """Marks in a random row of tokens, over noise."""
        images = rng.integers(0, 64, (count, 3, 16, 16), dtype=np.uint8)
        colours, rows = rng.integers(0, 2, (count, 2)), 2 * rng.integers(0, 8, count)
        for image, pair, row in zip(images, colours, rows, strict=True):
            for colour, column in zip(pair, (6, 8), strict=True):
                image[colour, row : row + 2, column : column + 2] = 255
        return LabelledImages(images, (colours[:, 0] == colours[:, 1]).astype(np.int64), mean=0.0, std=1.0)


def shift_solves(preset: Preset) -> Check:
    """Two blocks, the same budget and seeds, with and without the shift, where the answer lies in two windows."""
    smoke = preset == "smoke"
    task, seeds = TwoMarks(32, 16) if smoke else TwoMarks(), (0,) if smoke else (0, 1, 2)
    config = TrainConfig(steps=2 if smoke else 600, batch_size=32, lr=3e-3)
    small = {"dim": 24, "depths": (2,), "patch_size": 2, "num_classes": 2}
    builds = {name: partial(_tiny, shift, **small) for name, shift in (("shifted", True), ("not_shifted", False))}
    figures, _ = over_variants(builds, task, config, seeds)
    return Check(
        "Shifted windows solve what windows alone cannot: are two marks in different windows alike?",
        holds=min(figures["shifted"]) > 0.95 and max(figures["not_shifted"]) < 0.75,
        figures=figures,
        setting=f"accuracy on 256 new images, two blocks of 24 channels, {config.steps} steps of 32, seeds {list(seeds)}; "
        "holds if every shifted run is above 0.95 and every other below 0.75 (chance is 0.5)",
    )


PROOFS = Proofs(
    recordings=(
        Recorded(
            "swin.attention",
            build=_attention,
            run=_run_attention,
            keys=KeyMap(rules=[("relative_position_bias_table", "bias.table")], drop=["relative_position_index"]),
        ),
        Recorded("swin.model", build=_model, run=_run_model),
    ),
    recipe=recipe,
    claims=(shift_connects_windows, linear_cost, shift_solves),
)
