"""GAM: Gated Associative Memory, a Parallel O(N) Architecture (Acharya, 2025, arXiv 2509.00605).

In attention's place stand a short causal convolution and a softmax lookup in a bank of learned vectors, weighed against one
another by two gates. No token is compared with another, so the cost is linear in the length. The lookup, called global,
asks what all texts have in common: between tokens nothing moves but through the convolution.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from regard import checks
from regard.checkpoint import KeyMap
from regard.layers import Mixer, Mlp, SoftmaxAttention, conv
from regard.registry import System, Variant, register_mixer, register_system
from regard.skeletons.decoder_lm import DecoderLM

Fusion = Literal["gate", "sum", "local", "global"]
FUSIONS = ("gate", "sum", "local", "global")


@register_mixer("gam")
class GatedAssociativeMemory(Mixer):
    r"""A depthwise convolution and a lookup in a learned memory, added through gates (README, figure 1; the authors' block).

    $$\mathrm{out} = \sigma(g_l) \odot \mathrm{DWConv}_K(x) + \sigma(g_g) \odot \mathrm{softmax}(x M^\top) M,\quad
      [g_l, g_g] = x W_g + b_g$$

    M `(slots, dim)` is both keys and values; its scores are not scaled (and saturate where channels are many). There are no
    heads and no projections. Causal, output t reads inputs t - K + 1 to t; a stream remembers K - 1 inputs, for ever.

    Departures: the paper's is causal, along one axis; `causal=False` centres the convolution, on 1 to 3 axes.

    Args:
        dim: channels. num_heads: taken so that every mixer is built alike; there are none.
        slots: vectors in M; None is `dim`, as published. kernel_size: K; odd, unless causal.
        fusion: "gate", or an ablation (README, table 3): "sum" of both parts without gates, or "local" or "global" alone.
        causal: along one axis only. axes: number of spatial axes.
    """

    can_causal: ClassVar[bool] = True
    can_stream: ClassVar[bool] = True
    has_heads: ClassVar[bool] = False
    authors_keys = KeyMap(rules=[(r"\bcausal_conv\.", "local."), (r"\bmemory_bank$", "memory")])

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        slots: int | None = None,
        kernel_size: int = 3,
        fusion: Fusion = "gate",
        causal: bool = False,
        axes: int = 1,
    ) -> None:
        super().__init__()
        slots = dim if slots is None else slots
        for name, number in (("dim", dim), ("slots", slots), ("kernel_size", kernel_size)):
            checks.positive(name, number)
        if causal and axes != 1:
            raise ValueError(f"causal needs an order of tokens, so axes=1, got axes={axes}: flatten the grid first.")
        if not causal:
            checks.odd("kernel_size", kernel_size)
        self.fusion = checks.one_of("fusion", fusion, FUSIONS)
        self.dim, self.num_heads, self.causal, self.axes = dim, num_heads, causal, axes
        self.before = kernel_size - 1 if causal and fusion != "global" else 0
        """Tokens before the present one that a causal output reads."""
        padding = 0 if causal else kernel_size // 2
        self.local = None if fusion == "global" else conv(axes)(dim, dim, kernel_size, padding=padding, groups=dim)
        self.memory = None if fusion == "local" else nn.Parameter(torch.empty(slots, dim))
        self.gate = nn.Linear(dim, 2 * dim) if fusion == "gate" else None
        if self.memory is not None:
            nn.init.xavier_uniform_(self.memory)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        if self.causal:
            return self.prefill(x)[0]
        self.check(x)
        return self._fuse(x, x)

    def prefill(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Causal `forward` on tokens `(B, N, dim)` that follow `state`, and the state after them: `(B, K - 1, dim)`."""
        if not self.causal:
            raise ValueError("a stream needs a causal mixer: build it with causal=True.")
        self.check(x)
        seen = torch.cat([x.new_zeros(x.shape[0], self.before, self.dim) if state is None else state, x], 1)
        return self._fuse(x, seen), seen[:, x.shape[1] :].clone()

    def step(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One token `(B, dim)`; the state is the K - 1 inputs before the next."""
        out, state = self.prefill(x[:, None], state)
        return out.squeeze(1), state

    def state_size(self, length: int) -> int:
        """Constant: K - 1 inputs."""
        return self.before * self.dim

    def lookup(self, x: Tensor) -> Tensor:
        """softmax(x Mᵀ) M `(..., dim)`: a function of each token alone."""
        return (x @ self.memory.T).softmax(-1) @ self.memory

    def _fuse(self, x: Tensor, seen: Tensor) -> Tensor:
        """Both parts, of x and of what the convolution reads."""
        if self.local is None:
            return self.lookup(x)
        near = self.local(seen)
        if self.memory is None:
            return near
        far = self.lookup(x)
        if self.gate is None:
            return near + far
        gate_near, gate_far = self.gate(x).sigmoid().chunk(2, -1)
        return gate_near * near + gate_far * far

    def extra_repr(self) -> str:
        return f"dim={self.dim}, axes={self.axes}, fusion={self.fusion}, causal={self.causal}"


class GAM(DecoderLM):
    """Embedding and learned positions, pre-norm blocks of `GatedAssociativeMemory` and an MLP, norm, tied head.

    Logits depend on the last `receptive_field` tokens alone.

    Args:
        vocab_size: number of different tokens. dim, depth: as usual. length: the longest context.
        slots, kernel_size, fusion: of the mixers.
        mixer: "gam", or "softmax" for the authors' baseline: the same model with attention of `num_heads` in its place.
        drop_rate: dropout after the embedding and at the end of every MLP.
        position_std: initial size of the position table. The release leaves it at 1, beside which its tokens of about
            dim^-1/2 / sqrt(3) hardly count.
    """

    authors_keys = KeyMap(
        rules=[
            (r"^token_embedding\.", "embed."),
            (r"^pos_embedding\.weight$", "pos_embed"),
            (r"^ln_f\.", "norm."),
            (r"(^|\.)(causal_conv|memory_bank|gate)\b", r"\1mixer.\2"),
            *GatedAssociativeMemory.authors_keys.rules,
            (r"\bln([12])\.", r"norm\1."),
            (r"\bffn\.0\.", "mlp.0.fc1."),
            (r"\bffn\.2\.", "mlp.0.fc2."),
        ]
    )

    def __init__(
        self,
        vocab_size: int = 10000,
        dim: int = 512,
        depth: int = 6,
        length: int = 256,
        slots: int = 512,
        kernel_size: int = 3,
        fusion: Fusion = "gate",
        mixer: Literal["gam", "softmax"] = "gam",
        num_heads: int = 8,
        drop_rate: float = 0.1,
        position_std: float = 0.02,
        drop_path_rate: float = 0.0,
    ) -> None:
        checks.one_of("mixer", mixer, ("gam", "softmax"))

        def build(_: int) -> Mixer:
            if mixer == "softmax":
                return SoftmaxAttention(dim, num_heads, causal=True)
            return GatedAssociativeMemory(dim, slots=slots, kernel_size=kernel_size, fusion=fusion, causal=True)

        super().__init__(
            vocab_size,
            dim,
            build,
            depth=depth,
            mlp=lambda width: nn.Sequential(Mlp(width, 4 * width), nn.Dropout(drop_rate)),
            position="learned",
            length=length,
            drop_path_rate=drop_path_rate,
        )
        self.drop = nn.Dropout(drop_rate)
        nn.init.normal_(self.pos_embed, std=position_std)

    @property
    def receptive_field(self) -> int | None:
        """Tokens, the present one included, that logits can depend on; None where attention reads all."""
        reach = [getattr(block.mixer, "before", None) for block in self.blocks]
        return None if None in reach else 1 + sum(reach)

    def _embed(self, tokens: Tensor, start: int) -> Tensor:
        return self.drop(super()._embed(tokens, start))


_README = (
    "parameters of the README's table 3, one decimal; its code is not released, so this is the count of this reading"
)


def _variant(name: str, params: int, source: str, **options: Any) -> Variant:
    return Variant(name, GAM, params, inputs=((1, 256),), source=source, options=options)


SYSTEM = register_system(
    System(
        slug="gam",
        title="Gated Associative Memory: A Parallel O(N) Architecture for Efficient Sequence Modeling",
        year=2025,
        arxiv="2509.00605",
        evidence="authors_code",
        repo="rishiraj/gam",
        idea="A short causal convolution and a lookup in learned vectors, gated; no token is compared with another.",
        mixers=("gam",),
        variants=(
            _variant("gam_23m", 22_599_680, "parameters of the authors' code in its default configuration"),
            _variant("gam_23m_sum", 19_447_808, f"19.4 M: {_README}", fusion="sum"),
            _variant("gam_23m_global", 19_435_520, f"19.4 M: {_README}", fusion="global"),
            _variant("gam_23m_local", 17_874_944, f"17.9 M: {_README}", fusion="local"),
            _variant(
                "gam_transformer_baseline",
                24_166_400,
                "parameters of the authors' code of their baseline",
                mixer="softmax",
            ),
        ),
        reports=(
            "WikiText-2, 5 epochs, validation perplexity and seconds an epoch: GAM 882.57, 117.2; Transformer (24.2M) 918.99, "
            "131.9; Mamba (20.5M; six bare layers without residuals or norms, not built here) 1017.54, 127.1",
            "TinyStories, 50,000 rows: GAM 23.15, 601.4 s; Transformer 23.55, 671.6 s",
            "One block, batch 16, 512 channels, float16, forward and backward, ms, GAM / Transformer that writes its mask and "
            "scores to memory: 256 tokens 8.97 / 8.90, 1,024 25.86 / 74.19, 2,048 51.94 / 279.37, 8,192 217.30 / out of memory",
            "Ablation, WikiText-2 perplexity: full 900.84 (882.57 in the main table), global alone 905.45, sum 942.59, local "
            "alone 944.70",
        ),
    )
)
