"""Proofs of URPE: the authors' attention, model and data; what relative positions inside the softmax cannot tell."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regard import ops
from regard.checkpoint import KeyMap
from regard.flops import count_params
from regard.layers import OffsetTable, alibi_slopes, run_stream
from regard.measure import peak_bytes
from regard.proofs.base import Check, Preset, Proofs, Recipe
from regard.proofs.experiments import least_seconds, over_variants
from regard.proofs.recordings import Outputs, Recorded, Recording
from regard.systems.sequence.urpe import PostNormBlock, URPEAttention, URPETransformer, universal_attention
from regard.tasks import Task, create_task
from regard.tasks.sequences import EvenTokensTask, PositionTask
from regard.training import TrainConfig, seeded

STEPS = {"position": 600, "even_tokens": 1000}
LENGTHS = {"position": 32, "even_tokens": 8}


def _run_attention(module: URPEAttention, inputs: dict[str, Tensor]) -> Outputs:
    x = inputs["x"].transpose(0, 1)
    bias, factor = (
        inputs[name].unflatten(0, (len(x), module.num_heads)) for name in ("rel_pos_bias", "ur_rel_pos_bias")
    )
    _, weights = universal_attention(*module._qkv(x), bias, factor)
    return {"out": module(x, bias=bias, factor=factor).transpose(0, 1), "weights": weights.transpose(0, 1)}


def _model(config: dict[str, Any]) -> URPETransformer:
    return URPETransformer(
        vocab_size=config["dictionary_length"],
        dim=config["encoder_embed_dim"],
        depth=config["encoder_layers"],
        num_heads=config["encoder_attention_heads"],
        mlp_ratio=config["encoder_ffn_embed_dim"] / config["encoder_embed_dim"],
        length=config["max_positions"],
        tied=not config["untie_weights_roberta"],
    )


def _run_model(model: URPETransformer, inputs: dict[str, Tensor]) -> Outputs:
    states = model.forward_intermediates(inputs["src_tokens"])
    return {"hidden_after_layer0": states[0], "logits": model.forward_head(states[-1])}


def _run_data(module: nn.Module, inputs: dict[str, Tensor]) -> Outputs:
    """Our answers to the recorded sequences. The release numbers tokens from 11 on, positions from 1, and END is V - 2."""
    tokens = {name: Recording.read("urpe.data").outputs[f"{name}_x"].numpy() - 11 for name in ("etp", "pi")}
    count, end = 980, 998  # what it draws from, and its END, for a vocabulary of 1,000
    even, position = EvenTokensTask(128, count), PositionTask(128, count)
    said = torch.stack([torch.from_numpy(even.answers(one)) for one in tokens["etp"]])
    places = torch.stack([torch.from_numpy(position.answers(one)) for one in tokens["pi"]])
    return {"etp_y": torch.where(said == count, end, said + 11), "pi_y": places + 1}


def _slow(mixer: URPEAttention, x: Tensor) -> Tensor:
    """One pair of positions at a time, offsets clipped to the table, in the order of the equation."""
    spatial, size = x.shape[1:-1], mixer.bias.size
    places = [tuple(place) for place in torch.cartesian_prod(*map(torch.arange, spatial)).view(-1, len(size)).tolist()]

    def entry(table: OffsetTable, i: int, j: int) -> Tensor:
        row = 0
        for a, b, side in zip(places[i], places[j], size, strict=True):
            row = row * (2 * side - 1) + max(1 - side, min(side - 1, b - a)) + side - 1
        return table.table[row]

    outs = []
    for sample in x.flatten(1, -2):
        q, k, v = (part(sample).view(len(places), mixer.num_heads, -1) for part in (mixer.q, mixer.k, mixer.v))
        rows = []
        for i in range(len(places)):
            seen = range(i + 1 if mixer.causal else len(places))
            logits = [(q[i] * k[j]).sum(-1) / mixer.head_dim**0.5 + entry(mixer.bias, i, j) for j in seen]
            exps = torch.stack(logits).exp()
            rows.append(sum((exps[j] / exps.sum(0) * entry(mixer.factor, i, j))[:, None] * v[j] for j in seen))
        outs.append(mixer.proj(torch.stack(rows).flatten(1)))
    return torch.stack(outs).view(x.shape)


def _drawn(mixer: URPEAttention) -> URPEAttention:
    for index, table in enumerate((mixer.bias, mixer.factor)):
        nn.init.normal_(table.table, generator=torch.Generator().manual_seed(index))
    return mixer.double()


def as_written() -> Check:
    """The mixer against loops, in float64, with gradients, beyond the table too; and token by token."""
    worst, streamed = 0.0, 0.0
    for spatial, size, causal in (((7,), (7,), False), ((9,), (4,), True), ((1,), (3,), True), ((3, 4), (2, 5), False)):
        mixer = _drawn(URPEAttention(6, 2, size=size, axes=len(size), causal=causal))
        x, weight = torch.randn(2, 2, *spatial, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        results = []
        for form in (mixer, partial(_slow, mixer)):
            leaf = x.clone().requires_grad_()
            out = form(leaf)
            results.append([out, *torch.autograd.grad((out * weight).sum(), [leaf, *mixer.parameters()])])
        worst = max(worst, *(float((a - b).detach().abs().max()) for a, b in zip(*results, strict=True)))
        if causal:
            streamed = max(streamed, float((run_stream(mixer, x)[0] - mixer(x)).detach().abs().max()))
    return Check(
        "mixer = eq. 8 pair by pair, outputs and gradients, on 1 and 2 axes; token by token = all at once",
        holds=max(worst, streamed) <= 1e-12,
        figures={"largest_error": worst, "largest_error_of_streaming": streamed},
        setting="float64, 1 to 12 tokens, tables smaller and larger than the grid, limit 1e-12",
    )


def factor_of_ones() -> Check:
    """At its start the model is the one with relative positions alone, to the last bit."""
    models = [
        seeded(lambda p=position: URPETransformer(20, 16, 2, 4, length=9, position=p), 0)
        for position in ("urpe", "rpe")
    ]
    models[1].load_state_dict({key: value for key, value in models[0].state_dict().items() if "factor" not in key})
    tokens = torch.arange(18).view(2, 9)
    return Check(
        "with C = 1 the model equals the one without C bit for bit, and has heads (2 n - 1) parameters more",
        holds=torch.equal(models[0](tokens), models[1](tokens))
        and count_params(models[0]) - count_params(models[1]) == 4 * 17,
        figures={"parameters_more": count_params(models[0]) - count_params(models[1])},
    )


def _small(task: Task, position: str = "urpe") -> URPETransformer:
    # Matrices of 64 channels start as large as 0.02 is for the paper's 768.
    return URPETransformer(
        task.vocab_size, 64, 2, 4, mlp_ratio=2, length=task.length, position=position, tied=False, init_std=0.07
    )


def _config(preset: Preset, steps: int) -> TrainConfig:
    steps = 2 if preset == "smoke" else steps
    return TrainConfig(steps=steps, batch_size=16, lr=3e-3, optimizer="adam", weight_decay=0.0)


def recipe(preset: Preset) -> Recipe:
    """Which position is it? "paper" is the paper's model, vocabulary, batch, rate and number of updates."""
    if preset == "paper":
        task = create_task("position", length=128, tokens=1000, train_items=5_120_000, eval_items=5000)
        config = TrainConfig(
            steps=40_000, batch_size=128, lr=7e-5, warmup=0.15, optimizer="adam", weight_decay=0.0, clip_norm=None
        )
        return Recipe(seeded(lambda: URPETransformer(1011, tied=False), 0), task, config)
    task = create_task("position", length=LENGTHS["position"], eval_items=32 if preset == "smoke" else 256)
    return Recipe(seeded(lambda: _small(task), 0), task, _config(preset, STEPS["position"]))


