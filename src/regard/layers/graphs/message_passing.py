"""Message passing over the edges of a graph.

Node features are `(N, dim)`, edge features `(E, dim)`; all layers also take `(B, N, dim)` with `(E, dim)`: B graphs with
the same edges, such as grids.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import checks
from regard.layers.graphs.index import extreme_at_targets, softmax_at_targets, sum_at_targets
from regard.layers.mixer import heads_of
from regard.layers.mlp import Mlp
from regard.layers.norm import BatchNorm


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

    reads_edges: ClassVar[bool] = True
    """Whether edge features are needed."""
    gate: DistanceGate | None  # no default here: a class attribute would hide the module of the same name

    def scaled(self, messages: Tensor, edge_index: Tensor, position: Tensor | None) -> Tensor:
        """The messages times the gate of their edges, if there is one."""
        if self.gate is None:
            return messages
        if position is None:
            raise ValueError("this layer was built with stable=True and needs the position codes of the nodes.")
        return messages * self.gate(position, edge_index)


class GIN(MessagePassing):
    r"""$\mathrm{mlp}(x_i + \sum_{j \to i} x_j)$ (Xu et al., 2019, arXiv 1810.00826; eps = 0). Edges are not read."""

    reads_edges = False

    def __init__(self, dim: int, *, act: Callable[[], nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.mlp = Mlp(dim, dim, act=act)

    def forward(
        self, x: Tensor, edges: Tensor | None, edge_index: Tensor, position: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """x `(..., N, dim)` -> its update, and None."""
        return self.mlp(x + sum_at_targets(x.index_select(-2, edge_index[0]), edge_index, x.shape[-2])), None


class GINE(MessagePassing):
    r"""$\mathrm{mlp}(x_i + \sum_{j \to i} \mathrm{ReLU}(x_j + e_{ij}))$ (Hu et al., 2020, arXiv 1905.12265; eps = 0).

    Args:
        stable: scale messages by the distance of position codes.
    """

    def __init__(self, dim: int, *, act: Callable[[], nn.Module] = nn.ReLU, stable: bool = False) -> None:
        super().__init__()
        self.mlp = Mlp(dim, dim, act=act)
        self.gate = DistanceGate(dim) if stable else None

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

    reads_edges = False

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


class GEN(MessagePassing):
    r"""Generalised convolution of DeeperGCN (Li et al., 2020, arXiv 2006.07739), each channel with a softmax of its own.

    $$m_{ij} = \mathrm{ReLU}(x_j + e_{ij}) + 10^{-7},\quad
      x'_i = \mathrm{mlp}\Big(x_i + \sum_{j \to i} \mathrm{softmax}_j(m_{ij}) \odot m_{ij}\Big)$$

    mlp is W2 ReLU(BatchNorm(W1 x)), twice as wide inside, without bias.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.norm = nn.Linear(dim, 2 * dim, bias=False), BatchNorm(2 * dim)
        self.fc2 = nn.Linear(2 * dim, dim, bias=False)

    def forward(
        self, x: Tensor, edges: Tensor, edge_index: Tensor, position: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """x `(..., N, dim)`, edges `(E, dim)` -> the update of x, and None."""
        nodes = x.shape[-2]
        messages = F.relu(x.index_select(-2, edge_index[0]) + edges) + 1e-7
        arrived = sum_at_targets(softmax_at_targets(messages, edge_index, nodes) * messages, edge_index, nodes)
        return self.fc2(F.relu(self.norm(self.fc1(x + arrived)))), None


class GAT(MessagePassing):
    r"""Graph attention with edge features (Velickovic et al., 2018, arXiv 1710.10903), `dim / num_heads` wide a head.

    $$\alpha_{ij} = \mathrm{softmax}_j\,\mathrm{LeakyReLU}_{0.2}(a_s^\top W x_j + a_t^\top W x_i + a_e^\top W_e e_{ij}),
      \quad x'_i = \sum_{j \to i} \alpha_{ij} W x_j + b$$

    Every node gets one loop in place of those that it has, with the mean of the features of its other arriving edges.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        shape = (1, num_heads, heads_of(dim, num_heads))
        self.lin, self.lin_edge = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.att_src, self.att_dst, self.att_edge = (nn.Parameter(torch.empty(shape)) for _ in range(3))
        self.bias = nn.Parameter(torch.zeros(dim))
        for weight in (self.lin.weight, self.lin_edge.weight, self.att_src, self.att_dst, self.att_edge):
            nn.init.xavier_uniform_(weight)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, self.att_src.shape[1:])

    def forward(
        self, x: Tensor, edges: Tensor, edge_index: Tensor, position: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """x `(..., N, dim)`, edges `(E, dim)` -> the update of x, and None."""
        nodes, (source, target) = x.shape[-2], edge_index
        values = self._heads(self.lin(x))
        sends, takes = (values * self.att_src).sum(-1), (values * self.att_dst).sum(-1)  # (..., N, heads)
        along = (self._heads(self.lin_edge(edges)) * self.att_edge).sum(-1)  # (E, heads)
        loop = (source == target).unsqueeze(-1)
        # The share of the edge is linear in its features, so the mean of shares is the share of the mean.
        count = sum_at_targets((~loop).to(x.dtype), edge_index, nodes).clamp(min=1)
        usual = sum_at_targets(along.masked_fill(loop, 0.0), edge_index, nodes) / count
        logits = F.leaky_relu(sends.index_select(-2, source) + takes.index_select(-2, target) + along, 0.2)
        loops = F.leaky_relu(sends + takes + usual, 0.2)
        here = torch.arange(nodes, device=x.device)
        with_loops = torch.cat([edge_index, here.expand(2, -1)], 1)
        alpha = softmax_at_targets(torch.cat([logits.masked_fill(loop, -torch.inf), loops], -2), with_loops, nodes)
        messages = alpha.unsqueeze(-1) * values.index_select(-3, with_loops[0])
        return sum_at_targets(messages.flatten(-2), with_loops, nodes) + self.bias, None


class PNA(MessagePassing):
    r"""Principal neighbourhood aggregation (Corso et al., 2020, arXiv 2004.05718).

    $$m_{ij} = W_1 [x_i, x_j, W_e e_{ij}],\quad
      x'_i = W_3 W_2 \big[x_i, \big(s(d_i)\,\mathrm{agg}_{j \to i}\, m_{ij}\big)_{s,\,\mathrm{agg}}\big]$$

    d counts arriving edges. Scalers: 1 ("identity"), log(d + 1) / δ ("amplification"), its inverse ("attenuation"), d / δ'
    ("linear") and its inverse ("inverse_linear"), with δ and δ' the means of log(d + 1) and d over the training set. A
    node at which nothing arrives counts as one of degree 1.

    Args:
        edge_dim: channels of the edges. aggregators: of "mean", "min", "max", "sum" and "std". scalers: see above.
        degrees: how many nodes of the training set have 0, 1, 2 ... arriving edges; needed for all scalers but "identity".
    """

    def __init__(
        self,
        dim: int,
        *,
        edge_dim: int | None = None,
        aggregators: Sequence[str] = ("mean", "max", "sum"),
        scalers: Sequence[str] = ("identity",),
        degrees: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        for name in aggregators:
            checks.one_of("aggregators", name, ("mean", "min", "max", "sum", "std"))
        for name in scalers:
            checks.one_of("scalers", name, ("identity", "amplification", "attenuation", "linear", "inverse_linear"))
        if degrees is None and set(scalers) != {"identity"}:
            raise ValueError(f"scalers={tuple(scalers)} need degrees: the histogram of the training set's degrees.")
        self.aggregators, self.scalers = tuple(aggregators), tuple(scalers)
        self.edge_encoder = nn.Linear(dim if edge_dim is None else edge_dim, dim)
        self.pre = nn.Linear(3 * dim, dim)
        self.post = nn.Linear((len(self.aggregators) * len(self.scalers) + 1) * dim, dim)
        self.lin = nn.Linear(dim, dim)
        counts = [0, 1] if degrees is None else list(degrees)
        linear = sum(degree * count for degree, count in enumerate(counts)) / sum(counts)
        logarithmic = sum(math.log(degree + 1) * count for degree, count in enumerate(counts)) / sum(counts)
        self.register_buffer("avg_deg_lin", torch.tensor([linear]))
        self.register_buffer("avg_deg_log", torch.tensor([logarithmic]))

    def forward(
        self, x: Tensor, edges: Tensor, edge_index: Tensor, position: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """x `(..., N, dim)`, edges `(E, edge_dim)` -> the update of x, and None."""
        source, target = edge_index
        ends = x.index_select(-2, target), x.index_select(-2, source)
        messages = self.pre(torch.cat([*ends, self.edge_encoder(edges).expand_as(ends[0])], -1))
        one = x.new_ones(len(source), 1)
        degree = sum_at_targets(one, edge_index, x.shape[-2]).clamp(min=1)
        found = torch.cat([self._aggregated(name, messages, edge_index, degree) for name in self.aggregators], -1)
        return self.lin(
            self.post(torch.cat([x, *(found * self._scale(name, degree) for name in self.scalers)], -1))
        ), None

    def _aggregated(self, name: str, messages: Tensor, edge_index: Tensor, degree: Tensor) -> Tensor:
        nodes = len(degree)
        if name in ("min", "max"):
            return extreme_at_targets(messages, edge_index, nodes, f"a{name}")
        total = sum_at_targets(messages, edge_index, nodes)
        if name == "sum":
            return total
        if name == "mean":
            return total / degree
        variance = sum_at_targets(messages.square(), edge_index, nodes) / degree - (total / degree).square()
        return variance.clamp(min=1e-5).sqrt()

    def _scale(self, name: str, degree: Tensor) -> Tensor:
        """`(nodes, 1)` factors."""
        if name == "identity":
            return torch.ones_like(degree)
        linear = name in ("linear", "inverse_linear")
        factor = degree / self.avg_deg_lin if linear else degree.log1p() / self.avg_deg_log
        return factor.reciprocal() if name in ("attenuation", "inverse_linear") else factor
