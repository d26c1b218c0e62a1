"""Proofs of FcaFormer: recordings of a block and the model; what cross tokens cost and bring; what calibrates them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regard.flops import count_macs, count_params
from regard.proofs.base import Check, Preset, Proofs, Recipe
from regard.proofs.experiments import over_variants
from regard.proofs.recordings import Recorded
from regard.systems.backbones.fcaformer import FcaBlock, FcaFormer, ForwardCrossAttention
from regard.tasks import create_task
from regard.training import TrainConfig, seeded


def _block(config: dict) -> FcaBlock:
    mixer = ForwardCrossAttention(
        config["dim"],
        config["num_heads"],
        input_size=config["input_resolution"],
        sources=config["inner_depth"],
        authors_quirks=True,
    )
    return FcaBlock(config["dim"], mixer, merges=config["s_up"], mlp_ratio=config["mlp_ratio"], layer_scale=1e-6)


def _run_block(block: FcaBlock, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    y, merged = block(inputs["x"].unflatten(1, (5, 6)), inputs["s"].unflatten(1, (2, 2, 2)))
    return {"y": y.flatten(1, 2), "s_update": merged.flatten(1, 3)}


def _model(config: dict) -> FcaFormer:
    return FcaFormer(
        dims=config["embed_dims"],
        depths=config["depths"],
        num_heads=config["num_heads"],
        max_sources=config["cab_max_d"],
        img_size=config["img_size"],
        num_classes=config["num_classes"],
        authors_quirks=True,
    )


def _run_model(model: FcaFormer, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    # The authors' layers end with their downsampling; ours begin with it.
    x = model.stem(inputs["x"].movedim(1, -1))
    outputs = {"patch_embed": x.movedim(-1, 1)}
    for index, stage in enumerate(model.stages[:3]):
        x = model.downs[index + 1](stage(x))
        outputs[f"layer_{index}"] = x.flatten(1, 2) if index == 2 else x.movedim(-1, 1)
    return {**outputs, "logits": model(inputs["x"])}


def _random_mixer(**options: Any) -> ForwardCrossAttention:
    mixer = seeded(lambda: ForwardCrossAttention(12, 3, **options), 0).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return mixer


def dense_over_both_kinds() -> Check:
    """The mixer against softmax attention over one list of keys, whose logits are looked up pair by pair."""
    generator = torch.Generator().manual_seed(0)
    errors = {}
    for name, spatial, sources in (("alone", (3, 4), 0), ("two_sources", (5, 6), 2), ("line", (6,), 1)):
        mixer = _random_mixer(input_size=spatial, sources=sources)
        x = torch.randn(2, *spatial, 12, dtype=torch.float64, generator=generator)
        coarse = tuple(-(-length // 4) for length in spatial)
        cross = torch.randn(2, sources, *coarse, 12, dtype=torch.float64, generator=generator) if sources else None
        places = list(torch.cartesian_prod(*(torch.arange(length) for length in spatial)).view(-1, len(spatial)))
        keys = x.flatten(1, -2)
        if cross is not None:
            keys = torch.cat([keys, mixer.cross_norm(cross.flatten(1, -2)) * mixer.cross_scale[0, :, None]], 1)
        q = mixer.qkv(x.flatten(1, -2))[..., :12].unflatten(-1, (3, 4))
        k, v = mixer.qkv(keys)[..., 12:].unflatten(-1, (2, 3, 4)).unbind(-3)
        logits = torch.einsum("bqhd,bkhd->bhqk", q, k) / 2
        table = mixer.bias.table.unflatten(1, spatial)
        for query, at in enumerate(places):
            for key, other in enumerate(places):
                logits[:, :, query, key] += table[(slice(None), *(at - other).abs())]
            for key in range(len(places), k.shape[1]):
                logits[:, :, query, key] += mixer.cross_bias[:, key - len(places)]
        expected = mixer.proj(torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v).flatten(2)).view(x.shape)
        errors[f"{name}_error"] = (mixer(x, cross) - expected).abs().max().item()
    return Check(
        "forward cross attention is softmax attention over own and cross tokens, with a bias by distance and by cross token",
        holds=max(errors.values()) < 1e-12,
        figures=errors,
        setting="grids of 1 and 2 axes, none to two sources, 3 heads, random parameters, float64, limit 1e-12",
    )


def gradient_by_differences() -> Check:
    """The model's gradient along random directions against central differences, one image and two."""
    model = seeded(lambda: FcaFormer(dims=(8, 12), depths=(1, 3), num_heads=(0, 3), layer_scale=0.5, img_size=32), 0)
    model, generator, errors = model.double().eval(), torch.Generator().manual_seed(0), {}
    for count in (1, 2):
        x, step = torch.randn(2, count, 3, 32, 32, dtype=torch.float64, generator=generator)
        weight = torch.randn(count, 1000, dtype=torch.float64, generator=generator)
        x.requires_grad_()
        (gradient,) = torch.autograd.grad((model(x) * weight).sum(), x)
        with torch.no_grad():
            slope = ((model(x + 1e-5 * step) - model(x - 1e-5 * step)) * weight).sum() / 2e-5
        errors[f"relative_error_{count}_images"] = abs((gradient * step).sum().item() / slope.item() - 1)
    return Check(
        "the gradient of the model is its slope",
        holds=max(errors.values()) < 1e-6,
        figures=errors,
        setting="evaluation mode, two stages, float64, central differences of 1e-5 along random directions, limit 1e-6",
    )


