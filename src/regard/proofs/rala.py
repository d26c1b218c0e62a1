"""Proofs of RALA: recordings of both attentions and the model; the rank of what linear attention gives out."""

from __future__ import annotations

from functools import cache, partial
from itertools import product
from statistics import fmean

import torch
from torch import Tensor, nn

from regard.layers import LinearAttention, SoftmaxAttention
from regard.proofs.base import Check, Preset, Proofs, Recipe
from regard.proofs.experiments import cost_growth, over_variants, tiny_deit_config, tiny_grid_deit
from regard.proofs.recordings import Recorded
from regard.systems.backbones.rala import RAVLT, GatedAttention, GatedSoftmaxAttention, RankAugmentedLinearAttention
from regard.tasks import create_task
from regard.training import TrainConfig, seeded


def _run_attention(mixer: GatedAttention, inputs: dict[str, Tensor]) -> Tensor:
    # The recording gives sines and cosines as inputs; ours follow from the grid.
    return mixer(inputs["x"].movedim(1, -1)).movedim(-1, 1)


def _model(config: dict) -> RAVLT:
    scales = zip(config["layerscales"], config["layer_init_values"], strict=True)
    return RAVLT(
        dims=config["embed_dims"],
        depths=config["depths"],
        num_heads=config["num_heads"],
        mlp_ratio=config["mlp_ratios"],
        attention=[{"l": "linear", "v": "softmax"}[flags[0]] for flags in config["flagss"]],
        layer_scales=[float(value) if scaled else None for scaled, value in scales],
        projection=config["projection"],
        num_classes=config["num_classes"],
    )


def explicit_weights() -> Check:
    """RALA against the N x N matrix of its weights, written from the places of tokens; the key weights sum to N."""
    generator = torch.Generator().manual_seed(0)
    worst = gap = 0.0
    for spatial, gate, reweight in product(((1,), (6,), (3, 5), (2, 3, 2)), (True, False), (True, False)):
        options = {"gate": gate, "reweight": reweight, "axes": len(spatial)}
        mixer = seeded(lambda o=options: RankAugmentedLinearAttention(16, 2, **o), 0).double()
        x = torch.randn(2, *spatial, 16, dtype=torch.float64, generator=generator)
        place = torch.cartesian_prod(*(torch.arange(length) for length in spatial)).view(-1, len(spatial))
        shares = [4 // len(spatial) + (axis < 4 % len(spatial)) for axis in range(len(spatial))]
        rates = [1e4 ** -torch.linspace(0, 1, share, dtype=torch.float64) for share in shares]
        turn = torch.exp(1j * torch.cat([place[:, [axis]] * rate for axis, rate in enumerate(rates)], 1))  # (N, 4)
        parts = mixer.project(x).flatten(1, -2).unflatten(-1, (-1, 2, 8)).permute(2, 0, 3, 1, 4)  # (parts, B, h, N, d)
        q, k = (torch.where(t > 0, t + 1, t.exp()) for t in parts[:2])
        alpha = torch.ones(2, 2, len(place), dtype=torch.float64)
        if reweight:
            alpha = (k @ q.mean(2).unsqueeze(-1) / 8**0.5).squeeze(-1).softmax(-1) * len(place)
        k = k * alpha.unsqueeze(-1)
        turned = [torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (4, 2))) * turn).flatten(-2) for t in (q, k)]
        numerator = turned[0] @ turned[1].mT / len(place)
        weights = numerator / ((q @ k.mT).mean(-1, keepdim=True) + 1e-6)
        y = (weights @ parts[2]).transpose(1, 2).flatten(2)
        y = y + mixer.local(mixer.project(x)[..., 32:48]).flatten(1, -2)
        if gate:
            y = y * parts[3].transpose(1, 2).flatten(2)
        worst = max(worst, (mixer(x) - mixer.proj(y).view(x.shape)).abs().max().item())
        ours = mixer.features(*(t.transpose(1, 2).unflatten(1, spatial) for t in parts[:2]))[1]
        gap = max(gap, (ours.flatten(1, -3).transpose(1, 2) - k).abs().max().item())
        gap = max(gap, (alpha.sum(-1) - len(place)).abs().max().item())
    return Check(
        "Rank-augmented linear attention equals the explicit matrix of its weights; the weights of the keys sum to N",
        holds=max(worst, gap) < 1e-12,
        figures={"largest_error": worst, "largest_error_of_the_key_weights": gap},
        setting="float64, maps of 1 to 3 axes, one token included, with and without key weights and gate",
    )


