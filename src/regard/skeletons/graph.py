"""Models on batches of graphs: encoders, layers that take nodes and edges, a head for graphs, nodes, pairs or sequences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import checks
from regard.layers.graphs import Encoding, FeatureEncoder, GraphIndex, needed, pool
from regard.layers.norm import BatchNorm
from regard.layouts.ragged import check_offsets, offsets_from_ids
from regard.skeletons.base import Model

Pooling = Literal["add", "mean", "max", "token"]


class NodeEncoder(nn.Module):
    """Features of a node, with encodings of where it is.

    Args:
        features: encoder of `graph["x"]`. encodings: applied in their order.
        norm: channels to normalise, rectify and scale to length 1 before the encodings (GraphGym's layer before the
            message passing), or None.
    """

    def __init__(self, features: FeatureEncoder, encodings: Sequence[Encoding], norm: int | None = None) -> None:
        super().__init__()
        self.features = features
        self.norm = None if norm is None else BatchNorm(norm)
        self.encodings = nn.ModuleList(encodings)

    def forward(self, graph: Mapping[str, Tensor], index: GraphIndex) -> tuple[Tensor, GraphIndex]:
        """Graph -> `(N, dim)`, and the index with what the encodings say to the layers."""
        x = self.features(graph["x"])
        if self.norm is not None:
            x = F.normalize(F.relu(self.norm(x)), dim=-1)
        for encoding in self.encodings:
            x, index = encoding(graph, x, index)
        return x, index


class EdgeEncoder(nn.Module):
    """`graph["edge_attr"]` -> `(E, dim)`; with a single edge type it need not be there."""

    def __init__(self, features: FeatureEncoder, single: bool) -> None:
        super().__init__()
        self.features, self.single = features, single

    def forward(self, graph: Mapping[str, Tensor]) -> Tensor:
        """Graph -> `(E, dim)`."""
        if self.single:
            return self.features(torch.zeros_like(graph["edge_index"][0]))
        return self.features(needed(graph, "edge_attr"))


class GraphHead(nn.Module):
    """pool (for graph-level answers) -> linear, act ... -> linear.

    Args:
        widths: channels of the input and of each hidden layer.
        pooling: over the nodes of each graph; None answers for every node.
        unit_length: scale every hidden vector to length 1 after its activation.
        norm: LayerNorm of the nodes to begin with.
    """

    def __init__(
        self,
        widths: Sequence[int],
        num_classes: int,
        *,
        pooling: Pooling | None,
        act: Callable[[], nn.Module] = nn.ReLU,
        unit_length: bool = False,
        norm: bool = False,
    ) -> None:
        super().__init__()
        self.num_classes, self.pooling, self.unit_length = num_classes, pooling, unit_length
        self.norm = nn.LayerNorm(widths[0]) if norm else nn.Identity()
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True))
        self.act = act()
        self.out = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor, index: GraphIndex) -> Tensor:
        """`(N, dim)` -> `(B, num_classes)`, or `(N, num_classes)` without pooling."""
        x = self.norm(x)
        x = x if self.pooling is None else pool(x, index, self.pooling)
        for layer in self.hidden:
            x = self.act(layer(x))
            x = F.normalize(x, dim=-1) if self.unit_length else x
        return self.out(x)

    def reset(self, num_classes: int) -> None:
        """Replace the last linear layer by a fresh one."""
        self.num_classes, self.out = num_classes, _fresh(self.out, num_classes)


class PairHead(GraphHead):
    """Answers for pairs of nodes, `graph["pairs"]`: is there a link between the two?

    Args:
        dim: channels. layers: linear ones, all but the last rectified and scaled to length 1.
        decode: "dot" product or "cosine" of what the layers make of the two nodes, one number a pair; "concat": the layers
            work on the two nodes side by side and give `num_classes` numbers.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        layers: int = 1,
        decode: Literal["dot", "cosine", "concat"] = "dot",
    ) -> None:
        self_made = checks.one_of("decode", decode, ("dot", "cosine", "concat")) == "concat"
        if not self_made and num_classes != 1:
            raise ValueError(f"decode={decode!r} gives one number a pair, got num_classes={num_classes}: use 'concat'.")
        widths = [2 * dim if self_made else dim, *[dim] * (layers - 1)]
        super().__init__(widths, num_classes if self_made else dim, pooling=None, unit_length=True)
        self.num_classes, self.decode = num_classes, decode

    def forward(self, x: Tensor, index: GraphIndex) -> Tensor:
        """`(N, dim)` -> `(pairs, num_classes)`."""
        if index.pairs is None:
            raise ValueError("graph lacks 'pairs' (2, P), the pairs of nodes that this model answers for.")
        first, second = index.pairs
        if self.decode == "concat":
            return super().forward(torch.cat([x[first], x[second]], -1), index)
        x = super().forward(x, index)
        x = F.normalize(x, dim=-1) if self.decode == "cosine" else x
        return (x[first] * x[second]).sum(-1, keepdim=True)

    def reset(self, num_classes: int) -> None:
        """Replace the last linear layer by a fresh one."""
        if self.decode != "concat" and num_classes != 1:
            raise ValueError(f"decode={self.decode!r} gives one number a pair, got num_classes={num_classes}.")
        self.num_classes, self.out = num_classes, _fresh(self.out, num_classes if self.decode == "concat" else None)


