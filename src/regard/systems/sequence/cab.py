"""CAB: Comprehensive Attention Benchmarking on Long Sequence Modeling (Zhang et al., 2022, arXiv 2210.07661).

Attention comes in four patterns, noncausal or causal, self or cross, and an efficient method that is good in one may not
exist in another. CAB puts nine of them under one interface, scores them by one index over seven long tasks, and asks from
which length on each is cheaper than softmax attention.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regard import checks
from regard.checkpoint import KeyMap
from regard.layers import Mlp
from regard.layers.rotary import flat_angles
from regard.registry import System, Variant, register_system
from regard.skeletons.base import Model
from regard.systems.sequence._cab_attention import LocalAttention, PaddedSoftmax
from regard.systems.sequence._cab_features import CosformerAttention, PerformerAttention
from regard.systems.sequence._cab_landmarks import LARAttention, NystromAttention
from regard.systems.sequence._cab_long_short import CausalLongShortAttention, LongShortTransformerAttention
from regard.systems.sequence._cab_probsparse import ProbSparseAttention
from regard.systems.sequence._cab_s4d import S4D
from regard.systems.sequence._cab_scores import CONSTANTS, compositional_index, efficiency_length
from regard.systems.sequence._cab_slots import ABCAttention

__all__ = [
    "ATTENTIONS",
    "CONSTANTS",
    "S4D",
    "ABCAttention",
    "CABDecoder",
    "CABEncoder",
    "CausalLongShortAttention",
    "CosformerAttention",
    "LARAttention",
    "LocalAttention",
    "LongShortTransformerAttention",
    "NystromAttention",
    "PaddedSoftmax",
    "PerformerAttention",
    "ProbSparseAttention",
    "compositional_index",
    "efficiency_length",
]

ATTENTIONS: dict[str, type[nn.Module]] = {
    "vanilla": PaddedSoftmax,
    "local": LocalAttention,
    "abc": ABCAttention,
    "nystrom": NystromAttention,
    "performer": PerformerAttention,
    "lara": LARAttention,
    "cosformer": CosformerAttention,
    "probsparse": ProbSparseAttention,
    "s4d": S4D,
    "transformer_ls": LongShortTransformerAttention,
    "causal_transformer_ls": CausalLongShortAttention,
}
"""The methods by name; all take `mask=`, and `context` where they can cross."""


class PostNormLayer(nn.Module):
    """x = LN(x + mix(x)), with `cross` x = LN(x + cross(x, memory)), x = LN(x + mlp(x)): the layers of the backbones."""

    def __init__(self, dim: int, mixer: nn.Module, hidden: int, cross: nn.Module | None = None) -> None:
        super().__init__()
        self.mixer, self.norm_mixer = mixer, nn.LayerNorm(dim)
        self.cross = cross
        self.norm_cross = None if cross is None else nn.LayerNorm(dim)
        self.mlp, self.norm_mlp = Mlp(dim, hidden, act=nn.ReLU), nn.LayerNorm(dim)

    def forward(
        self, x: Tensor, mask: Tensor | None, memory: Tensor | None = None, memory_mask: Tensor | None = None
    ) -> Tensor:
        """`(B, N, dim)` -> the same shape; memory `(B, M, dim)`; masks are True for tokens."""
        x = self.norm_mixer(x + self.mixer(x, mask=mask))
        if self.cross is not None and self.norm_cross is not None:
            x = self.norm_cross(x + self.cross(x, memory, mask=memory_mask))
        return self.norm_mlp(x + self.mlp(x))


_LAYER_RULES = [
    (r"^_embed\.", "embed."),
    (r"^_layers\.", "layers."),
    (r"^_out_proj\.", "head."),
    (r"\.self_attn\.", ".mixer."),
    (r"\.multihead_attn\.", ".cross."),
    (r"\.self_attn_norm\.", ".norm_mixer."),
    (r"\.multihead_attn_norm\.", ".norm_cross."),
    (r"\.ffn_norm\.", ".norm_mlp."),
    (r"\.ffn\._fc([12])\.", r".mlp.fc\1."),
]
_NO_WEIGHTS = [r"^_pos_embed\.", r"_dummy_param$"]


def _convert(name: str, value: Tensor) -> Mapping[str, Tensor]:
    """What the attentions' own maps reshape."""
    if name.endswith("conv.weight"):
        return {name: value.squeeze(-1)}
    return {name: value.flatten(0, -2) if name.endswith(("content_bias", "position_bias")) else value}


