"""Cascades of extended Einsums: written as text, run on tensors, and counted in passes over the data.

One line is one Einsum, in Python's grammar::

    QK[p, m] = sum[e](Q[p, e] * K[m, e])     # ranks in brackets; reductions name the ranks that they remove
    GM[p] = max[m](QK[p, m])
    SN[p, m] = exp(QK[p, m] - GM[p])         # + - * / exp maximum, element by element
    RD[0, p] = 0                             # an iterative rank: where it begins,
    RD[i + 1, p] = RD[i, p] + SLD[i, p]      # a step,
    D[p] = RD[-1, p]                         # and what is left in the end
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regard import checks

_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: torch.add,
    ast.Sub: torch.sub,
    ast.Mult: torch.mul,
    ast.Div: torch.div,
}
_REDUCE: dict[str, Callable[[Tensor, list[int]], Tensor]] = {"sum": torch.sum, "max": torch.amax}
_FUNCTIONS: dict[str, Callable[..., Tensor]] = {"exp": torch.exp, "maximum": torch.maximum}

_KNOWN = "+ - * /, exp(...), maximum(..., ...), sum[...](...) and max[...](...)"


class Index(NamedTuple):
    """One place in brackets: a rank ("p"), the next along it ("i", shift 1), or a fixed position (0, -1)."""

    rank: str | None
    shift: int


@dataclass(frozen=True)
class Einsum:
    """One line of a cascade: `name[index] = body`."""

    name: str
    index: tuple[Index, ...]
    body: ast.expr
    text: str

    @cached_property
    def ranks(self) -> tuple[str, ...]:
        """Of the result."""
        return tuple(place.rank for place in self.index if place.rank is not None)

    @cached_property
    def step_of(self) -> str | None:
        """The rank along which this line makes a step."""
        return next((place.rank for place in self.index if place.rank is not None and place.shift), None)

    @cached_property
    def reads(self) -> tuple[tuple[str, tuple[Index, ...]], ...]:
        """Names and indices of what it reads."""
        found = []
        for node in ast.walk(self.body):
            if isinstance(node, ast.Subscript) and _name(node.value) not in _REDUCE:
                found.append((_name(node.value), _index(node)))
        return tuple(found)


class Availability(NamedTuple):
    """When a tensor can be had.

    Attributes:
        passes: in which pass over the data it arrives (streaming), or after how many all of it is there.
        streams: it arrives element by element (or chunk by chunk) in the course of that pass.
    """

    passes: int
    streams: bool


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else ""


def _wrong(text: str, reason: str) -> ValueError:
    return ValueError(f"the Einsum {text!r} cannot be read: {reason}.")


def _index(node: ast.Subscript) -> tuple[Index, ...]:
    places = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    found = []
    for place in places:
        match place:
            case ast.Name(id=rank):
                found.append(Index(rank, 0))
            case ast.BinOp(left=ast.Name(id=rank), op=ast.Add(), right=ast.Constant(value=1)):
                found.append(Index(rank, 1))
            case ast.Constant(value=0):
                found.append(Index(None, 0))
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=1)):
                found.append(Index(None, -1))
            case _:
                raise _wrong(ast.unparse(node), "an index is a rank, a rank + 1, 0 or -1")
    return tuple(found)


def _parse(line: str) -> Einsum:
    try:
        (node,) = ast.parse(line).body
    except (SyntaxError, ValueError):
        raise _wrong(line, "it is not one assignment") from None
    if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Subscript | ast.Name):
        raise _wrong(line, "it is not NAME[ranks] = expression")
    for part in ast.walk(node.value):
        called = part.func if isinstance(part, ast.Call) else None
        reduces = isinstance(called, ast.Subscript) and _name(called.value) in _REDUCE
        if called is not None and not reduces and _name(called) not in _FUNCTIONS:
            raise _wrong(line, f"{ast.unparse(called)} is none of {_KNOWN}")
        if isinstance(part, ast.BinOp) and type(part.op) not in _BINARY:
            raise _wrong(line, f"{ast.unparse(part)} is none of {_KNOWN}")
    target = node.targets[0]
    if isinstance(target, ast.Name):
        return Einsum(target.id, (), node.value, line)
    return Einsum(_name(target.value), _index(target), node.value, line)


class Cascade:
    r"""A list of Einsums in the order in which they can be computed.

    Args:
        text: one Einsum a line; empty lines and comments are fine.

    Raises:
        ValueError: for a line that cannot be read.

    Example:
        >>> twice = Cascade("Y = sum[k](A[k] * B[k])\n Z = sum[k](Y * A[k])")
        >>> twice.passes("k"), Cascade("Y = sum[k](A[k] * B[k])\n Z = Y * sum[k](A[k])").passes("k")
        (2, 1)
    """

    def __init__(self, text: str) -> None:
        lines = (line.split("#")[0].strip() for line in text.splitlines())
        self.einsums = tuple(_parse(line) for line in lines if line)
        self.made = {einsum.name for einsum in self.einsums}
        self.inputs: dict[str, tuple[str, ...]] = {}
        for einsum in self.einsums:
            for name, index in einsum.reads:
                if name not in self.made:
                    self.inputs[name] = tuple(place.rank for place in index if place.rank is not None)

    def __repr__(self) -> str:
        return "\n".join(einsum.text for einsum in self.einsums)

    # Passes

    def availability(self, *fiber: str) -> dict[str, Availability]:
        """When each tensor can be had, whatever the mapping; `fiber` names the ranks whose elements are passed over.

        A tensor with all these ranks is traversed: if it needs something that is whole only after n passes, it belongs
        into pass n + 1. A reduction over them is whole at the end of the pass of what it reduces. If the
        fiber is split into chunks (`"i", "j"`), tensors with the outer rank alone summarise chunks: they are used while
        their chunk goes by, or kept, which takes no pass.

        Raises:
            ValueError: for ranks that no input has.
        """
        if not any(set(fiber) <= set(ranks) for ranks in self.inputs.values()):
            raise ValueError(f"fiber must name ranks of one input, got {fiber}; the inputs are {self.inputs}.")
        known = {name: Availability(1, True) for name, ranks in self.inputs.items() if fiber[0] in ranks}
        known |= {name: Availability(0, False) for name in self.inputs if name not in known}
        steps = {einsum.name for einsum in self.einsums if einsum.step_of == fiber[0]}
        known |= {name: Availability(1, True) for name in steps}
        for _ in range(2 * len(self.einsums) + 1):  # steps refer to each other: until nothing changes
            before = dict(known)
            for einsum in self.einsums:
                found, _ = self._available(einsum.body, known, fiber)
                earlier = known.get(einsum.name, Availability(0, False))
                begins = einsum.name in steps and einsum.step_of is None
                streams = einsum.name in steps or (fiber[0] in einsum.ranks and found.streams)
                passes = max(earlier.passes, found.passes + 1 if begins else found.passes)
                known[einsum.name] = Availability(passes, streams)
            if known == before:
                return known
        raise ValueError(f"the steps of this cascade wait for each other without end:\n{self!r}")

    def passes(self, *fiber: str) -> int:
        """How often every element along `fiber` has to be visited (see `availability`)."""
        return max(when.passes for when in self.availability(*fiber).values())

    def kept_whole(self, *fiber: str) -> tuple[str, ...]:
        """Results that a later pass than theirs reads: they need room for whole fibers, on the chip or off it."""
        known = self.availability(*fiber)
        held: dict[str, None] = {}
        for einsum in self.einsums:
            when, _ = self._available(einsum.body, known, fiber)
            for name, index in einsum.reads:
                whole = set(fiber) <= {place.rank for place in index}
                if name in self.made and whole and known[name].passes < when.passes:
                    held[name] = None
        return tuple(held)

    def _available(
        self, node: ast.expr, known: Mapping[str, Availability], fiber: Sequence[str]
    ) -> tuple[Availability, set[str]]:
        """Of an expression: when, and its ranks."""
        match node:
            case (
                ast.Constant()
                | ast.UnaryOp(operand=ast.Constant())
                | ast.Name(id="inf")
                | ast.UnaryOp(operand=ast.Name(id="inf"))
            ):
                return Availability(0, False), set()
            case ast.Name(id=name):
                return known.get(name, Availability(0, False)), set()
            case ast.Subscript(value=ast.Name(id=name)):
                index = _index(node)
                ranks = {place.rank for place in index if place.rank is not None}
                when = known.get(name, Availability(0, False))
                return Availability(when.passes, when.streams and fiber[0] in ranks), ranks
            case ast.Call(func=ast.Subscript() as reduction, args=[body]):
                when, ranks = self._available(body, known, fiber)
                ranks = ranks - {place.rank for place in _index(reduction) if place.rank is not None}
                return Availability(when.passes, when.streams and fiber[0] in ranks), ranks
            case ast.Call(args=parts):
                pass
            case ast.BinOp(left=left, right=right):
                parts = [left, right]
            case _:
                raise _wrong(ast.unparse(node), f"it is none of {_KNOWN}")
        children = [self._available(part, known, fiber) for part in parts]
        all_ranks: set[str] = set().union(*(ranks for _, ranks in children))
        arriving = max((when.passes for when, _ in children if when.streams), default=0)
        whole = max((when.passes for when, _ in children if not when.streams), default=0)
        if not arriving:
            return Availability(whole, False), all_ranks
        if set(fiber) <= all_ranks:
            return Availability(max(arriving, whole + 1), True), all_ranks
        return Availability(max(arriving, whole), whole < arriving), all_ranks

    # Numbers

    def run(self, *results: str, **inputs: Tensor) -> tuple[Tensor, ...]:
        """Compute the cascade; lines that follow each other along an iterative rank run together, step by step.

        What such a group does not hand on is dropped after each step, so that a cascade of one pass needs room for one
        chunk.

        Args:
            results: names of what to return.
            inputs: every input, `(*batch, *ranks)` with the ranks in the order in which the cascade writes them; the
                batch axes are common to all or missing.

        Raises:
            ValueError: for inputs that are missing, or sizes that contradict each other.
        """
        if set(inputs) != set(self.inputs):
            raise ValueError(f"inputs must be {', '.join(sorted(self.inputs))}, got {', '.join(sorted(inputs))}.")
        for name in results:
            checks.one_of("results", name, self.made)
        sizes: dict[str, int] = {}
        for name, ranks in self.inputs.items():
            own = inputs[name].shape[inputs[name].dim() - len(ranks) :]
            for rank, size in zip(ranks, own, strict=True):
                if sizes.setdefault(rank, size) != size:
                    raise ValueError(f"rank {rank} has size {sizes[rank]} in one input and {size} in {name}.")
        return _Run(self, sizes, dict(inputs)).results(results)


class _Run:
    """One evaluation. Tensors are `(*batch, *ranks)`; inside a group, those with its rank are slices without it."""

    def __init__(self, cascade: Cascade, sizes: Mapping[str, int], values: dict[str, Tensor]) -> None:
        self.cascade, self.sizes, self.values = cascade, sizes, values
        self.ranks = dict(cascade.inputs)
        self.steps = {einsum.name: einsum.step_of for einsum in cascade.einsums if einsum.step_of is not None}
        self.rank: str | None = None  # of the group that is running
        self.next: dict[str, Tensor] = {}

    def results(self, wanted: Sequence[str]) -> tuple[Tensor, ...]:
        todo = list(self.cascade.einsums)
        while todo:
            rank = self._group_rank(todo)
            if rank is None:
                einsum = todo.pop(0)
                value, ranks = self._value(einsum.body)
                self._keep(einsum, value, ranks)
                continue
            group = []
            while todo and rank in todo[0].ranks:
                group.append(todo.pop(0))
            later = {name for einsum in todo for name, _ in einsum.reads} | set(wanted)
            self._loop(rank, group, later)
        return tuple(self.values[name] for name in wanted)

    @staticmethod
    def _group_rank(todo: Sequence[Einsum]) -> str | None:
        """The iterative rank, if the lines up to the next one without it make a step along it."""
        for rank in todo[0].ranks:
            for einsum in todo:
                if rank not in einsum.ranks:
                    break
                if einsum.step_of == rank:
                    return rank
        return None

    def _keep(self, einsum: Einsum, value: Tensor, ranks: tuple[str, ...]) -> None:
        self.values[einsum.name] = _arranged(value, ranks, einsum.ranks)
        self.ranks[einsum.name] = einsum.ranks

    def _loop(self, rank: str, group: Sequence[Einsum], later: set[str]) -> None:
        """Slices of one step at a time; what is read later is collected, and of steps the last is left."""
        whole = {name: self.values[name] for name, ranks in self.ranks.items() if rank in ranks}
        collected: dict[str, list[Tensor]] = {e.name: [] for e in group if e.step_of is None and e.name in later}
        self.rank = rank
        for step in range(self.sizes[rank]):
            for name, value in whole.items():
                ranks = self.ranks[name]
                self.values[name] = value.select(value.dim() - len(ranks) + ranks.index(rank), step)
            for einsum in group:
                value, ranks = self._value(einsum.body)
                value = _arranged(value, ranks, tuple(r for r in einsum.ranks if r != rank))
                if einsum.step_of is None:
                    self.values[einsum.name] = value
                    self.ranks[einsum.name] = einsum.ranks
                    if einsum.name in collected:
                        collected[einsum.name].append(value)
                else:
                    self.next[einsum.name] = value
            self.values |= self.next
            self.next = {}
        self.rank = None
        self.values |= whole
        for einsum in group:
            if einsum.name in collected:
                place = einsum.ranks.index(rank) - len(einsum.ranks)
                self.values[einsum.name] = torch.stack(collected[einsum.name], place)
            elif einsum.step_of is None:
                del self.values[einsum.name], self.ranks[einsum.name]

    def _value(self, node: ast.expr) -> tuple[Tensor, tuple[str, ...]]:
        """An expression and the ranks of its last axes."""
        match node:
            case ast.Constant() | ast.UnaryOp() | ast.Name(id="inf"):
                like = next(iter(self.values.values()))
                number = float(ast.unparse(node).replace(" ", ""))
                return torch.tensor(number, dtype=like.dtype, device=like.device), ()
            case ast.Name(id=name) if name in self.values:
                return self.values[name], self.ranks[name]
            case ast.Subscript(value=ast.Name(id=name)):
                return self._read(node, name, _index(node))
            case ast.Call(func=ast.Subscript(value=ast.Name(id=reduction)) as over, args=[body]):
                gone = [place.rank for place in _index(over) if place.rank is not None]
                if reduction == "sum" and isinstance(body, ast.BinOp) and isinstance(body.op, ast.Mult):
                    return self._product(body, gone)
                value, ranks = self._value(body)
                value = _REDUCE[reduction](value, [ranks.index(rank) - len(ranks) for rank in gone])
                return value, tuple(rank for rank in ranks if rank not in gone)
            case ast.Call(func=ast.Name(id=name), args=parts):
                return _together(_FUNCTIONS[name], [self._value(part) for part in parts])
            case ast.BinOp(left=left, op=op, right=right):
                return _together(_BINARY[type(op)], [self._value(left), self._value(right)])
        raise _wrong(ast.unparse(node), "it cannot be computed")

    def _read(self, node: ast.expr, name: str, index: tuple[Index, ...]) -> tuple[Tensor, tuple[str, ...]]:
        ranks = tuple(place.rank for place in index if place.rank is not None)
        inside = tuple(rank for rank in ranks if rank != self.rank)
        values = self.next if self.rank is not None and Index(self.rank, 1) in index else self.values
        if name not in values or self.steps.get(name) in inside:
            # Of a tensor that makes steps there is the newest one: [-1] after its lines, [i] and [i + 1] among them.
            raise _wrong(ast.unparse(node), f"at this line there is no such value of {name}")
        return values[name], inside

    def _product(self, body: ast.BinOp, gone: Sequence[str]) -> tuple[Tensor, tuple[str, ...]]:
        """sum[...](a * b) without the array of all products."""
        (a, a_ranks), (b, b_ranks) = self._value(body.left), self._value(body.right)
        left = tuple(dict.fromkeys(rank for rank in (*a_ranks, *b_ranks) if rank not in gone))
        letters = {rank: chr(97 + n) for n, rank in enumerate(dict.fromkeys((*a_ranks, *b_ranks)))}
        sides = ["..." + "".join(letters[rank] for rank in ranks) for ranks in (a_ranks, b_ranks, left)]
        return torch.einsum(f"{sides[0]},{sides[1]}->{sides[2]}", a, b), left


def _arranged(value: Tensor, ranks: tuple[str, ...], wanted: tuple[str, ...]) -> Tensor:
    """Axes in the wanted order; ranks that the value does not have become axes of size 1."""
    extra = tuple(rank for rank in wanted if rank not in ranks)
    value = value.reshape((*value.shape, *(1 for _ in extra)))
    ranks = ranks + extra
    batch = value.dim() - len(ranks)
    return value.permute((*range(batch), *(batch + ranks.index(rank) for rank in wanted)))


def _together(
    function: Callable[..., Tensor], parts: Sequence[tuple[Tensor, tuple[str, ...]]]
) -> tuple[Tensor, tuple[str, ...]]:
    ranks = tuple(dict.fromkeys(rank for _, own in parts for rank in own))
    return function(*(_arranged(value, own, ranks) for value, own in parts)), ranks
