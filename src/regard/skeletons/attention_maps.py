"""The attention maps of a causal language model, from one extra forward pass with explicit softmax."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regard.layers import SoftmaxAttention
from regard.skeletons.decoder_lm import DecoderLM
from regard.skeletons.hugging_face import HuggingFaceLM


def attention_maps(
    model: nn.Module,
    tokens: Tensor,
    *,
    layers: Sequence[int] | Callable[[int], Sequence[int]] | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run `model` on `tokens` and return what every head attended to.

    Fused attention never writes its weights down, so this is a pass of its own: without gradients, in evaluation mode, and
    for models of `transformers` with their eager attention. The model is left as it was found. Keys and values are not kept.

    Args:
        model: a causal language model of `transformers`, a `HuggingFaceLM` around one, or a `DecoderLM` whose mixers are
            softmax attention (or have a method `attention_maps(x)` that returns their weights, `(B, heads, N, N)`).
        tokens: `(B, N)`; padding on the right needs no mask in a causal model.
        layers: which to return, or a function that says so from the number of layers; None is all.
        mask: `(B, N)`, True for tokens (only models of `transformers`).

    Returns:
        maps: `(B, layers, heads, N, N)`, row t the weights of query t; causal, rows sum to 1.
        logits: `(B, N, vocab_size)` of the same pass.

    Raises:
        ValueError: for a model that cannot show its weights.
    """
    inner: Any = model.lm if isinstance(model, HuggingFaceLM) else model
    was_training = inner.training
    inner.eval()
    try:
        with torch.no_grad():
            if isinstance(inner, DecoderLM):
                if mask is not None:
                    raise ValueError("mask is for models of transformers: pad on the right instead.")
                maps, logits = _of_decoder(inner, tokens)
            elif hasattr(inner, "set_attn_implementation"):
                maps, logits = _of_transformers(inner, tokens, mask)
            else:
                raise ValueError(
                    f"model must be a causal language model of transformers or a DecoderLM, got {type(model).__name__}."
                )
    finally:
        inner.train(was_training)
    wanted = range(len(maps)) if layers is None else layers(len(maps)) if callable(layers) else layers
    for layer in wanted:
        if not -len(maps) <= layer < len(maps):
            raise ValueError(f"layers must lie in 0..{len(maps) - 1}, got {layer}.")
    return torch.stack([maps[layer] for layer in wanted], 1), logits


def _of_transformers(model: Any, tokens: Tensor, mask: Tensor | None) -> tuple[list[Tensor], Tensor]:
    before = model.config._attn_implementation
    name = type(model).__name__
    refused = (
        f"{name} shows no attention weights: its attention ({before}) is fused or has none to show. Use a model whose "
        "attention transformers can run as attn_implementation='eager'."
    )
    try:
        model.set_attn_implementation("eager")
    except ValueError as error:
        raise ValueError(f"{refused} ({error})") from error
    try:
        if model.config._attn_implementation != "eager":
            raise ValueError(refused)
        options = {} if mask is None else {"attention_mask": mask.long()}
        out = model(input_ids=tokens, output_attentions=True, use_cache=False, **options)
    finally:
        model.set_attn_implementation(before)
    maps = list(getattr(out, "attentions", None) or ())
    if not maps or any(part is None or part.dim() != 4 for part in maps):
        raise ValueError(refused)
    return maps, out.logits


def _of_decoder(model: DecoderLM, tokens: Tensor) -> tuple[list[Tensor], Tensor]:
    maps: list[Tensor] = []

    def keep(mixer: nn.Module, inputs: tuple[Tensor, ...], index: int) -> None:
        maps.append(_weights(mixer, inputs[0], index))

    with ExitStack() as hooks:
        for index, block in enumerate(model.blocks):
            hooks.enter_context(block.mixer.register_forward_pre_hook(partial(keep, index=index)))
        logits = model(tokens)
    return maps, logits


def _weights(mixer: nn.Module, x: Tensor, index: int) -> Tensor:
    if hasattr(mixer, "attention_maps"):
        return mixer.attention_maps(x)
    plain = isinstance(mixer, SoftmaxAttention) and all(
        getattr(type(mixer), method) is getattr(SoftmaxAttention, method) for method in ("forward", "attend")
    )
    if not plain:
        raise ValueError(
            f"the mixer of block {index}, {type(mixer).__name__}, shows no attention weights: it is fused or has none. Use "
            "softmax attention, or give the mixer a method attention_maps(x) -> (batch, heads, N, N)."
        )
    q = mixer.q(x).unflatten(-1, (mixer.num_heads, mixer.head_dim)).transpose(1, 2)
    k = mixer.kv(x).unflatten(-1, (2, mixer.kv_heads, mixer.head_dim))[:, :, 0].transpose(1, 2)
    k = k.repeat_interleave(mixer.num_heads // mixer.kv_heads, 1)
    scores = mixer.head_dim**-0.5 * q @ k.transpose(-1, -2)
    if mixer.causal:
        seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        scores = scores.masked_fill(~seen, float("-inf"))
    return scores.softmax(-1)
