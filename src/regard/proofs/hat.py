"""Proofs of HAT: recordings of the authors' group and model; overlapping windows and channel attention use more pixels."""

from __future__ import annotations

import itertools
from functools import lru_cache
from statistics import mean

import torch
from torch import Tensor, nn

from regard import ops
from regard.checkpoint import KeyMap
from regard.proofs.base import Check, Preset, Proofs, Recipe
from regard.proofs.experiments import headline, seeded
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
from regard.training import TrainConfig, train


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
        error = max((ours - dense).abs().max().item(), ((ours_grad - dense_grad) / dense_grad.abs().max()).abs().max().item())
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


def _tiny(scale: int = 2) -> HAT:
    return HAT(
        dim=24,
        depths=(2, 2),
        num_heads=2,
        window_size=8,
        squeeze_factor=6,
        scale=scale,
        width=24,
        drop_path_rate=0.0,
    )


def _without() -> HAT:
    """The same depth with plain shifted windows: no channel attention, and a further window block for each OCAB."""
    model = _tiny()
    for group in model.groups:
        dim, heads = model.num_features, group.body.overlap.mixer.num_heads
        group.body.overlap = HybridBlock(dim, HybridAttention(dim, heads, window_size=8, squeeze_factor=6), mlp_ratio=2)
    for module in model.modules():
        if isinstance(module, HybridAttention):
            module.conv_scale = 0.0
    return model


def recipe(preset: Preset) -> Recipe:
    """A two-group HAT on photographs reduced by two; "paper" is HAT x2 with the paper's patch and optimiser."""
    if preset == "paper":
        config = TrainConfig(steps=500_000, batch_size=32, lr=2e-4, weight_decay=0.0, optimizer="adam", betas=(0.9, 0.99))
        return Recipe(HAT(scale=2), create_task("super_resolution", scale=2, patch=64), config)
    config = TrainConfig(steps=2 if preset == "smoke" else 600, batch_size=8, lr=3e-3, weight_decay=0.0)
    return Recipe(seeded(_tiny, 0), _photographs(), config)


def _photographs() -> Task:
    return create_task("super_resolution", scale=2, patch=16, eval_patch=64)


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
    claims=(),
)
