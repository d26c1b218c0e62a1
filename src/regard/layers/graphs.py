"""Message passing over the edges of a graph, and what encodes nodes and edges before it.

Node features are `(N, dim)`, edge features `(E, dim)`, for several graphs laid end to end. The message-passing layers
also take `(B, N, dim)` with `(E, dim)`: B graphs with the same edges, such as grids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.layers.mlp import Mlp
from regard.layers.norm import BatchNorm


class GraphIndex(NamedTuple):
    """Who is joined to whom, in a batch of graphs.

    Attributes:
        edge_index: `(2, E)`, source above target; messages flow from source to target.
        offsets: `(B + 1,)`; graph b has the nodes `offsets[b]` to `offsets[b + 1] - 1`.
        graph_of: `(N,)`, the graph of each node.
        position: `(N, dim)` codes of the nodes whose distances may scale messages, or None.
    """

    edge_index: Tensor
    offsets: Tensor
    graph_of: Tensor
    position: Tensor | None = None


def sum_at_targets(messages: Tensor, edge_index: Tensor, nodes: int) -> Tensor:
    """`(..., E, C)` messages -> `(..., nodes, C)`: the sum of what arrives at each node."""
    total = messages.new_zeros(*messages.shape[:-2], nodes, messages.shape[-1])
    return total.index_add(-2, edge_index[1], messages)


class DistanceGate(nn.Module):
    """One factor in (0, 1) for each edge, from the squared distance of its ends' position codes (Wang et al., 2022).

    sigmoid(W2 act(W1 |p_i - p_j|²)); arXiv 2203.00199, in the form of GraphGPS.
    """

    def __init__(self, hidden: int, act: Callable[[], nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.fc1 = nn.Linear(1, hidden)
        self.act = act()
        self.fc2 = nn.Linear(hidden, 1)

    def forward(self, position: Tensor, edge_index: Tensor) -> Tensor:
        """Codes `(N, P)` -> factors `(E, 1)`."""
        source, target = edge_index
        distance = (position[target] - position[source]).square().sum(-1, keepdim=True)
        return self.fc2(self.act(self.fc1(distance))).sigmoid()


class MessagePassing(nn.Module):
    """What the local models share: `(x, edges, edge_index, position)` -> updates of x and of edges (None: edges stay).

    Residuals, dropout and norms around the updates belong to the caller.
    """

    gate: nn.Module | None = None

    def scaled(self, messages: Tensor, edge_index: Tensor, position: Tensor | None) -> Tensor:
        """The messages times the gate of their edges, if there is one."""
        if self.gate is None:
            return messages
        if position is None:
            raise ValueError("this layer was built with stable=True and needs the position codes of the nodes.")
        return messages * self.gate(position, edge_index)


class GINE(MessagePassing):
    r"""$\mathrm{mlp}(x_i + \sum_{j \to i} \mathrm{ReLU}(x_j + e_{ij}))$ (Hu et al., 2020, arXiv 1905.12265; eps = 0).

    Args:
        stable: scale messages by the distance of position codes.
    """

    def __init__(self, dim: int, *, act: Callable[[], nn.Module] = nn.ReLU, stable: bool = False) -> None:
        super().__init__()
        self.mlp = Mlp(dim, dim, act=act)
        self.gate = DistanceGate(dim, act) if stable else None

    def forward(
        self, x: Tensor, edges: Tensor, edge_index: Tensor, position: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """x `(..., N, dim)`, edges `(E, dim)` -> the update of x, and None."""
        messages = self.scaled(F.relu(x.index_select(-2, edge_index[0]) + edges), edge_index, position)
        return self.mlp(x + sum_at_targets(messages, edge_index, x.shape[-2])), None


class GatedGCN(MessagePassing):
    r"""Residual gated graph convolution with edge features (Bresson & Laurent, 2017, arXiv 1711.07553).

    $$e'_{ij} = D x_i + E x_j + C e_{ij},\quad \eta_{ij} = \sigma(e'_{ij}),\quad
      x'_i = A x_i + \frac{\sum_{j \to i} \eta_{ij} \odot B x_j}{\sum_{j \to i} \eta_{ij} + 10^{-6}}$$

    The updates are act(BatchNorm(x')) and act(BatchNorm(e')). `stable` multiplies η by the gate of the edge.
    """

    def __init__(self, dim: int, *, act: Callable[[], nn.Module] = nn.ReLU, stable: bool = False) -> None:
        super().__init__()
        self.A, self.B, self.C, self.D, self.E = (nn.Linear(dim, dim) for _ in range(5))
        self.gate = DistanceGate(dim, act) if stable else None
        self.norm_nodes, self.norm_edges = BatchNorm(dim), BatchNorm(dim)
        self.act = act()

    def forward(
        self, x: Tensor, edges: Tensor, edge_index: Tensor, position: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x `(..., N, dim)`, edges `(E, dim)` or `(..., E, dim)` -> the updates of both."""
        source, target = edge_index
        mixed = self.D(x).index_select(-2, target) + self.E(x).index_select(-2, source) + self.C(edges)
        weight = self.scaled(mixed.sigmoid(), edge_index, position)
        arrived = sum_at_targets(weight * self.B(x).index_select(-2, source), edge_index, x.shape[-2])
        total = sum_at_targets(weight, edge_index, x.shape[-2])
        nodes = self.A(x) + arrived / (total + 1e-6)
        return self.act(self.norm_nodes(nodes)), self.act(self.norm_edges(mixed))


