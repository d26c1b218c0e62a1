"""Proofs of Sparsifiner: recordings of mechanism and model; predicted connectivity against the true top-k and fixed ones."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cache, partial
from itertools import product
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import ops
from regard.measure import interleaved_seconds, spread
from regard.proofs.base import Check, Preset, Proofs, Recipe
from regard.proofs.experiments import tiny_deit_config
from regard.proofs.recordings import Recorded
from regard.systems.backbones.sparsifiner import PredictedSparseAttention, SparseCore, Sparsifiner
from regard.tasks import create_task
from regard.tasks.images import Digits
from regard.training import TrainConfig, evaluate, seeded, train


def _attention(config: dict) -> PredictedSparseAttention:
    return PredictedSparseAttention(
        config["dim"],
        config["num_heads"],
        input_size=(6, 6),
        keep_rate=config["attn_keep_rate"],
        class_token=True,
        reduce_tokens=config["reduce_n_factor"],
        reduce_channels=config["reduce_c_factor"],
        top_coefficients=config["cfg_overrides"]["SPAR.BASIS_COEF.TOPK"],
        authors_quirks=True,
    )


def _model(config: dict) -> Sparsifiner:
    return Sparsifiner(
        img_size=config["img_size"],
        patch_size=config["patch_size"],
        dim=config["embed_dim"],
        depth=config["depth"],
        num_heads=config["num_heads"],
        mlp_ratio=config["mlp_ratio"],
        keep_rate=config["attn_keep_rate_list"][0],
        num_classes=config["num_classes"],
        predictor={
            "reduce_tokens": config["reduce_n_factor"],
            "reduce_channels": config["reduce_c_factor"],
            "authors_quirks": True,
        },
    )


def _spy(core: SparseCore) -> dict[str, Tensor]:
    """What the core guesses and decides in its next run, under the names of the recordings."""
    seen: dict[str, Tensor] = {}
    decide = core.connectivity

    def keep(module: nn.Module, inputs: Any, outputs: tuple[Tensor, Tensor]) -> None:
        seen["basis_coef"], seen["approx_attn"] = outputs

    def connectivity(*args: Any) -> Tensor:
        mask = decide(*args)
        seen["attn_mask"] = F.pad(mask, (0, 0, 1, 0), value=True).float()
        return mask

    core.predictor.register_forward_hook(keep)
    core.connectivity = connectivity
    return seen


def _run_attention(mixer: PredictedSparseAttention, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    seen = _spy(mixer.core)
    grid, first = mixer(inputs["x"][:, 1:].unflatten(1, (6, 6)), inputs["x"][:, :1])
    return {"x": torch.cat([first, grid.flatten(1, 2)], 1), **seen}


def _run_model(model: Sparsifiner, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    seen = [_spy(block.mixer.core) for block in model.blocks]
    tokens = model.forward_features(inputs["x"])
    outputs = {"x": model.forward_head(tokens), "features": tokens[:, 1:]}
    for index, layer in enumerate(seen):
        outputs |= {f"{name}_{index}": layer[name] for name in ("approx_attn", "attn_mask")}
    return outputs


def masks_as_defined() -> Check:
    """The mask against the guess, and the mixer against dense attention under that mask."""
    generator = torch.Generator().manual_seed(0)
    errors, counts, ranked = {}, {}, True
    for name, keep_rate, spatial in (
        ("all_kept", 1.0, (4, 5)),
        ("a_quarter_kept", 0.25, (14, 14)),
        ("line", 0.3, (9,)),
    ):
        build = partial(PredictedSparseAttention, 48, 3, input_size=spatial, keep_rate=keep_rate, class_token=True)
        mixer = seeded(build, 0).double().eval()
        x = torch.randn(2, *spatial, 48, dtype=torch.float64, generator=generator)
        first = torch.randn(2, 1, 48, dtype=torch.float64, generator=generator)
        tokens = torch.cat([first, x.flatten(1, -2)], 1)
        q, k, v = (part.unflatten(-1, (3, 16)) for part in mixer.qkv(tokens).chunk(3, -1))
        guess = mixer.core.predictor(q[:, 1:], k, spatial)[1]
        mask = mixer.core.connectivity(q[:, 1:], k, spatial)
        worst_kept = guess.masked_fill(~mask, torch.inf).amin(-1)
        ranked = ranked and bool((worst_kept >= guess.masked_fill(mask, -torch.inf).amax(-1)).all())
        counts[f"{name}_keys_of_a_patch"] = [mask.sum(-1).min().item(), mask.sum(-1).max().item()]
        logits = torch.einsum("bqhd,bkhd->bhqk", q, k) / 4
        logits[:, :, 1:] = logits[:, :, 1:].masked_fill(~mask, -torch.inf)
        expected = mixer.proj(torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v).flatten(2))
        grid, token = mixer(x, first)
        errors[f"{name}_error"] = (torch.cat([token, grid.flatten(1, -2)], 1) - expected).abs().max().item()
    return Check(
        "a patch sees the best entries of its row of the guess, the class token all keys; otherwise attention is dense",
        holds=max(errors.values()) < 1e-12 and ranked and counts["a_quarter_kept_keys_of_a_patch"] == [50, 50],
        figures={**errors, **counts},
        setting="random weights, 3 heads, 1 and 2 axes, float64, limit 1e-12; a quarter of 197 keys is 50",
    )


_TINY: dict[str, Any] = {
    "dim": 48,
    "depth": 3,
    "num_heads": 3,
    "mlp_ratio": 2.0,
    "patch_size": 4,
    "img_size": 32,
    "in_chans": 1,
    "num_classes": 10,
}


def recipe(preset: Preset) -> Recipe:
    """Backbone and predictors together on handwritten digits; "paper" is the DeiT-S host on scenes, without a teacher."""
    if preset == "paper":
        task = create_task("scenes", size=224)
        model = seeded(lambda: Sparsifiner(num_classes=task.num_classes), 0)
        return Recipe(model, task, TrainConfig(steps=2400, batch_size=1024, lr=1e-3, warmup=5 / 300))
    task = create_task("digits", channels=1)
    return Recipe(seeded(lambda: Sparsifiner(**_TINY), 0), task, tiny_deit_config(preset))


class Distilled(Digits):
    """Handwritten digits with the paper's losses: labels, and a teacher's logits and patches."""

    def __init__(self, teacher: Sparsifiner) -> None:
        super().__init__(channels=1)
        self.teacher = teacher.eval()

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        tokens = model.forward_features(batch["image"])
        logits = model.forward_head(tokens)
        with torch.no_grad():
            target = self.teacher.forward_features(batch["image"])
            wanted = self.teacher.forward_head(target).log_softmax(-1)
        divergence = F.kl_div(logits.log_softmax(-1), wanted, reduction="batchmean", log_target=True)
        patches = F.mse_loss(tokens[:, 1:], target[:, 1:])
        return F.cross_entropy(logits, batch["label"]) + 0.5 * divergence + 0.5 * patches


@cache
def _reconstructed(smoke: bool, seed: int) -> Sparsifiner:
    """A small DeiT trained densely on digits, then its predictors trained to reconstruct its attention maps."""
    task = create_task("digits", channels=1)
    model = seeded(lambda: Sparsifiner(**_TINY), seed).stage("distill")
    for core in _cores(model):
        core.dense = True
    train(model, task, TrainConfig(steps=2 if smoke else 300, lr=1e-2, seed=seed), cpu=True)
    train(model.stage("reconstruct"), task, TrainConfig(steps=2 if smoke else 150, lr=1e-2, seed=seed), cpu=True)
    return model.eval()


def _cores(model: nn.Module) -> list[SparseCore]:
    return [module for module in model.modules() if isinstance(module, SparseCore)]


KINDS = ("predicted", "true_top_k", "random", "window")
Chooser = Callable[[Tensor, Tensor, tuple[int, int]], Tensor]


def _chooser(kind: str, core: SparseCore, generator: torch.Generator) -> Chooser:
    """Queries and keys -> mask, in which every query has `core.keep_rate` of 65 keys; "window" counts the class token in."""
    if kind == "predicted":
        return partial(SparseCore.connectivity, core)
    place = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0))
    nearness = F.pad(-torch.cdist(place, place), (1, 0), value=1.0)
    fixed = nearness if kind == "window" else torch.rand(core.num_heads, 64, 65, generator=generator)

    def choose(q: Tensor, k: Tensor, spatial: tuple[int, int]) -> Tensor:
        scores = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)).detach()
        if kind != "true_top_k":
            scores = fixed.expand_as(scores)
        best = scores.topk(math.ceil(core.keep_rate * k.shape[1])).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)

    return choose


def captures_attention(preset: Preset) -> Check:
    """Share of a trained DeiT's attention that lies on the kept keys, for equally many keys a query."""
    smoke = preset == "smoke"
    seeds = (0,) if smoke else (0, 1, 2)
    digits = create_task("digits", channels=1).eval_set
    images = torch.stack([digits[index]["image"] for index in range(8 if smoke else 64)])
    shares: dict[tuple[str, float], list[float]] = {}
    for keep_rate, seed in product((0.1, 0.25), seeds):
        found: dict[str, list[float]] = {kind: [] for kind in KINDS}
        model, generator = copy.deepcopy(_reconstructed(smoke, seed)), torch.Generator().manual_seed(seed)
        for core in _cores(model):
            core.dense, core.keep_rate = False, keep_rate
            core.connectivity = partial(_weigh, {kind: _chooser(kind, core, generator) for kind in KINDS}, found)
        with torch.no_grad():
            model(images)
        for kind in KINDS:
            shares.setdefault((kind, keep_rate), []).append(fmean(found[kind]))
    holds = all(
        ours > max(random, window) and ours >= 0.75 * best
        for keep_rate in (0.1, 0.25)
        for ours, best, random, window in zip(*(shares[kind, keep_rate] for kind in KINDS), strict=True)
    )
    return Check(
        "The keys that the predictor chooses carry most of the attention that the true top-k would, more than fixed keys",
        holds=holds,
        figures={f"{kind}_{rate}": [round(share, 4) for share in values] for (kind, rate), values in shares.items()},
        setting=f"share of the attention of patches on the kept keys, mean over layers and {len(images)} held out digits; "
        f"DeiT of 3 blocks on 65 tokens, trained densely, then 150 steps of reconstruction, seeds {list(seeds)}; holds: "
        "with 0.1 and 0.25 of the keys, for every seed, more than random keys and a window, and at least 3/4 of the true "
        "top-k's share",
    )


