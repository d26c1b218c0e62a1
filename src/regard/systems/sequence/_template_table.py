"""The table of all mixers' places in the template, measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from regard.registry import list_mixers, mixer_class
from regard.skeletons.host import build_in_stack
from regard.systems.sequence._template import EXACT, mixing_matrix

TEMPLATE_INSTANCES = {
    "softmax": "softmax attention",
    "linear": "kernel attention",
    "agent": "low rank: keys pooled into agents",
    "window": "sparse: windows",
    "neighborhood": "sparse: neighborhoods",
    "pooling": "convolution",
    "spatial_fc": "MLP-Mixer",
    "fnet": "Fourier",
    "diagonal_ssm": "state space model, global convolution",
}
"""Mixers of the library that stand for the families which the paper's symbols name."""


def template_table(names: Sequence[str] | None = None, *, tokens: int = 16, dim: int = 8) -> list[dict[str, Any]]:
    """One row a mixer, all of it measured: does it fit the template, and what are its matrices like?

    Mixers are built as in a stack, with one head where that is possible, on a row of `tokens` or, where they need a map, on a
    square of as many. `can_causal`: there is a causal form, and it sees no future. `exponent` is how multiply-adds grow
    with the tokens, from 256 to 1,024. Where a cell could not be measured, it is None; where no mixer could be
    built or taken apart, `why` says what it said.

    Args:
        names: of registered mixers; None is all.
    """
    return [_row(name, tokens, dim) for name in (list_mixers() if names is None else names)]


def _row(name: str, tokens: int, dim: int) -> dict[str, Any]:
    row: dict[str, Any] = {"mixer": name}
    axes = min(getattr(mixer_class(name), "dims", (2,)))

    def grid(count: int) -> tuple[int, ...]:
        return (round(count ** (1 / axes)),) * axes

    for heads, width in ((1, dim), (2, dim), (4, 4 * dim)):
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                mixer = build_in_stack(name, 0, grid(tokens), width, heads)
                x = torch.randn(*grid(tokens), width)
            mixing = mixing_matrix(_settled(mixer), x)
            break
        except Exception as error:  # whatever it says: it is part of the row
            row["why"] = f"{type(error).__name__}: {error}".splitlines()[0]
    else:
        return {**row, "fits": None}
    row.pop("why", None)
    row |= {"grid": grid(tokens), "heads": heads, "dim": width, "fits": mixing.fits, "path": ", ".join(mixing.path)}
    row |= {"data_dependent": not mixing.static, "outside_moves": mixing.outside_moves, "error": mixing.error}
    if math.isfinite(mixing.error):
        row |= {"terms": mixing.terms, "rank": mixing.rank, "density": round(mixing.density, 3)}
        row |= {"mixes": round(mixing.mixes, 3), "equal_row_sums": mixing.equal_row_sums}
        row |= {"toeplitz": mixing.toeplitz if axes == 1 else None}
    row["exponent"] = _exponent(lambda count: build_in_stack(name, 0, grid(count), width, heads), grid)
    if getattr(mixer_class(name), "can_causal", False):
        row |= _causal_form(name, tokens, width, heads)
    return row


def _settled(mixer: nn.Module) -> nn.Module:
    """Draws parameters that start at zero or as constants, behind which paths would hide."""
    generator = torch.Generator().manual_seed(1)
    for parameter in mixer.parameters():
        if parameter.numel() > 1 and float(parameter.detach().std()) == 0:
            nn.init.normal_(parameter, float(parameter.detach().mean()), 0.2, generator=generator)
    return mixer


def _exponent(build: Callable[[int], nn.Module], grid: Callable[[int], tuple[int, ...]]) -> float | None:
    counts = (16**2, 32**2)
    try:
        with torch.device("meta"):
            macs = [build(count).cost(grid(count)).macs for count in counts]
    except Exception:  # some need numbers to know what to do
        return None
    few, many = (math.prod(grid(count)) for count in counts)
    return round(math.log(macs[1] / macs[0]) / math.log(many / few), 2) if min(macs) else None


@torch.no_grad()
def _causal_form(name: str, tokens: int, dim: int, heads: int) -> dict[str, Any]:
    """Whether the causal form sees no future, and, if it streams, whether its state grows."""
    mixer = build_in_stack(name, 0, (tokens,), dim, heads, causal=True).double().eval()
    x = torch.randn(1, tokens, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    half, other = tokens // 2, x.clone()
    other[:, half:] += 1
    row: dict[str, Any] = {"can_causal": bool((mixer(x) - mixer(other))[:, :half].abs().max() <= EXACT)}
    if getattr(mixer, "can_stream", False):
        row["state"] = "constant" if mixer.state_size(4096) == mixer.state_size(8192) else "grows"
    return row
