"""Where in a host a mixer goes: what a system needs to know to build it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from regard.layers import linear_rates


@dataclass(frozen=True)
class Place:
    """One block of a host.

    Attributes:
        stage, index: the stage, and the block in it. dim, num_heads: of the stage.
        grid: tokens along height and width at the built resolution.
        drop_path: stochastic depth of the block.
    """

    stage: int
    index: int
    dim: int
    num_heads: int
    grid: tuple[int, int]
    drop_path: float


MixerAt = Callable[[Place], nn.Module]
"""Builds the mixer of a block."""


def places(
    dims: Sequence[int],
    depths: Sequence[int],
    num_heads: Sequence[int],
    strides: Sequence[int],
    img_size: int,
    drop_path_rate: float,
) -> Iterator[list[Place]]:
    """The blocks of each stage, with drop rates that rise linearly over all of them."""
    rates = iter(linear_rates(drop_path_rate, sum(depths)))
    for stage, (dim, depth, heads, stride) in enumerate(zip(dims, depths, num_heads, strides, strict=True)):
        side = -(-img_size // stride)
        yield [Place(stage, index, dim, heads, (side, side), next(rates)) for index in range(depth)]
