"""Proofs of BiFormer: recordings of the authors' attention and model; routing finds far-away evidence by its content."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from regard import ops
from regard.layers import SoftmaxAttention
from regard.proofs.base import Check, Preset, Proofs, Recipe
from regard.proofs.experiments import CornerReader, cost_growth, headline
from regard.proofs.recordings import Recorded
from regard.systems.backbones.biformer import BiFormer, BiLevelRoutingAttention
from regard.tasks import create_task
from regard.tasks.base import EVAL
from regard.tasks.images import DrawnImages, LabelledImages
from regard.training import TrainConfig, seeded, train


def _attention(config: dict) -> BiLevelRoutingAttention:
    return BiLevelRoutingAttention(
        config["dim"],
        config["num_heads"],
        num_regions=config["n_win"],
        topk=config["topk"],
        kernel_size=config["side_dwconv"],
    )


def _model(config: dict) -> BiFormer:
    return BiFormer(
        dims=config["embed_dim"],
        depths=config["depth"],
        head_dim=config["head_dim"],
        num_regions=config["n_win"],
        topks=[None if topk == -2 else topk for topk in config["topks"]],
        mlp_ratio=config["mlp_ratios"][0],
        num_classes=config["num_classes"],
        in_chans=config["in_chans"],
    )


def routing_under_a_mask() -> Check:
    """Routed attention against dense attention under the mask "the key's region is among the query region's best"."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for (spatial, counts), topk in product(
        (((12,), (4,)), ((7,), (3,)), ((6, 9), (3, 3)), ((5, 8), (2, 3)), ((2, 3), (4, 4)), ((4, 5, 3), (2, 2, 3))),
        (1, 2, 99),
    ):
        options = {"num_regions": counts, "topk": topk, "kernel_size": 3, "axes": len(spatial)}
        mixer = seeded(lambda o=options: BiLevelRoutingAttention(8, 2, **o), 0).double()
        x = torch.randn(2, *spatial, 8, dtype=torch.float64, generator=generator)
        place = torch.cartesian_prod(*(torch.arange(length) for length in spatial)).view(-1, len(spatial))
        cells = place // torch.tensor([-(-length // count) for length, count in zip(spatial, counts, strict=True)])
        _, region = cells.unique(dim=0, return_inverse=True)
        q, k, v = mixer.qkv(x).flatten(1, -2).chunk(3, -1)
        members = torch.nn.functional.one_hot(region).double()
        mean_q, mean_k = (torch.einsum("nr,bnc->brc", members / members.sum(0), t) for t in (q, k))
        affinity = torch.einsum("brc,bsc->brs", mean_q, mean_k)
        least = affinity.sort(-1, descending=True).values[..., min(topk, affinity.shape[-1]) - 1, None]
        seen = (affinity >= least)[:, region][:, :, region]  # (B, N, N)
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (q, k, v))
        weights = (q @ k.mT / 8**0.5).masked_fill(~seen[:, None], -torch.inf).softmax(-1)
        mixed = (weights @ v).transpose(1, 2).flatten(2).view(x.shape)
        expected = mixer.proj(mixed + mixer.local(mixer.qkv(x).chunk(3, -1)[2]))
        worst = max(worst, (mixer(x) - expected).abs().max().item())
    return Check(
        "Bi-level routing is dense attention under the mask of the chosen regions; of all regions, dense attention",
        holds=worst < 1e-12,
        figures={"largest_error": worst},
        setting="float64, maps of 1 to 3 axes, sizes that the regions divide and do not, one, two and all regions",
    )


def recipe(preset: Preset) -> Recipe:
    """A two-stage BiFormer on handwritten digits; "paper" is BiFormer-T with the schedule of the paper."""
    if preset == "paper":
        task = create_task("digits", size=224, label_smoothing=0.1)
        model = seeded(lambda: BiFormer(drop_path_rate=0.1, num_classes=task.num_classes), 0)
        return Recipe(model, task, TrainConfig(steps=375_000, batch_size=1024, lr=1e-3, warmup=5 / 300))
    task = create_task("digits", size=32, channels=1)
    model = seeded(
        lambda: BiFormer(
            dims=(24, 48),
            depths=(2, 2),
            head_dim=12,
            global_heads=4,
            num_regions=4,
            topks=(4, None),
            mlp_ratio=2.0,
            num_classes=task.num_classes,
            in_chans=1,
        ),
        0,
    )
    return Recipe(model, task, TrainConfig(steps=2 if preset == "smoke" else 250, batch_size=32, lr=2e-3))


