"""Checks at the door: every public function refuses wrong input with an error that teaches.

Each message names the argument, says what was expected and what came, and, where it helps, what to do instead.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a mistyped name: " Did you mean 'x'?" followed by the known names, or only the known names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    shown = ", ".join(known[:40]) + (", ..." if len(known) > 40 else "")
    return f"{hint} Known: {shown}." if known else hint


def one_of(argument: str, value: str, known: Iterable[str]) -> str:
    """Return `value` if it is among `known`; otherwise raise a ValueError that suggests the nearest."""
    known = list(known)
    if value not in known:
        raise ValueError(f"{argument}={value!r} is not known.{nearest(str(value), known)}")
    return value


def positive(argument: str, value: int | float) -> None:
    """Raise unless `value` is a number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ValueError(f"{argument} must be above 0, got {value!r}.")


def divisible(argument: str, value: int, by_argument: str, by: int) -> None:
    """Raise unless `by` divides `value`."""
    if value % by:
        raise ValueError(f"{argument}={value} must be a multiple of {by_argument}={by} (remainder {value % by}).")


def odd(argument: str, *values: int) -> None:
    """Raise unless each side of a kernel or box is odd, so that it has a middle."""
    if any(value % 2 == 0 for value in values):
        raise ValueError(f"{argument} must be odd, so that it has a middle, got {', '.join(map(str, values))}.")


def tuple_of(
    argument: str, value: int | Sequence[int], length: int, minimum: int = 1, *, each: str = "spatial axis"
) -> tuple[int, ...]:
    """One integer for all axes (or whatever `each` names), or one for each, as `length` integers of at least `minimum`."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = (value,) * length
    elif not isinstance(value, Sequence) or isinstance(value, str) or len(value) != length:
        raise ValueError(f"{argument} must be one integer or {length} integers (one for each {each}), got {value!r}.")
    if any(isinstance(item, bool) or not isinstance(item, int) or item < minimum for item in value):
        raise ValueError(f"{argument} must hold integers of at least {minimum}, got {tuple(value)!r}.")
    return tuple(value)


def tuple_of_bools(argument: str, value: bool | Sequence[bool], length: int) -> tuple[bool, ...]:
    """One boolean for all axes, or one per axis, as a tuple of `length` booleans."""
    if isinstance(value, bool):
        return (value,) * length
    if not isinstance(value, Sequence) or len(value) != length or not all(isinstance(item, bool) for item in value):
        raise ValueError(
            f"{argument} must be one boolean or {length} booleans (one for each spatial axis), got {value!r}."
        )
    return tuple(value)


def grid(argument: str, x: Tensor, dims: Sequence[int], channels: int | None = None) -> tuple[int, ...]:
    """Check a channels-last grid `(batch, *spatial, channels)` and return its spatial sizes.

    Raises:
        ValueError: if the number of spatial axes is not among `dims`, the last axis is not `channels`, an axis is empty,
            or the tensor does not hold floating-point numbers.
    """
    rank = x.dim() - 2
    if rank not in dims:
        allowed = " or ".join(str(d) for d in dims)
        raise ValueError(
            f"{argument} must be (batch, *spatial, channels) with {allowed} spatial axes, got {rank if rank > 0 else 'no'}"
            f" spatial axes in shape {tuple(x.shape)}."
        )
    if channels is not None and x.shape[-1] != channels:
        hint = " Channels come last: use x.movedim(1, -1)." if x.shape[1] == channels else ""
        raise ValueError(
            f"{argument} must have {channels} channels on its last axis, got shape {tuple(x.shape)}.{hint}"
        )
    if 0 in x.shape[1:]:
        raise ValueError(f"{argument} has an empty axis: shape {tuple(x.shape)}.")
    if not x.is_floating_point():
        raise ValueError(f"{argument} must hold floating-point numbers, got {x.dtype}.")
    return tuple(x.shape[1:-1])


def image(x: Tensor, channels: int) -> None:
    """Check a batch of channels-first images `(batch, channels, height, width)`: what image models take."""
    if x.dim() != 4 or x.shape[1] != channels:
        hint = " Images are channels first." if x.dim() == 4 and x.shape[-1] == channels else ""
        raise ValueError(f"x must be (batch, {channels}, height, width), got {tuple(x.shape)}.{hint}")
    if 0 in x.shape[2:]:
        raise ValueError(f"x has an empty image: {tuple(x.shape)}.")
    if not x.is_floating_point():
        raise ValueError(
            f"x must hold floating-point numbers, got {x.dtype}: scale bytes to [0, 1] and normalise first."
        )


def clip(x: Tensor, channels: int) -> None:
    """Check a batch of clips `(batch, frames, channels, height, width)`: what video models take."""
    if x.dim() != 5 or x.shape[2] != channels:
        raise ValueError(f"x must be (batch, frames, {channels}, height, width), got {tuple(x.shape)}.")
    if x.shape[1] == 0:
        raise ValueError(f"x has no frames: {tuple(x.shape)}.")
    image(x.flatten(0, 1), channels)


def heads_last(q: Tensor, k: Tensor, v: Tensor, *, same_grid: bool = True, ranks: Sequence[int] | None = None) -> None:
    """Check q, k, v as `(batch, *spatial, heads, head_dim)`.

    With `same_grid` the spatial sizes of q, k and v must be equal. The heads of k and v must divide the heads of q; v may
    have a head width of its own.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() < 4:
            raise ValueError(
                f"{name} must be (batch, *spatial, heads, head_dim) with at least one spatial axis, "
                f"got shape {tuple(tensor.shape)}."
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must hold floating-point numbers, got {tensor.dtype}.")
        if 0 in tensor.shape[1:]:
            raise ValueError(f"{name} has an empty axis: shape {tuple(tensor.shape)}. Only the batch may be empty.")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}.")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}.")
    if ranks is not None and q.dim() - 3 not in ranks:
        raise ValueError(
            f"q must have {' or '.join(map(str, ranks))} spatial axes, got {q.dim() - 3} in shape {tuple(q.shape)}."
        )
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ValueError(f"q, k and v must have one batch size, got {q.shape[0]}, {k.shape[0]} and {v.shape[0]}.")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q and k must have one head_dim, got {q.shape[-1]} and {k.shape[-1]}.")
    if k.shape[1:-2] != v.shape[1:-2]:
        raise ValueError(
            f"k and v must have equal spatial axes, got {tuple(k.shape[1:-2])} and {tuple(v.shape[1:-2])}."
        )
    if same_grid and q.shape[1:-2] != k.shape[1:-2]:
        raise ValueError(
            f"q and k must have equal spatial axes, got {tuple(q.shape[1:-2])} and {tuple(k.shape[1:-2])}."
        )
    if k.shape[-2] != v.shape[-2]:
        raise ValueError(f"k and v must have equally many heads, got {k.shape[-2]} and {v.shape[-2]}.")
    if q.shape[-2] % k.shape[-2]:
        raise ValueError(f"the heads of k and v must divide the heads of q, got {k.shape[-2]} and {q.shape[-2]}.")


def no_half_on_cpu(op: str, x: Tensor) -> None:
    """float16 sums lose most of their digits on CPU, where they are also slow: say what to use instead."""
    if x.dtype == torch.float16 and x.device.type == "cpu":
        raise ValueError(f"{op} does not take float16 on CPU: use torch.bfloat16 or torch.float32, or move to a GPU.")
