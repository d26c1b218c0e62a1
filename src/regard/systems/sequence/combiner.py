"""Combiner: Full Attention Transformer with Sparse Computation Cost (Ren et al., NeurIPS 2021, arXiv 2107.05768).

Attention is an expectation over tokens, here a factorised one: near keys are attended directly, and every other region by
one summary, whose key is a maximum and whose value a small attention inside the region. So every head reaches every token,
at the cost of a sparse pattern. What the mixers share is in `_combiner_core.py`; the patterns that cut a sequence into
segments are in `_combiner_segments.py`, the one that halves it in `_combiner_logsparse.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import checks
from regard.checkpoint import KeyMap
from regard.layers import Mixer, Mlp, SoftmaxAttention, sincos
from regard.registry import System, Variant, register_system
from regard.skeletons.decoder_lm import DecoderLM
from regard.systems.sequence._combiner_core import as_linear
from regard.systems.sequence._combiner_logsparse import CombinerLogsparse
from regard.systems.sequence._combiner_segments import CombinerAxial, CombinerFixed, CombinerMixture, Running

Pattern = Literal["fixed", "logsparse", "axial", "mixture", "dense"]
PATTERNS: Mapping[str, type[Mixer]] = {
    "fixed": CombinerFixed,
    "logsparse": CombinerLogsparse,
    "axial": CombinerAxial,
    "mixture": CombinerMixture,
    "dense": SoftmaxAttention,
}
_ACTS: Mapping[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "gelu_tanh": partial(nn.GELU, approximate="tanh")}


class CombinerLM(DecoderLM):
    """Embedding, positions, pre-norm blocks of a Combiner mixer and an MLP, norm, head with a bias.

    The release has two forms, which load under their own names: JAX (the defaults: fixed sine positions, an output matrix of
    its own, ReLU) and TensorFlow (`TENSORFLOW`: learned positions, tied output matrix, biases, GELU, sums for cumulative
    maxima). Departure: neither's dropout.

    Args:
        vocab_size: number of different tokens. dim, depth, num_heads, mlp_ratio: as usual.
        pattern: of the mixers; "dense" is the baseline with softmax attention.
        segment_size: of all patterns but "logsparse" and "dense".
        causal: False makes a masked language model, whose tokens see the whole context.
        position: "sine" or "learned", the latter a table of `length` places.
        tied: the head shares the embedding's matrix.
        bias: of the mixers' projections. act, norm_eps: "relu" or "gelu_tanh", and of all norms.
        running: of "mixture".
        init_std: of all matrices at first; None is Xavier's uniform distribution.
    """

    authors_keys = KeyMap(
        rules=[
            (r"/", "."),
            (r"^(?:Embed_0\.embedding|word_embeddings\.weights)$", "embed.weight"),
            (r"^pos_embeddings\.weights$", "pos_embed"),
            (r"^(?:autoreg_model\.Dense_0\.bias|softmax_bias)$", "head_bias"),
            (r"^autoreg_model\.Dense_0\.", "head."),
            (r"^(?:autoreg_model\.LayerNorm_0|final_norm)\.", "norm."),
            (r"^(?:autoreg_model\.transformer_layer_|layer_)0*(\d+)\.", r"blocks.\1."),
            (r"^(blocks\.\d+)\.(?:LayerNorm_0|attn\.pre_norm)\.", r"\1.norm1."),
            (r"^(blocks\.\d+)\.(?:LayerNorm_1|ffn\.pre_norm)\.", r"\1.norm2."),
            (r"\.(?:MlpBlock_0\.Dense_0|ffn\.dense)\.", ".mlp.fc1."),
            (r"\.(?:MlpBlock_0\.Dense_1|ffn\.dense_1)\.", ".mlp.fc2."),
            (r"\._SelfAttAxialRowmajor_0\.", "._SelfAtt_0.axial."),
            (r"\.(?:attn|_SelfAtt\w*_0|_AxialMixtureAtt_0)\.", ".mixer."),
            (r"\.axial\.DenseGeneral_2\.", ".proj."),
            (r"\.(?:rowmajor_param_post\.dense|axial\.DenseGeneral_0)\.", ".row.proj."),
            (r"\.(?:rowmajor_param_post\.dense_1|axial\.DenseGeneral_1)\.", ".row.to_key."),
            (r"\.(?:rowmajor_param_post\.pre_norm|axial\.LayerNorm_0)\.", ".row.norm."),
            (r"\.axial\.", "."),
            *CombinerFixed.authors_keys.rules,
        ],
        convert=as_linear,
    )

    def __init__(
        self,
        vocab_size: int = 256,
        dim: int = 512,
        depth: int = 6,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        length: int = 2048,
        pattern: Pattern = "fixed",
        segment_size: int = 32,
        causal: bool = True,
        position: Literal["sine", "learned"] = "sine",
        tied: bool = False,
        bias: bool = False,
        act: Literal["relu", "gelu_tanh"] = "relu",
        norm_eps: float = 1e-6,
        running: Running = "max",
        init_std: float | None = None,
        drop_path_rate: float = 0.0,
    ) -> None:
        made_by = PATTERNS[checks.one_of("pattern", pattern, PATTERNS)]
        checks.one_of("position", position, ("sine", "learned"))
        options: dict[str, Any] = {"qkv_bias": bias} if pattern == "dense" else {"bias": bias}
        options |= {"segment_size": segment_size} if pattern in ("fixed", "axial", "mixture") else {}
        options |= {"norm_eps": norm_eps} if pattern == "axial" else {}
        options |= {"running": running} if pattern == "mixture" else {}
        make_act = _ACTS[checks.one_of("act", act, _ACTS)]
        super().__init__(
            vocab_size,
            dim,
            lambda _: made_by(dim, num_heads=num_heads, causal=causal, **options),  # type: ignore[call-arg]
            depth=depth,
            mlp=lambda width: Mlp(width, int(mlp_ratio * width), act=make_act),
            norm=partial(nn.LayerNorm, eps=norm_eps),
            position="learned" if position == "learned" else "none",
            length=length,
            tied=tied,
            embed_scale=dim**0.5 if position == "sine" and tied else 1.0,
            drop_path_rate=drop_path_rate,
        )
        self.head_bias = nn.Parameter(torch.zeros(vocab_size))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight) if init_std is None else nn.init.normal_(
                    module.weight, std=init_std
                )
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.sine = position == "sine"
        if self.sine:  # tokens as large as the code beside them
            nn.init.normal_(self.embed.weight, std=1 / self.embed_scale)

    def forward_head(self, x: Tensor) -> Tensor:
        """Hidden states -> logits."""
        return F.linear(x, self.embed.weight if self.head is None else self.head.weight, self.head_bias)

    def _embed(self, tokens: Tensor, start: int) -> Tensor:
        x = super()._embed(tokens, start)
        if not self.sine:
            return x
        # Rates fall from 1 to exactly 1 / 10000, by i / (dim / 2 - 1) where others have i / (dim / 2).
        half = self.dim // 2
        places = torch.arange(start, start + (tokens.shape[1] if tokens.dim() == 2 else 1), device=x.device)
        code = sincos(places, self.dim, base=10000 ** (half / max(half - 1, 1)), interleaved=False).to(x.dtype)
        return x + (code if tokens.dim() == 2 else code[0])


TENSORFLOW: Mapping[str, Any] = {
    "position": "learned",
    "tied": True,
    "bias": True,
    "act": "gelu_tanh",
    "norm_eps": 1e-5,
    "running": "sum",
    "init_std": 0.02,
}
"""The options of the release's TensorFlow form."""


