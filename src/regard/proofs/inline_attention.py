"""Proofs of InLine attention: recordings of mechanism and model; different queries keep different weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from regard.layers import LinearAttention, SoftmaxAttention
from regard.proofs.base import Check, Preset, Proofs, Recipe
from regard.proofs.experiments import TINY_DEIT, cost_growth, over_variants, tiny_deit_config
from regard.proofs.recordings import Recorded
from regard.skeletons import DeiT
from regard.systems.backbones.inline_attention import (
    InLineAttention,
    InLineDeiT,
    InLinePVT,
    injective_linear_attention,
)
from regard.tasks import create_task
from regard.training import TrainConfig, seeded


def _run_deit(module: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    x = inputs["x"]
    grid, first = module(x[:, 1:].unflatten(1, (6, 6)), x[:, :1])
    return torch.cat([first, grid.flatten(1, 2)], 1)


def _pvt(config: dict) -> InLinePVT:
    return InLinePVT(
        dims=config["embed_dims"],
        depths=config["depths"],
        num_heads=config["num_heads"],
        inline_blocks=[d if kind == "I" else 0 for d, kind in zip(config["depths"], config["attn_type"], strict=True)],
        reductions=config["sr_ratios"],
        mlp_ratios=config["mlp_ratios"],
        patch_size=config["patch_size"],
        img_size=config["img_size"],
        num_classes=config["num_classes"],
    )


def equals_the_matrix() -> Check:
    """Outputs and gradients of the mixer against the N x N weights of the definition and a loop over the kernel's places."""
    generator = torch.Generator().manual_seed(0)
    mixer = seeded(lambda: InLineAttention(12, 3, feature="leaky_relu"), 0).double()
    x = torch.randn(2, 4, 5, 12, dtype=torch.float64, generator=generator, requires_grad=True)

    def slow(x: Tensor) -> Tensor:
        q, k, v = mixer.qkv(x).flatten(1, 2).chunk(3, -1)
        q, k, heads = (t.unflatten(-1, (3, 4)) for t in (nn.functional.leaky_relu(q), nn.functional.leaky_relu(k), v))
        logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * 4**-0.5
        weights = (logits - logits.mean(-1, keepdim=True)) / 20 + 1 / 20
        out = torch.einsum("bhqk,bkhd->bqhd", weights, heads).flatten(2).unflatten(1, (4, 5))
        kernels = mixer.core.residual.kernels(x.mean((1, 2))[..., None]).view(2, 12, 3, 3)
        image = nn.functional.pad(v.unflatten(1, (4, 5)), (0, 0, 1, 1, 1, 1))
        for row in range(3):
            for column in range(3):
                out = out + kernels[:, None, None, :, row, column] * image[:, row : row + 4, column : column + 5]
        return mixer.proj(out)

    fast, expected = mixer(x), slow(x)
    weight = torch.randn(fast.shape, dtype=torch.float64, generator=generator)
    (ours,) = torch.autograd.grad((fast * weight).sum(), x)
    (theirs,) = torch.autograd.grad((expected * weight).sum(), x)
    errors = {
        "output_error": (fast - expected).abs().max().item(),
        "gradient_error": (ours - theirs).abs().max().item(),
    }
    return Check(
        "the mixer equals the N x N weights of the definition with the local residual written as a loop",
        holds=max(errors.values()) < 1e-10,
        figures=errors,
        setting="grid 4 x 5, 3 heads, leaky ReLU features, batch 2, float64, limit 1e-10",
    )


def recipe(preset: Preset) -> Recipe:
    """A small InLine-DeiT on handwritten digits; "paper" is its tiny model on scenes of 224 pixels, 300 epochs."""
    if preset == "paper":
        task = create_task("scenes", size=224)
        model = seeded(lambda: InLineDeiT(num_classes=task.num_classes), 0)
        return Recipe(model, task, TrainConfig(steps=2_400, batch_size=1024, lr=1e-3, warmup=20 / 300))
    task = create_task("digits", size=24, channels=1)
    return Recipe(seeded(lambda: InLineDeiT(num_classes=10, **TINY_DEIT), 0), task, tiny_deit_config(preset))