class _Relative(nn.Module):
    """Attention with relative positions of one kind inside the softmax, drawn at random, and C outside if asked for."""

    def __init__(self, kind: str, dim: int, num_heads: int, length: int, factor: bool) -> None:
        super().__init__()
        self.kind, self.num_heads, width = kind, num_heads, dim // num_heads
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.table = OffsetTable(
            (length,),
            num_heads if kind in ("learned", "t5") else width,
            std=1.0,
            buckets=8 if kind == "t5" else None,
        )
        self.u, self.w = (nn.Parameter(torch.randn(num_heads, width)) for _ in range(2))
        self.factor = OffsetTable((length,), num_heads) if factor else None
        if self.factor is not None:
            nn.init.normal_(self.factor.table, 1.0, 0.6)

    def forward(self, x: Tensor) -> Tensor:
        spatial, place = x.shape[1:-1], torch.arange(x.shape[1])
        q, k, v = (part(x).unflatten(-1, (self.num_heads, -1)) for part in (self.q, self.k, self.v))
        offsets, bias = self.table.matrix(spatial), None
        if self.kind in ("learned", "t5"):
            bias = offsets
        elif self.kind == "alibi":
            slopes = torch.tensor(alibi_slopes(self.num_heads), dtype=x.dtype)
            bias = -slopes[:, None, None] * (place[:, None] - place).abs()
        else:  # a vector for each offset: q_i . a_(j-i) (Shaw), and (q_i + w) . r_(j-i) + u . k_j (Transformer-XL)
            xl = self.kind == "transformer_xl"
            bias = torch.einsum("bihd,dij->bhij", q + self.w if xl else q, offsets)
            bias = bias + torch.einsum("hd,bjhd->bhj", self.u, k)[:, :, None] if xl else bias
            bias = bias * q.shape[-1] ** -0.5
        factor = None if self.factor is None else self.factor.matrix(spatial)
        return self.proj(universal_attention(q, k, v, bias, factor)[0].flatten(-2))


