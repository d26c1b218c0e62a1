"""Proofs of EfficientViT: recordings of cascaded group attention and the model; folding; what the cascade is good for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations
from statistics import fmean

import torch
from torch import Tensor, nn

from regard import create_model
from regard.checkpoint import load_authors_weights
from regard.flops import count_macs, count_params
from regard.layers import ConvNorm, fuse, resize_map
from regard.proofs.base import Check, Preset, Proofs, Recipe
from regard.proofs.experiments import headline, time_ratio, with_batch_statistics
from regard.proofs.recordings import Recorded, Recording
from regard.registry import get_system
from regard.systems.backbones.efficientvit_msra import CascadedGroupAttention, EfficientViT
from regard.systems.backbones.metaformer import MetaFormer
from regard.tasks import create_task
from regard.training import TrainConfig, seeded, train


def _attention(config: dict) -> CascadedGroupAttention:
    return CascadedGroupAttention(
        config["dim"],
        config["num_heads"],
        qk_dim=config["key_dim"],
        kernel_sizes=config["kernels"],
        window_size=config["resolution"],
    )


def _model(config: dict) -> EfficientViT:
    return EfficientViT(
        dims=config["embed_dim"],
        depths=config["depth"],
        num_heads=config["num_heads"],
        kernel_sizes=config["kernels"],
        window_size=config["window_size"],
        qk_dim=config["key_dim"][0],
        img_size=config["img_size"],
        num_classes=config["num_classes"],
    )


def _run_attention(module: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return module(inputs["x"].movedim(1, -1)).movedim(-1, 1)


def one_sample() -> Check:
    """The recording "model" has one sample, and gradients that are not the derivative of its output.

    For batches of one, PyTorch 2.13 and 2.14 on CPU give a wrong gradient for BatchNorm2d in evaluation mode where it comes
    from a transposed view, as it does in the authors' attention. So the output is compared here, the gradient with finite
    differences along one direction; "model_two_samples" is the same recording with a second sample, gradients included.
    """
    recording = Recording.read("efficientvit_msra.model")
    model = _model(recording.about["constructor"]).eval()
    load_authors_weights(model, recording.params)
    x, theirs = recording.inputs["x"], recording.outputs["out"]
    error = (model(x) - theirs).abs().max().item() / recording.tolerance("output", "out")
    model, x, cot = model.double(), x.double(), recording.cotangents["out"].double()
    direction, step = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).double(), 1e-6
    with torch.no_grad():
        slope = ((model(x + step * direction) - model(x - step * direction)) * cot).sum().item() / (2 * step)
    (gradient,) = torch.autograd.grad((model(x.requires_grad_()) * cot).sum(), x)
    along, recorded = ((g.double() * direction).sum().item() for g in (gradient, recording.input_grads["x"]))
    return Check(
        "equals the recorded output for one sample; the gradient is that of finite differences, which the recorded one is not",
        holds=error <= 1 and abs(along - slope) < 1e-5 * abs(slope),
        figures={
            "output_error_over_tolerance": error,
            "slope_by_finite_differences": slope,
            "slope_by_our_gradient": along,
            "slope_by_the_recorded_gradient": recorded,
        },
        setting="recording efficientvit_msra.model of microsoft/Cream; slope of the weighted output along a random direction",
    )


def attention_maps(mixer: CascadedGroupAttention, window: Tensor) -> tuple[list[Tensor], Tensor]:
    """Weights `(B, M, M)` of each head inside one window `(B, *S, dim)`, and what comes out, by explicit products."""
    places = torch.stack(torch.meshgrid(*map(torch.arange, window.shape[1:-1]), indexing="ij"), -1).flatten(0, -2)
    table = resize_map(mixer.bias.table.unflatten(1, mixer.window_size)[None], window.shape[1:-1])[0]
    maps: list[Tensor] = []
    outs: list[Tensor] = []
    for head, share in enumerate(mixer.shares(window)):
        read = share + outs[-1] if mixer.cascade and head else share
        q, k, v = (t.flatten(1, -2) for t in mixer.project(head, read))
        logits = torch.empty(q.shape[0], q.shape[1], q.shape[1], dtype=q.dtype)
        for i, here in enumerate(places):
            for j, there in enumerate(places):
                bias = table[(head, *(here - there).abs().tolist())]
                logits[:, i, j] = (q[:, i] * k[:, j]).sum(-1) / mixer.qk_dim**0.5 + bias
        maps.append(logits.softmax(-1))
        outs.append((maps[-1] @ v).view_as(window[..., : v.shape[-1]]))
    return maps, mixer.proj(torch.cat(outs, -1).relu())


def attention_by_loops() -> Check:
    """The mixer against explicit loops over heads and pairs of tokens, on whole, smaller and filled-up windows."""
    worst, generator = 0.0, torch.Generator().manual_seed(0)
    for spatial, window in (((1,), 3), ((4,), 4), ((3, 3), 3), ((2, 4), 4), ((2, 2, 3), 3)):
        mixer = CascadedGroupAttention(12, 3, qk_dim=4, kernel_sizes=3, window_size=window, axes=len(spatial))
        nn.init.normal_(mixer.bias.table, generator=generator)
        x = torch.randn(2, *spatial, 12, generator=generator)
        mixer = with_batch_statistics(mixer, x).double()
        worst = max(worst, (mixer(x.double()) - attention_maps(mixer, x.double())[1]).abs().max().item())
    x = torch.randn(2, 5, 3, 12, generator=generator).double()
    mixer = with_batch_statistics(CascadedGroupAttention(12, 3, window_size=3).double(), x)
    filled = torch.cat([x[:, 3:], torch.zeros_like(x[:, :1])], 1)
    expected = torch.cat([attention_maps(mixer, part)[1] for part in (x[:, :3], filled)], 1)[:, :5]
    worst = max(worst, (mixer(x) - expected).abs().max().item())
    return Check(
        "Cascaded group attention equals loops over heads and pairs of tokens (eq. 2 and 3)",
        holds=worst < 1e-12,
        figures={"largest_error": worst},
        setting="float64, 1 to 3 axes, one token, windows larger than the map, and a map that ends in a filled window",
    )


FOLDED = {
    "efficientvit_m0": 2_334_916,
    "efficientvit_m1": 2_964_256,
    "efficientvit_m2": 4_168_338,
    "efficientvit_m3": 6_875_890,
    "efficientvit_m4": 8_776_340,
    "efficientvit_m5": 12_436_260,
}
"""Parameters of the authors' models after they folded every BatchNorm."""


