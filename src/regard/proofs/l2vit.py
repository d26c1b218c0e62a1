"""Proofs of L2ViT: recordings of linear attention, global block and model; what the local concentration does."""

from __future__ import annotations

from functools import cache, partial
from itertools import product
from statistics import fmean

import torch
from torch import Tensor, nn

from regard.layers import SoftmaxAttention
from regard.proofs.base import Check, Preset, Proofs, Recipe
from regard.proofs.experiments import cost_growth, tiny_grid_deit
from regard.proofs.recordings import Recorded
from regard.systems.backbones.l2vit import EnhancedLinearAttention, GlobalBlock, L2ViT
from regard.tasks import create_task
from regard.training import TrainConfig, seeded, train


def _block(config: dict) -> GlobalBlock:
    mixer = EnhancedLinearAttention(config["dim"], config["num_heads"])
    return GlobalBlock(config["dim"], mixer, mlp_ratio=config["mlp_ratio"])


def _model(config: dict) -> L2ViT:
    return L2ViT(
        dims=config["dims"],
        depths=config["depths"],
        num_heads=config["num_heads"],
        mlp_ratio=config["mlp_ratio"][0],
        num_classes=config["num_classes"],
    )


def explicit_weights() -> Check:
    """Against the N x N matrix of weights, above and below the floor; the weights are never negative."""
    generator = torch.Generator().manual_seed(0)
    worst, least, floored = 0.0, 0.0, []
    for spatial, floor in product(((1,), (6,), (3, 5), (2, 3, 2)), (1e-6, 4.0, 100.0)):
        mixer = seeded(lambda c=floor: EnhancedLinearAttention(8, 2, floor=c), 0).double()
        nn.init.normal_(mixer.temperature, 0.5, 0.1, generator=generator)
        x = 3 * torch.randn(2, *spatial, 8, dtype=torch.float64, generator=generator)
        q, k, v = mixer.qkv(x).flatten(1, -2).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        products = q.clamp(min=0) @ k.clamp(min=0).mT
        total = products.sum(-1, keepdim=True)
        weights = mixer.temperature[:, None, None] * products / total.clamp(min=floor)
        expected = mixer.proj((weights @ v).transpose(1, 2).flatten(2)).view(x.shape)
        worst = max(worst, (mixer(x) - expected).abs().max().item())
        least = min(least, weights.min().item())
        floored.append((total < floor).double().mean().item())
    return Check(
        "Enhanced linear attention equals the explicit matrix of its weights, none of which is negative",
        holds=worst < 1e-12 and least >= 0,
        figures={"largest_error": worst, "least_weight": least, "share_below_the_floor": round(fmean(floored), 3)},
        setting="float64, maps of 1 to 3 axes, one token included, floors of 1e-6, 4 and 100",
    )


def recipe(preset: Preset) -> Recipe:
    """A two-stage L2ViT on handwritten digits; "paper" is L2ViT-T with the schedule of the paper."""
    if preset == "paper":
        task = create_task("digits", size=224, label_smoothing=0.1)
        model = seeded(lambda: L2ViT(drop_path_rate=0.1, num_classes=task.num_classes), 0)
        return Recipe(model, task, TrainConfig(steps=93_750, batch_size=4096, lr=4e-3, warmup=20 / 300))
    task = create_task("digits", size=32, channels=1)
    model = seeded(
        lambda: L2ViT(
            dims=(24, 48),
            depths=(2, 2),
            num_heads=(2, 4),
            window_size=4,
            mlp_ratio=2.0,
            num_classes=task.num_classes,
            in_chans=1,
        ),
        0,
    )
    return Recipe(model, task, TrainConfig(steps=2 if preset == "smoke" else 250, batch_size=32, lr=2e-3))


_ARMS = {
    "full": {},
    "without_concentration": {"concentrate": False},
    "without_floor": {"floor": 1e-6},
    "softmax": {"concentrate": False, "floor": None},
}
"""What differs between the arms: local concentration, the floor, and softmax attention in place of linear."""


def _host(concentrate: bool = True, floor: float | None = 100.0) -> nn.Module:
    """12 x 12 tokens, two global blocks."""
    model = tiny_grid_deit(lambda at: nn.Identity(), dim=32, num_heads=2, patch_size=2)
    for index in range(len(model.blocks)):
        mixer = SoftmaxAttention(32, 2) if floor is None else EnhancedLinearAttention(32, 2, floor=floor)
        model.blocks[index] = GlobalBlock(32, mixer, mlp_ratio=2.0, concentrate=concentrate)
    return model


def _branch(block: GlobalBlock, x: Tensor) -> Tensor:
    """What attention, and local concentration where there is one, add to tokens `(B, H, W, C)`."""
    mixed = block.mixer(block.norm1(x))
    return mixed if block.local is None else mixed + block.local(block.norm3(x + mixed))


