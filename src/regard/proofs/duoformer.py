"""Proofs of DuoFormer: recordings of scale attention and transformer; who sees whom; what the two attentions save and bring."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from regard.checkpoint import KeyMap
from regard.flops import count_macs, count_params
from regard.layers import Block, ResNet, SoftmaxAttention, split_qkv
from regard.measure import interleaved_seconds, spread
from regard.proofs.base import Check, Preset, Proofs, Recipe
from regard.proofs.experiments import over_variants
from regard.proofs.recordings import Recorded
from regard.systems.backbones.duoformer import (
    ChannelToken,
    DuoFormer,
    ScalePatchAttention,
    ScalePatchFormer,
    patch_tokens,
)
from regard.tasks import create_task
from regard.tasks.images import DrawnImages, LabelledImages
from regard.training import TrainConfig, seeded, train


class _Former(nn.Module):
    """The released transformer: the former, its unused norm, and the classifier of the class token as it is."""

    authors_keys = KeyMap(
        rules=[
            (r"^(scaleBlocks|blocks|pos_embed|pos_embed_for_scale|cls_token)\b", r"vision_transformer.\1"),
            *DuoFormer.authors_keys.rules,
            (r"^fc_norm\.", "norm."),
        ],
        convert=split_qkv,
    )

    def __init__(self, dim: int, num_heads: int, num_classes: int, **options: Any) -> None:
        super().__init__()
        self.former = ScalePatchFormer(dim, num_heads, **options)
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        _, *layers = self.former.mix_patches(self.former.mix_scales(x), self.former.grid)
        return {**{f"blocks.{i}": z for i, z in enumerate(layers)}, "logits": self.head(layers[-1][:, 0])}


def _former(config: dict) -> _Former:
    return _Former(
        config["embed_dim"],
        config["num_heads"],
        config["num_classes"],
        tokens={2: 21, 3: 22, 4: 86}[config["scales"]],
        depths=(config["depth"], config["depth"]),
        mlp_ratio=config.get("mlp_ratio", 4.0),
    )


def parts_as_counted() -> Check:
    """Parameters of every part that was counted from the authors' classes (4 classes, 768 channels, depth 12)."""
    r50, r18 = (256, 512, 1024, 2048), (64, 128, 256, 512)
    config = {"embed_dim": 768, "num_heads": 12, "num_classes": 4, "depth": 12}
    with torch.device("meta"):
        projections = {dims: [count_params(nn.Linear(dim, 768)) for dim in dims] for dims in (r50, r18)}
        counts = {
            **{f"former_{scales}_scales": count_params(_former({**config, "scales": scales})) for scales in (2, 3, 4)},
            "scale_block": count_params(Block(768, SoftmaxAttention(768, 12))),
            "patch_layer": count_params(SoftmaxAttention(768, 12)),
            "channel_token_r50": count_params(ChannelToken(r50, 768)),
            "trunk_r50": count_params(ResNet()),
            "trunk_r18": count_params(ResNet(depths=(2, 2, 2, 2), bottleneck=False)),
            **{f"projections_r50_{scales}_scales": sum(projections[r50][-scales:]) for scales in (2, 3, 4)},
            "projections_r18_maps_1_2": sum(projections[r18][1:3]),
            "projections_r18_maps_0_1_2": sum(projections[r18][:3]),
            "projections_r18_4_scales": sum(projections[r18]),
        }
    published = {
        "former_2_scales": 113_462_788,
        "former_3_scales": 113_463_556,
        "former_4_scales": 113_512_708,
        "scale_block": 7_087_872,
        "patch_layer": 2_362_368,
        "channel_token_r50": 46_016_512,
        "trunk_r50": 23_508_032,
        "trunk_r18": 11_176_512,
        "projections_r50_2_scales": 2_360_832,
        "projections_r50_3_scales": 2_754_816,
        "projections_r50_4_scales": 2_952_192,
        "projections_r18_maps_1_2": 296_448,
        "projections_r18_maps_0_1_2": 346_368,
        "projections_r18_4_scales": 740_352,
    }
    return Check(
        "every part has as many parameters as the authors' class",
        holds=counts == published,
        figures=counts,
        setting="released defaults; two scales with the 21 positions of the code. Left out: the channel token of ResNet-18, "
        "which takes 384 channels where its maps have 960, so that it cannot run as released",
    )


