"""Points and voxels: which cell a point lies in, orders along which cells are laid out, groups of equal size, and back.

A batch is ragged: rows of all samples stand one after the other, `counts` says how many rows each sample has. Cells have
integer coordinates `(N, axes)` with the axes in the order of a grid `(*S)`: (y, x) for pillars, (z, y, x) for voxels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Cells(NamedTuple):
    """The occupied cells of a batch of point clouds.

    Attributes:
        coordinates: `(M, 3)` int64 (z, y, x), sample by sample, ascending within a sample.
        counts: cells of each sample.
        points: `(P,)` rows of the points that lie in the range.
        cell_of: `(P,)` the cell of each of them.
    """

    coordinates: Tensor
    counts: list[int]
    points: Tensor
    cell_of: Tensor


def voxelize(points: Tensor, offsets: Tensor, voxel_size: Sequence[float], point_range: Sequence[float]) -> Cells:
    """Find the cell of every point.

    Args:
        points: `(N, 3 or more)`, x y z first. offsets: `(B + 1,)`, sample b has the rows `offsets[b]:offsets[b + 1]`.
        voxel_size: along x, y, z. point_range: x, y, z lowest, then x, y, z highest; points outside are left out.
    """
    low, high = points.new_tensor(point_range[:3]), points.new_tensor(point_range[3:])
    size = points.new_tensor(voxel_size)
    place = ((points[:, :3].detach() - low) / size).floor().long()
    nx, ny, nz = grid_size(voxel_size, point_range)
    inside = ((place >= 0) & (place < place.new_tensor([nx, ny, nz]))).all(1) & (points[:, :3] < high).all(1)
    kept = inside.nonzero().squeeze(1)
    sample = torch.bucketize(kept, offsets[1:].to(kept.device), right=True)
    x, y, z = place[kept].unbind(1)
    keys, cell_of = torch.unique(((sample * nz + z) * ny + y) * nx + x, return_inverse=True)
    coordinates = torch.stack([keys // (nx * ny) % nz, keys // nx % ny, keys % nx], 1)
    counts = torch.bincount(keys // (nx * ny * nz), minlength=len(offsets) - 1).tolist()
    return Cells(coordinates, counts, kept, cell_of)


def grid_size(voxel_size: Sequence[float], point_range: Sequence[float]) -> tuple[int, int, int]:
    """Number of cells along x, y, z."""
    nx, ny, nz = (round((point_range[3 + axis] - point_range[axis]) / voxel_size[axis]) for axis in range(3))
    return nx, ny, nz


def sample_of(counts: Sequence[int], device: torch.device | None = None) -> Tensor:
    """The sample of each row: `(sum(counts),)` int64."""
    rows = [torch.full((count,), sample, device=device) for sample, count in enumerate(counts)]
    return torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64, device=device)


def to_grid(x: Tensor, coordinates: Tensor, counts: Sequence[int], spatial: Sequence[int]) -> Tensor:
    """Rows `(N, C)` at their cells of a grid of zeros: `(B, *spatial, C)`."""
    flat = sample_of(counts, x.device)
    for axis, size in enumerate(spatial):
        flat = flat * size + coordinates[:, axis]
    length = len(counts)
    for size in spatial:
        length *= size
    return x.new_zeros(length, x.shape[-1]).index_copy(0, flat, x).view(len(counts), *spatial, x.shape[-1])


def grid_coordinates(spatial: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Coordinates of all cells of a grid in row-major order: `(prod(spatial), axes)` int64."""
    axes = [torch.arange(size, device=device) for size in spatial]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)


