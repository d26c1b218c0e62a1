"""Proofs of MoH: recordings of its attention and models; fewer heads, less time, and dense models turned into MoH."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regard.flops import count_macs, count_params
from regard.layers import SoftmaxAttention
from regard.proofs._moh_language import language, models_of_transformers_become_moh, trained_models_become_moh
from regard.proofs.base import Check, Preset, Proofs, Recipe
from regard.proofs.experiments import TINY_DEIT, over_variants, time_ratio, tiny_deit_config
from regard.proofs.recordings import Recorded, written_settings
from regard.registry import get_system
from regard.skeletons import DeiT
from regard.systems.backbones._head_routing import HeadRouter, QueryNormRouter
from regard.systems.backbones._transnext import AggregatedAttention, CosineAttention
from regard.systems.backbones.moh import MoHAttention, MoHDiT, MoHLlama, MoHTransNeXt
from regard.tasks import create_task
from regard.training import TrainConfig, seeded

ROUTERS = (HeadRouter, QueryNormRouter)


def _on_grid(module: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    side = round(inputs["x"].shape[1] ** 0.5)
    return module(inputs["x"].unflatten(1, (side, side))).flatten(1, 2)


def _cosine(config: dict, **options: Any) -> CosineAttention:
    router = HeadRouter(config["dim"], config["num_heads"], config["shared_head"], config["routed_head"])
    kind = AggregatedAttention if options else CosineAttention
    return kind(config["dim"], config["num_heads"], input_size=config["input_resolution"], router=router, **options)


def _aggregated(config: dict) -> CosineAttention:
    return _cosine(config, reduction=config["sr_ratio"], window_size=config["window_size"])


def _vit(config: dict) -> MoHTransNeXt:
    return MoHTransNeXt(
        dims=config["embed_dims"],
        depths=config["depths"],
        num_heads=config["num_heads"],
        shared_heads=config["shared_head"],
        routed_heads=config["routed_head"],
        mlp_ratios=config["mlp_ratios"],
        reductions=config["sr_ratios"],
        patch_size=config["patch_size"],
        img_size=config["img_size"],
        num_classes=config["num_classes"],
        norm_eps=1e-5,
    )


def _dit_attention(config: dict) -> MoHAttention:
    return MoHAttention(
        config["dim"], config["num_heads"], shared_heads=config["shared_head"], routed_heads=config["routed_head"]
    )


def _dit(config: dict) -> MoHDiT:
    return MoHDiT(
        dim=config["hidden_size"],
        depth=config["depth"],
        num_heads=config["num_heads"],
        head_dim=config["head_dim"],
        shared_heads=config["shared_head"],
        routed_heads=config["routed_head"],
        mlp_ratio=config["mlp_ratio"],
        patch_size=config["patch_size"],
        input_size=config["input_size"],
        in_chans=config["in_channels"],
        num_classes=config["num_classes"],
    )


def _llama_attention(config: dict) -> MoHAttention:
    given = written_settings(config["config"])
    return MoHAttention(
        given["hidden_size"],
        given["num_attention_heads"],
        router="query_norm",
        kv_heads=given["num_key_value_heads"],
        qkv_bias=False,
        proj_bias=False,
        rope_base=given["rope_theta"],
        causal=True,
    )


def _llama(config: dict) -> MoHLlama:
    given = written_settings(config["config"])
    return MoHLlama(
        vocab_size=given["vocab_size"],
        dim=given["hidden_size"],
        depth=given["num_hidden_layers"],
        num_heads=given["num_attention_heads"],
        kv_heads=given["num_key_value_heads"],
        glu_dim=given["intermediate_size"],
        rope_base=given["rope_theta"],
        norm_eps=given["rms_norm_eps"],
    )


def _slow_gates(mixer: MoHAttention, x: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Gates `(heads,)` of one token by the definitions, and the scores `(E,)` of its routed heads."""
    router = mixer.router
    shared, kept = router.shared_heads, router.routed_heads
    if isinstance(router, QueryNormRouter):
        scores = torch.stack([head.square().sum().sqrt() for head in q[shared:]])
        chosen = sorted(range(len(scores)), key=lambda i: -scores[i].item())[:kept]
        routed = [torch.ones(()) if i in chosen else torch.zeros(()) for i in range(len(scores))]
        return torch.stack([torch.ones(())] * shared + routed).to(x), (scores / scores.std()).softmax(0)
    scores = (router.routed.weight @ x).softmax(0)
    chosen = sorted(range(len(scores)), key=lambda i: -scores[i].item())[:kept]
    total = sum(scores[i] for i in chosen)
    alpha = (router.between.weight @ x).softmax(0)
    common = (router.shared.weight @ x).softmax(0)
    if router.rescale:
        alpha, common, scale = 2 * alpha, shared * common, kept / total
    else:
        scale = 1.0
    gates = [alpha[0] * gate for gate in common]
    gates += [alpha[1] * scale * score if i in chosen else 0 * score for i, score in enumerate(scores)]
    return torch.stack(gates), scores


