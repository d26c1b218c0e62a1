"""What each mixer can do, found by trying it: dimensions, attention patterns, streaming, precision, compile, export."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regard.layers import run_stream
from regard.registry import list_mixers
from regard.skeletons.host import MixerClass, build_in_stack
from regard.systems.sequence._cab_scores import Pattern

_GRIDS = {1: (20,), 2: (9, 10), 3: (4, 6, 5)}
_DIM, _HEADS = 32, 4
_TOLERANCE = 1e-4
_CUTS = (1, 7, 19)
"""How many tokens of the sequence are left when its future is cut."""
_CONTEXTS = (13, 27)
"""Tokens of a context: fewer and more than there are queries."""


def _works(attempt: Callable[[], Any]) -> bool:
    try:
        attempt()
    except Exception:  # whatever goes wrong: it does not work
        return False
    return True


def capabilities(compile_too: bool = False) -> list[dict[str, Any]]:
    """One row a registered mixer; every cell is the outcome of running it.

    Args:
        compile_too: also try torch.compile (one graph) and torch.export, which take seconds each.
    """
    return [_row(name, compile_too) for name in list_mixers()]


def _row(name: str, compile_too: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"mixer": name}
    made: dict[int, nn.Module] = {}
    for axes, grid in _GRIDS.items():

        def attempt(axes: int = axes, grid: tuple[int, ...] = grid) -> None:
            mixer = build_in_stack(name, 0, grid, _DIM, _HEADS)
            x = torch.randn(1, *grid, _DIM, requires_grad=True)
            out = mixer(x)
            out.sum().backward()
            assert out.shape == x.shape
            made[axes] = mixer

        row[f"{axes}-D"] = _works(attempt)
    row.update(patterns(name).items())
    row["streaming"] = _works(lambda: _check_stream(name))
    any_axes = 2 if 2 in made else next(iter(made), None)
    if any_axes is None:
        return row
    mixer, x = made[any_axes].eval(), torch.randn(2, *_GRIDS[any_axes], _DIM)
    row["other sizes"] = _works(lambda: mixer(torch.randn(2, *(side + 3 for side in _GRIDS[any_axes]), _DIM)))
    row["bfloat16"] = _works(lambda: mixer.to(torch.bfloat16)(x.bfloat16()))
    mixer.float()
    if compile_too:
        row["compile"] = _works(lambda: _check_compiled(mixer, x))
        row["export"] = _works(lambda: _check_exported(mixer, x))
    return row


def patterns(mixer: str | MixerClass) -> dict[Pattern, bool]:
    """In which of the four places of attention on sequences a mixer works (CAB, arXiv 2210.07661, section 2).

    * noncausal self: every token may read every other. It runs, and does not read the past only.
    * causal self: built with `causal=True`, outputs stay as they are when later tokens change or are cut.
    * noncausal cross: `mixer(x, context)` runs for a context of another length than x, and reads it.
    * causal cross: between a decoder and what it decodes from. The same call, and outputs stay as they are when later
      tokens of x change or are cut, or when x comes one token at a time; the context is there as a whole.
    """
    return {pattern: _works(lambda check=check: check(mixer)) for pattern, check in _CHECKS.items()}  # type: ignore[misc]


def _on_sequences(mixer: str | MixerClass, **options: Any) -> tuple[nn.Module, Tensor]:
    """The mixer for sequences, and one to try it on. Parameters are moved, as some begin at zero and hide the rest."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = build_in_stack(mixer, 0, _GRIDS[1], _DIM, _HEADS, **options)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
        return made.eval(), torch.randn(1, *_GRIDS[1], _DIM)


def _reads(before: Tensor, after: Tensor) -> bool:
    return bool((before - after).abs().max() > _TOLERANCE)


@torch.no_grad()
def _check_noncausal_self(name: str | MixerClass) -> None:
    mixer, x = _on_sequences(name)
    first, last = x.clone(), x.clone()
    first[:, 0] += 1
    last[:, -1] += 1
    out = mixer(x)
    assert out.shape == x.shape
    forward, backward = _reads(out[:, 1:], mixer(first)[:, 1:]), _reads(out[:, :-1], mixer(last)[:, :-1])
    assert backward or not forward


@torch.no_grad()
def _check_causal_self(name: str | MixerClass) -> None:
    mixer, x = _on_sequences(name, causal=True)
    _check_prefix(mixer, x)


@torch.no_grad()
def _check_noncausal_cross(name: str | MixerClass) -> None:
    mixer, x = _on_sequences(name, cross=True)
    for length in _CONTEXTS:
        context = torch.randn(1, length, _DIM, generator=torch.Generator().manual_seed(length))
        out = mixer(x, context)
        assert out.shape == x.shape
        assert _reads(out, mixer(x, context + 1))


@torch.no_grad()
def _check_causal_cross(name: str | MixerClass) -> None:
    _check_noncausal_cross(name)
    mixer, x = _on_sequences(name, cross=True)
    for length in _CONTEXTS:
        context = torch.randn(1, length, _DIM, generator=torch.Generator().manual_seed(length))
        out = _check_prefix(partial(mixer, context=context), x)
        steps = torch.cat([mixer(token, context) for token in x.split(1, 1)], 1)
        assert torch.allclose(out, steps, atol=_TOLERANCE)


def _check_prefix(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The future of x, changed or cut, moves no earlier output."""
    out = run(x)
    for length in _CUTS:
        other = x.clone()
        other[:, length:] += 1
        assert torch.allclose(run(other)[:, :length], out[:, :length], atol=_TOLERANCE)
        assert torch.allclose(run(x[:, :length]), out[:, :length], atol=_TOLERANCE)
    return out


_CHECKS: dict[Pattern, Callable[[str | MixerClass], None]] = {
    "noncausal self": _check_noncausal_self,
    "causal self": _check_causal_self,
    "noncausal cross": _check_noncausal_cross,
    "causal cross": _check_causal_cross,
}


@torch.no_grad()
def _check_stream(name: str) -> None:
    """Token by token equals all at once."""
    mixer, x = _on_sequences(name, causal=True)
    assert torch.allclose(run_stream(mixer, x)[0], mixer(x), atol=_TOLERANCE)


def _check_compiled(mixer: nn.Module, x: Tensor) -> None:
    """One graph, and the same result."""
    torch.compiler.reset()  # what other mixers had compiled counts towards a limit
    assert torch.allclose(torch.compile(mixer, fullgraph=True, backend="aot_eager")(x), mixer(x), atol=1e-5)


def _check_exported(mixer: nn.Module, x: Tensor) -> None:
    """A program that stands alone, and the same result."""
    assert torch.allclose(torch.export.export(mixer, (x,)).module()(x), mixer(x), atol=1e-5)
