"""Dense softmax attention."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from regard import checks
from regard.kernels import OpPath, flash, flex, register, run
from regard.kernels.cpu import paths as cpu
from regard.ops import reference


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
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Softmax attention of every query over all keys.

    $$o_i = \sum_j \mathrm{softmax}_j(\mathrm{scale} \cdot q_i^\top k_j + b_{ij})\, v_j$$

    Args:
        q: `(batch, *spatial, heads, head_dim)`; the spatial axes are flattened to Nq queries.
        k: `(batch, *spatial_k, kv_heads, head_dim)`, Nk keys; kv_heads divides heads (grouped heads share keys).
        v: `(batch, *spatial_k, kv_heads, value_dim)`.
        bias: added to the scaled logits; broadcastable to `(batch, heads, Nq, Nk)`.
        mask: boolean, True where a query may see a key; broadcastable to `(batch, heads, Nq, Nk)`. A query that may see
            no key gets zeros.
        causal: query i sees keys up to i + Nk - Nq (the ends of both sequences are aligned).
        scale: None is head_dim ** -0.5.
        return_lse: also return the log of the softmax denominator, `(batch, *spatial, heads)`, for `merge_attention`.

    Returns:
        `(batch, *spatial, heads, value_dim)`, with the log-sum-exp if asked for.

    Raises:
        ValueError: for ranks, sizes, dtypes or devices that do not fit.
    """
    checks.heads_last(q, k, v, same_grid=False)
    checks.no_half_on_cpu("attention", q)
    queries, keys = math.prod(q.shape[1:-2]), math.prod(k.shape[1:-2])
    for name, extra in (("bias", bias), ("mask", mask)):
        if extra is not None:
            _broadcastable(name, extra, (q.shape[0], q.shape[-2], queries, keys))
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask must be boolean (True = may attend), got {mask.dtype}. Pass additive terms as bias.")
    return run("attention", backend, q, k, v, bias=bias, mask=mask, causal=causal, scale=scale, return_lse=return_lse)


def _broadcastable(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    sizes = tuple(x.shape)
    if len(sizes) > len(shape) or any(a not in (1, b) for a, b in zip(sizes[::-1], shape[::-1], strict=False)):
        raise ValueError(f"{name} must broadcast to (batch, heads, queries, keys) = {shape}, got shape {sizes}.")


def _torch(
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
    spatial, grouped = q.shape[1:-2], q.shape[-2] != k.shape[-2]
    q, k, v = (x.flatten(1, -3).transpose(1, 2) for x in (q, k, v))  # (B, heads, N, dim)
    if causal and (q.shape[2] != k.shape[2] or bias is not None or mask is not None or return_lse):
        past = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
        mask, causal = past if mask is None else mask & past, False
    if return_lse:
        out, lse = _with_lse(q, k, v, bias, mask, scale)
        return out.transpose(1, 2).unflatten(1, spatial), lse.transpose(1, 2).unflatten(1, spatial)
    extra = mask
    if bias is not None:
        bias = bias.to(q.dtype)
        extra = bias if mask is None else torch.where(mask, bias, -math.inf)
    width = v.shape[-1]
    if q.device.type == "cpu" and q.shape[-1] != width:
        # PyTorch's fused kernel for CPUs wants one width; zeros change no product, and cost less than going without it.
        scale, widest = q.shape[-1] ** -0.5 if scale is None else scale, max(q.shape[-1], width)
        q, k, v = (F.pad(x, (0, widest - x.shape[-1])) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, extra, is_causal=causal, scale=scale, enable_gqa=grouped)[..., :width]
    if (
        torch.compiler.is_exporting()
    ):  # writes attention out as products, whose result has other strides than views rely on
        out = out.clone(memory_format=torch.contiguous_format)
    if mask is not None:
        out = torch.where(mask.any(-1, keepdim=True), out, 0.0)
    return out.transpose(1, 2).unflatten(1, spatial)


def _with_lse(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float | None, rows: int = 512
) -> tuple[Tensor, Tensor]:
    # SDPA keeps its log-sum-exp to itself, so this path computes logits, a block of rows at a time.
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    outs, lses = [], []
    for start in range(0, q.shape[2], rows):
        block = slice(start, start + rows)
        logits = (q[:, :, block] * scale) @ k.transpose(-1, -2)
        if bias is not None:
            logits = logits + _rows(bias, block)
        if mask is not None:
            logits = logits.masked_fill(~_rows(mask, block), -math.inf)
        lse = logits.logsumexp(-1, keepdim=True)
        weights = (logits - torch.where(lse == -math.inf, 0.0, lse)).exp()
        outs.append(weights @ v)
        lses.append(lse.squeeze(-1))
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _rows(x: Tensor, block: slice) -> Tensor:
    return x[..., block, :] if x.dim() > 1 and x.shape[-2] > 1 else x


def attention_macs(q: Tensor, k: Tensor, v: Tensor, **_: object) -> int:
    """Nq Nk (head_dim + value_dim) a head; causal attention is counted in full, as papers do."""
    pairs = q.shape[0] * q.shape[-2] * math.prod(q.shape[1:-2]) * math.prod(k.shape[1:-2])
    return pairs * (q.shape[-1] + v.shape[-1])


register("attention", OpPath("cpu", cpu.decode_attention, cpu.refuses_decode))
register("attention", OpPath("flash", flash.attention, flash.refuses_attention))
register("attention", OpPath("flex", flex.attention, flex.refuses, flex.declines_attention))
register("attention", OpPath("torch", _torch), macs=attention_macs)
register("attention", OpPath("reference", reference.attention))
