"""Proofs of PredFormer: recordings of its nine models; the order of attention, its cost in time, and what it sees."""

from __future__ import annotations

from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from regard.checkpoint import KeyMap
from regard.flops import count_macs
from regard.measure import growth, median_seconds
from regard.proofs.base import Check, Preset, Proofs, Recipe
from regard.proofs.experiments import headline, over_seeds, reach
from regard.proofs.recordings import Recorded
from regard.systems.video.predformer import PredFormer, layer_keys, predformer_layer
from regard.tasks import create_task
from regard.tasks.base import Task
from regard.training import TrainConfig, seeded

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
        order, factorized = _NINE[name]
        model = PredFormer(order, 1, factorized, dim=2, num_heads=1, head_dim=1, patch_size=1)
        return f"{name}.{model.authors_keys.rename(rest)}"


def _tiny(order: str, layers: int, factorized: bool = False, quirks: bool = False) -> PredFormer:
    model = PredFormer(
        order,
        layers,
        factorized,
        dim=32,
        num_heads=4,
        head_dim=8,
        mlp_ratio=2.0,
        patch_size=8,
        authors_quirks=quirks,
    )
    # The authors' deviation of 0.02 suits 256 channels; with 32 the blocks would stay silent for hundreds of steps.
    for module in model.layers.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    return model


def recipe(preset: Preset) -> Recipe:
    """One TSST layer on a digit moving over 32 x 32 pixels, 5 frames for 5; "paper" is the Moving MNIST model and budget."""
    if preset == "paper":
        # 2000 epochs of 10,000 clips in batches of 16.
        config = TrainConfig(steps=1_250_000, batch_size=16, lr=1e-3, weight_decay=1e-2)
        task = create_task("moving_digits", size=64, train_items=10_000)
        return Recipe(seeded(PredFormer, 0), task, config)
    return Recipe(seeded(lambda: _tiny("tsst", 1), 0), _digits(preset), _config(preset, 800))


def _digits(preset: Preset) -> Task:
    few = {"train_items": 32, "eval_items": 16} if preset == "smoke" else {}
    return create_task("moving_digits", size=32, digits=1, frames_in=5, frames_out=5, **few)


def _config(preset: Preset, steps: int) -> TrainConfig:
    return TrainConfig(steps=2 if preset == "smoke" else steps, batch_size=8, lr=6e-3, weight_decay=1e-2)


def order_matters(preset: Preset) -> Check:
    """Four blocks each, interleaved, factorised or full, under one recipe; and the factorised one as it was released."""
    task, config = _digits(preset), _config(preset, 500)
    seeds = (0,) if preset == "smoke" else (0, 1)
    arms = {
        "quadruplet_tsst": lambda: _tiny("tsst", 1),
        "binary_ts": lambda: _tiny("ts", 2),
        "factorized_st": lambda: _tiny("st", 2, True),
        "factorized_st_as_released": lambda: _tiny("st", 2, True, True),
        "full": lambda: _tiny("f", 4, True),
    }
    figures: dict[str, float | int | list[float]] = {}
    for name, build in arms.items():
        figures[name] = headline(task, over_seeds(build, task, config, seeds))
        with torch.device("meta"):
            figures[f"{name}_macs"] = count_macs(build(), torch.empty(1, 5, 1, 32, 32))
    scores = {name: mean(figures[name]) for name in arms}  # type: ignore[arg-type]
    figures["last_frame_repeated"] = round(task.trivial()[task.metric], 4)
    return Check(
        "Interleaved temporal and spatial attention predicts better than factorised or full attention "
        "(Moving MNIST: TSST 12.4, binary TS 12.8, full 17.3, FacST 20.6)",
        holds=max(scores["quadruplet_tsst"], scores["binary_ts"]) < min(scores["factorized_st"], scores["full"]),
        figures=figures,
        setting=f"squared error a frame, one digit, 32 x 32, 5 frames for 5, four blocks of 32 channels, {config.steps} steps, "
        f"seeds {list(seeds)}; holds if the means of both interleaved orders are below those of factorised (tokens "
        "brought back in order) and full attention",
    )


def cost_in_time(preset: Preset) -> Check:
    """Multiply-adds and time of four blocks over clips of growing length, frames of 8 x 8 patches."""
    lengths = [4, 8] if preset == "smoke" else [5, 10, 20, 40]
    figures: dict[str, float] = {}
    for name, order in (("interleaved", "tsst"), ("full", "ffff")):
        layer = predformer_layer(
            order, 32, depth=1, hidden=64, num_heads=4, head_dim=8, dropout=0.0, drop_path=0.0
        ).eval()
        with torch.no_grad():
            clips = [torch.randn(1, length, 8, 8, 32) for length in lengths]
            macs = [count_macs(layer, clip) for clip in clips]
            times = [median_seconds(lambda m=layer, x=clip: m(x), repeats=3) for clip in clips]
        figures[f"{name}_macs_growth"] = round(growth(lengths, macs), 3)
        figures[f"{name}_time_growth"] = round(growth(lengths, times), 2)
    return Check(
        "The cost of full attention grows with the square of the number of frames, that of interleaved attention linearly",
        holds=figures["full_macs_growth"] > 1.5 and figures["interleaved_macs_growth"] < 1.25,
        figures=figures,
        setting=f"exponent fitted over {lengths} frames of 64 patches, four blocks of 32 channels; verdict on multiply-adds",
    )


def one_pair_sees_everything(preset: Preset) -> Check:
    """Which of the 4 x 3 x 3 tokens one output token depends on, after one block or a pair."""
    x = torch.randn(1, 4, 3, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    figures: dict[str, int] = {"tokens": 36}
    for order in ("t", "s", "ts"):
        layer = seeded(
            lambda o=order: predformer_layer(
                o, 16, depth=1, hidden=32, num_heads=2, head_dim=8, dropout=0.0, drop_path=0.0
            ),
            0,
        ).double()
        figures[f"seen_after_{order}"] = int(reach(layer, x, (1, 0, 2)).sum())
    return Check(
        "A temporal and a spatial block together connect every token with every other; one alone does not",
        holds=figures["seen_after_t"] == 4 and figures["seen_after_s"] == 9 and figures["seen_after_ts"] == 36,
        figures=figures,
        setting="Jacobian of token (1, 0, 2) of 4 frames of 3 x 3 patches, float64",
    )


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
    claims=(order_matters, cost_in_time, one_pair_sees_everything),
)
