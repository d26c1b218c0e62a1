"""Joining attention over parts of the keys into attention over all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from regard.kernels import OpPath, register, run
from regard.ops import reference


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor], *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    r"""Attention over the union of disjoint key sets, from the results on each set.

    $$O = \sum_n e^{\ell_n - \ell} O_n,\qquad \ell = \log \sum_n e^{\ell_n}$$

    Args:
        outs: results `(batch, *spatial, heads, head_dim)`, one for each key set.
        lses: their log-sum-exps `(batch, *spatial, heads)`, as the attention ops return them; -inf = no key in the set.

    Returns:
        The merged result and its log-sum-exp (zeros and -inf where no set has a key).

    Raises:
        ValueError: for no parts, different numbers of parts, or shapes that do not agree.
    """
    if not outs or len(outs) != len(lses):
        raise ValueError(f"outs and lses must hold equally many parts, at least one, got {len(outs)} and {len(lses)}.")
    for index, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        if out.shape != outs[0].shape or lse.shape != out.shape[:-1]:
            raise ValueError(
                f"part {index} does not fit: out {tuple(out.shape)} (expected {tuple(outs[0].shape)}), "
                f"lse {tuple(lse.shape)} (expected {tuple(out.shape[:-1])})."
            )
    return run("merge_attention", backend, list(outs), list(lses))


def _torch(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    stacked = torch.stack(list(lses))
    total = stacked.logsumexp(0)
    weights = torch.exp(stacked - torch.where(total == -math.inf, 0.0, total))
    return (torch.stack(list(outs)) * weights[..., None]).sum(0), total


register("merge_attention", OpPath("torch", _torch), macs=lambda outs, lses: 0)
register("merge_attention", OpPath("reference", reference.merge_attention))
