"""Proofs of Hyena N-D: recordings of the operator and the model; few images; hybrids; growth of cost."""

from __future__ import annotations

import itertools
import math
import statistics
from functools import cache, partial

import torch
from torch import Tensor, nn

from regard.flops import count_macs, count_params
from regard.layers import SoftmaxAttention
from regard.measure import growth, interleaved_seconds
from regard.proofs.base import Check, Preset, Proofs, Recipe
from regard.proofs.experiments import TINY_DEIT, over_variants, reach, tiny_deit_config
from regard.proofs.recordings import Recorded
from regard.systems.backbones.hyena_nd import HyenaDeiT, HyenaND
from regard.tasks import create_task
from regard.training import TrainConfig, seeded

_DIRECTIONS = {"4dir": "all", "parallel": "parallel"}


def _operator(config: dict) -> HyenaND:
    return HyenaND(
        config["d_model"],
        size=config["l_max"],
        kernel="joint" if config.get("hyena2d_filter") else "product",
        hidden=config["filter_order"],
        directions=_DIRECTIONS.get(config.get("directional_mode"), "forward"),
        authors_quirks=True,
    )


def _run_operator(mixer: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    x = inputs["x"]
    if x.dim() == 4:
        return mixer(x)
    side = math.isqrt(x.shape[1])  # the recording of "parallel" has its tokens in a row
    return mixer(x.unflatten(1, (side, side))).flatten(1, 2)


def _model(config: dict) -> HyenaDeiT:
    return HyenaDeiT(
        config["embed_dim"],
        config["depth"],
        hidden=config["args"]["hyena_filter_order"],
        authors_quirks=True,
        mlp_ratio=config["mlp_ratio"],
        patch_size=config["args"]["patch_size"],
        img_size=config["img_size"],
        num_classes=config["num_classes"],
    )


def _places(spatial: tuple[int, ...]) -> list[tuple[int, ...]]:
    return list(itertools.product(*map(range, spatial)))


def _tap(mixer: HyenaND, place: tuple[int, ...]) -> Tensor:
    """One tap of the kernels from its coordinates: (channels)."""
    kernel = mixer.filter
    if hasattr(kernel, "kernel"):
        inside = all(step < length for step, length in zip(place, kernel.kernel.shape, strict=False))
        return kernel.kernel[place] if inside else torch.zeros_like(mixer.skip)

    def code(step: int) -> Tensor:
        if step < kernel.size:
            return kernel.positions[step]
        angle = 1e-4 * 2 * math.pi * step / kernel.size
        return torch.tensor([step / (kernel.size - 1), math.cos(angle), -math.sin(angle)], dtype=mixer.skip.dtype)

    def part(index: int, steps: tuple[int, ...]) -> Tensor:
        h = torch.cat([code(step) for step in steps])
        for layer in kernel.nets[index][:3]:
            h = torch.sin(kernel.freq * (layer.weight @ h + layer.bias))
        h, window = kernel.nets[index][3].weight @ h, kernel.windows[index]
        if window.kind == "none":
            return h
        fade = torch.ones_like(h)
        for axis, step in enumerate(steps):
            if window.kind == "symmetric":
                fade = fade * torch.exp(-window.rates0.abs() * step)
            else:
                fade = fade * torch.exp(-getattr(window, f"rates{axis}").abs() * step / (kernel.size - 1))
        fade = fade.sqrt() if window.kind == "sqrt" else fade
        return h * (fade if window.shift is None else fade + window.shift)

    if len(kernel.nets) == 1:
        return part(0, place)
    return math.prod((part(axis, (step,)) for axis, step in enumerate(place)), start=torch.ones_like(mixer.skip))


def _quadrant(mixer: HyenaND, v: Tensor, index: int, turned: tuple[int, ...]) -> Tensor:
    """Convolution `index` as a sum over all pairs of places; along the axes in `turned` it looks the other way."""
    channels = slice(index * mixer.dim, (index + 1) * mixer.dim)
    places = _places(tuple(v.shape[1:-1]))
    taps = {place: _tap(mixer, place)[channels] for place in places}
    out = torch.zeros_like(v)
    for here, there in itertools.product(places, places):
        steps = [b - a if axis in turned else a - b for axis, (a, b) in enumerate(zip(here, there, strict=True))]
        if min(steps) >= 0:
            out[(slice(None), *here)] += taps[tuple(steps)] * v[(slice(None), *there)]
    if mixer.authors_quirks:
        out = out / (2 * v.shape[-2])
    return out + mixer.skip[channels] * v


def _slowly(mixer: HyenaND, x: Tensor) -> Tensor:
    """The operator by its equations: one place, tap, group and quadrant after the other."""
    axes, dim, groups = mixer.axes, mixer.dim, mixer.groups
    u = x @ mixer.proj_in.weight.T + mixer.proj_in.bias
    short = mixer.short.bias.expand(*x.shape[:-1], -1).clone()
    back = 2 if mixer.causal else 1
    for here in _places(tuple(x.shape[1:-1])):
        for tap in itertools.product(range(3), repeat=axes):
            there = tuple(a + step - back for a, step in zip(here, tap, strict=True))
            if all(0 <= b < length for b, length in zip(there, x.shape[1:-1], strict=True)):
                source = u[(slice(None), *there)].repeat_interleave(groups, -1)
                short[(slice(None), *here)] += mixer.short.weight[(slice(None), 0, *tap)] * source
    every, quadrants = tuple(range(axes)), [()]
    if mixer.directions == "backward":
        quadrants = [every]
    elif mixer.directions.startswith("all"):
        middle = {1: [], 2: [(1,), (0,)], 3: [(2,), (1,), (0,), (1, 2), (0, 2), (0, 1)]}[axes]
        quadrants = [(), every, *middle]
    outs = []
    for group in range(groups):
        first = group * (mixer.order + 1) * dim
        *gates, value = (short[..., first + i * dim : first + (i + 1) * dim] for i in range(mixer.order + 1))
        for turned in quadrants:
            v = value
            for index, gate in enumerate(reversed(gates[1:])):
                v = _quadrant(mixer, v * gate, index, turned)
            outs.append(v * gates[0])
    if mixer.directions == "all":
        y = sum(weight * out for weight, out in zip(mixer.mix.weight[0], outs, strict=True)) + mixer.mix.bias
    elif mixer.directions == "all_projected":
        weight = mixer.mix.weight.unflatten(1, (dim, len(outs)))
        y = sum(out @ weight[:, :, i].T for i, out in enumerate(outs)) + mixer.mix.bias
    else:
        y = torch.cat(outs, -1)
    return y @ mixer.proj_out.weight.T + mixer.proj_out.bias


def by_pairs() -> Check:
    """The operator against sums over all pairs of places, with kernels computed tap by tap."""
    worst, generator = 0.0, torch.Generator().manual_seed(0)
    cases = [
        ((1,), {}),
        ((6,), {"directions": "all", "order": 3, "kernel": "product"}),
        ((5,), {"causal": True, "size": 3}),
        ((3, 4), {"directions": "backward", "order": 4}),
        ((4, 3), {"directions": "all", "kernel": "product", "window": "learned"}),
        ((3, 3), {"directions": "all_projected", "window": "symmetric", "authors_quirks": True}),
        ((3, 2), {"directions": "parallel", "window": "sqrt", "authors_quirks": True, "order": 3}),
        ((4, 4), {"kernel": "direct", "authors_quirks": True, "size": 3}),
        ((3, 4), {"kernel": "direct", "order": 3}),
        ((3, 3), {"causal": True, "window": "none"}),
        ((2, 3, 2), {"directions": "all", "order": 3}),
        ((2, 2, 3), {"directions": "parallel", "kernel": "product"}),
    ]
    for spatial, options in cases:
        build = partial(HyenaND, 4, hidden=6, axes=len(spatial), **{"size": max(spatial), **options})
        mixer = seeded(build, 1).double().requires_grad_(False)
        x = torch.randn(2, *spatial, 4, dtype=torch.float64, generator=generator)
        worst = max(worst, (mixer(x) - _slowly(mixer, x)).abs().max().item())
    return Check(
        "The operator equals its equations, pair by pair and tap by tap",
        holds=worst < 1e-10,
        figures={"largest_error": worst, "configurations": len(cases)},
        setting="float64, limit 1e-10; maps of 1 to 3 axes, one token, maps larger than the built one, all kernels, windows "
        "and directions, orders 2 to 4",
    )


def quadrants() -> Check:
    """What one token sees in each mode, and what follows from a flip of the input, with the short filter out of the way."""
    x, here = torch.randn(1, 5, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), (2, 3)

    def built(directions: str) -> HyenaND:
        mixer = seeded(partial(HyenaND, 4, size=6, hidden=6, directions=directions), 1).double()
        with torch.no_grad():
            centre = mixer.short.weight[:, :, 1, 1].clone()
            mixer.short.weight.zero_()[:, :, 1, 1] = centre
        return mixer

    rows, columns = torch.arange(5)[:, None].expand(5, 6), torch.arange(6).expand(5, 6)
    forward, backward, every = built("forward"), built("backward"), built("all")
    before, after = (rows <= 2) & (columns <= 3), (rows >= 2) & (columns >= 3)
    seen = partial(reach, x=x, index=here, above=1e-12)  # a transform leaves rounding errors everywhere
    sees = seen(forward).equal(before) and seen(backward).equal(after)
    sees_all = [bool(seen(m).all()) for m in (every, nn.Sequential(backward, forward))]
    with torch.no_grad():
        every.mix.weight.fill_(0.3)
        flips = [(every(x.flip(axes)) - every(x).flip(axes)).abs().max().item() for axes in ((1,), (2,), (1, 2))]
    return Check(
        "One mode sees one quadrant; two in turns, or all at once, see everything; equal weights make a flip commute",
        holds=sees and all(sees_all) and max(flips) < 1e-12,
        figures={
            "quadrants_as_expected": sees,
            "all_sees_everything": sees_all[0],
            "backward_then_forward_see_everything": sees_all[1],
            "largest_change_by_flips": max(flips),
        },
        setting="Jacobian of token (2, 3) of 5 x 6, float64, 3 x 3 filter with its centre tap only; a token is seen "
        "if its derivative is above 1e-12, and so much may a flip change",
    )


def _tiny(attention: tuple[int, ...], mlp_ratio: float) -> HyenaDeiT:
    """`TINY_DEIT` without class token, whose blocks in `attention` attend."""
    model = HyenaDeiT(
        **{**TINY_DEIT, "mlp_ratio": mlp_ratio},
        attention_blocks=attention,
        hidden=16,
        num_classes=10,
    )
    # A deviation of 0.02 suits hundreds of channels; with 48 the kernels would start at next to nothing.
    model.apply(lambda module: module.reset_parameters() if isinstance(module, nn.Linear) else None)
    return model


def recipe(preset: Preset) -> Recipe:
    """Two blocks of Hyena on handwritten digits; "paper" is the published training of Hyena-DeiT-T."""
    if preset == "paper":
        task = create_task("digits", size=224, label_smoothing=0.1)
        model = seeded(lambda: HyenaDeiT(drop_path_rate=0.1, num_classes=task.num_classes), 0)
        return Recipe(model, task, TrainConfig(steps=12_700, batch_size=256, lr=2.5e-4, warmup=1 / 20))
    task = create_task("digits", size=24, channels=1)
    steps = {"smoke": 2, "small": 300}[preset]
    return Recipe(seeded(lambda: _tiny((), 2.0), 0), task, TrainConfig(steps=steps, batch_size=32, lr=4e-3))


@cache
def _few_images(preset: Preset) -> tuple[dict, dict[str, float], str]:
    """Hyena, attention and both in turn on the same 1,437 images: figures, means, setting."""
    task, config = create_task("digits", size=24, channels=1), tiny_deit_config(preset)
    seeds = (0,) if preset == "smoke" else (0, 1, 2)
    builds = {
        "hyena": partial(_tiny, (), 2.0),
        "hybrid": partial(_tiny, (1,), 2.33),
        "attention": partial(_tiny, (0, 1), 2.66),
    }
    figures, means = over_variants(builds, task, config, seeds)
    figures |= {f"{name}_parameters": count_params(build()) for name, build in builds.items()}
    setting = (
        f"{task.description} Two blocks of 48 channels, 36 tokens, the first token is read, equal parameters by the width of "
        f"the MLPs, {config.steps} steps of {config.batch_size}, lr {config.lr}, seeds {list(seeds)}, accuracy on 360 images"
    )
    return figures, means, setting


def better_with_few_images(preset: Preset) -> Check:
    """Hyena against attention in one host where data are few."""
    figures, means, setting = _few_images(preset)
    return Check(
        "Where images are few, Hyena N-D is more accurate than attention in the same vision transformer",
        holds=means["hyena"] >= means["attention"] + 0.02,
        figures=figures,
        setting=f"{setting}; holds if the mean of Hyena is at least 2 points above that of attention",
    )


def hybrid_is_best(preset: Preset) -> Check:
    """Hyena first and attention after, against either alone."""
    figures, means, setting = _few_images(preset)
    return Check(
        "Hyena N-D in the first layers and attention in the later ones is at least as good as either alone",
        holds=means["hybrid"] >= max(means["hyena"], means["attention"]),
        figures=figures,
        setting=f"{setting} (the same runs as of the claim before); holds if the mean of the hybrid is not below the others",
    )


def cost_grows_slowly(preset: Preset) -> Check:
    """Time and multiply-adds of the operator over growing maps, in turns with softmax attention."""
    sides, dim = ([14, 28] if preset == "smoke" else [14, 28, 56, 80]), 64
    tokens = [side * side for side in sides]
    seconds: dict[str, list[float]] = {"hyena": [], "attention": []}
    macs: dict[str, list[int]] = {"hyena": [], "attention": []}
    for side in sides:
        x = torch.randn(1, side, side, dim)
        mixers = {"hyena": HyenaND(dim, size=side), "attention": SoftmaxAttention(dim, 2)}
        with torch.no_grad():
            times = interleaved_seconds(
                {name: partial(m, x) for name, m in mixers.items()}, rounds=9, seconds=4, least=0.01
            )
        for name, mixer in mixers.items():
            seconds[name].append(statistics.median(times[name]))
            macs[name].append(count_macs(mixer, x))
    time_growth = {name: growth(tokens, values) for name, values in seconds.items()}
    macs_growth = {name: growth(tokens, values) for name, values in macs.items()}
    ratios = [a / b for a, b in zip(seconds["hyena"], seconds["attention"], strict=True)]
    cheaper = [side for side, ratio in zip(sides, ratios, strict=True) if ratio < 1]
    return Check(
        "The cost of Hyena N-D grows as N log N with the tokens, that of attention as N^2",
        holds=max(time_growth["hyena"], macs_growth["hyena"]) < 1.3
        and macs_growth["attention"] > 1.5
        and ratios[-1] < ratios[0],
        figures={
            **{f"{name}_time_growth": round(value, 2) for name, value in time_growth.items()},
            **{f"{name}_macs_growth": round(value, 3) for name, value in macs_growth.items()},
            "hyena_time_over_attention": [round(ratio, 3) for ratio in ratios],
            "first_side_where_hyena_is_faster": cheaper[0] if cheaper else "none",
        },
        setting=f"exponent of tokens fitted over maps of {sides} squared, one map of {dim} channels, two heads, forward, "
        "medians in turns; holds if both exponents of Hyena are below 1.3, that of attention's multiply-adds is above 1.5, and "
        "the time over attention's is less on the largest map than on the smallest",
    )


PROOFS = Proofs(
    recordings=(
        Recorded("hyena_nd.mech_product", build=_operator, run=_run_operator),
        Recorded("hyena_nd.mech_2d_4dir", build=_operator, run=_run_operator),
        Recorded("hyena_nd.mech_2d_parallel", build=_operator, run=_run_operator),
        Recorded("hyena_nd.model_seq", build=_model),
    ),
    checks=(by_pairs, quadrants),
    recipe=recipe,
    claims=(better_with_few_images, hybrid_is_best, cost_grows_slowly),
)