def tokens_by_index() -> Check:
    """The tokens of each patch against positions looked up one by one, and what each attention lets a patch see."""
    height, width, dim = 3, 2, 2
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(1, height * 2**level, width * 2**level, dim, generator=generator) for level in range(4)]
    expected, seen = [], []
    for row in range(height):
        for column in range(width):
            places = [(0, row, column)]
            # The cell of the second map is listed by columns, those of the finer ones by rows, as in the authors' tables.
            places += [(1, 2 * row + r, 2 * column + c) for c in range(2) for r in range(2)]
            for level in (2, 3):
                side = 2**level
                places += [(level, side * row + r, side * column + c) for r in range(side) for c in range(side)]
            seen += places
            expected.append(torch.stack([maps[level][0, r, c] for level, r, c in places]))
    tokens = patch_tokens(maps)[0]
    former = seeded(lambda: ScalePatchFormer(8, 2, tokens=6, grid=(2, 2), depths=(2, 2)), 0).double()
    for parameter in former.parameters():
        nn.init.normal_(parameter, std=0.4, generator=generator)
    x = torch.randn(1, 4, 6, 8, dtype=torch.float64, generator=generator)

    def patches_seen(last: Any) -> list[list[bool]]:
        jacobian = torch.autograd.functional.jacobian(lambda x: last(x).sum(-1), x)[:, :, 0]  # (outputs, P, S, dim)
        return (jacobian.abs().amax((-2, -1)) > 0)[0].tolist()

    own = patches_seen(former.mix_scales)
    all_ = patches_seen(lambda x: former(x, (2, 2))[:, 1:])
    figures = {
        "largest_difference": (tokens - torch.stack(expected)).abs().max().item(),
        "positions": len(seen),
        "distinct_positions": len(set(seen)),
        "patches_seen_by_scale_attention": max(map(sum, own)),
        "patches_seen_after_patch_attention": min(map(sum, all_)),
    }
    return Check(
        "Every position of every map is a token of exactly the patch it lies in; only patch attention connects patches",
        holds=figures["largest_difference"] == 0
        and len(seen) == len(set(seen)) == sum(x.shape[1] * x.shape[2] for x in maps)
        and own == np.eye(4, dtype=bool).tolist()
        and figures["patches_seen_after_patch_attention"] == 4,
        figures=figures,
        setting="four maps of 3 x 2 to 24 x 16 positions; Jacobians of a transformer of 2 + 2 layers on 4 patches, float64",
    )


def mixer_cell_by_cell() -> Check:
    """The mixer against a loop over cells whose sets of tokens are put together one by one."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for spatial, levels in (((8,), 2), ((4, 8), 2), ((4, 2), 1), ((2, 4, 2), 1)):
        mixer = ScalePatchAttention(8, 2, levels=levels, axes=len(spatial)).double()
        for parameter in mixer.parameters():
            nn.init.normal_(parameter, std=0.4, generator=generator)
        x = torch.randn(2, *spatial, 8, dtype=torch.float64, generator=generator)
        cells = list(np.ndindex(*(length // 2**levels for length in spatial)))
        heard = []
        for cell in cells:
            tokens = [mixer.scale_token[0, 0].expand(2, -1, -1)]
            for level in range(levels + 1):
                step = 2 ** (levels - level)
                for part in np.ndindex(*(2**level,) * len(spatial)):
                    first = [c * 2**levels + p * step for c, p in zip(cell, part, strict=True)]
                    box = x[(slice(None), *(slice(start, start + step) for start in first))]
                    tokens.append(box.flatten(1, -2).mean(1, keepdim=True))
            heard.append(mixer.scales(torch.cat(tokens, 1) + mixer.position[0]))
        across = mixer.patches(torch.stack([tokens[:, 0] for tokens in heard], 1))
        ours = mixer(x)
        for index, (cell, tokens) in enumerate(zip(cells, heard, strict=True)):
            box = ours[(slice(None), *(slice(c * 2**levels, (c + 1) * 2**levels) for c in cell))].flatten(1, -2)
            expected = tokens[:, -box.shape[1] :] + across[:, index : index + 1]
            worst = max(worst, (box - expected).abs().max().item())
    return Check(
        "The mixer is attention in the token set of each cell, then among the scale tokens",
        holds=worst < 1e-12,
        figures={"largest_error": worst},
        setting="grids of 1 to 3 axes, one and two levels, random parameters, float64, limit 1e-12",
    )


_TRUNK: dict[str, Any] = {"width": 8, "trunk_depths": (1, 1, 1, 1), "bottleneck": False, "img_size": 64}


def _tiny(**options: Any) -> DuoFormer:
    """A small trunk, three scales, 2 + 2 layers of 32 channels."""
    model = DuoFormer(
        **{**_TRUNK, "scales": 3, "dim": 32, "depths": (2, 2), "num_heads": 2, "mlp_ratio": 2.0, **options}
    )
    # The deviation of 0.02 suits hundreds of channels; with 32, patch layers without residuals would start at nothing.
    model.former.apply(lambda module: module.reset_parameters() if isinstance(module, nn.Linear) else None)
    return model


def recipe(preset: Preset) -> Recipe:
    """A small DuoFormer, its trunk not frozen, on handwritten digits; "paper" is the 4-scale model on scenes, 50 epochs."""
    if preset == "paper":
        task = create_task("scenes", size=224)
        model = seeded(lambda: DuoFormer(num_classes=task.num_classes), 0)
        config = TrainConfig(steps=12_800, batch_size=32, lr=5e-5, weight_decay=1e-4, warmup=0.3, optimizer="adam")
        return Recipe(model, task, config, note="the paper's rate and schedule; its pre-trained trunk is not included")
    task = create_task("digits", size=64, channels=1)
    model = seeded(lambda: _tiny(num_classes=task.num_classes, in_chans=1), 0)
    return Recipe(model, task, TrainConfig(steps=2 if preset == "smoke" else 200, batch_size=32, lr=2e-3))


class _Within(nn.Module):
    """Attention inside each patch of `(B, P, S, dim)`."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x.flatten(0, 1)).view(x.shape)


