"""Every op written as its definition: a dense mask, a loop over time, nothing clever. Slow on purpose; quadratic.

These functions are the specification. Tests hold every fast path to them, forward and backward. They share no index
arithmetic with the fast paths.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale q kᵀ + bias) v over all keys; rows without any key give zeros."""
    spatial, heads = q.shape[1:-2], q.shape[-2]
    repeat = heads // k.shape[-2]
    q, k, v = q.flatten(1, -3), k.flatten(1, -3), v.flatten(1, -3)
    k, v = k.repeat_interleave(repeat, 2), v.repeat_interleave(repeat, 2)
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        logits = logits + bias
    allowed = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device)
    if causal:
        allowed = allowed.tril(k.shape[1] - q.shape[1])
    allowed = allowed.expand_as(logits) if mask is None else (mask & allowed).expand_as(logits)
    logits = logits.masked_fill(~allowed, -math.inf)
    weights = torch.where(allowed.any(-1, keepdim=True), logits, 0.0).softmax(-1) * allowed
    out = torch.einsum("bhqk,bkhd->bqhd", weights, v).unflatten(1, spatial)
    return (out, logits.logsumexp(-1).movedim(1, -1).unflatten(1, spatial)) if return_lse else out


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window_size: Sequence[int],
    shift: Sequence[int],
    partition: str = "window",
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Dense attention under the mask "same window, and not brought together by wrapping around"."""
    spatial = q.shape[1:-2]
    tokens = list(itertools.product(*(range(size) for size in spatial)))
    home: list[tuple[object, ...]] = []
    slot: list[int] = []
    for token in tokens:
        windows: list[object] = []
        places: list[int] = []
        for position, length, size, step in zip(token, spatial, window_size, shift, strict=True):
            padded = -(-length // size) * size
            if partition == "grid":
                windows.append(position % (padded // size))
                places.append(position // (padded // size))
            else:
                rolled = (position - step) % padded
                windows.append((rolled // size, position < step))
                places.append(rolled % size)
        home.append(tuple(windows))
        place = 0
        for item, size in zip(places, window_size, strict=True):
            place = place * size + item
        slot.append(place)
    mask = torch.tensor([[a == b for b in home] for a in home], device=q.device)
    index = torch.tensor(slot, device=q.device)
    full_bias = None if bias is None else bias[:, index][:, :, index]
    return attention(q, k, v, bias=full_bias, mask=mask, scale=scale)  # type: ignore[return-value]


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    causal: Sequence[bool],
    bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Dense attention under the neighborhood mask, found query by query from the rule's own sentences."""
    spatial = q.shape[1:-2]
    axes = []
    for length, kernel, step, gap, past in zip(spatial, kernel_size, stride, dilation, causal, strict=True):
        seen = torch.zeros(length, length, dtype=torch.bool)
        relative = torch.zeros(length, length, dtype=torch.long)
        for query in range(length):
            group = list(range(query % gap, length, gap))
            rank = group.index(query)
            leader = min((rank // step) * step + (step - 1 if past else step // 2), len(group) - 1)
            if past:
                window = group[max(leader - kernel + 1, 0) : rank + 1]
            else:
                left = kernel // 2
                right = kernel // 2 + kernel % 2 - 1
                start = max(leader - left, 0)
                if leader + right >= len(group):
                    start = len(group) - kernel
                window = group[start : start + kernel]
            for key in window:
                seen[query, key] = True
                relative[query, key] = group.index(key) - rank + kernel - 1
        axes.append((seen, relative))
    mask = torch.ones(1, 1, dtype=torch.bool)
    index = torch.zeros(1, 1, dtype=torch.long)
    for (seen, relative), kernel in zip(axes, kernel_size, strict=True):
        mask = (mask[:, None, :, None] & seen[None, :, None, :]).flatten(2, 3).flatten(0, 1)
        index = (index[:, None, :, None] * (2 * kernel - 1) + relative[None, :, None, :]).flatten(2, 3).flatten(0, 1)
    full_bias = None if bias is None else bias.flatten(1)[:, index.to(q.device)]
    return attention(q, k, v, bias=full_bias, mask=mask.to(q.device), scale=scale, return_lse=return_lse)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    decay: Tensor | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
) -> Tensor:
    """Weights q_i · k_j (times exp(-decay (i - j)) for j <= i if causal), divided by their sum if normalised."""
    spatial = q.shape[1:-2]
    repeat = q.shape[-2] // k.shape[-2]
    q, k, v = q.flatten(1, -3), k.flatten(1, -3), v.flatten(1, -3)
    k, v = k.repeat_interleave(repeat, 2), v.repeat_interleave(repeat, 2)
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k)
    if causal:
        distance = torch.arange(q.shape[1], device=q.device)[:, None] - torch.arange(k.shape[1], device=q.device)
        keep = (distance >= 0).to(q.dtype)
        if decay is not None:
            keep = keep * torch.exp(-decay[:, None, None] * distance.clamp(min=0))
        weights = weights * keep
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).unflatten(1, spatial)


