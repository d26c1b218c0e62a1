"""Proofs of Swin: recordings of the authors' window attention and model; the shift is what connects windows."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from regard.checkpoint import KeyMap
from regard.layers import Block
from regard.proofs.base import Check, Preset, Proofs, Recipe
from regard.proofs.experiments import growth, headline, median_seconds, over_seeds, reach, seeded
from regard.proofs.recordings import Recorded
from regard.systems.backbones.swin import SwinTransformer, WindowAttention
from regard.tasks import create_task
from regard.training import TrainConfig


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
    model = SwinTransformer(dim=48, depths=(4,), num_heads=(3,), window_size=4, patch_size=4, img_size=32, **options)
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
    from regard.layers import SoftmaxAttention

    sides = [14, 28] if preset == "smoke" else [28, 42, 56, 84]
    tokens = [side * side for side in sides]
    figures: dict[str, float] = {}
    for name, mixer in (("window", WindowAttention(32, 1)), ("dense", SoftmaxAttention(32, 1))):
        mixer.eval()
        with torch.no_grad():
            inputs = [torch.randn(1, side, side, 32) for side in sides]
            times = [median_seconds(lambda m=mixer, x=x: m(x), repeats=5) for x in inputs]
        figures[f"{name}_macs_growth"] = round(growth(tokens, [mixer.cost((side, side)).macs for side in sides]), 3)
        figures[f"{name}_time_growth"] = round(growth(tokens, times), 2)
    return Check(
        "The cost of window attention grows linearly with the image, that of dense attention quadratically (eq. 1, 2)",
        holds=abs(figures["window_macs_growth"] - 1) < 0.05 and figures["dense_macs_growth"] > 1.5,
        figures=figures,
        setting=f"exponent of tokens fitted over maps of {sides} squared, dim 32, window 7; verdict on multiply-adds",
    )


def shift_helps(preset: Preset) -> Check:
    """Same model, budget and seeds with and without shifting, where the answer is far from its cue."""
    task = create_task("scenes", kind="cued")
    config = TrainConfig(steps=2 if preset == "smoke" else 400, batch_size=32, lr=2e-3)
    seeds = (0,) if preset == "smoke" else (0, 1, 2)
    figures: dict[str, float | list[float]] = {}
    for name, shift in (("shifted", True), ("not_shifted", False)):
        runs = over_seeds(
            lambda shift=shift: _tiny(shift, num_classes=task.num_classes, in_chans=task.sample_shape[0]),
            task,
            config,
            seeds,
        )
        figures[name] = headline(task, runs)
    gain = sum(figures["shifted"]) / len(seeds) - sum(figures["not_shifted"]) / len(seeds)
    figures["mean_gain"] = round(gain, 4)
    return Check(
        "Shifted windows classify better than unshifted ones (table 4: 81.3 against 80.2 top-1)",
        holds=gain > 0,
        figures=figures,
        setting=f"cued digit scenes, four blocks on 8 x 8 tokens with windows of 4 x 4, {config.steps} steps, seeds {list(seeds)}, accuracy",
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
    claims=(shift_connects_windows, linear_cost, shift_helps),
)
