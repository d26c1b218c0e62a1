"""The attentions of CAB written out token by token, for what no recording of the release can hold: their corrected forms."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.systems.sequence.cab import (
    ABCAttention,
    CausalLongShortAttention,
    NystromAttention,
    PerformerAttention,
)


def _qkv(mixer: ABCAttention | NystromAttention | PerformerAttention, x: Tensor, head: int) -> tuple[Tensor, ...]:
    """q, k and v of one sample and head, `(N, head_dim)` each."""
    part = slice(head * mixer.head_dim, (head + 1) * mixer.head_dim)
    return tuple(layer(x)[:, part] for layer in (mixer.q, mixer.k, mixer.v))


def causal_abc(mixer: ABCAttention, x: Tensor) -> Tensor:
    """Causal ABC on one sample `(N, dim)`: every slot after every token from all tokens so far."""
    heads = []
    for head in range(mixer.num_heads):
        q, k, v = _qkv(mixer, x, head)
        rows = []
        for t in range(len(x)):
            keys, values = k[: t + 1], v[: t + 1]
            slot_keys = torch.stack([(keys @ column).softmax(0) @ keys for column in mixer.slots_k.t()])
            slot_values = torch.stack([(values @ column).softmax(0) @ values for column in mixer.slots_v.t()])
            rows.append((slot_keys @ q[t] / math.sqrt(mixer.head_dim)).softmax(0) @ slot_values)
        heads.append(torch.stack(rows))
    return mixer.proj(torch.cat(heads, -1))


def causal_performer(mixer: PerformerAttention, x: Tensor) -> Tensor:
    """Causal Performer on one sample: the estimate of e^(q k / sqrt(d)) for every pair, as a mean over w."""
    heads = []
    for head in range(mixer.num_heads):
        q, k, v = _qkv(mixer, x, head)
        w = mixer.directions[head]
        rows = []
        for t in range(len(x)):
            weights = []
            for j in range(t + 1):
                a, b = q[t] / mixer.head_dim**0.25, k[j] / mixer.head_dim**0.25
                weights.append((w @ (a + b) - (a @ a + b @ b) / 2).exp().mean())
            rows.append(torch.stack(weights) / sum(weights) @ v[: t + 1])
        heads.append(torch.stack(rows))
    return mixer.proj(torch.cat(heads, -1))


def nystrom(mixer: NystromAttention, x: Tensor) -> Tensor:
    """Nyström attention on one sample, its pseudoinverse by the same six steps, written for one matrix."""
    heads = []
    for head in range(mixer.num_heads):
        q, k, v = (part * mixer.head_dim**-0.25 for part in _qkv(mixer, x, head))
        v = v * mixer.head_dim**0.25
        short, longer = divmod(len(x), mixer.landmarks)
        sizes = [short] * (mixer.landmarks - longer) + [short + 1] * longer
        marks_q, marks_k = (torch.stack([piece.mean(0) for piece in part.split(sizes)]) for part in (q, k))
        a = (marks_q @ marks_k.t()).softmax(-1)
        one, z = torch.eye(len(a), dtype=a.dtype), a.t() / a.sum(0).max()
        for _ in range(6):
            az = a @ z
            z = z @ (13 * one - az @ (15 * one - az @ (7 * one - az))) / 4
        heads.append((q @ marks_k.t()).softmax(-1) @ z @ (marks_q @ k.t()).softmax(-1) @ v)
    return mixer.proj(torch.cat(heads, -1))


def causal_long_short(mixer: CausalLongShortAttention, x: Tensor) -> Tensor:
    """Causal Transformer-LS on one sample, without the release's memory of zeros."""
    k, v, logits = mixer.k(x), mixer.v(x), mixer.compress(x)
    near_k, near_v = mixer.norm_near(k), mixer.norm_near(v)
    size, rank, width = mixer.chunk_size, mixer.rank, mixer.head_dim

    def code(distance: int) -> Tensor:
        rates = 10000.0 ** (-torch.arange(0, mixer.dim, 2, dtype=x.dtype) / mixer.dim)
        return torch.cat([(distance * rates).sin(), (distance * rates).cos()])

    summaries = []
    for start in range(0, len(x) - size + 1, size):
        part = slice(start, start + size)
        for r in range(rank):
            weights = logits[part, r::rank].softmax(0).repeat_interleave(width, 1)  # (C, dim)
            summaries.append([mixer.norm_far((weights * whole[part]).sum(0)) for whole in (k, v)])
    rows = []
    for t in range(len(x)):
        seen, heads = t // size * rank, []
        q = mixer.q(x[t]) / math.sqrt(width)
        for head in range(mixer.num_heads):
            part = slice(head * width, (head + 1) * width)
            scores, values = [], []
            for j, (key, value) in enumerate(summaries[:seen]):
                scores.append(q[part] @ (key + mixer.position_far(code(seen - 1 - j)))[part])
                values.append(value[part])
            for j in range(max(0, t - mixer.window_size + 1), t + 1):
                content = (q[part] + mixer.content_bias[head]) @ near_k[j, part]
                position = (q[part] + mixer.position_bias[head]) @ F.linear(code(t - j), mixer.position_near.weight)[
                    part
                ]
                scores.append(content + position)
                values.append(near_v[j, part])
            heads.append(torch.stack(scores).softmax(0) @ torch.stack(values))
        rows.append(mixer.proj(torch.cat(heads)))
    return torch.stack(rows)