def recipe(preset: Preset) -> Recipe:
    """A two-stage RAVLT on handwritten digits; "paper" is RAVLT-T with the schedule of the paper."""
    if preset == "paper":
        task = create_task("digits", size=224, label_smoothing=0.1)
        options = {"dims": (64, 128, 256, 512), "depths": (2, 2, 6, 2), "num_heads": (1, 2, 4, 8)}
        model = seeded(lambda: RAVLT(drop_path_rate=0.1, num_classes=task.num_classes, **options), 0)
        return Recipe(model, task, TrainConfig(steps=375_000, batch_size=1024, lr=1e-3, warmup=5 / 300))
    task = create_task("digits", size=32, channels=1)
    model = seeded(
        lambda: RAVLT(
            dims=(24, 48),
            depths=(1, 1),
            num_heads=(2, 4),
            mlp_ratio=2.0,
            attention=("linear", "softmax"),
            layer_scales=(1.0, 1.0),
            projection=64,
            num_classes=task.num_classes,
            in_chans=1,
        ),
        0,
    )
    return Recipe(model, task, TrainConfig(steps=2 if preset == "smoke" else 250, batch_size=32, lr=2e-3))


_AUGMENTATIONS = {
    "neither": {"reweight": False, "gate": False},
    "key_weights": {"reweight": True, "gate": False},
    "gate": {"reweight": False, "gate": True},
    "both": {"reweight": True, "gate": True},
}


def _numerical_rank(x: Tensor) -> float:
    """Mean number of singular values above a thousandth of the largest, over a batch of matrices."""
    values = torch.linalg.svdvals(x.double())
    return (values > 1e-3 * values[..., :1]).sum(-1).double().mean().item()


def _effective_rank(x: Tensor) -> float:
    """Mean exponential of the entropy of the singular values: how many of them share the weight."""
    values = torch.linalg.svdvals(x.double())
    shares = values / values.sum(-1, keepdim=True)
    return torch.special.entr(shares).sum(-1).exp().mean().item()


@torch.no_grad()
def _features(mixer: nn.Module, x: Tensor) -> Tensor:
    """What one head gives out, before the last projection and without the convolution of the values: `(B, N, d)`."""
    if isinstance(mixer, GatedAttention):
        nn.init.zeros_(mixer.local.weight)
        nn.init.zeros_(mixer.local.bias)
    mixer.proj = nn.Identity()
    return mixer(x).flatten(1, -2)


@torch.no_grad()
def _buffer(mixer: RankAugmentedLinearAttention, x: Tensor) -> Tensor:
    """The matrix that the tokens are squeezed through, without rotations: `(B, d, d)`."""
    q, k, v = (t.unsqueeze(-2) for t in mixer.project(x)[..., : 3 * mixer.dim].chunk(3, -1))
    _, k = mixer.features(q, k)
    return k.flatten(1, -2).mT @ v.flatten(1, -2)


@cache
def _ranks(preset: Preset) -> dict[str, float]:
    """One head of 64 channels on 196 tokens of real digits, random weights; the tokens as a patch embedding gives them."""
    smoke = preset == "smoke"
    task = create_task("scenes", size=112, kind="local", channels=1, train_items=8, eval_items=4 if smoke else 32)
    images = torch.stack([task.eval_set[i]["image"] for i in range(len(task.eval_set))])
    arms = {
        "linear": partial(LinearAttention, 64, 1),
        **{f"rala_{name}": partial(RankAugmentedLinearAttention, 64, 1, **o) for name, o in _AUGMENTATIONS.items()},
        "softmax": partial(SoftmaxAttention, 64, 1),
        "gated_softmax": partial(GatedSoftmaxAttention, 64, 1),
    }
    found: dict[str, list[float]] = {}
    for seed in range(1 if smoke else 5):
        embed = seeded(lambda: nn.Conv2d(1, 64, 8, stride=8), seed)
        with torch.no_grad():
            x = nn.functional.layer_norm(embed(images).movedim(1, -1), (64,))
        for name, build in arms.items():
            y = _features(seeded(build, seed), x)
            found.setdefault(f"{name}_rank", []).append(_numerical_rank(y))
            found.setdefault(f"{name}_effective_rank", []).append(_effective_rank(y))
        for name in ("neither", "key_weights"):
            mixer = seeded(partial(RankAugmentedLinearAttention, 64, 1, **_AUGMENTATIONS[name]), seed)
            buffer = _buffer(mixer, x)
            found.setdefault(f"buffer_{name}_rank", []).append(_numerical_rank(buffer))
            found.setdefault(f"buffer_{name}_effective_rank", []).append(_effective_rank(buffer))
    return {name: round(fmean(values), 2) for name, values in found.items()}


