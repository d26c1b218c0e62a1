"""Causal language models of Hugging Face's `transformers` as models of this library."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from regard import checks
from regard.checkpoint import KeyMap
from regard.skeletons.base import Model


def need_transformers() -> Any:
    """The package `transformers`.

    Raises:
        ValueError: if it is not installed; says how to install it.
    """
    try:
        import transformers
    except ImportError as error:
        raise ValueError('this needs the package transformers: pip install "regard[language]".') from error
    return transformers


class HuggingFaceState(NamedTuple):
    """What a stream remembers: how many tokens went by, and the keys and values of all layers (grown in place)."""

    length: int
    cache: Any


class HuggingFaceLM(Model):
    """A causal language model of `transformers` with fresh weights: tokens in, logits of the next token out.

    It takes the place of a `DecoderLM` in tasks and trainers, and streams (`can_stream`) where keys and values can be kept.

    Args:
        config: `model_type` ("llama", "qwen3", ...) and whatever else the configuration of that type takes.

    Example:
        >>> HuggingFaceLM({"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        ...                "intermediate_size": 128, "vocab_size": 50})
    """

    authors_keys: ClassVar = KeyMap(rules=((r"^", "lm."),))

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        transformers = need_transformers()
        options = dict(config)
        kind = options.pop("model_type", None)
        known = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        if kind is None:
            raise ValueError("config needs a model_type, the name of a causal language model such as 'llama'.")
        checks.one_of("config['model_type']", kind, known)
        self.lm = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **options))
        self.vocab_size: int = self.lm.config.get_text_config().vocab_size
        self.can_stream = "past_key_values" in inspect.signature(self.lm.forward).parameters

    @classmethod
    def of(cls, lm: Any) -> HuggingFaceLM:
        """A model of `transformers` that is there already, weights and all; it is shared, not copied."""
        transformers = need_transformers()
        if not isinstance(lm, transformers.PreTrainedModel):
            raise ValueError(f"lm must be a causal language model of transformers, got {type(lm).__name__}.")
        with torch.device("meta"):
            model = cls(lm.config.to_dict())
        model.lm = lm
        return model

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Checkpoints of tied models may hold the shared matrix once: here it stands under both names."""
        tied = getattr(self.lm, "all_tied_weights_keys", None) or {}
        return {**{f"lm.{copy}": state[f"lm.{of}"] for copy, of in tied.items() if f"lm.{of}" in state}, **state}

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens `(B, N)` int64 -> logits `(B, N, vocab_size)` of the token after each.

        Args:
            mask: `(B, N)`, True (or 1) for tokens, False for padding.
        """
        options = {} if mask is None else {"attention_mask": mask.long()}
        return self.lm(input_ids=tokens, use_cache=False, **options).logits

    def prefill(self, tokens: Tensor) -> tuple[Tensor, HuggingFaceState]:
        """Tokens `(B, N)` -> logits `(B, N, vocab_size)` and the state from which `step` goes on."""
        out = self.lm(input_ids=tokens, use_cache=True)
        return out.logits, HuggingFaceState(tokens.shape[1], out.past_key_values)

    def step(self, tokens: Tensor, state: HuggingFaceState | None = None) -> tuple[Tensor, HuggingFaceState]:
        """One token `(B,)` of each stream -> logits `(B, vocab_size)` and the state, which is changed in place."""
        length, cache = state if state is not None else (0, None)
        out = self.lm(input_ids=tokens[:, None], past_key_values=cache, use_cache=True)
        return out.logits[:, 0], HuggingFaceState(length + 1, out.past_key_values)
