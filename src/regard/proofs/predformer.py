"""Proofs of PredFormer: recordings of its nine models; the order of attention, its cost in time, and what it sees."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from regard.checkpoint import KeyMap
from regard.proofs.base import Check, Preset, Proofs, Recipe
from regard.proofs.experiments import growth, headline, median_seconds, over_seeds, reach, seeded
from regard.proofs.recordings import Recorded
from regard.systems.video.predformer import PredFormer, layer_keys, predformer_layer
from regard.tasks import create_task
from regard.tasks.base import Task
from regard.training import TrainConfig

# The authors' names of the nine models: order, and whether all blocks of one kind come first.
_NINE: dict[str, tuple[str, bool]] = {
    "FullAttention": ("f", True),
    "FacST": ("st", True),
    "FacTS": ("ts", True),
    "Binary_ST": ("st", False),
    "Binary_TS": ("ts", False),
    "Triplet_STS": ("sts", False),
    "Triplet_TST": ("tst", False),
    "Quadruplet_TSST": ("tsst", False),
    "Quadruplet_STTS": ("stts", False),
}


def _layer(config: dict[str, Any]) -> nn.Sequential:
    return predformer_layer(
        "tsst",
        config["dim"],
        depth=config["depth"],
        hidden=config["mlp_dim"],
        num_heads=config["heads"],
        head_dim=config["dim_head"],
        dropout=config["dropout"],
        drop=config["attn_dropout"],
        drop_path=config["drop_path"],
    )


def _run_layer(layer: nn.Sequential, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    # Recorded as (b, t, n, d); the parts in the layout that they work in, places or times first.
    names = ("ts_temporal", "ts_space", "st_space", "st_temporal")
    outputs, x = {}, inputs["x"]
    for name, part in zip(names, layer, strict=True):
        x = part(x)
        grouped = x.transpose(1, 2) if name.endswith("temporal") else x
        outputs[f"mid_{name}_transformer"] = grouped.flatten(0, 1)
    return {**outputs, "out": x}


def _model(config: dict[str, Any], order: str = "tsst", factorized: bool = False) -> PredFormer:
    config = config["model_config"]
    return PredFormer(
        order=order,
        layers=config["Ndepth"],
        factorized=factorized,
        dim=config["dim"],
        num_heads=config["heads"],
        head_dim=config["dim_head"],
        mlp_ratio=config["scale_dim"],
        patch_size=config["patch_size"],
        in_chans=config["num_channels"],
        dropout=config["dropout"],
        attn_dropout=config["attn_dropout"],
        drop_path_rate=config["drop_path"],
        authors_quirks=True,
    )


def _nine(config: dict[str, Any]) -> nn.ModuleDict:
    return nn.ModuleDict({name: _model(config, *form) for name, form in _NINE.items()})


class _NineKeys(KeyMap):
    """Each key begins with the name of its model, whose own rules apply to the rest."""

    def rename(self, key: str) -> str | None:
        name, rest = key.split(".", 1)
        return f"{name}.{PredFormer(*_NINE[name][:1], 1, _NINE[name][1], 8, 2, 4).authors_keys.rename(rest)}"


def _tiny(order: str, layers: int, factorized: bool = False) -> PredFormer:
    return PredFormer(order, layers, factorized, dim=48, num_heads=4, head_dim=12, mlp_ratio=2.0, patch_size=4)


def recipe(preset: Preset) -> Recipe:
    """A one-layer TSST on moving digits of 32 pixels; "paper" is the Moving MNIST model and its optimiser."""
    if preset == "paper":
        # 10,000 clips in batches of 16 for 2000 epochs.
        config = TrainConfig(steps=1_250_000, batch_size=16, lr=1e-3, weight_decay=1e-2)
        return Recipe(PredFormer(), create_task("moving_digits", size=64, train_items=10_000), config)
    config = TrainConfig(steps=2 if preset == "smoke" else 500, batch_size=16, lr=2e-3, weight_decay=1e-2)
    return Recipe(seeded(lambda: _tiny("tsst", 1), 0), _digits(preset), config)


def _digits(preset: Preset) -> Task:
    return create_task("moving_digits", size=32, eval_items=16 if preset == "smoke" else 256)


PROOFS = Proofs(
    recordings=(
        Recorded(
            "predformer.layer_tsst",
            build=_layer,
            run=_run_layer,
            keys=KeyMap(rules=layer_keys("tsst", False, "^", "")),
        ),
        Recorded("predformer.model_tsst", build=_model),
        Recorded(
            "predformer.nine_variants",
            build=_nine,
            run=lambda models, inputs: {name: model(inputs["x"]) for name, model in models.items()},
            keys=_NineKeys(),
        ),
    ),
    recipe=recipe,
    claims=(),
)