_RANKS = (
    "196 tokens of digit scenes (112 pixels, random patch embedding of 8 pixels, LayerNorm), one head of 64, default random "
    "weights, 32 images, 5 seeds, no convolution of the values; rank: singular values above a thousandth of the largest, of "
    "at most 64; effective rank: the exponential of their entropy"
)


def rank_at_linear_cost(preset: Preset) -> Check:
    """Rank of the output features, and how the cost grows, against linear and softmax attention."""
    sides = [14, 28] if preset == "smoke" else [14, 28, 42, 56]
    figures: dict[str, float | list[float]] = {
        name: value for name, value in _ranks(preset).items() if not name.startswith("buffer")
    }
    figures |= cost_growth(
        {
            "rala": lambda side: RankAugmentedLinearAttention(64, 1),
            "softmax": lambda side: GatedSoftmaxAttention(64, 1),
        },
        sides,
        dim=64,
    )
    return Check(
        "Plain linear attention gives features of low rank; RALA's have that of softmax attention's, at linear cost",
        holds=figures["linear_rank"] < figures["rala_both_rank"]
        and figures["rala_both_rank"] >= 0.9 * figures["softmax_rank"]
        and abs(figures["rala_macs_growth"] - 1) < 0.05
        and figures["softmax_macs_growth"] > 1.5,
        figures=figures,
        setting=f"{_RANKS}; cost: exponent of tokens fitted over maps of {sides} squared; holds if the rank of linear "
        "attention is below that of RALA, RALA's at least 0.9 of softmax attention's, and multiply-adds grow linearly",
    )


def rank_of_the_buffer(preset: Preset) -> Check:
    """The matrix that all tokens are squeezed through, with and without the weights of the keys."""
    figures = {name: value for name, value in _ranks(preset).items() if name.startswith("buffer")}
    return Check(
        "Weighting keys by their relevance to a global query raises the rank of the buffer",
        holds=figures["buffer_key_weights_rank"] > figures["buffer_neither_rank"],
        figures=figures,
        setting=f"{_RANKS}; sum of products of keys and values, without rotations; holds if the rank is higher with weights",
    )


def quality(preset: Preset) -> Check:
    """The same small transformer with linear attention, with each augmentation, and with softmax attention."""
    task = create_task("digits", size=24, channels=1)
    config = tiny_deit_config(preset)
    seeds = (0,) if preset == "smoke" else (0, 1, 2)
    mixers = {
        "softmax": GatedSoftmaxAttention,
        **{f"linear_{name}": partial(RankAugmentedLinearAttention, **o) for name, o in _AUGMENTATIONS.items()},
    }
    builds = {
        name: partial(tiny_grid_deit, lambda at, mixer=mixer: mixer(at.dim, at.num_heads))
        for name, mixer in mixers.items()
    }
    figures, mean = over_variants(builds, task, config, seeds)
    return Check(
        "Key weights and gate make linear attention more accurate, and bring it near softmax attention",
        holds=mean["linear_both"] > mean["linear_neither"] and mean["linear_both"] > mean["softmax"] - 0.02,
        figures=figures,
        setting=f"{task.description} 36 tokens, two blocks, rotations and convolution of the values in all, "
        f"{config.steps} steps, lr {config.lr}, seeds {list(seeds)}; holds if both augmentations beat neither on average "
        "and are within 0.02 of softmax attention with the same gate",
    )


PROOFS = Proofs(
    recordings=(
        Recorded(
            "rala.mech_rala",
            build=lambda config: RankAugmentedLinearAttention(config["dim"], config["num_heads"]),
            run=_run_attention,
        ),
        Recorded(
            "rala.mech_vanilla",
            build=lambda config: GatedSoftmaxAttention(config["dim"], config["num_heads"]),
            run=_run_attention,
        ),
        Recorded("rala.model_llvv", build=_model),
    ),
    checks=(explicit_weights,),
    recipe=recipe,
    claims=(rank_at_linear_cost, rank_of_the_buffer, quality),
)