def _slow(mixer: MoHAttention, x: Tensor) -> Tensor:
    """The layer as a sum over heads, token by token: `(N, dim)` -> the same shape; no rotation."""
    q, k, v = (part(x).unflatten(-1, (-1, mixer.head_dim)) for part in (mixer.q, mixer.k, mixer.v))
    weights = mixer.proj.weight.unflatten(1, (mixer.num_heads, mixer.head_dim))
    out = []
    for token in range(len(x)):
        gates, _ = _slow_gates(mixer, x[token], q[token])
        total = mixer.proj.bias
        for head, gate in enumerate(gates):
            past = token + 1 if mixer.causal else len(x)
            attention = (k[:past, head] @ q[token, head] * mixer.head_dim**-0.5).softmax(0)
            total = total + gate * (weights[:, head] @ (attention @ v[:past, head]))
        out.append(total)
    return torch.stack(out)


def a_sum_over_heads() -> Check:
    """Outputs and gradients against loops over tokens and heads, for both routers and both scalings of gates."""
    generator = torch.Generator().manual_seed(0)
    worst, nonzero = 0.0, set()
    for options in ({}, {"rescale": False}, {"causal": True}, {"router": "query_norm"}):
        mixer = seeded(partial(MoHAttention, 18, 6, shared_heads=2, routed_heads=2, **options), 1).double().eval()
        with torch.no_grad():
            for parameter in mixer.parameters():
                parameter.normal_(std=0.4, generator=generator)
        x = torch.randn(7, 18, dtype=torch.float64, generator=generator, requires_grad=True)
        weight = torch.randn(7, 18, dtype=torch.float64, generator=generator)
        fast, slow = mixer(x[None])[0], _slow(mixer, x)
        leaves = [x, *mixer.parameters()]
        ours = torch.autograd.grad((fast * weight).sum(), leaves)
        theirs = torch.autograd.grad((slow * weight).sum(), leaves)
        worst = max(worst, *((a - b).abs().max().item() for a, b in zip([fast, *ours], [slow, *theirs], strict=True)))
        gates = (
            mixer.router(x) if isinstance(mixer.router, HeadRouter) else mixer.router(mixer.q(x).unflatten(-1, (6, 3)))
        )
        nonzero |= set((gates != 0).sum(-1).tolist())
    return Check(
        "the layer is the sum over heads of gate times head times its part of the projection",
        holds=worst < 1e-12 and nonzero == {4},
        figures={"largest_error": worst, "active_heads_of_every_token": str(sorted(nonzero))},
        setting="6 heads, 2 shared and 2 of 4 routed, 7 tokens, float64, outputs and all gradients, limit 1e-12",
    )