class _Backbone(Model):
    """Token embedding times sqrt(dim) and a fixed sine code, then post-norm layers.

    Token `padding` is no token: it is not read by any attention.
    """

    authors_keys = KeyMap(
        rules=[*_LAYER_RULES, *(rule for made in ATTENTIONS.values() for rule in made.authors_keys.rules)],  # type: ignore[attr-defined]
        drop=[*_NO_WEIGHTS, *CausalLongShortAttention.authors_keys.drop],
        convert=_convert,
    )
    layers: nn.ModuleList

    def __init__(self, vocab_size: int, dim: int, padding: int | None) -> None:
        super().__init__()
        checks.divisible("dim", dim, "2", 2)
        self.dim, self.padding = dim, padding
        self.embed = nn.Embedding(vocab_size, dim, padding_idx=padding)
        nn.init.normal_(self.embed.weight, std=dim**-0.5)

    def _embedded(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        if tokens.dim() != 2 or tokens.shape[1] == 0 or tokens.is_floating_point():
            raise ValueError(
                f"tokens must be whole numbers (batch, length), at least one, got {tokens.dtype} {tuple(tokens.shape)}."
            )
        angles = flat_angles((tokens.shape[1],), self.dim // 2).to(tokens.device)
        code = torch.cat([angles.sin(), angles.cos()], -1)
        x = self.embed(tokens) * math.sqrt(self.dim)
        return x + code.to(x.dtype), None if self.padding is None else tokens != self.padding


def _mixer(name: str, dim: int, num_heads: int, options: dict[str, Any] | None, **fixed: Any) -> nn.Module:
    return ATTENTIONS[checks.one_of("attention", name, ATTENTIONS)](dim, num_heads, **(options or {}), **fixed)


class CABEncoder(_Backbone):
    """The encoder of the text tasks: noncausal self attention in every layer.

    Args:
        vocab_size: number of different tokens. dim, depth, num_heads: as usual. hidden: width of the MLPs.
        attention: a name in `ATTENTIONS`; options: of its class, besides dim and num_heads.
        num_classes: logits for every token; 0 gives the features.
        padding: the token that is none; None: all are.
    """

    def __init__(
        self,
        vocab_size: int = 32000,
        dim: int = 512,
        depth: int = 6,
        num_heads: int = 8,
        hidden: int = 2048,
        attention: str = "vanilla",
        options: dict[str, Any] | None = None,
        num_classes: int = 0,
        padding: int | None = 0,
    ) -> None:
        super().__init__(vocab_size, dim, padding)
        self.layers = nn.ModuleList(
            PostNormLayer(dim, _mixer(attention, dim, num_heads, options), hidden) for _ in range(depth)
        )
        self.head = nn.Linear(dim, num_classes, bias=False) if num_classes else nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        """`(B, N)` int64 -> `(B, N, dim)`, or `(B, N, num_classes)`."""
        x, mask = self._embedded(tokens)
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(x)


class CABDecoder(_Backbone):
    """The decoder of the text tasks: causal self attention and cross attention to an encoder's features in every layer.

    Args:
        attention, options: of the causal self attention. cross, cross_options: of the cross attention, which is to treat
            every query by itself ("vanilla", "abc" and "performer" do). The others: see `CABEncoder`.
    """

    def __init__(
        self,
        vocab_size: int = 32000,
        dim: int = 512,
        depth: int = 6,
        num_heads: int = 8,
        hidden: int = 2048,
        attention: str = "vanilla",
        options: dict[str, Any] | None = None,
        cross: str = "vanilla",
        cross_options: dict[str, Any] | None = None,
        padding: int | None = 0,
    ) -> None:
        super().__init__(vocab_size, dim, padding)
        layers = []
        for _ in range(depth):
            mixer = _mixer(attention, dim, num_heads, options, causal=True)
            layers.append(PostNormLayer(dim, mixer, hidden, _mixer(cross, dim, num_heads, cross_options)))
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(dim, vocab_size, bias=False)

    def forward(self, tokens: Tensor, memory: Tensor, memory_mask: Tensor | None = None) -> Tensor:
        """Tokens `(B, N)` int64 and features `(B, M, dim)` -> logits `(B, N, vocab_size)` of the token after each.

        Args:
            memory_mask: `(B, M)`, False at padding.
        """
        x, mask = self._embedded(tokens)
        for layer in self.layers:
            x = layer(x, mask, memory, memory_mask)
        return self.head(x)


def _variant(name: str, params: int, made: type[nn.Module], length: int = 1024, **options: Any) -> Variant:
    source = "parameters of the authors' module at 512 channels and 8 heads; their backbones lie in other repositories"
    at = {"dim": 512, "num_heads": 8, **options}
    return Variant(f"cab_{name}", made, params, inputs=((1, length, 512),), source=source, options=at)


SYSTEM = register_system(
    System(
        slug="cab",
        title="CAB: Comprehensive Attention Benchmarking on Long Sequence Modeling",
        year=2022,
        arxiv="2210.07661",
        evidence="authors_code",
        repo="Shark-NLP/CAB",
        idea="Four patterns of attention (noncausal or causal, self or cross), nine efficient methods under one interface, one "
        "index over seven long tasks, and the length from which on a method is cheaper than softmax attention.",
        mixers=tuple(name for name in ATTENTIONS if name != "vanilla"),
        variants=(
            _variant("vanilla", 1_050_624, PaddedSoftmax),
            _variant("local", 1_050_624, LocalAttention),
            _variant("abc", 1_052_672, ABCAttention),
            _variant("nystrom", 1_050_624, NystromAttention),
            _variant("nystrom_conv", 1_050_888, NystromAttention, kernel_size=33),
            _variant("performer", 1_050_624, PerformerAttention),
            _variant("lara", 1_050_624, LARAttention),
            _variant("cosformer", 1_050_624, CosformerAttention),
            _variant("probsparse", 1_050_624, ProbSparseAttention),
            _variant("s4d", 2_233_360, S4D),
            _variant("s4d_causal", 2_167_824, S4D, causal=True),
            _variant("transformer_ls", 1_118_336, LongShortTransformerAttention),
            _variant("transformer_ls_causal", 1_580_552, CausalLongShortAttention),
        ),
        reports=(
            "Mean index, noncausal self: local 0.978, cosFormer 0.466, LongShort 0.269, vanilla -0.024, LARA -0.032, Performer "
            "-0.285, Nystrom -0.440, ProbSparse -0.661, ABC -0.686, FlashAttention -1.389",
            "Causal self: S4D 0.985, LongShort 0.617, FlashAttention 0.426, local -0.239, ABC -0.623. Noncausal cross: vanilla "
            "0.596, ABC 0.204, Performer 0.014, cosFormer -0.815. Causal cross: vanilla 0.956, ABC 0.058, Performer -1.014",
            "Efficiency length by time / memory on an A100: ABC 1877 / 70, Performer 2361 / 37, cosFormer 2539 / 164, LARA "
            "2541 / 68, Nystrom 3045 / 94, ProbSparse 3450 / 281, local 4195 / 1169, LongShort 5652 / 342, S4D 6011 / 949",
            "Language modelling on PG-19, 8,192 tokens, perplexity: LongShort 15.52, S4D 15.78, FlashAttention 16.02, local "
            "19.73, ABC 29.13 (whose released form has no memory). Masked: FlashAttention 3.26, LongShort 3.38, local 4.18",
        ),
    )
)
