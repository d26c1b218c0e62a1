"""Graphormer's encodings: degrees of nodes, and a bias of the attention for every pair of nodes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regard.layers.graphs.encodings import Encoding, Graph, needed
from regard.layers.graphs.index import GraphIndex, with_token
from regard.layouts.graphs import degrees, shortest_paths


class GraphormerEncoding(Encoding):
    r"""Centrality, spatial and edge encoding of Graphormer (Ying et al., 2021, arXiv 2106.05234), as GraphGPS has them.

    $$x_i \mathrel{+}= z^-_{\mathrm{in}(i)} + z^+_{\mathrm{out}(i)},\quad
      b_{ij} = s_{d(i,j)} + \frac{1}{\max(d(i,j), 1)} \sum_{n < d(i,j)} W_n\, t_{e_n(i,j)}$$

    d is the number of edges on the shortest path from i to j and e_n the type of its n-th edge. Pairs further apart than
    `distances` - 1 share one s and count the first `distances` - 1 edges of their path; pairs without a path have an s of
    their own. b goes to the layers in `GraphIndex.bias`, one number a head.

    Args:
        chans: width of the nodes' features. num_heads: of the layers' attention. edge_types: number of edge types.
        in_degrees, out_degrees: sizes of the two tables of degrees.
        token: put a node in front of each graph that all others see and that sees all others, with features and bias of
            its own.
        drop: of the features. authors_quirks: as the released code does, fill all paths up to `distances` edges of type 0
            that count as others do; and with `token` leave `edge_index` as it was, so that every edge joins nodes that
            stand some places before those it means. (It also sorts nodes in a way that may change their order in batches
            of more than 16; this does not.)
    """

    joins = False

    def __init__(
        self,
        chans: int,
        num_heads: int,
        edge_types: int,
        *,
        distances: int = 20,
        in_degrees: int = 64,
        out_degrees: int = 64,
        token: bool = False,
        drop: float = 0.0,
        authors_quirks: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(edge_types, int):
            raise ValueError(f"edge_types must be one number, for edges of one column of types, got {edge_types!r}.")
        self.distances, self.num_heads, self.authors_quirks = distances, num_heads, authors_quirks
        self.spatial_encoder = nn.Embedding(distances + 1, num_heads)
        self.edge_encoder = nn.Embedding(edge_types, num_heads)
        self.edge_dis_encoder = nn.Embedding(distances * num_heads**2, 1)  # the matrices W, one after the other
        self.in_degree_encoder = nn.Embedding(in_degrees, chans)
        self.out_degree_encoder = nn.Embedding(out_degrees, chans)
        self.token = nn.Parameter(torch.empty(1, chans)) if token else None
        self.token_bias = nn.Parameter(torch.empty(1, num_heads, 1)) if token else None
        self.drop = nn.Dropout(drop)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)

    def prepare(self, graph: Graph) -> dict[str, Tensor]:
        """`in_degree`, `out_degree` `(N,)`, `distance` `(N²,)` and `path_types` `(N², distances)`."""
        nodes = len(graph["x"])
        incoming, outgoing = degrees(graph["edge_index"], nodes)
        distance, types = shortest_paths(graph["edge_index"], nodes, self.distances, graph.get("edge_attr"))
        return {"in_degree": incoming, "out_degree": outgoing, "distance": distance, "path_types": types}

    def forward(self, graph: Graph, x: Tensor, index: GraphIndex) -> tuple[Tensor, GraphIndex]:
        """x `(N, chans)` -> x `(N, chans)`, or `(N + B, chans)` with tokens, and the index with the bias."""
        for key, table in (("in_degree", self.in_degree_encoder), ("out_degree", self.out_degree_encoder)):
            degree = needed(graph, key, "degrees")
            if len(degree) and int(degree.max()) >= table.num_embeddings:
                raise ValueError(
                    f"{key} reaches {int(degree.max())}, and the table has {table.num_embeddings} rows: build the model "
                    f"with {key}s={int(degree.max()) + 1} or more."
                )
            x = x + table(degree)
        index = index._replace(bias=self._bias(graph, index))
        if self.token is not None:
            edge_index = index.edge_index
            x, index = with_token(x, index, self.token.flatten(), self.token_bias.flatten())
            index = index._replace(edge_index=edge_index) if self.authors_quirks else index
        return self.drop(x), index

    def _bias(self, graph: Graph, index: GraphIndex) -> Tensor:
        """`(P, heads)`."""
        distance = needed(graph, "distance", "shortest_paths")
        types = needed(graph, "path_types", "shortest_paths", self.distances)
        pairs = int(index.offsets.diff().square().sum())
        if distance.shape != (pairs,) or len(types) != pairs:
            raise ValueError(
                f"distance and path_types must have a row for each of the {pairs} pairs of nodes, got "
                f"{tuple(distance.shape)} and {tuple(types.shape)}."
            )
        hop = torch.arange(self.distances, device=types.device)
        # What it adds to go over an edge of type t as the n-th is a row of a small table.
        matrices = self.edge_dis_encoder.weight.view(self.distances, self.num_heads, self.num_heads)
        costs = self.edge_encoder.weight @ matrices  # (distances, types, heads)
        along = costs[hop, types]
        if not self.authors_quirks:
            on_path = (hop < distance[:, None]) & (distance[:, None] < self.distances)
            along = along * on_path.unsqueeze(-1)
        return self.spatial_encoder(distance) + along.sum(1) / distance.clamp(min=1).unsqueeze(-1)
