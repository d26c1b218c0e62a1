"""Losses that a layer brings along: for parts that the task's own gradient does not reach."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.dtype = loss.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.ones((), dtype=ctx.dtype, device=grad.device)


def attach_loss(x: Tensor, loss: Tensor) -> Tensor:
    """x, unchanged; whoever differentiates through it also adds the gradient of the scalar `loss`.

    So a layer can train a part of itself by a loss of its own, inside any model and any training loop.
    """
    return _Attach.apply(x, loss)
