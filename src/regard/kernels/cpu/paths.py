"""The CPU kernels as paths of the dispatcher: when they can run, their shapes, their gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def register_gradients() -> None:
    """Tell torch.library what the loaded kernels return and how gradients flow through them."""
    for name, fake in _FAKES.items():
        torch.library.register_fake(f"regard::{name}", fake)
    for name, backward in _GRADIENTS.items():
        torch.library.register_autograd(f"regard::{name}", backward, setup_context=_keep)


def _fake_attention(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty([*q.shape[:-1], v.shape[-1]]), q.new_empty(q.shape[:-1], dtype=torch.float32)


def _like_inputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _fake_gradients(g: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return _like_inputs(q, k, v)


def _fake_decode_gradients(g: Tensor, g_lse: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    return _like_inputs(*args[:3])


def _fake_window_gradients(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *args: Any
) -> tuple[Tensor, ...]:
    return *_like_inputs(q, k, v), q.new_empty([0] if bias is None else bias.shape, dtype=torch.float32)


def _fake_neighborhood_gradients(g: Tensor, g_lse: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    return _fake_window_gradients(g, *args)


def _fake_linear(
    q: Tensor, k: Tensor, v: Tensor, decay: Any, kv: Any, total: Any, normalize: bool, eps: float, keep: bool
) -> tuple[Tensor, ...]:
    batch, length, heads, width = q.shape
    full = torch.float32
    return (
        q.new_empty([*q.shape[:-1], v.shape[-1]]),
        q.new_empty([batch, heads, width, v.shape[-1]], dtype=full),
        q.new_empty([batch, heads, width], dtype=full),
        q.new_empty([batch, length, heads] if keep and normalize else [0], dtype=full),
    )


def _fake_linear_gradients(
    g: Tensor, gkv: Any, gk: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    batch, _, heads, width = q.shape
    state = q.new_empty([batch, heads, width, v.shape[-1]], dtype=torch.float32)
    return *_like_inputs(q, k, v), state, state.new_empty(state.shape[:-1])


def _fake_scan(x: Tensor, dt: Tensor, a: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty([x.shape[0], x.shape[2], a.shape[1]], dtype=torch.float32)


def _fake_scan_gradients(
    g: Tensor, ga: Any, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, *args: Any
) -> list[Tensor]:
    like = [y.new_empty(y.shape) for y in (x, dt, a.float(), b, c)]
    return [*like, a.new_empty([x.shape[2]], dtype=torch.float32), _fake_scan(x, dt, a)[1]]


_FAKES: dict[str, Callable[..., Any]] = {
    "window_attention": _fake_attention,
    "window_attention_backward": _fake_window_gradients,
    "neighborhood_attention": _fake_attention,
    "neighborhood_attention_backward": _fake_neighborhood_gradients,
    "grouped_attention": _fake_attention,
    "grouped_attention_backward": _fake_gradients,
    "routed_attention": _fake_attention,
    "routed_attention_backward": _fake_gradients,
    "decode_attention": _fake_attention,
    "decode_attention_backward": _fake_decode_gradients,
    "linear_attention": _fake_linear,
    "linear_attention_backward": _fake_linear_gradients,
    "selective_scan": _fake_scan,
    "selective_scan_backward": _fake_scan_gradients,
}


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Save tensors among the inputs and all outputs; other inputs stay as they are."""
    ctx.set_materialize_grads(False)
    ctx.plain = [None if isinstance(x, Tensor) else x for x in inputs]
    ctx.places = [place for place, x in enumerate(inputs) if isinstance(x, Tensor)]
    ctx.save_for_backward(*(inputs[place] for place in ctx.places), *output)


def _kept(ctx: Any) -> tuple[list[Any], list[Tensor]]:
    inputs, saved = list(ctx.plain), list(ctx.saved_tensors)
    for place in ctx.places:
        inputs[place] = saved.pop(0)
    return inputs, saved


def _like(gradient: Tensor, x: Tensor | None) -> Tensor | None:
    return None if x is None else gradient.to(x.dtype)


def _window_backward(ctx: Any, g: Tensor | None, g_lse: None) -> tuple[Any, ...]:
    (q, k, v, bias, *options), (_, lse) = _kept(ctx)
    if g is None:
        return (None,) * 8
    *grads, db = torch.ops.regard.window_attention_backward(g, q, k, v, bias, lse, *options)
    return (*grads, _like(db, bias), None, None, None, None)


def _neighborhood_backward(ctx: Any, g: Tensor | None, g_lse: Tensor | None) -> tuple[Any, ...]:
    (q, k, v, bias, *options), (out, lse) = _kept(ctx)
    if g is None and g_lse is None:
        return (None,) * 9
    g = torch.zeros_like(out) if g is None else g
    *grads, db = torch.ops.regard.neighborhood_attention_backward(g, g_lse, q, k, v, bias, lse, *options)
    return (*grads, _like(db, bias), None, None, None, None, None)


def _grouped_backward(ctx: Any, g: Tensor | None, g_lse: None) -> tuple[Any, ...]:
    (q, k, v, offsets, keys, scale), (_, lse) = _kept(ctx)
    if g is None:
        return (None,) * 6
    return (*torch.ops.regard.grouped_attention_backward(g, q, k, v, offsets, keys, lse, scale), None, None, None)


def _routed_backward(ctx: Any, g: Tensor | None, g_lse: None) -> tuple[Any, ...]:
    (q, k, v, index, scale), (_, lse) = _kept(ctx)
    if g is None:
        return (None,) * 5
    return (*torch.ops.regard.routed_attention_backward(g, q, k, v, index, lse, scale), None, None)


def _decode_backward(ctx: Any, g: Tensor | None, g_lse: Tensor | None) -> tuple[Any, ...]:
    (q, k, v, *options), (out, lse) = _kept(ctx)
    if g is None and g_lse is None:
        return (None,) * 5
    g = torch.zeros_like(out) if g is None else g
    return (*torch.ops.regard.decode_attention_backward(g, g_lse, q, k, v, out, lse, *options), None, None)


def _linear_backward(ctx: Any, g: Tensor | None, g_kv: Any, g_k: Any, g_totals: None) -> tuple[Any, ...]:
    (q, k, v, decay, kv, total, normalize, eps, _), (out, _, _, totals) = _kept(ctx)
    g = torch.zeros_like(out) if g is None else g
    *grads, dkv, dk = torch.ops.regard.linear_attention_backward(
        g, g_kv, g_k, q, k, v, decay, kv, total, out, totals, normalize, eps
    )
    return (*grads, None, _like(dkv, kv), _like(dk, total), None, None, None)


def _scan_backward(ctx: Any, g: Tensor | None, g_after: Tensor | None) -> tuple[Any, ...]:
    (x, dt, a, b, c, skip, state), (y, _) = _kept(ctx)
    g = torch.zeros_like(y) if g is None else g
    dx, ddt, da, db, dc, dskip, before = torch.ops.regard.selective_scan_backward(
        g, g_after, x, dt, a, b, c, skip, state
    )
    return dx, ddt, _like(da, a), db, dc, _like(dskip, skip), _like(before, state)


_GRADIENTS: dict[str, Callable[..., Any]] = {
    "window_attention": _window_backward,
    "neighborhood_attention": _neighborhood_backward,
    "grouped_attention": _grouped_backward,
    "routed_attention": _routed_backward,
    "decode_attention": _decode_backward,
    "linear_attention": _linear_backward,
    "selective_scan": _scan_backward,
}
