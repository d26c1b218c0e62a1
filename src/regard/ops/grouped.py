"""Attention inside ragged groups: point sets, graphs, packed sequences."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from regard import checks
from regard.kernels import OpPath, flash, flex, register, run
from regard.kernels.cpu import paths as cpu
from regard.layouts.ragged import buckets, check_offsets
from regard.ops import reference


def grouped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    *,
    key_offsets: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Softmax attention among the rows of each group, groups of any size laid end to end.

    $$o_i = \sum_{j \in g(i)} \mathrm{softmax}_j(\mathrm{scale} \cdot q_i^\top k_j)\, v_j$$

    Args:
        q: `(N, heads, head_dim)`; rows `offsets[g]:offsets[g + 1]` belong to group g.
        k: `(M, heads, head_dim)`. v: `(M, heads, value_dim)`.
        offsets: `(groups + 1,)` integers from 0 to N, not decreasing; empty groups are fine.
        key_offsets: the same for k and v; None is `offsets`. Queries of a group without keys get zeros.
        scale: None is head_dim ** -0.5.

    Returns:
        `(N, heads, value_dim)`.

    Raises:
        ValueError: for offsets that do not cover the rows, or shapes that do not agree.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3:
            raise ValueError(f"{name} must be (rows, heads, head_dim), got shape {tuple(x.shape)}.")
    if q.shape[1:] != k.shape[1:] or k.shape[:2] != v.shape[:2]:
        raise ValueError(
            f"q, k and v must agree in heads, head_dim (q, k) and rows (k, v), got {tuple(q.shape)}, {tuple(k.shape)}, "
            f"{tuple(v.shape)}."
        )
    checks.no_half_on_cpu("grouped_attention", q)
    check_offsets("offsets", offsets, q.shape[0])
    if key_offsets is not None:
        check_offsets("key_offsets", key_offsets, k.shape[0])
        if key_offsets.shape != offsets.shape:
            raise ValueError(
                f"offsets and key_offsets must hold as many groups, got {len(offsets)} and {len(key_offsets)}."
            )
    elif k.shape[0] != q.shape[0]:
        raise ValueError(f"q has {q.shape[0]} rows and k {k.shape[0]}: pass key_offsets.")
    return run("grouped_attention", backend, q, k, v, offsets, key_offsets=key_offsets, scale=scale)


def _torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    *,
    key_offsets: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    # Groups of similar size are padded to one batch, so padding at most doubles the work whatever the sizes are.
    key_offsets = offsets if key_offsets is None else key_offsets
    places, outs = [], []
    for bucket in buckets(offsets, key_offsets):
        qs, ks, vs = q[bucket.rows], k[bucket.keys], v[bucket.keys]  # (groups, slots, heads, dim)
        qs, ks, vs = qs.transpose(1, 2), ks.transpose(1, 2), vs.transpose(1, 2)
        out = F.scaled_dot_product_attention(qs, ks, vs, bucket.key_exists[:, None, None], scale=scale).transpose(1, 2)
        places.append(bucket.rows[bucket.row_exists])
        outs.append(out[bucket.row_exists])
    result = q.new_zeros(*q.shape[:-1], v.shape[-1])
    if not outs:
        return result + 0.0 * (q.sum() + k.sum() + v.sum())  # keeps gradients defined where no group has keys
    return result.index_put((torch.cat(places),), torch.cat(outs))


def _macs(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, *, key_offsets: Tensor | None = None, **_: object) -> int:
    pairs = (offsets.diff() * (offsets if key_offsets is None else key_offsets).diff()).sum()
    return int(pairs) * q.shape[1] * (q.shape[-1] + v.shape[-1])


register("grouped_attention", OpPath("cpu", cpu.grouped_attention, cpu.refuses))
register("grouped_attention", OpPath("flash", flash.grouped_attention, flash.refuses_grouped))
register("grouped_attention", OpPath("flex", flex.grouped_attention, flex.refuses, flex.declines_grouped))
register("grouped_attention", OpPath("torch", _torch), macs=_macs)
register("grouped_attention", OpPath("reference", reference.grouped_attention))
