"""Analytical models of attention accelerators: no fusion, FLAT, and FuseMax with and without its parts.

A spatial array of `side` x `side` processing elements and a row of `side` more, a buffer on the chip, and memory behind
it. Cycles and bytes follow from the Einsums (names as in `fusemax.ONE_PASS`); parts that overlap count once, the longer
one. Values have 2 bytes. (The published artefact, whose tables of time and traffic these formulas reproduce.)

Energy is that of the operations and of the memory, at the unit energies of the artefact's tools (45 nm), and of moving
data on the chip, where their register and buffer counts are replaced by numbers fitted to the published rows (`_MOVING`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from regard import checks

CLOCK = 940e6
BANDWIDTH = 400 * 2**30
SIDE = 256
MIB = 2**20

_PICOJOULES = {"mac": 17.1645, "add": 8.3395, "max": 0.028036, "divide": 36.251153, "exp": 94.6475}
_MEMORY = 64.0
"""Picojoules of a byte."""
_MOVING = {
    "unfused": (228.991, 0.93375),
    "flat": (616.727, 0.16203),
    "flat_logits_outside": (135.850, 1.23468),
    "cascade": (304.689, 0.94201),
    "fusemax": (0.890, 0.50939),
}
"""Picojoules on the chip for a pair of a query and a key, and beside those for each of its E + F channels.