def multi_head_attention_within() -> Check:
    """Without preference and with all heads kept MoH is attention; gathering heads' tokens changes nothing."""
    x = torch.randn(2, 5, 6, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = seeded(lambda: SoftmaxAttention(24, 6), 0).double()
    names = {**plain.state_dict()}
    k, v = ({kind: names[f"kv.{kind}"].chunk(2)[index] for kind in ("weight", "bias")} for index in (0, 1))
    state = {name: value for name, value in names.items() if not name.startswith("kv")}
    state |= {f"{part}.{kind}": own[kind] for part, own in (("k", k), ("v", v)) for kind in own}
    figures: dict[str, float] = {}
    for router in ("learned", "query_norm"):
        mixer = MoHAttention(24, 6, shared_heads=2, routed_heads=4, router=router).double().eval()  # type: ignore[arg-type]
        zeros = {name: torch.zeros_like(value) for name, value in mixer.router.state_dict().items()}
        mixer.load_state_dict(state | {f"router.{name}": value for name, value in zeros.items()})
        figures[f"error_{router}"] = (mixer(x) - plain(x)).abs().max().item()
    cases = {
        "grid": ({}, {}),
        "causal": ({"causal": True}, {}),
        "few_keys": ({"kv_heads": 3}, {}),
        "no_shared": ({"shared_heads": 0}, {}),
    }
    cases["context"] = ({}, {"context": x[:, :3]})
    cases["padding"] = ({"causal": True}, {"mask": torch.arange(30).view(5, 6).expand(2, 5, 6) < 25})
    for name, (options, given) in cases.items():
        mixer = seeded(partial(MoHAttention, 24, 6, **{"shared_heads": 2, "routed_heads": 2, **options}), 0).double()
        leaves = [x.clone().requires_grad_(), *mixer.parameters()]
        results = []
        for sparse in (False, True):
            mixer.sparse = sparse
            out = mixer(leaves[0], **given)
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        figures[f"sparse_error_{name}"] = max((a - b).abs().max().item() for a, b in zip(*results, strict=True))
    return Check(
        "all heads at gate 1 are multi-head attention, and computing heads for their tokens only changes nothing",
        holds=max(figures.values()) < 1e-10,
        figures=figures,
        setting="6 heads, a 5 x 6 grid, float64; of the gathered form outputs and all gradients, in training, balance loss "
        "included; limit 1e-10",
    )


def balance_reaches_the_router() -> Check:
    """The router's gradient in training is that of the output and of E times the sum of P f, layer averages included."""
    x = 1 + torch.randn(2, 9, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))  # some heads lead
    mixer = seeded(lambda: MoHAttention(24, 6, shared_heads=2, routed_heads=2, balance=0.5), 0).double()
    weight = mixer.router.routed.weight
    (ours,) = torch.autograd.grad(mixer(x).square().sum(), weight)
    (output_only,) = torch.autograd.grad(mixer.eval()(x).square().sum(), weight)
    tokens = x.flatten(0, 1)
    scores = torch.stack([(weight @ token).softmax(0) for token in tokens])
    kept = torch.zeros(4, dtype=torch.float64)
    for score in scores:
        for head in sorted(range(4), key=lambda i: -score[i].item())[:2]:
            kept[head] += 1 / len(tokens)
    (loss,) = torch.autograd.grad(0.5 * 4 * sum(scores[:, i].mean() * kept[i] for i in range(4)), weight)
    error = (ours - output_only - loss).abs().max().item()
    models = {"moh_transnext_base_50": 0.01 / 38, "moh_dit_s_2_75": 0.01 / 10, "moh_llama3_8b": 0.01 / 32}
    shares = {}
    for variant in get_system("moh").variants:
        if variant.name in models:
            with torch.device("meta"):
                routers = [m for m in variant.build(**variant.options).modules() if isinstance(m, ROUTERS)]
            shares[variant.name] = max(abs(router.balance - models[variant.name]) for router in routers)
    return Check(
        "training adds 0.01 times the mean over layers of the load balance loss",
        holds=error < 1e-12 and max(shares.values()) < 1e-12,
        figures={"gradient_error": error, "size_of_its_gradient": loss.abs().max().item()},
        setting="one layer with weight 0.5 against loops over tokens, float64, limit 1e-12; weights of three models' layers",
    )


