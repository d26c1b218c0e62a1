"""Proofs of HorNet: recordings of the recursive gated convolution and the model; high order; linear cost."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from regard.flops import count_macs, count_params
from regard.layers import GlobalFilter, SoftmaxAttention, depthwise
from regard.proofs.base import Check, Preset, Proofs, Recipe
from regard.proofs.experiments import cost_growth, over_variants
from regard.proofs.recordings import Recorded
from regard.skeletons import SwinPyramid
from regard.systems.backbones.hornet import HorNet, RecursiveGatedConv
from regard.systems.backbones.swin import WindowAttention
from regard.tasks import create_task
from regard.tasks.images import DrawnImages, LabelledImages
from regard.training import TrainConfig, seeded


def _mixer(config: dict) -> RecursiveGatedConv:
    grid = (config["h"], 2 * config["w"] - 2) if "h" in config else None
    return RecursiveGatedConv(config["dim"], order=config["order"], scale=config["s"], filter_grid=grid)


def _model(config: dict) -> HorNet:
    orders = [int(entry.split("order=")[1].split(",")[0]) for entry in config["gnconv"]]
    filtered = [stage for stage, entry in enumerate(config["gnconv"]) if "GlobalLocalFilter" in entry]
    return HorNet(
        config["base_dim"],
        config["depths"],
        orders,
        filter_stages=filtered,
        img_size=64,
        num_classes=config["num_classes"],
    )


def _channels_first(module: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return module(inputs["x"].movedim(1, -1)).movedim(-1, 1)


def gates_by_loops() -> Check:
    """The mixer against its equation: explicit correlation around each token, and the gates one after the other."""
    worst, generator = 0.0, torch.Generator().manual_seed(0)
    for spatial, order, size in (((1,), 1, 3), ((6,), 2, 5), ((4, 3), 3, 7), ((2, 3, 2), 4, 3)):
        build = partial(RecursiveGatedConv, 8, order=order, kernel_size=size, axes=len(spatial))
        mixer, x = seeded(build, 1).double(), torch.randn(2, *spatial, 8, dtype=torch.float64, generator=generator)
        widths = [8 // 2 ** (order - 1 - k) for k in range(order)]
        whole = mixer.proj_in(x)
        p, r = whole[..., : widths[0]], whole[..., widths[0] :]
        gathered = mixer.spatial.bias.expand_as(r).clone()
        places = [
            tuple(place.tolist()) for place in torch.cartesian_prod(*map(torch.arange, spatial)).view(-1, len(spatial))
        ]
        for here in places:
            for there in places:
                tap = tuple(b - a + size // 2 for a, b in zip(here, there, strict=True))
                if all(0 <= step < size for step in tap):
                    gathered[(slice(None), *here)] += (
                        mixer.spatial.weight[(slice(None), 0, *tap)] * r[(slice(None), *there)]
                    )
        start = 0
        for k, width in enumerate(widths):
            p = (p if k == 0 else mixer.pws[k - 1](p)) * gathered[..., start : start + width] / 3
            start += width
        worst = max(worst, (mixer(x) - mixer.proj_out(p)).abs().max().item())
    return Check(
        "The recursive gated convolution equals its definition, tap by tap and gate by gate",
        holds=worst < 1e-12,
        figures={"largest_error": worst},
        setting="float64, orders 1 to 4, maps of 1 to 3 axes, one token and kernels larger than the map included",
    )


def filter_is_a_circular_convolution() -> Check:
    """GlobalFilter against a sum over all pairs of places with its kernel, on even and odd grids."""
    worst, generator = 0.0, torch.Generator().manual_seed(0)
    for grid in ((1,), (5,), (4, 6), (3, 5), (2, 3, 4)):
        layer = seeded(lambda g=grid: GlobalFilter(3, g), 0).double()
        x = torch.randn(2, *grid, 3, dtype=torch.float64, generator=generator)
        kernel, expected = layer.kernel(), torch.zeros_like(x)
        for place in torch.cartesian_prod(*map(torch.arange, grid)).view(-1, len(grid)).tolist():
            axes = tuple(range(1, 1 + len(grid)))
            expected += kernel[tuple(place)] * x.roll(place, axes)
        worst = max(worst, (layer(x) - expected).abs().max().item())
    return Check(
        "The global filter is a depthwise circular convolution with the kernel of its frequencies",
        holds=worst < 1e-12,
        figures={"largest_error": worst},
        setting="float64, grids of 1 to 3 axes with even and odd sides",
    )


def recipe(preset: Preset) -> Recipe:
    """A two-stage HorNet with a filter on handwritten digits; "paper" is HorNet-T with the schedule of the paper."""
    if preset == "paper":
        task = create_task("digits", size=224, label_smoothing=0.1)
        model = seeded(lambda: HorNet(drop_path_rate=0.2, num_classes=task.num_classes), 0)
        return Recipe(model, task, TrainConfig(steps=93_750, batch_size=4096, lr=4e-3, warmup=20 / 300, clip_norm=5.0))
    task = create_task("digits", size=16, channels=1)
    steps = {"smoke": 2, "small": 300}[preset]

    def build() -> HorNet:
        # The paper's layer scale of 1e-6 needs more steps than these runs have.
        return HorNet(
            24,
            (2, 2),
            (2, 3),
            filter_stages=(1,),
            patch_size=2,
            layer_scale=1.0,
            img_size=16,
            num_classes=10,
            in_chans=1,
        )

    return Recipe(seeded(build, 0), task, TrainConfig(steps=steps, batch_size=32, lr=2e-3))


class ThreeSigns(DrawnImages):
    """Three marks in a row, red or green, two tokens apart, over noise: is the number of red ones odd?

    The label is the product of three signs, so that no single mark and no pair of them tells anything. A mark is one token
    (2 x 2 pixels) of 8 x 8; the row lies anywhere.
    """

    num_classes = 2

    def __init__(self, train_items: int = 4096, eval_items: int = 512, seed: int = 0) -> None:
        super().__init__(16, train_items, eval_items, seed)

    @property
    def description(self) -> str:
        return "Three marks in a row, two tokens apart: is the number of red ones odd?"

    def draw(self, rng: np.random.Generator, count: int) -> LabelledImages:
        """Marks over noise."""
        images = rng.integers(0, 64, (count, 3, 16, 16), dtype=np.uint8)
        red, rows, columns = (rng.integers(0, high, shape) for high, shape in ((2, (count, 3)), (8, count), (4, count)))
        for image, colours, row, column in zip(images, red, rows, columns, strict=True):
            for index, colour in enumerate(colours):
                left = 2 * (column + 2 * index)
                image[colour, 2 * row : 2 * row + 2, left : left + 2] = 255
        return LabelledImages(images, red.sum(1) % 2, mean=0.1, std=0.15)


class PlainConv(nn.Module):
    """The same depthwise convolution between the same projections, without a gate."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj_in, self.spatial, self.proj_out = nn.Linear(dim, dim), depthwise(dim, 7), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, W, dim)` -> the same shape."""
        return self.proj_out(self.spatial(self.proj_in(x)))


