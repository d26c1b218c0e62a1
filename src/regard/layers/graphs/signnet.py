"""SignNet: encodings by eigenvectors that do not depend on their signs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import checks
from regard.layers.graphs.encodings import Graph, LaplacianEncoding
from regard.layers.graphs.index import GraphIndex, sum_at_targets
from regard.layers.norm import BatchNorm
from regard.layouts.graphs import Normalization


class SignNet(LaplacianEncoding):
    r"""Codes from eigenvectors of which neither v nor -v is the right one (Lim et al., 2023, arXiv 2202.13013).

    $$p = \rho\big(\phi(v_1) + \phi(-v_1), ..., \phi(v_k) + \phi(-v_k)\big)$$

    φ is a GIN of `layers` layers over the graph, alike for all eigenvectors and with one number at each node to begin with.
    ρ is an MLP on all `freqs` results of a node side by side ("mlp"), or on their sum ("deepset"), in which eigenvectors
    that a small graph lacks do not count; in "mlp" they are zeros that go through φ as others do.

    Args:
        dim: width of the code. freqs: number of eigenvectors. model: of ρ. layers, hidden_dim, out_dim: of φ.
        post_layers: of ρ. normalization: of the Laplacian.
    """

    def __init__(
        self,
        dim: int,
        freqs: int = 10,
        *,
        model: Literal["mlp", "deepset"] = "deepset",
        layers: int = 8,
        hidden_dim: int = 64,
        out_dim: int = 64,
        post_layers: int = 3,
        normalization: Normalization = "none",
    ) -> None:
        super().__init__()
        if layers < 2:
            raise ValueError(f"layers must be at least 2, got {layers}.")
        checks.positive("post_layers", post_layers)
        self.dim, self.freqs, self.normalization = dim, freqs, normalization
        self.model = checks.one_of("model", model, ("mlp", "deepset"))
        ends = [1, *[hidden_dim] * (layers - 1), out_dim]
        self.phi = _Phi([[a, hidden_dim, b] for a, b in zip(ends[:-1], ends[1:], strict=True)])
        width = out_dim * (freqs if model == "mlp" else 1)
        self.rho = _NormedMlp([width, *[hidden_dim] * (post_layers - 1), dim])

    def codes(self, graph: Graph, index: GraphIndex) -> Tensor:
        vectors = self.read(graph, "lap_vectors", self.freqs if self.model == "mlp" else None)
        each = vectors.nan_to_num(0.0).t().unsqueeze(-1)  # (k, N, 1)
        both = self.phi(each, index.edge_index) + self.phi(-each, index.edge_index)
        both = both.transpose(0, 1)  # (N, k, out_dim)
        if self.model == "mlp":
            return self.rho(both.flatten(1))
        return self.rho(torch.where(vectors.isnan().unsqueeze(-1), 0.0, both).sum(1))


class _NormedMlp(nn.Module):
    """linear, then BatchNorm(ReLU(x)) and linear again for every further layer."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.lins = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True))
        self.bns = nn.ModuleList(BatchNorm(width) for width in widths[1:-1])

    def forward(self, x: Tensor) -> Tensor:
        """`(..., widths[0])` -> `(..., widths[-1])`."""
        x = self.lins[0](x)
        for norm, linear in zip(self.bns, list(self.lins)[1:], strict=True):
            x = linear(norm(F.relu(x)))
        return x


class _Phi(nn.Module):
    """x <- mlp(x_i + sum of x_j), with a BatchNorm between layers; the same for each of k graphs with equal edges."""

    def __init__(self, widths: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_NormedMlp(part) for part in widths)
        self.bns = nn.ModuleList(BatchNorm(part[0]) for part in widths[1:])

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """`(k, N, 1)` -> `(k, N, out)`."""
        for norm, layer in zip([nn.Identity(), *self.bns], self.layers, strict=True):
            x = norm(x)
            x = layer(x + sum_at_targets(x.index_select(-2, edge_index[0]), edge_index, x.shape[-2]))
        return x