def folding() -> Check:
    """The folded model computes the same, and has as many parameters as the authors' folded models."""
    generator = torch.Generator().manual_seed(0)
    model = with_batch_statistics(seeded(_tiny, 0), torch.randn(8, 1, 16, 24, generator=generator)).double()
    x = torch.randn(4, 1, 20, 12, generator=generator).double()
    figures: dict[str, float | int] = {"largest_error": (model(x) - fuse(model)(x)).abs().max().item()}
    for variant in get_system("efficientvit_msra").variants:
        with torch.device("meta"):
            figures[variant.name] = count_params(fuse(variant.build(**variant.options)))
    return Check(
        "The deployed form, every BatchNorm folded, computes the same with the authors' number of parameters",
        holds=figures["largest_error"] < 1e-10 and all(figures[name] == count for name, count in FOLDED.items()),
        figures=figures,
        setting="float64, random weights and statistics of BatchNorm",
    )


class FullInput(CascadedGroupAttention):
    """Ordinary multi-head attention in the same form: every head reads all channels."""

    def __init__(self, dim: int, num_heads: int, **options) -> None:
        super().__init__(dim, num_heads, cascade=False, **options)
        self.qkvs = nn.ModuleList(ConvNorm(dim, 2 * self.qk_dim + self.head_dim) for _ in range(num_heads))

    def shares(self, windows: Tensor) -> Sequence[Tensor]:
        """All channels for each head."""
        return [windows] * self.num_heads


def _tiny(
    dims: Sequence[int] = (24, 48), attention: Callable[..., CascadedGroupAttention] = CascadedGroupAttention
) -> EfficientViT:
    """Two stages, on digits of 16 pixels 8 x 8 tokens in windows of 4 x 4, and 4 x 4 tokens."""
    model = EfficientViT(
        dims, (1, 2), (3, 3), (3, 3, 3), (4, 4), qk_dim=8, stem_stride=2, img_size=16, num_classes=10, in_chans=1
    )
    for stage, dim in zip(model.stages, dims, strict=True):
        for block in stage:
            block[2].branch = attention(dim, 3, qk_dim=8, kernel_sizes=3, window_size=4)
    return model


def recipe(preset: Preset) -> Recipe:
    """A two-stage EfficientViT on handwritten digits; "paper" is M0 with the schedule of the paper."""
    if preset == "paper":
        task = create_task("digits", size=224, label_smoothing=0.1)
        model = seeded(lambda: EfficientViT(num_classes=task.num_classes), 0)
        config = TrainConfig(
            steps=187_500, batch_size=2048, lr=1e-3, weight_decay=0.025, warmup=5 / 300, clip_norm=0.02
        )
        return Recipe(model, task, config)
    task = create_task("digits", size=16, channels=1)
    steps = {"smoke": 2, "small": 300}[preset]
    return Recipe(seeded(_tiny, 0), task, TrainConfig(steps=steps, batch_size=32, lr=2e-3))


