"""What adapters to other people's libraries share: is the library there, and may it be used here.

Nothing is imported before a path has found nothing else to refuse; until then a library is only looked for on disk, once.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from functools import lru_cache

import torch
from torch import Tensor

DEVICES = ("cuda",)
"""Where the libraries' kernels run (ROCm builds of PyTorch say "cuda" too)."""


def not_here(library: str, module: str, x: Tensor, install: str) -> str | None:
    """Why `library` is out of the question for `x`, whatever is asked of it: device, nothing to do, not installed."""
    if x.device.type not in DEVICES:
        return f"q is on {x.device.type}, {library} runs on CUDA"
    if not x.numel():
        return "q is empty"
    if torch.compiler.is_exporting():
        return f"an exported program should not need {library}"
    if not installed(module):
        return f"{library} is not installed: {install}"
    return None


@torch.compiler.assume_constant_result
def installed(module: str) -> bool:
    """Whether `module` can be found, without importing it."""
    return _found(module)


@lru_cache
def _found(module: str) -> bool:
    return module in sys.modules or importlib.util.find_spec(module) is not None


@torch.compiler.assume_constant_result
def lacks(module: str, function: str, *parameters: str) -> str | None:
    """Import `module` and say what is wrong with it: it does not load, or `function` misses one of `parameters`."""
    return _lacks(module, function, parameters)


@lru_cache
def _lacks(module: str, function: str, parameters: tuple[str, ...]) -> str | None:
    library = module.partition(".")[0]
    try:
        loaded = importlib.import_module(module)
    except Exception as error:  # a library built for another PyTorch fails in many ways
        return f"{library} is installed but does not load ({type(error).__name__}: {error})"
    known = inspect.signature(getattr(loaded, function)).parameters if hasattr(loaded, function) else {}
    missing = [parameter for parameter in parameters if parameter not in known]
    return f"this {library} has no {function}(..., {missing[0]}=...): upgrade it" if missing else None


def wants_gradient(*tensors: Tensor) -> bool:
    """Whether a backward pass may follow."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
