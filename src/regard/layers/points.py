"""Mixers of points and cells."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from regard.layers.mixer import Mixer
from regard.layouts.points import grid_coordinates
from regard.layouts.ragged import check_offsets


class PointMixer(Mixer):
    """A mixer of occupied cells, which also takes grids: there every cell is occupied.

    Subclasses define `mix`.
    """

    def forward(self, x: Tensor, *, coordinates: Tensor | None = None, offsets: Tensor | None = None) -> Tensor:
        """Grids `(B, *S, dim)`, or cells `(N, dim)` with their coordinates -> the same shape.

        Args:
            coordinates: `(N, axes)` integers, the axes in the order of a grid.
            offsets: `(B + 1,)`, sample b has the rows `offsets[b]:offsets[b + 1]`; None is one sample.
        """
        if coordinates is None:
            spatial = self.check(x)
            place = grid_coordinates(spatial, x.device).repeat(x.shape[0], 1)
            return self.mix(x.flatten(0, -2), place, [math.prod(spatial)] * x.shape[0]).view(x.shape)
        if x.dim() != 2 or x.shape[1] != self.dim or not x.is_floating_point():
            raise ValueError(f"x must be float (N, {self.dim}) beside coordinates, got {x.dtype} {tuple(x.shape)}.")
        if coordinates.shape[:1] != x.shape[:1] or coordinates.dim() != 2 or coordinates.shape[1] not in self.dims:
            axes = " or ".join(map(str, self.dims))
            raise ValueError(f"coordinates must be ({len(x)}, {axes}), got shape {tuple(coordinates.shape)}.")
        if coordinates.is_floating_point():
            raise ValueError(f"coordinates must be integers, the cells of the points, got {coordinates.dtype}.")
        if offsets is None:
            return self.mix(x, coordinates.long(), [len(x)])
        check_offsets("offsets", offsets, len(x))
        return self.mix(x, coordinates.long(), offsets.diff().tolist())

    @abstractmethod
    def mix(self, x: Tensor, coordinates: Tensor, counts: Sequence[int]) -> Tensor:
        """`(N, dim)` at `(N, axes)` int64, sample b having `counts[b]` rows -> `(N, dim)`."""


def grid_sine_code(coordinates: Tensor, dim: int, *, base: float = 10000.0) -> Tensor:
    """Sines and cosines of integer coordinates `(N, axes)`, the last axis first: `(N, dim)`, zero where dim is left over.

    Each axis gets L = 2 floor(dim / (2 axes)) channels: sin(p / base^(2 floor(i/2) / L)) on even i, cos on odd i.
    """
    axes = coordinates.shape[1]
    length = dim // (2 * axes) * 2
    index = torch.arange(length, device=coordinates.device)
    angles = coordinates.flip(1).unsqueeze(-1) / base ** (2 * (index // 2) / max(length, 1))
    code = torch.where(index % 2 == 0, angles.sin(), angles.cos()).flatten(1)
    return torch.nn.functional.pad(code, (0, dim - code.shape[1]))
