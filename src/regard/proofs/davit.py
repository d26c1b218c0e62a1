"""Proofs of DaViT: recordings of channel attention and the model; channels see the whole image at linear cost."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from regard.flops import count_params
from regard.layers import SoftmaxAttention
from regard.proofs.base import Check, Preset, Proofs, Recipe
from regard.proofs.experiments import OppositeHue, cost_growth, over_variants, reach
from regard.proofs.recordings import Recorded
from regard.systems.backbones.davit import ChannelAttention, DaViT, SpatialAttention
from regard.tasks import create_task
from regard.tasks.images import Classification
from regard.training import TrainConfig, seeded


def _model(config: dict) -> DaViT:
    return DaViT(
        dims=config["embed_dims"],
        num_heads=config["num_heads"],
        depths=config["depths"],
        window_size=config["window_size"],
        mlp_ratio=config["mlp_ratio"],
        patch_size=config["patch_size"],
        num_classes=config["num_classes"],
        in_chans=config["in_chans"],
    )


def _run_model(model: DaViT, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    # One of the authors' blocks I is a pair of ours; their downsamplings are called patch embeddings.
    tokens = model.stem(inputs["x"].movedim(1, -1))
    outputs = {"patch_embeds.0": tokens.flatten(1, 2)}
    for stage, blocks in enumerate(model.stages):
        tokens = model.downs[stage](tokens)
        if stage == 1:
            outputs["patch_embeds.1"] = tokens.flatten(1, 2)
        for index, block in enumerate(blocks):
            tokens = block(tokens)
            name = f"main_blocks.{stage}.{index // 2}"
            if index % 2 and name in ("main_blocks.0.0", "main_blocks.2.1", "main_blocks.3.0"):
                outputs[name] = tokens.flatten(1, 2)
    outputs["logits"] = model(inputs["x"])
    return outputs


def channel_attention_by_loops() -> Check:
    """ChannelAttention against its equation, written as loops over groups and pairs of channels."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for spatial in ((1,), (6,), (3, 5), (2, 3, 2)):
        mixer = seeded(lambda: ChannelAttention(12, 3), 1).double()
        x = torch.randn(2, *spatial, 12, dtype=torch.float64, generator=generator)
        v, q, k = mixer.vqk(x).flatten(1, -2).chunk(3, -1)
        mixed = torch.zeros_like(v)
        for group in range(3):
            for i in range(4 * group, 4 * group + 4):
                others = range(4 * group, 4 * group + 4)
                logits = torch.stack([(q[..., i] * k[..., j]).sum(1) / 4**0.5 for j in others], -1)
                for weight, j in zip(logits.softmax(-1).unbind(-1), others, strict=True):
                    mixed[..., i] += weight[:, None] * v[..., j]
        worst = max(worst, (mixer(x) - mixer.proj(mixed).view(x.shape)).abs().max().item())
    return Check(
        "Channel attention is softmax attention among the channels of each group",
        holds=worst < 1e-12,
        figures={"largest_error": worst},
        setting="float64, maps of 1 to 3 axes, one position included",
    )


def _tiny(task: Classification, blocks: tuple[str, str] = ("spatial", "channel"), dim: int = 32) -> DaViT:
    return DaViT(
        dims=(dim, 2 * dim),
        num_heads=(2, 4),
        depths=(1, 1),
        blocks=blocks,
        window_size=2,
        mlp_ratio=2.0,
        patch_size=4 if task.sample_shape[1] >= 32 else 2,
        num_classes=task.num_classes,
        in_chans=task.sample_shape[0],
    )


def recipe(preset: Preset) -> Recipe:
    """A two-stage DaViT on handwritten digits; "paper" is DaViT-Tiny with the schedule of the paper."""
    if preset == "paper":
        task = create_task("digits", size=224, label_smoothing=0.1)
        model = seeded(lambda: DaViT(drop_path_rate=0.1, num_classes=task.num_classes), 0)
        return Recipe(model, task, TrainConfig(steps=375_000, batch_size=1024, lr=1e-3, warmup=20 / 300))
    task = create_task("digits", size=16, channels=1)
    steps = {"smoke": 2, "small": 300}[preset]
    return Recipe(seeded(lambda: _tiny(task, dim=24), 0), task, TrainConfig(steps=steps, batch_size=32, lr=2e-3))


def linear_and_global(preset: Preset) -> Check:
    """Growth of cost with the map, and what one output position depends on, for one mixer."""
    sides = [14, 28] if preset == "smoke" else [28, 42, 56, 84]
    figures = cost_growth(
        {"channel": lambda side: ChannelAttention(32, 1), "dense": lambda side: SoftmaxAttention(32, 1)}, sides, dim=32
    )
    x = torch.randn(1, 8, 8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for name, mixer in (
        ("channel", seeded(lambda: ChannelAttention(16, 2), 0)),
        ("window", seeded(lambda: SpatialAttention(16, 2, window_size=4), 0)),
    ):
        seen = [int(reach(mixer.double(), x, place).sum()) for place in ((0, 0), (3, 5), (7, 7))]
        figures[f"fewest_of_64_positions_seen_by_{name}"] = min(seen)
    return Check(
        "Channel attention costs linear time in the number of positions and yet sees every one (section 3.3)",
        holds=abs(figures["channel_macs_growth"] - 1) < 0.05
        and figures["dense_macs_growth"] > 1.5
        and figures["fewest_of_64_positions_seen_by_channel"] == 64,
        figures=figures,
        setting=f"exponent of tokens over maps of {sides} squared, 32 channels (verdict on multiply-adds); Jacobians "
        "of three positions of an 8 x 8 map, window 4",
    )


def complementary(preset: Preset) -> Check:
    """Equal parameters, budget and seeds: pairs of the two blocks against two of one kind."""
    smoke = preset == "smoke"
    task = OppositeHue(train_items=64, eval_items=64) if smoke else OppositeHue()
    config = TrainConfig(steps=2 if smoke else 400, batch_size=32, lr=2e-3)
    seeds = (0,) if smoke else (0, 1, 2)
    arms = {
        "spatial_and_channel": ("spatial", "channel"),
        "spatial_only": ("spatial", "spatial"),
        "channel_only": ("channel", "channel"),
    }
    builds = {name: partial(_tiny, task, blocks) for name, blocks in arms.items()}
    figures, mean = over_variants(builds, task, config, seeds)
    figures |= {f"{name}_parameters": count_params(build()) for name, build in builds.items()}
    return Check(
        "Spatial and channel attention complement each other: in turns they beat either alone",
        holds=mean["spatial_and_channel"] > max(mean["spatial_only"], mean["channel_only"]),
        figures=figures,
        setting=f"{task.description} Two stages, windows of 2 x 2 tokens, {config.steps} steps, seeds {list(seeds)}, "
        "accuracy, chance 0.25",
    )


PROOFS = Proofs(
    recordings=(
        Recorded("davit.attention", build=lambda config: ChannelAttention(config["dim"], config["num_heads"])),
        Recorded("davit.model", build=_model, run=_run_model),
    ),
    checks=(channel_attention_by_loops,),
    recipe=recipe,
    claims=(linear_and_global, complementary),
)
