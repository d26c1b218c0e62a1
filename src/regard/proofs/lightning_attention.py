"""Proofs of Lightning Attention: the authors' operator, token mixer and two models; constant speed, constant state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import ops
from regard.checkpoint import KeyMap
from regard.flops import count_params
from regard.measure import growth
from regard.ops import LinearState
from regard.proofs.base import Check, Preset, Proofs, Recipe
from regard.proofs.experiments import headline, least_seconds, over_seeds
from regard.proofs.recordings import Outputs, Recorded, written_settings
from regard.skeletons import DecoderLM, host_lm
from regard.systems.sequence.lightning_attention import LightningAttention, TransNormerLLM, decay_rates
from regard.tasks import create_task
from regard.training import TrainConfig, seeded

KEYS = TransNormerLLM.authors_keys
CONTEXT = 128


class _Operator(nn.Module):
    """The operator in the authors' layout (B, heads, N, head_dim)."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, s: Tensor | None = None) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        decay = None if s is None else s.flatten()
        return ops.linear_attention(q, k, v, causal=True, decay=decay, normalize=False).transpose(1, 2)  # type: ignore[union-attr]


def _mixer(config: dict[str, Any]) -> LightningAttention:
    place = {"layer": config["layer_idx"], "depth": config["num_layers"]}
    return LightningAttention(
        config["embed_dim"], config["num_heads"], gate="sigmoid", value_act=True, norm="layer", **place
    )


def _released(config: dict[str, Any]) -> TransNormerLLM:
    given = written_settings(config["config"])
    return TransNormerLLM(
        vocab_size=given["vocab_size"],
        dim=given["decoder_embed_dim"],
        depth=given["decoder_layers"],
        num_heads=given["decoder_attention_heads"],
        glu_dim=given["glu_dim"],
        lrpe=given["linear_use_lrpe_list"],
    )


def _nano(config: dict[str, Any]) -> TransNormerLLM:
    given = written_settings(config["config"])
    return TransNormerLLM(
        vocab_size=given["vocab_size"],
        dim=given["n_embd"],
        depth=given["n_layer"],
        num_heads=given["n_head"],
        glu_dim=2 * given["n_embd"],
        lrpe="all_but_first",
        scale_embedding=False,
    )


def _decoded(model: TransNormerLLM, tokens: Tensor, following: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Logits of the last token and of each one that follows; the blocks' states before and after those."""
    with torch.no_grad():
        logits, state = model.prefill(tokens)
        before, steps = state, [logits[:, -1]]
        for token in following.unbind(1):
            out, state = model.step(token, state)
            steps.append(out)
    kv = [[block.memory.kv for block in one.blocks] for one in (before, state)]
    return torch.stack(steps, 1), *kv


def _run_released(model: TransNormerLLM, inputs: dict[str, Tensor]) -> Outputs:
    logits = model(inputs["input_ids"], inputs["attention_mask"])
    decoded, before, _ = _decoded(model, inputs["input_ids"], inputs["decode_tokens"])
    return {
        "logits": logits,
        "loss": F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()),
        "decode_logits": decoded,
        "state_after_prefill_layer0": before[0],
        "state_after_prefill": before[-1],
    }


def _run_nano(model: TransNormerLLM, inputs: dict[str, Tensor]) -> Outputs:
    logits = model(inputs["idx"])
    decoded, before, after = _decoded(model, inputs["idx"], inputs["decode_tokens"])
    return {
        "logits": logits,
        "loss": F.cross_entropy(logits.flatten(0, 1), inputs["targets"].flatten()),
        "decode_logits": decoded,
        "state_after_prefill_layer0": before[0],
        "state_after_prefill_layer1": before[1],
        "state_final_layer0": after[0],
    }


def _in_parts(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, size: int) -> Tensor:
    """The same stream cut into parts of `size` tokens, each going on from the state of the one before."""
    state, outs = None, []
    for part in zip(q.split(size, 1), k.split(size, 1), v.split(size, 1), strict=True):
        out, state = ops.linear_attention(
            *part, causal=True, decay=decay, normalize=False, state=state, return_state=True
        )
        outs.append(out)
    return torch.cat(outs, 1)