def cheaper_than_joint(preset: Preset) -> Check:
    """Products and time of one layer of scale attention on 49 patches, against attention over all their tokens."""
    attention = seeded(lambda: SoftmaxAttention(64, 1), 0).eval()
    within = _Within(attention)
    figures: dict[str, float] = {}
    for tokens in (6, 22) if preset == "smoke" else (6, 22, 86):
        x = torch.randn(1, 49, tokens, 64, generator=torch.Generator().manual_seed(0))
        projections = 4 * 49 * tokens * 64**2
        pairs = {name: count_macs(module, x) - projections for name, module in (("in", within), ("all", attention))}
        with torch.no_grad():
            times = interleaved_seconds({"in": partial(within, x), "all": partial(attention, x)}, rounds=7, least=0.02)
        ratio = spread(times["all"])["low"] / spread(times["in"])["low"]
        figures |= {
            f"products_over_{tokens}_tokens": pairs["all"] / pairs["in"],
            f"time_over_{tokens}_tokens": round(ratio, 2),
        }
    return Check(
        "Scale attention costs one 49th of the products of attention over the tokens of all patches, and saves time",
        holds=all(value == 49 for name, value in figures.items() if name.startswith("products"))
        and list(figures.values())[-1] > 3,
        figures=figures,
        setting="49 patches of 6, 22, 86 tokens (2, 3, 4 scales), 64 channels, one layer with its projections timed; joint "
        "over scale attention. Holds if products are 49 to 1 and the time of the largest is above 3 to 1",
    )


class StripedQuarter(DrawnImages):
    """Fine stripes of one of four directions in one quarter of a noisy image: which direction, in which quarter?"""

    num_classes = 16

    def __init__(self, train_items: int = 512, eval_items: int = 512, seed: int = 0) -> None:
        super().__init__(64, train_items, eval_items, seed)

    @property
    def description(self) -> str:
        return (
            f"{self.items[0]} images of 64 pixels, stripes of 4 directions, 2 pixels wide, in one quarter of noise: which "
            "direction, in which quarter?"
        )

    def draw(self, rng: np.random.Generator, count: int) -> LabelledImages:
        """Stripes with random phase over noise of equal strength."""
        direction, quarter = rng.integers(0, 4, (2, count))
        rows, columns = np.mgrid[:32, :32]
        along = np.stack([rows, columns, rows + columns, rows - columns])[direction]
        stripes = np.where((along + rng.integers(0, 4, (count, 1, 1))) // 2 % 2, 0.15, -0.15)
        grey = 0.5 + rng.normal(0, 0.15, (count, 64, 64))
        for image, texture, where in zip(grey, stripes, quarter, strict=True):
            row, column = 32 * (where // 2), 32 * (where % 2)
            image[row : row + 32, column : column + 32] += texture
        images = np.repeat((255 * grey.clip(0, 1)).astype(np.uint8)[:, None], 3, 1)
        return LabelledImages(images, (4 * direction + quarter).astype(np.int64), mean=0.5, std=0.17)


class _Pooled(nn.Module):
    """What the trunk is pre-trained as: a classifier of the mean of its coarsest map."""

    def __init__(self, trunk: ResNet, num_classes: int) -> None:
        super().__init__()
        self.trunk, self.head = trunk, nn.Linear(trunk.dims[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x.movedim(1, -1))[-1].mean((1, 2)))


class _Frozen(nn.Module):
    """A trunk that is never trained, statistics included."""

    def __init__(self, trunk: ResNet) -> None:
        super().__init__()
        self.trunk = trunk.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> _Frozen:
        return super().train(False)

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.trunk(x)


class JointFormer(nn.Module):
    """In place of a `ScalePatchFormer`: a ViT over a class token and the tokens of all patches at once."""

    def __init__(self, dim: int, tokens: int, hidden: int, depth: int = 2) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(nn.init.normal_(torch.empty(1, 1, dim), std=0.036))
        self.position = nn.Parameter(nn.init.normal_(torch.empty(1, 1 + tokens, dim), std=0.036))
        ratio = (hidden + 0.5) / dim
        self.blocks = nn.Sequential(*(Block(dim, SoftmaxAttention(dim, 2), mlp_ratio=ratio) for _ in range(depth)))

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """`(B, P, S, dim)`, whose scale tokens are left out, -> `(B, 1 + P (S - 1), dim)`."""
        tokens = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x[:, :, 1:].flatten(1, 2)], 1)
        return self.blocks(tokens + self.position)


