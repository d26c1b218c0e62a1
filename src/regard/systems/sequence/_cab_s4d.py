"""S4D: a diagonal state space model as a long convolution and as a recurrence (Gu et al., 2022, arXiv 2206.11893)."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import checks, ops
from regard.checkpoint import KeyMap
from regard.layers import Mixer
from regard.registry import register_mixer
from regard.systems.sequence._cab_attention import key_mask


@register_mixer("s4d")
class S4D(Mixer):
    r"""Every channel through `num_heads` linear state space models, then GELU and a linear layer over all of them.

    $$y_t = \sum_{l \ge 0} K_l\, x_{t-l} + D x_t,\quad
      K_l = 2\,\mathrm{Re} \sum_n C_n \frac{e^{\Delta a_n} - 1}{a_n}\, e^{l \Delta a_n},\quad
      a_n = -e^{\rho_n} + i \omega_n$$

    (section 3.3, zero-order hold, B = 1.) a is shared by all channels and begins at S4D-Inv's values (eq. 9), Δ and C are
    each channel's own. Causal, the same is a recurrence of N / 2 complex numbers a channel: $h_t = e^{\Delta a} h_{t-1} +
    x_t$. Not causal, a second set of kernels runs over the future, $l < 0$, from $K'_0$ at l = -1.

    `authors_quirks`: the release ignores masks. (Its argument for both directions is `bidirectional`; `causal` it ignores.)

    Args:
        dim: channels. num_heads: kernels for each channel; any number.
        state_size: N, real numbers of state a kernel; even.
        step_range: between which Δ is drawn at first, uniformly in its logarithm.
        causal: as in `MaskedAttention`.
    """

    dims: ClassVar[tuple[int, ...]] = (1,)
    can_causal: ClassVar[bool] = True
    can_stream: ClassVar[bool] = True
    can_mask: ClassVar[bool] = True
    has_heads: ClassVar[bool] = False
    authors_keys = KeyMap(
        rules=[(r"\bkernel\.kernel\.", ""), (r"\bD$", "skip"), (r"\bC$", "c"), (r"\boutput_linear\b(\.0\b)?", "proj")]
    )

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        state_size: int = 16,
        step_range: tuple[float, float] = (1e-3, 1e-1),
        causal: bool = False,
        authors_quirks: bool = False,
    ) -> None:
        super().__init__()
        checks.positive("dim", dim)
        checks.positive("num_heads", num_heads)
        checks.positive("state_size", state_size)
        checks.divisible("state_size", state_size, "2", 2)
        self.dim, self.num_heads, self.states, self.causal = dim, num_heads, state_size, causal
        self.authors_quirks = authors_quirks
        low, high = (math.log(step) for step in step_range)
        self.log_dt = nn.Parameter(torch.rand(dim) * (high - low) + low)
        self.log_w_real = nn.Parameter(torch.full((1, state_size // 2), math.log(0.5 + 1e-4)))
        place = torch.arange(state_size // 2, dtype=torch.float32)
        self.w_imag = nn.Parameter((state_size / math.pi * (state_size / (1 + 2 * place) - 1))[None])
        rate = torch.complex(torch.full_like(self.w_imag, -0.5), self.w_imag.detach())
        b = torch.randn(1, state_size // 2, dtype=torch.cfloat)
        # So that the state of a constant signal has a variance of 1.
        b = b / (2 * (b / rate).abs().square().sum(-1, keepdim=True)).sqrt()
        directions = num_heads if causal else 2 * num_heads
        self.c = nn.Parameter(
            torch.view_as_real((torch.randn(directions, dim, state_size // 2, dtype=torch.cfloat) * b).contiguous())
        )
        self.skip = nn.Parameter(torch.randn(num_heads, dim))
        self.proj = nn.Linear(num_heads * dim, dim)

    def no_weight_decay(self) -> set[str]:
        """The parameters of the system."""
        return {"c", "log_dt", "log_w_real", "w_imag", "skip"}

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`(B, N, dim)` -> the same shape; mask `(B, N)`, False at padding, which is read as zeros."""
        (length,) = self.check(x)
        if mask is not None:
            mask = key_mask(mask, x)
            x = x if self.authors_quirks else x * mask[..., None]
        kernels = self.kernels(length)
        if not self.causal:
            past, future = kernels.chunk(2)
            kernels = torch.cat([future[..., :-1].flip(-1), past], -1)  # lags 1 - N .. N - 1
        taps = kernels.flatten(0, 1).t()  # (taps, heads dim)
        y = ops.fft_conv(x.repeat(1, 1, self.num_heads), taps, causal=self.causal, skip=self.skip.flatten())
        return self.proj(F.gelu(y.to(x.dtype)))

    def kernels(self, length: int) -> Tensor:
        """K at lags 0 .. length - 1, `(heads, dim, length)`, twice as many heads where it is not causal."""
        rate, readout = self._discrete()
        lags = torch.arange(length, device=rate.device)
        return 2 * torch.einsum("chn,hnl->chl", readout, (rate[..., None] * lags).exp()).real

    def _discrete(self) -> tuple[Tensor, Tensor]:
        """Δa `(dim, N / 2)` and C (e^Δa - 1) / a `(heads, dim, N / 2)`, complex."""
        wide = torch.promote_types(self.c.dtype, torch.float32)
        a = torch.complex(-self.log_w_real.to(wide).exp(), self.w_imag.to(wide))
        rate = a * self.log_dt.to(wide).exp()[:, None]
        return rate, torch.view_as_complex(self.c.to(wide)) * torch.expm1(rate) / a

    def step(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One token `(B, dim)`; the state is h, `(B, dim, N / 2)` complex, of a constant size."""
        if not self.causal:
            raise ValueError("a stream needs a causal mixer: build it with causal=True.")
        rate, readout = self._discrete()
        if state is None:
            state = rate.new_zeros(len(x), *rate.shape)
        state = rate.exp() * state + x[..., None]
        y = 2 * torch.einsum("chn,bhn->bch", readout, state).real
        return self.proj(F.gelu((y + self.skip * x[:, None]).to(x.dtype).flatten(1))), state

    def state_size(self, length: int) -> int:
        """Constant: N real numbers a channel, whatever the number of heads."""
        return self.dim * self.states

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, states={self.states}, causal={self.causal}"
