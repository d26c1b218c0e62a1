"""Positions as rotations of pairs of channels (RoFormer, Su et al., 2021), at RetNet's rates (Sun et al., 2023)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from regard.layouts.tables import table


@table
def _angles(length: int, pairs: int) -> tuple[np.ndarray]:
    return (np.arange(length)[:, None] * 10000.0 ** -np.linspace(0, 1, pairs),)


def flat_angles(spatial: Sequence[int], pairs: int) -> Tensor:
    """Angle of each pair of channels by the row-major index n of a token: `(*spatial, pairs)` float64 on CPU.

    Pair i turns by n / 10000^(i / (pairs - 1)): from 1 to 1/10000 radians a token, both included.
    """
    (angles,) = _angles(math.prod(spatial), pairs)
    return angles.view(*spatial, pairs)


def axial_angles(spatial: Sequence[int], pairs: int) -> Tensor:
    """Angles by the position along each axis, the pairs shared out among the axes: `(*spatial, pairs)` float64 on CPU.

    The first pairs belong to the first axis; where they do not divide, the first axes get one more. Rates within an axis
    are those of `flat_angles`.
    """
    axes, parts = len(spatial), []
    for axis, length in enumerate(spatial):
        share = pairs // axes + (axis < pairs % axes)
        (angles,) = _angles(length, share)
        shape = [1] * axes + [share]
        shape[axis] = length
        parts.append(angles.view(shape).expand(*spatial, share))
    return torch.cat(parts, -1)


def sequence_angles(places: Tensor, pairs: int, base: float = 10000.0) -> Tensor:
    """Angle of each pair of channels at places `(...,)` of a sequence: `(..., pairs)` float64 (RoFormer, eq. 15).

    Pair i turns by base^(-i / pairs) radians a token.
    """
    rates = base ** (-torch.arange(pairs, dtype=torch.float64, device=places.device) / pairs)
    return places.double()[..., None] * rates


def rotate(x: Tensor, angles: Tensor, *, interleaved: bool = True) -> Tensor:
    """Turn pairs of channels of x by angles: `(..., 2 pairs)` and `(..., pairs)` -> the shape of x.

    Pair i is channels 2i and 2i + 1; not interleaved (as in LLaMA), channels i and i + pairs.
    """
    cos, sin = (t.to(x.dtype).to(x.device) for t in (angles.cos(), angles.sin()))
    axis, sizes = (-1, (-1, 2)) if interleaved else (-2, (2, -1))
    first, second = x.unflatten(-1, sizes).unbind(axis)
    return torch.stack([first * cos - second * sin, second * cos + first * sin], axis).flatten(-2)
