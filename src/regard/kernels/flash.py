"""Dense and ragged attention by flash-attn (Dao et al., version 2.4.1 or later): half precision on CUDA.

Its causal mask is aligned to the ends of both sequences, like the op's. Its backward ignores a gradient of the
log-sum-exp.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from regard.kernels import libraries


def _refuses(q: Tensor, k: Tensor, v: Tensor, function: str, *parameters: str) -> str | None:
    reason = libraries.not_here("flash-attn", "flash_attn", q, "pip install flash-attn --no-build-isolation")
    if reason:
        return reason
    if not k.numel():
        return "k is empty"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"q is {q.dtype}, flash-attn takes float16 and bfloat16"
    if q.shape[-1] > 256 or q.shape[-1] != v.shape[-1]:
        return (
            f"flash-attn needs head_dim = value_dim, at most 256, got head_dim={q.shape[-1]}, value_dim={v.shape[-1]}"
        )
    if q.is_cuda and not _is_new_enough(q.device.index):
        return "flash-attn needs an Ampere GPU (compute capability 8.0) or newer"
    return libraries.lacks("flash_attn", function, "softmax_scale", "deterministic", *parameters)


@torch.compiler.assume_constant_result
def _is_new_enough(device: int | None) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def refuses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    return_lse: bool = False,
    **_: Any,
) -> str | None:
    """Why flash-attn cannot take these arguments, or None."""
    if bias is not None or mask is not None:
        return f"{'mask' if bias is None else 'bias'} is not supported by flash-attn"
    if return_lse and libraries.wants_gradient(q, k, v):
        return "flash-attn gives no gradient to the log-sum-exp"
    return _refuses(q, k, v, "flash_attn_func", "causal", "return_attn_probs")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: None = None,
    mask: None = None,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`flash_attn.flash_attn_func`: see `regard.ops.attention`."""
    from flash_attn import flash_attn_func

    spatial, dtype = q.shape[1:-2], q.dtype
    result = flash_attn_func(
        *(x.flatten(1, -3) for x in (q, k, v)),
        softmax_scale=scale,
        causal=causal,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        return_attn_probs=return_lse,
    )
    if not return_lse:
        return result.unflatten(1, spatial)
    out, lse, _ = result  # lse (B, heads, Nq), +inf where a query sees no key
    lse = torch.where(lse == math.inf, -math.inf, lse).to(dtype)
    return out.unflatten(1, spatial), lse.transpose(1, 2).unflatten(1, spatial)


def refuses_grouped(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, **_: Any) -> str | None:
    """Why flash-attn cannot take these arguments, or None."""
    return _refuses(q, k, v, "flash_attn_varlen_func", "cu_seqlens_q", "max_seqlen_q")


def grouped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    *,
    key_offsets: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`flash_attn.flash_attn_varlen_func`: see `regard.ops.grouped_attention`."""
    from flash_attn import flash_attn_varlen_func

    ends = [x.to(q.device, torch.int32) for x in (offsets, offsets if key_offsets is None else key_offsets)]
    most = torch.stack([x.diff().max() for x in ends]).tolist()
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=ends[0],
        cu_seqlens_k=ends[1],
        max_seqlen_q=most[0],
        max_seqlen_k=most[1],
        softmax_scale=scale,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
