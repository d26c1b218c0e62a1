"""Various Lengths, Constant Speed: Lightning Attention and TransNormerLLM (Qin et al., 2024, arXiv 2405.17381).

Causal linear attention whose memory of a token fades at a fixed rate, computed block by block: ordinary masked products
inside a block, one head_dim x head_dim state between blocks. So the time per token does not depend on the length.
Around it stands a language model without softmax: gated outputs, norms without parameters, GLUs without activation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import checks, ops
from regard.checkpoint import KeyMap
from regard.layers import GatedMlp, Mixer, SimpleRMSNorm, alibi_slopes, heads_of
from regard.ops import LinearState
from regard.registry import System, Variant, register_mixer, register_system
from regard.skeletons.decoder_lm import DecoderLM

NORMS: dict[str, Callable[[int], nn.Module]] = {"srms": SimpleRMSNorm, "layer": nn.LayerNorm}


def decay_rates(num_heads: int, layer: int = 0, depth: int = 1) -> list[float]:
    """λ of every head in block `layer` of `depth`: ALiBi's slopes times 1 - layer / (depth - 1) + 1e-5.

    Deeper blocks forget more slowly, the last one hardly at all. With one block (where the formula divides by zero) the
    factor is that of a first block.
    """
    factor = 1 - layer / max(depth - 1, 1) + 1e-5
    return [slope * factor for slope in alibi_slopes(num_heads)]


class LRPE(nn.Module):
    r"""Linearised relative position encoding: x at place t -> [x cos(θt), x sin(θt)], θ learned for each head and channel.

    The product of two such vectors holds $\cos(\theta (t - s))$, so it depends on relative places only. The head width
    doubles. θ starts at $10000^{-2i/D}$, i = 0 .. D-1 over all heads (D = num_heads head_dim).
    """

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        width = num_heads * head_dim
        self.theta = nn.Parameter(10000.0 ** (-2 / width * torch.arange(width)).view(num_heads, head_dim))

    def forward(self, x: Tensor, place: Tensor) -> Tensor:
        """`(B, N, heads, head_dim)` at places `(B or 1, N)` -> `(B, N, heads, 2 head_dim)`."""
        theta = (
            self.theta if self.theta.dtype == torch.float64 else self.theta.float()
        )  # bfloat16 cannot count past 256
        angle = place[..., None, None] * theta
        return torch.cat([x * angle.cos().to(x.dtype), x * angle.sin().to(x.dtype)], -1)


class LightningState(NamedTuple):
    """What a stream remembers: constant in the number of tokens seen.

    Attributes:
        memory: the faded sum of k vᵀ. place: `(B,)` tokens seen so far, for LRPE.
    """

    memory: LinearState
    place: Tensor


@register_mixer("lightning")
class LightningAttention(Mixer):
    r"""Decayed causal linear attention with normalised, gated output (section 3; TransNormerLLM's token mixer).

    $$o_t = q_t \sum_{j \le t} e^{-\lambda (t-j)} k_j^\top v_j,\quad \mathrm{out} = W_o\,(u \odot \mathrm{norm}(o)),\quad
      q, k = \mathrm{silu}(x W_q), \mathrm{silu}(x W_k)$$

    There is neither scale nor denominator: what keeps the output from growing with t is the norm over all heads' channels.

    Args:
        dim: channels. num_heads: divides dim.
        layer, depth: place of this block and number of blocks; they set the rates λ (see `decay_rates`).
        lrpe: encode positions into q and k (`LRPE`); the published models do so in the first block only.
        gate: "linear", u = x W_u (TransNormerLLM); "sigmoid", u = sigmoid(x A B) of rank head_dim (the later TNL
            example of the kernels' repository); "none".
        value_act: silu on v too. norm: "srms" (no parameters) or "layer" (both as in that example).
        decay: False forgets nothing (λ = 0).
    """

    dims: ClassVar[tuple[int, ...]] = (1,)
    can_causal: ClassVar[bool] = True
    can_stream: ClassVar[bool] = True
    can_mask: ClassVar[bool] = True
    rates: Tensor | None

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        layer: int = 0,
        depth: int = 1,
        lrpe: bool = False,
        gate: Literal["linear", "sigmoid", "none"] = "linear",
        value_act: bool = False,
        norm: Literal["srms", "layer"] = "srms",
        decay: bool = True,
        bias: bool = False,
        causal: bool = True,
    ) -> None:
        super().__init__()
        if not causal:
            raise ValueError("lightning attention is causal by its idea: use mixer 'linear' with causal=False instead.")
        if not 0 <= layer < depth:
            raise ValueError(f"layer must lie in 0..depth-1 = 0..{depth - 1}, got {layer}.")
        self.head_dim = heads_of(dim, num_heads)
        self.dim, self.num_heads, self.causal, self.value_act = dim, num_heads, causal, value_act
        self.gate_kind = checks.one_of("gate", gate, ("linear", "sigmoid", "none"))
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=bias) for _ in range(3))
        if gate == "linear":
            self.gate: nn.Module | None = nn.Linear(dim, dim, bias=bias)
        elif gate == "sigmoid":
            low = nn.Linear(dim, self.head_dim, bias=bias)
            self.gate = nn.Sequential(low, nn.Linear(self.head_dim, dim, bias=bias), nn.Sigmoid())
        else:
            self.gate = None
        self.lrpe = LRPE(num_heads, self.head_dim) if lrpe else None
        self.norm = NORMS[checks.one_of("norm", norm, NORMS)](dim)
        self.proj = nn.Linear(dim, dim, bias=bias)
        rates = torch.tensor(decay_rates(num_heads, layer, depth)) if decay else None
        self.register_buffer("rates", rates, persistent=False)

    @classmethod
    def in_stack(cls, index: int, input_size: tuple[int, ...], dim: int, num_heads: int, **options: Any) -> Mixer:
        """LRPE in the first block only, as published; with `depth=` the rates fall from block to block."""
        options.setdefault("lrpe", index == 0)
        options.setdefault("layer", index if "depth" in options else 0)
        return cls(dim, num_heads, **options)

    def no_weight_decay(self) -> set[str]:
        """The angles of LRPE."""
        return set() if self.lrpe is None else {"lrpe.theta"}

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`(B, N, dim)` -> the same shape; `mask` `(B, N)` is False at padding, which then adds nothing to later tokens."""
        self.check(x)
        return self._read(x, self._attend(x, mask)[0])

    def prefill(self, x: Tensor, state: LightningState | None = None) -> tuple[Tensor, LightningState]:
        """`forward` on tokens that follow `state`, and the state after the last of them."""
        self.check(x)
        out, state = self._attend(x, None, state)
        return self._read(x, out), state

    def step(self, x: Tensor, state: LightningState | None = None) -> tuple[Tensor, LightningState]:
        """One token `(B, dim)`; the state has a constant size."""
        place = x.new_zeros(x.shape[0], dtype=torch.long) if state is None else state.place
        q, k, v = (part.squeeze(1) for part in self._qkv(x[:, None], place[:, None]))
        memory = None if state is None else state.memory
        out, memory = ops.linear_attention_step(q, k, v, memory, decay=self.rates, normalize=False)
        return self._read(x, out), LightningState(memory, place + 1)

    def _qkv(self, x: Tensor, place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (part(x).unflatten(-1, (self.num_heads, self.head_dim)) for part in (self.q, self.k, self.v))
        q, k, v = F.silu(q), F.silu(k), F.silu(v) if self.value_act else v
        return (q, k, v) if self.lrpe is None else (self.lrpe(q, place), self.lrpe(k, place), v)

    def _attend(
        self, x: Tensor, mask: Tensor | None, state: LightningState | None = None
    ) -> tuple[Tensor, LightningState]:
        start = x.new_zeros(x.shape[0], dtype=torch.long) if state is None else state.place
        q, k, v = self._qkv(x, start[:, None] + torch.arange(x.shape[1], device=x.device))
        if mask is not None:
            v = v.masked_fill(~mask[..., None, None], 0.0)
        memory = None if state is None else state.memory
        out, memory = ops.linear_attention(
            q, k, v, causal=True, decay=self.rates, normalize=False, state=memory, return_state=True
        )
        return out, LightningState(memory, start + x.shape[1])

    def _read(self, x: Tensor, out: Tensor) -> Tensor:
        """Norm over the channels of all heads, gate, projection."""
        out = self.norm(out.flatten(-2))
        return self.proj(out if self.gate is None else self.gate(x) * out)

    def state_size(self, length: int) -> int:
        """Constant: one matrix (and the sum of keys, which an op without denominator ignores) a head, and the place."""
        width = self.head_dim * (1 if self.lrpe is None else 2)
        return self.num_heads * width * (self.head_dim + 1) + 1

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, gate={self.gate_kind}, decay={self.rates is not None}"


def _split(name: str, value: Tensor) -> Mapping[str, Tensor]:
    """The authors' joint projection, cut into q, k, v and gate; θ without its axis for the sequence."""
    if "qkvu_proj" in name:
        parts = zip(("q", "k", "v", "gate"), value.chunk(4), strict=True)
        return {name.replace("qkvu_proj", part): tensor for part, tensor in parts}
    return {name: value.squeeze(1) if name.endswith("theta") else value}


class TransNormerLLM(DecoderLM):
    """Token embedding, blocks of `LightningAttention` and an activation-free GLU under norms without parameters, tied head.

    Loads checkpoints under the names of the released models (`model.layers...`) and of the authors' small trainer
    (`transnormer.h...`).

    Args:
        vocab_size: number of different tokens. dim, depth, num_heads: as usual.
        glu_dim: hidden width of the GLU.
        lrpe: blocks with position encoding: "first" (as the models' cards say), "all_but_first" (as the small trainer
            does, against its own comment), "none", or one boolean for each block.
        scale_embedding: multiply embeddings by sqrt(dim) (the released models; the small trainer does not).
        gate, decay: of the mixers.
        tied: the head shares the embedding's matrix.
    """

    authors_keys = KeyMap(
        rules=[
            (r"^(model\.embed_tokens|transnormer\.wte)\.", "embed."),
            (r"^lm_head\.", "head."),
            (r"^(model\.layers|transnormer\.h)\.", "blocks."),
            (r"\.token_mixer\.out_proj\.", ".mixer.proj."),
            (r"\.token_mixer\.", ".mixer."),
            (r"\.channel_mixer\.l1\.", ".mlp.gate."),
            (r"\.channel_mixer\.l2\.", ".mlp.value."),
            (r"\.channel_mixer\.l3\.", ".mlp.out."),
        ],
        convert=_split,
    )

    def __init__(
        self,
        vocab_size: int = 64000,
        dim: int = 1024,
        depth: int = 24,
        num_heads: int = 8,
        glu_dim: int = 2816,
        lrpe: Literal["first", "all_but_first", "none"] | Sequence[bool] = "first",
        scale_embedding: bool = True,
        gate: Literal["linear", "sigmoid", "none"] = "linear",
        decay: bool = True,
        tied: bool = True,
        drop_path_rate: float = 0.0,
    ) -> None:
        if isinstance(lrpe, str):
            checks.one_of("lrpe", lrpe, ("first", "all_but_first", "none"))
            lrpe = [lrpe != "none" and (index == 0) == (lrpe == "first") for index in range(depth)]
        elif len(lrpe) != depth:
            raise ValueError(f"lrpe must hold one boolean for each of the {depth} blocks, got {len(lrpe)}.")
        mixer = partial(LightningAttention, dim, num_heads, depth=depth, gate=gate, decay=decay)
        super().__init__(
            vocab_size,
            dim,
            [mixer(layer=index, lrpe=bool(used)) for index, used in enumerate(lrpe)],
            mlp=lambda width: GatedMlp(width, glu_dim, act=nn.Identity, bias=False),
            norm=SimpleRMSNorm,
            embed_scale=dim**0.5 if scale_embedding else 1.0,
            tied=tied,
            drop_path_rate=drop_path_rate,
        )
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)


_COUNT = "counted from the authors' code; the released configuration files are not in their repositories"

SYSTEM = register_system(
    System(
        slug="lightning_attention",
        title="Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention",
        year=2024,
        arxiv="2405.17381",
        evidence="authors_code",
        repo="OpenNLPLab/lightning-attention",
        idea="Causal linear attention with fading memory, block by block, so that speed per token is constant in length.",
        mixers=("lightning",),
        variants=(
            Variant(
                "tnl_385m",
                TransNormerLLM,
                398_984_192,
                inputs=((1, 1024),),
                source=f"defaults of the authors' configuration, vocabulary 64000, output matrix tied; {_COUNT}",
            ),
            Variant(
                "tnl_385m_untied",
                TransNormerLLM,
                464_520_192,
                inputs=((1, 1024),),
                source=f"the same with an output matrix of its own; {_COUNT}",
                options={"tied": False},
            ),
            Variant(
                "nano_transnormer_small",
                TransNormerLLM,
                116_498_688,
                inputs=((1, 1024),),
                source="Doraemonzzz/nanoTransNormer, default configuration, counted from its code",
                options={
                    "vocab_size": 50304,
                    "dim": 768,
                    "depth": 12,
                    "num_heads": 12,
                    "glu_dim": 1536,
                    "lrpe": "all_but_first",
                    "scale_embedding": False,
                },
            ),
        ),
        reports=(
            "bfloat16, batch 4, 32 heads of 128, forward in ms, Lightning against FlashAttention 2: 1.13 / 0.75 at 2,048 "
            "tokens, 2.24 / 2.74 at 4,096, 17.66 / 162.9 at 32,768 (GPU not named)",
            "TransNormerLLM, its predecessor: perplexity 4.77 at 385M parameters, Transformer 5.16; 3.729 against 4.765 "
            "at 1B (as cited by others)",
            "7B, 1.4T tokens: MMLU 43.10, CMMLU 47.99, C-Eval 43.18, HellaSwag 75.21, PIQA 80.09",
            "Models of 1B, 7B and (TransNormerLLM3) 15B parameters are released; their widths are not in the repositories",
        ),
    )
)
