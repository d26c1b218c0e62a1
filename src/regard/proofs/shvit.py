"""Proofs of SHViT: recordings of single-head attention and the model; folding; one head on few channels is enough."""

from __future__ import annotations

from functools import cache, partial

import torch
from torch import Tensor, nn

from regard import create_model, ops
from regard.flops import count_macs, count_params
from regard.layers import ConvNorm, GlobalNorm, Residual, fuse
from regard.proofs.base import Check, Preset, Proofs, Recipe
from regard.proofs.experiments import over_variants, time_ratio, with_batch_statistics
from regard.proofs.recordings import Recorded
from regard.registry import get_system
from regard.systems.backbones.metaformer import MetaFormer
from regard.systems.backbones.shvit import SHViT, SingleHeadAttention
from regard.tasks import create_task
from regard.training import TrainConfig, seeded


def _model(config: dict) -> SHViT:
    return SHViT(
        dims=config["embed_dim"],
        depths=config["depth"],
        partial_dims=config["partial_dim"],
        qk_dim=config["qk_dim"][0],
        attends=[kind == "s" for kind in config["types"]],
        num_classes=config["num_classes"],
    )


def _run_attention(module: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return module(inputs["x"].movedim(1, -1)).movedim(-1, 1)


FOLDED = {"shvit_s1": 6_308_660, "shvit_s2": 11_453_508, "shvit_s3": 14_210_010, "shvit_s4": 16_546_248}
"""Parameters of the authors' models after they folded every BatchNorm."""


def folding() -> Check:
    """The folded model computes the same, and has as many parameters as the authors' folded models."""
    generator = torch.Generator().manual_seed(0)
    model = with_batch_statistics(seeded(_tiny, 0), torch.randn(8, 1, 32, 48, generator=generator))
    x = torch.randn(4, 1, 40, 24, generator=generator).double()
    whole, folded = model.double()(x), fuse(model)(x)
    figures: dict[str, float | int] = {"largest_error": (whole - folded).abs().max().item()}
    figures |= {"largest_logit": whole.abs().max().item()}
    for variant in get_system("shvit").variants:
        with torch.device("meta"):
            figures[variant.name] = count_params(fuse(variant.build(**variant.options)))
    left = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in fuse(model).modules())
    return Check(
        "The deployed form, every BatchNorm folded, computes the same with the authors' number of parameters",
        holds=figures["largest_error"] < 1e-10
        and left == 0
        and all(figures[name] == count for name, count in FOLDED.items()),
        figures=figures,
        setting="float64, random weights and statistics of BatchNorm",
    )


