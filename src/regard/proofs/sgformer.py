"""Proofs of SG-Former: recordings of a pair of attentions and the model; saliency decides what stays fine."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean

import numpy as np
import torch
from torch import Tensor, nn

from regard.layers import SoftmaxAttention
from regard.proofs.base import Check, Preset, Proofs, Recipe
from regard.proofs.experiments import cost_growth
from regard.proofs.recordings import Recorded
from regard.systems.backbones.sgformer import HybridScaleAttention, SelfGuidedAttention, SGFormer
from regard.tasks import create_task
from regard.tasks.images import Scenes
from regard.training import TrainConfig, seeded, train


class _Pair(nn.Module):
    """A hybrid and a guided attention that read the same map."""

    authors_keys = SGFormer.authors_keys

    def __init__(self, hybrid: HybridScaleAttention, guided: SelfGuidedAttention) -> None:
        super().__init__()
        self.hybrid, self.guided = hybrid, guided


def _pair(config: dict) -> _Pair:
    dim, heads = config["dim"], config["num_heads"]
    return _Pair(
        HybridScaleAttention(dim, heads, reduction=config["sr_ratio"]),
        SelfGuidedAttention(dim, heads, runs=(49, 14, 7)),
    )


def _run_pair(pair: _Pair, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    x = inputs["x"].unflatten(1, (28, 28))
    hybrid, saliency = pair.hybrid.with_saliency(x)
    return {
        "hybrid": hybrid.flatten(1, 2),
        "mask_row_major": saliency.flatten(1),
        "mask_column_major": saliency.mT.flatten(1),
        "guided": pair.guided(x, saliency).flatten(1, 2),
    }


def _model(config: dict) -> SGFormer:
    # The code ties the run lengths to the ratio of the stage.
    runs = {8: (196, 56, 28), 4: (49, 14, 7), 2: (2, 1), 1: (1,)}
    return SGFormer(
        dims=config["embed_dims"],
        depths=config["depths"],
        num_heads=config["num_heads"],
        reductions=config["sr_ratios"],
        runs=[runs[ratio] for ratio in config["sr_ratios"]],
        mlp_ratios=config["mlp_ratios"],
        img_size=config["img_size"],
        num_classes=config["num_classes"],
    )


def attentions_token_by_token() -> Check:
    """Both attentions and the saliency against loops over tokens, on maps that nothing divides."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for spatial, window in (((9,), 4), ((5, 7), 3), ((4, 3, 5), 2)):
        axes, count = len(spatial), int(np.prod(spatial))
        hybrid = seeded(
            lambda a=axes, w=window: HybridScaleAttention(8, 2, reduction=2, window_size=w, axes=a), 0
        ).double()
        guided = seeded(lambda a=axes: SelfGuidedAttention(8, 2, runs=(5, 3, 2), axes=a), 1).double()
        x = torch.randn(2, *spatial, 8, dtype=torch.float64, generator=generator)
        place = torch.cartesian_prod(*(torch.arange(length) for length in spatial)).view(-1, axes)
        tokens = x.flatten(1, -2)

        padded = torch.zeros(2, *(length + length % 2 for length in spatial), 8, dtype=torch.float64)
        padded[(slice(None), *(slice(0, length) for length in spatial))] = x
        coarse = hybrid.reduce(padded)
        shape = torch.tensor(coarse.shape[1:-1])
        cell = (place // 2 * torch.tensor([int(shape[axis + 1 :].prod()) for axis in range(axes)])).sum(1)
        k1, v1 = hybrid.kv1(coarse.flatten(1, -2)).chunk(2, -1)
        far = (hybrid.q1(tokens) @ k1.mT / 2).softmax(-1)
        k2, v2 = hybrid.kv2(tokens).chunk(2, -1)
        together = (place[:, None] // window == place // window).all(-1)
        near = (hybrid.q2(tokens) @ k2.mT / 2).masked_fill(~together, -torch.inf).softmax(-1)
        local = hybrid.local(x).flatten(1, -2)
        expected = hybrid.proj(torch.cat([far @ v1, near @ v2], -1) + local).view(x.shape)
        expected_saliency = far.mean(1)[:, cell] + near.sum(1) / together.sum(0)
        out, saliency = hybrid.with_saliency(x)
        worst = max(worst, (out - expected).abs().max().item())
        worst = max(worst, (saliency.flatten(1) - expected_saliency).abs().max().item())

        few = []
        for sample, values in zip(tokens, expected_saliency.tolist(), strict=True):
            order = sorted(range(count), key=values.__getitem__)
            low, high = count // 4, count // 4 * 3
            merged = []
            for part, run, merge in zip(
                (order[:low], order[low:high], order[high:]), (5, 3, 2), guided.merges, strict=True
            ):
                for start in range(0, len(part), run):
                    weighed = [w * sample[i] for w, i in zip(merge.weight[0], part[start : start + run], strict=False)]
                    merged.append(sum(weighed) + merge.bias)
            few.append(torch.stack(merged))
        few = torch.stack(few)
        heads = []
        for q, kv in zip(guided.q(tokens).chunk(2, -1), (guided.kv1, guided.kv2), strict=True):
            k, v = kv(few).chunk(2, -1)
            heads.append((q @ k.mT / 2).softmax(-1) @ v)
        expected = guided.proj(torch.cat(heads, -1) + guided.local(x).flatten(1, -2)).view(x.shape)
        worst = max(worst, (guided(x, saliency) - expected).abs().max().item())
    return Check(
        "Hybrid-scale attention, its saliency and self-guided attention equal loops over tokens",
        holds=worst < 1e-12,
        figures={"largest_error": worst},
        setting="float64, maps of 1 to 3 axes; reduction, windows and runs divide none of them",
    )


def _tiny(task: Scenes, runs: tuple[int, ...]) -> SGFormer:
    return SGFormer(
        dims=(32, 48),
        depths=(2, 1),
        num_heads=(2, 4),
        reductions=(2, 1),
        runs=(runs, (1,)),
        mlp_ratios=(2, 2),
        window_size=4,
        img_size=task.sample_shape[1],
        num_classes=task.num_classes,
        in_chans=task.sample_shape[0],
    )


_RUNS = (16, 4, 2)
"""For 64 tokens: 1 + 8 + 8 = 17 merged ones."""


def recipe(preset: Preset) -> Recipe:
    """A pair of blocks and a dense one on digit scenes; "paper" is SG-Former-S with the schedule of the paper."""
    if preset == "paper":
        task = create_task("scenes", kind="local", size=224, label_smoothing=0.1)
        model = seeded(lambda: SGFormer(drop_path_rate=0.1, num_classes=task.num_classes), 0)
        return Recipe(model, task, TrainConfig(steps=375_000, batch_size=1024, lr=1e-3, warmup=20 / 300))
    task = create_task("scenes", kind="local")
    steps = 2 if preset == "smoke" else 300
    return Recipe(seeded(lambda: _tiny(task, _RUNS), 0), task, TrainConfig(steps=steps, batch_size=32, lr=2e-3))


def linear_cost(preset: Preset) -> Check:
    """Multiply-adds and time of self-guided attention with 60 merged tokens over growing maps, against dense attention."""
    sides = [14, 28] if preset == "smoke" else [28, 42, 56, 84]

    def guided(side: int) -> SelfGuidedAttention:
        shares = [max(round(side**2 / part), 1) for part in (16, 56, 112)]
        return SelfGuidedAttention(32, 2, runs=shares)

    figures = cost_growth({"guided": guided, "dense": lambda side: SoftmaxAttention(32, 2)}, sides, dim=32)
    return Check(
        "With a fixed number of merged tokens self-guided attention costs linear time, dense attention quadratic",
        holds=abs(figures["guided_macs_growth"] - 1) < 0.05 and figures["dense_macs_growth"] > 1.5,
        figures=figures,
        setting=f"exponent of tokens fitted over maps of {sides} squared, 4 + 28 + 28 merged tokens as in the paper's "
        "first stage, dim 32, saliency by the mixer itself; verdict on multiply-adds",
    )


def _share_on_the_digit(model: SGFormer, task: Scenes, count: int) -> float:
    """How much more of the most salient quarter of tokens lies on the digit than its area would have (1 is chance)."""
    stage, ratios = model.stages[0][0], []
    side = task.sample_shape[1]
    # Where `scenes.local` puts the whole digit, in pixels.
    corner = side // 8 * (task.eval_set.table[:count, 42:44] * 5).astype(int)
    model.eval()
    with torch.no_grad():
        for index in range(count):
            tokens = model.stem(task.eval_set[index]["image"][None].movedim(1, -1))
            _, saliency = stage.blocks[0].mixer.with_saliency(stage.blocks[0].norm1(tokens))
            top = saliency[0].flatten().argsort(descending=True)[: saliency.numel() // 4]
            rows, columns = 4 * (top // saliency.shape[2]) + 2, 4 * (top % saliency.shape[2]) + 2  # middles of tokens
            (up, left), length = corner[index], side * 7 // 16
            inside = (rows >= up) & (rows < up + length) & (columns >= left) & (columns < left + length)
            ratios.append(inside.double().mean().item() / (length / side) ** 2)
    return fmean(ratios)


def saliency_reallocates_tokens(preset: Preset) -> Check:
    """The same model with keys merged by saliency, and merged evenly in reading order to as many tokens."""
    smoke = preset == "smoke"
    sizes = {"train_items": 64, "eval_items": 64} if smoke else {}
    task = create_task("scenes", kind="local", **sizes)
    config = TrainConfig(steps=2 if smoke else 200, batch_size=32, lr=2e-3)
    seeds, figures = (0,) if smoke else (0, 1, 2), {}
    before, after = [], []
    for name, runs in (("guided", _RUNS), ("evenly_merged", (4,))):
        figures[name] = []
        for seed in seeds:
            model = seeded(lambda r=runs: _tiny(task, r), seed)
            if name == "guided":
                before.append(round(_share_on_the_digit(model, task, 16 if smoke else 200), 3))
            else:
                # Reading order: every token is as salient as any other, and the order of equals is kept.
                mixer = model.stages[0][0].blocks[1].mixer
                mixer.register_forward_pre_hook(lambda module, args: (args[0], torch.zeros_like(args[1])))
            metrics = train(model, task, replace(config, seed=seed), cpu=True).metrics
            figures[name].append(round(metrics[task.metric], 4))
            if name == "guided":
                after.append(round(_share_on_the_digit(model, task, 16 if smoke else 200), 3))
        figures[f"{name}_mean"] = round(fmean(figures[name]), 4)
    figures |= {"salient_tokens_on_the_digit_before": before, "salient_tokens_on_the_digit_after": after}
    return Check(
        "Saliency turns to what matters in training, and merging by it beats merging evenly to as many tokens",
        holds=figures["guided_mean"] > figures["evenly_merged_mean"] and fmean(after) > max(fmean(before), 1.0),
        figures=figures,
        setting=f"{task.description} 64 tokens in the first stage, merged to 17 by saliency or to 16 in reading order "
        f"(runs of 4), {config.steps} steps, seeds {list(seeds)}, accuracy, chance 0.1; share of the most salient quarter "
        "of tokens on the digit, relative to its area (1 is chance). Holds if the mean accuracy is higher, and the share "
        "after training higher than before it and than chance",
    )


PROOFS = Proofs(
    recordings=(
        Recorded("sgformer.attention_pair", build=_pair, run=_run_pair),
        Recorded("sgformer.model", build=_model),
    ),
    checks=(attentions_token_by_token,),
    recipe=recipe,
    claims=(linear_cost, saliency_reallocates_tokens),
)
