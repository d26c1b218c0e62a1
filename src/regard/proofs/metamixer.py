"""Proofs of MetaMixer: recordings of FFNet for images, super-resolution and series; folding; FFNet against attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from regard.flops import count_macs, count_params
from regard.layers import ConvNorm, Identity, RepConv, fuse
from regard.proofs.base import Check, Preset, Proofs, Recipe
from regard.proofs.experiments import over_variants, with_batch_statistics
from regard.proofs.recordings import Recorded
from regard.registry import get_system
from regard.systems.backbones._metamixer_series import FFNetSeries
from regard.systems.backbones.metamixer import FFNet, FFNetSR, FFNifiedAttention
from regard.systems.backbones.swin import WindowAttention
from regard.tasks import create_task
from regard.training import TrainConfig, seeded, train


def _channels_first(module: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return module(inputs["x"].movedim(1, -1)).movedim(-1, 1)


def _model(config: dict) -> FFNet:
    return FFNet(
        config["embed_dim"],
        config["depth"],
        channel_kernels=config["kernel_sizes"],
        mlp_ratio=config["expansion_ratios"][0],
        stem_dim=config["in_dim"],
        layer_scale=config["layer_scale_init_value"],
        num_classes=config["num_classes"],
    )


def _super_resolution(config: dict) -> FFNetSR:
    return FFNetSR(config["scale"], config["dim"], config["depth"], config["expansion_ratio"])


def _series(config: dict) -> FFNetSeries:
    return FFNetSeries(
        config["enc_in"],
        config["seq_len"],
        config["pred_len"],
        dim=config["dims"][0],
        depth=config["num_blocks"][0],
        kernel_size=config["large_size"][0],
        small_size=config["small_size"][0],
        mlp_ratio=config["ffn_ratio"],
        patch_size=config["patch_size"],
        patch_stride=config["patch_stride"],
    )


def memory_by_sums() -> Check:
    """The mixer against sums over taps: one kernel's responses at all places weight another kernel."""
    worst, generator = 0.0, torch.Generator().manual_seed(0)

    def correlate(x: Tensor, convolution: nn.Module) -> Tensor:
        spatial, sizes = x.shape[1:-1], convolution.weight.shape[2:]
        places = torch.cartesian_prod(*map(torch.arange, spatial)).view(-1, len(spatial)).tolist()
        out = convolution.bias.expand_as(x).clone()
        for here in places:
            for there in places:
                tap = tuple(b - a + size // 2 for a, b, size in zip(here, there, sizes, strict=True))
                if all(0 <= step < size for step, size in zip(tap, sizes, strict=True)):
                    weight = convolution.weight[(slice(None), 0, *tap)]
                    out[(slice(None), *here)] += weight * x[(slice(None), *there)]
        return out

    for spatial, size in (((1,), 7), ((9,), 5), ((4, 3), 3), ((3, 5), 7), ((2, 3, 2), 7)):
        x = torch.randn(2, *spatial, 4, generator=generator)
        mixer = seeded(partial(FFNifiedAttention, 4, kernel_size=size, axes=len(spatial)), 1)
        mixer = with_batch_statistics(mixer, x).double()
        plain, x = fuse(mixer), x.double()
        responses = correlate(plain.query(x), plain.key)
        expected = correlate(nn.functional.gelu(responses), plain.value)
        worst = max(worst, (mixer(x) - expected).abs().max().item())
    return Check(
        "FFNified attention is GELU between two sums over the taps of one kernel a channel",
        holds=worst < 1e-12,
        figures={"largest_error": worst},
        setting="float64, kernels of 3, 5 and 7 on maps of 1 to 3 axes, maps smaller than the kernel included",
    )


FOLDED = {"ffnet_1": 13_660_152, "ffnet_2": 26_908_440, "ffnet_3": 48_330_632, "ffnet_4": 79_200_360}
"""Parameters of the authors' models after their folding, which leaves the last BatchNorm."""


def folding() -> Check:
    """The folded model computes the same, and has as many parameters as the authors' folded models."""
    generator = torch.Generator().manual_seed(0)
    model = seeded(lambda: FFNet((8, 16), (1, 1), (3, 7), (7, 3), stem_dim=8, num_classes=5, layer_scale=0.5), 0)
    model = with_batch_statistics(model, torch.randn(8, 3, 32, 48, generator=generator)).double()
    x = torch.randn(4, 3, 40, 24, generator=generator).double()
    figures: dict[str, float | int] = {"largest_error": (model(x) - fuse(model)(x)).abs().max().item()}
    for variant in get_system("metamixer").variants:
        if variant.name in FOLDED:
            with torch.device("meta"):
                figures[variant.name] = count_params(fuse(variant.build(**variant.options)))
    return Check(
        "The deployed form, one kernel for each pair, computes the same with the authors' number of parameters",
        holds=figures["largest_error"] < 1e-10 and all(figures[name] == count for name, count in FOLDED.items()),
        figures=figures,
        setting="float64, random weights and statistics of BatchNorm",
    )


def _tiny(mixer: Callable[[int, int], nn.Module] | None = None, mlp_ratio: float = 2.0) -> FFNet:
    """Two stages of two blocks, on scenes of 32 pixels 8 x 8 and 4 x 4 tokens; `mixer(dim, index)` replaces the mixers."""
    model = FFNet((24, 48), (2, 2), (7, 7), (3, 3), mlp_ratio, stem_dim=16, num_classes=10)
    if mixer is not None:
        for stage, dim in zip(model.stages, model.feature_dims, strict=True):
            for index, block in enumerate(stage):
                block.token_mixer = mixer(dim, index)
    # A deviation of 0.02 suits hundreds of channels; with 24 the signal would take long to grow.
    return model.apply(lambda module: module.reset_parameters() if isinstance(module, (nn.Linear, nn.Conv2d)) else None)


def recipe(preset: Preset) -> Recipe:
    """A two-stage FFNet on digit scenes; "paper" is FFNet-1 with the schedule of the paper."""
    if preset == "paper":
        task = create_task("scenes", kind="local", size=256, label_smoothing=0.1)
        model = seeded(lambda: FFNet(channel_kernels=(3, 3, 3, 3), drop_path_rate=0.1, num_classes=task.num_classes), 0)
        return Recipe(model, task, TrainConfig(steps=375_000, batch_size=1024, lr=1e-3, warmup=5 / 300))
    task = create_task("scenes", kind="local")
    steps = {"smoke": 2, "small": 400}[preset]
    return Recipe(seeded(_tiny, 0), task, TrainConfig(steps=steps, batch_size=32, lr=2e-3))


def _window(dim: int, index: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(dim), WindowAttention(dim, dim // 12, window_size=4, shift=index % 2 == 1))


def _one_kernel(dim: int, index: int) -> nn.Module:
    return nn.Sequential(ConvNorm(dim, dim), RepConv(dim))


def without_attention(preset: Preset) -> Check:
    """One host, budget and data at equal multiply-adds; the token mixer differs, and the MLPs make up for its cost."""
    smoke = preset == "smoke"
    task = create_task("scenes", kind="local", **({"train_items": 64, "eval_items": 32} if smoke else {}))
    config = TrainConfig(steps=2 if smoke else 200, batch_size=32, lr=2e-3)
    seeds = (0,) if smoke else (0, 1, 2)
    builds = {
        "ffnified": _tiny,
        "window_attention": partial(_tiny, _window, 37 / 24),
        "one_kernel": partial(_tiny, _one_kernel, 66 / 24),
        "identity": partial(_tiny, lambda dim, index: Identity(dim), 97 / 24),
    }
    figures, mean = over_variants(builds, task, config, seeds)
    for name, build in builds.items():
        figures[f"{name}_parameters"] = count_params(build())
        figures[f"{name}_multiply_adds"] = count_macs(fuse(build()), torch.zeros(1, 3, 32, 32))
    others = max(mean["one_kernel"], mean["identity"])
    return Check(
        "At equal cost FFNified attention is as good as window attention, and better than one kernel or no mixing",
        holds=mean["ffnified"] >= mean["window_attention"] - 0.005 and mean["ffnified"] > others,
        figures=figures,
        setting=f"{task.description} One FFNet of two stages on 8 x 8 and 4 x 4 tokens, windows of 4 x 4, every second one "
        f"shifted, {config.steps} steps of {config.batch_size}, seeds {list(seeds)}, accuracy, multiply-adds of the "
        "folded models; holds if the mean lies at most 0.005 below window attention and above the others",
    )


def enlarges(preset: Preset) -> Check:
    """The same block without norms in a small super-resolution network, against bicubic interpolation."""
    smoke = preset == "smoke"
    task = create_task("super_resolution", scale=2, patch=16 if smoke else 24)
    config = TrainConfig(steps=2 if smoke else 300, batch_size=8, lr=1e-3, weight_decay=0.0, betas=(0.9, 0.99))
    model = seeded(lambda: FFNetSR(2, 24, 4), 0)
    for parameter in model.last.parameters():  # begins as the image with its pixels repeated
        nn.init.zeros_(parameter)
    psnr = train(model, task, config, cpu=True).metrics["psnr"]
    bicubic = task.trivial()["psnr"]
    return Check(
        "The same mixer restores images: a small FFNet enlarges photographs better than bicubic interpolation",
        holds=psnr > bicubic,
        figures={"psnr": round(psnr, 3), "bicubic_psnr": round(bicubic, 3)},
        setting=f"{task.description} Four blocks of 24 channels, begun as pixel repetition, {config.steps} steps of "
        f"{config.batch_size}, seed 0",
    )


PROOFS = Proofs(
    recordings=(
        Recorded(
            "metamixer.mech_token_mixer7",
            build=lambda config: FFNifiedAttention(config["dim"], kernel_size=config["ks1"]),
            run=_channels_first,
        ),
        Recorded("metamixer.model", build=_model),
        Recorded("metamixer.sr_x2", build=_super_resolution),
        Recorded("metamixer.ts_model", build=_series),
    ),
    checks=(memory_by_sums, folding),
    recipe=recipe,
    claims=(without_attention, enlarges),
)