def _weigh(choosers: dict[str, Chooser], found: dict[str, list[float]], q: Tensor, k: Tensor, spatial: Any) -> None:
    """Notes the share of dense attention on the keys that each chooser keeps; leaves attention dense."""
    attention = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1) / q.shape[-1] ** 0.5).softmax(-1)
    for kind, choose in choosers.items():
        found[kind].append((attention * choose(q, k, spatial)).sum(-1).mean().item())


def learned_beats_fixed(preset: Preset) -> Check:
    """Fine-tuning under four kinds of masks with a tenth of the keys, from the same dense weights, at the same budget."""
    smoke = preset == "smoke"
    seeds = (0,) if smoke else (0, 1, 2)
    accuracy: dict[str, list[float]] = {"dense": []}
    for seed in seeds:
        teacher = _reconstructed(smoke, seed)
        task = Distilled(teacher)
        accuracy["dense"].append(evaluate(teacher, task)["accuracy"])
        for kind in KINDS:
            model, generator = copy.deepcopy(teacher).stage("distill"), torch.Generator().manual_seed(seed)
            for core in _cores(model):
                core.keep_rate = 0.1
                core.connectivity = _chooser(kind, core, generator)
            accuracy.setdefault(f"{kind}_before", []).append(evaluate(model, task)["accuracy"])
            config = TrainConfig(steps=2 if smoke else 60, lr=2e-3, seed=seed)
            accuracy.setdefault(kind, []).append(train(model, task, config, cpu=True).metrics["accuracy"])
    means = {name: fmean(values) for name, values in accuracy.items()}
    figures: dict[str, Any] = {name: [round(value, 4) for value in values] for name, values in accuracy.items()}
    return Check(
        "After fine-tuning, learned connectivity keeps more accuracy than random keys and than a window of as many keys",
        holds=means["predicted"] > means["random"] and means["predicted"] > means["window"],
        figures=figures | {f"{name}_mean": round(value, 4) for name, value in means.items()},
        setting="accuracy on 360 held out digits, 7 of 65 keys a patch; dense training of 300 steps, 150 steps of "
        f"reconstruction, 60 steps of fine-tuning with labels and distillation, seeds {list(seeds)}; 'before': without "
        "fine-tuning. Holds by the means of 'predicted', 'random' and 'window'",
    )


