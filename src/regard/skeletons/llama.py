"""LLaMA (Touvron et al., 2023, arXiv 2302.13971) as a host: a decoder of RMSNorm, SwiGLU and no biases."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar

from torch import nn

from regard.layers import GatedMlp
from regard.skeletons.decoder_lm import DecoderLM


class Llama(DecoderLM):
    """Embedding, blocks with RMSNorm and SwiGLU, RMSNorm, a head of its own. Order is left to the mixers.

    Args:
        mixer: builds the causal mixer of each block from its index. glu_dim: hidden width of the SwiGLU.
        tied: the head shares the embedding's matrix.
    """

    host_rules: ClassVar = (
        (r"^model\.embed_tokens\.", "embed."),
        (r"^model\.layers\.", "blocks."),
        (r"^model\.norm\.", "norm."),
        (r"^lm_head\.", "head."),
        (r"\.self_attn\.", ".mixer."),
        (r"\.input_layernorm\.", ".norm1."),
        (r"\.post_attention_layernorm\.", ".norm2."),
        (r"\.gate_proj\.", ".gate."),
        (r"\.up_proj\.", ".value."),
        (r"\.down_proj\.", ".out."),
    )
    """The names of published checkpoints (Hugging Face) outside of the mixers."""
    host_drop: ClassVar = (r"rotary_emb\.inv_freq$",)

    def __init__(
        self,
        *,
        mixer: Callable[[int], nn.Module],
        vocab_size: int = 128256,
        dim: int = 4096,
        depth: int = 32,
        glu_dim: int = 14336,
        norm_eps: float = 1e-5,
        tied: bool = False,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(
            vocab_size,
            dim,
            mixer,
            depth=depth,
            mlp=lambda width: GatedMlp(width, glu_dim, bias=False),
            norm=partial(nn.RMSNorm, eps=norm_eps),
            tied=tied,
            drop_path_rate=drop_path_rate,
        )
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
