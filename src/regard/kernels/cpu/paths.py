"""The CPU kernels as paths of the dispatcher: when they can run, and how they are called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regard.kernels.cpu import build

_FEW_QUERIES, _MANY_KEYS = 16, 256  # where reading the keys is what attention costs


@torch.compiler.assume_constant_result
def _missing() -> str | None:
    return build.load()


def refuses(q: Tensor, *args: Any, **kwargs: Any) -> str | None:
    """Why the kernels cannot take this input, or None."""
    if q.device.type != "cpu":
        return f"the input is on {q.device.type}"
    if q.dtype not in (torch.float32, torch.bfloat16):
        return f"{q.dtype} (float32 and bfloat16 run)"
    if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
        return "an exported program should not need this library"
    return _missing()


def refuses_linear(q: Tensor, *args: Any, causal: bool = False, **kwargs: Any) -> str | None:
    """Without causality two products of PyTorch's are all there is to do."""
    return refuses(q) if causal else "not causal: plain products are as fast"


def refuses_decode(
    q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, mask: Tensor | None = None, **kwargs: Any
) -> str | None:
    """The kernel reads a long cache for a few queries."""
    if bias is not None or mask is not None:
        return "bias and mask are not supported"
    queries, keys = q.shape[1:-2].numel(), k.shape[1:-2].numel()
    if queries > _FEW_QUERIES or keys < _MANY_KEYS:
        return f"{queries} queries and {keys} keys (at most {_FEW_QUERIES} and at least {_MANY_KEYS})"
    return refuses(q)


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else float(scale)


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
    """Every window is one small dense problem; what the edge or a shift cuts off is a smaller one."""
    return torch.ops.regard.window_attention(
        q, k, v, bias, list(window_size), list(shift), partition == "grid", _scale(q, scale)
    )[0]


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
    """A few neighbouring queries of the last axis at a time, against the rows of keys that they see."""
    out, lse = torch.ops.regard.neighborhood_attention(
        q, k, v, bias, list(kernel_size), list(stride), list(dilation), [int(c) for c in causal], _scale(q, scale)
    )
    return (out, lse.to(q.dtype)) if return_lse else out


def grouped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    *,
    key_offsets: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Groups of any size, none padded."""
    keys = offsets if key_offsets is None else key_offsets
    return torch.ops.regard.grouped_attention(q, k, v, offsets, keys, _scale(q, scale))[0]


def routed_attention(q: Tensor, k: Tensor, v: Tensor, index: Tensor, *, scale: float | None = None) -> Tensor:
    """Blocks of keys are read where they lie; no copy of them is made."""
    return torch.ops.regard.routed_attention(q, k, v, index, _scale(q, scale))[0]


def decode_attention(
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
    """A long cache, read once, in parts that are merged by their log-sum-exp."""
    out, lse = torch.ops.regard.decode_attention(q, k, v, causal, _scale(q, scale))
    return (out, lse.to(q.dtype)) if return_lse else out


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    decay: Tensor | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
    state: tuple[Tensor, Tensor] | None = None,
    return_state: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor]] | Tensor:
    """Chunk by chunk, the carried state in cache."""
    kv, total = (None, None) if state is None else state
    wanted = [x for x in (q, k, v, kv, total) if x is not None]
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in wanted)
    out, after_kv, after_k, _ = torch.ops.regard.linear_attention(q, k, v, decay, kv, total, normalize, eps, keep)
    return (out, (after_kv.to(q.dtype), after_k.to(q.dtype))) if return_state else out


def selective_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, *, skip: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One lane a channel, all of its states in cache."""
    return torch.ops.regard.selective_scan(x, dt, a, b, c, skip, state)
