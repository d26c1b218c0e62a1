"""Stable, Fast and Accurate: Kernelized Attention with Relative Positional Encoding (Luo et al., 2021, arXiv 2106.12566).

A relative bias inside the softmax is a Toeplitz factor beside the features of kernelized attention, so that numerator and
denominator become Toeplitz products, which the Fourier transform computes in O(n log n). Queries and keys of length one
bound the error of the random features, and the bias gives back the sharpness that this takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import checks, ops
from regard.layers import Mixer, OffsetTable, heads_of
from regard.ops import LinearState
from regard.registry import System, Variant, register_mixer, register_system
from regard.skeletons.decoder_lm import DecoderLM

Path = Literal["auto", "fft", "dense"]

EPS = 1e-12
"""Added to denominators: far below what features of unit vectors add up to, it only keeps 0 / 0 from being NaN."""

_SLOWER = 4
"""Products of transforms take so many times as long as those of matrices; decides between the two paths."""

_CHUNK = 1 << 22
"""Numbers of one tensor that the transform works on at a time."""


def positive_features(x: Tensor, weight: Tensor, *, normalize: bool = True) -> Tensor:
    r"""Logarithms of positive random features: $\phi(x) = m^{-1/2} e^{-|x|^2/2}\,[e^{w_1 x}, \ldots, e^{w_m x}]$.

    The mean of $\phi(q)^\top\phi(k)$ over w from N(0, I) is $e^{q^\top k}$; its relative variance is
    $(e^{|q + k|^2} - 1)/m$, which is why the lengths of q and k matter so much.

    Args:
        x: `(..., head_dim)`. weight: w, `(m, head_dim)`.
        normalize: divide x by its length (the paper's); otherwise by head_dim^(1/4), so that q^T k is that of the softmax.

    Returns:
        `(..., m)`, float32 at least.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    x = F.normalize(x.to(wide), dim=-1) if normalize else x.to(wide) * x.shape[-1] ** -0.25
    return x @ weight.to(wide).t() - 0.5 * (x.square().sum(-1, keepdim=True) + math.log(weight.shape[0]))


def toeplitz_kernelized(
    q: Tensor, k: Tensor, v: Tensor, factor: Tensor, *, causal: bool = False, path: Path = "auto"
) -> Tensor:
    r"""$z_i = \sum_j c_{j-i}\,\phi(q_i)^\top\phi(k_j)\,v_j \,/ \sum_j c_{j-i}\,\phi(q_i)^\top\phi(k_j)$.

    "fft" convolves the N m (dv + 1) numbers $\phi(k_j)\,[v_j, 1]^\top$ with c, in N m dv log N products; "dense" makes the N
    x N weights, in N^2 (m + dv). They differ in rounding only. "auto" takes what should be faster at this size. Where c
    spans more than the digits of float32 (b from -8 to 8, say), the rounding of the transform shows: "dense" is exact there.

    Args:
        q, k: φ(q) and φ(k), `(B, *S, heads, m)`. v: `(B, *S, heads, dv)`.
        factor: c > 0 for every offset of key minus query, `(heads, *(2 S - 1))`.
        causal: j up to i only; on one axis.

    Returns:
        `(B, *S, heads, dv)`.
    """
    spatial, axes = q.shape[1:-2], q.dim() - 3
    if tuple(factor.shape) != (q.shape[-2], *(2 * side - 1 for side in spatial)):
        raise ValueError(
            f"factor must have one number for each head and offset, {(q.shape[-2], *(2 * side - 1 for side in spatial))}, "
            f"got shape {tuple(factor.shape)}."
        )
    if causal and axes > 1:
        raise ValueError(f"causal attention runs along one axis, got {axes} spatial axes: flatten them first.")
    if checks.one_of("path", path, ("auto", "fft", "dense")) == "auto":
        tokens, m, width = math.prod(spatial), q.shape[-1], v.shape[-1] + 1
        points = tokens * 2**axes
        transform = 2 * m * width * points * math.log2(points)
        path = "fft" if _SLOWER * transform < tokens**2 * (m + width) else "dense"
    values = torch.cat([v, torch.ones_like(v[..., :1])], -1).to(q.dtype)
    sums = (_by_fft if path == "fft" else _by_weights)(q, k, values, factor.to(q.dtype), causal)
    return sums[..., :-1] / (sums[..., -1:] + EPS)


def _by_weights(q: Tensor, k: Tensor, values: Tensor, factor: Tensor, causal: bool) -> Tensor:
    spatial, axes = q.shape[1:-2], q.dim() - 3
    for axis, length in enumerate(spatial):
        factor = factor.unfold(1 + axis, length, 1).flip(1 + axis)
    factor = factor.flatten(1 + axes).flatten(1, axes)  # (heads, N, N), as OffsetTable.matrix
    q, k, values = (x.flatten(1, -3).transpose(1, 2) for x in (q, k, values))
    weights = (q @ k.transpose(-1, -2)) * (factor.tril() if causal else factor)
    return (weights @ values).transpose(1, 2).unflatten(1, spatial)


def _by_fft(q: Tensor, k: Tensor, values: Tensor, factor: Tensor, causal: bool) -> Tensor:
    axes = q.dim() - 3
    if causal:
        factor = factor[:, : q.shape[1]]  # the offsets 1 - N .. 0
    # A convolution adds x at i - o for tap o, and here j = i + offset.
    kernel = factor.flip(tuple(range(1, 1 + axes))).movedim(0, -1)
    q, k, values = (x.movedim(-1, 1) for x in (q, k, values))  # (B, m or dv + 1, *S, heads)
    step = max(1, _CHUNK // max(1, values.numel()))
    total: Any = 0
    for qs, ks in zip(q.split(step, 1), k.split(step, 1), strict=True):
        products = ks[:, :, None] * values[:, None]
        sums = ops.fft_conv(products.flatten(0, 2), kernel, causal=causal).reshape(products.shape)
        total = total + (qs[:, :, None] * sums).sum(1)
    return total.movedim(1, -1)


@register_mixer("nprf_rpe")
class NPRFAttention(Mixer):
    r"""Normalised kernelized attention with relative positions, by fast Fourier transform (sections 3.2 and 3.3).

    $$z_i = \frac{\phi(\bar q_i)^\top \sum_j e^{b_{j-i}}\,\phi(\bar k_j)\,v_j^\top}
                 {\phi(\bar q_i)^\top \sum_j e^{b_{j-i}}\,\phi(\bar k_j)},\quad
      \bar q = q/|q|,\ \bar k = k/|k|,\ \mathrm{out} = W_o\,[z]_{heads}$$

    φ: `positive_features`, one set for all heads, drawn at construction, kept with the weights and not trained. b is
    learned for each head and offset and starts near 0; beyond `size` places it keeps its outermost entries. On 2 and 3
    axes offsets are vectors and the transform has as many axes.

    With `context`, queries come from x, keys and values from the context, and no positions take part (the paper's text at
    hand does not say; two sequences have no offsets).

    Args:
        dim: channels. num_heads: divides dim.
        features: m; None is head_dim.
        size: places along each of `axes` for which there are entries of b.
        normalize: False leaves q and k as long as they are: plain positive random features.
        relative: False leaves b out: plain kernelized attention, linear in N.
        orthogonal: draw the w of every head_dim features orthogonal to each other (as Performer does).
        path: "fft", "dense", or what should be faster at each size; see `toeplitz_kernelized`.
    """

    can_causal: ClassVar[bool] = True
    can_cross: ClassVar[bool] = True
    can_stream: ClassVar[bool] = True
    weight: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        features: int | None = None,
        size: int | Sequence[int] = 128,
        axes: int = 1,
        normalize: bool = True,
        relative: bool = True,
        orthogonal: bool = False,
        qkv_bias: bool = True,
        causal: bool = False,
        path: Path = "auto",
    ) -> None:
        super().__init__()
        self.head_dim = heads_of(dim, num_heads)
        if causal and axes > 1:
            raise ValueError(f"causal attention runs along one axis, got axes={axes}: flatten the grid first.")
        self.dim, self.num_heads, self.causal, self.normalize = dim, num_heads, causal, normalize
        self.axes = axes if relative else None
        self.path = checks.one_of("path", path, ("auto", "fft", "dense"))
        self.features = self.head_dim if features is None else features
        checks.positive("features", self.features)
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=qkv_bias) for _ in range(3))
        self.proj = nn.Linear(dim, dim)
        self.bias = OffsetTable(checks.tuple_of("size", size, axes), num_heads) if relative else None
        self.register_buffer("weight", random_directions(self.features, self.head_dim, orthogonal))

    @classmethod
    def in_stack(cls, index: int, input_size: tuple[int, ...], dim: int, num_heads: int, **options: Any) -> Mixer:
        """One entry of b for every offset of the grid."""
        return cls(dim, num_heads, axes=len(input_size), **{"size": input_size, **options})

    def no_weight_decay(self) -> set[str]:
        """b."""
        return set() if self.bias is None else {"bias.table"}

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """`(B, *S, dim)` -> the same shape; context `(B, *S_c, dim)`."""
        spatial = self.check(x)
        if self.causal and (context is not None or len(spatial) > 1):
            raise ValueError(f"causal attention takes x (batch, length, dim) and no context, got {tuple(x.shape)}.")
        q, k, v = self._mapped(x, x if context is None else context)
        if self.bias is None or context is not None:
            out = ops.linear_attention(q, k, v, causal=self.causal, eps=EPS)
        else:
            out = toeplitz_kernelized(q, k, v, self.bias(spatial).exp(), causal=self.causal, path=self.path)
        return self.proj(out.flatten(-2).to(x.dtype))  # type: ignore[union-attr]

    def _mapped(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """φ(q), φ(k) and v, float32 at least. φ(q) is divided by its largest entry, which z does not notice."""
        q, k, v = (
            part(given).unflatten(-1, (self.num_heads, self.head_dim))
            for part, given in ((self.q, x), (self.k, source), (self.v, source))
        )
        q, k = (positive_features(part, self.weight, normalize=self.normalize) for part in (q, k))
        return (q - q.detach().amax(-1, keepdim=True)).exp(), k.exp(), v.to(k.dtype)

    def step(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """One token `(B, dim)`.

        The state is φ(k) and v of all tokens, as any past offset may have any b; without b it is a `LinearState`.
        """
        q, k, v = self._mapped(x, x)
        if self.bias is None:
            carried: LinearState | None = state
            out, state = ops.linear_attention_step(q, k, v, carried, eps=EPS)
            return self.proj(out.flatten(1).to(x.dtype)), state
        keys, values = k[:, None], v[:, None]
        if state is not None:
            keys, values = torch.cat([state[0], keys], 1), torch.cat([state[1], values], 1)
        count = keys.shape[1]
        past = self.bias((count,))[:, :count].exp().t()  # (t, heads), offsets 1 - t .. 0
        weights = torch.einsum("bhm,bthm,th->bth", q, keys, past.to(q.dtype))
        out = torch.einsum("bth,bthd->bhd", weights, values) / (weights.sum(1)[..., None] + EPS)
        return self.proj(out.flatten(1).to(x.dtype)), (keys, values)

    def state_size(self, length: int) -> int:
        """Features and values of all tokens; without b, one matrix and one vector a head."""
        if self.bias is None:
            return self.num_heads * self.features * (self.head_dim + 1)
        return length * self.num_heads * (self.features + self.head_dim)

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, features={self.features}, normalize={self.normalize}, "
            f"causal={self.causal}, path={self.path}"
        )


def random_directions(features: int, head_dim: int, orthogonal: bool = False) -> Tensor:
    """w, `(features, head_dim)` from N(0, I); orthogonal within every head_dim rows, with independent lengths, if asked."""
    weight = torch.randn(features, head_dim)
    if not orthogonal:
        return weight
    blocks = [
        torch.linalg.qr(torch.randn(head_dim, head_dim))[0][: min(head_dim, features - start)]
        for start in range(0, features, head_dim)
    ]
    return torch.cat(blocks) * weight.norm(dim=-1, keepdim=True)


class NPRFTransformer(DecoderLM):
    """A decoder language model of `NPRFAttention`: pre-norm blocks, no positions besides b, tied head.

    Departure: sizes are this library's; those of the paper's models are not published in the text at hand.

    Args:
        vocab_size: number of different tokens. dim, depth, num_heads, mlp_ratio: as usual.
        length: places for which b has entries. features, normalize, relative, orthogonal, path: see `NPRFAttention`.
        position: absolute positions, for models without b.
    """

    def __init__(
        self,
        vocab_size: int = 256,
        dim: int = 512,
        depth: int = 6,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        length: int = 512,
        features: int | None = None,
        normalize: bool = True,
        relative: bool = True,
        orthogonal: bool = False,
        path: Path = "auto",
        position: Literal["none", "learned", "sine"] = "none",
        tied: bool = True,
        drop_path_rate: float = 0.0,
    ) -> None:
        options: dict[str, Any] = {"features": features, "normalize": normalize, "relative": relative}
        options |= {"orthogonal": orthogonal, "path": path}
        super().__init__(
            vocab_size,
            dim,
            [NPRFAttention(dim, num_heads, size=length, causal=True, **options) for _ in range(depth)],
            mlp_ratio=mlp_ratio,
            position=position,
            length=length,
            tied=tied,
            drop_path_rate=drop_path_rate,
        )


SYSTEM = register_system(
    System(
        slug="nprf_rpe",
        title="Stable, Fast and Accurate: Kernelized Attention with Relative Positional Encoding",
        year=2021,
        arxiv="2106.12566",
        evidence="other_code",
        idea="Relative biases as a Toeplitz factor of kernelized attention, by Fourier transform; unit queries and keys.",
        mixers=("nprf_rpe",),
        variants=(
            Variant(
                "nprf_rpe_lm",
                NPRFTransformer,
                inputs=((1, 512),),
                source="no model is released and no sizes are published in the text at hand: this library's choice",
            ),
        ),
        reports=(
            "Trains from scratch without optimisation problems; better than many efficient Transformers; faster than the "
            "standard one on long sequences (abstract). No public code; figures of its tasks were not at hand",
        ),
    )
)
