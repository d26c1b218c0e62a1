"""Attention of blocks of queries to blocks of keys that were chosen for them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from regard import checks
from regard.kernels import OpPath, register, run
from regard.kernels.cpu import paths as cpu
from regard.ops import reference


def routed_attention(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, *, scale: float | None = None, backend: str = "auto"
) -> Tensor:
    r"""Softmax attention of every block of queries to all keys of the blocks that `index` names for it.

    $$o_{gi} = \sum_{b \in \mathrm{index}(g)} \sum_j \mathrm{softmax}_{bj}(\mathrm{scale} \cdot q_{gi}^\top k_{bj})\, v_{bj}$$

    Blocks may be regions of an image (BiFormer, arXiv 2303.08810, eq. 5-6) or of a sequence (block-sparse attention). The
    choice itself is not differentiated. A block that is named twice counts twice.

    Args:
        q: `(batch, blocks, queries, heads, head_dim)`.
        k: `(batch, key_blocks, keys, kv_heads, head_dim)`; kv_heads divides heads. v: likewise, with value_dim.
        index: `(batch, blocks, chosen)` integers from 0 to key_blocks - 1.
        scale: None is head_dim ** -0.5.

    Returns:
        `(batch, blocks, queries, heads, value_dim)`.

    Raises:
        ValueError: for shapes that do not agree, or an index that names no block.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 5:
            raise ValueError(f"{name} must be (batch, blocks, tokens, heads, dim), got shape {tuple(x.shape)}.")
    checks.heads_last(q, k, v, same_grid=False)
    checks.no_half_on_cpu("routed_attention", q)
    if index.dim() != 3 or index.shape[:2] != q.shape[:2] or index.shape[2] == 0 or index.is_floating_point():
        raise ValueError(
            f"index must be integers (batch, blocks, chosen) = ({q.shape[0]}, {q.shape[1]}, at least 1), got "
            f"{index.dtype} of shape {tuple(index.shape)}."
        )
    return run("routed_attention", backend, q, k, v, index, scale=scale)


def _torch(q: Tensor, k: Tensor, v: Tensor, index: Tensor, *, scale: float | None = None) -> Tensor:
    batch = torch.arange(len(q), device=q.device)[:, None, None]
    # (batch, blocks, chosen, keys, heads, dim) -> (batch blocks, heads, chosen keys, dim): four axes, as exporters take it
    k, v = (x[batch, index].flatten(2, 3).flatten(0, 1).transpose(1, 2) for x in (k, v))
    folded, grouped = q.flatten(0, 1).transpose(1, 2), q.shape[3] != k.shape[1]
    out = F.scaled_dot_product_attention(folded, k, v, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2).unflatten(0, q.shape[:2])


def _macs(q: Tensor, k: Tensor, v: Tensor, index: Tensor, **_: object) -> int:
    """Queries x chosen keys x (head_dim + value_dim), a head; copying the blocks costs none."""
    return q.shape[:4].numel() * index.shape[2] * k.shape[2] * (q.shape[-1] + v.shape[-1])


register("routed_attention", OpPath("cpu", cpu.routed_attention, cpu.refuses))
register("routed_attention", OpPath("torch", _torch), macs=_macs)
register("routed_attention", OpPath("reference", reference.routed_attention))