def _one_block(order: int, hidden: int) -> SwinPyramid:
    """One block of 32 channels with a mixer of this order (0 is no gate) and an MLP of so many hidden channels."""
    model = SwinPyramid(
        mixer=lambda at: RecursiveGatedConv(at.dim, order=order) if order else PlainConv(at.dim),
        dim=32,
        depths=(1,),
        num_heads=(1,),
        mlp_ratio=hidden / 32,
        patch_size=2,
        img_size=16,
        num_classes=2,
    )
    # A deviation of 0.02 suits hundreds of channels; with 32 the products would take long to grow.
    model.apply(lambda module: module.reset_parameters() if isinstance(module, nn.Linear) else None)
    return model


def order_matters(preset: Preset) -> Check:
    """One block, budget and data at equal multiply-adds; the order of the gates differs, and the MLP makes up for its cost."""
    smoke = preset == "smoke"
    task = ThreeSigns(64, 32) if smoke else ThreeSigns()
    config = TrainConfig(steps=2 if smoke else 600, batch_size=32, lr=3e-3)
    seeds = (0,) if smoke else (0, 1, 2)
    hidden = {0: 80, 1: 64, 2: 44, 3: 36, 4: 32}
    builds = {f"order_{order}" if order else "no_gate": partial(_one_block, order, hidden[order]) for order in hidden}
    figures, mean = over_variants(builds, task, config, seeds)
    for name, build in builds.items():
        figures[f"{name}_parameters"] = count_params(build())
        figures[f"{name}_multiply_adds"] = count_macs(build(), torch.zeros(1, 3, 16, 16))
    return Check(
        "At equal cost a higher order is better where the answer is a product of several places (section 3.1)",
        holds=max(mean["order_3"], mean["order_4"]) >= mean["order_2"] >= mean["order_1"] > mean["no_gate"],
        figures=figures,
        setting=f"{task.description} One block of 32 channels on 8 x 8 tokens, {config.steps} steps of {config.batch_size}, "
        f"seeds {list(seeds)}, accuracy on {len(task.eval_set)} new images, chance 0.5; holds if the better of orders 3 and "
        "4, order 2, order 1 and no gate follow each other",
    )


def linear_cost(preset: Preset) -> Check:
    """Growth with the map, against window and dense attention, and the paper's bound on multiply-adds per token."""
    sides, dim = ([14, 28] if preset == "smoke" else [28, 42, 56, 84]), 64
    mixers = {
        "gnconv": lambda side: RecursiveGatedConv(dim, order=5),
        "window": lambda side: WindowAttention(dim, 2),
        "dense": lambda side: SoftmaxAttention(dim, 2),
    }
    figures = cost_growth(mixers, sides, dim=dim)
    spent = RecursiveGatedConv(dim, order=5).cost((28, 28)).macs / 28**2
    bound = dim * (2 * 7**2 + 11 / 3 * dim + 2)
    figures |= {"multiply_adds_per_token": spent, "bound_per_token": round(bound, 1)}
    return Check(
        "The cost of recursive gated convolution is linear in the map and below C(2 K^2 + 11/3 C + 2) per token (section 3.1)",
        holds=abs(figures["gnconv_macs_growth"] - 1) < 0.05 and figures["dense_macs_growth"] > 1.5 and spent < bound,
        figures=figures,
        setting=f"exponent of tokens fitted over maps of {sides} squared, {dim} channels, order 5, kernel 7; verdict on "
        "multiply-adds",
    )


PROOFS = Proofs(
    recordings=(
        Recorded("hornet.mech_gnconv3", build=_mixer, run=_channels_first),
        Recorded("hornet.mech_gnconv_gf", build=_mixer, run=_channels_first),
        Recorded("hornet.model_gf", build=_model),
    ),
    checks=(gates_by_loops, filter_is_a_circular_convolution),
    recipe=recipe,
    claims=(order_matters, linear_cost),
)
