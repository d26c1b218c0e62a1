"""What FlatFormer's groups are measured against: attention inside windows of equal shape, which hold unequal counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from regard import ops
from regard.layouts.points import grid_coordinates, sample_of
from regard.layouts.ragged import offsets_from_ids
from regard.systems.points.flatformer import FlatFormer, FlattenedWindowAttention


class Windows(NamedTuple):
    """The cells of each window: `order` `(N,)` brings them together, window w is `offsets[w]:offsets[w + 1]` of it."""

    order: Tensor
    offsets: Tensor


class WindowAttention(FlattenedWindowAttention):
    """Attention inside the windows, shifted in every second layer: SST's regional attention. Parameters as in its parent.

    Attributes:
        backend: of `grouped_attention`. "torch" pads windows to the next power of two, "auto" takes what is fastest here.
    """

    backend = "auto"

    def groups(self, coordinates: Tensor, counts: Sequence[int]) -> Windows:  # type: ignore[override]
        """The windows of cells at these coordinates."""
        key = sample_of(counts, coordinates.device)
        for axis, size in enumerate(self.window_size):
            window = (coordinates[:, axis] + (size // 2 if self.shift else 0)) // size
            key = key * (int(window.amax()) + 1) + window
        _, window_of = key.unique(return_inverse=True)
        order = window_of.argsort(stable=True)
        return Windows(order, offsets_from_ids(window_of[order], int(window_of.amax()) + 1))

    def attend(self, x: Tensor, code: Tensor, groups: Windows) -> Tensor:  # type: ignore[override]
        """Cells `(N, dim)` and their position codes `(N, dim)` -> `(N, dim)`."""
        weight, bias, split = self.qkv.weight, self.qkv.bias, 2 * self.dim
        x, code = x.index_select(0, groups.order), code.index_select(0, groups.order)
        q, k = F.linear(x + code, weight[:split], bias[:split]).unflatten(-1, (2, self.num_heads, -1)).unbind(1)
        v = F.linear(x, weight[split:], bias[split:]).unflatten(-1, (self.num_heads, -1))
        out = self.proj(ops.grouped_attention(q, k, v, groups.offsets, backend=self.backend).flatten(1))
        return torch.empty_like(out).index_copy(0, groups.order, out)


def in_windows(model: FlatFormer, backend: str = "auto") -> FlatFormer:
    """Change a detector's groups into windows of the same size; the weights stay."""
    for layer in model.encoder.layers:  # type: ignore[union-attr]
        old = layer.mixer
        layer.mixer = WindowAttention(
            old.dim, old.num_heads, window_size=old.window_size, axis=old.axis, shift=old.shift
        )
        layer.mixer.backend = backend
        layer.mixer.load_state_dict(old.state_dict())
    return model


def ring_pillars(count: int, seed: int = 0) -> Tensor:
    """Pillars (y, x) of a scan whose density falls with the distance to the power 1.5: `(count, 2)`, in random order.

    Occupancy of windows then follows a power law, as under a spinning lidar; the grid is as fine as Waymo's (468 x 468)
    for 20,000 pillars and grows with `count`.
    """
    side = round(468 * math.sqrt(count / 20_000))
    place = grid_coordinates((side, side))
    distance = (place - (side - 1) / 2).norm(dim=1).clamp(min=2)
    weight = distance**-1.5
    return place[torch.multinomial(weight, count, generator=torch.Generator().manual_seed(seed))]


def window_counts(place: Tensor, window: int) -> Tensor:
    """Number of pillars in each occupied window."""
    key = place[:, 0] // window * 100_000 + place[:, 1] // window
    return key.unique(return_counts=True)[1]


def padded_attention(mixer: FlattenedWindowAttention, x: Tensor, batches: list[tuple[int, int]]) -> Tensor:
    """A mixer's projections, and attention over batches of (windows, slots) with a key mask: the cost of padding."""
    q, k, v = mixer.qkv(x).chunk(3, -1)
    for windows, slots in batches:
        rows = torch.arange(windows * slots) % len(x)
        mask = (rows >= 0).view(windows, 1, 1, slots)
        heads = (part.index_select(0, rows).view(windows, slots, mixer.num_heads, -1) for part in (q, k, v))
        ops.attention(*heads, mask=mask)  # type: ignore[misc]
    return mixer.proj(x)