def injective(preset: Preset) -> Check:
    """The weights of q and of c q, under both normalisations: values are unit vectors, so outputs are the weights."""
    tokens, dim = 32, 8
    generator = torch.Generator().manual_seed(0)
    draws = 4 if preset == "smoke" else 64
    same, apart, confused, kept_apart, sums, ranks = 0.0, float("inf"), 0, 0, 0.0, dim
    for _ in range(draws):
        q, k = (torch.randn(1, n, 1, dim, dtype=torch.float64, generator=generator).relu() for n in (1, tokens))
        k = k + 0.1
        ranks = min(ranks, int(torch.linalg.matrix_rank((k - k.mean(1, keepdim=True))[0, :, 0])))
        q = q + 0.1
        collinear = torch.cat([q, 2 * q], 1)
        unit = torch.eye(tokens, dtype=torch.float64)[None, :, None]
        divided = torch.einsum("bqhd,bkhd->bqhk", collinear, k)
        divided = divided / divided.sum(-1, keepdim=True)
        subtracted = _wide(collinear, k, unit)
        same = max(same, _distance(divided))
        apart = min(apart, _distance(subtracted))
        sums = max(sums, (subtracted.sum(-1) - 1).abs().max().item())
        confused += _distance(divided) < 1e-9
        kept_apart += _distance(subtracted) > 1e-6
    return Check(
        "Division gives collinear queries the same weights, subtraction keeps them apart; both sum to 1",
        holds=same < 1e-12 and apart > 1e-6 and sums < 1e-12,
        figures={
            "largest_difference_divided": same,
            "smallest_difference_subtracted": apart,
            "largest_row_sum_error": sums,
            "pairs": draws,
            "pairs_confused_divided": confused,
            "pairs_confused_subtracted": draws - kept_apart,
            "smallest_rank_of_centred_keys": ranks,
        },
        setting=f"q against 2 q, {tokens} random keys of width {dim}, features above 0, float64; holds: division differs by "
        "less than 1e-12, subtraction by more than 1e-6 in every pair, rows sum to 1 within 1e-12",
    )


def _wide(q: Tensor, k: Tensor, unit: Tensor) -> Tensor:
    """Weights of injective linear attention: as many value channels as tokens, a head_dim of them at a time."""
    width = q.shape[-1]
    return torch.cat([injective_linear_attention(q, k, part) for part in unit.split(width, -1)], -1)


def _distance(pair: Tensor) -> float:
    return (pair[:, 0] - pair[:, 1]).abs().max().item()


def linear_time(preset: Preset) -> Check:
    """Time of the mixer over growing maps, against dense attention of the same width; both in the same run."""
    sides = [14, 20] if preset == "smoke" else [28, 40, 56, 80]
    figures = cost_growth(
        {"inline": lambda side: InLineAttention(64, 2), "softmax": lambda side: SoftmaxAttention(64, 2)}, sides, dim=64
    )
    return Check(
        "The cost of InLine attention grows linearly with the number of tokens, that of softmax attention quadratically",
        holds=abs(figures["inline_macs_growth"] - 1) < 0.05
        and figures["inline_time_growth"] < 1.3
        and figures["softmax_time_growth"] > figures["inline_time_growth"] + 0.4,
        figures=figures,
        setting=f"maps of {sides} squared, dim 64, two heads; holds: the exponent of multiply-adds is 1.00 within 0.05, "
        "that of time below 1.3 and at least 0.4 below that of softmax attention",
    )


def ablation(preset: Preset) -> Check:
    """The same small DeiT with plain linear attention, the two additions one after the other, and softmax attention."""
    task = create_task("digits", size=24, channels=1)
    config = tiny_deit_config(preset)
    seeds = (0,) if preset == "smoke" else (0, 1, 2)
    inline: dict[str, Any] = {"feature": "relu", "class_token": True}
    mixers = {
        "linear": lambda at: LinearAttention(at.dim, at.num_heads, feature="relu"),
        "injective": lambda at: InLineAttention(at.dim, at.num_heads, residual=False, **inline),
        "injective_and_local": lambda at: InLineAttention(at.dim, at.num_heads, **inline),
        "softmax": lambda at: SoftmaxAttention(at.dim, at.num_heads),
    }
    builds = {
        name: lambda mixer=mixer: DeiT(mixer=mixer, num_classes=10, **TINY_DEIT) for name, mixer in mixers.items()
    }
    figures, mean = over_variants(builds, task, config, seeds)
    return Check(
        "Injectivity improves linear attention, the local residual improves it again, up to softmax attention",
        holds=mean["linear"] < mean["injective"] < mean["injective_and_local"]
        and mean["injective_and_local"] >= mean["softmax"] - 0.01,
        figures=figures,
        setting=f"DeiT of 2 blocks, dim 48, 36 tokens, ReLU features, handwritten digits, {config.steps} steps, seeds "
        f"{list(seeds)}, accuracy; holds: means rise in this order, the last is >= softmax - 0.01",
    )


PROOFS = Proofs(
    recordings=(
        Recorded(
            "inline_attention.mech_deit",
            build=lambda config: InLineAttention(config["dim"], config["num_heads"], class_token=True),
            run=_run_deit,
        ),
        Recorded(
            "inline_attention.mech_swin_relu",
            build=lambda config: InLineAttention(config["dim"], config["num_heads"], feature=config["kernel_func"]),
            run=lambda module, inputs: module(inputs["x"].unflatten(1, (7, 7))).flatten(1, 2),
        ),
        Recorded("inline_attention.model_pvt", build=_pvt),
    ),
    checks=(equals_the_matrix,),
    recipe=recipe,
    claims=(injective, linear_time, ablation),
)
