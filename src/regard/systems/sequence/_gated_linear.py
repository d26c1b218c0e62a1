"""Gated linear attention as Lizard has it: the sum with fading weights, its feature map, and its gates."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import checks

Gate = Literal["scalar", "none", "head", "low_rank", "pooled"]
GATES = ("scalar", "none", "head", "low_rank", "pooled")
_RANK = 16
"""Of the low-rank gate, and the root that it and the pooled gate take of their sigmoid, as GLA does."""


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    *,
    state: Tensor | None = None,
    chunk_size: int | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    r"""Causal linear attention whose memory fades by a factor that each token sets, divided by the sum of its weights.

    $$o_i = \frac{\sum_{j \le i} w_{ij} v_j}{\sum_{j \le i} w_{ij} + \epsilon},\quad
      w_{ij} = \sum_f q_{if}\, k_{jf}\, e^{c_{if} - c_{jf}},\quad c_i = \sum_{l \le i} \log \gamma_l$$

    so γ of token i fades what was there before it, not its own write: $S_i = \gamma_i S_{i-1} + k_i [v_i, 1]^\top$. Weights
    inside a chunk are formed from differences $c_i - c_j \le 0$, and each chunk hands on its state relative to its own end: no
    exponent is ever above 0, where $e^{-c_j}$, folded into k for two plain products, overflows. (How the paper keeps its folded
    form stable is not known.) One chunk of all tokens is the parallel form, chunks of one token are the recurrence.

    Args:
        q: features that are not negative, `(B, N, heads, features)`. k: `(B, N, kv_heads, features)`.
        v: `(B, N, kv_heads, value_dim)`.
        log_gate: log γ ≤ 0, `(B, N, 1 or kv_heads, 1 or features)`.
        state: `[S, its sum of keys]`, `(B, kv_heads, features, value_dim + 1)`, after the tokens before these.
        chunk_size: None is 64, or 16 where every feature has a gate of its own (which costs chunk_size as many numbers).

    Returns:
        `(B, N, heads, value_dim)` and the state after the last token, both in float32 or wider.
    """
    checks.heads_last(q, k, v, ranks=(1,))
    wide, length, groups = torch.promote_types(q.dtype, torch.float32), q.shape[1], k.shape[2]
    shape = tuple(log_gate.shape)
    if shape[:2] != q.shape[:2] or shape[2:3] not in ((1,), (groups,)) or shape[3:] not in ((1,), (q.shape[-1],)):
        raise ValueError(f"log_gate must be (batch, length, 1 or {groups}, 1 or {q.shape[-1]}), got shape {shape}.")
    each = shape[3] > 1
    if chunk_size is None:
        chunk_size = 16 if each else 64
    checks.positive("chunk_size", chunk_size)
    size = min(length, chunk_size)
    parts = [x.to(wide).movedim(1, -2) for x in (q, k, F.pad(v, (0, 1), value=1.0), log_gate)]  # (B, heads, N, *)
    # (B, heads, chunks, size, *); what is added at the end writes nothing and fades nothing.
    queries, keys, values, gates = (F.pad(x, (0, 0, 0, -length % size)).unflatten(-2, (-1, size)) for x in parts)
    queries = queries.unflatten(1, (groups, -1))  # (B, kv_heads, heads of a group, chunks, size, features)
    fade = gates.cumsum(-2)  # c, counted from the start of the chunk
    past = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    between = (fade[..., :, None, :] - fade[..., None, :, :]).masked_fill(~past[..., None], -math.inf).exp()
    if each:
        weights = torch.einsum("bgrnif,bgnijf->bgrnij", queries, keys[..., None, :, :] * between)
    else:
        weights = (queries @ keys[:, :, None].mT) * between[:, :, None, ..., 0]
    end = fade[..., -1:, :]
    # What each chunk adds to the state, (B, kv_heads, chunks, features, value_dim + 1), and what it leaves of it.
    written, kept = (keys * (end - fade).exp()).mT @ values, end.exp().mT
    memory = torch.zeros_like(written[:, :, 0]) if state is None else state.to(wide)
    before = []
    for index in range(written.shape[2]):
        before.append(memory)
        memory = kept[:, :, index] * memory + written[:, :, index]
    read = (queries * fade[:, :, None].exp()) @ torch.stack(before, 2)[:, :, None]
    out = (weights @ values[:, :, None] + read).flatten(-3, -2)[..., :length, :].flatten(1, 2).movedim(-2, 1)
    return out[..., :-1] / (out[..., -1:] + eps), memory


class Hedgehog(nn.Module):
    r"""φ(x) = [softmax(x W), softmax(-x W)], features that are not negative (Zhang et al., 2024, arXiv 2402.04347).

    Every head has a W of its own, as there and in LoLCATs (whose defaults Lizard keeps where it says nothing); it starts
    orthogonal, which is ours. (Lizard's Table 13 says softmax; its Section 4 writes exp for the same map.)

    Args:
        heads, head_dim: of x. features: of φ, even.
    """

    def __init__(self, heads: int, head_dim: int, features: int) -> None:
        super().__init__()
        checks.divisible("feature_dim", features, "its two halves", 2)
        self.weight = nn.Parameter(torch.empty(heads, features // 2, head_dim))
        for weight in self.weight.detach():
            nn.init.orthogonal_(weight)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., heads, head_dim)` -> `(..., heads, features)` in float32 or wider."""
        scores = torch.einsum("...hd,hfd->...hf", x, self.weight).to(torch.promote_types(x.dtype, torch.float32))
        return torch.cat([scores.softmax(-1), (-scores).softmax(-1)], -1)


class ForgetGate(nn.Module):
    r"""log γ of every token, from its input x (or its keys).

    | kind | γ | shape |
    |---|---|---|
    | scalar | sigmoid(x w + b), the paper's | one a token |
    | none | 1 | |
    | head | exp(-e^a softplus(x W + b)), Mamba-2's | one a key head |
    | low_rank | sigmoid(x A B + b)^(1/16), GLA's | one a feature of a key head |
    | pooled | sigmoid(k, pooled to as many numbers as there are features)^(1/16), Liger's: no parameters | likewise |

    All but "scalar" are those of the works named; the paper's ablation (Table 4) has one number a token of Mamba-2's form,
    and neither root. Biases, which the paper does not have, start where γ is `start`. (Without them γ would start at 1/2: a
    memory of two tokens.)

    Args:
        dim: channels of x. kv_heads, features: of the keys. kind: see above. start: γ of an untrained gate.
    """

    def __init__(self, dim: int, kv_heads: int, features: int, kind: Gate = "scalar", start: float = 0.99) -> None:
        super().__init__()
        self.kind, self.kv_heads, self.features = checks.one_of("gate", kind, GATES), kv_heads, features
        if not 0 < start < 1:
            raise ValueError(f"gate_start must lie between 0 and 1, got {start}.")
        logit = math.log(start / (1 - start))
        self.to_gate: nn.Module | None = None
        if kind == "scalar":
            self.to_gate = _starting_at(nn.Linear(dim, 1), logit)
        elif kind == "head":
            self.to_gate = _starting_at(nn.Linear(dim, kv_heads), math.log(1 / start - 1))  # softplus of it is -log γ
            self.log_rate = nn.Parameter(torch.zeros(kv_heads))
        elif kind == "low_rank":
            wide = nn.Linear(_RANK, kv_heads * features)
            rooted = _RANK * math.log(start)
            self.to_gate = nn.Sequential(
                nn.Linear(dim, _RANK, bias=False), _starting_at(wide, rooted - math.log(-math.expm1(rooted)))
            )

    def forward(self, x: Tensor, k: Tensor) -> Tensor:
        """x `(B, N, dim)`, k `(B, N, kv_heads, head_dim)` -> `(B, N, 1 or kv_heads, 1 or features)`, float32 or wider."""
        wide = torch.promote_types(x.dtype, torch.float32)
        if self.kind == "none":
            return x.new_zeros(*x.shape[:2], 1, 1, dtype=wide)
        if self.to_gate is None:
            pooled = F.adaptive_avg_pool1d(k.flatten(2).to(wide), self.kv_heads * self.features)
            return F.logsigmoid(pooled).unflatten(-1, (self.kv_heads, -1)) / _RANK
        scores = self.to_gate(x).to(wide)
        if self.kind == "head":
            return (-self.log_rate.to(wide).exp() * F.softplus(scores))[..., None]
        if self.kind == "low_rank":
            return F.logsigmoid(scores).unflatten(-1, (self.kv_heads, -1)) / _RANK
        return F.logsigmoid(scores)[..., None]

    def extra_repr(self) -> str:
        return f"kind={self.kind}"


def _starting_at(linear: nn.Linear, bias: float) -> nn.Linear:
    nn.init.normal_(linear.weight, std=0.02)
    nn.init.constant_(linear.bias, bias)
    return linear
