"""Neighborhood attention by NATTEN (natten.org, version 0.20 or later): fused kernels for CUDA.

NATTEN's own rule of windows, strides, dilations and causal axes is the one that the op states, and its layout is the
op's layout, so only names change hands. It has no relative bias, and gives no gradient to the log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regard import checks
from regard.kernels import libraries


def refuses_neighborhood(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kernel_size: int | Sequence[int],
    bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    **_: Any,
) -> str | None:
    """Why NATTEN cannot take these arguments, or None."""
    reason = libraries.not_here("natten", "natten", q, "pip install natten, with its CUDA library (natten.org/install)")
    if reason:
        return reason
    axes = q.dim() - 3
    if bias is not None:
        return "bias is not supported by natten"
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"q is {q.dtype}, natten takes float32, float16 and bfloat16"
    if q.shape[-1] % 8 or q.shape[-1] != v.shape[-1]:
        return (
            f"natten needs head_dim = value_dim, a multiple of 8, got head_dim={q.shape[-1]}, value_dim={v.shape[-1]}"
        )
    if 1 in checks.tuple_of("kernel_size", kernel_size, axes):
        return f"natten needs a kernel_size of at least 2 on every axis, got {kernel_size}"
    if scale == 0:
        return "natten reads scale=0 as its default scale"
    if return_lse and libraries.wants_gradient(q, k, v):
        return "natten gives no gradient to the log-sum-exp"
    parameters = ("stride", "dilation", "is_causal", *(("return_lse",) if return_lse else ()))
    return libraries.lacks("natten", f"na{axes}d", *parameters) or (None if _has_kernels() else _NO_KERNELS)


_NO_KERNELS = "natten was installed without its CUDA library: see natten.org/install"


@torch.compiler.assume_constant_result
def _has_kernels() -> bool:
    import natten

    return bool(natten.HAS_LIBNATTEN)


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    causal: Sequence[bool],
    bias: None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`natten.na1d`, `na2d` or `na3d`: see `regard.ops.neighborhood_attention`."""
    import natten

    repeat = q.shape[-2] // k.shape[-2]
    if repeat > 1:  # NATTEN takes fewer key heads since 0.21.5, and for most of its kernels repeats them like this
        k, v = k.repeat_interleave(repeat, -2), v.repeat_interleave(repeat, -2)
    attend = (natten.na1d, natten.na2d, natten.na3d)[q.dim() - 4]
    options = {"return_lse": True} if return_lse else {}
    result = attend(
        q,
        k,
        v,
        kernel_size=tuple(kernel_size),
        stride=tuple(stride),
        dilation=tuple(dilation),
        is_causal=tuple(causal),
        scale=scale,
        **options,
    )
    return (result[0], result[1].to(q.dtype)) if return_lse else result
