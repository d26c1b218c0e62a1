"""Counting multiply-adds the way papers do: one per product in convolutions, linear layers and attention.

Published "FLOPs" of vision models are multiply-adds (MACs). Ops of this library report the cost of their definition (a
window of K keys costs K products a query and channel), not of the path that happens to compute it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class MacCounter(TorchDispatchMode):
    """Adds up multiply-adds of everything run inside; read `.macs`.

    Example:
        >>> with MacCounter() as counter:
        ...     nn.Linear(8, 4)(torch.zeros(2, 8))
        >>> counter.macs
        64
    """

    active: MacCounter | None = None

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0
        self.suspended = False

    def __enter__(self) -> MacCounter:
        self._outer, MacCounter.active = MacCounter.active, self
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        MacCounter.active = self._outer
        super().__exit__(*exc)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None and not self.suspended:
            self.macs += formula(*args, **(kwargs or {}), out_val=out) // 2
        return out


def counted(
    macs: Callable[..., int] | None, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call `run`; where a counter is active and a formula is given, count by the formula instead of from the inside."""
    counter = MacCounter.active
    if counter is None or counter.suspended or macs is None:
        return run(*args, **kwargs)
    counter.macs += macs(*args, **kwargs)
    counter.suspended = True
    try:
        return run(*args, **kwargs)
    finally:
        counter.suspended = False


def count_macs(model: nn.Module, *inputs: torch.Tensor) -> int:
    """Multiply-adds of one forward pass of `model` on inputs of these shapes, in evaluation mode.

    Put model and inputs on the meta device to count without computing.
    """
    was_training = model.training
    model.eval()
    with torch.no_grad(), MacCounter() as counter:
        model(*inputs)
    model.train(was_training)
    return counter.macs


def count_params(model: nn.Module) -> int:
    """Number of trainable parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
