"""Proofs of NAT and DiNAT: recordings of the mechanism and of two models; cost and reach of (dilated) neighborhoods."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics import Metric

from regard import ops
from regard.flops import count_macs, count_params
from regard.layers import SoftmaxAttention
from regard.measure import growth
from regard.proofs.base import Check, Preset, Proofs, Recipe
from regard.proofs.experiments import cost_growth, over_variants
from regard.proofs.recordings import Recorded
from regard.systems.backbones.dinat import BiasedSelfAttention, DiNAT, IsotropicDiNAT, NeighborhoodAttention
from regard.tasks import create_task
from regard.tasks.images import Classification, DrawnImages, LabelledImages
from regard.training import TrainConfig, seeded


def _model(config: dict) -> DiNAT:
    return DiNAT(dim=config["embed_dim"], **{name: value for name, value in config.items() if name != "embed_dim"})


def _isotropic(config: dict) -> IsotropicDiNAT:
    same = ("depth", "num_heads", "kernel_size", "mlp_ratio", "patch_size", "img_size", "num_classes")
    return IsotropicDiNAT(
        dim=config["embed_dim"], dilations=(1, config["dilation"]), **{name: config[name] for name in same}
    )


def neighborhoods_of_a_dense_mask() -> Check:
    """The mixer's op against dense attention under the neighborhood mask, with the biases looked up pair by pair."""
    generator = torch.Generator().manual_seed(0)
    worst, cases = 0.0, 0
    for spatial in ((14, 20), (23, 14), (20, 23)):
        for kernel in (3, 7):
            for dilation in (1, 2, 3):
                if kernel * dilation <= min(spatial):
                    q, k, v = (torch.randn(1, *spatial, 2, 8, generator=generator) for _ in range(3))
                    bias = torch.randn(2, 2 * kernel - 1, 2 * kernel - 1, generator=generator)
                    ours, dense = (
                        ops.neighborhood_attention(
                            q, k, v, kernel_size=kernel, dilation=dilation, bias=bias, backend=backend
                        )
                        for backend in ("auto", "reference")
                    )
                    worst, cases = max(worst, (ours - dense).abs().max().item()), cases + 1  # type: ignore[operator]
    return Check(
        "Neighborhood attention equals dense attention under a mask that is found query by query",
        holds=worst < 1e-5,
        figures={"largest_error": worst, "cases": cases},
        setting="float32, sides 14, 20 and 23, kernels 3 and 7, dilations 1 to 3, with relative position bias",
    )