ACTIVE = {
    "moh_transnext_base_75": (441, 588),
    "moh_transnext_base_50": (294, 588),
    "moh_transnext_small_80": (343, 429),
    "moh_transnext_small_75": (323, 429),
    "moh_dit_xl_2_90": (403, 448),
    "moh_dit_xl_2_75": (336, 448),
    "moh_dit_l_2_90": (344, 384),
    "moh_dit_l_2_75": (288, 384),
    "moh_dit_b_2_90": (129, 144),
    "moh_dit_b_2_75": (108, 144),
    "moh_dit_s_2_90": (64, 72),
    "moh_dit_s_2_75": (54, 72),
    "moh_llm_s_75": (108, 144),
    "moh_llm_s_50": (72, 144),
    "moh_llm_b_75": (288, 384),
    "moh_llm_b_50": (192, 384),
    "moh_llama3_8b": (768, 1024),
}
"""Active heads and all heads, summed over the blocks of the authors' models."""


def published_shares_of_heads() -> Check:
    """How many heads of the published models a token uses."""
    figures: dict[str, float] = {}
    equal = True
    for variant in get_system("moh").variants:
        with torch.device("meta"):
            routers = [m for m in variant.build(**variant.options).modules() if isinstance(m, ROUTERS)]
        active = sum(router.shared_heads + router.routed_heads for router in routers)
        total = sum(router.num_heads for router in routers)
        figures[variant.name] = round(active / total, 4)
        equal = equal and (active, total) == ACTIVE[variant.name]
    return Check(
        "the published models use the published share of their heads", equal, figures, "counted over all blocks"
    )


def recipe(preset: Preset) -> Recipe:
    """A small MoH-TransNeXt on digit scenes; "paper" is MoH-ViT-S at 80 % with the paper's rates."""
    if preset == "paper":
        task = create_task("scenes", size=224, label_smoothing=0.1)
        model = seeded(lambda: MoHTransNeXt(num_classes=task.num_classes, drop_path_rate=0.45), 0)
        return Recipe(model, task, TrainConfig(steps=375_000, batch_size=1024, lr=1e-3, warmup=5 / 300))
    task = create_task("scenes", kind="local")
    model = seeded(
        lambda: MoHTransNeXt(
            dims=(24, 48),
            depths=(1, 2),
            num_heads=(4, 8),
            shared_heads=(2, 4),
            routed_heads=(1, 2),
            mlp_ratios=(3, 3),
            reductions=(2, 1),
            img_size=32,
            num_classes=task.num_classes,
            in_chans=task.sample_shape[0],
        ),
        0,
    )
    # A deviation of 0.02 suits hundreds of channels; with 24 the signal would take long to grow.
    model.apply(lambda module: module.reset_parameters() if isinstance(module, nn.Linear) else None)
    return Recipe(model, task, TrainConfig(steps=2 if preset == "smoke" else 400, batch_size=32, lr=2e-3))