class GCN(MessagePassing):
    r"""$\sum_{j \to i} (d_i d_j)^{-1/2} W x_j + b$ over the graph with one loop at each node (Kipf & Welling, 2017).

    d counts arriving edges, the loop included. Edge features are not read.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.lin = nn.Linear(dim, dim, bias=False)
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(
        self, x: Tensor, edges: Tensor | None, edge_index: Tensor, position: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """x `(..., N, dim)` -> its update, and None."""
        # A loop that the graph already has counts as the one loop; zero weight takes it out of the sums.
        real = (edge_index[0] != edge_index[1]).to(x.dtype).unsqueeze(-1)
        scale = (sum_at_targets(real, edge_index, x.shape[-2]) + 1).rsqrt()
        values = self.lin(x) * scale
        arrived = sum_at_targets(values.index_select(-2, edge_index[0]) * real, edge_index, x.shape[-2])
        return (arrived + values) * scale + self.bias, None


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


def pool(x: Tensor, index: GraphIndex, how: str) -> Tensor:
    """`(N, dim)` -> `(B, dim)`: the "add", "mean" or "max" over the nodes of each graph (0 for a graph without nodes)."""
    out = x.new_zeros(len(index.offsets) - 1, x.shape[-1])
    if how == "max":
        return out.scatter_reduce(0, index.graph_of[:, None].expand_as(x), x, "amax", include_self=False)
    out = out.index_add(0, index.graph_of, x)
    return out / index.offsets.diff().clamp(min=1).unsqueeze(-1) if how == "mean" else out


class FeatureEncoder(nn.Module):
    """Raw features of nodes or edges -> `(rows, dim)`: an embedding of types, a sum of several, or a linear map.

    Args:
        types: number of types, or a list of such numbers, one for each integer column. chans: width of float features.
            Exactly one of the two.
    """

    def __init__(self, dim: int, *, types: int | Sequence[int] | None = None, chans: int | None = None) -> None:
        super().__init__()
        if (types is None) == (chans is None):
            raise ValueError(f"give either types or chans, got types={types!r} and chans={chans!r}.")
        if chans is not None:
            self.encoder: nn.Module | None = nn.Linear(chans, dim)
        elif isinstance(types, int):
            self.encoder = nn.Embedding(types, dim)
        else:
            self.encoder = None
            self.tables = nn.ModuleList(nn.Embedding(count, dim) for count in types or ())

    def forward(self, x: Tensor) -> Tensor:
        """`(rows,)` or `(rows, columns)` -> `(rows, dim)`; a single type is read from the first column."""
        if isinstance(self.encoder, nn.Linear):
            return self.encoder(x.to(self.encoder.weight.dtype).view(-1, self.encoder.in_features))
        if x.is_floating_point():
            raise ValueError(f"types must be integers, got {x.dtype}: build the model with the float width instead.")
        if self.encoder is not None:
            return self.encoder(x if x.dim() == 1 else x[:, 0])
        if x.dim() != 2 or x.shape[1] != len(self.tables):
            raise ValueError(f"expected {len(self.tables)} columns of types, got shape {tuple(x.shape)}.")
        return torch.stack([table(column) for table, column in zip(self.tables, x.unbind(1), strict=True)]).sum(0)


class RWSE(nn.Module):
    """Random-walk structural encoding: linear(BatchNorm(landing probabilities)) (Dwivedi et al., arXiv 2110.07875).

    Args:
        dim: width of the code. steps: of the walk, so many columns `graph["rwse"]` must have.
    """

    def __init__(self, dim: int, steps: int) -> None:
        super().__init__()
        self.dim, self.steps = dim, steps
        self.raw_norm = BatchNorm(steps)
        self.pe_encoder = nn.Linear(steps, dim)

    def forward(self, graph: dict[str, Tensor]) -> Tensor:
        """`graph["rwse"]` `(N, steps)` -> `(N, dim)`."""
        walks = needed(graph, "rwse", "regard.layouts.graphs.random_walk_landing")
        if walks.shape[-1] != self.steps:
            raise ValueError(f"rwse must have {self.steps} columns, one a step, got shape {tuple(walks.shape)}.")
        return self.pe_encoder(self.raw_norm(walks))


class LapPE(nn.Module):
    r"""Laplacian position encoding by a set function over frequencies (Kreuzer et al., 2021; SAN's with a DeepSet).

    $$p_i = \sum_k \mathrm{ReLU}(W_2\,\mathrm{ReLU}(W_1 [v_{ik}, \lambda_k]))$$

    A frequency that a small graph lacks (NaN) adds nothing. In training each frequency gets a random sign, one for the
    whole batch, since eigenvectors have none of their own.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.linear_A = nn.Linear(2, 2 * dim)
        self.pe_encoder = nn.Linear(2 * dim, dim)

    def forward(self, graph: dict[str, Tensor]) -> Tensor:
        """`graph["lap_vectors"]`, `graph["lap_values"]` `(N, k)` -> `(N, dim)`."""
        vectors = needed(graph, "lap_vectors", "regard.layouts.graphs.laplacian_eigenpairs")
        values = needed(graph, "lap_values", "regard.layouts.graphs.laplacian_eigenpairs")
        if self.training:
            vectors = vectors * torch.where(torch.rand(vectors.shape[1], device=vectors.device) < 0.5, -1.0, 1.0)
        exists = ~vectors.isnan()
        pairs = torch.stack([vectors.nan_to_num(0.0), values.nan_to_num(0.0)], -1)
        codes = F.relu(self.pe_encoder(F.relu(self.linear_A(pairs))))
        return torch.where(exists.unsqueeze(-1), codes, 0.0).sum(-2)


class StableLapPE(nn.Module):
    """Position codes for `DistanceGate`: a linear map of the Laplacian eigenvectors (Wang et al., 2022).

    Args:
        freqs: so many columns `graph["lap_vectors"]` must have.
    """

    def __init__(self, dim: int, freqs: int) -> None:
        super().__init__()
        self.linear_encoder_eigenvec = nn.Linear(freqs, dim)

    def forward(self, graph: dict[str, Tensor]) -> Tensor:
        """`(N, freqs)` -> `(N, dim)`."""
        vectors = needed(graph, "lap_vectors", "regard.layouts.graphs.laplacian_eigenpairs")
        freqs = self.linear_encoder_eigenvec.in_features
        if vectors.shape[-1] != freqs:
            raise ValueError(f"lap_vectors must have {freqs} columns, got shape {tuple(vectors.shape)}.")
        return self.linear_encoder_eigenvec(vectors.nan_to_num(0.0))


def needed(graph: dict[str, Tensor], key: str, maker: str) -> Tensor:
    """`graph[key]`, or a ValueError that says what makes it."""
    if key not in graph:
        raise ValueError(f"graph lacks {key!r}, which this model reads: compute it with {maker}.")
    return graph[key]
