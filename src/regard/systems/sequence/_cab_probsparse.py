"""ProbSparse attention of Informer (Zhou et al., 2021, arXiv 2012.07436): full attention for a few queries."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard import checks, ops
from regard.checkpoint import KeyMap
from regard.registry import register_mixer
from regard.systems.sequence._cab_attention import MaskedAttention

_ROWS = 512
"""Queries whose sampled keys are held at once."""


@register_mixer("probsparse")
class ProbSparseAttention(MaskedAttention):
    r"""Full attention for the u queries whose scores differ most, the mean value for the others (section 3.2, eq. 4).

    $$M_i = \max_{j \in S_i} q_i^\top k_j - \frac1N \sum_{j \in S_i} q_i^\top k_j,\quad
      u = |S_i| = c\,\lceil \ln N \rceil$$

    S_i are drawn keys, the same for all samples and heads: anew in every forward pass of training, evenly spread and fixed
    otherwise (the release draws always). Nothing is learned through the choice. N counts tokens that are no padding.

    `authors_quirks`: the release ignores masks.

    Args:
        factor: c. The others: see `MaskedAttention`.
    """

    authors_keys = KeyMap(
        rules=[
            (r"\b(q)uery_projection|\b(k)ey_projection|\b(v)alue_projection", r"\1\2\3"),
            (r"\bout_projection", "proj"),
        ]
    )

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        factor: int = 5,
        qkv_bias: bool = True,
        causal: bool = False,
        authors_quirks: bool = False,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias=qkv_bias, causal=causal, authors_quirks=authors_quirks)
        checks.positive("factor", factor)
        self.factor = factor

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """See the base class."""
        length = q.shape[1]
        most = self._budget(length)
        places = _spread(length, most, q.device) if not self.training else torch.rand(length, most, device=q.device)
        if mask is None or self.authors_quirks:
            return self.choose(q, k, v, (places * length).long()[None])
        count = mask.sum(1).clamp(min=1)[:, None, None]
        # Ranks among the tokens -> their places, tokens before padding.
        tokens = (~mask).byte().argsort(dim=1, stable=True)
        ranks = (places * count).long()
        keys = tokens.gather(1, ranks.flatten(1)).view_as(ranks)
        return self.choose(q, k, v, keys, mask)

    def choose(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
        """`attend` with given places S `(B or 1, N, most)` of the keys to look at, of which the first |S_i| count."""
        batch, length, most = len(q), q.shape[1], keys.shape[2]
        if mask is None:
            count = budget = None
        else:
            count = mask.sum(1).clamp(min=1)
            budget = (self.factor * count.float().log().ceil()).clamp(min=1).minimum(count)
        measure = self._measure(q, k, keys, count, budget)
        if mask is not None:
            measure = measure.masked_fill(~mask[..., None], -torch.inf)
        top = measure.topk(min(most, length), 1).indices  # (B, u, heads)
        where = top[..., None].expand(-1, -1, -1, self.head_dim)
        rows = None if mask is None else mask[:, None, None]
        full = ops.attention(q.gather(1, where), k, v, mask=rows)
        if count is None or mask is None:
            mean = v.mean(1, keepdim=True)
        else:
            mean = (v * mask[..., None, None]).sum(1, keepdim=True) / count.to(v.dtype)[:, None, None, None]
            chosen = torch.arange(top.shape[1], device=q.device) < budget[:, None]  # type: ignore[index]
            full = torch.where(chosen[..., None, None], full, mean)  # type: ignore[arg-type]
        return mean.expand(batch, length, -1, -1).scatter(1, where, full)  # type: ignore[arg-type]

    @torch.no_grad()
    def _measure(self, q: Tensor, k: Tensor, keys: Tensor, count: Tensor | None, budget: Tensor | None) -> Tensor:
        """M of every query and head `(B, N, heads)`."""
        sample = torch.arange(len(q), device=q.device)[:, None, None]
        parts = []
        for start in range(0, q.shape[1], _ROWS):
            picked = k[sample, keys[:, start : start + _ROWS]]  # (B, rows, most, heads, d)
            scores = torch.einsum("bnhd,bnuhd->bnhu", q[:, start : start + _ROWS], picked)
            if count is None or budget is None:
                parts.append(scores.amax(-1) - scores.sum(-1) / k.shape[1])
                continue
            outside = torch.arange(scores.shape[-1], device=q.device) >= budget[:, None, None, None]
            sums = scores.masked_fill(outside, 0.0).sum(-1) / count[:, None, None]
            parts.append(scores.masked_fill(outside, -torch.inf).amax(-1) - sums)
        return torch.cat(parts, 1)

    def _budget(self, length: int) -> int:
        """u of so many tokens."""
        return min(max(self.factor * math.ceil(math.log(length)), 1), length)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, factor={self.factor}"


def _spread(rows: int, columns: int, device: torch.device) -> Tensor:
    """Numbers in [0, 1), evenly spread over rows and columns alike, `(rows, columns)` float64; more rows change no other.

    The two-dimensional Kronecker sequence of the plastic number.
    """
    row, column = (torch.arange(1, size + 1, dtype=torch.float64, device=device) for size in (rows, columns))
    return (row[:, None] * 0.7548776662466927 + column * 0.5698402909980532) % 1
