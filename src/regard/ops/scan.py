"""The selective scan: a linear recurrence whose rates and inputs depend on the token."""

from __future__ import annotations

import torch
from torch import Tensor

from regard import checks
from regard.kernels import OpPath, register, run
from regard.kernels.cpu import paths as cpu
from regard.ops import reference

_CHUNK = 32


def selective_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    skip: Tensor | None = None,
    state: Tensor | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""The recurrence of Mamba (arXiv 2312.00752, section 3.2), one for each channel.

    $$h_t = e^{\Delta_t A} h_{t-1} + \Delta_t B_t x_t, \qquad y_t = C_t^\top h_t + D x_t$$

    Args:
        x: `(batch, length, channels)`.
        dt: Δ, `(batch, length, channels)`, positive (after its softplus).
        a: A, `(channels, states)`, negative for a memory that fades.
        b: B, `(batch, length, states)`. c: C, likewise.
        skip: D, `(channels,)`.
        state: h before the first token, `(batch, channels, states)`; None is zero.
        return_state: also return h after the last token.

    Returns:
        `(batch, length, channels)`, with the state `(batch, channels, states)` in float32 if asked for.

    Raises:
        ValueError: for shapes that do not agree.
    """
    if x.dim() != 3 or dt.shape != x.shape:
        raise ValueError(
            f"x and dt must both be (batch, length, channels), got {tuple(x.shape)} and {tuple(dt.shape)}."
        )
    batch, length, channels = x.shape
    if a.dim() != 2 or a.shape[0] != channels:
        raise ValueError(f"a must be (channels, states) = ({channels}, ...), got shape {tuple(a.shape)}.")
    checks.no_half_on_cpu("selective_scan", x)
    for name, part, shape in (
        ("b", b, (batch, length, a.shape[1])),
        ("c", c, (batch, length, a.shape[1])),
        ("skip", skip, (channels,)),
        ("state", state, (batch, channels, a.shape[1])),
    ):
        if part is not None and tuple(part.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(part.shape)}.")
    y, after = run("selective_scan", backend, x, dt, a, b, c, skip=skip, state=state)
    return (y, after) if return_state else y


def _torch(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, *, skip: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    # Inside a chunk the pairs (decay, input) are combined by doubling: log2(chunk) steps over all of its tokens. Decays
    # are only ever multiplied, so nothing overflows, unlike dividing by a running product.
    batch, length, channels = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    h = x.new_zeros(batch, channels, a.shape[1], dtype=wide) if state is None else state.to(wide)
    outs = []
    for start in range(0, length, _CHUNK):
        part = slice(start, start + _CHUNK)
        step, here = dt[:, part, :, None].to(wide), x[:, part, :, None].to(wide)
        decay = (step * a.to(wide)).exp()  # (B, chunk, channels, states)
        value = step * here * b[:, part, None].to(wide)
        size, reach = decay.shape[1], 1
        while reach < size:
            value = torch.cat([value[:, :reach], value[:, reach:] + decay[:, reach:] * value[:, :-reach]], 1)
            decay = torch.cat([decay[:, :reach], decay[:, reach:] * decay[:, :-reach]], 1)
            reach *= 2
        states = value + decay * h[:, None]
        outs.append((states * c[:, part, None].to(wide)).sum(-1))
        h = states[:, -1]
    y = torch.cat(outs, 1) if outs else x.to(wide)
    if skip is not None:
        y = y + skip * x
    return y.to(x.dtype), h


def _macs(x: Tensor, dt: Tensor, a: Tensor, *args: object, **_: object) -> int:
    """Three products a token, channel and state: decay, input, output."""
    return 3 * x.numel() * a.shape[1]


register("selective_scan", OpPath("cpu", cpu.selective_scan, cpu.refuses))
register("selective_scan", OpPath("torch", _torch), macs=_macs)
register("selective_scan", OpPath("reference", reference.selective_scan))
