"""MoH in the language models of `transformers` (arXiv 2410.11842, section 4.4): trained ones go on with fewer heads."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor, nn

from regard.systems.backbones._head_routing import QueryNormRouter, head_split

M = TypeVar("M", bound=nn.Module)

_SETTINGS = ("moh_shared_heads", "moh_routed_heads")


class RoutedHeads(nn.Module):
    """Gates the heads of an attention layer from between its projections: reads queries where they leave `q_proj`, before any
    rotation, and weights what comes to `o_proj`. So attention itself, its kernels, masks and caches stay as they are.

    Args:
        attention: a layer with q_proj, o_proj and head_dim.
    """

    def __init__(self, attention: Any, router: QueryNormRouter) -> None:
        super().__init__()
        self.router, self.head_dim = router, attention.head_dim
        self._gates: Tensor | None = None
        attention.q_proj.register_forward_hook(self._read)
        attention.o_proj.register_forward_pre_hook(self._weight)

    def _read(self, q_proj: nn.Module, args: Any, queries: Tensor) -> None:
        self._gates = self.router(queries.unflatten(-1, (self.router.num_heads, self.head_dim)))

    def _weight(self, o_proj: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        gates, self._gates = self._gates, None
        assert gates is not None, "queries come before outputs"
        heads = args[0].unflatten(-1, (self.router.num_heads, self.head_dim)) * gates[..., None].to(args[0].dtype)
        return (heads.flatten(-2),)


def to_moh(model: M, shared_heads: int | None = None, routed_heads: int | None = None, *, balance: float = 0.01) -> M:
    r"""Route the heads of a causal language model of `transformers`, in place; then train on ("continue-tuning").

    In every attention layer each token uses the first `shared_heads` heads and, of the others, those `routed_heads` whose
    queries are longest (`QueryNormRouter`). There are no new parameters and names, so weights are saved and loaded as ever;
    the two numbers are noted in the model's configuration, from which `to_moh(from_pretrained(...))` takes them. With all
    heads kept the model is the one that it was.

    Call it again at any time with other numbers: one routed head less every some hundred steps leads from dense to sparse
    gradually. (The paper does it at once.) All heads are computed and then weighted, as in the release.

    Args:
        model: with layers that have q_proj and o_proj: LLaMA, Mistral, Qwen2 and the like, alone or inside a larger model.
        shared_heads, routed_heads: None takes what the configuration notes, otherwise half and a quarter of all.
        balance: weight of the mean of the layers' load balance losses in training; it comes with their gradients.

    Returns:
        The model itself.

    Raises:
        ValueError: for a model without such layers, or one that normalises its queries: their lengths tell nothing then.
    """
    layers: list[Any] = [part for part in model.modules() if hasattr(part, "q_proj") and hasattr(part, "o_proj")]
    if not layers:
        raise ValueError(
            f"no layer of {type(model).__name__} has q_proj and o_proj, between which heads could be routed: pass a model of "
            "transformers such as LlamaForCausalLM."
        )
    if any(hasattr(layer, "q_norm") for layer in layers):
        raise ValueError(
            f"{type(model).__name__} normalises its queries, so their lengths cannot tell which heads a token needs."
        )
    configs = [layer.config for layer in layers if hasattr(layer, "config")]
    noted = [getattr(configs[0], name, None) if configs else None for name in _SETTINGS]
    wanted = noted if shared_heads is None and routed_heads is None else [shared_heads, routed_heads]
    splits = [head_split(_heads(layer), *wanted) for layer in layers]
    for layer, (shared, routed) in zip(layers, splits, strict=True):
        router = QueryNormRouter(_heads(layer), shared, routed, balance=balance / len(layers)).train(layer.training)
        if hasattr(layer, "routed_heads"):
            layer.routed_heads.router = router
        else:
            layer.routed_heads = RoutedHeads(layer, router)
    for config in configs:
        for name, value in zip(_SETTINGS, wanted, strict=True):
            setattr(config, name, value)
    return model


def _heads(layer: Any) -> int:
    return layer.o_proj.in_features // layer.head_dim
