"""How much faster than dense attention can a kernel on a neighborhood pattern be? Counted, not measured.

NATTENSim of Generalized Neighborhood Attention (arXiv 2504.16922, section 3.2), rebuilt from the paper's description and
the kernels' walk: the authors have not released theirs. A kernel's time is taken to be the number of key tiles that its
query tiles visit; what it spends on launching, on permuting tokens and on masks is left out, so this bounds the speedup.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from regard import checks
from regard.layouts.neighborhoods import axis_windows
from regard.layouts.tiles import Axis, Visits, axis_visits, best_tiles

Layout = Literal["tiled", "flat"]
Walk = Literal["static", "dynamic"]


@dataclass(frozen=True)
class Simulation:
    """What `simulate` counted.

    Attributes:
        axes: the pattern. q_tile, kv_tile, layout, walk: as asked for.
        q_tiles, kv_tiles: tiles of dense attention.
        visits: key tiles visited, over all query tiles. masked_visits: those of which some query does not see some key.
        pairs: pairs of query and key inside windows.
    """

    axes: tuple[Axis, ...]
    q_tile: tuple[int, ...]
    kv_tile: tuple[int, ...]
    layout: Layout
    walk: Walk
    q_tiles: int
    kv_tiles: int
    visits: int
    masked_visits: int
    pairs: int

    @property
    def bound(self) -> float:
        """Upper bound of the speedup over dense attention with the same tiles: tiles it visits over tiles visited."""
        return self.q_tiles * self.kv_tiles / self.visits

    @property
    def flop_bound(self) -> float:
        """prod(length) / prod(kernel): dense attention's multiply-adds over the pattern's."""
        return math.prod(axis.length for axis in self.axes) / math.prod(axis.kernel for axis in self.axes)

    @property
    def block_sparse(self) -> bool:
        """Perfectly block-sparse: every visited tile is needed whole, nothing is masked."""
        return self.masked_visits == 0

    @property
    def useful(self) -> float:
        """Share of the products in visited tiles that belong to a window."""
        return self.pairs / (self.visits * math.prod(self.q_tile) * math.prod(self.kv_tile))

    def summary(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "input_size": [axis.length for axis in self.axes],
            "kernel_size": [axis.kernel for axis in self.axes],
            "stride": [axis.stride for axis in self.axes],
            "dilation": [axis.dilation for axis in self.axes],
            "causal": [axis.causal for axis in self.axes],
            "q_tile": list(self.q_tile),
            "kv_tile": list(self.kv_tile),
            "layout": self.layout,
            "walk": self.walk,
            "q_tiles": self.q_tiles,
            "kv_tiles": self.kv_tiles,
            "visits": self.visits,
            "masked_visits": self.masked_visits,
            "useful": self.useful,
            "flop_bound": self.flop_bound,
            "bound": self.bound,
            "block_sparse": self.block_sparse,
        }


def simulate(
    input_size: int | Sequence[int],
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    q_tile: int | Sequence[int] | None = None,
    kv_tile: int | Sequence[int] | None = None,
    layout: Layout = "tiled",
    walk: Walk = "static",
) -> Simulation:
    r"""Count the key tiles that a kernel visits, and bound its speedup over dense attention.

    Along an axis in ranks of a dilation group, a query tile whose windows reach from `start` to `end` visits

    $$\lceil \mathrm{end} / T \rceil - \lfloor \mathrm{start} / T \rfloor \ \text{(static)},\qquad
      \lceil (\mathrm{end} - \mathrm{start}) / T \rceil \ \text{(dynamic)}$$

    key tiles of T tokens. Over the axes visits multiply; the bound is the number of pairs of tiles over the visits.

    Args:
        input_size: tokens along each of 1, 2 or 3 axes. kernel_size, stride, dilation, causal: the pattern, as in
            `ops.neighborhood_attention`.
        q_tile, kv_tile: tokens in a tile along each axis, or in all where the layout is flat; by default the legal shapes
            of FNA that multiply the fewest numbers.
        layout: "tiled": tiles are boxes. "flat": tiles are runs of the row-major sequence (of each dilation group), as
            if the kernel knew one axis only; a key tile is visited if any query of the tile sees any key of it.
        walk: "static": key tiles start at multiples of their size (kernels for Hopper and Blackwell, on permuted
            tokens). "dynamic": at the first key that is needed (FNA's kernels for Ampere; tiled layout only).

    Raises:
        ValueError: for a pattern that does not fit into the input, or tiles that do not fit the layout.
    """
    sizes = (input_size,) if isinstance(input_size, int) else tuple(input_size)
    checks.one_of("number of axes in input_size", str(len(sizes)), ("1", "2", "3"))
    sizes = checks.tuple_of("input_size", sizes, len(sizes))
    axes = tuple(
        Axis(*axis)
        for axis in zip(
            sizes,
            checks.tuple_of("kernel_size", kernel_size, len(sizes)),
            checks.tuple_of("stride", stride, len(sizes)),
            checks.tuple_of("dilation", dilation, len(sizes)),
            checks.tuple_of_bools("causal", causal, len(sizes)),
            strict=True,
        )
    )
    for axis in axes:
        if axis.kernel * axis.dilation > axis.length or axis.stride > axis.kernel:
            raise ValueError(
                f"kernel_size * dilation must fit into input_size and stride into kernel_size, got kernel_size="
                f"{axis.kernel}, dilation={axis.dilation}, stride={axis.stride} on an axis of {axis.length}."
            )
    checks.one_of("layout", layout, ("tiled", "flat"))
    checks.one_of("walk", walk, ("static", "dynamic"))
    if layout == "flat" and walk == "dynamic":
        raise ValueError("walk='dynamic' needs layout='tiled': in the flat layout key tiles are static.")
    best = best_tiles(axes, walk == "static") if layout == "tiled" else ((128,), (128,))
    count = 1 if layout == "flat" else len(axes)
    queries, keys = (
        default if tile is None else checks.tuple_of(name, tile, count)
        for name, tile, default in (("q_tile", q_tile, best[0]), ("kv_tile", kv_tile, best[1]))
    )
    if layout == "tiled":
        dense = [
            math.prod(-(-axis.length // side) for axis, side in zip(axes, tile, strict=True))
            for tile in (queries, keys)
        ]
        counted = _tiled(axes, queries, keys, walk == "static")
    else:
        dense = [-(-math.prod(sizes) // tile[0]) for tile in (queries, keys)]
        counted = _flat(axes, queries[0], keys[0])
    (q_tiles, kv_tiles), (visits, masked) = dense, counted
    return Simulation(axes, queries, keys, layout, walk, q_tiles, kv_tiles, visits, masked, _pairs(axes))


def smallest_block_sparse_stride(simulation: Simulation) -> tuple[int, ...] | None:
    """The smallest stride along each axis with which the same pattern and tiles are perfectly block-sparse, if any.

    In the tiled layout the axes do not depend on each other, so each is searched by itself.

    Raises:
        ValueError: for the flat layout of several axes.
    """
    if simulation.layout == "flat" and len(simulation.axes) > 1:
        raise ValueError(
            "in the flat layout of several axes strides cannot be searched axis by axis; use layout='tiled'."
        )
    found = []
    aligned = simulation.walk == "static"
    for axis, q_tile, kv_tile in zip(simulation.axes, simulation.q_tile, simulation.kv_tile, strict=True):
        for stride in range(1, axis.kernel + 1):
            total, whole = _along(axis_visits(axis._replace(stride=stride), q_tile, kv_tile, aligned), kv_tile)
            if total == whole:
                found.append(stride)
                break
        else:
            return None
    return tuple(found)


def _pairs(axes: Sequence[Axis]) -> int:
    total = 1
    for axis in axes:
        ranges = [_ranges(axis, group) for group in range(axis.dilation)]
        total *= sum(int((end - start).sum()) for start, end in ranges)
    return total


def _ranges(axis: Axis, group: int) -> tuple[np.ndarray, np.ndarray]:
    size = len(range(group, axis.length, axis.dilation))
    return axis_windows(size, axis.kernel, axis.stride, axis.causal)


def _tiled(axes: Sequence[Axis], q_tile: Sequence[int], kv_tile: Sequence[int], aligned: bool) -> tuple[int, int]:
    """Visits, and those that need a mask: a visited box is whole if it is whole along every axis."""
    total, whole = 1, 1
    for axis, queries, keys in zip(axes, q_tile, kv_tile, strict=True):
        visits, unmasked = _along(axis_visits(axis, queries, keys, aligned), keys)
        total, whole = total * visits, whole * unmasked
    return total, total - whole


def _along(seen: Visits, kv_tile: int) -> tuple[int, int]:
    """Visits along one axis, and how many of them every query of the tile sees whole."""
    # Whole key tiles lie between the last start and the first end of the tile's windows.
    begin = -(-(seen.start.max(1) - seen.first) // kv_tile)
    stop = (seen.end.min(1) - seen.first) // kv_tile
    return int(seen.steps.sum()), int(np.maximum(stop - begin, 0).sum())


def _flat(axes: Sequence[Axis], q_tile: int, kv_tile: int) -> tuple[int, int]:
    """Visits in row-major order, and those that need a mask, over all dilation groups."""
    visits, masked, known = 0, 0, {}
    for groups in itertools.product(*(range(axis.dilation) for axis in axes)):
        sizes = tuple(len(range(group, axis.length, axis.dilation)) for group, axis in zip(groups, axes, strict=True))
        if sizes not in known:
            windows = [_ranges(axis, group) for group, axis in zip(groups, axes, strict=True)]
            known[sizes] = _flat_group(sizes, windows, q_tile, kv_tile)
        visits, masked = visits + known[sizes][0], masked + known[sizes][1]
    return visits, masked


def _flat_group(
    sizes: tuple[int, ...], windows: Sequence[tuple[np.ndarray, np.ndarray]], q_tile: int, kv_tile: int
) -> tuple[int, int]:
    tokens = math.prod(sizes)
    tiles = -(-tokens // kv_tile)
    visits = masked = 0
    for first in range(0, tokens, q_tile):
        places = np.unravel_index(np.arange(first, min(first + q_tile, tokens)), sizes)
        bounds = [side[place] for (start, end), place in zip(windows, places, strict=True) for side in (start, end)]
        different, queries = np.unique(np.stack(bounds), axis=1, return_counts=True)
        # Runs of keys that neighbour each other in the sequence, and how many queries see each.
        row, many = np.zeros((len(queries), 1), np.int64), queries[:, None]
        for low, high, size in zip(different[:-2:2], different[1:-2:2], sizes[:-1], strict=True):
            place = low[:, None] + np.arange((high - low).max())
            row = (row[:, :, None] * size + place[:, None]).reshape(len(queries), -1)
            many = (many[:, :, None] * (place < high[:, None])[:, None]).reshape(len(queries), -1)
        begin, stop = (row * sizes[-1] + side[:, None] for side in different[-2:])
        seen = _below(stop, many, tiles, kv_tile) - _below(begin, many, tiles, kv_tile)  # pairs of query and key
        visits += int((seen > 0).sum())
        masked += int(((seen > 0) & (seen < len(places[0]) * kv_tile)).sum())
    return visits, masked


def _below(points: np.ndarray, many: np.ndarray, tiles: int, kv_tile: int) -> np.ndarray:
    """How many places of each tile lie before each point, summed over the points `many` times."""
    tile, rest = np.divmod(points.ravel(), kv_tile)
    counts = np.bincount(tile, many.ravel(), tiles + 1)
    inside = np.bincount(tile, (many * rest.reshape(many.shape)).ravel(), tiles + 1)
    after = counts.sum() - counts.cumsum()
    return (after * kv_tile + inside)[:tiles].round().astype(np.int64)
