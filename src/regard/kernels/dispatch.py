"""The dispatcher: each op has several paths (reference, plain PyTorch, compiled kernels); `backend=` picks one.

A path is a function with the op's own signature and a `refuses` function, which looks at the same arguments and returns
why it cannot take them, or None. `backend="auto"` takes the first registered path, in order of preference, that neither
refuses nor declines: a path declines what it can compute, but not well. A named backend either runs or raises with the
reason, so that a measurement never compares a path with itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from regard.checks import nearest
from regard.flops import counted

_PREFERENCE = ("cpu", "natten", "fla", "flash", "flex", "torch", "reference")
"""Fastest kind first. The reference comes last: it is the specification, not a way to run."""


def _never(*args: Any, **kwargs: Any) -> str | None:
    return None


@dataclass(frozen=True)
class OpPath:
    """One way to compute an op."""

    backend: str
    run: Callable[..., Any]
    refuses: Callable[..., str | None] = _never
    declines: Callable[..., str | None] = _never


_PATHS: dict[str, list[OpPath]] = {}
_MACS: dict[str, Callable[..., int]] = {}
_auto = "auto"  # what "auto" means, see `using`
_notes: dict[str, str] | None = None  # where choices are written down, see `taken`


def register(op: str, path: OpPath, macs: Callable[..., int] | None = None) -> None:
    """Add a path to `op`. `macs(*args, **kwargs)` is the op's published cost in multiply-adds, the same for all paths."""
    if path.backend not in _PREFERENCE:
        raise ValueError(f"backend={path.backend!r} is not known.{nearest(path.backend, _PREFERENCE)}")
    paths = _PATHS.setdefault(op, [])
    paths.append(path)
    paths.sort(key=lambda item: _PREFERENCE.index(item.backend))
    if macs is not None:
        _MACS[op] = macs


def backends(op: str) -> list[str]:
    """The registered backends of `op`, most preferred first."""
    import_module("regard.ops")
    return [path.backend for path in _PATHS[op]]


@contextmanager
def using(backend: str) -> Iterator[None]:
    """Meanwhile every op that is called with `backend="auto"` takes this backend, or says why it cannot.

    `with using("torch"): model(x)` runs a model without compiled kernels.
    """
    global _auto
    before, _auto = _auto, backend
    try:
        yield
    finally:
        _auto = before


@contextmanager
def taken() -> Iterator[dict[str, str]]:
    """A dictionary that fills with each op that is called meanwhile and what `explain` says of its last call."""
    global _notes
    before, _notes = _notes, {}
    try:
        yield _notes
    finally:
        _notes = before


def _choose(op: str, backend: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> OpPath:
    if _notes is not None:
        _notes[op] = explain(op, *args, **kwargs)
    backend = _auto if backend == "auto" else backend
    if backend == "auto":
        for path in _PATHS[op]:
            if path.refuses(*args, **kwargs) is None and path.declines(*args, **kwargs) is None:
                return path
        raise ValueError(f"no path of {op} takes these arguments:\n{explain(op, *args, **kwargs)}")
    for path in _PATHS[op]:
        if path.backend == backend:
            reason = path.refuses(*args, **kwargs)
            if reason is not None:
                raise ValueError(f"{op} cannot run with backend={backend!r}: {reason}. Use backend='auto'.")
            return path
    raise ValueError(f"{op} has no backend={backend!r}.{nearest(backend, ['auto', *backends(op)])}")


def run(op: str, backend: str, *args: Any, **kwargs: Any) -> Any:
    """Compute `op` with the chosen path; its cost is counted by formula where a counter is active."""
    path = _choose(op, backend, args, kwargs)
    return counted(_MACS.get(op), path.run, args, kwargs)


def explain(op: str, *args: Any, **kwargs: Any) -> str:
    """Which path `backend="auto"` would take for these arguments, and why not those before it; one line a path."""
    import_module("regard.ops")  # ops register their paths when they are imported
    if op not in _PATHS:
        raise ValueError(f"op={op!r} is not known.{nearest(op, _PATHS)}")
    lines, taken = [], False
    for path in _PATHS[op]:
        reason = path.refuses(*args, **kwargs)
        if reason is not None:
            lines.append(f"{path.backend}: cannot, {reason}")
        elif (reason := path.declines(*args, **kwargs)) is not None:
            lines.append(f"{path.backend}: only by name, {reason}")
        elif taken:
            lines.append(f"{path.backend}: could")
        else:
            lines.append(f"{path.backend}: taken")
            taken = True
    return "\n".join(lines)