def _token_by_token(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    state: LinearState | None = None
    outs = []
    for part in zip(q.unbind(1), k.unbind(1), v.unbind(1), strict=True):
        out, state = ops.linear_attention_step(*part, state, decay=decay, normalize=False)
        outs.append(out)
    return torch.stack(outs, 1)


def three_forms_agree() -> Check:
    """Blocks of any size, the dense masked product and the recurrence: outputs and gradients in float64."""
    worst: dict[str, float] = {"blocks": 0.0, "recurrence": 0.0}
    for length in (1, 5, 127, 128, 129, 300):
        generator = torch.Generator().manual_seed(length)
        draws = [torch.randn(2, length, 3, 8, dtype=torch.float64, generator=generator) for _ in range(4)]
        weight, decay = draws.pop(), torch.tensor(decay_rates(3, 1, 4), dtype=torch.float64)
        options = {"causal": True, "decay": decay, "normalize": False}
        forms: list[tuple[str, Callable[..., Tensor]]] = [
            ("dense", lambda q, k, v, o=options: ops.linear_attention(q, k, v, backend="reference", **o)),
            ("blocks", lambda q, k, v, o=options: ops.linear_attention(q, k, v, backend="torch", **o)),
            ("recurrence", lambda q, k, v, d=decay: _token_by_token(q, k, v, d)),
            *(("blocks", lambda q, k, v, d=decay, s=size: _in_parts(q, k, v, d, s)) for size in (7, 64, 200)),
        ]
        results = []
        for name, form in forms:
            leaves = [x.clone().requires_grad_() for x in draws]
            out = form(*leaves)
            results.append((name, [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]))
        truth = results[0][1]
        for name, values in results[1:]:
            errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(values, truth, strict=True)]
            worst[name] = max(worst[name], *errors)
    return Check(
        "blocked = dense masked = recurrent, outputs and gradients",
        holds=max(worst.values()) <= 1e-12,
        figures={f"largest_relative_error_{name}": value for name, value in worst.items()},
        setting="float64, lengths 1 to 300, blocks of 128 and parts of 7, 64 and 200; limit 1e-12 of the largest value",
    )


def _shakespeare(vocab_size: int, **options: Any) -> TransNormerLLM:
    """The authors' small trainer's character model, at a sixth of its width and a third of its depth."""
    return TransNormerLLM(
        **{"vocab_size": vocab_size, "dim": 64, "depth": 2, "num_heads": 2, "glu_dim": 128, **options}
    )


def recipe(preset: Preset) -> Recipe:
    """A small TransNormerLLM on characters; "paper" is the authors' own small recipe for characters."""
    task = create_task("text", unit="character", length=256 if preset == "paper" else CONTEXT)
    if preset == "paper":
        model = seeded(lambda: _shakespeare(task.vocab_size, dim=384, depth=6, num_heads=3, glu_dim=768), 0)  # type: ignore[attr-defined]
        config = TrainConfig(steps=2000, batch_size=64, lr=1e-3, weight_decay=0.1, warmup=0.05, betas=(0.9, 0.99))
    else:
        model = seeded(lambda: _shakespeare(task.vocab_size), 0)  # type: ignore[attr-defined]
        steps = 2 if preset == "smoke" else 250
        config = TrainConfig(steps=steps, batch_size=16, lr=3e-3, weight_decay=0.1, betas=(0.9, 0.99))
    return Recipe(model, task, config)


