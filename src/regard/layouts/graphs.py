"""Encodings of nodes by the graph around them: walks, eigenvectors, heat, potentials, degrees and shortest paths.

Graphs come as `edge_index` (2, E) int64, source above target, an undirected edge in both directions; an edge that comes
twice counts twice, but for degrees and paths. The functions work on all pairs of nodes, so N is meant to be at most a few
thousand (a few hundred for shortest paths).
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
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}.")
    values, vectors = _eigenpairs(edge_index, num_nodes, normalization)
    missing = max(0, k - num_nodes)
    values = torch.nn.functional.pad(values[:k].clamp(min=0), (0, missing), value=float("nan"))
    vectors = torch.nn.functional.pad(vectors[:, :k], (0, missing), value=float("nan"))
    return vectors.float(), values.float()


def _eigenpairs(edge_index: Tensor, num_nodes: int, normalization: Normalization) -> tuple[Tensor, Tensor]:
    """All eigenvalues (N,), ascending, and eigenvectors (N, N), of length 1, in float64."""
    one_of("normalization", normalization, ("none", "sym", "rw"))
    a = adjacency(edge_index, num_nodes)
    if not torch.equal(a, a.T):
        raise ValueError("the Laplacian needs an undirected graph: edge_index must hold every edge both ways.")
    degree = a.sum(1)
    laplacian, scale = degree.diag() - a, torch.where(degree > 0, degree, 1.0).rsqrt()
    if normalization != "none":
        laplacian = scale[:, None] * laplacian * scale
    values, vectors = torch.linalg.eigh(laplacian)
    if normalization == "rw":  # D^-1/2 u is an eigenvector of I - D^-1 A where u is one of the symmetric form
        vectors = scale[:, None] * vectors
        vectors = vectors / vectors.norm(dim=0)
    return values, vectors


def heat_kernel_diagonal(edge_index: Tensor, num_nodes: int, times: Sequence[float]) -> Tensor:
    r"""How much more heat than its share a node has kept after each of some times: `diag(exp(-t L))` less its limit.

    $$h_i(t) = \sum_{\lambda_k > 10^{-8}} e^{-t \lambda_k} v_{ik}^2$$

    with the eigenpairs of L = D - A. The eigenvalues 0 are left out: what they stand for never goes away.

    Returns:
        (N, times) float32.

    Raises:
        ValueError: if an edge lacks its reverse.
    """
    if not len(times):
        raise ValueError("times must name at least one time, got none.")
    values, vectors = _eigenpairs(edge_index, num_nodes, "none")
    left = torch.exp(-torch.tensor(times, dtype=values.dtype, device=values.device)[:, None] * values)
    return (vectors.square() @ (left * (values >= 1e-8)).T).float()


def electrostatic_potentials(edge_index: Tensor, num_nodes: int) -> Tensor:
    """Ten statistics of the potentials between each node and all others (Kreuzer et al., 2021, arXiv 2106.03893).

    The potential at j of a charge at i is `P[i, j] - P[j, j]`, with P the pseudo-inverse of D - A. For node v come the
    smallest, largest and mean value and the standard deviation of column v, the same four of row v, and the mean over
    neighbours: `sum_i (D^-1 A)[i, v] p[i, v]` and `sum_j (D^-1 A)[v, j] p[v, j]`. A standard deviation over one node, and a
    mean over no neighbours, is 0.

    Departures from the release of GraphGPS: there nodes without edges give NaN, and P is taken in float32 with a cut-off
    below its rounding, so that it holds the inverse of a rounding error.

    Returns:
        (N, 10) float32.

    Raises:
        ValueError: if an edge lacks its reverse.
    """
    values, vectors = _eigenpairs(edge_index, num_nodes, "none")
    keep = values >= 1e-8
    inverse = (vectors * torch.where(keep, 1 / values.clamp(min=1e-8), 0.0)) @ vectors.T
    potential = inverse - inverse.diagonal()
    a = adjacency(edge_index, num_nodes).fill_diagonal_(0)
    near = potential * a / a.sum(1, keepdim=True).clamp(min=1)
    correction = min(1, num_nodes - 1)  # of one node: 0, not 0 / 0
    statistics = [
        statistic
        for axis in (0, 1)
        for statistic in (
            potential.amin(axis),
            potential.amax(axis),
            potential.mean(axis),
            potential.std(axis, correction=correction),
        )
    ]
    return torch.stack([*statistics, near.sum(0), near.sum(1)], 1).float()


def degrees(edge_index: Tensor, num_nodes: int) -> tuple[Tensor, Tensor]:
    """How many nodes have an edge to each node, and from each node: (N,) int64 twice."""
    joined = adjacency(edge_index, num_nodes) > 0
    return joined.sum(0), joined.sum(1)


def shortest_paths(
    edge_index: Tensor, num_nodes: int, limit: int, edge_types: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """How many edges the shortest path between each two nodes has, and of which types they are.

    Of several shortest paths it is the one that a breadth-first search finds first that follows edges in their order.

    Args:
        limit: longer paths are cut to their first `limit` - 1 edges.
        edge_types: (E,) integers, all 0 by default. Of edges that come twice the last has the say.

    Returns:
        distance (N * N,) int64, for source after source: the number of edges, at most `limit` - 1, or `limit` where there is
        no path; types (N * N, limit) int64, from the source on, 0 beyond the end of the path.

    Raises:
        ValueError: for a limit below 1, or edge types that are no integers (E,).
    """
    adjacency(edge_index, num_nodes)  # checks edge_index
    if limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}.")
    if edge_types is None:
        edge_types = torch.zeros_like(edge_index[0])
    if edge_types.shape != edge_index.shape[1:] or edge_types.is_floating_point():
        raise ValueError(
            f"edge_types must be {edge_index.shape[1]} integers, one for each edge, got {edge_types.dtype} of shape "
            f"{tuple(edge_types.shape)}."
        )
    near: list[dict[int, int]] = [{} for _ in range(num_nodes)]
    for source, target, kind in zip(*edge_index.tolist(), edge_types.tolist(), strict=True):
        near[source][target] = kind
    distance = torch.full((num_nodes, num_nodes), limit)
    types = torch.zeros(num_nodes, num_nodes, limit, dtype=torch.int64)
    for source in range(num_nodes):
        paths: dict[int, tuple[int, ...]] = {source: ()}
        queue = [source]
        for node in queue:
            for other, kind in near[node].items():
                if other not in paths:
                    paths[other] = paths[node] if len(paths[node]) == limit - 1 else (*paths[node], kind)
                    queue.append(other)
        for target, path in paths.items():
            distance[source, target] = len(path)
            types[source, target, : len(path)] = torch.tensor(path, dtype=torch.int64)
    device = edge_index.device
    return distance.flatten().to(device), types.flatten(0, 1).to(device)


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