_TINY: dict[str, Any] = {
    "dims": (16, 48),
    "depths": (1, 5),
    "num_heads": (0, 3),
    "layer_scale": 0.1,
    "img_size": 48,
    "in_chans": 1,
    "num_classes": 10,
}


def recipe(preset: Preset) -> Recipe:
    """A convolutional stage, then five Fca blocks on 6 x 6 tokens of handwritten digits; "paper" is L1 on scenes."""
    if preset == "paper":
        task = create_task("scenes", size=224)
        model = seeded(lambda: FcaFormer(num_classes=task.num_classes), 0)
        return Recipe(model, task, TrainConfig(steps=600, batch_size=4096, lr=4e-3, warmup=20 / 300))
    task = create_task("digits", size=48, channels=1)
    model = seeded(lambda: FcaFormer(mlp_ratio=2.0, **_TINY), 0)
    return Recipe(model, task, TrainConfig(steps=2 if preset == "smoke" else 200, batch_size=32, lr=4e-3))


def cross_tokens_help(preset: Preset) -> Check:
    """The same hybrid with cross tokens, and without them but with MLPs that make up for the parameters."""
    smoke = preset == "smoke"
    seeds = (0,) if smoke else (0, 1, 2)
    config = TrainConfig(steps=2 if smoke else 120, batch_size=32, lr=4e-3)
    wanted = count_params(FcaFormer(mlp_ratio=2.0, **_TINY))
    without = partial(FcaFormer, max_sources=0, **_TINY)
    ratio = min((step / 48 for step in range(96, 144)), key=lambda r: abs(count_params(without(mlp_ratio=r)) - wanted))
    builds = {"with": partial(FcaFormer, mlp_ratio=2.0, **_TINY), "without": partial(without, mlp_ratio=ratio)}
    task = create_task("digits", size=48, channels=1)
    figures, means = over_variants(builds, task, config, seeds)
    figures |= {f"{name}_parameters": count_params(build()) for name, build in builds.items()}
    with torch.device("meta"):
        image = torch.empty(1, 3, 224, 224)
        macs = [count_macs(FcaFormer(max_sources=sources), image) for sources in (12, 0)]
    extra = macs[0] / macs[1] - 1
    figures["extra_macs_of_l1"] = round(extra, 4)
    spread = abs(figures["with_parameters"] / figures["without_parameters"] - 1)
    return Check(
        "Cross tokens from earlier blocks keep or raise the accuracy at equal parameters, for few more multiply-adds",
        holds=means["with"] >= means["without"] and extra < 0.1 and spread < 0.02,
        figures=figures,
        setting=f"one convolutional stage, five Fca blocks on 6 x 6 tokens, digits, {config.steps} steps of 32, seeds "
        f"{list(seeds)}, accuracy; holds: mean with >= mean without, parameters within 2 %, and less than 10 % more "
        "multiply-adds in FcaFormer-L1 with than without cross tokens",
    )


def calibration(preset: Preset) -> Check:
    """Output of a block when the scale factors of cross tokens change, with the factors before and after the LayerNorm."""
    generator = torch.Generator().manual_seed(0)
    figures: dict[str, float] = {}
    for name, quirks in (("factor_before_norm", True), ("factor_after_norm", False)):
        mixer = _random_mixer(input_size=(6, 6), sources=2, authors_quirks=quirks)
        x, cross = (
            torch.randn(*shape, 12, dtype=torch.float64, generator=generator) for shape in ((4, 6, 6), (4, 2, 2, 2))
        )
        with torch.no_grad():
            mixer.cross_scale.fill_(1.0)
            before = mixer(x, cross)
            mixer.cross_scale.uniform_(0.2, 5.0, generator=generator)
            figures[f"{name}_relative_change"] = ((mixer(x, cross) - before).norm() / before.norm()).item()
    return Check(
        "The learned factors calibrate cross tokens only if they come after the LayerNorm; as released they do nothing",
        holds=figures["factor_before_norm_relative_change"] < 1e-4
        and figures["factor_after_norm_relative_change"] > 1e-2,
        figures=figures,
        setting="random weights, factors of 1 against factors between 0.2 and 5, float64; holds: relative change of the "
        "output below 1e-4 in the authors' order and above 1e-2 in the other",
    )


_WRONG_GRADIENTS = (
    "they are not the slope of the recorded function, because PyTorch's BatchNorm2d in evaluation mode misreads, on CPU and "
    "for a single image, the strides of the gradient that comes from the mean over transposed tokens. The check by "
    "differences stands in"
)

PROOFS = Proofs(
    recordings=(
        Recorded("fcaformer.block", build=_block, run=_run_block, keys=FcaFormer.authors_keys),
        Recorded("fcaformer.model", build=_model, run=_run_model, no_gradients=_WRONG_GRADIENTS),
    ),
    checks=(dense_over_both_kinds, gradient_by_differences),
    recipe=recipe,
    claims=(cross_tokens_help, calibration),
)
