"""What every token mixer is: a module on channels-last grids that says what it can do and what it costs."""

from __future__ import annotations

import copy
import inspect
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from regard import checks
from regard.flops import count_macs, count_params


@dataclass(frozen=True)
class Cost:
    """Parameters, multiply-adds for one sample of a given size, and numbers kept while streaming (None: cannot)."""

    params: int
    macs: int
    state: int | None


class Mixer(nn.Module):
    """Maps `(batch, *spatial, dim)` to the same shape, moving information between positions.

    Subclasses set what they can do, so that tools can list it and refuse the rest with a clear error.
    """

    dims: ClassVar[tuple[int, ...]] = (1, 2, 3)
    """Numbers of spatial axes that `forward` takes."""
    can_causal: ClassVar[bool] = False
    """Takes `causal=True` at construction: a position then sees itself and earlier ones only."""
    can_cross: ClassVar[bool] = False
    """`forward(x, context)` reads from another sequence."""
    can_stream: ClassVar[bool] = False
    """If causal, has `step(x_t, state) -> (y_t, state)`; feeding tokens one by one equals `forward`."""

    has_heads: ClassVar[bool] = True
    """`num_heads` must divide `dim`. Without heads it is taken, so that every mixer is built alike, and ignored."""

    dim: int
    axes: int | None = None
    """Number of spatial axes that this instance is tied to by its parameters; None if it takes all of `dims`."""

    @classmethod
    def in_stack(cls, index: int, input_size: tuple[int, ...], dim: int, num_heads: int, **options: Any) -> Mixer:
        """The mixer as block `index` of a stack on grids of `input_size`.

        Overridden where blocks alternate (shifted windows, dilations) or where parameters depend on the grid.
        """
        if "axes" in inspect.signature(cls).parameters:
            options["axes"] = len(input_size)
        return cls(dim, num_heads=num_heads, **options)  # type: ignore[call-arg]

    def check(self, x: Tensor) -> tuple[int, ...]:
        """Check the input at the door and return its spatial sizes.

        Raises:
            ValueError: for a shape or dtype that does not fit.
        """
        spatial = checks.grid("x", x, self.dims, self.dim)
        if self.axes not in (None, len(spatial)):
            raise ValueError(
                f"this mixer was built with axes={self.axes}, got x with {len(spatial)} spatial axes: {tuple(x.shape)}."
            )
        return spatial

    def state_size(self, length: int) -> int | None:
        """Numbers that a stream of `length` tokens has to keep for one sample; None if it cannot stream."""
        return None

    def cost(self, spatial: tuple[int, ...]) -> Cost:
        """Parameters, multiply-adds and state for one sample of `spatial` size."""
        twin = copy.deepcopy(self).to("meta")
        macs = count_macs(twin, torch.empty(1, *spatial, self.dim, device="meta"))
        return Cost(count_params(self), macs, self.state_size(math.prod(spatial)) if self.can_stream else None)


def run_stream(mixer: Any, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
    """Tokens `(B, N, dim)`, at least one, through `mixer.step` one by one: all outputs, likewise, and the last state."""
    outs = []
    for token in x.unbind(1):
        out, state = mixer.step(token, state)
        outs.append(out)
    return torch.stack(outs, 1), state


def heads_of(dim: int, num_heads: int) -> int:
    """Head width; raises a ValueError unless `num_heads` divides `dim`."""
    checks.positive("dim", dim)
    checks.positive("num_heads", num_heads)
    checks.divisible("dim", dim, "num_heads", num_heads)
    return dim // num_heads
