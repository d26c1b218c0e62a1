"""Features of nodes and edges, and encodings of where a node is in its graph.

An encoding is a module `(graph, x, index) -> (x, index)`: it joins codes to the features of the nodes, adds to them, or
hands something about nodes or pairs of nodes on to the layers. What it reads it can also compute: `prepare`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from regard import checks
from regard.layers.graphs.index import GraphIndex
from regard.layers.norm import BatchNorm
from regard.layouts import graphs as layouts

Graph = Mapping[str, Tensor]


class Encoding(nn.Module):
    """What says where a node is.

    Attributes:
        joins: whether it joins `dim` channels to the features of each node. One that does not is built for the width that
            the features have.
    """

    joins: ClassVar[bool] = True
    dim: int = 0

    def prepare(self, graph: Graph) -> dict[str, Tensor]:
        """What `forward` reads of one graph, computed from its `x` and `edge_index`."""
        raise NotImplementedError

    def forward(self, graph: Graph, x: Tensor, index: GraphIndex) -> tuple[Tensor, GraphIndex]:
        """x `(N, C)` -> x `(N, C + dim)` and the index, either of them changed or not."""
        return torch.cat([x, self.codes(graph, index)], -1), index

    def codes(self, graph: Graph, index: GraphIndex) -> Tensor:
        """`(N, dim)`, for encodings that join codes to features."""
        raise NotImplementedError


def needed(graph: Graph, key: str, function: str | None = None, columns: int | None = None) -> Tensor:
    """`graph[key]`, or a ValueError that says where it comes from (or that it has not so many columns).

    Args:
        function: of `regard.layouts.graphs` that computes it; None for what belongs to the data.
    """
    if key not in graph:
        source = (
            f"prepare(graph) adds it, by regard.layouts.graphs.{function}" if function else "it is part of the data"
        )
        raise ValueError(f"graph lacks {key!r}, which this model reads: {source}.")
    if columns is not None and graph[key].shape[-1] != columns:
        raise ValueError(f"{key} must have {columns} columns, got shape {tuple(graph[key].shape)}.")
    return graph[key]


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


class DepthEncoding(Encoding):
    """Adds an embedding of `graph["depth"]`, the depth of each node in its tree; all beyond `most` share one.

    Depths are part of the data: `prepare` cannot find them from the edges.
    """

    joins = False

    def __init__(self, chans: int, most: int) -> None:
        super().__init__()
        self.most = most
        self.depth_encoder = nn.Embedding(most + 1, chans)

    def prepare(self, graph: Graph) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def forward(self, graph: Graph, x: Tensor, index: GraphIndex) -> tuple[Tensor, GraphIndex]:
        """x `(N, chans)` -> the same shape."""
        depth = needed(graph, "depth").view(-1)
        return x + self.depth_encoder(depth.clamp(max=self.most)), index


class _KernelEncoding(Encoding):
    """A linear map, or an MLP that is rectified after every layer, of `BatchNorm(graph[key])`."""

    key: str
    function: str

    def __init__(
        self,
        dim: int,
        columns: int,
        *,
        model: Literal["linear", "mlp"] = "linear",
        layers: int = 3,
        raw_norm: bool = True,
    ) -> None:
        super().__init__()
        self.dim, self.columns = dim, columns
        self.raw_norm = BatchNorm(columns) if raw_norm else nn.Identity()
        linear = checks.one_of("model", model, ("linear", "mlp")) == "linear"
        self.pe_encoder = nn.Linear(columns, dim) if linear else rectified([columns, *[2 * dim] * (layers - 1), dim])

    def codes(self, graph: Graph, index: GraphIndex) -> Tensor:
        return self.pe_encoder(self.raw_norm(needed(graph, self.key, self.function, self.columns)))


class RandomWalkEncoding(_KernelEncoding):
    """Random-walk structural encoding, RWSE: how likely a walk is back after 1, 2 .. steps (arXiv 2110.07875).

    Args:
        dim: width of the code. steps: columns of `graph["rwse"]`. options: model "linear" or "mlp", layers, raw_norm.
    """

    key, function = "rwse", "random_walk_landing"

    def __init__(self, dim: int, steps: int = 16, **options: Any) -> None:
        super().__init__(dim, steps, **options)

    def prepare(self, graph: Graph) -> dict[str, Tensor]:
        """`rwse` `(N, steps)`."""
        return {self.key: layouts.random_walk_landing(graph["edge_index"], len(graph["x"]), self.columns)}


class HeatKernelEncoding(_KernelEncoding):
    """Heat-kernel structural encoding, HKdiagSE: how much heat is left where it was after each of some times.

    Args:
        dim: width of the code. times: of diffusion, one column of `graph["heat"]` each. options: as in RWSE.
    """

    key, function = "heat", "heat_kernel_diagonal"

    def __init__(self, dim: int, times: Sequence[float] = tuple(range(1, 17)), **options: Any) -> None:
        super().__init__(dim, len(times), **options)
        self.times = tuple(times)

    def prepare(self, graph: Graph) -> dict[str, Tensor]:
        """`heat` `(N, times)`."""
        return {self.key: layouts.heat_kernel_diagonal(graph["edge_index"], len(graph["x"]), self.times)}


class ElectrostaticEncoding(_KernelEncoding):
    """Electrostatic structural encoding, ElstaticSE: ten statistics of the potentials between a node and all others.

    Args:
        dim: width of the code. options: as in RWSE.
    """

    key, function = "electrostatic", "electrostatic_potentials"

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__(dim, 10, **options)

    def prepare(self, graph: Graph) -> dict[str, Tensor]:
        """`electrostatic` `(N, 10)`."""
        return {self.key: layouts.electrostatic_potentials(graph["edge_index"], len(graph["x"]))}


class LaplacianEncoding(Encoding):
    """What reads `graph["lap_vectors"]` and `graph["lap_values"]`, both `(N, freqs)`; NaN where a graph has fewer.

    Several in one model read the same ones.

    Attributes:
        freqs: number of eigenpairs. normalization: of the Laplacian that `prepare` takes.
    """

    freqs: int
    normalization: layouts.Normalization = "none"

    def prepare(self, graph: Graph) -> dict[str, Tensor]:
        """`lap_vectors` and `lap_values`, `(N, freqs)`."""
        size = len(graph["x"])
        vectors, values = layouts.laplacian_eigenpairs(graph["edge_index"], size, self.freqs, self.normalization)
        return {"lap_vectors": vectors, "lap_values": values.expand(size, -1)}

    def read(self, graph: Graph, key: str, columns: int | None = None) -> Tensor:
        """`graph[key]`."""
        return needed(graph, key, "laplacian_eigenpairs", columns)


class LapPE(LaplacianEncoding):
    r"""Laplacian position encoding by a set function over frequencies (Kreuzer et al., 2021; SAN's with a DeepSet).

    $$p_i = \mathrm{post}\Big(\sum_k f(W_1 [v_{ik}, \lambda_k])\Big)$$

    f is rectified, linear, rectified ... with `layers` linear maps in all ("deepset"), or a Transformer over the
    frequencies of a node; post is an MLP, or nothing. A frequency that a small graph lacks adds nothing. In training each
    frequency gets a random sign, one for the whole batch, since eigenvectors have none of their own.

    Args:
        dim: width of the code. freqs, normalization: see `LaplacianEncoding`. layers: of f. num_heads: of the Transformer.
        post_layers: of post. raw_norm: BatchNorm of eigenvectors and eigenvalues, a frequency at a time.
    """

    def __init__(
        self,
        dim: int,
        freqs: int = 10,
        *,
        normalization: layouts.Normalization = "none",
        model: Literal["deepset", "transformer"] = "deepset",
        layers: int = 2,
        num_heads: int = 4,
        post_layers: int = 0,
        raw_norm: bool = False,
    ) -> None:
        super().__init__()
        self.dim, self.freqs, self.normalization = dim, freqs, normalization
        self.raw_norm = nn.BatchNorm1d(freqs) if raw_norm else None
        self.model = checks.one_of("model", model, ("deepset", "transformer"))
        if self.model == "transformer":
            self.linear_A = nn.Linear(2, dim)
            layer = nn.TransformerEncoderLayer(dim, num_heads, batch_first=True)
            self.pe_encoder: nn.Module = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        else:
            widths = [*[2 * dim] * (layers - 1), dim]
            self.linear_A = nn.Linear(2, widths[0])
            self.pe_encoder = nn.Sequential(nn.ReLU(), *rectified(widths))
        self.post_mlp = rectified([dim, *[2 * dim] * (post_layers - 1), dim]) if post_layers else None

    def codes(self, graph: Graph, index: GraphIndex) -> Tensor:
        columns = None if self.raw_norm is None else self.freqs
        vectors, values = self.read(graph, "lap_vectors", columns), self.read(graph, "lap_values", columns)
        if self.training:
            vectors = vectors * torch.where(torch.rand(vectors.shape[1], device=vectors.device) < 0.5, -1.0, 1.0)
        missing = vectors.isnan()
        pairs = torch.stack([vectors, values], -1).nan_to_num(0.0)
        pairs = self.linear_A(pairs if self.raw_norm is None else self.raw_norm(pairs))
        if self.model == "transformer":
            codes = self.pe_encoder(pairs, src_key_padding_mask=missing)
        else:
            codes = self.pe_encoder(pairs)
        codes = torch.where(missing.unsqueeze(-1), 0.0, codes).sum(-2)
        return codes if self.post_mlp is None else self.post_mlp(codes)


class StableLapPE(LaplacianEncoding):
    """EquivStable LapPE: position codes for `DistanceGate`, a linear map of the eigenvectors (Wang et al., 2022).

    Args:
        chans: width of the codes. freqs, normalization: see `LaplacianEncoding`. raw_norm: BatchNorm of the eigenvectors.
    """

    joins = False

    def __init__(
        self,
        chans: int,
        freqs: int = 10,
        *,
        normalization: layouts.Normalization = "sym",
        raw_norm: bool = False,
    ) -> None:
        super().__init__()
        self.freqs, self.normalization = freqs, normalization
        self.raw_norm = BatchNorm(freqs) if raw_norm else nn.Identity()
        self.linear_encoder_eigenvec = nn.Linear(freqs, chans)

    def forward(self, graph: Graph, x: Tensor, index: GraphIndex) -> tuple[Tensor, GraphIndex]:
        """x as it is, and the index with `position` `(N, chans)`."""
        vectors = self.read(graph, "lap_vectors", self.freqs).nan_to_num(0.0)
        return x, index._replace(position=self.linear_encoder_eigenvec(self.raw_norm(vectors)))


def rectified(widths: Sequence[int]) -> nn.Sequential:
    """Linear maps between these widths, each followed by a ReLU."""
    pairs = zip(widths[:-1], widths[1:], strict=True)
    return nn.Sequential(*(module for a, b in pairs for module in (nn.Linear(a, b), nn.ReLU())))
