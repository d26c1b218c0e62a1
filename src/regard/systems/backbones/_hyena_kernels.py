"""The long kernels of Hyena N-D: a function of coordinates that fades with distance, or free numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor, nn

from regard import checks

WINDOWS = ("standard", "sqrt", "learned", "symmetric", "none")


def _along(x: Tensor, axis: int, axes: int) -> Tensor:
    """`(L, C)` as `(1, .., L, .., 1, C)`, with L at place `axis` of `axes`."""
    return x.view(*[1] * axis, -1, *[1] * (axes - axis - 1), x.shape[-1])


class Window(nn.Module):
    r"""How a kernel fades along its axes, in each channel at its own rate.

    $$w_c(t) = \exp(-\textstyle\sum_a |\delta_{ac}|\,t_a) + s_c$$

    t_a is the distance along axis a in maps. The rates start such that 0.01 are left after 1.5 maps in the first channel and
    after 0.3 maps in the last.

    Args:
        kind: "standard" has fixed rates and s = 0, "sqrt" is the root of that; "learned" learns the rates and s; "symmetric"
            does so with the same rates for all axes and t in tokens; "none" is 1.
    """

    def __init__(self, dim: int, axes: int, kind: str) -> None:
        super().__init__()
        self.kind, self.axes = checks.one_of("window", kind, WINDOWS), axes
        learned = kind in ("learned", "symmetric")
        for axis in range({"none": 0, "symmetric": 1}.get(kind, axes)):
            rates = torch.linspace(math.log(100) / 1.5, math.log(100) / 0.3, dim)
            if learned:
                self.register_parameter(f"rates{axis}", nn.Parameter(rates))
            else:
                self.register_buffer(f"rates{axis}", rates)
        self.shift = nn.Parameter(torch.rand(dim)) if learned else None

    def forward(self, x: Tensor, spatial: Sequence[int], size: int) -> Tensor:
        """Kernels `(*S, dim)` -> the same, faded; `size` tokens are one map."""
        if self.kind == "none":
            return x
        unit = 1.0 if self.kind == "symmetric" else 1.0 / max(size - 1, 1)
        unit = unit / 2 if self.kind == "sqrt" else unit
        fading = x.new_zeros(())
        for axis, length in enumerate(spatial):
            rates = self.rates0 if self.kind == "symmetric" else getattr(self, f"rates{axis}")
            away = torch.arange(length, device=x.device, dtype=x.dtype)[:, None] * unit
            fading = fading + _along(away * rates.abs(), axis, self.axes)
        window = torch.exp(-fading)
        return x * (window if self.shift is None else window + self.shift)


def _code(start: int, stop: int, size: int, device: torch.device | None = None) -> Tensor:
    """Positions as the network sees them, `(stop - start, 3)`: share of the map, cosine and -sine of next to no turn."""
    place = torch.arange(start, stop, dtype=torch.float32, device=device)
    turn = 1e-4 * 2 * math.pi / size * place
    return torch.stack([place / max(size - 1, 1), turn.cos(), -turn.sin()], -1)


class ImplicitKernel(nn.Module):
    r"""A kernel as a function of its coordinates: a network of sines, times a window.

    $$k(p) = w(p) \odot W_3\,h_2,\quad h_i = \sin(f \odot (W_i h_{i-1} + b_i)),\quad h_{-1} = z(p)$$

    z are learned codes of positions along an axis, shared by all axes; the frequencies f are shared by all layers. Joint: one
    network on the codes of all axes side by side. Otherwise one network and window for each axis, multiplied, so that the
    kernel of a channel is separable.

    Departure: beyond `size` tokens the codes go on with their initial values; the authors' code refuses such maps.
    """

    def __init__(self, dim: int, size: int, axes: int, *, joint: bool, hidden: int, window: str) -> None:
        super().__init__()
        if not joint and window == "symmetric":
            raise ValueError("window='symmetric' ties the axes together: it needs kernel='joint'.")
        self.size, self.axes = size, axes
        self.positions = nn.Parameter(_code(0, size, size))
        self.freq = nn.Parameter(torch.ones(hidden))
        parts, axes_of_part = (1, axes) if joint else (axes, 1)
        self.nets = nn.ModuleList(
            nn.ModuleList(
                [
                    nn.Linear(3 * axes_of_part, hidden),
                    nn.Linear(hidden, hidden),
                    nn.Linear(hidden, hidden),
                    nn.Linear(hidden, dim, bias=False),
                ]
            )
            for _ in range(parts)
        )
        self.windows = nn.ModuleList(Window(dim, axes_of_part, window) for _ in range(parts))

    def forward(self, spatial: Sequence[int]) -> Tensor:
        """The taps on a grid: `(*spatial, dim)`."""
        codes = [self._codes(length) for length in spatial]
        if len(self.nets) == self.axes:
            parts = [
                self._part(i, code, (length,)) for i, (code, length) in enumerate(zip(codes, spatial, strict=True))
            ]
            return reduce(torch.mul, (_along(part, i, self.axes) for i, part in enumerate(parts)))
        grid = [_along(code, axis, self.axes).expand(*spatial, 3) for axis, code in enumerate(codes)]
        return self._part(0, torch.cat(grid, -1), spatial)

    def _codes(self, length: int) -> Tensor:
        if length <= self.size:
            return self.positions[:length]
        return torch.cat(
            [self.positions, _code(self.size, length, self.size, self.positions.device).to(self.positions)]
        )

    def _part(self, index: int, x: Tensor, spatial: Sequence[int]) -> Tensor:
        *layers, last = self.nets[index].children()
        for layer in layers:
            x = torch.sin(self.freq * layer(x))
        return self.windows[index](last(x), spatial, self.size)


class DirectKernel(nn.Module):
    """Free numbers in place of a network, `(size, .., size, dim)`. On smaller grids the far taps have no use."""

    def __init__(self, dim: int, size: int, axes: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(*[size] * axes, dim))

    def forward(self, spatial: Sequence[int]) -> Tensor:
        """The taps on a grid: `(*spatial, dim)`, or fewer where the grid is larger."""
        return self.kernel[tuple(slice(length) for length in spatial)]
