"""Proofs of HAT: recordings of the authors' group and model; overlapping windows and channel attention use more pixels."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from statistics import mean

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from regard import ops
from regard.checkpoint import KeyMap
from regard.proofs.base import Check, Preset, Proofs, Recipe
from regard.proofs.recordings import Recorded, Recording
from regard.systems.restoration.hat import (
    BLOCK_KEYS,
    HAT,
    HybridAttention,
    HybridBlock,
    HybridGroup,
    OverlappingCrossAttention,
    squeeze_as_linear,
)
from regard.tasks import create_task
from regard.tasks.base import Task
from regard.training import TrainConfig, seeded, train


def _group(config: dict) -> HybridGroup:
    return HybridGroup(
        config["dim"],
        config["num_heads"],
        [0.0] * config["depth"],
        window_size=config["window_size"],
        overlap_ratio=config["overlap_ratio"],
        mlp_ratio=config["mlp_ratio"],
        compress_ratio=config["compress_ratio"],
        squeeze_factor=config["squeeze_factor"],
        conv_scale=config["conv_scale"],
    )


def _run_group(group: HybridGroup, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    # The recorded indices and mask stay unused: ours come from the sizes.
    x = inputs["x"].unflatten(1, (8, 12))
    first = group.blocks[0](x)
    second = group.blocks[1](first)
    return {
        "block0_conv_branch": group.blocks[0].mixer.conv(group.blocks[0].norm1(x)).movedim(-1, 1),
        "block0": first.flatten(1, 2),
        "block1": second.flatten(1, 2),
        "out": group.overlap(second).flatten(1, 2),
    }


def _model(config: dict) -> HAT:
    return HAT(
        dim=config["embed_dim"],
        depths=config["depths"],
        num_heads=config["num_heads"][0],
        window_size=config["window_size"],
        compress_ratio=config["compress_ratio"],
        squeeze_factor=config["squeeze_factor"],
        conv_scale=config["conv_scale"],
        overlap_ratio=config["overlap_ratio"],
        mlp_ratio=config["mlp_ratio"],
        scale=config["upscale"],
        img_range=config["img_range"],
        in_chans=config["in_chans"],
    )


def same_table_rows() -> Check:
    """Our table rows of every (query, key) pair are the recorded ones, negative indices counted from the end."""
    recorded = Recording.read("hat.hybrid_group").inputs["rpi_oca"]
    mixer = OverlappingCrossAttention(8, 2, window_size=4)
    different = int((mixer.index != recorded % len(mixer.table)).sum())
    unused = len(mixer.table) - len(mixer.index.unique())
    return Check(
        "the position table is read as the authors read it, and every row of it is used",
        holds=different == 0 and unused == 0,
        figures={"different_rows": different, "unused_rows": unused, "rows": len(mixer.table)},
        setting="window 4 with keys of 6 x 6, index recorded from the authors' code",
    )


def equals_dense_attention() -> Check:
    """OCA against dense attention over the whole zero-padded map under a mask, the bias looked up pair by pair."""
    worst: dict[str, float] = {}
    for size, ratio, spatial in ((4, 0.5, (8, 12)), (3, 0.7, (7, 4)), (2, 1.0, (4,)), (2, 0.5, (2, 4, 3))):
        axes = len(spatial)
        mixer = seeded(
            lambda s=size, r=ratio, a=axes: OverlappingCrossAttention(8, 2, window_size=s, overlap_ratio=r, axes=a), 0
        ).double()
        nn.init.normal_(mixer.table, generator=torch.Generator().manual_seed(1))
        x = torch.randn(2, *spatial, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        ours, dense = mixer(x), _dense(mixer, x, size, int(size * ratio))
        ours_grad, dense_grad = (torch.autograd.grad(y.square().sum(), mixer.qkv.weight)[0] for y in (ours, dense))
        error = max(
            (ours - dense).abs().max().item(), ((ours_grad - dense_grad) / dense_grad.abs().max()).abs().max().item()
        )
        worst[f"window_{size}_map_{'x'.join(map(str, spatial))}"] = error
    return Check(
        "overlapping cross attention equals dense attention over the zero-padded map, restricted to each neighbourhood",
        holds=max(worst.values()) < 1e-10,
        figures=worst,
        setting="float64, outputs and the gradient of the projection; odd overlaps and maps of 1, 2 and 3 axes included",
    )


def _dense(mixer: OverlappingCrossAttention, x: Tensor, size: int, extra: int) -> Tensor:
    spatial, before, length = x.shape[1:-1], extra // 2, 2 * size + extra - 1
    q, k, v = mixer.qkv(x).unflatten(-1, (3, 2, 4)).unbind(-3)
    queries = list(itertools.product(*(range(n) for n in spatial)))
    # All places that any window looks at, with the map's own tokens filled in and zeros elsewhere.
    places = list(itertools.product(*(range(-before, -(-n // size) * size + extra - before) for n in spatial)))
    inside = [i for i, place in enumerate(places) if all(0 <= p < n for p, n in zip(place, spatial, strict=True))]
    keys, values = (x.new_zeros(2, len(places), 2, 4) for _ in range(2))
    keys[:, inside], values[:, inside] = k.flatten(1, -3), v.flatten(1, -3)
    mask = torch.zeros(len(queries), len(places), dtype=torch.bool)
    rows = torch.zeros(len(queries), len(places), dtype=torch.long)
    for (i, query), (j, place) in itertools.product(enumerate(queries), enumerate(places)):
        starts = [q // size * size for q in query]
        mask[i, j] = all(s - before <= p < s - before + size + extra for s, p in zip(starts, place, strict=True))
        row = 0
        for q_at, p_at, start in zip(query, place, starts, strict=True):
            row = row * length + (p_at - start + before) - (q_at - start) - extra + 1
        rows[i, j] = row
    bias = mixer.table[rows.where(mask, 0)].permute(2, 0, 1)  # a negative row counts from the end
    out = ops.attention(q, keys, values, bias=bias, mask=mask, backend="reference")
    return mixer.proj(out.flatten(-2))


def _tiny() -> HAT:
    return HAT(dim=24, depths=(2,), num_heads=2, window_size=8, squeeze_factor=6, scale=2, width=24, drop_path_rate=0.0)


def _plain() -> HAT:
    """The same depth in plain shifted windows: no channel attention, and a third window block in place of the OCAB."""
    model = _tiny()
    for group in model.groups:
        group.body.overlap = HybridBlock(24, HybridAttention(24, 2, window_size=8, squeeze_factor=6), mlp_ratio=2.0)
    for module in model.modules():
        if isinstance(module, HybridAttention):
            module.conv_scale = 0.0
    return model


_ARMS = {"hat": _tiny, "plain_windows": _plain}


def _started(build: Callable[[], HAT], seed: int) -> HAT:
    """Short trainings start from pixels repeated, so that their steps go into detail and not into copying the image."""
    model = seeded(build, seed)
    model.start_as_enlargement()
    return model


def _photographs(preset: Preset) -> Task:
    task = create_task("super_resolution", scale=2, patch=16, eval_patch=64)
    if preset == "smoke":
        task.eval_set = Subset(task.eval_set, range(2))
    return task


def recipe(preset: Preset) -> Recipe:
    """A one-group HAT on photographs reduced by two, begun as an enlargement; "paper" is HAT x2 with the paper's
    patch, batch, steps and optimiser (its step-wise schedule and weight averaging are not expressed)."""
    if preset == "paper":
        adam = {"optimizer": "adam", "betas": (0.9, 0.99), "weight_decay": 0.0, "clip_norm": None}
        config = TrainConfig(steps=500_000, batch_size=32, lr=2e-4, **adam)
        return Recipe(seeded(lambda: HAT(scale=2), 0), create_task("super_resolution", scale=2, patch=64), config)
    return Recipe(_started(_tiny, 0), _photographs(preset), _config(preset, 600))


def _config(preset: Preset, steps: int) -> TrainConfig:
    return TrainConfig(steps=2 if preset == "smoke" else steps, batch_size=8, lr=1e-3, weight_decay=0.0)


@lru_cache(maxsize=2)
def _trained(preset: Preset) -> dict[str, list[tuple[HAT, float]]]:
    """Both arms under the same recipe for each seed, with their PSNR; two claims look at them."""
    task, config = _photographs(preset), _config(preset, 300)
    runs: dict[str, list[tuple[HAT, float]]] = {}
    for name, build in _ARMS.items():
        runs[name] = []
        for seed in (0,) if preset == "smoke" else (0, 1):
            model = _started(build, seed)
            metrics = train(model, task, replace(config, seed=seed), cpu=True).metrics
            runs[name].append((model.eval(), metrics[task.metric]))
    return runs


def _diffusion(model: HAT, images: Tensor) -> tuple[float, float]:
    """Diffusion index of one restored pixel, and the share of input pixels (in percent) that it depends on at all.

    The index is 100 (1 - Gini coefficient) of the input gradient over pixels: 0 if a single one matters, 100 if all do
    alike (Gu and Dong, 2021, arXiv 2011.11036, with the plain gradient in place of the integrated one).
    """
    images = images.clone().requires_grad_()
    out = model.eval()(images)
    (gradient,) = torch.autograd.grad(out[..., out.shape[-2] // 2, out.shape[-1] // 2].sum(), images)
    weight = gradient.abs().sum(1).flatten(1).double().sort(-1).values
    count = weight.shape[-1]
    rank = 2 * torch.arange(1, count + 1) - count - 1
    gini = (weight * rank).sum(-1) / (count * weight.sum(-1))
    return 100 * (1 - gini.mean().item()), 100 * (weight > 0).double().mean().item()


def more_pixels_take_part(preset: Preset) -> Check:
    """How widely one restored pixel draws on the input, with and without what HAT adds, before and after training."""
    runs = _trained(preset)
    task = _photographs(preset)
    images = torch.stack([task.eval_set[index]["low"] for index in range(2 if preset == "smoke" else 8)])
    seeds = range(len(runs["hat"]))
    figures: dict[str, float | list[float]] = {}
    for name, build in _ARMS.items():
        fresh = [_diffusion(seeded(build, seed), images) for seed in seeds]
        trained = [_diffusion(model, images) for model, _ in runs[name]]
        figures[f"{name}_untrained"] = [round(index, 2) for index, _ in fresh]
        figures[f"{name}_trained"] = [round(index, 2) for index, _ in trained]
        figures[f"{name}_share_reached"] = round(mean(share for _, share in fresh), 1)
    return Check(
        "With overlapping and channel attention more input pixels take part in restoring one (section 3.1, fig. 1)",
        holds=all(
            mean(figures[f"hat_{when}"]) > mean(figures[f"plain_windows_{when}"]) for when in ("untrained", "trained")
        ),
        figures=figures,
        setting=f"diffusion index of the central pixel, {len(images)} crops of 64 x 64, seeds {list(seeds)}; trained: "
        f"{_config(preset, 300).steps} steps from repeated pixels; share_reached: percent of input pixels with any influence, "
        "untrained; holds if the mean index is larger both untrained and trained",
    )


def restores_better(preset: Preset) -> Check:
    """x2 super-resolution with the same recipe, seeds and depth, with and without what HAT adds."""
    runs = _trained(preset)
    figures: dict[str, float | list[float]] = {
        name: [round(psnr, 3) for _, psnr in results] for name, results in runs.items()
    }
    gain = mean(figures["hat"]) - mean(figures["plain_windows"])
    figures["mean_gain_db"] = round(gain, 3)
    figures["bicubic"] = round(_photographs(preset).trivial()["psnr"], 3)
    return Check(
        "Overlapping and channel attention improve super-resolution over plain windows (table 1 and 2)",
        holds=gain > 0,
        figures=figures,
        setting=f"PSNR in dB on x2 photographs, one group of three blocks, 24 channels, {_config(preset, 300).steps} steps of "
        f"8 crops of 16 x 16 from repeated pixels, seeds {list(range(len(runs['hat'])))}; holds if the mean gain is above 0",
    )


PROOFS = Proofs(
    recordings=(
        Recorded(
            "hat.hybrid_group",
            build=_group,
            run=_run_group,
            keys=KeyMap(rules=BLOCK_KEYS, convert=squeeze_as_linear),
        ),
        Recorded("hat.model_x2", build=_model),
    ),
    checks=(same_table_rows, equals_dense_attention),
    recipe=recipe,
    claims=(more_pixels_take_part, restores_better),
)
