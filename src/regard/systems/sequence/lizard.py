"""Lizard: An Efficient Linearization Framework for Large Language Models (Nguyen et al., 2025, arXiv 2507.09025).

Each softmax attention of a trained language model becomes the sum of two cheap ones: gated linear attention, whose gate
also takes the place of rotary positions, and exact softmax over a short window with learned sinks. `regard.linearize`
converts a model: what is new first learns to imitate the outputs of its attention, then learns, with low-rank updates of q,
k and v, to predict text.

The authors have released no code: this is a reconstruction from the text of the paper (its version 4). Ours are, as said
where they stand: all initial values, the bias of the gate, the gates other than "scalar", and which layers of a hybrid keep
softmax.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import ops
from regard.checkpoint import KeyMap
from regard.layers import Mixer
from regard.layers.rotary_attention import RotaryAttention
from regard.registry import System, Variant, register_mixer, register_system
from regard.skeletons.llama import Llama
from regard.systems.sequence._gated_linear import ForgetGate, Gate, Hedgehog, gated_linear_attention


class LizardState(NamedTuple):
    """What a stream remembers: bounded, whatever the number of tokens seen.

    Attributes:
        memory: of `gated_linear_attention`. keys, values: the last window_size - 1, `(B, t, kv_heads, head_dim)`.
    """

    memory: Tensor
    keys: Tensor
    values: Tensor


class LizardCore(nn.Module):
    r"""The two branches on q, k and v that carry no rotary positions.

    $$y_i = \underbrace{\mathrm{GLA}(\phi_q(q), \phi_k(k), v, \gamma)_i}_{\text{global}} + \alpha
      \underbrace{\frac{\sum_{j=i-w+1}^{i} e^{q_i^\top k_j / \sqrt d}\, v_j}
      {\sum_{j=i-w+1}^{i} e^{q_i^\top k_j / \sqrt d} + \sum_{r=1}^{m} e^{t_r}}}_{\text{anchor window}}$$

    (Section 3.1.) The meta logits t stand in the denominator alone, for all heads of the layer: sinks that let the window say
    nothing. (The paper prints the sum of t and calls t logits, hence exp.) Only the sum of their exponentials matters, so m
    changes how fast it is learned. φ_q is of each query head, φ_k of each key head, so that heads which share keys share a
    memory. At the start, which is ours, t = 0, α = 1/2 and φ_q of a head equals φ_k of its keys. (The first branch is a mean
    of values already: with α = 1 the sum would start at twice the scale.)

    Args:
        dim: channels of x. num_heads, kv_heads, head_dim: of q, k and v.
        window_size: w; 0 leaves the window out. meta: m; 0 is a plain softmax. feature_dim: of φ.
        gate, gate_start: see `ForgetGate`. scale: None is head_dim ** -0.5.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        window_size: int = 128,
        meta: int = 4,
        feature_dim: int = 128,
        gate: Gate = "scalar",
        gate_start: float = 0.99,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        if window_size < 0 or meta < 0:
            raise ValueError(f"window_size and meta must be at least 0, got {window_size} and {meta}.")
        self.kv_heads, self.head_dim, self.window_size = kv_heads, head_dim, window_size
        self.feature_dim, self.scale = feature_dim, scale
        self.phi_q, self.phi_k = (Hedgehog(heads, head_dim, feature_dim) for heads in (num_heads, kv_heads))
        with torch.no_grad():
            self.phi_q.weight.copy_(self.phi_k.weight.repeat_interleave(num_heads // kv_heads, 0))
        self.gate = ForgetGate(dim, kv_heads, feature_dim, gate, gate_start)
        self.meta = nn.Parameter(torch.zeros(meta)) if window_size and meta else None
        self.alpha = nn.Parameter(torch.tensor(0.5)) if window_size else None

    def forward(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, state: LizardState | None = None
    ) -> tuple[Tensor, LizardState]:
        """Both branches, in the shape of q, and the state after the last token.

        Args:
            x: `(B, N, dim)`, for the gate. q: `(B, N, num_heads, head_dim)`. k, v: `(B, N, kv_heads, head_dim)`.
            state: after the tokens before these.
        """
        features = self.phi_q(q), self.phi_k(k)
        before = None if state is None else state.memory
        out, memory = gated_linear_attention(*features, v.to(features[0].dtype), self.gate(x, k), state=before)
        if state is not None:
            k, v = torch.cat([state.keys, k], 1), torch.cat([state.values, v], 1)
        if self.alpha is not None:
            out = out + self.alpha * self.anchor(q, k, v)
        kept = max(k.shape[1] - max(self.window_size - 1, 0), 0)
        return out.to(q.dtype), LizardState(memory, k[:, kept:].clone(), v[:, kept:].clone())

    def anchor(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The window branch of the queries of the last N of the tokens of k and v: `(B, N, num_heads, head_dim)`."""
        before, total = k.shape[1] - q.shape[1], k.shape[1]
        if q.shape[1] == 1:
            near = slice(max(total - self.window_size, 0), None)
            out, lse = ops.attention(q, k[:, near], v[:, near], scale=self.scale, return_lse=True)
        else:
            queries = F.pad(q, (0, 0, 0, 0, before, 0))
            out, lse = ops.neighborhood_attention(
                queries, k, v, kernel_size=min(self.window_size, total), causal=True, scale=self.scale, return_lse=True
            )
            out, lse = out[:, before:], lse[:, before:]  # type: ignore[index]
        if self.meta is None:
            return out
        # As merged with keys that have these logits and no values: what is left is their share of the denominator less.
        return out * (lse - self.meta.logsumexp(0)).sigmoid()[..., None]

    def state_size(self, length: int) -> int:
        """Numbers of a stream after `length` tokens: a constant once the window is full."""
        memory = self.kv_heads * self.feature_dim * (self.head_dim + 1)
        return memory + 2 * min(length, max(self.window_size - 1, 0)) * self.kv_heads * self.head_dim

    def extra_repr(self) -> str:
        return f"window_size={self.window_size}, feature_dim={self.feature_dim}"


@register_mixer("lizard")
class LizardAttention(RotaryAttention):
    r"""LLaMA's projections around `LizardCore` (equations there): out = W_o y. Nothing is turned; order is the gate's.

    Args:
        dim: channels. num_heads: of the queries. kv_heads: of keys and values, which share gates and memory; None is as many.
        head_dim: None is dim / num_heads. bias: of q, k and v.
        core: arguments of `LizardCore`: window_size, meta, feature_dim, gate, gate_start.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        causal: bool = True,
        **core: Any,
    ) -> None:
        super().__init__(dim, num_heads, kv_heads=kv_heads, head_dim=head_dim, bias=bias, causal=causal)
        self.core = LizardCore(dim, num_heads, self.kv_heads, self.head_dim, **core)

    def heads(self, x: Tensor, state: LizardState | None = None) -> tuple[Tensor, LizardState]:
        """Both branches before the output projection, `(B, N, num_heads, head_dim)`, and the state after the last token."""
        return self.core(x, *self.project(x), state)

    def state_size(self, length: int) -> int:
        """A constant once the window is full."""
        return self.core.state_size(length)


def keeps_softmax(depth: int, share: float) -> list[bool]:
    """Which of `depth` layers keep softmax, spread evenly: of a half, every second, beginning with the second."""
    if not 0 <= share <= 1:
        raise ValueError(f"softmax_share must lie between 0 and 1, got {share}.")
    return [math.floor((index + 1) * share) > math.floor(index * share) for index in range(depth)]


class LizardLM(Llama):
    """LLaMA with `LizardAttention` in its layers, or in those that `softmax_share` leaves.

    Loads converted models under Hugging Face's names (`regard.linearize`).

    Args:
        vocab_size, dim, depth, num_heads, kv_heads, head_dim, glu_dim, norm_eps, tied: of the LLaMA that is converted.
        rope_base: of layers that keep softmax.
        softmax_share: of the layers, spread evenly, or one boolean for each.
        core: arguments of `LizardCore`: window_size, meta, feature_dim, gate, gate_start.
    """

    authors_keys = KeyMap(rules=[*Llama.host_rules, *RotaryAttention.authors_keys.rules], drop=Llama.host_drop)

    def __init__(
        self,
        vocab_size: int = 128256,
        dim: int = 4096,
        depth: int = 32,
        num_heads: int = 32,
        kv_heads: int = 8,
        head_dim: int | None = None,
        glu_dim: int = 14336,
        norm_eps: float = 1e-5,
        tied: bool = False,
        rope_base: float = 500000.0,
        softmax_share: float | Sequence[bool] = 0.0,
        drop_path_rate: float = 0.0,
        **core: Any,
    ) -> None:
        softmax = (
            keeps_softmax(depth, softmax_share) if isinstance(softmax_share, (int, float)) else list(softmax_share)
        )
        if len(softmax) != depth:
            raise ValueError(f"softmax_share must hold one boolean for each of the {depth} layers, got {len(softmax)}.")
        size: dict[str, Any] = {"kv_heads": kv_heads, "head_dim": head_dim}

        def mixer(index: int) -> Mixer:
            if softmax[index]:
                return RotaryAttention(dim, num_heads, rope_base=rope_base, **size)
            return LizardAttention(dim, num_heads, **size, **core)

        super().__init__(
            mixer=mixer,
            vocab_size=vocab_size,
            dim=dim,
            depth=depth,
            glu_dim=glu_dim,
            norm_eps=norm_eps,
            tied=tied,
            drop_path_rate=drop_path_rate,
        )


def _variant(name: str, teacher: int, source: str, **options: Any) -> Variant:
    """The released teacher's parameters and, in each converted layer, two feature maps, the gate, the sinks and alpha."""
    at = {"dim": 4096, "depth": 32, "num_heads": 32, "kv_heads": 8, "head_dim": None, "softmax_share": 0.0, **options}
    converted = at["depth"] - sum(keeps_softmax(at["depth"], at["softmax_share"]))
    maps = (at["num_heads"] + at["kv_heads"]) * (at["head_dim"] or at["dim"] // at["num_heads"]) * 64
    extra = converted * (maps + at["dim"] + 1 + 4 + 1)
    note = (
        "converted layers add head_dim x 64 for each head of queries and of keys (feature maps), dim + 1 (gate), 4 (sinks) and "
        "1 (alpha) each: the count of this reading, the paper prints none"
    )
    return Variant(name, LizardLM, teacher + extra, inputs=((1, 512),), source=f"{source}; {note}", options=options)


_LLAMA_1B: dict[str, Any] = {"dim": 2048, "depth": 16, "glu_dim": 8192, "tied": True}
_LLAMA_3B: dict[str, Any] = {**_LLAMA_1B, "dim": 3072, "depth": 28, "num_heads": 24, "head_dim": 128}

SYSTEM = register_system(
    System(
        slug="lizard",
        title="Lizard: An Efficient Linearization Framework for Large Language Models",
        year=2025,
        arxiv="2507.09025",
        evidence="paper_text",
        idea="Softmax attention of a trained model becomes gated linear attention plus a short window with learned sinks; "
        "a reconstruction, since the authors have released no code.",
        mixers=("lizard",),
        variants=(
            _variant("lizard_llama3_8b", 8_030_261_248, "LLaMA-3-8B, 8,030,261,248 parameters"),
            _variant(
                "lizard_llama3_8b_hybrid",
                8_030_261_248,
                "LLaMA-3-8B, 8,030,261,248 parameters, half of whose layers keep softmax (every second: ours)",
                softmax_share=0.5,
            ),
            _variant("lizard_llama32_1b", 1_235_814_400, "Llama-3.2-1B, 1,235,814,400 parameters", **_LLAMA_1B),
            _variant("lizard_llama32_3b", 3_212_749_824, "Llama-3.2-3B, 3,212,749,824 parameters", **_LLAMA_3B),
            _variant("lizard_mistral_7b", 7_241_732_096, "Mistral-7B, 7,241,732,096 parameters", vocab_size=32000),
        ),
        reports=(
            "MMLU, 5-shot, LLaMA-3-8B with 0.04B tokens: Lizard 61.2, hybrid of a half 65.1, LoLCATs 52.8, Liger 43.4, teacher "
            "66.6; Mistral-7B 60.8, LoLCATs 51.4",
            "Llama-3.2-1B: mean of benchmarks 60.1, teacher 59.9, LoLCATs 59.6; 3B: 68.2, teacher 68.1, MMLU 53.4 of 56.2",
            "Ablations, MMLU (full 61.2): no window 39.7, no gate 42.2, no stage 1 50.8; gates of Mamba-2's form 57.6, of "
            "GLA's low rank 53.5, pooled 44.1",
            "MMLU by window 32 / 64 / 128 / 256: 52.4 / 57.6 / 61.2 / 44.6; by meta logits 2 / 4 / 6: 58.6 / 61.2 / 60.8; by "
            "rank of the updates 4 / 8 / 16 / 32 / 64: 59.7 / 61.2 / 60.6 / 61.0 / 59.2",
        ),
    )
)
