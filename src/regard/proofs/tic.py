"""Proofs of TiC: recordings of operator and layer; any size at linear cost; shifts connect distant borders."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.flops import count_params
from regard.layers import Conv2d, SoftmaxAttention, depthwise
from regard.measure import interleaved_seconds, spread
from regard.proofs.base import Check, Preset, Proofs, Recipe
from regard.proofs.experiments import CornerReader, FarMark, cost_growth, over_variants
from regard.proofs.recordings import Recorded
from regard.skeletons import Place
from regard.systems.backbones.tic import MSAConv, TiC, convolutional_attention
from regard.tasks import create_task
from regard.training import TrainConfig, evaluate, seeded, train


def _around(x: Tensor, kernel: Sequence[int], dilation: Sequence[int] = (1, 1)) -> Tensor:
    """What a convolution sees of `(B, H, W, ...)` at each place, zeros outside: `(B, H, W, places, ...)`."""
    height, width = x.shape[1:3]
    reach = [gap * (size // 2) for size, gap in zip(kernel, dilation, strict=True)]
    padded = F.pad(x, [0, 0] * (x.dim() - 3) + [reach[1], reach[1], reach[0], reach[0]])
    steps = product(*(range(0, gap * size, gap) for size, gap in zip(kernel, dilation, strict=True)))
    return torch.stack([padded[:, row : row + height, column : column + width] for row, column in steps], 3)


class _Core(nn.Module):
    """The operator on channels-first maps, with the logits before its softmax computed apart."""

    def __init__(self, kernel_size: Sequence[int], dilation: int) -> None:
        super().__init__()
        self.kernel_size, self.dilation = kernel_size, (dilation, dilation)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        q, k, v = (x.movedim(1, -1) for x in (q, k, v))
        dots = (_around(k, self.kernel_size, self.dilation) * q.unsqueeze(3)).sum(-1) * q.shape[-1] ** -0.5
        heads = (x.unsqueeze(-2) for x in (q, k, v))
        out = convolutional_attention(*heads, kernel_size=self.kernel_size, dilation=self.dilation)
        return {"dots": dots.movedim(-1, 1), "out": out.squeeze(-2).movedim(-1, 1)}


def windows_by_definition() -> Check:
    """The operator against sums over the places of the kernel, outputs and gradients."""
    generator = torch.Generator().manual_seed(0)
    errors = {"output_error": 0.0, "gradient_error": 0.0}
    cases = (((6, 7), (3, 3), (1, 1)), ((5, 8), (5, 1), (1, 1)), ((7, 6), (3, 5), (2, 1)), ((2, 3), (3, 3), (2, 3)))
    for spatial, kernel, dilation in cases:
        qkv = [
            torch.randn(2, *spatial, 3, 4, dtype=torch.float64, generator=generator, requires_grad=True)
            for _ in range(3)
        ]
        q, k, v = qkv
        logits = (_around(k, kernel, dilation) * q.unsqueeze(3)).sum(-1) / 2
        expected = (logits.softmax(3).unsqueeze(-1) * _around(v, kernel, dilation)).sum(3)
        ours = convolutional_attention(q, k, v, kernel_size=kernel, dilation=dilation)
        weight = torch.randn(ours.shape, dtype=torch.float64, generator=generator)
        pair = [torch.autograd.grad((out * weight).sum(), qkv, retain_graph=True) for out in (ours, expected)]
        errors["output_error"] = max(errors["output_error"], (ours - expected).abs().max().item())
        worst = max((a - b).abs().max().item() for a, b in zip(*pair, strict=True))
        errors["gradient_error"] = max(errors["gradient_error"], worst)
    return Check(
        "attention in the window of a convolution equals its sums over places, with zeros outside of the map",
        holds=max(errors.values()) < 1e-12,
        figures=errors,
        setting="square, rectangular and dilated kernels, one map smaller than the kernel, 3 heads, float64, limit 1e-12",
    )


_TINY: dict[str, Any] = {"dims": (24, 48), "depths": (2, 2), "num_heads": (2, 4), "mlp_ratio": 2.0, "in_chans": 1}


def recipe(preset: Preset) -> Recipe:
    """Two small stages on handwritten digits; "paper" is the reconstruction on scenes of 224 pixels."""
    if preset == "paper":
        task = create_task("scenes", size=224)
        model = seeded(lambda: TiC(num_classes=task.num_classes, drop_path_rate=0.1), 0)
        return Recipe(model, task, TrainConfig(steps=2400, batch_size=1024, lr=1e-3, warmup=20 / 300))
    task = create_task("digits", channels=1)
    model = seeded(lambda: TiC(num_classes=10, **_TINY), 0)
    return Recipe(model, task, TrainConfig(steps=2 if preset == "smoke" else 200, batch_size=32, lr=4e-3))


def any_size(preset: Preset) -> Check:
    """Growth of cost, one trained model on other sizes, and whether the layer moves with what it sees."""
    sides = [14, 28] if preset == "smoke" else [28, 42, 56, 84]
    figures: dict[str, Any] = cost_growth(
        {"msa_conv": lambda side: MSAConv(32, 2), "dense": lambda side: SoftmaxAttention(32, 2)}, sides, dim=32
    )
    for side in sides:
        x = torch.randn(1, side, side, 32)
        mixers = {"msa_conv": MSAConv(32, 2).eval(), "dense": SoftmaxAttention(32, 2).eval()}
        with torch.no_grad():
            times = interleaved_seconds({name: partial(mixer, x) for name, mixer in mixers.items()}, rounds=3)
        ratio = spread(times["msa_conv"])["median"] / spread(times["dense"])["median"]
        figures[f"time_over_dense_{side}_squared"] = round(ratio, 3)
    layer = seeded(lambda: MSAConv(8, 2), 0).double()
    x = torch.randn(1, 12, 12, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moved = layer(x.roll((1, 2), (1, 2))).roll((-1, -2), (1, 2))
    figures["change_inside_when_moved"] = (moved - layer(x))[:, 4:-4, 4:-4].abs().max().item()
    built = recipe(preset)
    train(built.model, built.task, built.config, cpu=True)
    for size in (24, 32, 40, 48):
        at_size = create_task("digits", size=size, channels=1)
        figures[f"accuracy_at_{size}_pixels"] = round(evaluate(built.model, at_size)["accuracy"], 4)
    return Check(
        "MSA-Conv takes images of any size with the same weights, at linear cost, and moves with what it sees",
        holds=abs(figures["msa_conv_macs_growth"] - 1) < 0.05
        and figures["dense_macs_growth"] > 1.5
        and figures["change_inside_when_moved"] < 1e-12,
        figures=figures,
        setting=f"exponents of tokens over maps of {sides} squared, dim 32, windows of 3 x 3; shift by (1, 2) away from the "
        "borders; accuracy of a small TiC trained on digits of 32 pixels. Holds by multiply-adds (exponent 1.00 within "
        "0.05 against more than 1.5) and by the shift (below 1e-12)",
    )


def _msa(shift: bool, at: Place) -> nn.Module:
    return MSAConv.in_stack(at.index if shift else 0, at.grid, at.dim, at.num_heads)


def _convolution(at: Place) -> nn.Module:
    """Two 3 x 3 convolutions, as far as a window and the convolution after it see; linear layers for equal parameters."""
    linear = [part for _ in range(3) for part in (nn.Linear(at.dim, at.dim), nn.ReLU())]
    return nn.Sequential(depthwise(at.dim, 3), *linear, Conv2d(at.dim, at.dim, 3, padding=1, bias=False), nn.ReLU())


def shifts_reach_far(preset: Preset) -> Check:
    """Three blocks that see 6 tokens far, and a mark 8 to 11 tokens away, near the opposite border."""
    smoke = preset == "smoke"
    task = FarMark(aligned=True, train_items=64, eval_items=64) if smoke else FarMark(aligned=True)
    config = TrainConfig(steps=2 if smoke else 300, batch_size=32, lr=4e-3)
    seeds = (0,) if smoke else (0, 1, 2)
    builds = {
        "msa_conv_shifted": partial(CornerReader, partial(_msa, True), depth=3),
        "msa_conv": partial(CornerReader, partial(_msa, False), depth=3),
        "convolution": partial(CornerReader, _convolution, depth=3),
    }
    figures, mean = over_variants(builds, task, config, seeds)
    figures |= {f"{name}_parameters": count_params(build()) for name, build in builds.items()}
    return Check(
        "Cyclic shifts in several directions bring what three layers of windows or convolutions alone cannot reach",
        holds=mean["msa_conv_shifted"] >= 0.9 and mean["msa_conv"] <= 0.35 and mean["convolution"] <= 0.35,
        figures=figures,
        setting=f"{task.description} Three blocks of 24 channels, 3 x 3 windows, {config.steps} steps of 32, seeds "
        f"{list(seeds)}, accuracy, chance 0.25; holds: mean with shifts 0.9 or more, the others at most 0.35",
    )


PROOFS = Proofs(
    recordings=(
        Recorded(
            "tic.core",
            build=lambda config: _Core(config["kernel_size"], config["dilation"]),
            run=lambda core, inputs: core(inputs["q"], inputs["k"], inputs["v"]),
        ),
        Recorded(
            "tic.layer",
            build=lambda config: MSAConv(
                config["input_channel"], kernel_size=config["kernel_size"], out_dim=config["output_channel"]
            ),
            run=lambda layer, inputs: layer(inputs["x"].movedim(1, -1)).movedim(-1, 1),
        ),
    ),
    checks=(windows_by_definition,),
    recipe=recipe,
    claims=(any_size, shifts_reach_far),
)
