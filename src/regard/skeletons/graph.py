"""Models on batches of graphs: encoders, layers that take nodes and edges, a head for graphs or for nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.layers.graphs import GraphIndex, pool
from regard.layouts.ragged import check_offsets, offsets_from_ids
from regard.skeletons.base import Model

Pooling = Literal["add", "mean", "max"]


class GraphHead(nn.Module):
    """pool (for graph-level answers) -> linear, act ... -> linear.

    Args:
        widths: channels of the input and of each hidden layer.
        pooling: over the nodes of each graph; None answers for every node.
        unit_length: scale every hidden vector to length 1 after its activation.
    """

    def __init__(
        self,
        widths: Sequence[int],
        num_classes: int,
        *,
        pooling: Pooling | None,
        act: Callable[[], nn.Module] = nn.ReLU,
        unit_length: bool = False,
    ) -> None:
        super().__init__()
        self.pooling, self.unit_length = pooling, unit_length
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True))
        self.act = act()
        self.out = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor, index: GraphIndex) -> Tensor:
        """`(N, dim)` -> `(B, num_classes)`, or `(N, num_classes)` without pooling."""
        x = x if self.pooling is None else pool(x, index, self.pooling)
        for layer in self.hidden:
            x = self.act(layer(x))
            x = F.normalize(x, dim=-1) if self.unit_length else x
        return self.out(x)


class GraphModel(Model):
    """node_encoder, edge_encoder -> layers -> head.

    A graph (several at once) is a dictionary with at least

    * `x`: node types or features, `(N,)` or `(N, columns)`; `edge_index` `(2, E)` int64, source above target;
    * `offsets` `(B + 1,)`, or `batch` `(N,)`, the graph of each node, ascending; without either it is one graph;
    * `edge_attr` `(E,)` or `(E, columns)`, and encodings, where the model reads them.

    Args:
        node_encoder: graph -> `(N, dim)`. edge_encoder: graph -> `(E, dim)`, or None.
        layers: `(x, edges, GraphIndex) -> (x, edges)`.
        head: `(x, GraphIndex) -> logits`.
        position_encoder: graph -> `(N, P)` codes handed to the layers in `GraphIndex.position`.
    """

    def __init__(
        self,
        *,
        node_encoder: nn.Module,
        edge_encoder: nn.Module | None,
        layers: Sequence[nn.Module],
        head: GraphHead,
        position_encoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.node_encoder = node_encoder
        self.edge_encoder = edge_encoder
        self.position_encoder = position_encoder
        self.layers = nn.ModuleList(layers)
        self.head = head
        self.num_classes = head.out.out_features

    def encode(self, graph: dict[str, Tensor]) -> tuple[Tensor, Tensor | None, GraphIndex]:
        """What the first layer takes."""
        index = index_graph(graph)
        if self.position_encoder is not None:
            index = index._replace(position=self.position_encoder(graph))
        edges = None if self.edge_encoder is None else self.edge_encoder(graph)
        return self.node_encoder(graph), edges, index

    def nodes_forward(self, graph: dict[str, Tensor]) -> tuple[list[Tensor], GraphIndex]:
        """Node features `(N, dim)` after each layer."""
        x, edges, index = self.encode(graph)
        features = []
        for layer in self.layers:
            x, edges = layer(x, edges, index)
            features.append(x)
        return features, index

    def forward_features(self, graph: dict[str, Tensor]) -> Tensor:
        """Graph -> node features after the last layer, `(N, dim)`."""
        return self.nodes_forward(graph)[0][-1]

    def forward_intermediates(self, graph: dict[str, Tensor], indices: Sequence[int] | None = None) -> list[Tensor]:
        """Node features `(N, dim)` after the layers (all, or those in `indices`).

        Raises:
            ValueError: for a layer that does not exist.
        """
        features, _ = self.nodes_forward(graph)
        wanted = range(len(features)) if indices is None else indices
        for one in wanted:
            if not -len(features) <= one < len(features):
                raise ValueError(f"indices must lie in 0..{len(features) - 1}, got {one}.")
        return [features[one] for one in wanted]

    def forward(self, graph: dict[str, Tensor]) -> Tensor:
        """Graph -> logits `(B, num_classes)`, or `(N, num_classes)` if the head answers for nodes."""
        features, index = self.nodes_forward(graph)
        return self.head(features[-1], index)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the last linear layer by a fresh one."""
        old = self.head.out
        self.num_classes = num_classes
        self.head.out = nn.Linear(old.in_features, num_classes, device=old.weight.device, dtype=old.weight.dtype)


def index_graph(graph: dict[str, Tensor]) -> GraphIndex:
    """Check a graph at the door and find out which node belongs to which graph of the batch.

    Raises:
        ValueError: for missing or ill-shaped parts, or edges between graphs that do not exist.
    """
    for key in ("x", "edge_index"):
        if key not in graph:
            raise ValueError(f"graph must hold 'x' and 'edge_index', got the keys {sorted(graph)}.")
    edge_index, nodes = graph["edge_index"], len(graph["x"])
    if edge_index.dim() != 2 or edge_index.shape[0] != 2 or edge_index.dtype != torch.int64:
        raise ValueError(f"edge_index must be (2, E) int64, got {edge_index.dtype} of shape {tuple(edge_index.shape)}.")
    if edge_index.numel() and not 0 <= int(edge_index.min()) <= int(edge_index.max()) < nodes:
        raise ValueError(
            f"edge_index must name nodes from 0 to {nodes - 1}, got {int(edge_index.min())} to {int(edge_index.max())}."
        )
    if "offsets" in graph:
        offsets = graph["offsets"]
        check_offsets("offsets", offsets, nodes)
    elif "batch" in graph:
        ids = graph["batch"]
        if ids.shape != (nodes,):
            raise ValueError(f"batch must hold one graph number a node, ({nodes},), got shape {tuple(ids.shape)}.")
        offsets = offsets_from_ids(ids, int(ids.max()) + 1 if nodes else 0)
    else:
        offsets = torch.tensor([0, nodes], device=edge_index.device)
    graph_of = torch.arange(len(offsets) - 1, device=offsets.device).repeat_interleave(offsets.diff())
    return GraphIndex(edge_index, offsets, graph_of)