def fewer_heads_as_good(preset: Preset) -> Check:
    """A small DeiT with eight heads, of which MoH uses six or four; the dense baseline gets the routers' parameters."""
    smoke = preset == "smoke"
    task, config, seeds = (
        create_task("digits", size=24, channels=1),
        tiny_deit_config(preset),
        (0,) if smoke else (0, 1, 2),
    )
    host = {**TINY_DEIT, "num_heads": 8, "num_classes": 10}

    def moh(shared: int, routed: int) -> DeiT:
        made = lambda at: MoHAttention(at.dim, 8, shared_heads=shared, routed_heads=routed, balance=0.01 / 2)  # noqa: E731
        return DeiT(mixer=made, **host)

    builds: dict[str, Callable[[], nn.Module]] = {
        "moh_75": partial(moh, 4, 2),
        "moh_50": partial(moh, 2, 2),
        "attention": lambda: DeiT(mixer=lambda at: SoftmaxAttention(at.dim, 8), **{**host, "mlp_ratio": 101.5 / 48}),
    }
    figures, mean = over_variants(builds, task, config, seeds)
    figures |= {f"{name}_parameters": count_params(build()) for name, build in builds.items()}
    noise = 0.0 if smoke else max(statistics.stdev(figures[name]) for name in ("moh_75", "attention"))
    more = figures["moh_75_parameters"] / figures["attention_parameters"] - 1
    return Check(
        "With three quarters of the heads active, MoH is as accurate as multi-head attention of equal size",
        holds=mean["moh_75"] >= mean["attention"] - noise and abs(more) < 0.005,
        figures={**figures, "seed_noise": round(noise, 4)},
        setting=f"DeiT of 2 blocks, dim 48, 8 heads, 36 tokens, handwritten digits, {config.steps} steps of "
        f"{config.batch_size}, seeds {list(seeds)}, accuracy; the MLPs of the baseline are as much wider as the routers have "
        "parameters; holds if the mean is not below the baseline's by more than the seed noise (the larger of both standard "
        "deviations over seeds) at parameters equal within 0.5 %",
    )


def skipped_heads_save_time(preset: Preset) -> Check:
    """Half of the heads active: heads computed for their tokens only, against all computed and then weighted."""
    sides = (8,) if preset == "smoke" else (16, 32, 48)
    mixer = seeded(lambda: MoHAttention(256, 8, shared_heads=2, routed_heads=2), 0).eval()
    sparse = seeded(lambda: MoHAttention(256, 8, shared_heads=2, routed_heads=2, sparse=True), 0).eval()
    attention = seeded(lambda: SoftmaxAttention(256, 8), 0).eval()
    over_dense, over_attention, busiest, work = [], [], [], []
    for side in sides:
        x = torch.randn(1, side, side, 256, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            load = (mixer.router(x) > 0).flatten(0, 2).float().mean(0)
        busiest.append(round(load[2:].max().item(), 3))
        work.append(round(count_macs(sparse, x) / count_macs(mixer, x), 3))
        over_dense.append(time_ratio(mixer, sparse, x, 2 if preset == "smoke" else 15))
        over_attention.append(time_ratio(attention, sparse, x, 2 if preset == "smoke" else 15))
    return Check(
        "Heads that tokens leave out save time: gathered, half of the heads are faster than all of them weighted",
        holds=over_dense[-1] > 1 and over_attention[-1] > 1,
        figures={
            "tokens": str([side * side for side in sides]),
            "time_all_weighted_over_gathered": over_dense,
            "time_attention_over_gathered": over_attention,
            "multiply_adds_gathered_over_all": work,
            "share_of_tokens_of_the_busiest_routed_head": busiest,
        },
        setting="dim 256, 8 heads, 2 shared and 2 of 6 routed, fresh weights, random tokens, one thread, forward, medians of "
        "turns; holds if, at the most tokens, gathering is faster than the dense form and than plain attention",
    )


PROOFS = Proofs(
    recordings=(
        Recorded("moh.attention", build=_cosine, run=_on_grid, keys=MoHTransNeXt.authors_keys),
        Recorded("moh.aggregated", build=_aggregated, run=_on_grid, keys=MoHTransNeXt.authors_keys),
        Recorded("moh.vit", build=_vit),
        Recorded("moh.dit_attention", build=_dit_attention),
        Recorded("moh.dit", build=_dit, run=lambda model, inputs: model(inputs["x"], inputs["t"], inputs["y"])),
        Recorded("moh.llama_attention", build=_llama_attention, run=lambda module, inputs: module(inputs["x"])),
        Recorded(
            "moh.llama_lm", build=_llama, run=lambda model, given: model(given["input_ids"], given["attention_mask"])
        ),
    ),
    checks=(a_sum_over_heads, multi_head_attention_within, balance_reaches_the_router, published_shares_of_heads),
    recipe=recipe,
    recipes={"text": language},
    claims=(fewer_heads_as_good, skipped_heads_save_time, trained_models_become_moh, models_of_transformers_become_moh),
)
