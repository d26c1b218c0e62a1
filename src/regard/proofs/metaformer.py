"""Proofs of MetaFormer: recordings of the authors' blocks and model; layout before mixer; pooling is cheap."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from regard.layers import Block, GlobalNorm, SoftmaxAttention
from regard.measure import growth, median_seconds
from regard.proofs.base import Check, Preset, Proofs, Recipe
from regard.proofs.experiments import over_variants
from regard.proofs.recordings import Recorded
from regard.systems.backbones.metaformer import MetaFormer, Pooling, SpatialFc
from regard.tasks import create_task
from regard.tasks.images import Classification
from regard.training import TrainConfig, seeded


def _block(config: dict) -> Block:
    mixer = Pooling(config["dim"], pool_size=config["pool_size"])
    return Block(config["dim"], mixer, mlp_ratio=config["mlp_ratio"], norm=GlobalNorm, layer_scale=1e-5)


def _model(config: dict) -> MetaFormer:
    return MetaFormer(
        dims=config["embed_dims"],
        depths=config["layers"],
        mlp_ratio=config["mlp_ratios"],
        num_classes=config["num_classes"],
    )


def _channels_first(module: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return module(inputs["x"].movedim(1, -1)).movedim(-1, 1)


def pooling_is_a_counted_mean() -> Check:
    """Pooling against a loop over the tokens, on maps of one, two and three axes, one token included."""
    worst = 0.0
    generator = torch.Generator().manual_seed(0)
    for spatial, size in (((1,), 3), ((7,), 5), ((1, 1), 3), ((5, 4), 3), ((2, 9), 5), ((3, 2, 4), 3)):
        x = torch.randn(2, *spatial, 3, dtype=torch.float64, generator=generator)
        expected = torch.empty_like(x)
        for place in (
            torch.cartesian_prod(*(torch.arange(length) for length in spatial)).view(-1, len(spatial)).tolist()
        ):
            box = tuple(slice(max(at - size // 2, 0), at + size // 2 + 1) for at in place)
            mean = x[(slice(None), *box)].flatten(1, -2).mean(1)
            expected[(slice(None), *place)] = mean - x[(slice(None), *place)]
        worst = max(worst, (Pooling(3, pool_size=size)(x) - expected).abs().max().item())
    return Check(
        "Pooling is the mean over the neighbours that exist, minus the token (eq. 4)",
        holds=worst < 1e-12,
        figures={"largest_error": worst},
        setting="float64, 1 to 3 axes, boxes of 3 and 5, maps smaller than the box included",
    )


def _tiny(mixers: str | tuple[str, ...], task: Classification) -> MetaFormer:
    channels, size, _ = task.sample_shape
    return MetaFormer(
        dims=(24, 48),
        depths=(2, 2),
        mixers=mixers,
        mlp_ratio=2.0,
        layer_scale=1.0,  # the paper's 1e-5 needs more steps than these runs have
        stem_stride=2,
        img_size=size,
        num_classes=task.num_classes,
        in_chans=channels,
    )


def recipe(preset: Preset) -> Recipe:
    """A two-stage PoolFormer on handwritten digits; "paper" is S12 with the schedule of the paper."""
    if preset == "paper":
        task = create_task("digits", size=224, label_smoothing=0.1)
        model = seeded(lambda: MetaFormer(drop_path_rate=0.1, num_classes=task.num_classes), 0)
        return Recipe(model, task, TrainConfig(steps=375_000, batch_size=1024, lr=1e-3, warmup=5 / 300))
    task = create_task("digits", size=16, channels=1)
    steps = {"smoke": 2, "small": 300}[preset]
    return Recipe(seeded(lambda: _tiny("pooling", task), 0), task, TrainConfig(steps=steps, batch_size=32, lr=2e-3))


def layout_before_mixer(preset: Preset) -> Check:
    """One skeleton, budget and data; the mixers are nothing, pooling, or pooling with attention in the last stage."""
    task = create_task("digits", size=16, channels=1)
    config = TrainConfig(steps=2 if preset == "smoke" else 300, batch_size=32, lr=2e-3)
    seeds = (0,) if preset == "smoke" else (0, 1, 2)
    arms = {"identity": "identity", "pooling": "pooling", "hybrid": ("pooling", "softmax")}
    figures, mean = over_variants(
        {name: partial(_tiny, mixers, task) for name, mixers in arms.items()}, task, config, seeds
    )
    return Check(
        "Pooling in place of attention beats no mixing by a point or more, and attention in the last stage is at least "
        "as good again (table 5)",
        holds=mean["pooling"] >= mean["identity"] + 0.01 and mean["hybrid"] >= mean["pooling"],
        figures=figures,
        setting=(
            f"handwritten digits, two stages of 8 x 8 and 4 x 4 tokens, one skeleton (GroupNorm, "
            f"no positions), {config.steps} steps, seeds "
            f"{list(seeds)}, accuracy on 360 digits"
        ),
    )


def pooling_is_cheap(preset: Preset) -> Check:
    """Time of one mixer over growing maps, pooling against dense attention, 64 channels."""
    sides = [7, 14, 28] if preset == "smoke" else [14, 28, 56, 112]
    figures: dict[str, float] = {"pooling_parameters": sum(p.numel() for p in Pooling(64).parameters())}
    seconds: dict[str, list[float]] = {}
    with torch.no_grad():
        for name, mixer in (("pooling", Pooling(64)), ("attention", SoftmaxAttention(64, 2, qkv_bias=False))):
            seconds[name] = []
            for side in sides:
                # Equally many tokens at every size, so that caches and memory are used alike and only the map grows.
                batch = (sides[-1] // side) ** 2
                x = torch.randn(batch, side, side, 64)
                seconds[name].append(median_seconds(lambda m=mixer, x=x: m(x), repeats=5) / batch)
            figures[f"{name}_time_growth"] = round(growth([side * side for side in sides], seconds[name]), 2)
    ratios = [a / p for a, p in zip(seconds["attention"], seconds["pooling"], strict=True)]
    figures |= {"attention_over_pooling_time_smallest": round(ratios[0], 1)}
    figures |= {"attention_over_pooling_time_largest": round(ratios[-1], 1)}
    return Check(
        "The cost of pooling is linear in the number of tokens and far below that of attention (section 3.2)",
        holds=figures["pooling_time_growth"] < 1.3 and ratios[-1] > 10,
        figures=figures,
        setting=f"exponent of tokens fitted to the time for one map of {sides} squared, 64 channels, forward; maps in "
        "batches of equally many tokens",
    )


PROOFS = Proofs(
    recordings=(
        Recorded("metaformer.block_pool", build=_block, run=_channels_first, keys=MetaFormer.authors_keys),
        Recorded(
            "metaformer.mech_attention",
            build=lambda config: SoftmaxAttention(config["dim"], config["dim"] // config["head_dim"], qkv_bias=False),
            run=_channels_first,
            keys=MetaFormer.authors_keys,
        ),
        Recorded(
            "metaformer.mech_spatial_fc",
            build=lambda config: SpatialFc(6, grid=config["spatial_shape"]),
            run=_channels_first,
        ),
        Recorded("metaformer.model_pool", build=_model),
    ),
    checks=(pooling_is_a_counted_mean,),
    recipe=recipe,
    claims=(layout_before_mixer, pooling_is_cheap),
)