def _gathered(q: Tensor, k: Tensor, v: Tensor, index: Tensor, rows: int = 64) -> Tensor:
    """Attention `(heads, N, d)` over the keys `index` `(heads, N, kept)`, gathered for some rows at a time."""
    outs = []
    heads = torch.arange(len(q))[:, None, None]
    for part in index.split(rows, 1):
        start = sum(out.shape[1] for out in outs)
        logits = torch.einsum("hqd,hqkd->hqk", q[:, start : start + part.shape[1]], k[heads, part]) / q.shape[-1] ** 0.5
        outs.append(torch.einsum("hqk,hqkd->hqd", logits.softmax(-1), v[heads, part]))
    return torch.cat(outs, 1)


def cheaper(preset: Preset) -> Check:
    """Multiply-adds of predictor and sparse attention against dense attention in DeiT-S, and time of gathering on a CPU."""
    model = seeded(lambda: PredictedSparseAttention(384, 6, class_token=True), 0)
    table = model.core.predictor.proj_back_n
    density = (table.abs() > model.core.predictor.threshold).double().mean().item()
    tokens, width, narrow, rank, top = 197, 64, 32, table.shape[1], model.core.predictor.top_coefficients
    dense = 2 * tokens**2 * width
    predictor = 2 * tokens * width * narrow + 2 * tokens * narrow * rank + tokens**2 * top * density
    figures: dict[str, Any] = {
        "predictor_share_of_dense": round(predictor / dense, 4),
        "basis_density": round(density, 4),
    }
    shares = {}
    for keep_rate in (0.25, 0.1, 0.05):
        shares[keep_rate] = (predictor + 2 * math.ceil(keep_rate * tokens) * tokens * width) / dense
        figures[f"share_of_dense_keeping_{keep_rate}"] = round(shares[keep_rate], 4)
    for count in (196,) if preset == "smoke" else (784, 3136):
        q, k, v = torch.randn(3, 2, count, width, generator=torch.Generator().manual_seed(0))
        index = torch.rand(2, count, count, generator=torch.Generator().manual_seed(1)).topk(count // 4).indices
        runs = {
            "gathered": partial(_gathered, q, k, v, index),
            "dense": partial(ops.attention, *(x.transpose(0, 1)[None] for x in (q, k, v))),
        }
        times = {name: spread(values)["median"] for name, values in interleaved_seconds(runs, rounds=3).items()}
        figures[f"time_of_gathering_over_dense_{count}_tokens"] = round(times["gathered"] / times["dense"], 2)
    return Check(
        "With a quarter of the keys, predictor and attention take 52 % of the multiply-adds of dense attention, or less",
        holds=shares[0.25] <= 0.52,
        figures=figures,
        setting="DeiT-S: 197 tokens, heads of 64; projections of the predictor included, its basis as dense as at the "
        "start; dense attention is Q K and A V. Times: a quarter of the keys gathered for each query, against a dense "
        "kernel, one thread; no verdict on them",
    )


PROOFS = Proofs(
    recordings=(
        Recorded("sparsifiner.mech", build=_attention, run=_run_attention),
        Recorded("sparsifiner.model", build=_model, run=_run_model),
    ),
    checks=(masks_as_defined,),
    recipe=recipe,
    claims=(captures_attention, learned_beats_fixed, cheaper),
)
