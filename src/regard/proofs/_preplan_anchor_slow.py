"""Exactness of preplan-and-anchor: metrics, credit and objective against their equations, one position at a time."""

from __future__ import annotations

import statistics
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn

from regard.layers import SoftmaxAttention
from regard.proofs.base import Check
from regard.skeletons import DecoderLM
from regard.skeletons.attention_maps import attention_maps
from regard.skeletons.hugging_face import HuggingFaceLM
from regard.systems.analysis.preplan_anchor import Credit, fai, head_spans, waad
from regard.training import seeded
from regard.training.grpo import clipped_objective, divergence, group_advantages


def _drawn_maps(batch: int, layers: int, heads: int, length: int, seed: int) -> Tensor:
    scores = torch.randn(
        batch, layers, heads, length, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    return (3 * scores).masked_fill(~seen, float("-inf")).softmax(-1)


def _drawn_response(batch: int, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(0, length // 2, (batch, 1), generator=generator)
    stop = torch.randint(length // 2 + 1, length + 1, (batch, 1), generator=generator)
    places = torch.arange(length)
    return (places >= first) & (places < stop)


def closed_forms() -> Check:
    """A diagonal looks nowhere back, uniform attention has a closed form, and a column that all look at has the largest FAI."""
    length, window, worst = 40, 10, 0.0
    response = torch.ones(1, length, dtype=torch.bool)
    diagonal = torch.eye(length, dtype=torch.float64)[None]
    places = torch.arange(length, dtype=torch.float64)
    uniform = torch.ones(1, length, length, dtype=torch.float64).tril() / (places + 1)[:, None]
    near, far = places / 2, (window * (window + 1) / 2 + window * (places - window)) / (places + 1)
    worst = max(worst, float(waad(diagonal, window).abs().max()), float(head_spans(diagonal[:, None, None], response)))
    worst = max(worst, float((waad(uniform, window)[0] - torch.where(places <= window, near, far)).abs().max()))
    low, high = 10, 20
    for s in range(length):
        told = [1 / (t + 1) for t in range(s + low, min(length - 1, s + high) + 1)]
        expected = sum(told) / len(told) if told else 0.0
        worst = max(worst, abs(float(fai(uniform, response, (low, high))[0, s]) - expected))
    right = 0
    for stripe in range(length - low):
        columns = diagonal.clone()
        columns[0, stripe:] = 0
        columns[0, stripe:, stripe] = 1
        seen = fai(columns, response, (low, high))[0]
        right += int(seen.argmax() == stripe and seen[stripe] == 1)
    return Check(
        "Diagonal: WAAD 0; uniform attention: its closed form; a column stripe: the largest FAI, 1, is there",
        holds=worst <= 1e-12 and right == length - low,
        figures={"largest_error": worst, "stripes_found": right, "stripes": length - low},
        setting="40 positions, window 10, horizon 10 to 20, float64, limit 1e-12",
    )


def _slow(credit: Credit, maps: Tensor, response: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """WAAD, FAI and gamma position by position, in Python numbers; heads are chosen over the whole batch."""
    batch, layers, heads, length, _ = maps.shape
    spots = [(b, t) for b in range(batch) for t in range(length) if response[b, t]]
    spans = {
        (layer, head): sum(float(maps[b, layer, head, t, s]) * (t - s) for b, t in spots for s in range(t + 1))
        / len(spots)
        for layer, head in product(range(layers), range(heads))
    }
    ranked = sorted(spans, key=lambda head: spans[head])
    count = int(credit.head_share * len(ranked))
    near, far = ranked[:count], ranked[-count:]
    gamma = torch.ones(batch, length, dtype=torch.float64)
    signals = torch.zeros(2, batch, length, dtype=torch.float64)
    low, high = credit.horizon
    for b in range(batch):
        inside = [t for t in range(length) if response[b, t]]
        looks, seen, change = {}, {}, {}
        for t in inside:
            weights = [sum(float(maps[b, layer, h, t, s]) for layer, h in near) / count for s in range(t + 1)]
            looks[t] = sum(weight * min(t - s, credit.window) for s, weight in enumerate(weights))
            later = [u for u in inside if t + low <= u <= t + high]
            told = [sum(float(maps[b, layer, h, u, t]) for layer, h in far) / count for u in later]
            seen[t] = sum(told) / len(told) if told else 0.0
            signals[0, b, t], signals[1, b, t] = looks[t], seen[t]
        for t in inside:
            change[t] = abs(looks[t] - looks[t + 1]) if t + 1 in looks else 0.0
        number = max(1, int(credit.share * len(inside) + 1e-9))
        sign = -1 if credit.largest else 1
        local = sorted(inside, key=lambda t: (sign * change[t], t))[:number]
        anchors = sorted(inside, key=lambda t: (sign * seen[t], t))[:number]
        extra = credit.gain - 1
        if credit.scheme != "coupled":
            for t in local if credit.scheme == "local_chunk" else anchors:
                gamma[b, t] += extra
            continue
        tau_waad, tau_change = statistics.median(looks.values()), statistics.median(change.values())
        dominated, introducing = [], set()
        for t in anchors:
            before = [u for u in range(t - 1, t - 1 - credit.back, -1) if u in change]
            if before and looks[t] <= tau_waad and max(change[u] for u in before) >= tau_change:
                dominated.append(t)
                introducing.add(max(before, key=lambda u: change[u]))
        for t in anchors:
            gamma[b, t] += (1 - credit.alpha) * extra if t in dominated else extra
        for t in introducing:
            gamma[b, t] += credit.alpha * extra
    return signals[0], signals[1], gamma


def written_out() -> Check:
    """WAAD, FAI, peaks and all three schemes, vectorised over a batch with prompts and padding, against loops."""
    worst, changed, cases = 0.0, 0.0, 0
    for seed, scheme, largest in product(range(3), ("local_chunk", "global_anchor", "coupled"), (True, False)):
        for back, share in ((1, 0.4), (3, 0.2), (2, 1.0)):
            credit = Credit(scheme, horizon=(3, 9), back=back, share=share, largest=largest, window=4)  # type: ignore[arg-type]
            maps, response = _drawn_maps(3, 2, 4, 22, seed), _drawn_response(3, 22, seed)
            signals = credit.signals(maps, response)
            gamma = 1 + credit.from_signals(*signals, response)
            for ours, slow in zip((*signals, gamma), _slow(credit, maps, response), strict=True):
                worst = max(worst, float((ours - slow)[response].abs().max()))
            changed += float((gamma != 1).double().mean())
            cases += 1
    return Check(
        "Weights of the three schemes, vectorised = position by position",
        holds=worst <= 1e-9 and changed > 0,
        figures={"largest_error": worst, "cases": cases, "share_of_tokens_weighted": round(changed / cases, 3)},
        setting="float64, drawn causal maps of 8 heads and 22 positions, responses of drawn place and length, "
        "top and bottom, k 1 to 3, 20 to 100 % of the tokens, limit 1e-9",
    )


def gamma_by_hand() -> Check:
    """Ten tokens with signals chosen so that every term of the coupled weights is met, and its bonus added up."""
    # Changes of WAAD: 0 0 4 4 0 0 4 4 0 and 0 at the end. Anchors (largest FAI, 40 %): 3, 4, 8, 9.
    looks = torch.tensor([[1.0, 1, 1, 5, 1, 1, 1, 5, 1, 1]], dtype=torch.float64)
    seen = torch.tensor([[0.0, 0, 0, 9, 8, 0, 0, 0, 7, 6]], dtype=torch.float64)
    whole = torch.ones(1, 10, dtype=torch.bool)
    credit = Credit("coupled", gain=1.5, share=0.4, back=1, alpha=0.5)
    # k = 1: 3 looks far itself, so it keeps its bonus; 4 and 8 are introduced by 3 and 7; 9 follows 8, whose change is 0 and
    # equals the median, so 8 introduces it.
    expected = [1, 1, 1, 1.75, 1.25, 1, 1, 1.25, 1.5, 1.25]
    worst = float((1 + credit.from_signals(looks, seen, whole) - torch.tensor([expected])).abs().max())
    conserved = float(credit.from_signals(looks, seen, whole).sum() - 0.5 * 4)
    # k = 3: the introducing token of 4, 8 and 9 are 3, 7 and 7: one less than there are anchors, and the sum falls by 0.25.
    wide = Credit("coupled", back=3).from_signals(looks, seen, whole)
    expected = [1, 1, 1, 1.75, 1.25, 1, 1, 1.25, 1.25, 1.25]
    worst = max(worst, float((1 + wide - torch.tensor([expected])).abs().max()), abs(float(wide.sum()) - 1.75))
    chunk = Credit("local_chunk").from_signals(looks, seen, whole)
    worst = max(worst, float((chunk - torch.tensor([[0, 0, 0.5, 0.5, 0, 0, 0.5, 0.5, 0, 0]])).abs().max()))
    anchored = Credit("global_anchor").from_signals(looks, seen, whole)
    worst = max(worst, float((anchored - torch.tensor([[0, 0, 0, 0.5, 0.5, 0, 0, 0, 0.5, 0.5]])).abs().max()))
    return Check(
        "Weights of hand cases; the coupled bonus sums to that of the anchors when each has a preplan token of its own",
        holds=max(worst, abs(conserved)) <= 1e-12,
        figures={"largest_error": worst, "bonus_not_conserved": conserved},
        setting="ten tokens, g = 1.5, alpha = 0.5, k = 1 (as many introducing tokens as anchors) and k = 3 (two share one)",
    )


def maps_are_those_in_use() -> Check:
    """Maps of the extra pass, times the values, are what the fused pass computed; the model stays as it was."""
    tokens = torch.randint(0, 20, (2, 13), generator=torch.Generator().manual_seed(0))
    worst, kept = 0.0, True
    for kind in ("llama", "qwen3"):
        config = {"model_type": kind, "vocab_size": 20, "hidden_size": 32, "intermediate_size": 32, "head_dim": 8}
        config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        model = seeded(partial(HuggingFaceLM, config), 0).double()
        for parameter in model.parameters():  # fresh weights hardly tell tokens apart
            nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(parameter.numel()))
        values: list[Tensor] = []
        outs: list[Tensor] = []
        for layer in model.lm.model.layers:
            layer.self_attn.v_proj.register_forward_hook(lambda _, __, out, to=values: to.append(out))
            layer.self_attn.o_proj.register_forward_pre_hook(lambda _, inputs, to=outs: to.append(inputs[0]))
        with torch.no_grad():
            fused = model(tokens)
        held = list(zip(values, outs, strict=True))
        maps, logits = attention_maps(model, tokens)
        for index, (value, out) in enumerate(held):
            heads = value.unflatten(-1, (2, 8)).transpose(1, 2).repeat_interleave(2, 1)
            worst = max(worst, float((maps[:, index] @ heads - out.unflatten(-1, (4, 8)).transpose(1, 2)).abs().max()))
        worst = max(worst, float((logits - fused).abs().max()))
        kept &= model.training and model.lm.config._attn_implementation == "sdpa"
    own = seeded(lambda: DecoderLM(20, 16, [SoftmaxAttention(16, 4, kv_heads=2, causal=True) for _ in range(2)]), 0)
    own = own.double()
    heard: list[tuple[Tensor, Tensor]] = []
    for block in own.blocks:
        block.mixer.register_forward_hook(lambda _, inputs, out, to=heard: to.append((inputs[0], out)))
    maps, _ = attention_maps(own, tokens)
    for index, (x, out) in enumerate(heard):
        mixer = own.blocks[index].mixer
        value = mixer.kv(x).unflatten(-1, (2, 2, 4))[:, :, 1].transpose(1, 2).repeat_interleave(2, 1)
        again = mixer.proj((maps[:, index] @ value).transpose(1, 2).flatten(2))
        worst = max(worst, float((again - out).detach().abs().max()))
    return Check(
        "Attention maps of the extra pass, times the values, equal the outputs of the fused pass",
        holds=worst <= 1e-6 and kept,
        figures={"largest_error": worst, "models_left_as_found": int(kept)},
        setting="Llama and Qwen3 of transformers (its eager softmax is float32) and a decoder of this library, shared keys, "
        "float64 weights, limit 1e-6",
    )


def objective_by_hand() -> Check:
    """Group advantages, the clipped objective and the divergence, token by token in Python numbers."""
    generator = torch.Generator().manual_seed(0)
    now, before, weights = (torch.randn(4, 7, generator=generator, dtype=torch.float64) for _ in range(3))
    before = now + 0.3 * before
    response = _drawn_response(4, 7, 1)
    loss, apart = clipped_objective(now, before, weights, response, 0.2), divergence(now, before, response)
    slow_loss, slow_apart = 0.0, 0.0
    for b in range(4):
        places = [t for t in range(7) if response[b, t]]
        for t in places:
            ratio = float((now[b, t] - before[b, t]).exp())
            weight = float(weights[b, t])
            slow_loss -= min(ratio * weight, min(max(ratio, 0.8), 1.2) * weight) / len(places) / 4
            slow_apart += (1 / ratio - float(before[b, t] - now[b, t]) - 1) / len(places) / 4
    rewards = torch.tensor([[1.0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 1]], dtype=torch.float64)
    worst = max(abs(float(loss) - slow_loss), abs(float(apart) - slow_apart))
    for row, got in zip(rewards.tolist(), group_advantages(rewards, eps=0).nan_to_num(0.0).tolist(), strict=True):
        middle, spread = statistics.fmean(row), statistics.stdev(row)
        wanted = [(value - middle) / spread if spread else 0.0 for value in row]
        worst = max(worst, *(abs(a - b) for a, b in zip(got, wanted, strict=True)))
    return Check(
        "GRPO's advantages, clipped objective and divergence = token by token",
        holds=worst <= 1e-12,
        figures={"largest_error": worst},
        setting="4 answers of drawn place and length, ratios beyond both sides of 1 +- 0.2, float64, limit 1e-12",
    )
