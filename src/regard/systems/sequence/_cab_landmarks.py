"""Nyströmformer (Xiong et al., 2021, arXiv 2102.03902) and LARA (Zheng et al., 2022, arXiv 2204.04667): attention through
the means of segments.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from regard import checks, ops
from regard.checkpoint import KeyMap
from regard.registry import register_mixer
from regard.systems.sequence._cab_attention import MaskedAttention, heads_first


class Segments(NamedTuple):
    """Tokens cut into consecutive segments of equal lengths, the last ones longer by one where they do not divide.

    Attributes:
        average: `(B or 1, segments, N)`, the weight of every token in the mean of every segment.
        used: `(B or 1, segments)`, False for segments without a token: the first ones, where tokens are fewer.
    """

    average: Tensor
    used: Tensor

    @classmethod
    def of(cls, x: Tensor, segments: int, mask: Tensor | None) -> Segments:
        """Segments of the tokens of x `(B, N, ...)`; padding belongs to none and does not count."""
        mask = torch.ones(1, x.shape[1], dtype=torch.bool, device=x.device) if mask is None else mask
        rank = mask.long().cumsum(1) - 1
        count = mask.long().sum(1, keepdim=True)
        size, longer = count // segments, count % segments
        cut = (segments - longer) * size  # the rank at which the longer segments begin
        index = torch.where(
            rank < cut, rank // size.clamp(min=1), segments - longer + (rank - cut).div(size + 1, rounding_mode="floor")
        )
        member = (index[:, None] == torch.arange(segments, device=x.device)[:, None]) & mask[:, None]
        sizes = member.sum(-1, keepdim=True)
        return cls(member.to(x.dtype) / sizes.clamp(min=1), sizes.squeeze(-1) > 0)

    def means(self, x: Tensor) -> Tensor:
        """`(B, N, heads, d)` -> `(B, segments, heads, d)`."""
        return (self.average @ x.flatten(2)).unflatten(-1, x.shape[2:])


@register_mixer("nystrom")
class NystromAttention(MaskedAttention):
    r"""Softmax attention from its columns and rows at l landmarks (eq. 13 to 15).

    $$o = \mathrm{softmax}(s\,q \tilde K^\top)\, \mathrm{softmax}(s\,\tilde Q \tilde K^\top)^+\,
      \mathrm{softmax}(s\,\tilde Q k^\top)\, v\ (+\,\mathrm{DWConv}(v)),\quad s = d^{-1/2}$$

    Landmarks are the means of l segments. The pseudoinverse comes of 6 steps of order 3 from
    $A^\top / \max_j \sum_i A_{ij}$ (Razavi et al., 2014). Up to l tokens it is plain attention. On 2 and 3 axes segments are
    those of the tokens in row-major order.

    `authors_quirks`: the release has s = 1 / d, the largest column sum of all samples and heads, masks of other samples
    (`heads_first`), and averages padding into landmarks, as zeros.

    Args:
        landmarks: l. kernel_size: taps of the convolution of v along the sequence, one kernel a head; None leaves it out.
        The others: see `MaskedAttention`.
    """

    authors_keys = KeyMap(
        rules=MaskedAttention.authors_keys.rules,
        convert=lambda name, value: {name: value.squeeze(-1) if name.endswith("conv.weight") else value},
    )

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        landmarks: int = 16,
        kernel_size: int | None = None,
        qkv_bias: bool = True,
        causal: bool = False,
        authors_quirks: bool = False,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias=qkv_bias, causal=causal, authors_quirks=authors_quirks)
        checks.positive("landmarks", landmarks)
        self.landmarks, self.conv = landmarks, None
        if kernel_size is not None:
            checks.odd("kernel_size", kernel_size)
            self.conv = nn.Conv1d(
                num_heads, num_heads, kernel_size, padding=kernel_size // 2, groups=num_heads, bias=False
            )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """See the base class."""
        scale, rows, segmented = self.head_dim**-0.5, None, mask
        if mask is not None:
            rows = heads_first(mask, self.num_heads) if self.authors_quirks else mask[:, None]
            v = v * rows.transpose(1, 2)[..., None]
            rows = rows[:, :, None]  # (B, heads or 1, 1, N)
        if self.authors_quirks:
            scale, segmented = 1 / self.head_dim, None
            k = k if rows is None else k * rows.transpose(1, 3).squeeze(2)[..., None]
        if q.shape[1] <= self.landmarks:
            out = ops.attention(q, k, v, mask=rows, scale=scale)
        else:
            out = self._estimate(q, k, v, rows, Segments.of(k, self.landmarks, segmented), scale)
        if self.conv is None:
            return out  # type: ignore[return-value]
        return out + _along(self.conv, v)

    def _estimate(
        self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None, segments: Segments, scale: float
    ) -> Tensor:
        marks_q, marks_k = segments.means(q), segments.means(k)
        used = segments.used[:, None, None]
        logits = torch.einsum("bmhd,blhd->bhml", marks_q, marks_k)
        logits = logits.to(torch.promote_types(q.dtype, torch.float32)) * scale
        middle = logits.masked_fill(~used, -1e30).softmax(-1)
        gathered = ops.attention(marks_q, k, v, mask=rows, scale=scale)
        read = (pseudoinverse(middle, shared=self.authors_quirks).to(v.dtype) @ gathered.transpose(1, 2)).transpose(
            1, 2
        )  # type: ignore[union-attr]
        if segments.used.shape[0] > 1:  # samples of up to l tokens: each landmark is a token
            read = torch.where(segments.used.all(1)[:, None, None, None], read, segments.means(v))
        return ops.attention(q, marks_k, read, mask=used, scale=scale)  # type: ignore[return-value]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, landmarks={self.landmarks}"


def _along(conv: nn.Conv1d, v: Tensor) -> Tensor:
    """A kernel a head along the sequence: `(B, N, heads, d)` -> the same shape."""
    batch, _, heads, width = v.shape
    channels = v.permute(0, 3, 2, 1).reshape(batch * width, heads, -1)
    return conv(channels).view(batch, width, heads, -1).permute(0, 3, 2, 1)


def pseudoinverse(matrix: Tensor, *, steps: int = 6, shared: bool = False) -> Tensor:
    """Of `(..., n, n)` with non-negative entries and rows that sum to 1, approximately.

    Args:
        shared: begin from the largest column sum of all matrices, so that one changes the others'.
    """
    columns = matrix.sum(-2, keepdim=True)
    inverse = matrix.mT / (columns.amax() if shared else columns.amax(-1, keepdim=True))
    one = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    for _ in range(steps):
        product = matrix @ inverse
        inverse = 0.25 * inverse @ (13 * one - product @ (15 * one - product @ (7 * one - product)))
    return inverse


@register_mixer("lara")
class LARAttention(MaskedAttention):
    r"""Linear randomised attention: importance sampling with a proposal a segment, its weights those of the query (eq. 12).

    $$o_i = \sum_c \alpha_{ic} \frac{\sum_j \xi(k_j, w_c)\, v_j}{\sum_j \xi(k_j, w_c)},\quad
      \alpha_{ic} \propto e^{s \mu_c^\top q_i}\,\frac{\xi(q_i, w_c) \sum_j \xi(k_j, w_c)}{\xi(\mu_c, w_c)},\quad
      \xi(x, w) = e^{s (w^\top x - |x|^2 / 2)}$$

    s = d^(-1/2); μ_c is the mean q plus the mean k of segment c; w_c is μ_c with standard normal noise in training, and μ_c
    otherwise. Both sums are softmaxes: of landmarks w over keys with bias -s |k|^2 / 2, and of queries over landmarks.
    (CAB's own proposal; the paper's has learned maps on the segment means.) On 2 and 3 axes segments are those of the
    tokens in row-major order.

    `authors_quirks`: the release leaves padding out of the first sum alone, with masks of other samples (`heads_first`).

    Args:
        landmarks: number of segments. The others: see `MaskedAttention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        landmarks: int = 16,
        qkv_bias: bool = True,
        causal: bool = False,
        authors_quirks: bool = False,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias=qkv_bias, causal=causal, authors_quirks=authors_quirks)
        checks.positive("landmarks", landmarks)
        self.landmarks = landmarks

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """See the base class."""
        scale, rows = self.head_dim**-0.5, None
        if mask is not None:
            rows = heads_first(mask, self.num_heads)[:, :, None] if self.authors_quirks else mask[:, None, None]
        segments = Segments.of(k, self.landmarks, None if self.authors_quirks else mask)
        mean = segments.means(q) + segments.means(k)
        drawn = mean + torch.randn_like(mean) if self.training else mean
        bias = -0.5 * scale * k.square().sum(-1).transpose(1, 2)[:, :, None]  # (B, heads, 1, N)
        stats, lse = ops.attention(drawn, k, v, bias=bias, mask=rows, scale=scale, return_lse=True)
        if self.authors_quirks and rows is not None:
            _, lse = ops.attention(drawn, k, v, bias=bias, scale=scale, return_lse=True)
        own = scale * ((drawn * mean).sum(-1) - 0.5 * mean.square().sum(-1))
        bias = (lse - own).transpose(1, 2)[:, :, None]  # (B, heads, 1, landmarks)
        return ops.attention(q, drawn + mean, stats, bias=bias, mask=segments.used[:, None, None], scale=scale)  # type: ignore[return-value]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, landmarks={self.landmarks}"
