"""Attention through feature maps in CAB: Performer (Choromanski et al., 2021, arXiv 2009.14794), cosFormer (Qin et al.,
2022, arXiv 2202.08791).
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from regard import checks, ops
from regard.ops import LinearState
from regard.registry import register_mixer
from regard.systems.sequence._cab_attention import MaskedAttention, heads_first
from regard.systems.sequence.nprf_rpe import random_directions

EPS = 1e-12
"""Added to denominators: far below what features add up to, it only keeps 0 / 0 from being NaN."""


@register_mixer("performer")
class PerformerAttention(MaskedAttention):
    r"""Softmax attention estimated by positive random features (FAVOR+, section 2.3).

    $$o_i = \frac{\phi(q_i)^\top \sum_j \phi(k_j) v_j^\top}{\phi(q_i)^\top \sum_j \phi(k_j)},\quad
      \phi(x)_l = m^{-1/2} \exp\!\big(d^{-1/4} w_l^\top x - \tfrac12 d^{-1/2} |x|^2\big)$$

    The mean of φ(q)^T φ(k) over w from N(0, I) is the softmax's $e^{q^\top k / \sqrt d}$. w are drawn anew in every forward
    pass of training, and are fixed, orthogonal within every head_dim of them, otherwise. Causal, the sums run up to i; the
    stream keeps them.

    `authors_quirks`: the release adds 1e-4 to the features, each divided by its largest (where |x| is large, little else is
    left), takes denominators below 0.1 for 0.1, gives heads the masks of other samples (`heads_first`), and is not causal
    where it is told to be.

    Args:
        features: m. redraw: draw new w in training. The others: see `MaskedAttention`.
    """

    can_causal: ClassVar[bool] = True
    can_cross: ClassVar[bool] = True
    can_stream: ClassVar[bool] = True
    directions: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        features: int = 16,
        redraw: bool = True,
        qkv_bias: bool = True,
        causal: bool = False,
        authors_quirks: bool = False,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias=qkv_bias, causal=causal, authors_quirks=authors_quirks)
        checks.positive("features", features)
        self.features, self.redraw = features, redraw
        drawn = [random_directions(features, self.head_dim, orthogonal=True) for _ in range(num_heads)]
        self.register_buffer("directions", torch.stack(drawn))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """See the base class."""
        w = torch.randn_like(self.directions) if self.redraw and self.training else self.directions
        if self.authors_quirks:
            return self._released(q, k, v, mask, w)
        log_q, log_k = self._logarithms(q, w), self._logarithms(k, w)
        if mask is not None:
            log_k = log_k.masked_fill(~mask[..., None, None], -1e30)
        if not self.causal:  # the largest key cancels out; that of the future is none of a causal query's business
            log_k = log_k - log_k.detach().amax((1, 3), keepdim=True)
        phi_q, phi_k = (log_q - log_q.detach().amax(-1, keepdim=True)).exp(), log_k.exp()
        return ops.linear_attention(phi_q, phi_k, v.to(phi_k.dtype), causal=self.causal, eps=EPS)  # type: ignore[return-value]

    def _logarithms(self, x: Tensor, w: Tensor) -> Tensor:
        """log φ(x), but for the constant: `(B, N, heads, features)`, float32 at least.

        As w^T x - |x|^2 / 2 is at most |w|^2 / 2, about head_dim / 2, its exponential fits into float32 up to a head_dim
        of 150 without anything taken off.
        """
        x = x.to(torch.promote_types(x.dtype, torch.float32)) * self.head_dim**-0.25
        return torch.einsum("bnhd,hmd->bnhm", x, w.to(x.dtype)) - 0.5 * x.square().sum(-1, keepdim=True)

    def _released(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, w: Tensor) -> Tensor:
        logs = [self._logarithms(x, w) for x in (q, k)]
        halves = [0.5 * x.to(logs[0].dtype).square().sum(-1, keepdim=True) * self.head_dim**-0.5 for x in (q, k)]
        # The release takes off the largest w^T x, not the largest logarithm.
        tops = [
            (log + half).amax(axes, keepdim=True) for log, half, axes in zip(logs, halves, (-1, (1, 3)), strict=True)
        ]
        phi_q, phi_k = (((log - top).exp() + 1e-4) * self.features**-0.5 for log, top in zip(logs, tops, strict=True))
        if mask is not None:
            phi_k = phi_k * heads_first(mask, self.num_heads).transpose(1, 2)[..., None]
        sums = torch.einsum("bnhm,bnhd->bhmd", phi_k, v.to(phi_k.dtype))
        scale = torch.einsum("bnhm,bhm->bnh", phi_q, phi_k.sum(1)).clamp(min=0.1)
        return torch.einsum("bnhm,bhmd->bnhd", phi_q, sums) / scale[..., None]

    def step(self, x: Tensor, state: LinearState | None = None) -> tuple[Tensor, LinearState]:
        """One token `(B, dim)`; the state has a constant size. (Without new w: those of evaluation.)"""
        q, k, v = self._token(x)
        log_q, log_k = (self._logarithms(part, self.directions).squeeze(1) for part in (q, k))
        phi_q = (log_q - log_q.amax(-1, keepdim=True)).exp()
        out, state = ops.linear_attention_step(phi_q, log_k.exp(), v.squeeze(1).to(log_k.dtype), state, eps=EPS)
        return self._read(out, x), state

    def state_size(self, length: int) -> int:
        """Constant: one matrix and one vector a head."""
        return self.num_heads * self.features * (self.head_dim + 1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, features={self.features}, redraw={self.redraw}"


@register_mixer("cosformer")
class CosformerAttention(MaskedAttention):
    r"""Linear attention of ReLU features whose weights fall with the distance like a cosine (eq. 10).

    $$w_{ij} = \mathrm{relu}(q_i)^\top \mathrm{relu}(k_j)\,\cos\frac{\pi (i - j)}{2 M},\quad
      o_i = \frac{\sum_j w_{ij} v_j}{\sum_j w_{ij}}$$

    The cosine of a difference is a sum of two products, so that features [x sin(π i / 2M), x cos(π i / 2M)] do. M is the
    number of tokens of the longer of both sequences, padding not counted; as it depends on the future, the mixer is not
    causal, and in a causal decoder it cannot be the cross attention.

    `authors_quirks`: the release ignores masks.
    """

    dims: ClassVar[tuple[int, ...]] = (1,)
    can_cross: ClassVar[bool] = True

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """See the base class."""
        mask = None if self.authors_quirks else mask
        places = _places(k, mask)
        return self._mix(q, k, v, mask, places, places)

    def attend_context(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """See the base class."""
        mask = None if self.authors_quirks else mask
        return self._mix(q, k, v, mask, _places(q, None), _places(k, mask))

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, places_q: Tensor, places_k: Tensor) -> Tensor:
        wide = places_q.dtype
        q, k, v = q.relu().to(wide), k.relu().to(wide), v.to(wide)
        if mask is not None:
            k = k * mask[..., None, None]
        unit = math.pi / 2 / torch.maximum(places_q[:, -1:], places_k[:, -1:]).clamp(min=1)
        return ops.linear_attention(_turned(q, places_q * unit), _turned(k, places_k * unit), v, eps=1e-6)  # type: ignore[return-value]


def _places(x: Tensor, mask: Tensor | None) -> Tensor:
    """Places of the tokens `(B, N, ...)`, from 1, padding not counted: `(B or 1, N)`, float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (
        torch.arange(1, x.shape[1] + 1, device=x.device, dtype=wide)[None] if mask is None else mask.to(wide).cumsum(1)
    )


def _turned(x: Tensor, angle: Tensor) -> Tensor:
    """`(B, N, heads, d)` and angles `(B or 1, N)` -> `(B, N, heads, 2 d)`."""
    angle = angle[..., None, None]
    return torch.cat([x * angle.sin(), x * angle.cos()], -1)