def _near_share(model: nn.Module, images: Tensor) -> float:
    """How much of the gradient of this branch at a token with respect to the other tokens falls within three tokens."""
    inputs: list[Tensor] = []
    hooks = [block.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for block in model.blocks]
    with torch.no_grad():
        model.eval()(images)
        inputs = [x + block.position(x) for block, x in zip(model.blocks, inputs, strict=True)]
    for hook in hooks:
        hook.remove()
    places = torch.cartesian_prod(*(torch.arange(side) for side in inputs[0].shape[1:3]))
    shares = []
    for (block, tokens), row, column in product(zip(model.blocks, inputs, strict=True), (4, 7), (4, 7)):
        x = tokens.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(_branch(block, x)[:, row, column].square().sum(), x)
        mass = gradient.norm(dim=-1).flatten(1)
        distance = (places - torch.tensor([row, column])).abs().amax(-1)
        near = mass[:, (distance > 0) & (distance <= 3)].sum(1)
        shares.append((near / mass[:, distance > 0].sum(1)).mean().item())
    return fmean(shares)


@cache
def _runs(preset: Preset) -> dict[str, dict[str, list[float]]]:
    """Accuracy and share of near gradient of each arm and seed; both claims about trained models read them."""
    smoke = preset == "smoke"
    task = create_task("digits", size=24, channels=1)
    images = torch.stack([task.eval_set[i]["image"] for i in range(4 if smoke else 16)])
    found: dict[str, dict[str, list[float]]] = {}
    for name, options in _ARMS.items():
        found[name] = {"accuracy": [], "near": []}
        for seed in (0,) if smoke else (0, 1):
            model = seeded(partial(_host, **options), seed)
            config = TrainConfig(steps=2 if smoke else 150, batch_size=16, lr=3e-3, seed=seed)
            found[name]["accuracy"].append(round(train(model, task, config, cpu=True).metrics["accuracy"], 4))
            found[name]["near"].append(round(_near_share(model, images), 4))
    return found


_SETTING = "two global blocks on 12 x 12 tokens of handwritten digits, 150 steps of 16, lr 3e-3, seeds 0 and 1"


def concentration(preset: Preset) -> Check:
    """Where the gradient of a token lies, after training with and without local concentration, and with softmax."""
    runs = _runs(preset)
    figures: dict[str, float | list[float]] = {}
    for name in ("full", "without_concentration", "softmax"):
        figures |= {name: runs[name]["near"], f"{name}_mean": round(fmean(runs[name]["near"]), 4)}
    return Check(
        "The local concentration module makes linear attention local again",
        holds=all(a > b for a, b in zip(figures["full"], figures["without_concentration"], strict=True)),
        figures=figures,
        setting=f"{_SETTING}; gradient of what attention and module add to a token with respect to all other "
        "tokens: the share that lies within three tokens (evenly spread: 0.34), mean over both blocks; holds if it is larger "
        "with the module for every seed; softmax attention without the module beside it",
    )


def quality(preset: Preset) -> Check:
    """The same models: accuracy without the module, without the floor, and with softmax attention."""
    runs = _runs(preset)
    figures: dict[str, float | list[float]] = {}
    mean = {name: fmean(run["accuracy"]) for name, run in runs.items()}
    for name, run in runs.items():
        figures |= {name: run["accuracy"], f"{name}_mean": round(mean[name], 4)}
    return Check(
        "Both parts help linear attention: it is better with local concentration, and no worse with the floor",
        holds=mean["full"] > mean["without_concentration"] and mean["full"] >= mean["without_floor"],
        figures=figures,
        setting=f"{_SETTING}; holds if on average the whole is more accurate than without the module and at least as accurate "
        "as with 1e-6 in place of the floor of 100",
    )


def linear_cost(preset: Preset) -> Check:
    """Multiply-adds and time over growing maps, against softmax attention."""
    sides = [14, 28] if preset == "smoke" else [14, 28, 42, 56]
    figures = cost_growth(
        {
            "enhanced_linear": lambda side: EnhancedLinearAttention(64, 2),
            "softmax": lambda side: SoftmaxAttention(64, 2),
        },
        sides,
        dim=64,
    )
    return Check(
        "The cost of the enhanced linear attention grows linearly with the map, that of softmax attention quadratically",
        holds=abs(figures["enhanced_linear_macs_growth"] - 1) < 0.05 and figures["softmax_macs_growth"] > 1.5,
        figures=figures,
        setting=f"exponent of tokens fitted over maps of {sides} squared, 64 channels; verdict on multiply-adds",
    )


PROOFS = Proofs(
    recordings=(
        Recorded(
            "l2vit.mech_linear",
            build=lambda config: EnhancedLinearAttention(config["dim"], config["num_heads"]),
        ),
        Recorded(
            "l2vit.block_global",
            build=_block,
            run=lambda block, inputs: block(inputs["x"].unflatten(1, (7, 9))).flatten(1, 2),
        ),
        Recorded("l2vit.model", build=_model),
    ),
    checks=(explicit_weights,),
    recipe=recipe,
    claims=(concentration, quality, linear_cost),
)
