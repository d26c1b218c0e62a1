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


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn the channels 2i and 2i + 1 of x by angle i: `(..., 2 pairs)` and `(..., pairs)` -> the shape of x."""
    cos, sin = (t.to(x.dtype).to(x.device) for t in (angles.cos(), angles.sin()))
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)
