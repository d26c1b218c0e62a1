"""Proofs of STViT: recordings of super token attention and the model; how near it comes to full attention, at what price."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor

from regard import ops
from regard.flops import MacCounter
from regard.layers import SoftmaxAttention
from regard.proofs.base import Check, Preset, Proofs, Recipe
from regard.proofs.experiments import cost_growth, tiny_grid_deit
from regard.proofs.recordings import Recorded, run_with_transitions
from regard.systems.backbones.stvit import STViT, SuperTokenAttention
from regard.tasks import create_task
from regard.training import TrainConfig, seeded, train


def _attention(config: dict) -> SuperTokenAttention:
    return SuperTokenAttention(
        config["dim"], config["num_heads"], cell_size=config["stoken_size"], iterations=config["n_iter"]
    )


def _run_attention(mixer: SuperTokenAttention, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    x = inputs["x"].movedim(1, -1)
    refined = mixer.attend(mixer.sample(x)[0])
    return {"y": mixer(x).movedim(-1, 1), "stoken_refine": refined.movedim(-1, 1)}


def _model(config: dict) -> STViT:
    return STViT(
        dims=config["embed_dim"],
        depths=config["depths"],
        num_heads=config["num_heads"],
        mlp_ratio=config["mlp_ratio"],
        cell_sizes=config["stoken_size"],
        layer_scales=[config["init_values"] if scaled else None for scaled in config["layerscale"]],
        projection=config["projection"],
        num_classes=config["num_classes"],
        in_chans=config["in_chans"],
    )


def _run_model(model: STViT, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    outputs = run_with_transitions(model, inputs)
    outputs.pop("layers.3")  # not recorded
    return {name: value.movedim(-1, 1) if value.dim() == 4 else value for name, value in outputs.items()}


def dense_association() -> Check:
    """Super token attention as Q MHSA(Q' X), with Q a dense matrix of tokens by cells, written pair by pair."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for (spatial, cell), iterations in product(
        (((8,), (2,)), ((7,), (3,)), ((6, 8), (3, 2)), ((5, 7), (2, 4)), ((2, 3), (4, 4)), ((4, 2, 5), (2, 2, 2))),
        (1, 3),
    ):
        options = {"cell_size": cell, "iterations": iterations, "axes": len(spatial)}
        mixer = seeded(lambda o=options: SuperTokenAttention(8, 2, **o), 0).double()
        x = torch.randn(2, *spatial, 8, dtype=torch.float64, generator=generator)
        place = torch.cartesian_prod(*(torch.arange(length) for length in spatial)).view(-1, len(spatial))
        grid = [-(-length // side) for length, side in zip(spatial, cell, strict=True)]
        cells = torch.cartesian_prod(*(torch.arange(count) for count in grid)).view(-1, len(spatial))
        home = place // torch.tensor(cell)
        near = (home[:, None] - cells).abs().amax(-1) <= 1  # (N, M)
        outside = 3 ** len(spatial) - near.sum(-1, keepdim=True)
        tokens = x.flatten(1, -2)
        own = (home[:, None] == cells).all(-1).double()
        centres = (own / own.sum(0)).mT @ tokens
        for _ in range(iterations):
            scores = (tokens @ centres.mT / 8**0.5).exp() * near
            share = scores / (scores.sum(-1, keepdim=True) + outside)  # what lies outside has the logit 0
            centres = (share / share.sum(1, keepdim=True)).mT @ tokens
        q, k, v = mixer.qkv(centres).unflatten(-1, (2, 3, 4)).permute(3, 0, 2, 1, 4)
        mixed = ((q @ k.mT / 4**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        expected = (share @ mixer.proj(mixed)).view(x.shape)
        worst = max(worst, (mixer(x) - expected).abs().max().item())
    return Check(
        "Super token attention is attention between a sparse association matrix and its column-normalised transpose",
        holds=worst < 1e-12,
        figures={"largest_error": worst},
        setting="float64, maps of 1 to 3 axes, cells that divide them, do not, and exceed them, one and three iterations",
    )


def recipe(preset: Preset) -> Recipe:
    """A two-stage STViT on handwritten digits; "paper" is SViT-S with the schedule of the paper."""
    if preset == "paper":
        task = create_task("digits", size=224, label_smoothing=0.1)
        model = seeded(lambda: STViT(drop_path_rate=0.1, num_classes=task.num_classes), 0)
        return Recipe(model, task, TrainConfig(steps=375_000, batch_size=1024, lr=1e-3, warmup=5 / 300))
    task = create_task("digits", size=32, channels=1)
    model = seeded(
        lambda: STViT(
            dims=(24, 48),
            depths=(1, 1),
            num_heads=(2, 4),
            mlp_ratio=2.0,
            cell_sizes=(2, 1),
            projection=64,
            num_classes=task.num_classes,
            in_chans=1,
        ),
        0,
    )
    return Recipe(model, task, TrainConfig(steps=2 if preset == "smoke" else 250, batch_size=32, lr=2e-3))


Form = Callable[[SuperTokenAttention, Tensor], Tensor]
"""Weights of full attention, tokens `(B, H, W, C)` -> what a cheaper attention with these weights gives."""


def _heads(mixer: SuperTokenAttention, x: Tensor) -> tuple[Tensor, ...]:
    return mixer.qkv(x).unflatten(-1, (mixer.num_heads, 3, mixer.head_dim)).unbind(-2)


def _super_tokens(side: int) -> Form:
    def form(mixer: SuperTokenAttention, x: Tensor) -> Tensor:
        cheap = SuperTokenAttention(mixer.dim, mixer.num_heads, cell_size=side)
        cheap.load_state_dict(mixer.state_dict())
        return cheap(x)

    return form


def _windows(side: int) -> Form:
    return lambda mixer, x: mixer.proj(ops.window_attention(*_heads(mixer, x), window_size=side).flatten(-2))


def _pool(x: Tensor, side: int) -> Tensor:
    return F.avg_pool2d(x.movedim(-1, 1), side).movedim(1, -1)


def _pooled_keys(side: int) -> Form:
    def form(mixer: SuperTokenAttention, x: Tensor) -> Tensor:
        _, k, v = _heads(mixer, _pool(x, side))
        return mixer.proj(ops.attention(_heads(mixer, x)[0], k, v).flatten(-2))

    return form


def _hard_cells(side: int) -> Form:
    def form(mixer: SuperTokenAttention, x: Tensor) -> Tensor:
        out = mixer.attend(_pool(x, side))
        return out.repeat_interleave(side, 1).repeat_interleave(side, 2)

    return form


_FORMS: dict[str, tuple[Callable[[int], Form], tuple[int, ...]]] = {
    "super_tokens": (_super_tokens, (2, 4, 8)),
    "windows": (_windows, (2, 4, 8)),
    "pooled_keys": (_pooled_keys, (2, 4, 8)),
    "hard_cells": (_hard_cells, (2, 4, 8)),
}


@torch.no_grad()
def _errors(model: torch.nn.Module, images: Tensor) -> tuple[dict[str, float], dict[str, float]]:
    """Relative error of each form against full attention, over the blocks of a model trained with it; cost of each."""
    inputs: list[Tensor] = []
    hooks = [block.mixer.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for block in model.blocks]
    model.eval()(images)
    for hook in hooks:
        hook.remove()
    errors: dict[str, list[float]] = {}
    macs: dict[str, float] = {}
    for block, x in zip(model.blocks, inputs, strict=True):
        with MacCounter() as counter:
            full = block.mixer(x)
        whole = counter.macs
        for name, (make, sides) in _FORMS.items():
            for side in sides:
                with MacCounter() as counter:
                    out = make(side)(block.mixer, x)
                macs[f"{name}_{side}"] = counter.macs / whole
                errors.setdefault(f"{name}_{side}", []).append(((out - full).norm() / full.norm()).item())
    return {name: fmean(values) for name, values in errors.items()}, macs


def error_for_cost(preset: Preset) -> Check:
    """Full attention, trained; then each cheaper attention in its place, with its weights and on its inputs."""
    smoke = preset == "smoke"
    task = create_task("scenes", size=64, kind="local", channels=1, train_items=2048, eval_items=64)
    config = TrainConfig(steps=2 if smoke else 200, batch_size=16, lr=3e-3)
    seeds = (0,) if smoke else (0, 1)
    images = torch.stack([task.eval_set[i]["image"] for i in range(8 if smoke else 64)])
    runs, cost = [], {}
    for seed in seeds:
        model = seeded(
            lambda: tiny_grid_deit(lambda at: SuperTokenAttention(at.dim, at.num_heads, cell_size=1), img_size=64), seed
        )
        train(model, task, config, cpu=True)
        errors, cost = _errors(model, images)
        runs.append(errors)
    error = {name: fmean(run[name] for run in runs) for name in cost}
    ours = [name for name in cost if name.startswith("super_tokens")]
    beaten = {
        name: any(error[own] < error[name] and cost[own] < cost[name] for own in ours)
        for name in cost
        if name not in ours
    }
    figures: dict[str, float | list[float]] = {}
    for name in cost:
        figures |= {f"{name}_error": round(error[name], 4), f"{name}_cost": round(cost[name], 4)}
    figures["forms_beaten_in_both"] = sum(beaten.values())
    return Check(
        "Super tokens come nearer to full attention for less than windows, pooled keys and hard cells (section 3.2)",
        holds=all(beaten.values()),
        figures=figures,
        setting=f"{task.description} 16 x 16 tokens, two blocks of full attention trained for {config.steps} steps, seeds "
        f"{list(seeds)}; then relative error of the mixers' outputs and multiply-adds, both against full attention, with the "
        "same weights, sides of cells, windows and pools 2, 4, 8; holds if for each other form at each side there is a "
        "side of super tokens with a smaller error and fewer multiply-adds",
    )


def cost(preset: Preset) -> Check:
    """Multiply-adds and time over growing maps with a fixed number of super tokens, against full attention."""
    sides = [14, 28] if preset == "smoke" else [14, 28, 42, 56]
    figures = cost_growth(
        {
            "super_tokens": lambda side: SuperTokenAttention(64, 1, cell_size=side // 7),
            "full": lambda side: SoftmaxAttention(64, 1),
        },
        sides,
        dim=64,
    )
    return Check(
        "With 7 x 7 super tokens at every size the cost grows with the map at most, that of full attention with its square",
        holds=figures["super_tokens_macs_growth"] < 1.05 and figures["full_macs_growth"] > 1.5,
        figures=figures,
        setting=f"exponent of tokens fitted over maps of {sides} squared, 64 channels; the attention among super tokens is "
        "a constant part; verdict on multiply-adds",
    )


PROOFS = Proofs(
    recordings=(
        Recorded("stvit.attention", build=_attention, run=_run_attention),
        Recorded("stvit.model", build=_model, run=_run_model),
    ),
    checks=(dense_association,),
    recipe=recipe,
    claims=(error_for_cost, cost),
)
