"""Proofs of DHVT: recordings of head tokens and model; what convolutions are worth when there are few images."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regard.flops import count_params
from regard.layers import SoftmaxAttention
from regard.proofs.base import Check, Preset, Proofs, Recipe
from regard.proofs.experiments import over_variants
from regard.proofs.recordings import Recorded
from regard.skeletons import DeiT
from regard.systems.backbones.dhvt import DHVT, DynamicAggregation, HeadTokenAttention, OverlappingPatches
from regard.tasks import create_task
from regard.tasks.images import Digits
from regard.training import TrainConfig, seeded


def _run_attention(mixer: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    grid, first = mixer(inputs["x"][:, 1:].unflatten(1, (4, 4)), inputs["x"][:, :1])
    return torch.cat([first, grid.flatten(1, 2)], 1)


def _model(config: dict) -> DHVT:
    return DHVT(
        img_size=config["img_size"],
        patch_size=config["patch_size"],
        dim=config["embed_dim"],
        depth=config["depth"],
        num_heads=config["num_heads"],
        mlp_ratio=config["mlp_ratio"],
        num_classes=config["num_classes"],
    )


def _run_model(model: DHVT, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    tokens = model.stem(inputs["x"].movedim(1, -1))
    sequence = torch.cat([model.cls_token.expand(len(tokens), -1, -1), tokens.flatten(1, 2)], 1)
    first_block = model.blocks[0](sequence, (tokens.shape[1], tokens.shape[2]))
    return {"patch_embed": tokens.flatten(1, 2), "blocks.0": first_block, "logits": model(inputs["x"])}


def head_tokens_by_loops() -> Check:
    """The mixer against its equations, head by head and query by query, with and without a class token."""
    generator = torch.Generator().manual_seed(0)
    dim, heads, width = 12, 3, 4
    errors = {"output_error": 0.0, "gradient_error": 0.0}
    for spatial, class_token in (((5,), False), ((2, 3), True), ((2, 1, 2), True)):
        mixer = seeded(partial(HeadTokenAttention, dim, heads, class_token=class_token), 0).double()
        x = torch.randn(2, *spatial, dim, dtype=torch.float64, generator=generator, requires_grad=True)
        first = torch.randn(2, 1, dim, dtype=torch.float64, generator=generator)
        flat = x.flatten(1, -2)
        tokens = torch.cat([first, flat], 1) if class_token else flat
        extra = []
        for head in range(heads):
            mean = tokens[..., width * head : width * (head + 1)].mean(1)
            parts = [mixer.ht_norm(part) for part in mixer.ht_proj(mean).split(width, -1)]
            extra.append(nn.functional.gelu(torch.cat(parts, -1)) + mixer.head_embed[0, head])
        whole = torch.cat([tokens, torch.stack(extra, 1)], 1)
        q, k, v = mixer.qkv(whole).chunk(3, -1)
        rows = []
        for query in q.unbind(1):
            row = []
            for head in range(heads):
                part = slice(width * head, width * (head + 1))
                weights = ((k[..., part] * query[:, None, part]).sum(-1) / width**0.5).softmax(-1)
                row.append((weights[..., None] * v[..., part]).sum(1))
            rows.append(torch.cat(row, -1))
        mixed = mixer.proj(torch.stack(rows, 1))
        count = flat.shape[1]
        expected = mixed[:, :count].reshape(x.shape)
        ours = mixer(x) if not class_token else None
        if class_token:
            grid, token = mixer(x, first)
            with_heads = mixed[:, :1] + mixed[:, 1 + count :].mean(1, keepdim=True)
            ours = torch.cat([token, grid.flatten(1, -2)], 1)
            expected = torch.cat([with_heads, mixed[:, 1 : 1 + count]], 1)
        weight = torch.randn(ours.shape, dtype=torch.float64, generator=generator)
        gradients = [torch.autograd.grad((out * weight).sum(), x, retain_graph=True)[0] for out in (ours, expected)]
        errors["output_error"] = max(errors["output_error"], (ours - expected).abs().max().item())
        errors["gradient_error"] = max(errors["gradient_error"], (gradients[0] - gradients[1]).abs().max().item())
    return Check(
        "head tokens and the attention that they join equal their equations, written as loops",
        holds=max(errors.values()) < 1e-12,
        figures=errors,
        setting="grids of 1 to 3 axes, with and without class token, 3 heads, float64, limit 1e-12",
    )


_TINY: dict[str, Any] = {
    "dim": 48,
    "depth": 4,
    "num_heads": 3,
    "patch_size": 4,
    "img_size": 16,
    "in_chans": 1,
    "num_classes": 10,
}


def recipe(preset: Preset) -> Recipe:
    """Four blocks on 16 tokens of handwritten digits; "paper" is DHVT-T/4 on scenes of 32 pixels, 300 epochs."""
    if preset == "paper":
        task = create_task("scenes", size=32)
        model = seeded(lambda: DHVT(img_size=32, num_classes=task.num_classes, drop_path_rate=0.1), 0)
        return Recipe(model, task, TrainConfig(steps=4800, batch_size=512, lr=1e-3, warmup=5 / 300))
    task = create_task("digits", size=16, channels=1)
    model = seeded(lambda: DHVT(mlp_ratio=2.0, **_TINY), 0)
    return Recipe(model, task, TrainConfig(steps=2 if preset == "smoke" else 300, batch_size=32, lr=3e-3))


class FewDigits(Digits):
    """Handwritten digits of 16 pixels, the first `count` of them to train."""

    def __init__(self, count: int) -> None:
        super().__init__(size=16, channels=1)
        self.train_set.images, self.train_set.labels = self.train_set.images[:count], self.train_set.labels[:count]


def _deit(*, patches: bool = False, feed: bool = False, heads: bool = False, mlp_ratio: float = 2.0) -> DeiT:
    """A DeiT, with some of the three parts of DHVT in place of its own; the position table stays."""

    def mixer(at) -> nn.Module:
        kind: Callable[..., nn.Module] = partial(HeadTokenAttention, class_token=True) if heads else SoftmaxAttention
        return kind(at.dim, at.num_heads)

    return DeiT(
        mixer=mixer,
        mlp=(lambda dim: DynamicAggregation(dim, 2 * dim)) if feed else None,
        stem=OverlappingPatches(1, _TINY["dim"], _TINY["patch_size"]) if patches else None,
        mlp_ratio=mlp_ratio,
        **_TINY,
    )


def _widened() -> float:
    """The MLP ratio at which the DeiT has as many parameters as the small DHVT."""
    wanted = count_params(DHVT(mlp_ratio=2.0, **_TINY))
    return min(
        (step / 48 for step in range(96, 384)), key=lambda ratio: abs(count_params(_deit(mlp_ratio=ratio)) - wanted)
    )


def _compared(
    preset: Preset, builds: dict[str, Callable[[], nn.Module]]
) -> tuple[dict[str, Any], dict[str, float], str]:
    """Figures, means and the setting of the models trained on a tenth of the digits."""
    smoke = preset == "smoke"
    config = TrainConfig(steps=2 if smoke else 220, batch_size=32, lr=3e-3)
    seeds = (0,) if smoke else (0, 1, 2)
    figures, means = over_variants(builds, FewDigits(144), config, seeds)
    parameters = {f"{name}_parameters": count_params(build()) for name, build in builds.items()}
    setting = (
        f"144 handwritten digits of 16 pixels to train, 360 others to evaluate, 4 blocks on 16 tokens, {config.steps} "
        f"steps of 32 at rate {config.lr}, seeds {list(seeds)}, accuracy; holds: "
    )
    return {**figures, **parameters}, means, setting


def few_images(preset: Preset) -> Check:
    """DHVT against a DeiT whose MLPs are widened until it has as many parameters."""
    builds = {"dhvt": partial(DHVT, mlp_ratio=2.0, **_TINY), "deit": partial(_deit, mlp_ratio=_widened())}
    figures, means, setting = _compared(preset, builds)
    return Check(
        "Trained from scratch on few images, DHVT is clearly better than a plain vision transformer of its size",
        holds=means["dhvt"] - means["deit"] >= 0.05,
        figures=figures,
        setting=setting + "the mean is 0.05 or more above DeiT's",
    )


def parts(preset: Preset) -> Check:
    """Each of the three parts alone in a DeiT that is otherwise the same."""
    builds = {
        "deit": _deit,
        "with_patches": partial(_deit, patches=True),
        "with_feed_forward": partial(_deit, feed=True),
        "with_head_tokens": partial(_deit, heads=True),
    }
    figures, means, setting = _compared(preset, builds)
    gains = {name: mean - means["deit"] for name, mean in means.items() if name != "deit"}
    return Check(
        "Each part helps alone, and the convolutional feed-forward contributes most",
        holds=min(gains.values()) > 0 and max(gains, key=gains.__getitem__) == "with_feed_forward",
        figures=figures,
        setting=setting + "every mean is above DeiT's, the feed-forward's the highest",
    )


PROOFS = Proofs(
    recordings=(
        Recorded(
            "dhvt.attention",
            build=lambda config: HeadTokenAttention(config["dim"], config["num_heads"], class_token=True),
            run=_run_attention,
        ),
        Recorded("dhvt.model", build=_model, run=_run_model),
    ),
    checks=(head_tokens_by_loops,),
    recipe=recipe,
    claims=(few_images, parts),
)
