"""What each mixer can do, found by trying it: dimensions, causal, cross, streaming, precision, compile, export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from regard.registry import list_mixers, mixer_class
from regard.skeletons.host import build_in_stack

_GRIDS = {1: (20,), 2: (9, 10), 3: (4, 6, 5)}
_DIM, _HEADS = 32, 4


def _works(attempt: Callable[[], Any]) -> bool:
    try:
        attempt()
    except Exception:  # whatever goes wrong: it does not work
        return False
    return True


def capabilities(compile_too: bool = False) -> list[dict[str, Any]]:
    """One row a mixer; every cell is the outcome of running it.

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
    row["causal"] = _works(lambda: _check_causal(name))
    row["streaming"] = _works(lambda: _check_stream(name))
    any_axes = 2 if 2 in made else next(iter(made), None)
    if any_axes is None:
        return row
    mixer, x = made[any_axes].eval(), torch.randn(2, *_GRIDS[any_axes], _DIM)
    row["cross"] = bool(getattr(mixer_class(name), "can_cross", False)) and _works(lambda: mixer(x, x[:, 1:]))
    row["other sizes"] = _works(lambda: mixer(torch.randn(2, *(side + 3 for side in _GRIDS[any_axes]), _DIM)))
    row["bfloat16"] = _works(lambda: mixer.to(torch.bfloat16)(x.bfloat16()))
    mixer.float()
    if compile_too:
        row["compile"] = _works(lambda: _check_compiled(mixer, x))
        row["export"] = _works(lambda: _check_exported(mixer, x))
    return row


def _check_compiled(mixer: nn.Module, x: torch.Tensor) -> None:
    """One graph, and the same result."""
    torch.compiler.reset()  # what other mixers had compiled counts towards a limit
    assert torch.allclose(torch.compile(mixer, fullgraph=True, backend="aot_eager")(x), mixer(x), atol=1e-5)


def _check_exported(mixer: nn.Module, x: torch.Tensor) -> None:
    """A program that stands alone, and the same result."""
    assert torch.allclose(torch.export.export(mixer, (x,)).module()(x), mixer(x), atol=1e-5)


def _check_causal(name: str) -> None:
    """Built causal, a change of the last token moves no earlier output."""
    mixer = build_in_stack(name, 0, _GRIDS[1], _DIM, _HEADS, causal=True).eval()
    x = torch.randn(1, *_GRIDS[1], _DIM)
    other = x.clone()
    other[:, -1] += 1
    assert torch.equal(mixer(x)[:, :-1], mixer(other)[:, :-1])


def _check_stream(name: str) -> None:
    """Token by token equals all at once."""
    mixer = build_in_stack(name, 0, _GRIDS[1], _DIM, _HEADS, causal=True).eval()
    x = torch.randn(1, *_GRIDS[1], _DIM)
    state, outs = None, []
    for token in x.unbind(1):
        out, state = mixer.step(token, state)  # type: ignore[operator]
        outs.append(out)
    assert torch.allclose(torch.stack(outs, 1), mixer(x), atol=1e-5)