def equal_tokens(preset: Preset) -> Check:
    """Random models of three layers read one token n times: are their outputs equal at all positions?"""
    length, spread, nearest = 16, {}, {}
    for kind in ("learned", "t5", "alibi", "shaw", "transformer_xl"):
        for factor in (False, True):
            blocks = seeded(
                lambda k=kind, f=factor: nn.Sequential(
                    *(PostNormBlock(32, _Relative(k, 32, 4, length, f)) for _ in range(3))
                ),
                0,
            )
            token = torch.randn(1, 1, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
            with torch.no_grad():
                out = blocks.double()(token.expand(-1, length, -1))[0]
            if factor:
                nearest[kind] = round(float(torch.pdist(out).min()), 4)
            else:
                spread[kind] = float((out - out[:1]).abs().max())
    return Check(
        "Relative positions inside the softmax cannot tell equal tokens apart, whatever their weights; with C they can",
        holds=max(spread.values()) <= 1e-12 and min(nearest.values()) > 1e-3,
        figures={
            **{f"{kind}_largest_difference_between_positions": value for kind, value in spread.items()},
            **{f"{kind}_with_C_smallest_distance_between_positions": value for kind, value in nearest.items()},
        },
        setting=f"{length} equal tokens, 3 post-norm layers of 32 channels, 4 heads, drawn weights, float64; holds if without "
        "C no output differs by more than 1e-12 between positions, and with C any two positions are further than 1e-3 apart",
    )


def synthetic_tasks(preset: Preset) -> Check:
    """The paper's two tasks with no positions, with b alone, and with b and c; same budget and seeds."""
    smoke, figures, worst, best = preset == "smoke", {}, 1.0, 0.0
    for name, steps in STEPS.items():
        task = create_task(name, length=LENGTHS[name], eval_items=32 if smoke else 256)
        builds: dict[str, Callable[[], nn.Module]] = {
            kind: partial(_small, task, kind) for kind in ("urpe", "rpe", "none")
        }
        found, means = over_variants(builds, task, _config(preset, steps), (0,))
        figures |= {f"{name}_{key}": value for key, value in found.items()}
        figures[f"{name}_trivial"] = round(task.trivial()["accuracy"], 4)
        worst, best = min(worst, *found["urpe"]), max(best, means["rpe"], means["none"])
    return Check(
        "URPE learns where tokens are and to pick every second one; relative positions alone do not",
        holds=worst > 0.99 and best < 0.75,
        figures=figures,
        setting=f"tokens, each one of 10: {LENGTHS}; 2 layers of 64 channels; steps of 16 sequences: {STEPS}; seed 0; holds if "
        "URPE is above 0.99 on both tasks and the others below 0.75 on both; length, steps and learning rate were chosen such "
        "that URPE learns both within the budget, before the others were run",
    )


def small_overhead(preset: Preset) -> Check:
    """One layer with and without C, and without C in a fused kernel, which C rules out: parameters, time, memory."""
    lengths, dim, heads = ((32,), 32, 2) if preset == "smoke" else ((128, 256, 512), 192, 3)
    figures: dict[str, float | int] = {}
    ratios, extra = [], []
    for length in lengths:
        ours, plain = (URPEAttention(dim, heads, size=length, position=kind) for kind in ("urpe", "rpe"))
        x = torch.randn(4, length, dim)

        def fused(x: Tensor, layer: URPEAttention = plain) -> Tensor:
            return layer.proj(ops.attention(*layer._qkv(x), bias=layer.bias.matrix(x.shape[1:-1])).flatten(-2))

        times = least_seconds([partial(ours, x), partial(plain, x), partial(fused, x)], 2 if preset == "smoke" else 15)
        with_c, without = (
            peak_bytes(lambda layer=layer, x=x: layer(x.clone().requires_grad_()).sum().backward())
            for layer in (ours, plain)
        )
        models = [URPETransformer(100, dim, 2, heads, length=length, position=position) for position in ("urpe", "rpe")]
        tokens = torch.zeros(4, length, dtype=torch.long)
        whole = least_seconds([partial(model, tokens) for model in models], 2 if preset == "smoke" else 7)
        ratios.append(times[0] / times[1])
        extra.append(count_params(ours) - count_params(plain) - heads * (2 * length - 1))
        figures[f"time_over_rpe_at_{length}"] = round(ratios[-1], 3)
        figures[f"time_over_fused_rpe_at_{length}"] = round(times[0] / times[2], 3)
        figures[f"time_of_the_model_over_rpe_at_{length}"] = round(whole[0] / whole[1], 3)
        figures[f"training_memory_over_rpe_at_{length}"] = round(with_c / without, 3)
    return Check(
        "C costs next to nothing: heads (2 n - 1) parameters and less than 5 % of an attention layer's time",
        holds=max(ratios) < 1.05 and not any(extra),
        figures=figures,
        setting=f"one layer of {dim} channels, {heads} heads, batch 4; the model: 2 blocks with MLPs that share B and C; time: "
        "forward, least processor time of 15 (of 7 for the model); memory: forward and backward of the layer; holds if the "
        "layer's time is below 1.05 of that of the same code without C at every length",
    )


PROOFS = Proofs(
    recordings=(
        Recorded(
            "urpe.attention",
            build=lambda config: URPEAttention(config["embed_dim"], config["num_heads"], position="none"),
            run=_run_attention,
            keys=KeyMap(rules=[(r"^out_proj\.", "proj."), (r"^([qkv])_proj\.", r"\1.")]),
        ),
        Recorded("urpe.model", build=_model, run=_run_model),
        Recorded("urpe.data", build=lambda config: nn.Identity(), run=_run_data),
    ),
    checks=(as_written, factor_of_ones),
    recipe=recipe,
    claims=(equal_tokens, synthetic_tasks, small_overhead),
)
