"""How the tiles of attention are dealt out to the workers of a machine: stream-K, fixed splits, and what each one costs.

A tile is one block of keys (and values) for one block of queries of one head. The tiles of an output (a block of
queries) have to be reduced into one. A worker is a thread block on a GPU; `units` are the multiprocessors it has.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple

from regard import checks


def ceil_div(a: int, b: int) -> int:
    """The quotient of whole numbers, rounded up."""
    return -(-a // b)


class Piece(NamedTuple):
    """What one worker computes of one output: tiles `first` to `first + tiles - 1` of it."""

    worker: int
    output: int
    first: int
    tiles: int


@dataclass(frozen=True)
class StreamK:
    """One list of all tiles, cut into ranges of almost equal length wherever outputs begin and end.

    The first `full` workers take `makespan` tiles each, the others one fewer.

    Args:
        tiles: of each output, in the order of the list; an output may have none.
        workers: number of ranges, at most the number of tiles (and at least 1).

    Example:
        >>> schedule = StreamK(tiles=(4, 4, 4), workers=2)
        >>> schedule.makespan, schedule.occupancy
        (6, 1.0)
        >>> [tuple(piece) for piece in schedule.pieces]
        [(0, 0, 0, 4), (0, 1, 0, 2), (1, 1, 2, 2), (1, 2, 0, 4)]
    """

    tiles: tuple[int, ...]
    workers: int

    @property
    def total(self) -> int:
        """Number of tiles."""
        return sum(self.tiles)

    @property
    def makespan(self) -> int:
        """Tiles of the busiest worker: when the last one is done, in units of a tile."""
        return ceil_div(self.total, self.workers)

    @property
    def full(self) -> int:
        """How many workers have `makespan` tiles."""
        return self.total - (self.makespan - 1) * self.workers if self.total else 0

    @property
    def occupancy(self) -> float:
        """Share of the time in which the workers work."""
        return self.total / (self.workers * self.makespan) if self.total else 0.0

    def start(self, worker: int) -> int:
        """The first tile of a worker in the list; that of `workers` is the end."""
        return worker * self.makespan - max(0, worker - self.full)

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """The list cut at the ends of ranges and of outputs; its order is that of the tiles."""
        found, worker, place = [], 0, 0
        for output, tiles in enumerate(self.tiles):
            first = 0
            while first < tiles:
                while self.start(worker + 1) <= place:
                    worker += 1
                size = min(tiles - first, self.start(worker + 1) - place)
                found.append(Piece(worker, output, first, size))
                first, place = first + size, place + size
        return tuple(found)

    def most_splits(self, tiles: int) -> int:
        """A bound for the number of workers among which an output of so many tiles is divided."""
        size = self.makespan if self.full == self.workers else self.makespan - 1
        return 1 + ceil_div(tiles - 1, size) if size > 0 else 1


def fixed_split_makespan(outputs: int, tiles: int, splits: int, slots: int) -> int:
    """Tiles until a grid is done that divides each of `outputs` into `splits` parts, in waves of `slots` parts.

    FlashDecoding is `splits=flash_decoding_splits(...)`, FlashAttention-2 is `splits=1`.
    """
    return ceil_div(outputs * splits, slots) * ceil_div(tiles, splits)


def flash_decoding_splits(outputs: int, tiles: int, units: int, most: int = 128) -> int:
    """FlashDecoding's choice: the fewest splits whose last wave is filled to 85 % of the best that any number reaches.

    One split where the outputs alone fill four fifths of the units. (num_splits_heuristic of ONNX Runtime and of
    FlashAttention 2.)
    """
    if outputs >= 0.8 * units:
        return 1
    efficiency = {}
    for splits in range(1, min(most, units, tiles) + 1):
        if splits == 1 or ceil_div(tiles, splits) != ceil_div(tiles, splits - 1):
            efficiency[splits] = outputs * splits / units / ceil_div(outputs * splits, units)
    best = max(efficiency.values(), default=0.0)
    return next((splits for splits, share in efficiency.items() if share >= 0.85 * best), 1)


def block_sizes(head_dim: int) -> tuple[int, int]:
    """Queries and keys of a tile, as released for NVIDIA GPUs."""
    return 64, 256 if head_dim <= 64 else 128 if head_dim <= 128 else 64


@dataclass(frozen=True)
class LeanPlan:
    """Everything that is settled before the first product is computed.

    Args:
        outputs: batch element, head of keys and block of queries of each output, in the order of the list.
        schedule: which worker takes which of their tiles.
        block: queries and keys of a tile.
        most_splits: among so many workers an output is divided at most; 0 if none is.
        lse_bytes, out_bytes, flag_bytes: of the partial log-sum-exps, outputs and flags that workers leave for one
            another; 0 if no output is divided.
    """

    outputs: tuple[tuple[int, int, int], ...]
    schedule: StreamK
    block: tuple[int, int]
    most_splits: int
    lse_bytes: int
    out_bytes: int
    flag_bytes: int


def _released_workers(total: int, key_blocks: int, outputs: int, units: int) -> int:
    """Two workers a unit, but at least two tiles a worker and (with a reserve of two) at most 64 splits an output."""
    if total <= 4 * units:
        workers = min((total + 1) // 2, ceil_div(32 * total, max(key_blocks, 1)))
    else:
        workers = min(2 * units, 32 * outputs)
    return max(1, min(workers, total))


@lru_cache(maxsize=256)
def lean_plan(
    batch: int,
    queries: int,
    keys: int | tuple[int, ...],
    heads: int,
    kv_heads: int | None = None,
    head_dim: int = 64,
    *,
    causal: bool = False,
    units: int = 108,
    workers: int | None = None,
    block: tuple[int, int] | None = None,
    order: Literal["batch", "head"] = "batch",
    authors_quirks: bool = False,
) -> LeanPlan:
    """The plan of one call of lean attention: tiles, their order and their ranges.

    Query heads that share keys are stacked into the rows of a tile. Causal attention aligns the ends of both sequences,
    and a block of queries has tiles up to the last key that one of them may see.

    Args:
        keys: of all sequences, or of each.
        causal: ignored for a single query, which sees all keys.
        units: multiprocessors (108: A100, 132: H100); the number of workers follows by ONNX Runtime's rule.
        workers: that number itself; the paper's own choice is one for each slot of the machine.
        block: queries and keys of a tile; None is `block_sizes(head_dim)`.
        order: of the list: by batch element and then head (ONNX Runtime), or by head and then batch element (aiter).
        authors_quirks: count the causal tiles of more keys than queries as ONNX Runtime does, as if there were only as
            many keys as queries; the tiles of the rest are then missing.

    Raises:
        ValueError: for sizes that are not possible.

    Example:
        >>> plan = lean_plan(1, 1, 4096, heads=32, head_dim=128)
        >>> plan.schedule.total, plan.schedule.workers, plan.schedule.makespan
        (1024, 216, 5)
    """
    kv_heads = heads if kv_heads is None else kv_heads
    for name, value in (("queries", queries), ("heads", heads), ("kv_heads", kv_heads), ("units", units)):
        checks.positive(name, value)
    checks.divisible("heads", heads, "kv_heads", kv_heads)
    lengths = (keys,) * batch if isinstance(keys, int) else keys
    if len(lengths) != batch or min(lengths, default=0) < 0:
        raise ValueError(f"keys must be one number or one for each of {batch} sequences, none negative, got {keys}.")
    rows, columns = block_sizes(head_dim) if block is None else block
    checks.positive("block", min(rows, columns))
    blocks = range(ceil_div(queries, rows))

    def tiles(length: int, index: int) -> int:
        past = 0 if authors_quirks else length - queries
        seen = (index + 1) * rows + past if causal and queries > 1 else length
        return ceil_div(max(0, seen if authors_quirks else min(seen, length)), columns)

    if order == "batch":
        outputs = [(b, h, i) for b in range(batch) for h in range(kv_heads) for i in blocks]
    else:
        outputs = [(b, h, i) for h in range(kv_heads) for b in range(batch) for i in blocks]
    sizes = tuple(tiles(lengths[b], i) for b, _, i in outputs)
    key_blocks = ceil_div(max(lengths, default=0), columns)
    if workers is None:
        workers = _released_workers(sum(sizes), key_blocks, len(outputs), units)
    checks.positive("workers", workers)
    schedule = StreamK(sizes, max(1, min(workers, sum(sizes))))
    splits = schedule.most_splits(key_blocks) if sum(sizes) else 1
    partials = 4 * splits * batch * queries * heads if splits > 1 else 0
    return LeanPlan(
        tuple(outputs),
        schedule,
        (rows, columns),
        splits if splits > 1 else 0,
        lse_bytes=partials,
        out_bytes=partials * 32 * ceil_div(head_dim, 32),
        flag_bytes=4 * len(outputs) if splits > 1 else 0,
    )
