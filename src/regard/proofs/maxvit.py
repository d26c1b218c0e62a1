"""Proofs of MaxViT: recordings of both attentions and the model; a window and a grid together see the whole image."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from regard.layers import Block, SoftmaxAttention
from regard.proofs.base import Check, Preset, Proofs, Recipe
from regard.proofs.experiments import cost_growth, over_variants, reach
from regard.proofs.recordings import Recorded
from regard.systems.backbones.maxvit import GridAttention, MaxViT
from regard.tasks import create_task
from regard.tasks.images import DrawnImages, LabelledImages
from regard.training import TrainConfig, seeded


def _pair(dim: int, num_heads: int, window_size: int) -> nn.Sequential:
    """The two transformer blocks of a MaxViT block, at the places that they have in it; the convolution left out."""
    blocks = (
        Block(
            dim,
            GridAttention(dim, num_heads, window_size=window_size, partition=partition),
            act=lambda: nn.GELU(approximate="tanh"),
        )
        for partition in ("window", "grid")
    )
    return nn.Sequential(nn.Identity(), *blocks)


def _recorded_pair(config: dict) -> nn.Sequential:
    heads = config["dim"] // config["cfg"]["dim_head"]
    return _pair(config["dim"], heads, config["cfg"]["window_size"][0])


def _run_pair(pair: nn.Sequential, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    after_block = pair[1](inputs["x"])
    return {"after_block": after_block, "after_grid": pair[2](after_block)}


def _model(config: dict) -> MaxViT:
    cfg = config["cfg"]
    return MaxViT(
        dims=cfg["embed_dim"],
        depths=cfg["depths"],
        stem_dim=cfg["stem_width"],
        head_dim=cfg["transformer_cfg"]["dim_head"],
        window_size=config["img_size"][0] // cfg["transformer_cfg"]["partition_ratio"],
        num_classes=config["num_classes"],
    )


def _run_model(model: MaxViT, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    outputs = {f"stages.{index}": x for index, x in enumerate(model.forward_intermediates(inputs["x"]))}
    stem = model.stem(inputs["x"].movedim(1, -1)).movedim(-1, 1)
    return {"stem": stem, **outputs, "logits": model(inputs["x"])}


def attention_under_masks() -> Check:
    """Both attentions against dense attention under a mask, written from the places of tokens."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for (spatial, size), partition in product(
        (((6,), (3,)), ((7,), (3,)), ((8, 6), (4, 3)), ((5, 9), (4, 3)), ((2, 3), (4, 4)), ((4, 2, 6), (2, 2, 3))),
        ("window", "grid"),
    ):
        mixer = seeded(
            lambda s=size, p=partition: GridAttention(8, 2, window_size=s, partition=p, axes=len(s)), 0
        ).double()
        nn.init.normal_(mixer.bias.table, generator=generator)
        x = torch.randn(2, *spatial, 8, dtype=torch.float64, generator=generator)
        place = torch.cartesian_prod(*(torch.arange(length) for length in spatial)).view(-1, len(spatial))
        sides = torch.tensor(size)
        step = -(-torch.tensor(spatial) // sides)  # distance of a grid's tokens, and number of windows
        group, inside = (place // sides, place % sides) if partition == "window" else (place % step, place // step)
        together = (group[:, None] == group).all(-1)
        offset = inside - inside[:, None] + sides - 1  # [query, key]: key minus query
        index = torch.zeros_like(together, dtype=torch.long)
        for axis, side in enumerate(size):
            index = index * (2 * side - 1) + offset[..., axis].clamp(0, 2 * side - 2)
        q, k, v = mixer.qkv(x).flatten(1, -2).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        logits = q @ k.mT / 4**0.5 + mixer.bias.table[index].permute(2, 0, 1)
        weights = logits.masked_fill(~together, -torch.inf).softmax(-1)
        expected = mixer.proj((weights @ v).transpose(1, 2).flatten(2)).view(x.shape)
        worst = max(worst, (mixer(x) - expected).abs().max().item())
    return Check(
        "Block and grid attention are dense attention among tokens of one window, or of equal remainders",
        holds=worst < 1e-12,
        figures={"largest_error": worst},
        setting="float64, maps of 1 to 3 axes, sizes that the group divides, does not divide, and exceeds",
    )


def recipe(preset: Preset) -> Recipe:
    """A two-stage MaxViT on handwritten digits; "paper" is MaxViT-T with the schedule of the paper."""
    if preset == "paper":
        task = create_task("digits", size=224, label_smoothing=0.1)
        model = seeded(lambda: MaxViT(drop_path_rate=0.2, num_classes=task.num_classes), 0)
        config = TrainConfig(steps=93_750, batch_size=4096, lr=3e-3, warmup=10_000 / 93_750)
        return Recipe(model, task, config)
    task = create_task("digits", channels=1)
    model = seeded(
        lambda: MaxViT(
            dims=(16, 32),
            depths=(1, 1),
            stem_dim=16,
            head_dim=8,
            window_size=4,
            mlp_ratio=2.0,
            bn_momentum=0.1,
            num_classes=task.num_classes,
            in_chans=1,
        ),
        0,
    )
    return Recipe(model, task, TrainConfig(steps=2 if preset == "smoke" else 250, batch_size=32, lr=4e-3))


def one_block_is_global(preset: Preset) -> Check:
    """What one token depends on after window attention, and after window and grid attention, convolutions left out."""
    pair = seeded(lambda: _pair(16, 2, 4), 0).double()
    x = torch.randn(1, 8, 8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    places = ((0, 0), (3, 5), (7, 7)) if preset == "smoke" else tuple(product(range(8), range(8)))
    figures = {}
    for name, function in (("window", pair[1]), ("grid", pair[2]), ("window_then_grid", pair)):
        seen = [int(reach(function, x, place).sum()) for place in places]
        figures |= {f"fewest_tokens_seen_by_{name}": min(seen), f"most_tokens_seen_by_{name}": max(seen)}
    return Check(
        "One block sees the whole map: a window and then a grid connect every token to every other (section 3.2)",
        holds=figures["most_tokens_seen_by_window"] == 16 and figures["fewest_tokens_seen_by_window_then_grid"] == 64,
        figures=figures,
        setting=f"Jacobians of {len(places)} tokens of an 8 x 8 map, windows and grids of 4 x 4",
    )


def linear_cost(preset: Preset) -> Check:
    """Multiply-adds and time of a window and a grid over growing maps, against dense attention."""
    sides = [14, 28] if preset == "smoke" else [28, 42, 56, 84]
    pair = nn.Sequential(*(GridAttention(32, 1, partition=partition) for partition in ("window", "grid")))
    figures = cost_growth(
        {"window_and_grid": lambda side: pair, "dense": lambda side: SoftmaxAttention(32, 1)}, sides, dim=32
    )
    return Check(
        "Window and grid attention together cost linear time in the number of tokens (section 3.2)",
        holds=abs(figures["window_and_grid_macs_growth"] - 1) < 0.05 and figures["dense_macs_growth"] > 1.5,
        figures=figures,
        setting=f"exponent of tokens fitted over maps of {sides} squared, dim 32, size 7; verdict on multiply-adds",
    )


class TwoMarkers(DrawnImages):
    """Markers of one of four colours near two opposite corners, over noise: which colour has the lower right?"""

    num_classes = 4

    def __init__(self, train_items: int = 4096, eval_items: int = 512, seed: int = 0) -> None:
        super().__init__(32, train_items, eval_items, seed)

    @property
    def description(self) -> str:
        return (
            "Markers of four colours near two opposite corners of 32 x 32 pixels of noise: which has the lower right?"
        )

    def draw(self, rng: np.random.Generator, count: int) -> LabelledImages:
        """Noise and two markers."""
        colours = np.array([[1, 0.2, 0.2], [0.2, 1, 0.2], [0.2, 0.2, 1], [1, 1, 0.2]])
        first, labels = rng.integers(0, 4, (2, count))
        images = rng.uniform(0, 0.4, (count, 3, 32, 32))
        for corner, colour in ((0, first), (26, labels)):
            for i, (top, left) in enumerate(corner + rng.integers(0, 3, (count, 2))):
                images[i, :, top : top + 4, left : left + 4] = colours[colour[i]][:, None, None]
        return LabelledImages((255 * images).round().astype(np.uint8), labels.astype(np.int64), mean=0.22, std=0.16)


class _CornerMaxViT(MaxViT):
    """One stage of one block; the answer is read at the upper left token, so it has to come there."""

    def __init__(self, partitions: tuple[str, str], **options: Any) -> None:
        # Squeeze-and-excitation is left out, because it spreads image-wide means by itself.
        super().__init__(
            dims=(16,),
            depths=(1,),
            stem_dim=8,
            head_dim=8,
            window_size=4,
            partitions=partitions,
            mlp_ratio=2.0,
            se_ratio=0.0,
            bn_momentum=0.1,
            **options,
        )
        # The paper's deviation of 0.02 suits hundreds of channels; with 16 the signal would take long to grow.
        self.apply(lambda m: m.reset_parameters() if isinstance(m, (nn.Linear, nn.Conv2d)) else None)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_norm(x[:, 0, 0])
        return x if pre_logits else self.head(x)


def grid_carries_far_cues(preset: Preset) -> Check:
    """One block at equal parameters, budget and seeds, with the grid and with a second window in its place."""
    smoke = preset == "smoke"
    task = TwoMarkers(64, 64) if smoke else TwoMarkers()
    config = TrainConfig(steps=2 if smoke else 500, batch_size=32, lr=4e-3)
    seeds = (0,) if smoke else (0, 1, 2)
    arms = {"window_and_grid": ("window", "grid"), "two_windows": ("window", "window")}
    builds = {name: partial(_CornerMaxViT, pair, num_classes=4) for name, pair in arms.items()}
    figures, mean = over_variants(builds, task, config, seeds)
    return Check(
        "With grid attention one block brings a cue from the opposite corner; without it, it cannot",
        holds=mean["window_and_grid"] >= 0.9 and mean["two_windows"] <= 0.35,
        figures=figures,
        setting=f"{task.description} One block on 8 x 8 tokens, size 4, no squeeze-and-excitation, read at the "
        f"upper left token, {config.steps} steps, seeds {list(seeds)}, accuracy, chance 0.25",
    )


PROOFS = Proofs(
    recordings=(
        Recorded("maxvit.attention", build=_recorded_pair, run=_run_pair, keys=MaxViT.authors_keys),
        Recorded("maxvit.model", build=_model, run=_run_model),
    ),
    checks=(attention_under_masks,),
    recipe=recipe,
    claims=(one_block_is_global, linear_cost, grid_carries_far_cues),
)