def _jax(pattern: Pattern, params: int) -> Variant:
    return Variant(
        f"combiner_{pattern}_{round(params / 1e6)}m",
        CombinerLM,
        params,
        inputs=((1, 1024),),
        source="parameters of the authors' JAX code with the defaults of its configuration and a vocabulary of 256: the "
        "sizes of the paper's six-layer image models, for which it gives no counts",
        options={"pattern": pattern},
    )


def _tensorflow(pattern: Pattern, params: int) -> Variant:
    return Variant(
        f"combiner_lm_{pattern}_{round(params / 1e6)}m",
        CombinerLM,
        params,
        inputs=((1, 2048),),
        source="parameters of the authors' TensorFlow code in the configuration of this name; 1,024 tokens stand in it for "
        "a vocabulary",
        options={
            **TENSORFLOW,
            "vocab_size": 1024,
            "dim": 768,
            "depth": 12,
            "num_heads": 12,
            "pattern": pattern,
            "segment_size": 128,
        },
    )


SYSTEM = register_system(
    System(
        slug="combiner",
        title="Combiner: Full Attention Transformer with Sparse Computation Cost",
        year=2021,
        arxiv="2107.05768",
        evidence="authors_code",
        repo="google-research/google-research",
        idea="Near keys are attended directly, every other region by one summary that is an attention inside it.",
        mixers=("combiner_fixed", "combiner_logsparse", "combiner_axial", "combiner_mixture"),
        variants=(
            _jax("fixed", 19_165_440),
            _jax("logsparse", 19_165_440),
            _jax("axial", 22_317_312),
            _jax("mixture", 19_165_440),
            _tensorflow("dense", 87_416_320),
            _tensorflow("fixed", 87_416_320),
            _tensorflow("axial", 101_608_960),
            _tensorflow("mixture", 87_416_320),
        ),
        reports=(
            "Bits a dimension, 6 layers, CIFAR-10 / ImageNet-64, sparse pattern -> Combiner: Logsparse 4.253 / 4.351 -> "
            "3.366 / 3.795; Fixed 3.408 / 3.696 -> 3.321 / 3.654; Axial 3.666 / 4.032 -> 3.050 / 3.585; Mixture 3.040 / 3.585; "
            "Performer 3.335 / 3.719",
            "Combiner-Axial of 128 layers on CIFAR-10 2.77 (Sparse Transformer 2.80); of 30 on ImageNet-64 3.42 (Routing 3.43)",
            "Wiki-40B perplexity at 2,048 tokens: Transformer 17.26, Fixed 18.04 -> 17.70, Axial 20.82 -> 17.56; at 8,192: "
            "Combiner-Axial 16.49, Combiner-Fixed 16.60",
            "C4 masked language modelling, perplexity: Fixed 5.279 -> 5.170, Axial 5.370 -> 4.809; at 8,192 tokens "
            "Combiner-Fixed 4.139",
            "Long Range Arena, average: Combiner-Fixed 58.34, Transformer 57.87, Sparse Transformer 57.42, Performer 57.35",
        ),
    )
)
