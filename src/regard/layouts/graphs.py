"""Encodings of nodes by the graph around them: random walks that return, and eigenvectors of the Laplacian.

Graphs come as `edge_index` (2, E) int64, source above target, an undirected edge in both directions; an edge that comes
twice counts twice. Both functions work on a dense (N, N) matrix, so N is meant to be at most a few thousand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from regard.checks import one_of

Normalization = Literal["none", "sym", "rw"]


def adjacency(edge_index: Tensor, num_nodes: int) -> Tensor:
    """(N, N) float64 matrix: how many edges go from each node (row) to each node (column).

    Raises:
        ValueError: if `edge_index` is not (2, E) integers between 0 and `num_nodes` - 1.
    """
    if edge_index.dim() != 2 or edge_index.shape[0] != 2 or edge_index.dtype != torch.int64:
        raise ValueError(f"edge_index must be (2, E) int64, got {edge_index.dtype} of shape {tuple(edge_index.shape)}.")
    if edge_index.numel() and not 0 <= int(edge_index.min()) <= int(edge_index.max()) < num_nodes:
        raise ValueError(
            f"edge_index must name nodes from 0 to num_nodes - 1 = {num_nodes - 1}, got nodes from "
            f"{int(edge_index.min())} to {int(edge_index.max())}."
        )
    matrix = torch.zeros(num_nodes, num_nodes, dtype=torch.float64, device=edge_index.device)
    ones = torch.ones(edge_index.shape[1], dtype=torch.float64, device=edge_index.device)
    return matrix.index_put_((edge_index[0], edge_index[1]), ones, accumulate=True)


def random_walk_landing(edge_index: Tensor, num_nodes: int, steps: int) -> Tensor:
    """How likely a random walk is back where it started after 1 .. `steps` steps: `diag((D^-1 A)^t)`.

    Edges are followed from source to target as given. A node without outgoing edges ends the walk.

    Returns:
        (N, steps) float32.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}.")
    a = adjacency(edge_index, num_nodes)
    walk = a / a.sum(1, keepdim=True).clamp(min=1)
    power, landing = walk, [walk.diagonal()]
    for _ in range(steps - 1):
        power = power @ walk
        landing.append(power.diagonal())
    return torch.stack(landing, dim=1).float()


def laplacian_eigenpairs(
    edge_index: Tensor, num_nodes: int, k: int, normalization: Normalization = "sym"
) -> tuple[Tensor, Tensor]:
    """The `k` smallest eigenvalues of the graph Laplacian and their eigenvectors, of length 1.

    The Laplacian is `D - A` ("none"), `I - D^-1/2 A D^-1/2` ("sym") or `I - D^-1 A` ("rw"); a node without edges has
    a row of zeros. Signs, and bases where eigenvalues repeat, are arbitrary: training should not lean on them. A graph
    with fewer than `k` nodes has NaN in the columns that it cannot fill.

    Returns:
        vectors (N, k) and values (k,), ascending, both float32.

    Raises:
        ValueError: if an edge lacks its reverse, for then the eigenvalues need not be real.
    """
    one_of("normalization", normalization, ("none", "sym", "rw"))
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}.")
    a = adjacency(edge_index, num_nodes)
    if not torch.equal(a, a.T):
        raise ValueError("laplacian_eigenpairs needs an undirected graph: edge_index must hold every edge both ways.")
    degree = a.sum(1)
    laplacian, scale = degree.diag() - a, torch.where(degree > 0, degree, 1.0).rsqrt()
    if normalization != "none":
        laplacian = scale[:, None] * laplacian * scale
    values, vectors = torch.linalg.eigh(laplacian)
    if normalization == "rw":  # D^-1/2 u is an eigenvector of I - D^-1 A where u is one of the symmetric form
        vectors = scale[:, None] * vectors
        vectors = vectors / vectors.norm(dim=0)
    missing = max(0, k - num_nodes)
    values = torch.nn.functional.pad(values[:k].clamp(min=0), (0, missing), value=float("nan"))
    vectors = torch.nn.functional.pad(vectors[:, :k], (0, missing), value=float("nan"))
    return vectors.float(), values.float()


def grid_edges(spatial: Sequence[int], device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """The graph of a grid: every position joined to its two neighbours along each axis.

    Args:
        spatial: sizes of the axes; positions are numbered in row-major order.

    Returns:
        edge_index (2, E) and the kind of each edge (E,): 2 axis for steps forward along an axis, 2 axis + 1 for steps
        back.
    """
    place = torch.arange(math.prod(spatial), device=device).view(*spatial)
    edges, kinds = [], []
    for axis, size in enumerate(spatial):
        near, far = place.narrow(axis, 0, size - 1).flatten(), place.narrow(axis, 1, size - 1).flatten()
        edges += [torch.stack([near, far]), torch.stack([far, near])]
        kinds += [torch.full_like(near, 2 * axis), torch.full_like(near, 2 * axis + 1)]
    return torch.cat(edges, 1), torch.cat(kinds)