def _arm(name: str, hidden: int, trunk: ResNet) -> DuoFormer:
    scales = 1 if name == "coarsest_only" else 3
    model = _tiny(scales=scales, num_classes=16, scale_token="learned")
    if name != "scale_and_patch":
        model.former = JointFormer(32, 4 * sum(4**scale for scale in range(scales)), hidden)
    model.trunk = _Frozen(copy.deepcopy(trunk))
    return model


def _of_equal_size(name: str, like: int, trunk: ResNet) -> partial[DuoFormer]:
    """The arm with MLPs as wide as makes up for the parameters that it lacks."""
    missing = like - count_params(_arm(name, 64, trunk))
    return partial(_arm, name, 64 + round(missing / (2 * (2 * 32 + 1))), trunk)


def both_attentions_help(preset: Preset) -> Check:
    """Scale and patch attention, one attention over all tokens, and one over the coarsest map, on one frozen trunk."""
    smoke = preset == "smoke"
    task = StripedQuarter(64, 64) if smoke else StripedQuarter()
    before = create_task("scenes", kind="local", size=64, **({"train_items": 64, "eval_items": 64} if smoke else {}))
    pooled = seeded(lambda: _Pooled(ResNet(width=8, depths=(1, 1, 1, 1), bottleneck=False), before.num_classes), 0)
    learned = train(pooled, before, TrainConfig(steps=2 if smoke else 200, batch_size=32, lr=4e-3), cpu=True).metrics
    config = TrainConfig(steps=2 if smoke else 250, batch_size=32, lr=2e-3)
    seeds: Sequence[int] = (0,) if smoke else (0, 1, 2)
    whole = partial(_arm, "scale_and_patch", 64, pooled.trunk)
    size = count_params(whole())
    builds = {
        "scale_and_patch": whole,
        "joint": _of_equal_size("joint", size, pooled.trunk),
        "coarsest_only": _of_equal_size("coarsest_only", size, pooled.trunk),
    }
    figures, means = over_variants(builds, task, config, seeds)
    figures |= {f"{name}_parameters": count_params(build()) for name, build in builds.items()}
    figures["trunk_accuracy_before"] = round(learned["accuracy"], 4)
    return Check(
        "Scale and patch attention learn more from few images than attention over all tokens or over the coarsest alone",
        holds=all(means["scale_and_patch"] > means[name] for name in ("joint", "coarsest_only")),
        figures=figures,
        setting=f"{task.description} Frozen ResNet of width 8, pre-trained on digit scenes; three scales on 2 x 2 patches, "
        f"32 channels, 2 + 2 layers (learned scale token) against 2 ViT blocks with wider MLPs; {config.steps} steps of "
        f"{config.batch_size}, seeds {list(seeds)}, accuracy on 512 others, chance 1/16. Holds if its mean is the largest",
    )


PROOFS = Proofs(
    recordings=(
        Recorded(
            "duoformer.scale_attention",
            build=lambda config: SoftmaxAttention(config["dim"], config["num_heads"], qkv_bias=config["qkv_bias"]),
            run=lambda attention, inputs: _Within(attention)(inputs["x"]),
            keys=KeyMap(convert=split_qkv),
        ),
        Recorded("duoformer.former", build=_former),
    ),
    checks=(parts_as_counted, tokens_by_index, mixer_cell_by_cell),
    recipe=recipe,
    claims=(cheaper_than_joint, both_attentions_help),
)
