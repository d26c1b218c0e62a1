"""Proofs of ELA: recordings of the four versions and of MobileNetV2 with them; small batches; accuracy; cost."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.flops import count_macs, count_params
from regard.layers import BatchNorm, Conv2d, SqueezeExcite
from regard.measure import interleaved_seconds
from regard.proofs.base import Check, Preset, Proofs, Recipe
from regard.proofs.experiments import over_variants
from regard.proofs.recordings import Recorded
from regard.systems.backbones.ela import VERSIONS, EfficientLocalAttention, ELAMobileNetV2
from regard.tasks import create_task
from regard.training import TrainConfig, seeded


def _module(config: dict) -> EfficientLocalAttention:
    return EfficientLocalAttention(config["channel"], version=config["version"])


def _channels_first(module: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return module(inputs["x"].movedim(1, -1)).movedim(-1, 1)


def _model(config: dict) -> ELAMobileNetV2:
    layers = ((8, 1), (8, 2), (8, 1), (8, 2), (8, 1), (8, 1), (16, 2), (16, 1))  # the published row at width 0.25
    return ELAMobileNetV2(
        layers=layers[: config["blocks"]], dim=8, features=config["features"], num_classes=config["num_classes"]
    )


def by_loops() -> Check:
    """The module against means, taps and statistics taken one by one, on maps of 1 to 3 axes with unequal sides."""
    worst, generator = 0.0, torch.Generator().manual_seed(0)
    cases = [(version, (4, 3), {}) for version in VERSIONS]
    cases += [("b", (1,), {}), ("s", (5,), {}), ("l", (2, 3, 2), {"norm_groups": 4}), ("t", (1, 1), {})]
    cases += [("b", (9, 2), {"share": False, "norm_groups": 8}), ("s", (2, 1, 3), {"share": False})]
    for version, spatial, options in cases:
        build = partial(EfficientLocalAttention, 32, version=version, axes=len(spatial), **options)
        mixer = seeded(build, 0).double().requires_grad_(False)
        for parameter in mixer.parameters():
            nn.init.normal_(parameter, 0.3, generator=generator)
        x = torch.randn(2, *spatial, 32, dtype=torch.float64, generator=generator)
        expected = x.clone()
        for axis, length in enumerate(spatial):
            conv, norm = (part[0 if mixer.share else axis] for part in (mixer.convs, mixer.norms))
            size, width = conv.weight.shape[2], conv.weight.shape[1]
            strips = [x.select(1 + axis, i).flatten(1, -2).mean(1) if x.dim() > 3 else x[:, i] for i in range(length)]
            z = torch.zeros(2, length, 32, dtype=torch.float64)
            for i in range(length):
                for tap in range(size):
                    source = i + tap - size // 2
                    if 0 <= source < length:
                        for channel in range(32):
                            group = slice(channel // width * width, channel // width * width + width)
                            z[:, i, channel] += strips[source][:, group] @ conv.weight[channel, :, tap]
            members = 32 // norm.num_groups
            for sample in range(2):
                for first in range(0, 32, members):
                    values = z[sample, :, first : first + members]
                    middle = values.mean()
                    spread = ((values - middle) ** 2).mean()
                    z[sample, :, first : first + members] = (values - middle) / (spread + norm.eps) ** 0.5
            weight = 1 / (1 + (-(z * norm.weight + norm.bias)).exp())
            for i in range(length):
                expected.select(1 + axis, i).mul_(weight[:, i].view(2, *[1] * (len(spatial) - 1), 32))
        worst = max(worst, (mixer(x) - expected).abs().max().item())
    return Check(
        "The module equals its definition as loops over strips, taps, channels and groups",
        holds=worst < 1e-12,
        figures={"largest_error": worst, "configurations": len(cases)},
        setting="float64, 32 channels, four versions, maps of 1 to 3 axes with unequal sides and of one token, one "
        "convolution for all axes and one for each; limit 1e-12",
    )


def recipe(preset: Preset) -> Recipe:
    """A small MobileNetV2 with ELA on handwritten digits; "paper" is the released training of the published one."""
    if preset == "paper":
        task = create_task("digits", size=224)
        model = seeded(lambda: ELAMobileNetV2(num_classes=task.num_classes), 0)
        config = TrainConfig(steps=1_000_800, batch_size=256, lr=0.1, optimizer="sgd", weight_decay=1e-4)
        return Recipe(model, task, config)
    task = create_task("digits", size=24, channels=1)
    layers = ((16, 1), (32, 2), (32, 1), (64, 2), (64, 1))
    build = partial(
        ELAMobileNetV2, layers=layers, dim=16, expand_ratio=2, features=128, stem_stride=1, num_classes=10, in_chans=1
    )
    return Recipe(seeded(build, 0), task, TrainConfig(steps=2 if preset == "smoke" else 150, batch_size=32, lr=4e-3))


class CoordinateAttention(nn.Module):
    """What ELA changes (Hou et al., 2021, arXiv 2103.02907, section 3.2): profiles together, squeezed, with BatchNorm."""

    def __init__(self, dim: int, reduction: int = 32) -> None:
        super().__init__()
        hidden = max(8, dim // reduction)
        self.squeeze, self.norm = nn.Linear(dim, hidden), BatchNorm(hidden)
        self.rows, self.columns = nn.Linear(hidden, dim), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, W, dim)` -> the same shape."""
        both = F.hardswish(self.norm(self.squeeze(torch.cat([x.mean(2), x.mean(1)], 1))))
        rows, columns = both.split([x.shape[1], x.shape[2]], 1)
        return x * self.rows(rows).sigmoid()[:, :, None] * self.columns(columns).sigmoid()[:, None]