def _cumulative(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The textbook form without decay: a sum over time of whole k vᵀ matrices, N head_dim value_dim numbers."""
    kv = (k[..., :, None] * v[..., None, :]).cumsum(1)
    return (q[..., None, :] @ kv).squeeze(-2)


def constant_speed(preset: Preset) -> Check:
    """Growth of time with length: blocks, masked product, cumulative sum; and what decoding has to keep."""
    heads, width, rounds = 2, 32, 2 if preset == "smoke" else 12
    lengths = {
        "blocks": [256, 512] if preset == "smoke" else [512, 1024, 2048, 4096, 8192, 16384, 32768],
        "dense": [256, 512] if preset == "smoke" else [512, 1024, 2048],
        "cumulative": [256, 512] if preset == "smoke" else [512, 1024, 2048],
    }
    options = {"causal": True, "decay": torch.tensor(decay_rates(heads)), "normalize": False}
    forms: dict[str, Callable[..., Any]] = {
        "blocks": lambda q, k, v: ops.linear_attention(q, k, v, backend="torch", **options),
        "dense": lambda q, k, v: ops.linear_attention(q, k, v, backend="reference", **options),
        "cumulative": _cumulative,
    }
    generator = torch.Generator().manual_seed(0)
    times, exponents = {}, {}
    for name, form in forms.items():
        inputs = [tuple(torch.randn(3, 1, n, heads, width, generator=generator)) for n in lengths[name]]
        times[name] = least_seconds([partial(form, *values) for values in inputs], rounds)
        exponents[name] = round(growth(lengths[name], times[name]), 3)
    last = lengths["dense"][-1]
    ours = times["blocks"][lengths["blocks"].index(last)]
    state = {n: _shakespeare(100).state_size(n) or 0 for n in (256, 4096)}
    cache = {n: host_lm("softmax", 100, dim=64, depth=2, num_heads=2).state_size(n) or 0 for n in (256, 4096)}
    return Check(
        "Time per token is the same for all lengths, and so is the memory of decoding (section 3, figure 1)",
        holds=abs(exponents["blocks"] - 1) <= 0.1 and exponents["dense"] > 1.5 and state[256] == state[4096],
        figures={
            **{f"{name}_time_growth": value for name, value in exponents.items()},
            "microseconds_per_token": [
                round(1e6 * t / n, 2) for t, n in zip(times["blocks"], lengths["blocks"], strict=True)
            ],
            "dense_over_blocks_at_the_longest_dense": round(times["dense"][-1] / ours, 2),
            "cumulative_over_blocks_there": round(times["cumulative"][-1] / ours, 2),
            **{f"lightning_state_numbers_after_{n}": size for n, size in state.items()},
            **{f"transformer_state_numbers_after_{n}": size for n, size in cache.items()},
        },
        setting=f"exponent of processor time over lengths {lengths['blocks'][0]} to {lengths['blocks'][-1]} (dense and "
        f"cumulative to {last}), 2 heads of 32, forward, float32, best of {rounds}; holds if blocks are within 0.1 of 1, "
        "dense above 1.5 and the state constant",
    )


def _transformer(vocab_size: int, dim: int, depth: int, heads: int) -> DecoderLM:
    return host_lm("softmax", vocab_size, dim=dim, depth=depth, num_heads=heads, length=CONTEXT)


def language_modelling(preset: Preset) -> Check:
    """TransNormerLLM, a softmax Transformer of as many parameters, and TransNormerLLM without decay and without gate."""
    task = create_task("text", unit="character", length=CONTEXT)
    vocab: int = task.vocab_size  # type: ignore[attr-defined]
    dim, depth, heads = (16, 1, 2) if preset == "smoke" else (64, 2, 4)
    seeds = (0,) if preset == "smoke" else (0, 1)
    config = TrainConfig(steps=2 if preset == "smoke" else 200, batch_size=8, lr=3e-3, weight_decay=0.1)
    budget = count_params(_transformer(vocab, dim, depth, heads))

    def ours(**options: Any) -> TransNormerLLM:
        # As wide a GLU as the Transformer's number of parameters allows.
        size = {"vocab_size": vocab, "dim": dim, "depth": depth, "num_heads": heads}
        spare = budget - count_params(TransNormerLLM(**size, glu_dim=1, **options))
        return TransNormerLLM(**size, glu_dim=1 + round(spare / (3 * dim * depth)), **options)

    builds: dict[str, Callable[[], DecoderLM]] = {
        "lightning": ours,
        "transformer": lambda: _transformer(vocab, dim, depth, heads),
        "without_decay": lambda: ours(decay=False),
        "without_gate": lambda: ours(gate="none"),
    }
    figures: dict[str, float | list[float]] = {}
    means = {}
    for name, build in builds.items():
        runs = headline(task, over_seeds(build, task, config, seeds))
        figures[f"{name}_bits_per_byte"], means[name] = runs, sum(runs) / len(runs)
        figures[f"{name}_parameters"] = count_params(build())
    figures["lightning_over_transformer"] = round(means["lightning"] / means["transformer"], 4)
    figures["trivial_bits_per_byte"] = trivial = round(task.trivial()[task.metric], 4)
    return Check(
        "At equal size TransNormerLLM models language as well as a Transformer, and needs its decay and its gate",
        holds=means["lightning"] <= 1.05 * means["transformer"]
        and means["transformer"] < 0.9 * trivial
        and means["lightning"] < min(means["without_decay"], means["without_gate"]),
        figures=figures,
        setting=f"characters of {task.corpus}, context {CONTEXT}, dim {dim}, {depth} blocks, {config.steps} steps of 8, seeds "  # type: ignore[attr-defined]
        f"{list(seeds)}, bits per byte (lower is better); holds if at most 5 % above a Transformer that has learned something "
        "(a tenth below letter frequencies), and below both ablations",
    )


PROOFS = Proofs(
    recordings=(
        Recorded(
            "lightning_attention.op", build=lambda config: _Operator(), run=lambda module, inputs: module(**inputs)
        ),
        Recorded(
            "lightning_attention.op_nodecay",
            build=lambda config: _Operator(),
            run=lambda module, inputs: module(**inputs),
        ),
        Recorded(
            "lightning_attention.tnl_attn",
            build=_mixer,
            keys=KeyMap(rules=[(r"^([qkv])_proj\.", r"\1."), (r"^o_proj\.", "proj."), (r"^output_gate\.", "gate.")]),
        ),
        Recorded(
            "lightning_attention.hf_lm",
            build=_released,
            run=_run_released,
            keys=replace(KEYS, drop=[r"^lm_head"]),
        ),
        # Here the gradient of the shared matrix is recorded under the head's name.
        Recorded(
            "lightning_attention.nano_lm",
            build=_nano,
            run=_run_nano,
            keys=replace(KEYS, drop=[r"\.wte\."], rules=[(r"^lm_head\.", "embed."), *KEYS.rules]),
        ),
    ),
    checks=(three_forms_agree,),
    recipe=recipe,
    claims=(constant_speed, language_modelling),
)
