"""Attention among all nodes of each graph: softmax, with or without a bias for each pair of nodes, and linear."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import checks, ops
from regard.layers.graphs.index import pair_offsets
from regard.layers.mixer import heads_of
from regard.layouts.ragged import Bucket, buckets


class NodeAttention(nn.Module):
    r"""Softmax attention among all nodes of each graph: $W_o\,\mathrm{softmax}(d^{-1/2} Q K^\top + b) V$.

    The authors pad graphs to one length and mask; here no graph is padded beyond the next power of two.

    Args:
        drop: rate at which attention weights are dropped in training.
    """

    def __init__(self, dim: int, num_heads: int, *, drop: float = 0.0) -> None:
        super().__init__()
        self.head_dim = heads_of(dim, num_heads)
        self.num_heads, self.drop = num_heads, drop
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.qkv.weight)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.proj.bias)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        return q, k, v

    def forward(self, x: Tensor, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
        """`(N, dim)`, graph by graph -> the same shape; `bias` as in `GraphIndex.bias`."""
        q, k, v = self._split(x)
        drop = self.drop if self.training else 0.0
        if bias is None and not drop:
            return self.proj(ops.grouped_attention(q, k, v, offsets).flatten(-2))
        out = torch.zeros_like(q)
        for bucket in buckets(offsets, offsets):
            qs, ks, vs = (part[bucket.rows].transpose(1, 2) for part in (q, k, v))
            mask = bucket.key_exists[:, None, None]
            if bias is not None:
                mask = bias_of(bucket, offsets, bias).masked_fill(~mask, -math.inf)
            mixed = F.scaled_dot_product_attention(qs, ks, vs, mask, dropout_p=drop).transpose(1, 2)
            out = out.index_put((bucket.rows[bucket.row_exists],), mixed[bucket.row_exists])
        return self.proj(out.flatten(-2))

    def dense(self, x: Tensor) -> Tensor:
        """`(B, N, dim)`, B graphs of one size -> the same shape."""
        return self.proj(ops.attention(*self._split(x)).flatten(-2))  # type: ignore[union-attr]


def bias_of(bucket: Bucket, offsets: Tensor, bias: Tensor) -> Tensor:
    """The part of `GraphIndex.bias` that belongs to the graphs of a bucket of R slots: `(g, heads, R, R)`."""
    first, size = bucket.rows[:, 0].contiguous(), bucket.row_exists.sum(1)
    graph = torch.searchsorted(offsets, first, right=True) - 1
    place = bucket.rows - first[:, None]
    start = pair_offsets(offsets)[graph]
    pair = start[:, None, None] + place[:, :, None] * size[:, None, None] + place[:, None, :]
    return bias[pair].movedim(-1, 1)


class PerformerAttention(nn.Module):
    r"""Linear attention with positive random features, FAVOR+ (Choromanski et al., 2021, arXiv 2009.14794).

    $$\phi(x) = m^{-1/2} (e^{s W x - s^2 |x|^2 / 2 - \max} + 10^{-4}),\quad s = d^{-1/4},\quad
      \mathrm{out} = \phi(q)\,\frac{\sum_j \phi(k_j) v_j^\top}{\phi(q)^\top \sum_j \phi(k_j)}$$

    W has m = d ln d rows, random and orthogonal in blocks of d, and is drawn once. Heads are `head_dim` wide whatever
    `dim` is. The maximum runs over the features of a query, and over features and nodes of a graph for its keys.

    Args:
        drop: rate of dropout on the output.
        authors_quirks: as the released code does, pad graphs to the largest one and let the padding (k = 0) take part in
            the maximum and in the normaliser, so that a graph's output depends on the others in its batch.
    """

    projection: Tensor

    def __init__(
        self, dim: int, num_heads: int, *, head_dim: int = 64, drop: float = 0.0, authors_quirks: bool = False
    ) -> None:
        super().__init__()
        checks.positive("num_heads", num_heads)
        self.num_heads, self.head_dim, self.authors_quirks = num_heads, head_dim, authors_quirks
        self.q, self.k, self.v = (nn.Linear(dim, num_heads * head_dim, bias=False) for _ in range(3))
        self.proj = nn.Linear(num_heads * head_dim, dim)
        self.drop = nn.Dropout(drop)
        self.register_buffer("projection", orthogonal_features(int(head_dim * math.log(head_dim)), head_dim))

    def _features(self, x: Tensor, axes: tuple[int, ...], exists: Tensor | None) -> Tensor:
        """`(B, N, heads, d)` -> `(B, N, heads, m)`, zero where a node does not exist."""
        x = x * self.head_dim**-0.25
        logits = x @ self.projection.t()
        known = logits if exists is None else logits.masked_fill(~exists, -math.inf)
        most = known.detach().amax(axes, keepdim=True)
        half = x.square().sum(-1, keepdim=True) / 2
        features = ((known - half - most).exp() + 1e-4) * self.projection.shape[0] ** -0.5
        return features if exists is None else features * exists

    def dense(self, x: Tensor, exists: Tensor | None = None) -> Tensor:
        """`(B, N, dim)`, B graphs of one size or padded (`exists` `(B, N)`) -> the same shape."""
        q, k, v = (part(x).unflatten(-1, (self.num_heads, self.head_dim)) for part in (self.q, self.k, self.v))
        real = None if exists is None else exists[..., None, None]
        if real is not None:
            v = v * real
        q = self._features(q, (-1,), None)
        k = self._features(k, (1, 3), None if self.authors_quirks else real)
        out = ops.linear_attention(q, k, v, eps=0.0)
        return self.drop(self.proj(out.flatten(-2)))  # type: ignore[union-attr]

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """`(N, dim)`, graph by graph -> the same shape."""
        out = torch.zeros_like(x)
        for rows, exists in _one_batch(offsets) if self.authors_quirks else _batches(offsets):
            batch = x[rows] * exists.unsqueeze(-1)
            out = out.index_put((rows[exists],), self.dense(batch, exists)[exists])
        return out


def _batches(offsets: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(bucket.rows, bucket.row_exists) for bucket in buckets(offsets, offsets)]


def _one_batch(offsets: Tensor) -> list[tuple[Tensor, Tensor]]:
    sizes = offsets.diff()
    slot = torch.arange(int(sizes.max()), device=offsets.device)
    exists = slot < sizes[:, None]
    return [(torch.where(exists, offsets[:-1, None] + slot, 0), exists)]


def orthogonal_features(count: int, dim: int) -> Tensor:
    """`(count, dim)`: random rows, orthogonal within blocks of `dim`, as long as rows of a normal matrix would be."""
    blocks = [torch.linalg.qr(torch.randn(dim, dim)).Q.t() for _ in range(-(-count // dim))]
    return torch.cat(blocks)[:count] * torch.randn(count, dim).norm(dim=1, keepdim=True)