Solved from two published rows each, BERT and XLM at 16K tokens (256K where FLAT's logits lie outside).
"""
_MOVING_LINEAR = {"flat": 0.70346, "fusemax": 0.31400}
"""The same for a multiply-add of a linear layer (BERT at 16K tokens)."""


@dataclass(frozen=True)
class Workload:
    """Encoder layers of one model on sequences of one length.

    Args:
        batch, heads: attention is done for each of them. dim, hidden: width of the model and of its feed-forward part.
        queries, keys: P and M. head_dim, value_dim: E and F.
    """

    batch: int
    dim: int
    heads: int
    head_dim: int
    value_dim: int
    hidden: int
    queries: int
    keys: int

    @property
    def pairs(self) -> int:
        """Of a query and a key, over heads and batch."""
        return self.batch * self.heads * self.queries * self.keys

    @property
    def query_bytes(self) -> int:
        """All queries; values of the output are counted by it too where E = F."""
        return 2 * self.batch * self.heads * self.queries * self.head_dim


_MODELS = {
    "BERT": (64, 768, 12, 64, 64, 3072),
    "TrXL": (64, 1024, 16, 64, 64, 4096),
    "T5": (64, 512, 8, 64, 64, 2048),
    "XLM": (64, 2048, 16, 128, 128, 8192),
}


def workload(model: str, length: int) -> Workload:
    """BERT, TrXL, T5 or XLM with a batch of 64, as the paper evaluates them.

    Args:
        length: tokens, a multiple of 256.
    """
    checks.positive("length", length)
    checks.divisible("length", length, "the side of the array", SIDE)
    return Workload(*_MODELS[checks.one_of("model", model, _MODELS)], length, length)


@dataclass(frozen=True)
class Estimate:
    """What a model says.

    Args:
        seconds: all. traffic: bytes between chip and memory.
        memory: seconds that the traffic takes. array, row: seconds in which the array and the row compute.
        picojoules: energy, as far as it is modelled (see this module).
        array_use: share of `seconds` in which the array's elements work, by Einsum.
    """

    seconds: float
    traffic: float
    memory: float
    array: float
    row: float
    picojoules: float
    array_use: Mapping[str, float] = field(default_factory=dict)

    @property
    def utilization(self) -> tuple[float, float]:
        """Of the array and of the row."""
        return sum(self.array_use.values()), self.row / self.seconds


def _largest_divisor(number: int, most: int) -> int:
    return next(n for n in range(min(number, most), 0, -1) if number % n == 0)


def _fused_traffic(w: Workload, side: int, buffer: int, per_query: int) -> int:
    """Queries and outputs go by once; keys and values once for every block of queries that the buffer holds.

    Args:
        per_query: numbers kept for each query of the block.
    """
    tiles = w.queries // side
    free = buffer - 2 * side * (w.head_dim + w.value_dim)
    held = _largest_divisor(tiles, max(1, free // (2 * per_query * side)))
    own = w.queries * (w.head_dim + w.value_dim)
    return 2 * w.batch * w.heads * (own + tiles // held * w.keys * (w.head_dim + w.value_dim))


def _one_pass_cycles(w: Workload, side: int, exp: int) -> dict[str, float]:
    """Of each Einsum on `side` x `side` elements (QK, LM, SLN, SLD, SLNV) or on `side` (the others).

    Args:
        exp: of one exponential, besides the subtraction in it.
    """
    u = w.batch * w.heads * (w.keys / side) * (w.queries / side)
    cycles = {"QK": u * w.head_dim, "LM": u, "SLN": (exp + 1) * u, "SLD": u, "SLNV": u * w.value_dim}
    cycles |= {"RM": u, "PRM": (exp + 1) * u, "SPD": u, "RD": u, "SPNV": u * w.value_dim, "RNV": u * w.value_dim}
    return cycles | {"AV": w.batch * w.heads * w.value_dim * w.queries / side}


_ON_ARRAY = ("QK", "LM", "SLN", "SLD", "SLNV")


def fusemax(w: Workload, *, interleaved: bool = True, side: int = SIDE, buffer: int = 16 * MIB) -> Estimate:
    """The one-pass cascade on elements that also compute maxima and, in six steps, exponentials.

    Args:
        interleaved: the next chunk's products overlap with what is left of the last one ("binding" in the artefact);
            otherwise the array waits for the running maximum ("arch").
    """
    t = {name: cycles / CLOCK for name, cycles in _one_pass_cycles(w, side, exp=6).items()}
    local = max(t["SLN"] + t["SLD"], t["PRM"] + t["SPD"])
    if interleaved:
        compute = max(t["QK"] + t["LM"], t["RD"] + t["RNV"] + t["AV"]) + t["RM"] + local + max(t["SLNV"], t["SPNV"])
    else:
        stall = side * t["LM"]
        compute = max(t["QK"] + t["LM"], t["RD"] + t["AV"]) + stall + t["RM"] + local
        compute += max(t["SLNV"], t["SPNV"] + t["RNV"])
    traffic = _fused_traffic(w, side, buffer, w.head_dim + w.value_dim + 2)
    energy = _one_pass_energy(w, side, traffic, "fusemax", 6 * _PICOJOULES["mac"])
    return _estimate(compute, traffic, t, _ON_ARRAY, energy)


def cascade_on_flat(w: Workload) -> Estimate:
    """The one-pass cascade on FLAT's chip, whose array multiplies only: all else is left to the row ("cascade")."""
    t = {name: cycles / CLOCK for name, cycles in _one_pass_cycles(w, SIDE, exp=1).items()}
    t |= {name: SIDE * t[name] for name in ("LM", "SLN", "SLD")}  # a row in place of an array
    traffic = _fused_traffic(w, SIDE, 16 * MIB, w.head_dim + w.value_dim + 2 * SIDE + 2)
    array = t["QK"] + t["SLNV"]
    energy = _one_pass_energy(w, SIDE, traffic, "cascade", _PICOJOULES["exp"])
    return _estimate(max(array, sum(t.values()) - array), traffic, t, ("QK", "SLNV"), energy)


def _estimate(
    compute: float, traffic: float, t: Mapping[str, float], on_array: tuple[str, ...], energy: float
) -> Estimate:
    seconds = max(compute, traffic / BANDWIDTH)
    array = sum(t[name] for name in on_array)
    use = {name: t[name] / seconds for name in on_array}
    return Estimate(seconds, traffic, traffic / BANDWIDTH, array, sum(t.values()) - array, energy, use)


def _one_pass_energy(w: Workload, side: int, traffic: float, chip: str, exp: float) -> float:
    """Operations of the one-pass cascade: of every pair, of every query and chunk, and of every output."""
    e, exp = _PICOJOULES, exp + _PICOJOULES["add"]
    pair = (w.head_dim + w.value_dim) * e["mac"] + e["max"] + exp + e["add"]
    chunk = e["max"] + exp + e["mac"] + e["add"] + w.value_dim * (e["mac"] + e["add"])
    out = w.batch * w.heads * w.queries * w.value_dim * e["divide"]
    return w.pairs * pair + w.pairs / side * chunk + out + _moving(w, traffic, chip)


def _three_pass_energy(w: Workload, traffic: float, chip: str) -> float:
    e = _PICOJOULES
    pair = (w.head_dim + w.value_dim) * e["mac"] + e["max"] + e["exp"] + 2 * e["add"] + e["divide"]
    return w.pairs * pair + _moving(w, traffic, chip)


def _moving(w: Workload, traffic: float, chip: str) -> float:
    base, channel = _MOVING[chip]
    return _MEMORY * traffic + w.pairs * (base + channel * (w.head_dim + w.value_dim))


@dataclass(frozen=True)
class FlatMapping:
    """How FLAT lays a workload out.

    Args:
        rows: queries that are done at a time; all of a head if it is as many.
        on_chip: tensors kept in the buffer between uses.
        spilled: share of what should be on the chip that the buffer has no room for.
    """

    rows: int
    on_chip: frozenset[str]
    spilled: float


def flat_mapping(w: Workload, buffer: int = 32 * MIB) -> FlatMapping:
    """FLAT's choices for these sizes, as the artefact lists them; the share that is spilled follows from the room."""
    long, wide = w.queries > 2**12, w.head_dim > 64
    if w.keys * w.head_dim >= 2**24:
        return FlatMapping(1024, frozenset({"Q", "AV"}), 0.0)
    rows = max(SIDE, min(1024, 2**24 // w.keys)) if long else w.queries
    kept = {"QK", "A"}
    kept |= {"Q"} if long and (wide or w.keys >= 2**17) else set()
    kept |= {"V"} if wide and not long else set()
    kept |= {"K"} if wide and w.keys <= 512 else set()
    kept |= {"AV"} if w.keys == 2**16 else set()
    held = {"V": w.keys * w.value_dim, "K": w.keys * w.head_dim, "Q": rows * w.head_dim}
    needed = 2 * (rows * w.keys + SIDE * (SIDE + 4 * w.head_dim) + 2 * sum(held[name] for name in kept & set(held)))
    return FlatMapping(rows, frozenset(kept), max(0.0, 1 - buffer / needed))


def _flat_products(w: Workload, mapping: FlatMapping) -> float:
    """Bytes for the queries, keys, values and outputs of FLAT's two products."""
    inside = "QK" in mapping.on_chip
    uses = {"Q": w.keys / SIDE, "K": w.queries / (SIDE if inside else mapping.rows), "AV": 1.0}
    uses["V"] = uses["K"]

    def moved(name: str) -> float:  # what is kept is moved once, but its spilled part at every use
        return 1 - mapping.spilled + mapping.spilled * uses[name] if name in mapping.on_chip else uses[name]

    return w.query_bytes * sum(moved(name) for name in uses)


def flat(w: Workload) -> Estimate:
    """FLAT (Kao et al., 2023): both products and the three-pass softmax fused, while logits fit on the chip.

    The softmax's four steps take the row one cycle each, exponential and division included.
    """
    mapping = flat_mapping(w)
    inside = "QK" in mapping.on_chip
    logits = 7 * mapping.spilled if inside else 4
    traffic = _flat_products(w, mapping) + logits * 2 * w.pairs
    step = w.pairs / SIDE / CLOCK  # one element of the row a pair; the array's rows hold head_dim of 256 channels
    seconds = max(traffic / BANDWIDTH, 4 * step)
    use = {"QK": step * w.head_dim / SIDE / seconds, "AV": step * w.value_dim / SIDE / seconds}
    energy = _three_pass_energy(w, traffic, "flat" if inside else "flat_logits_outside")
    return Estimate(seconds, traffic, traffic / BANDWIDTH, 2 * step, 4 * step, energy, use)


def flat_products(w: Workload) -> tuple[float, float]:
    """FLAT's own account, which leaves the softmax out: bytes, and seconds if every element always multiplied."""
    mapping = flat_mapping(w)
    logits = 2 * mapping.spilled if "QK" in mapping.on_chip else 2
    ideal = w.pairs * (w.head_dim + w.value_dim) / SIDE**2 / CLOCK
    return _flat_products(w, mapping) + logits * 2 * w.pairs, ideal


def unfused(w: Workload) -> Estimate:
    """One Einsum after the other, each with the better of the mapper's loops; logits go to memory and back."""
    # Where keys fill the whole buffer, the mapper's loops read them again for every block of queries.
    again = 1 if 2 * w.keys * w.head_dim < 32 * MIB else w.head_dim // 8
    product = w.query_bytes * (1 + again) + 2 * w.pairs
    softmax = 2 * 2 * w.pairs
    multiply = w.pairs * w.head_dim / SIDE**2 / CLOCK
    row = 4 * w.pairs / SIDE / CLOCK
    seconds = 2 * max(product / BANDWIDTH, multiply) + max(softmax / BANDWIDTH, row)
    traffic = 2 * product + softmax
    use = {"QK": multiply / seconds, "AV": multiply / seconds}
    energy = _three_pass_energy(w, traffic, "unfused")
    return Estimate(seconds, traffic, traffic / BANDWIDTH, 2 * multiply, row, energy, use)


def linear_layers(w: Workload, chip: Literal["flat", "fusemax"] = "fusemax") -> Estimate:
    """Projections and feed-forward of an encoder layer, every operand moved once; as fast on either chip."""
    tokens, inner = w.batch * w.queries, w.heads * w.head_dim
    seconds = traffic = compute = 0.0
    for rows, columns in [(w.dim, inner)] * 3 + [(inner, w.dim), (w.dim, w.hidden), (w.hidden, w.dim)]:
        moved = 2 * (tokens * (rows + columns) + rows * columns)
        busy = tokens * rows * columns / SIDE**2 / CLOCK
        seconds, traffic, compute = seconds + max(moved / BANDWIDTH, busy), traffic + moved, compute + busy
    checks.one_of("chip", chip, _MOVING_LINEAR)
    energy = compute * CLOCK * SIDE**2 * (_PICOJOULES["mac"] + _MOVING_LINEAR[chip]) + _MEMORY * traffic
    return Estimate(seconds, traffic, traffic / BANDWIDTH, compute, 0.0, energy, {"linear": compute / seconds})


ACCELERATORS: dict[str, Callable[[Workload], Estimate]] = {
    "unfused": unfused,
    "flat": flat,
    "cascade": cascade_on_flat,
    "arch": lambda w: fusemax(w, interleaved=False),
    "binding": fusemax,
}
"""By the names of the artefact's tables; "binding" is FuseMax."""


def energy_ratio(model: str, length: int, *, whole_layer: bool = False) -> float:
    """Energy of FuseMax over that of FLAT.

    Args:
        model, length: see `workload`. whole_layer: with the projections and the feed-forward part.

    Example:
        >>> round(energy_ratio("BERT", 4096), 2)
        0.78
    """
    w = workload(model, length)
    ours, theirs = fusemax(w).picojoules, flat(w).picojoules
    if whole_layer:
        ours, theirs = ours + linear_layers(w).picojoules, theirs + linear_layers(w, "flat").picojoules
    return ours / theirs


def speedup(model: str, length: int, *, over: str = "flat", of: str = "binding", whole_layer: bool = False) -> float:
    """How many times faster one accelerator is than another.

    Args:
        model, length: see `workload`. over, of: names in `ACCELERATORS`.
        whole_layer: with the projections and the feed-forward part.

    Example:
        >>> round(speedup("BERT", 4096), 2), round(speedup("BERT", 4096, whole_layer=True), 2)
        (7.21, 4.08)
    """
    w = workload(model, length)
    slow, fast = (ACCELERATORS[checks.one_of("accelerator", name, ACCELERATORS)](w).seconds for name in (over, of))
    rest = linear_layers(w).seconds if whole_layer else 0.0
    return (slow + rest) / (fast + rest)


def array_sizes(model: str, length: int = 2**18) -> dict[int, Estimate]:
    """FuseMax with arrays of 16 x 16 to 512 x 512 elements, each with the least buffer that does not hold it up.

    The buffer doubles until memory is no slower than the row.
    """
    w, factor, found = workload(model, length), 1, {}
    for side in (16, 32, 64, 128, 256, 512):
        while True:
            found[side] = fusemax(w, side=side, buffer=16 * side * w.head_dim * factor)
            if found[side].memory <= found[side].row:
                break
            factor *= 2
    return found