class MultiHead(nn.Module):
    """The attention that one head replaces: all channels, several heads, the same norms and projections."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = GlobalNorm(dim)
        self.qkv = ConvNorm(dim, 3 * dim)
        self.proj = ConvNorm(dim, dim, weight=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        return self.proj(ops.attention(q, k, v).flatten(-2).relu())


def _tiny(dims: tuple[int, int] = (24, 48), share: float = 1 / 4.67) -> SHViT:
    """Two stages with attention, on digits of 16 pixels 8 x 8 and 4 x 4 tokens."""
    return SHViT(
        dims,
        (2, 2),
        partial_dims=[round(dim * share) for dim in dims],
        qk_dim=8,
        attends=(True, True),
        stem_stride=2,
        num_classes=10,
        in_chans=1,
    )


def _many_heads(dims: tuple[int, int]) -> SHViT:
    """The same host with `MultiHead` in every block."""
    model = _tiny(dims)
    for stage, dim in zip(model.stages, dims, strict=True):
        for block in stage:
            block.mixer = Residual(MultiHead(dim, 4))
    return model


def recipe(preset: Preset) -> Recipe:
    """A two-stage SHViT on handwritten digits; "paper" is S1 with the schedule of the paper."""
    if preset == "paper":
        task = create_task("digits", size=224, label_smoothing=0.1)
        model = seeded(lambda: SHViT(num_classes=task.num_classes), 0)
        config = TrainConfig(
            steps=187_500, batch_size=2048, lr=1e-3, weight_decay=0.025, warmup=5 / 300, clip_norm=0.02
        )
        return Recipe(model, task, config)
    task = create_task("digits", size=16, channels=1)
    steps = {"smoke": 2, "small": 300}[preset]
    return Recipe(seeded(_tiny, 0), task, TrainConfig(steps=steps, batch_size=32, lr=2e-3))


ARMS = {
    "single_head": _tiny,
    "multi_head": partial(_many_heads, (20, 36)),
    "share_of_an_eighth": partial(_tiny, share=1 / 8),
    "share_of_a_half": partial(_tiny, share=1 / 2),
    "share_of_all": partial(_tiny, share=1.0),
}


@cache
def _trained(arm: str, preset: Preset) -> tuple[dict, float]:
    """Figures and mean accuracy of an arm; both claims read that of "single_head"."""
    smoke = preset == "smoke"
    config = TrainConfig(steps=2 if smoke else 200, batch_size=32, lr=2e-3)
    figures, means = over_variants(
        {arm: ARMS[arm]}, create_task("digits", size=16, channels=1), config, (0,) if smoke else (0, 1, 2)
    )
    return {**figures, f"{arm}_multiply_adds": count_macs(ARMS[arm](), torch.zeros(1, 1, 16, 16))}, means[arm]


_SETTING = (
    "handwritten digits of 16 pixels, two stages of two blocks on 8 x 8 and 4 x 4 tokens, 200 steps of 32, seeds 0, 1, 2, "
    "accuracy on 360 digits"
)


def one_head_is_enough(preset: Preset) -> Check:
    """One host, budget and data at equal multiply-adds: one head on a fifth of the channels, four heads on all of them."""
    (single, mean_single), (multi, mean_multi) = (_trained(arm, preset) for arm in ("single_head", "multi_head"))
    ratio = time_ratio(fuse(ARMS["multi_head"]()), fuse(ARMS["single_head"]()), torch.randn(32, 1, 16, 16), rounds=25)
    return Check(
        "At equal cost one head on a fifth of the channels is as good as several heads on all, and faster",
        holds=mean_single >= mean_multi - 0.005 and ratio > 1,
        figures={**single, **multi, "time_of_multi_head_over_single_head": ratio},
        setting=f"{_SETTING}; multi_head is narrower so that multiply-adds are equal within 3 %; time of the folded models; "
        "holds if the mean accuracy is at most 0.005 below that of multi_head, and the time is less",
    )


def few_channels_are_enough(preset: Preset) -> Check:
    """One host, budget and data; the head attends on 1/8, 1/4.67, 1/2 or all of the channels."""
    figures, means = {}, {}
    for arm in ("share_of_an_eighth", "single_head", "share_of_a_half", "share_of_all"):
        more, means[arm] = _trained(arm, preset)
        figures |= more
    return Check(
        "Attending on more than a fifth of the channels adds cost and hardly any accuracy",
        holds=means["single_head"] >= max(means["share_of_a_half"], means["share_of_all"]) - 0.005,
        figures=figures,
        setting=f"{_SETTING}; single_head attends on 1/4.67; holds if its mean accuracy is at most 0.005 below the better of "
        "1/2 and all",
    )


def faster_at_equal_accuracy(preset: Preset) -> Check:
    """Throughput of whole models of nearly the same published accuracy: SHViT-S3 (77.4) and PoolFormer-S12 (77.2)."""
    batch, side, rounds = (1, 64, 3) if preset == "smoke" else (8, 224, 7)
    x = torch.randn(batch, 3, side, side)
    ours, other = fuse(create_model("shvit_s3")), MetaFormer().eval()
    ratio = time_ratio(other, ours, x, rounds)
    return Check(
        "On a CPU the whole model is 3 times as fast as an earlier one of the same published accuracy",
        holds=ratio >= 3,
        figures={
            "time_of_poolformer_s12_over_shvit_s3": ratio,
            "multiply_adds_of_poolformer_s12_over_shvit_s3": round(count_macs(other, x) / count_macs(ours, x), 2),
        },
        setting=f"batch {batch} of {side} pixels, {torch.get_num_threads()} thread(s), medians of {rounds} rounds in turns, "
        "SHViT folded; the paper reports 8.1 over MobileViTv2-1.0 on its CPU",
    )


PROOFS = Proofs(
    recordings=(
        Recorded(
            "shvit.mech_shsa",
            build=lambda config: SingleHeadAttention(
                config["dim"], partial_dim=config["pdim"], qk_dim=config["qk_dim"]
            ),
            run=_run_attention,
        ),
        Recorded("shvit.model", build=_model),
    ),
    checks=(folding,),
    recipe=recipe,
    claims=(one_head_is_enough, few_channels_are_enough, faster_at_equal_accuracy),
)
