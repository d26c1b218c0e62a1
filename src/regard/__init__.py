"""regard: the world's attention mechanisms in one vocabulary.

    >>> import regard
    >>> mixer = regard.create_mixer("neighborhood", dim=64, num_heads=2, kernel_size=7)
    >>> model = regard.create_model("dinat_tiny", num_classes=10)

Everything loads when it is first asked for, so importing the package costs next to nothing beyond PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regard import kernels, layers, layouts, ops, skeletons, systems, tasks, training, workbench
    from regard.checkpoint import load_authors_weights
    from regard.flops import count_macs, count_params
    from regard.registry import create_mixer, create_model, get_system, list_mixers, list_models, list_systems

__version__ = "0.1.0"

_HOMES = {
    "create_mixer": "regard.registry",
    "create_model": "regard.registry",
    "list_mixers": "regard.registry",
    "list_models": "regard.registry",
    "list_systems": "regard.registry",
    "get_system": "regard.registry",
    "load_authors_weights": "regard.checkpoint",
    "count_macs": "regard.flops",
    "count_params": "regard.flops",
}
_SUBPACKAGES = ("kernels", "layers", "layouts", "ops", "skeletons", "systems", "tasks", "training", "workbench")

__all__ = [
    "__version__",
    "count_macs",
    "count_params",
    "create_mixer",
    "create_model",
    "get_system",
    "kernels",
    "layers",
    "layouts",
    "list_mixers",
    "list_models",
    "list_systems",
    "load_authors_weights",
    "ops",
    "skeletons",
    "systems",
    "tasks",
    "training",
    "workbench",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _SUBPACKAGES:
        return import_module(f"regard.{name}")
    raise AttributeError(f"module 'regard' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
