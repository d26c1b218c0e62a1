"""What the CPU kernels return, for programs that are traced without running, and how gradients flow through them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from regard.kernels.dispatch import run


def register() -> None:
    """Tell torch.library all of this about the loaded kernels."""
    for name, fake in _FAKES.items():
        torch.library.register_fake(f"regard::{name}", fake)
    for name, backward in _GRADIENTS.items():
        torch.library.register_autograd(f"regard::{name}", _differentiable(name, backward), setup_context=_keep)


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


def _differentiable(name: str, backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """`backward`; with `create_graph=True` the gradients of PyTorch's path, which can be differentiated once more."""

    def either(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        if not torch.is_grad_enabled():
            return backward(ctx, *gradients)
        # Aliases, so that an input which was made from another takes no part of that one's gradient.
        inputs = [x.view_as(x) if isinstance(x, Tensor) else x for x in _kept(ctx)[0]]
        leaves = {place: x for place, x in enumerate(inputs) if isinstance(x, Tensor) and x.requires_grad}
        with sdpa_kernel(SDPBackend.MATH):  # PyTorch's fused attention has no second derivatives
            plain = _PLAIN[name](*inputs)
        pairs = [(out, g) for out, g in zip(plain, gradients, strict=False) if g is not None]
        if not pairs:
            return (None,) * len(inputs)
        outs, wanted = [out for out, _ in pairs], [g.to(out.dtype) for out, g in pairs]
        found = torch.autograd.grad(outs, list(leaves.values()), wanted, create_graph=True, allow_unused=True)
        by_place = dict(zip(leaves, found, strict=True))
        return tuple(by_place.get(place) for place in range(len(inputs)))

    return either


def _plain_windows(
    q: Tensor, k: Tensor, v: Tensor, bias: Any, size: Any, shift: Any, grid: bool, scale: float
) -> tuple[Tensor]:
    partition = "grid" if grid else "window"
    options = {"window_size": tuple(size), "shift": tuple(shift), "partition": partition, "bias": bias, "scale": scale}
    return (run("window_attention", "torch", q, k, v, **options),)


def _plain_neighborhoods(
    q: Tensor, k: Tensor, v: Tensor, bias: Any, kernel: Any, stride: Any, dilation: Any, causal: Any, scale: float
) -> tuple[Tensor, Tensor]:
    options = {"kernel_size": tuple(kernel), "stride": tuple(stride), "dilation": tuple(dilation), "bias": bias}
    options |= {"causal": tuple(bool(c) for c in causal), "scale": scale, "return_lse": True}
    return run("neighborhood_attention", "torch", q, k, v, **options)  # type: ignore[no-any-return]


def _plain_linear(
    q: Tensor, k: Tensor, v: Tensor, decay: Any, kv: Any, total: Any, normalize: bool, eps: float, keep: bool
) -> tuple[Tensor, ...]:
    options = {"decay": decay if decay is None else decay.detach(), "normalize": normalize, "eps": eps}
    state = None if kv is None else (kv.to(q.dtype), total.to(q.dtype))
    out, after = run("linear_attention", "torch", q, k, v, causal=True, state=state, return_state=True, **options)
    return out, *after


_PLAIN: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "window_attention": _plain_windows,
    "neighborhood_attention": _plain_neighborhoods,
    "grouped_attention": lambda q, k, v, offsets, keys, scale: (
        run("grouped_attention", "torch", q, k, v, offsets, key_offsets=keys, scale=scale),
    ),
    "routed_attention": lambda q, k, v, index, scale: (run("routed_attention", "torch", q, k, v, index, scale=scale),),
    "decode_attention": lambda q, k, v, causal, scale: run(
        "attention", "torch", q, k, v, causal=causal, scale=scale, return_lse=True
    ),
    "linear_attention": _plain_linear,
    "selective_scan": lambda x, dt, a, b, c, skip, state: run(
        "selective_scan", "torch", x, dt, a, b, c, skip=skip, state=state
    ),
}


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
