"""Mamba's selective state space block as a mixer (Gu and Dao, 2023, arXiv 2312.00752), one way or both ways."""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import checks, ops
from regard.layers.conv import Conv1d
from regard.layers.mixer import Mixer
from regard.registry import register_mixer


class MambaState(NamedTuple):
    """What a causal stream keeps: `(B, d_conv - 1, d_inner)` inputs of the convolution, and h `(B, d_inner, d_state)`."""

    inputs: Tensor
    h: Tensor


class StepSize(nn.Module):
    r"""$\Delta = \mathrm{softplus}(W r + b)$, with b drawn so that Δ at r = 0 is log-uniform in [dt_min, dt_max].

    No nn.Linear: models that initialise all of theirs alike would take away the time scales that b stands for.
    """

    def __init__(self, rank: int, channels: int, dt_min: float, dt_max: float, floor: float = 1e-4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, rank).uniform_(-(rank**-0.5), rank**-0.5))
        dt = torch.empty(channels).uniform_(math.log(dt_min), math.log(dt_max)).exp().clamp(min=floor)
        self.bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def forward(self, x: Tensor) -> Tensor:
        """`(B, N, rank)` -> `(B, N, channels)`, positive."""
        return F.softplus(F.linear(x, self.weight, self.bias))


@register_mixer("mamba")
class Mamba(Mixer):
    r"""The selective state space block of Mamba (section 3.4, figure 3; its recurrence is `ops.selective_scan`).

    $$[x, z] = u W_{in},\quad x \leftarrow \mathrm{SiLU}(\mathrm{DWConv}(x)),\quad [r, B, C] = x W_x,\quad
      \Delta = \mathrm{softplus}(W_\Delta r + b)$$
    $$h_t = e^{\Delta_t A} h_{t-1} + \Delta_t B_t x_t,\quad y_t = C_t^\top h_t + D x_t,\quad
      \mathrm{out} = (y \odot \mathrm{SiLU}(z))\, W_{out},\quad A = -e^{A_{log}}$$

    x and z have d_inner = expand * dim channels, each with d_state numbers in h; the convolution sees d_conv tokens up to
    the present one. Causal, this is the published block: a token sees itself and those before it (in row-major order on a
    grid), and a stream keeps a constant state. Otherwise y is the sum of a scan in either direction, each with a
    convolution, W_x, Δ, A and D of its own, as in Vision Mamba (arXiv 2401.09417, section 3.3), whose `_b` names they have.

    Parameters have the names of the published code, so its weights load as they are.

    Args:
        dim: channels. num_heads: taken so that every mixer is built alike; there are none.
        causal: one scan, from the first token to the last.
        d_state, d_conv, expand: as above. dt_rank: channels of r; None is dim / 16, rounded up.
        dt_min, dt_max: the range of Δ at first. bias, conv_bias: of W_in and W_out, and of the convolution.
    """

    can_causal: ClassVar[bool] = True
    can_stream: ClassVar[bool] = True
    has_heads: ClassVar[bool] = False
    can_mask: ClassVar[bool] = True
    """`forward` and `prefill` take `mask=`: padding before or after the tokens then changes nothing for them."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        causal: bool = False,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        bias: bool = False,
        conv_bias: bool = True,
    ) -> None:
        super().__init__()
        dt_rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        sizes = {"dim": dim, "d_state": d_state, "d_conv": d_conv, "expand": expand, "dt_rank": dt_rank}
        for name, number in (sizes | {"dt_min": dt_min}).items():
            checks.positive(name, number)
        if dt_max < dt_min:
            raise ValueError(f"dt_max must be at least dt_min={dt_min}, got {dt_max}.")
        self.dim, self.num_heads, self.causal = dim, num_heads, causal
        self.d_inner, self.d_state, self.d_conv, self.dt_rank = expand * dim, d_state, d_conv, dt_rank
        self.in_proj = nn.Linear(dim, 2 * self.d_inner, bias=bias)
        for end in ("",) if causal else ("", "_b"):
            self._add_scan(end, dt_min, dt_max, conv_bias)
        self.out_proj = nn.Linear(self.d_inner, dim, bias=bias)

    def _add_scan(self, end: str, dt_min: float, dt_max: float, conv_bias: bool) -> None:
        """The parameters of one direction, whose names end in `end`."""
        inner, states = self.d_inner, self.d_state
        rates = torch.arange(1, states + 1, dtype=torch.float32).log().repeat(inner, 1)  # A = -1, ..., -d_state
        parts: dict[str, nn.Module | nn.Parameter] = {
            "conv1d": Conv1d(inner, inner, self.d_conv, groups=inner, bias=conv_bias),
            "x_proj": nn.Linear(inner, self.dt_rank + 2 * states, bias=False),
            "dt_proj": StepSize(self.dt_rank, inner, dt_min, dt_max),
        }
        for name, part in parts.items():
            setattr(self, name + end, part)
        setattr(self, f"A{end}_log", nn.Parameter(rates))
        setattr(self, f"D{end}", nn.Parameter(torch.ones(inner)))

    def no_weight_decay(self) -> set[str]:
        """A, as in the published code (as well as D and all biases, which have one axis)."""
        return {"A_log"} if self.causal else {"A_log", "A_b_log"}

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`(B, *S, dim)` -> the same shape; mask `(B, *S)`, False for padding at the ends."""
        spatial = self.check(x)
        tokens, gate, mask = self._enter(x.flatten(1, -2), None if mask is None else mask.flatten(1))
        y, _ = self._scan(tokens, mask, None, "")
        if not self.causal:
            back, _ = self._scan(tokens.flip(1), None if mask is None else mask.flip(1), None, "_b")
            y = y + back.flip(1)
        return self.out_proj(y * F.silu(gate)).unflatten(1, spatial)

    def prefill(
        self, x: Tensor, state: MambaState | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, MambaState]:
        """Causal `forward` on tokens `(B, N, dim)` that follow `state`, and the state after the last of them.

        Args:
            mask: `(B, N)`, False for padding before the tokens.
        """
        if not self.causal:
            raise ValueError("a stream needs a causal mixer: build it with causal=True.")
        checks.grid("x", x, (1,), self.dim)
        tokens, gate, mask = self._enter(x, mask)
        y, state = self._scan(tokens, mask, state, "")
        return self.out_proj(y * F.silu(gate)), state

    def step(self, x: Tensor, state: MambaState | None = None) -> tuple[Tensor, MambaState]:
        """One token `(B, dim)`; the state has a constant size."""
        out, state = self.prefill(x[:, None], state)
        return out.squeeze(1), state

    def empty_state(self, x: Tensor) -> MambaState:
        """The state before the first token, for as many streams as `x` has."""
        wide = torch.promote_types(x.dtype, torch.float32)
        inputs = x.new_zeros(x.shape[0], self.d_conv - 1, self.d_inner)
        return MambaState(inputs, x.new_zeros(x.shape[0], self.d_inner, self.d_state, dtype=wide))

    def state_size(self, length: int) -> int:
        """Constant: the convolution's last inputs, and h."""
        return (self.d_conv - 1 + self.d_state) * self.d_inner

    def _enter(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """x, z `(B, N, d_inner)`, and the mask `(B, N, 1)`, by which padding is zero in x."""
        if mask is not None and mask.shape != x.shape[:2]:
            raise ValueError(f"mask must hold one truth value a token, {tuple(x.shape[:2])}, got {tuple(mask.shape)}.")
        tokens, gate = self.in_proj(x).chunk(2, -1)
        if mask is None:
            return tokens, gate, None
        mask = mask.to(x.dtype)[..., None]
        return tokens * mask, gate, mask

    def _scan(self, x: Tensor, mask: Tensor | None, state: MambaState | None, end: str) -> tuple[Tensor, MambaState]:
        """The convolution and the recurrence of one direction: y before the gate, `(B, N, d_inner)`, and its state."""
        part: Any = {name: getattr(self, name + end) for name in ("conv1d", "x_proj", "dt_proj", "D")}
        state = self.empty_state(x) if state is None else state
        seen = torch.cat([state.inputs, x], 1)
        x = F.silu(part["conv1d"](seen))
        rank, b, c = part["x_proj"](x).split([self.dt_rank, self.d_state, self.d_state], -1)
        dt = part["dt_proj"](rank)
        if mask is not None:
            dt = dt * mask  # no time goes by: nothing is forgotten and nothing comes in
        a = -getattr(self, f"A{end}_log").to(torch.promote_types(x.dtype, torch.float32)).exp()
        y, h = ops.selective_scan(x, dt, a, b, c, skip=part["D"], state=state.h, return_state=True)
        return y, MambaState(seen[:, x.shape[1] :].clone(), h)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, d_state={self.d_state}, d_conv={self.d_conv}, causal={self.causal}"


class MambaBlock(nn.Module):
    """x + Mamba(norm(x)): Mamba's residual block. It has no MLP; the mixer widens the channels itself.

    Args:
        drop: dropout at the end of the branch. options: those of `Mamba`.
    """

    def __init__(self, dim: int, *, drop: float = 0.0, **options: Any) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.mixer = Mamba(dim, **options)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        return x + self.drop(self.mixer(self.norm(x), mask))

    def prefill(
        self, x: Tensor, state: MambaState | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, MambaState]:
        """Tokens `(B, N, dim)` that follow `state`; see `Mamba.prefill`."""
        out, state = self.mixer.prefill(self.norm(x), state, mask)
        return x + self.drop(out), state
