"""Proofs of RMT: recordings of the decomposed attention and the model; decay with distance helps where data are few."""

from __future__ import annotations

from functools import partial
from itertools import product

import torch
from torch import Tensor

from regard.layers.rotary import flat_angles
from regard.proofs.base import Check, Preset, Proofs, Recipe
from regard.proofs.experiments import TINY_DEIT, cost_growth, over_variants, tiny_deit_config, tiny_grid_deit
from regard.proofs.recordings import Recorded, run_with_transitions
from regard.skeletons import Isotropic
from regard.systems.backbones.rmt import DECAYS, RMT, ManhattanAttention
from regard.tasks import create_task
from regard.training import TrainConfig, seeded


def _attention(config: dict) -> ManhattanAttention:
    relpos = config["RetNetRelPos2d"]
    return ManhattanAttention(
        relpos["embed_dim"],
        relpos["num_heads"],
        decomposed=True,
        initial_decay=relpos["initial_value"],
        decay_range=relpos["heads_range"],
    )


def _run_attention(mixer: ManhattanAttention, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    height, width = inputs["x"].shape[1:3]
    angles = flat_angles((height, width), mixer.head_dim // 2).repeat_interleave(2, -1)
    return {
        "y": mixer(inputs["x"]),
        "sin": angles.sin(),
        "cos": angles.cos(),
        "mask_h": mixer.log_decays((height,)),
        "mask_w": mixer.log_decays((width,)),
    }


def _model(config: dict) -> RMT:
    return RMT(
        dims=config["embed_dims"],
        depths=config["depths"],
        num_heads=config["num_heads"],
        mlp_ratios=config["mlp_ratios"],
        decomposed=config["chunkwise_recurrents"],
        initial_decays=config["init_values"],
        decay_ranges=config["heads_ranges"],
        layer_scales=[config["layer_init_values"] if scaled else None for scaled in config["layerscales"]],
        projection=config["projection"],
        num_classes=config["num_classes"],
        in_chans=config["in_chans"],
    )


def attention_by_loops() -> Check:
    """Both forms and both places of the decay against matrices written out token by token."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for spatial, decomposed, decay in product(((1,), (5,), (3, 4), (2, 3, 2)), (False, True), DECAYS):
        options = {"decomposed": decomposed, "decay": decay, "axes": len(spatial)}
        mixer = seeded(lambda o=options: ManhattanAttention(8, 2, **o), 0).double()
        x = torch.randn(2, *spatial, 8, dtype=torch.float64, generator=generator)
        place = torch.cartesian_prod(*(torch.arange(length) for length in spatial)).view(-1, len(spatial))
        apart = (place[:, None] - place).abs()  # (N, N, axes)
        rates = 1e4 ** -torch.linspace(0, 1, 2, dtype=torch.float64)
        turn = torch.exp(1j * torch.arange(len(place))[:, None] * rates)[:, None]  # (N, 1, pairs)
        q, k = (
            torch.view_as_real(torch.view_as_complex(project(x).view(2, -1, 2, 2, 2)) * turn).flatten(-2)
            for project in (mixer.q, mixer.k)
        )
        v = mixer.v(x).view(2, -1, 2, 4)
        mixed = v
        passes = reversed(range(len(spatial))) if decomposed else [None]
        for axis in passes:
            # Along one axis, tokens see those that differ from them in this axis only.
            seen = apart.sum(-1) >= 0 if axis is None else apart.sum(-1) == apart[..., axis]
            weights = []
            for head in range(2):
                fade = (mixer.log_decay[head] * apart.sum(-1)).exp()
                scores = (q[:, :, head] @ k[:, :, head].mT / 4**0.5).exp() * seen
                if decay == "inside":
                    scores = scores * fade
                share = scores / scores.sum(-1, keepdim=True)
                weights.append(share * fade if decay == "outside" else share)
            mixed = torch.einsum("hbij,bjhd->bihd", torch.stack(weights), mixed)
        expected = mixer.proj(mixed.flatten(2).view(x.shape) + mixer.local(mixer.v(x)))
        worst = max(worst, (mixer(x) - expected).abs().max().item())
    mixer = ManhattanAttention(8, 2).double()
    kronecker = [torch.kron(a, b) for a, b in zip(*(mixer.log_decays((n,)).exp() for n in (3, 5)), strict=True)]
    gap = (torch.stack(kronecker) - mixer.log_decays((3, 5)).exp()).abs().max().item()
    return Check(
        "Manhattan attention equals its equation token by token; its decay is the Kronecker product of those of the axes",
        holds=max(worst, gap) < 1e-12,
        figures={"largest_error": worst, "largest_error_of_the_product": gap},
        setting="float64, maps of 1 to 3 axes, full and decomposed, decay inside and outside of the softmax and none",
    )


def recipe(preset: Preset) -> Recipe:
    """A two-stage RMT on handwritten digits; "paper" is RMT-T with the schedule of the paper."""
    if preset == "paper":
        task = create_task("digits", size=224, label_smoothing=0.1)
        options = {"depths": (2, 2, 8, 2), "mlp_ratios": (3, 3, 3, 3), "decomposed": (True, True, False, False)}
        model = seeded(lambda: RMT(drop_path_rate=0.1, num_classes=task.num_classes, **options), 0)
        return Recipe(model, task, TrainConfig(steps=375_000, batch_size=1024, lr=1e-3, warmup=5 / 300))
    task = create_task("digits", size=32, channels=1)
    model = seeded(
        lambda: RMT(
            dims=(24, 48),
            depths=(1, 1),
            num_heads=(2, 4),
            mlp_ratios=(2, 2),
            decomposed=(True, False),
            initial_decays=(2, 2),
            decay_ranges=(4, 4),
            projection=64,
            num_classes=task.num_classes,
            in_chans=1,
        ),
        0,
    )
    return Recipe(model, task, TrainConfig(steps=2 if preset == "smoke" else 250, batch_size=32, lr=2e-3))


def _with_decay(decay: str) -> Isotropic:
    return tiny_grid_deit(lambda at: ManhattanAttention(at.dim, at.num_heads, decay=decay))


def decay_helps(preset: Preset) -> Check:
    """The same small transformer with decay inside and outside of the softmax, and without."""
    task = create_task("digits", size=TINY_DEIT["img_size"], channels=1)
    config = tiny_deit_config(preset)
    seeds = (0,) if preset == "smoke" else (0, 1, 2)
    names = {"inside": "decay", "outside": "decay_outside_of_the_softmax", "none": "no_decay"}
    figures, mean = over_variants({names[d]: partial(_with_decay, d) for d in DECAYS}, task, config, seeds)
    return Check(
        "The spatial prior helps where data are few: attention with decay is more accurate than without (table 6)",
        holds=mean["decay"] > mean["no_decay"],
        figures=figures,
        setting=f"{task.description} 36 tokens, two blocks, equal parameters (position table, rotation and convolution "
        f"of the values in all), {config.steps} steps, lr {config.lr}, seeds {list(seeds)}; holds if the mean with decay "
        "(inside, the default) is higher",
    )


def decomposed_cost(preset: Preset) -> Check:
    """Multiply-adds and time of both forms over growing maps."""
    sides = [14, 28] if preset == "smoke" else [14, 28, 42, 56]
    figures = cost_growth(
        {
            "decomposed": lambda side: ManhattanAttention(32, 1, decomposed=True),
            "full": lambda side: ManhattanAttention(32, 1),
        },
        sides,
        dim=32,
    )
    return Check(
        "Decomposed along the axes, the cost grows with N^1.5 at most, in full with about N^2 (section 3.2)",
        holds=figures["decomposed_macs_growth"] < 1.5 < figures["full_macs_growth"],
        figures=figures,
        setting=f"exponent of tokens fitted over maps of {sides} squared, dim 32; verdict on multiply-adds",
    )


PROOFS = Proofs(
    recordings=(
        Recorded("rmt.masa_decomposed", build=_attention, run=_run_attention),
        Recorded("rmt.model", build=_model, run=run_with_transitions),
    ),
    checks=(attention_by_loops,),
    recipe=recipe,
    claims=(decay_helps, decomposed_cost),
)
