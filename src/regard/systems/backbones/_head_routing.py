"""Which heads a token keeps, how much each counts, and how to skip the rest: the routing of MoH (arXiv 2410.11842)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regard import ops
from regard.layers import attach_loss


def head_split(num_heads: int, shared_heads: int | None, routed_heads: int | None) -> tuple[int, int]:
    """Numbers of shared heads and of routed heads a token keeps: half and a quarter of all unless given.

    Raises:
        ValueError: if there are not so many heads, or none of the heads beside the shared ones is ever kept.
    """
    shared = max(num_heads // 2, 1) if shared_heads is None else shared_heads
    routed = min(max(num_heads // 4, 1), num_heads - shared) if routed_heads is None else routed_heads
    if shared < 0 or routed < 0 or shared + routed > num_heads:
        raise ValueError(
            f"shared_heads={shared} and routed_heads={routed} must be at least 0 and together at most "
            f"num_heads={num_heads}."
        )
    if routed == 0 and shared < num_heads:
        raise ValueError(
            f"with routed_heads=0 no token would ever use {num_heads - shared} of the heads: set shared_heads to "
            f"num_heads={num_heads}, or keep at least one routed head."
        )
    return shared, routed


def chosen_heads(scores: Tensor, count: int) -> Tensor:
    """1 at the `count` largest of the last axis, 0 elsewhere: `(..., E)` -> the same shape and dtype, no gradient."""
    best = scores.detach().topk(count, sorted=False).indices
    return torch.zeros_like(scores).scatter(-1, best, 1.0)


def balance_loss(scores: Tensor, chosen: Tensor) -> Tensor:
    r"""What keeps routers from using the same few heads for all tokens (the paper's load balance loss).

    $$L = E \sum_{i=1}^{E} P_i f_i$$

    with P_i the mean score of head i over all tokens of the batch and f_i the share of them that keep it. Under an even
    load L is the number of heads that a token keeps. The factor E is the released code's; the paper has none.

    Args:
        scores: probabilities `(..., E)`. chosen: 0 or 1, of the same shape.
    """
    mean, share = (x.flatten(0, -2).mean(0) for x in (scores, chosen))
    return scores.shape[-1] * (mean * share).sum()


class _Router(nn.Module):
    """What both routers share. Heads 0 .. shared_heads - 1 are shared, the others are routed."""

    def __init__(self, num_heads: int, shared_heads: int, routed_heads: int, *, balance: float = 0.01) -> None:
        super().__init__()
        self.shared_heads, self.routed_heads = head_split(num_heads, shared_heads, routed_heads)
        self.num_heads, self.balance = num_heads, balance

    def _balanced(self, gates: Tensor, scores: Tensor, chosen: Tensor) -> Tensor:
        """The gates; in training the balance loss hangs on their gradient."""
        if self.training and self.balance and len(gates) and gates.requires_grad:
            gates = attach_loss(gates, self.balance * balance_loss(scores, chosen))
        return gates

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, shared_heads={self.shared_heads}, routed_heads={self.routed_heads}"


class HeadRouter(_Router):
    r"""Gates of all heads from three small linear maps of the token (the paper's two-stage routing).

    $$g_i = \begin{cases} 2 \alpha_1 h_s\,\mathrm{softmax}(W_s x)_i & \text{shared heads} \\
      2 \alpha_2 k\,p_i / \sum_{j \in \mathrm{top}_k} p_j & \text{the } k \text{ routed heads of largest } p =
      \mathrm{softmax}(W_r x) \\ 0 & \text{the other routed heads} \end{cases},\quad
      \alpha = \mathrm{softmax}(W_h x)$$

    As released: the active gates have mean 1, so that without preference (all W zero) the layer is plain multi-head
    attention on the active heads. The paper's equations have neither 2, h_s and k nor the sum over kept heads
    (`rescale=False`). Without routed heads $g = h_s\,\mathrm{softmax}(W_s x)$; one shared head alone needs no W_s.

    Args:
        routed_heads: k, of the num_heads - shared_heads that are not shared.
        balance: weight of `balance_loss` in training; models divide it by the number of their routers.
        rescale: gates of mean 1.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        shared_heads: int,
        routed_heads: int,
        *,
        balance: float = 0.01,
        rescale: bool = True,
    ) -> None:
        super().__init__(num_heads, shared_heads, routed_heads, balance=balance)
        self.rescale = rescale
        self.routed = nn.Linear(dim, num_heads - shared_heads, bias=False) if routed_heads else None
        self.between = nn.Linear(dim, 2, bias=False) if routed_heads and shared_heads else None
        self.shared = nn.Linear(dim, shared_heads, bias=False) if shared_heads > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """Tokens `(..., dim)` -> gates `(..., num_heads)`."""
        if self.shared is not None:
            shared = self.shared(x).softmax(-1) * (self.shared_heads if self.rescale else 1)
        else:
            shared = x.new_ones(*x.shape[:-1], self.shared_heads)
        if self.routed is None:
            return shared
        scores = self.routed(x).softmax(-1)
        chosen = chosen_heads(scores, self.routed_heads)
        gates = scores * chosen
        if self.rescale:
            total = gates.sum(-1, keepdim=True).clamp_min(torch.finfo(gates.dtype).eps)
            gates = gates / total * self.routed_heads
        if self.between is not None:
            first, second = (self.between(x).softmax(-1) * (2 if self.rescale else 1)).split(1, -1)
            gates = torch.cat([first * shared, second * gates], -1)
        return self._balanced(gates, scores, chosen)


class QueryNormRouter(_Router):
    r"""Gates 0 or 1 from the length of each head's query, without parameters: for models trained without routing.

    $$g_i = [\,i \text{ shared, or among the } k \text{ largest of } \lVert q_j \rVert,\ j \text{ routed}\,]$$

    Nothing is weighted, so what a trained model's heads add up to changes by the heads left out only. In training the
    gradient of a routed gate goes straight through to its score $\mathrm{softmax}_i(\lVert q_i \rVert / \sigma)$, σ the
    standard deviation over the routed heads (estimator and balance loss after the paper; the release infers only). Of two
    routed heads the scores are constant, as σ is their difference: such a layer's choice is not trained.
    """

    def forward(self, q: Tensor) -> Tensor:
        """Queries `(..., num_heads, head_dim)` before any rotation -> gates `(..., num_heads)`."""
        shared = q.new_ones(*q.shape[:-2], self.shared_heads)
        if not self.routed_heads:
            return shared
        lengths = torch.linalg.vector_norm(q[..., self.shared_heads :, :], dim=-1)
        chosen = chosen_heads(lengths, self.routed_heads)
        if not self.training:
            return torch.cat([shared, chosen], -1)
        if lengths.shape[-1] > 1:
            lengths = lengths / lengths.std(-1, keepdim=True).clamp_min(torch.finfo(q.dtype).eps)
        scores = lengths.softmax(-1)
        gates = torch.cat([shared, chosen + (scores - scores.detach())], -1)
        return self._balanced(gates, scores, chosen)


def attend_where_active(
    q: Tensor, k: Tensor, v: Tensor, active: Tensor, *, causal: bool = False, mask: Tensor | None = None
) -> Tensor:
    """Attention of each head for those queries only that keep the head: what MoH saves.

    The queries of each head and sample are gathered, as many as the busiest head has. So the cost is that of `most` of N
    queries a head; under a balanced router `most` is little more than the share of active heads.

    Args:
        q: `(B, N, heads, head_dim)`. k, v: `(B, M, heads, head_dim)`.
        active: boolean `(B, N, heads)`.
        causal, mask: as in `ops.attention`; the mask broadcasts to `(B, heads, 1, M)`.

    Returns:
        `(B, N, heads, head_dim)`; where a head is not active, zeros, or its output if the query was gathered to fill up.
    """
    most = int(active.sum(1).amax()) if len(q) else 0
    order = active.byte().argsort(dim=1, descending=True, stable=True)[:, :most]  # (B, most, heads)
    index = order[..., None].expand(-1, -1, -1, q.shape[-1])
    if causal:
        last = order.transpose(1, 2)[..., None] + (k.shape[1] - q.shape[1])
        past = torch.arange(k.shape[1], device=q.device) <= last
        mask = past if mask is None else past & mask
    out = torch.zeros_like(q)
    return out.scatter(1, index, ops.attention(q.gather(1, index), k, v, mask=mask)) if most else out  # type: ignore[arg-type]