class CBAM(nn.Module):
    """Weights of channels, then of places, each from mean and maximum (Woo et al., 2018, arXiv 1807.06521, section 3)."""

    def __init__(self, dim: int, reduction: int = 32) -> None:
        super().__init__()
        self.channels = nn.Sequential(
            nn.Linear(dim, dim // reduction, bias=False), nn.ReLU(), nn.Linear(dim // reduction, dim, bias=False)
        )
        self.places = Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, W, dim)` -> the same shape."""
        weight = (self.channels(x.mean((1, 2))) + self.channels(x.amax((1, 2)))).sigmoid()
        x = x * weight[:, None, None]
        return x * self.places(torch.stack([x.mean(-1), x.amax(-1)], -1)).sigmoid()


_GATES: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda dim: nn.Identity(),
    "squeeze_excite": lambda dim: SqueezeExcite(dim, max(8, dim // 16)),
    "coordinate": CoordinateAttention,
    "ela": lambda dim: EfficientLocalAttention(dim, version="l"),
}


class _Norm(nn.GroupNorm):
    """GroupNorm of 8 groups, channels last: nothing in the host depends on the batch."""

    def __init__(self, dim: int) -> None:
        super().__init__(8, dim)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(-1, 1)).movedim(1, -1)


class _Residual(nn.Module):
    """ReLU(x + gate(norm(conv(ReLU(norm(conv(x)))))))."""

    def __init__(self, dim: int, gate: nn.Module) -> None:
        super().__init__()
        convs = [Conv2d(dim, dim, 3, padding=1, bias=False) for _ in range(2)]
        self.branch = nn.Sequential(convs[0], _Norm(dim), nn.ReLU(), convs[1], _Norm(dim), gate)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.branch(x))


class _Net(nn.Module):
    """A small residual network: two blocks on 16 x 16 and on 8 x 8 positions."""

    def __init__(self, gate: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(Conv2d(3, 16, 3, stride=2, padding=1, bias=False), _Norm(16), nn.ReLU(), _Residual(16, gate(16))),
            *(Conv2d(16, 32, 3, stride=2, padding=1, bias=False), _Norm(32), nn.ReLU(), _Residual(32, gate(32))),
        )
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, 3, H, W)` -> logits `(B, 10)`."""
        return self.head(self.body(x.movedim(1, -1)).mean((1, 2)))


_SEEDS = (0, 1, 2)
_SEEN = 2400
"""Images that every run sees, whatever the batch."""


@cache
def _runs(preset: Preset, gates: tuple[str, ...], batch_size: int) -> tuple[dict, dict[str, float], str]:
    """The small network with each gate, after as many images: figures, means, and the data."""
    smoke = preset == "smoke"
    task = create_task("scenes", kind="local", **({"train_items": 64, "eval_items": 32} if smoke else {}))
    # The rate follows the square root of the batch, as suits Adam.
    config = TrainConfig(
        steps=2 if smoke else _SEEN // batch_size, batch_size=batch_size, lr=4e-3 * (batch_size / 32) ** 0.5
    )
    builds = {gate: partial(_Net, _GATES[gate]) for gate in gates}
    figures, means = over_variants(builds, task, config, _SEEDS[:1] if smoke else _SEEDS)
    return figures, means, task.description


def more_accurate(preset: Preset) -> Check:
    """The same network with ELA, its predecessor, squeeze-and-excitation, or nothing in its blocks."""
    figures, means, data = _runs(preset, tuple(_GATES), 32)
    parameters = {f"{name}_parameters": count_params(_Net(gate)) for name, gate in _GATES.items()}
    return Check(
        "ELA makes a convolutional network more accurate than squeeze-and-excitation, coordinate attention or nothing do",
        holds=means["ela"] > max(mean for name, mean in means.items() if name != "ela"),
        figures=figures | parameters,
        setting=f"{data} Two residual blocks of 16 and 32 channels with GroupNorm, ELA-L before the sum, {_SEEN} images in "
        f"batches of 32 (a short training: it compares how fast they learn), seeds {list(_SEEDS)}, accuracy, chance 0.1; "
        "holds if the mean of ELA is the highest",
    )


def robust_to_small_batches(preset: Preset) -> Check:
    """What a batch of 2 costs ELA (GroupNorm) and coordinate attention (BatchNorm) in a host that does not mind."""
    _, large, data = _runs(preset, tuple(_GATES), 32)
    figures, small, _ = _runs(preset, ("coordinate", "ela"), 2)
    drops = {name: large[name] - small[name] for name in small}
    return Check(
        "With GroupNorm in place of BatchNorm a batch of 2 costs ELA less accuracy than coordinate attention (section 3.3)",
        holds=drops["ela"] < drops["coordinate"],
        figures={
            **{f"{name}_batch_2": value for name, value in figures.items()},
            **{f"{name}_batch_32_mean": round(large[name], 4) for name in small},
            **{f"{name}_drop": round(drop, 4) for name, drop in drops.items()},
        },
        setting=f"{data} The network of the claim before, {_SEEN} images in batches of 32 and of 2, rate by the root of the "
        f"batch, seeds {list(_SEEDS)}; holds if the drop of ELA's mean is smaller",
    )


def light(preset: Preset) -> Check:
    """Time, multiply-adds and parameters beside coordinate attention and CBAM."""
    batch, dim, side = (1, 64, 14) if preset == "smoke" else (8, 256, 56)
    gates: dict[str, nn.Module] = {
        "ela_b": EfficientLocalAttention(dim, version="b"),
        "coordinate": CoordinateAttention(dim),
        "cbam": CBAM(dim),
    }
    x = torch.randn(batch, side, side, dim)
    with torch.no_grad():
        runs = {name: partial(gate.eval(), x) for name, gate in gates.items()}
        times = interleaved_seconds(runs, rounds=21, seconds=6)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratio = medians["ela_b"] / medians["coordinate"]
    return Check(
        "ELA costs no more time than coordinate attention",
        holds=ratio <= 1.05,
        figures={
            "time_over_coordinate": round(ratio, 3),
            "time_over_cbam": round(medians["ela_b"] / medians["cbam"], 3),
            **{f"{name}_parameters": count_params(gate) for name, gate in gates.items()},
            **{f"{name}_multiply_adds": count_macs(gate, x[:1]) for name, gate in gates.items()},
        },
        setting=f"forward on {batch} maps of {side} x {side} x {dim}, reduction 32, medians of runs in turns; holds if "
        "the ratio is at most 1.05",
    )


PROOFS = Proofs(
    recordings=(
        *(Recorded(f"ela.module_{version}", build=_module, run=_channels_first) for version in VERSIONS),
        Recorded("ela.model_mobilenet", build=_model),
    ),
    checks=(by_loops,),
    recipe=recipe,
    claims=(more_accurate, robust_to_small_batches, light),
)