def a_whole_map_is_self_attention() -> Check:
    """A window as large as the map: NeighborhoodAttention and the full attention of ViT-rpb with the same weights."""
    worst = 0.0
    for grid in ((5, 5), (6, 4), (1, 3)):
        full = seeded(lambda grid=grid: BiasedSelfAttention(16, 2, grid=grid), 0).double()
        near = NeighborhoodAttention(16, 2, kernel_size=grid).double()
        near.load_state_dict(full.state_dict())
        x = torch.randn(2, *grid, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        worst = max(worst, (full(x) - near(x)).abs().max().item())
    return Check(
        "With a kernel as large as the map, neighborhood attention is self attention with relative position bias",
        holds=worst < 1e-12,
        figures={"largest_error": worst},
        setting="float64, odd and even sides",
    )


def streams_equal_sequences() -> Check:
    """Token by token against all at once, for causal sequences."""
    worst, largest = 0.0, 0
    for kernel, dilation, length in ((3, 1, 11), (3, 4, 20), (5, 2, 6), (4, 3, 30), (1, 1, 4)):
        options = {"kernel_size": kernel, "dilation": dilation, "causal": True, "axes": 1}
        mixer = seeded(lambda options=options: NeighborhoodAttention(16, 2, **options), 0).double()
        x = torch.randn(2, length, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        outs, state = [], None
        for token in x.unbind(1):
            out, state = mixer.step(token, state)
            outs.append(out)
            largest = max(largest, state[0].shape[1] - (kernel - 1) * dilation)
        worst = max(worst, (torch.stack(outs, 1) - mixer(x)).abs().max().item())
    return Check(
        "A causal stream gives what the whole sequence gives, and keeps (kernel - 1) * dilation tokens at most",
        holds=worst < 1e-12 and largest <= 0,
        figures={"largest_error": worst},
        setting="float64, sequences shorter and longer than the window",
    )


def recipe(preset: Preset, kind: type[DiNAT] = DiNAT) -> Recipe:
    """A two-level DiNAT on digit scenes; "paper" is DiNAT-Tiny with the paper's schedule, on scenes of 224 pixels.

    Args:
        kind: the class of the model, for other ways to the same mechanism.
    """
    if preset == "paper":
        task = create_task("scenes", kind="local", size=224, label_smoothing=0.1)
        model = seeded(lambda: kind(num_classes=task.num_classes), 0)
        return Recipe(model, task, TrainConfig(steps=375_000, batch_size=1024, lr=1e-3, warmup=20 / 310))
    task = create_task("scenes", kind="local")
    steps = {"smoke": 2, "small": 400}[preset]
    return Recipe(seeded(lambda: _tiny(((1, 2), (1,)), task, kind), 0), task, TrainConfig(steps=steps, lr=2e-3))


def _tiny(dilations: tuple[tuple[int, ...], ...], task: Classification, kind: type[DiNAT] = DiNAT) -> DiNAT:
    return kind(
        dim=32,
        depths=(2, 2),
        num_heads=(2, 4),
        kernel_size=3,
        dilations=dilations,
        mlp_ratio=2.0,
        drop_path_rate=0.0,
        num_classes=task.num_classes,
    )


class _Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that anything inside gives."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(item, Tensor):
                self.numbers = max(self.numbers, item.numel())
        return out


def linear_cost(preset: Preset) -> Check:
    """Multiply-adds, time and the largest tensor of one mixer over growing maps, against dense attention."""
    sides = [14, 28] if preset == "smoke" else [28, 40, 56, 80, 112]
    figures = cost_growth(
        {"neighborhood": lambda side: NeighborhoodAttention(32, 1), "dense": lambda side: SoftmaxAttention(32, 1)},
        sides,
        dim=32,
        repeats=3,
    )
    tokens, largest, mixer = [side * side for side in sides], [], NeighborhoodAttention(32, 1)
    for side in sides:
        with torch.no_grad(), _Largest() as seen:
            mixer(torch.randn(1, side, side, 32))
        largest.append(seen.numbers)
    figures["largest_tensor_over_tokens_squared"] = round(largest[-1] / tokens[-1] ** 2, 4)
    figures["largest_tensor_growth"] = round(growth(tokens, largest), 2)
    return Check(
        "At a fixed kernel the cost of neighborhood attention grows linearly with the map, and no N x N tensor is made",
        holds=abs(figures["neighborhood_macs_growth"] - 1) < 0.1
        and figures["dense_macs_growth"] > 1.5
        and figures["largest_tensor_over_tokens_squared"] < (1 if preset == "smoke" else 0.1),
        figures=figures,
        setting=f"exponents of tokens fitted over maps of {sides} squared, dim 32, kernel 7; verdict on multiply-adds "
        "and the largest tensor of the largest map",
    )


class NameTheColour(DrawnImages):
    """Every patch of an image names a colour, one of four.

    "far": a square of three patches a side lies somewhere in faint noise, and all patches name its colour.
    "near": the image is a board of cells of two patches a side under heavy noise, and each patch names its own cell's.
    """

    num_classes = 4
    patch = 4

    def __init__(self, kind: str, train_items: int = 2048, eval_items: int = 256, seed: int = 0) -> None:
        super().__init__(56, train_items, eval_items, seed)
        self.kind = kind

    @property
    def description(self) -> str:
        where = {"far": "of one square lying somewhere", "near": "of its own cell, under heavy noise"}[self.kind]
        return f"Images of 14 x 14 patches; each patch names the colour {where}."

    def draw(self, rng: np.random.Generator, count: int) -> LabelledImages:
        """Labels are `(14, 14)`, one for each patch."""
        colours = np.array([[1, 0.2, 0.2], [0.2, 1, 0.2], [0.2, 0.2, 1], [1, 1, 0.2]])
        size, side = self.sample_shape[1], 3 * self.patch
        if self.kind == "far":
            images = 0.2 * rng.standard_normal((count, size, size, 3))
            shown, corners = rng.integers(0, 4, count), rng.integers(0, size - side + 1, (count, 2))
            for image, colour, (top, left) in zip(images, colours[shown], corners, strict=True):
                image[top : top + side, left : left + side] += colour
            labels = np.broadcast_to(shown[:, None, None], (count, size // self.patch, size // self.patch)).copy()
        else:
            labels = rng.integers(0, 4, (count, 7, 7)).repeat(2, axis=1).repeat(2, axis=2)
            cells = labels.repeat(self.patch, axis=1).repeat(self.patch, axis=2)
            images = colours[cells] + 1.6 * rng.standard_normal((count, size, size, 3))
        coded = (128 + 24 * images).round().clip(0, 255).astype(np.uint8).transpose(0, 3, 1, 2)
        return LabelledImages(np.ascontiguousarray(coded), labels, mean=0.5, std=0.1)

    def _logits(self, model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
        plain = model
        return plain.head(plain.forward_features(batch["image"])).flatten(0, 2)

    def loss(self, model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(self._logits(model, batch), batch["label"].flatten())

    def update(self, metrics: Mapping[str, Metric], model: torch.nn.Module, batch: dict[str, Tensor]) -> None:
        metrics["accuracy"].update(self._logits(model, batch), batch["label"].flatten())

    def trivial(self) -> dict[str, float]:
        majority = self.train_set.labels.flatten().bincount(minlength=4).argmax()
        return {"accuracy": (self.eval_set.labels == majority).double().mean().item()}


def _plain_stack(dilations: tuple[int, ...]) -> IsotropicDiNAT:
    return IsotropicDiNAT(
        dim=32,
        depth=4,
        num_heads=2,
        kernel_size=3,
        dilations=dilations,
        mlp_ratio=2.0,
        patch_size=NameTheColour.patch,
        img_size=56,
        drop_path_rate=0.0,
        num_classes=NameTheColour.num_classes,
    )


def _with_and_without(kind: str, preset: Preset) -> tuple[dict[str, float | int | list[float]], str]:
    """The isotropic model with dilations 1, 4, 1, 4 and with none: accuracies over seeds, and the setting."""
    smoke = preset == "smoke"
    task = NameTheColour(kind, 32, 16) if smoke else NameTheColour(kind)
    config = TrainConfig(steps=2 if smoke else 150, batch_size=16, lr=3e-3)
    seeds = (0,) if smoke else (0, 1, 2)
    arms = {"dilated": (1, 4), "not_dilated": (1,)}
    builds = {name: partial(_plain_stack, dilations) for name, dilations in arms.items()}
    figures, mean = over_variants(builds, task, config, seeds)
    for name, build in builds.items():
        model = build()
        figures[f"{name}_parameters"] = count_params(model)
        figures[f"{name}_multiply_adds"] = count_macs(model, torch.zeros(1, *task.sample_shape))
    figures["mean_gain"] = round(mean["dilated"] - mean["not_dilated"], 4)
    setting = (
        f"{task.description} Four layers at one resolution, kernel 3, {config.steps} steps, seeds {list(seeds)}, "
        "accuracy over patches"
    )
    return figures, setting


def _equal_cost(figures: dict) -> bool:
    return all(figures[f"dilated_{what}"] == figures[f"not_dilated_{what}"] for what in ("parameters", "multiply_adds"))


def dilation_helps_far(preset: Preset) -> Check:
    """Where the answer lies far away: every dilated run must beat every undilated one, by 0.05 in the mean."""
    figures, setting = _with_and_without("far", preset)
    return Check(
        "At equal cost, dilating every second layer helps where the answer lies far away (isotropic DiNAT over NAT)",
        holds=_equal_cost(figures)
        and min(figures["dilated"]) > max(figures["not_dilated"])  # type: ignore[arg-type]
        and figures["mean_gain"] >= 0.05,  # type: ignore[operator]
        figures=figures,
        setting=setting,
    )


def dilation_costs_nothing_near(preset: Preset) -> Check:
    """Where all that matters is near: the two must be within 0.02 of each other in the mean."""
    figures, setting = _with_and_without("near", preset)
    return Check(
        "At equal cost, dilating every second layer changes nothing where the answer lies near",
        holds=_equal_cost(figures) and abs(figures["mean_gain"]) <= 0.02,  # type: ignore[arg-type]
        figures=figures,
        setting=setting,
    )


PROOFS = Proofs(
    recordings=(
        Recorded("dinat.mech_na", build=lambda config: NeighborhoodAttention(**config)),
        Recorded("dinat.mech_dina", build=lambda config: NeighborhoodAttention(**config)),
        Recorded("dinat.model_dinat", build=_model),
        Recorded("dinat.model_isotropic", build=_isotropic),
    ),
    checks=(neighborhoods_of_a_dense_mask, a_whole_map_is_self_attention, streams_equal_sequences),
    recipe=recipe,
    claims=(linear_cost, dilation_helps_far, dilation_costs_nothing_near),
)