def flattened_windows(
    coordinates: Tensor, counts: Sequence[int], window_size: Sequence[int], *, axis: int = -1, shift: bool = False
) -> Tensor:
    """Order the cells of each sample by window, then inside the window, both along a snake (FlatFormer, section 3.2).

    Windows follow each other along `axis`, row after row; inside a window the cells are read across: `axis` is the
    outer one there. Every second row is read backwards, so that neighbours in the order are mostly neighbours in space.
    In two dimensions with axis x and windows (x1, y1), cells (x2, y2) inside them, the order is by y1, then ±x1, then
    ±x2 with the sign (-1)^y1, then ±y2 with the sign (-1)^(y1 + x2).

    Args:
        window_size: along each axis. axis: the one along which windows follow each other. shift: move the windows by
            half a window along every axis.

    Returns:
        `(N,)` int64: the rows in their new order; samples stay where they are.
    """
    axes = len(window_size)
    order = [other for other in range(axes) if other != axis % axes] + [axis % axes]
    moved = [coordinates[:, a] + (window_size[a] // 2 if shift else 0) for a in range(axes)]
    windows = [moved[a] // window_size[a] for a in order]
    cells = [moved[a] % window_size[a] for a in order[::-1]]
    key = sample_of(counts, coordinates.device)
    backwards = torch.zeros_like(key)
    for window in windows[:-1]:
        key, backwards = _digit(key, window, backwards), backwards + window
    key = _digit(key, windows[-1], backwards)
    for cell in cells:
        key, backwards = _digit(key, cell, backwards), backwards + cell
    return key.argsort(stable=True)


def _digit(key: Tensor, digit: Tensor, backwards: Tensor) -> Tensor:
    """Append a digit to a sort key, counted from its highest value down where `backwards` is odd."""
    most = digit.amax() if len(digit) else 0
    return key * (most + 1) + torch.where(backwards % 2 == 1, most - digit, digit)


class EqualGroups(NamedTuple):
    """Rows of a batch in groups of one size, samples apart.

    Attributes:
        rows: `(groups, size)` the row in each slot. home: `(N,)` the slot (of the flattened groups) that each row owns.
    """

    rows: Tensor
    home: Tensor

    def scatter(self, slots: Tensor) -> Tensor:
        """`(groups, size, ...)` -> `(N, ...)`: what each row's own slot holds."""
        return slots.flatten(0, 1)[self.home]


def equal_groups(order: Tensor, counts: Sequence[int], size: int) -> EqualGroups:
    """Cut an order of rows into groups of `size`; the last group of a sample is filled with rows of the one before.

    A slot beyond the end of a sample repeats the slot `size` earlier (FlatFormer); in a sample of fewer than `size` rows
    it repeats the sample's own rows from its start.

    Args:
        order: `(N,)` rows, sample by sample, as `flattened_windows` gives them.
    """
    slots, homes, start, end = [], [], 0, 0
    for count in counts:
        length = -(-count // size) * size
        slot = torch.arange(length, device=order.device)
        place = torch.where(slot < count, slot, slot - size) if count >= size else slot % max(count, 1)
        slots.append(order[start : start + count][place])
        homes.append(torch.arange(end, end + count, device=order.device))
        start, end = start + count, end + length
    if not slots:
        return EqualGroups(order.new_zeros(0, size), order.new_zeros(0))
    return EqualGroups(torch.cat(slots).view(-1, size), torch.empty_like(order).index_copy(0, order, torch.cat(homes)))


def morton_key(coordinates: Tensor, bits: int) -> Tensor:
    """Place of each cell `(N, axes)` along the Z-order curve: the bits of its coordinates, interleaved, first axis highest.

    Args:
        bits: of each coordinate; `axes * bits` must be at most 62.
    """
    axes = coordinates.shape[1]
    if axes * bits > 62:
        raise ValueError(f"axes * bits must be at most 62 to fit an integer, got {axes} * {bits}.")
    key = torch.zeros_like(coordinates[:, 0])
    for bit in reversed(range(bits)):
        for axis in range(axes):
            key = key * 2 + (coordinates[:, axis] >> bit & 1)
    return key


def hilbert_key(coordinates: Tensor, bits: int) -> Tensor:
    """Place of each cell `(N, axes)` along the Hilbert curve: neighbours on the curve are neighbours in space.

    Skilling, "Programming the Hilbert curve" (2004).

    Args:
        bits: of each coordinate; `axes * bits` must be at most 62.
    """
    x = list(coordinates.unbind(1))
    axes = len(x)
    for bit in reversed(range(1, bits)):
        mask = (1 << bit) - 1
        for axis in range(axes):
            is_set = (x[axis] >> bit & 1) == 1
            swap = torch.where(is_set, 0, (x[0] ^ x[axis]) & mask)
            x[0] = torch.where(is_set, x[0] ^ mask, x[0] ^ swap)
            if axis:
                x[axis] = x[axis] ^ swap
    for axis in range(1, axes):
        x[axis] = x[axis] ^ x[axis - 1]
    turn = torch.zeros_like(x[0])
    for bit in reversed(range(1, bits)):
        turn = torch.where((x[-1] >> bit & 1) == 1, turn ^ ((1 << bit) - 1), turn)
    return morton_key(torch.stack([part ^ turn for part in x], 1), bits)


def mean_of(x: Tensor, group_of: Tensor, groups: int) -> Tensor:
    """Mean of the rows `(N, C)` of each group: `(groups, C)`."""
    total = x.new_zeros(groups, x.shape[-1]).index_add(0, group_of, x)
    return total / torch.bincount(group_of, minlength=groups).clamp(min=1).unsqueeze(-1)


def max_of(x: Tensor, group_of: Tensor, groups: int) -> Tensor:
    """Maximum of the rows `(N, C)` of each group: `(groups, C)`, 0 for a group without rows."""
    index = group_of.unsqueeze(-1).expand_as(x)
    return x.new_zeros(groups, x.shape[-1]).scatter_reduce(0, index, x, "amax", include_self=False)