_KEYS = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
_VALUES = np.array([[1, 1, 1], [0, 1, 1], [1, 0, 1], [0.5, 0.5, 0.5]])


class DistantMatch(DrawnImages):
    """The corner shows a colour; far away, one of four marks begins with it. Which colour does that mark end with?

    Images of 8 x 8 patches of 2 x 2 pixels in 4 x 4 regions, faint noise. A mark is one patch: its left half is a
    key colour, its right half one of four value colours. The four key colours are in four regions drawn from the twelve
    outside of the corner's quarter, the mark anywhere in its region.
    """

    num_classes = 4
    regions, side, patch = 4, 2, 2

    def __init__(self, train_items: int = 4096, eval_items: int = 512, seed: int = 0) -> None:
        super().__init__(self.regions * self.side * self.patch, train_items, eval_items, seed)

    @property
    def description(self) -> str:
        return "Four marks far from the corner, each one patch with a key and a value: the value of the corner's key?"

    def draw(self, rng: np.random.Generator, count: int) -> LabelledImages:
        """Noise, four marks and a cue."""
        return self._composed(rng, count)[0]

    @property
    def targets(self) -> Tensor:
        """The region of the answer in each evaluation image."""
        rng = np.random.default_rng((self.seed, EVAL))
        return torch.from_numpy(self._composed(rng, self.items[EVAL])[1])

    def _composed(self, rng: np.random.Generator, count: int) -> tuple[LabelledImages, np.ndarray]:
        size, patch, half = self.sample_shape[1], self.patch, self.patch // 2
        images = rng.uniform(0, 0.25, (count, 3, size, size))
        far = [r for r in range(self.regions**2) if max(divmod(r, self.regions)) >= self.regions // 2]
        homes = rng.permuted(np.tile(far, (count, 1)), axis=1)[:, :4]
        asked, values = rng.integers(0, 4, count), rng.integers(0, 4, (count, 4))
        for i in range(count):
            for key in range(4):
                row, column = np.array(divmod(homes[i, key], self.regions)) * self.side + rng.integers(0, self.side, 2)
                top, left = patch * row, patch * column
                images[i, :, top : top + patch, left : left + half] = _KEYS[key][:, None, None]
                images[i, :, top : top + patch, left + half : left + patch] = _VALUES[values[i, key]][:, None, None]
            images[i, :, :patch, :half] = _KEYS[asked[i]][:, None, None]
            images[i, :, :patch, half:patch] = 0
        targets, labels = homes[np.arange(count), asked], values[np.arange(count), asked]
        images = (255 * images).round().astype(np.uint8)
        return LabelledImages(images, labels.astype(np.int64), mean=0.2, std=0.2), targets


class _Random(BiLevelRoutingAttention):
    """As many regions, drawn once for all images."""

    def __init__(self, dim: int, num_heads: int, **options: Any) -> None:
        super().__init__(dim, num_heads, **options)
        affinity = torch.rand(self.num_regions[0] ** 2, self.num_regions[1] ** 2)
        self.register_buffer("drawn", affinity.topk(self.topk).indices)

    def route(self, q: Tensor, k: Tensor) -> Tensor:
        return self.drawn.expand(q.shape[0], -1, -1)


class _Fixed(BiLevelRoutingAttention):
    """As many keys, in a window of 4 x 4 tokens or spread evenly over the map."""

    def __init__(self, dim: int, num_heads: int, *, partition: str, **options: Any) -> None:
        super().__init__(dim, num_heads, **options)
        self.partition = partition

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        local = self.local(v)
        q, k, v = (t.unflatten(-1, (self.num_heads, self.head_dim)) for t in (q, k, v))
        out = ops.window_attention(q, k, v, window_size=4, partition=self.partition, scale=self.dim**-0.5)
        return self.proj(out.flatten(-2) + local)


def _at_the_corner(mixer: type[BiLevelRoutingAttention], **options: Any) -> CornerReader:
    """Two blocks without any convolution, so that attention has to bring the answer."""
    options = {"num_regions": 4, "topk": 4, "kernel_size": 1, **options}
    return CornerReader(lambda at: mixer(at.dim, at.num_heads, **options), depth=2, dim=32, img_size=16)


@torch.no_grad()
def _recall(model: nn.Module, task: DistantMatch) -> float:
    """Share of evaluation images in which the corner's region attends to the target's region, in one of the blocks."""
    images = torch.stack([item["image"] for item in task.eval_set])
    targets = task.targets
    found = torch.zeros(len(targets), dtype=torch.bool)
    seen: list[Tensor] = []
    for block in model.stages[0]:
        route = block.mixer.route
        block.mixer.route = lambda q, k, route=route: seen.append(route(q, k)) or seen[-1]
    model.eval()(images)
    for chosen in seen:
        found |= (chosen[:, 0] == targets[:, None]).any(-1)
    return round(found.double().mean().item(), 4)


def finds_distant_evidence(preset: Preset) -> Check:
    """Two blocks, equal in everything but which 16 of 64 tokens a token attends to."""
    smoke = preset == "smoke"
    task = DistantMatch(64, 64) if smoke else DistantMatch()
    seeds = (0,) if smoke else (0, 1)
    arms = {
        "routing": partial(_at_the_corner, BiLevelRoutingAttention),
        "window": partial(_at_the_corner, _Fixed, partition="window"),
        "strided": partial(_at_the_corner, _Fixed, partition="grid"),
        "random_regions": partial(_at_the_corner, _Random),
    }
    figures: dict[str, float | list[float]] = {}
    means, recalls = {}, []
    for name, build in arms.items():
        runs = []
        for seed in seeds:
            model = seeded(build, seed)
            config = TrainConfig(steps=2 if smoke else 500, batch_size=32, lr=3e-3, seed=seed)
            runs.append(train(model, task, config, cpu=True).metrics)
            if name == "routing":
                recalls.append(_recall(model, task))
        figures[name] = headline(task, runs)
        means[name] = sum(figures[name]) / len(seeds)
        figures[f"{name}_mean"] = round(means[name], 4)
    figures["recall_of_the_target_region"] = recalls
    fixed = max(means["window"], means["strided"], means["random_regions"])
    return Check(
        "Routing by content finds evidence in a random far region, which windows and other fixed patterns miss",
        holds=means["routing"] > fixed + 0.1 and min(recalls) > 0.9,
        figures=figures,
        setting=f"{task.description} 16 of 64 keys, {config.steps} steps of 32, seeds {list(seeds)}, "
        "accuracy, chance 0.25; holds if routing is above every fixed pattern by 0.1 on average and, with every seed, one "
        "of the two blocks routes the corner to the target's region in more than 0.9 of the images (by chance 0.44)",
    )


def _near_the_papers_count(side: int, topk: int = 4) -> int:
    """The divisor of `side` nearest to (k/2 N^2)^(1/6), the number of regions that the paper derives."""
    best = (topk / 2 * side**4) ** (1 / 6)
    return min((count for count in range(1, side + 1) if side % count == 0), key=lambda count: abs(count - best))


def cost(preset: Preset) -> Check:
    """Multiply-adds and time over growing maps, regions as many as the paper derives, against dense attention."""
    sides = [14, 28] if preset == "smoke" else [28, 42, 56, 84]
    counts = [_near_the_papers_count(side) for side in sides]
    figures = cost_growth(
        {
            "routing": lambda side: BiLevelRoutingAttention(32, 1, num_regions=_near_the_papers_count(side)),
            "dense": lambda side: SoftmaxAttention(32, 1),
        },
        sides,
        dim=32,
    )
    return Check(
        "With the right number of regions the cost of routed attention grows as N^(4/3) at most, dense as N^2 (section 3.3)",
        holds=figures["routing_macs_growth"] < 1.4 and figures["dense_macs_growth"] > 1.5,
        figures={**figures, "regions_along_a_side": [float(count) for count in counts]},
        setting=f"exponent of tokens fitted over maps of {sides} squared, dim 32, topk 4; verdict on multiply-adds",
    )


PROOFS = Proofs(
    recordings=(
        Recorded("biformer.attention", build=_attention),
        Recorded("biformer.model", build=_model),
    ),
    checks=(routing_under_a_mask,),
    recipe=recipe,
    claims=(finds_distant_evidence, cost),
)
