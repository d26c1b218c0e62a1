"""The image models that parametrised tests run over: one a system and class, whole or with its stages cut short."""

from __future__ import annotations

import inspect
from functools import cache
from math import inf
from typing import Any

import torch

import regard
from regard.registry import find_variant, list_models
from regard.skeletons import ImageModel

_TIED: dict[str, dict[str, Any]] = {
    "crossformer_pp_small": {"depths": (1, 1, 4, 1)},  # its third block cools if another follows
    "hyena_deit_tiny_attention": {"depth": 2, "attention_blocks": (0,)},
    "spectformer_tiny": {"depth": 2, "spectral_blocks": 1},
}
"""Where other options go with the depth."""


@cache
def smallest_image_models() -> list[str]:
    """One model a system and class: the one with the fewest parameters."""
    chosen: dict[Any, tuple[float, str]] = {}
    for name in list_models():
        system, variant = find_variant(name)
        made_by = getattr(variant.build, "func", variant.build)
        # Others take an image too, to restore it or to find things in it.
        if isinstance(made_by, type) and issubclass(made_by, ImageModel):
            key = (system.slug, made_by)
            chosen[key] = min(chosen.get(key, (inf, name)), (variant.params or inf, name))
    return sorted(name for _, name in chosen.values())


@cache
def shallow(name: str) -> dict[str, Any]:
    """Options that leave one block a stage and two in its deepest, where neighbours may differ; none if it cannot.

    What a compiler sees of a block it sees in each of its kind.
    """
    if name in _TIED:
        return _TIED[name]
    _, variant = find_variant(name)
    parameters: dict[str, inspect.Parameter] = {}
    for made_by in reversed(getattr(variant.build, "func", variant.build).__mro__):
        parameters.update(inspect.signature(made_by.__init__).parameters)
    option = next((option for option in ("depths", "depth") if option in parameters), None)
    if option is None:
        return {}
    depths = variant.options.get(option, parameters[option].default)
    options = {option: _cut(depths, [max(_leaves(depths))])}
    try:
        with torch.device("meta"):
            regard.create_model(name, **options)
    except ValueError:  # of a published depth only
        return {}
    return options


def _leaves(depths: Any) -> list[int]:
    return [depths] if isinstance(depths, int) else [leaf for entry in depths for leaf in _leaves(entry)]


def _cut(depths: Any, deepest: list[int]) -> Any:
    """Everything at 1, but the first that is `deepest` at 2."""
    if not isinstance(depths, int):
        return tuple(_cut(entry, deepest) for entry in depths)
    return min(depths, 2) if depths in deepest and deepest.pop() else min(depths, 1)