def landmark_attention(
    q: Tensor,
    landmarks: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    gather_bias: Tensor | None = None,
    read_bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The N x N matrix softmax(q aᵀ) softmax(a kᵀ), written out and applied to v."""
    spatial = q.shape[1:-2]
    q, a, k, v = (x.flatten(1, -3) for x in (q, landmarks, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    read = torch.einsum("bqhd,bahd->bhqa", q, a) * scale + (0 if read_bias is None else read_bias)
    gather = torch.einsum("bahd,bkhd->bhak", a, k) * scale + (0 if gather_bias is None else gather_bias)
    return torch.einsum("bhqk,bkhd->bqhd", read.softmax(-1) @ gather.softmax(-1), v).unflatten(1, spatial)


def grouped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    *,
    key_offsets: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """A loop over groups, dense attention in each; rows `offsets[g]:offsets[g + 1]` are group g."""
    key_offsets = offsets if key_offsets is None else key_offsets
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    for group in range(len(offsets) - 1):
        rows = slice(int(offsets[group]), int(offsets[group + 1]))
        keys = slice(int(key_offsets[group]), int(key_offsets[group + 1]))
        if rows.stop > rows.start and keys.stop > keys.start:
            out[rows] = attention(q[None, rows], k[None, keys], v[None, keys], scale=scale)[0]
    return out


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """sum_n out_n exp(lse_n) / sum_n exp(lse_n), as it stands (overflows where exp(lse) does)."""
    total = sum(lse.exp() for lse in lses)
    merged = sum(out * (lse.exp() / total)[..., None] for out, lse in zip(outs, lses, strict=True))
    return merged, total.log()  # type: ignore[return-value,union-attr]


def routed_attention(q: Tensor, k: Tensor, v: Tensor, index: Tensor, *, scale: float | None = None) -> Tensor:
    """Dense attention, block by block, to the chosen blocks laid end to end."""
    outs = []
    for element in range(q.shape[0]):
        for block in range(q.shape[1]):
            keys, values = (
                torch.cat([x[element, chosen] for chosen in index[element, block].tolist()]) for x in (k, v)
            )
            outs.append(attention(q[None, element, block], keys[None], values[None], scale=scale)[0])
    if not outs:
        return q.new_zeros(*q.shape[:-1], v.shape[-1]) + 0.0 * (k.sum() + v.sum())
    return torch.stack(outs).unflatten(0, q.shape[:2])  # type: ignore[arg-type]


def selective_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, *, skip: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A loop over time."""
    h = x.new_zeros(x.shape[0], *a.shape) if state is None else state
    outs = []
    for t in range(x.shape[1]):
        step, here = dt[:, t, :, None], x[:, t, :, None]
        h = (step * a).exp() * h + step * here * b[:, t, None]
        outs.append((h * c[:, t, None]).sum(-1))
    y = torch.stack(outs, 1) if outs else x
    return (y if skip is None else y + skip * x), h


def fft_conv(x: Tensor, kernel: Tensor, *, causal: Sequence[bool], skip: Tensor | None = None) -> Tensor:
    """A sum over taps of the grid moved by the tap's offset, with zeros coming in."""
    y = torch.zeros_like(x) if skip is None else skip * x
    for tap in itertools.product(*map(range, kernel.shape[:-1])):
        moved = x
        for axis, (index, past) in enumerate(zip(tap, causal, strict=True)):
            offset, length = index if past else index - kernel.shape[axis] // 2, x.shape[1 + axis]
            sides = [0, 0] * (x.dim() - 2 - axis) + [max(offset, 0), max(-offset, 0)]
            moved = F.pad(moved, sides).narrow(1 + axis, max(-offset, 0), length)
        y = y + kernel[tap] * moved
    return y