class SequenceHead(nn.Module):
    """pool -> `length` linear layers, one for each place of a sequence.

    Args:
        dim: channels. num_classes: size of the vocabulary.
    """

    def __init__(self, dim: int, num_classes: int, *, length: int, pooling: Pooling) -> None:
        super().__init__()
        self.num_classes, self.pooling = num_classes, pooling
        self.outs = nn.ModuleList(nn.Linear(dim, num_classes) for _ in range(length))

    def forward(self, x: Tensor, index: GraphIndex) -> Tensor:
        """`(N, dim)` -> `(B, length, num_classes)`."""
        x = pool(x, index, self.pooling)
        return torch.stack([out(x) for out in self.outs], 1)

    def reset(self, num_classes: int) -> None:
        """Replace the linear layers by fresh ones."""
        self.num_classes = num_classes
        self.outs = nn.ModuleList(_fresh(out, num_classes) for out in self.outs)  # type: ignore[arg-type]


def _fresh(old: nn.Linear, out_features: int | None = None) -> nn.Linear:
    width = old.out_features if out_features is None else out_features
    return nn.Linear(old.in_features, width, device=old.weight.device, dtype=old.weight.dtype)


class GraphModel(Model):
    """node_encoder, edge_encoder -> layers -> head.

    A graph (several at once) is a dictionary with at least

    * `x`: node types or features, `(N,)` or `(N, columns)`; `edge_index` `(2, E)` int64, source above target;
    * `offsets` `(B + 1,)`, or `batch` `(N,)`, the graph of each node, ascending; without either it is one graph;
    * `edge_attr` `(E,)` or `(E, columns)`, `pairs` `(2, P)` and encodings, where the model reads them.

    Args:
        node_encoder: `(graph, GraphIndex) -> x (N, dim), GraphIndex`. edge_encoder: graph -> `(E, dim)`, or None.
        layers: `(x, edges, GraphIndex) -> (x, edges)`.
        head: `(x, GraphIndex) -> logits`.
    """

    def __init__(
        self,
        *,
        node_encoder: NodeEncoder,
        edge_encoder: nn.Module | None,
        layers: Sequence[nn.Module],
        head: GraphHead | SequenceHead,
    ) -> None:
        super().__init__()
        self.node_encoder = node_encoder
        self.edge_encoder = edge_encoder
        self.layers = nn.ModuleList(layers)
        self.head = head

    @property
    def num_classes(self) -> int:
        """Numbers that the head gives for each graph, node, pair or place of a sequence."""
        return self.head.num_classes

    def prepare(self, graph: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One graph with `x` and `edge_index` -> the same with whatever the model's encodings read besides.

        Once for each graph, before graphs are put together to a batch.

        Raises:
            ValueError: for several graphs in one, or a graph that is not well formed.
        """
        index = index_graph(graph)
        if len(index.offsets) != 2:
            raise ValueError(f"prepare takes one graph at a time, got {len(index.offsets) - 1}.")
        found = dict(graph)
        for encoding in self.node_encoder.encodings:
            found |= {key: value for key, value in encoding.prepare(graph).items() if key not in graph}
        return found

    def encode(self, graph: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None, GraphIndex]:
        """What the first layer takes."""
        edges = None if self.edge_encoder is None else self.edge_encoder(graph)
        x, index = self.node_encoder(graph, index_graph(graph))
        return x, edges, index

    def nodes_forward(self, graph: Mapping[str, Tensor]) -> tuple[list[Tensor], GraphIndex]:
        """Node features `(N, dim)` after each layer."""
        x, edges, index = self.encode(graph)
        features = []
        for layer in self.layers:
            x, edges = layer(x, edges, index)
            features.append(x)
        return features, index

    def forward_features(self, graph: Mapping[str, Tensor]) -> Tensor:
        """Graph -> node features after the last layer, `(N, dim)`."""
        return self.nodes_forward(graph)[0][-1]

    def forward_intermediates(self, graph: Mapping[str, Tensor], indices: Sequence[int] | None = None) -> list[Tensor]:
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

    def forward(self, graph: Mapping[str, Tensor]) -> Tensor:
        """Graph -> logits `(B, num_classes)`; for nodes `(N, num_classes)`, for pairs `(P, num_classes)`, for sequences
        `(B, length, num_classes)`."""
        features, index = self.nodes_forward(graph)
        return self.head(features[-1], index)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the last linear layer by a fresh one."""
        self.head.reset(num_classes)


def index_graph(graph: Mapping[str, Tensor]) -> GraphIndex:
    """Check a graph at the door and find out which node belongs to which graph of the batch.

    Raises:
        ValueError: for missing or ill-shaped parts, or edges between graphs that do not exist.
    """
    for key in ("x", "edge_index"):
        if key not in graph:
            raise ValueError(f"graph must hold 'x' and 'edge_index', got the keys {sorted(graph)}.")
    edge_index, nodes, pairs = graph["edge_index"], len(graph["x"]), graph.get("pairs")
    _check_pairs("edge_index", edge_index, nodes)
    if pairs is not None:
        _check_pairs("pairs", pairs, nodes)
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
    return GraphIndex(edge_index, offsets, graph_of, pairs=pairs)


def _check_pairs(argument: str, pairs: Tensor, nodes: int) -> None:
    if pairs.dim() != 2 or pairs.shape[0] != 2 or pairs.dtype != torch.int64:
        raise ValueError(f"{argument} must be (2, E) int64, got {pairs.dtype} of shape {tuple(pairs.shape)}.")
    if pairs.numel() and not 0 <= int(pairs.min()) <= int(pairs.max()) < nodes:
        raise ValueError(
            f"{argument} must name nodes from 0 to {nodes - 1}, got {int(pairs.min())} to {int(pairs.max())}."
        )