def similarity(a: Tensor, b: Tensor) -> float:
    """Linear centred kernel alignment of two heads' attention maps `(samples, M, M)`: 1 if they vary alike."""
    a, b = (t.flatten(1).double() - t.flatten(1).double().mean(0) for t in (a, b))
    a, b = a @ a.t(), b @ b.t()
    return ((a * b).sum() / (a.norm() * b.norm())).item()


def head_similarity(model: EfficientViT, images: Tensor) -> float:
    """Mean `similarity` of all pairs of heads of a block, over the blocks whose map is one window."""
    read: list[Tensor] = []
    blocks = [block[2].branch for block in model.stages[-1]]
    hooks = [mixer.register_forward_pre_hook(lambda module, args: read.append(args[0])) for mixer in blocks]
    with torch.no_grad():
        model.eval()(images)
        maps = [attention_maps(mixer, x)[0] for mixer, x in zip(blocks, read, strict=True)]
    for hook in hooks:
        hook.remove()
    return fmean(similarity(a, b) for heads in maps for a, b in combinations(heads, 2))


def cascade_helps(preset: Preset) -> Check:
    """One host, budget and data: heads in cascade, the same heads apart, and heads that read all channels."""
    smoke = preset == "smoke"
    task, seeds = create_task("digits", size=16, channels=1), (0,) if smoke else (0, 1, 2)
    config = TrainConfig(steps=2 if smoke else 250, batch_size=32, lr=2e-3)
    images = torch.stack([task.eval_set[index]["image"] for index in range(16 if smoke else 128)])
    arms = {
        "cascade": _tiny,
        "apart": partial(_tiny, attention=partial(CascadedGroupAttention, cascade=False)),
        "full_input": partial(_tiny, (24, 45), attention=FullInput),
    }
    figures: dict[str, float | int | list[float]] = {}
    mean: dict[str, float] = {}
    alike: dict[str, float] = {}
    for name, build in arms.items():
        models = [seeded(build, seed) for seed in seeds]
        runs = [
            train(model, task, replace(config, seed=seed), cpu=True).metrics
            for model, seed in zip(models, seeds, strict=True)
        ]
        mean[name] = fmean(headline(task, runs))
        alike[name] = fmean(head_similarity(model, images) for model in models)
        figures |= {
            name: headline(task, runs),
            f"{name}_mean": round(mean[name], 4),
            f"{name}_head_similarity": round(alike[name], 4),
            f"{name}_parameters": count_params(models[0]),
        }
    return Check(
        "At equal parameters the cascade is at least as good as heads apart, and its heads are less alike than heads that "
        "read all channels (sections 2.2 and 3.1)",
        holds=mean["cascade"] >= mean["apart"] and alike["cascade"] < alike["full_input"],
        figures=figures,
        setting=f"handwritten digits of 16 pixels, two stages on 8 x 8 and 4 x 4 tokens, three heads, {config.steps} steps "
        f"of 32, seeds {list(seeds)}, accuracy on 360 digits; full_input is narrower; similarity: linear CKA of the attention "
        f"maps of pairs of heads in the last stage on {len(images)} digits",
    )


def faster_at_equal_accuracy(preset: Preset) -> Check:
    """Throughput of whole models of nearly the same published accuracy: EfficientViT-M5 (77.1), PoolFormer-S12 (77.2)."""
    batch, side, rounds = (1, 64, 3) if preset == "smoke" else (8, 224, 7)
    x = torch.randn(batch, 3, side, side)
    ours, other = fuse(create_model("efficientvit_m5")), MetaFormer().eval()
    ratio = time_ratio(other, ours, x, rounds)
    return Check(
        "On a CPU the whole model is 2.8 times as fast as an earlier one of the same published accuracy",
        holds=ratio >= 2.8,
        figures={
            "time_of_poolformer_s12_over_efficientvit_m5": ratio,
            "multiply_adds_of_poolformer_s12_over_efficientvit_m5": round(
                count_macs(other, x) / count_macs(ours, x), 2
            ),
        },
        setting=f"batch {batch} of {side} pixels, {torch.get_num_threads()} thread(s), medians of {rounds} rounds in turns, "
        "EfficientViT folded; the paper reports 3.7 for M2 over MobileViT-XXS on a Xeon",
    )


PROOFS = Proofs(
    recordings=(
        Recorded("efficientvit_msra.mech_cga", build=_attention, run=_run_attention),
        Recorded("efficientvit_msra.model_two_samples", build=_model),
    ),
    checks=(one_sample, attention_by_loops, folding),
    recipe=recipe,
    claims=(cascade_helps, faster_at_equal_accuracy),
)
