"""How the suite judges numbers: against float64, allowing twice the error of the plain form in the same precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def outputs_and_gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor], seed: int = 0
) -> list[Tensor]:
    """Outputs of `function(*inputs)`, then the gradient of every input for one drawn cotangent per output."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    result = function(*leaves)
    outs = list(result) if isinstance(result, tuple) else [result]
    generator = torch.Generator().manual_seed(seed)
    scalar = sum(
        (out.double() * torch.randn(out.shape, generator=generator, dtype=torch.float64)).nan_to_num(neginf=0).sum()
        for out in outs
    )
    gradients: Sequence[Tensor | None] = [None] * len(leaves)
    if isinstance(scalar, Tensor) and scalar.requires_grad:
        gradients = torch.autograd.grad(scalar, leaves, allow_unused=True)
    filled = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True)]
    return [*(out.detach() for out in outs), *filled]


def assert_exact(fast: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
    """`fast` equals `plain` in float64, and in its own precision errs at most twice as much as `plain` does."""
    wide = [x.double() for x in inputs]
    for ours, true in zip(outputs_and_gradients(fast, wide), outputs_and_gradients(plain, wide), strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-9, atol=1e-10)
    assert_errs_like(fast, plain, inputs)


def assert_errs_like(fast: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
    """Outputs and gradients of `fast` are at most twice as far from those of `plain` in float64 as `plain`'s own are.

    Eight units in the last place of the largest number in play are always allowed: sums in another order differ by that
    much, also where the result itself cancels to nothing.
    """
    wide = [x.double() for x in inputs]
    oracle = outputs_and_gradients(plain, wide)
    scale = (
        max(x.nan_to_num(neginf=0).abs().max().item() for x in [*wide, *oracle] if x.numel()) if wide[0].numel() else 0
    )
    slack = 8 * torch.finfo(inputs[0].dtype).eps * scale
    narrow = outputs_and_gradients(plain, inputs)
    for ours, theirs, true in zip(outputs_and_gradients(fast, inputs), narrow, oracle, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.isfinite(ours).equal(torch.isfinite(true)), (
            "not finite where the oracle is, or the other way round"
        )
        true = true.nan_to_num(neginf=0)
        ours, theirs = ours.double().nan_to_num(neginf=0), theirs.double().nan_to_num(neginf=0)
        if not true.numel():
            continue
        error, allowed = (ours - true).abs().max().item(), 2 * (theirs - true).abs().max().item() + slack
        assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"
