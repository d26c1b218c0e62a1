"""Who is joined to whom in a batch of graphs, and sums over neighbours and over graphs.

Node features are `(N, dim)`, edge features `(E, dim)`, for several graphs laid end to end. What works at targets also
takes `(B, E, dim)`: B graphs with the same edges, such as grids.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class GraphIndex(NamedTuple):
    """Who is joined to whom, in a batch of graphs.

    Attributes:
        edge_index: `(2, E)`, source above target; messages flow from source to target.
        offsets: `(B + 1,)`; graph b has the nodes `offsets[b]` to `offsets[b + 1] - 1`.
        graph_of: `(N,)`, the graph of each node.
        position: `(N, dim)` codes of the nodes whose distances may scale messages, or None.
        bias: `(P, heads)`, added to the attention of every pair of nodes of one graph, or None: graph after graph, in
            each the row of a query after the other, so that P is the sum of the squared sizes.
        pairs: `(2, L)`, the pairs of nodes that a head on pairs answers for, or None.
    """

    edge_index: Tensor
    offsets: Tensor
    graph_of: Tensor
    position: Tensor | None = None
    bias: Tensor | None = None
    pairs: Tensor | None = None


def sum_at_targets(messages: Tensor, edge_index: Tensor, nodes: int) -> Tensor:
    """`(..., E, C)` messages -> `(..., nodes, C)`: the sum of what arrives at each node."""
    total = messages.new_zeros(*messages.shape[:-2], nodes, messages.shape[-1])
    return total.index_add(-2, edge_index[1], messages)


def extreme_at_targets(messages: Tensor, edge_index: Tensor, nodes: int, how: str) -> Tensor:
    """`(..., E, C)` messages -> `(..., nodes, C)`: the "amax" or "amin" of what arrives, 0 where nothing does."""
    place = edge_index[1].unsqueeze(-1).expand_as(messages)
    start = messages.new_zeros(*messages.shape[:-2], nodes, messages.shape[-1])
    return start.scatter_reduce(-2, place, messages, how, include_self=False)


def softmax_at_targets(logits: Tensor, edge_index: Tensor, nodes: int) -> Tensor:
    """`(..., E, C)` logits -> weights of that shape that sum to 1 over the edges that arrive at each node."""
    most = extreme_at_targets(logits.detach(), edge_index, nodes, "amax")
    weights = (logits - most.index_select(-2, edge_index[1])).exp()
    return weights / sum_at_targets(weights, edge_index, nodes).index_select(-2, edge_index[1])


def pool(x: Tensor, index: GraphIndex, how: str) -> Tensor:
    """`(N, dim)` -> `(B, dim)`: "add", "mean" or "max" over the nodes of each graph (0 for a graph without nodes).

    "token" takes the first node of each graph.
    """
    if how == "token":
        return x[index.offsets[:-1]]
    out = x.new_zeros(len(index.offsets) - 1, x.shape[-1])
    if how == "max":
        return out.scatter_reduce(0, index.graph_of[:, None].expand_as(x), x, "amax", include_self=False)
    out = out.index_add(0, index.graph_of, x)
    return out / index.offsets.diff().clamp(min=1).unsqueeze(-1) if how == "mean" else out


class GraphLayerNorm(nn.Module):
    """Normalise over all nodes and channels of each graph, then scale and shift each channel."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, index: GraphIndex) -> Tensor:
        """`(N, dim)` -> the same shape."""
        centred = x - pool(x, index, "mean").mean(-1, keepdim=True)[index.graph_of]
        variance = pool(centred.square(), index, "mean").mean(-1, keepdim=True)[index.graph_of]
        return centred / (variance + self.eps).sqrt() * self.weight + self.bias


def pair_offsets(offsets: Tensor) -> Tensor:
    """Offsets of graphs `(B + 1,)` -> offsets of their pairs of nodes `(B + 1,)`."""
    return torch.cat([offsets.new_zeros(1), offsets.diff().square().cumsum(0)])


def with_token(x: Tensor, index: GraphIndex, token: Tensor, token_bias: Tensor) -> tuple[Tensor, GraphIndex]:
    """Put one more node in front of each graph, joined to no other by edges.

    Args:
        x: `(N, dim)`. token: `(dim,)`, its features. token_bias: `(heads,)`, what `index.bias` gets in its row and column.

    Returns:
        x `(N + B, dim)` and the index of the larger graphs.
    """
    sizes = index.offsets.diff()
    graphs = torch.arange(len(sizes), device=x.device)
    offsets = index.offsets + torch.arange(len(index.offsets), device=x.device)
    place = torch.arange(len(x), device=x.device) + index.graph_of + 1
    larger = x.new_zeros(len(x) + len(sizes), x.shape[-1]).index_copy(0, place, x)
    larger = larger.index_copy(0, offsets[:-1], token.expand(len(sizes), -1))
    bias = None
    if index.bias is not None:
        graph = graphs.repeat_interleave(sizes.square())
        within = torch.arange(len(graph), device=x.device) - pair_offsets(index.offsets)[graph]
        row, column = within // sizes[graph], within % sizes[graph]
        starts = pair_offsets(offsets)
        pair = starts[graph] + (row + 1) * (sizes[graph] + 1) + column + 1
        bias = token_bias.expand(int(starts[-1]), -1).index_copy(0, pair, index.bias)
    return larger, index._replace(
        edge_index=place[index.edge_index],
        offsets=offsets,
        graph_of=graphs.repeat_interleave(sizes + 1),
        bias=bias,
        pairs=None if index.pairs is None else place[index.pairs],
    )
