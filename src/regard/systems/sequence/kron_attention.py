"""How to Capture Higher-order Correlations? Kronecker attention (Alman and Song, 2023, arXiv 2310.04064).

Each query scores all pairs of keys by a product of three vectors, and reads the products of two sets of values: one such
layer sees triples of tokens, which no layer of ordinary attention can. Computed directly it is cubic in the length; where
entries are small, a polynomial in place of the exponential makes it nearly linear.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations_with_replacement
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from regard import checks, ops
from regard.layers import Block, Mixer, heads_of, linear_rates
from regard.layouts import tables
from regard.registry import System, Variant, register_mixer, register_system
from regard.skeletons.base import Model

_TOKENS = 8
"""Of a block of the causal form of order 3; half as many for each further set of keys."""


def kronecker_attention(
    q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], *, causal: bool = False, scale: float | None = None
) -> Tensor:
    r"""$D^{-1} e^{Q (K_1 \oslash K_2)^\top} (V_1 \oslash V_2)$ with the column-wise Kronecker product, for any order t.

    $$o_i = \sum_{jk} p_{ijk}\, v^1_j \odot v^2_k,\quad
      p_{ijk} = \mathrm{softmax}_{jk}\Big(\mathrm{scale} \sum_c q_{ic}\, k^1_{jc}\, k^2_{kc}\Big)$$

    Ordinary attention inside attention: for each j, the query q_i * k1_j reads K2 and V2; a softmax of the logarithms of
    those denominators reads V1 times what came out. N^t head_dim products, of which no N^t weights need be kept (but
    a causal mask is written out, one byte for each).

    Args:
        q: `(B, *S, heads, head_dim)`.
        keys, values: t - 1 of each, `(B, *S_k, heads, head_dim)` and `(B, *S_k, heads, value_dim)`. One of each is
            ordinary attention.
        causal: all of j, k, ... up to i only.
        scale: None is 1 / head_dim, as in the paper's analysis.

    Returns:
        `(B, *S, heads, value_dim)`.
    """
    _check(q, keys, values, causal)
    spatial = q.shape[1:-2]
    q, keys, values = q.flatten(1, -3), [k.flatten(1, -3) for k in keys], [v.flatten(1, -3) for v in values]
    seen = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).tril() if causal else None
    out, _ = _nested(q, keys, values, seen, 1 / q.shape[-1] if scale is None else scale)
    return out.unflatten(1, spatial)


def _nested(
    q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], seen: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Queries `(B, M, heads, d)` -> outputs `(B, M, heads, dv)` and logarithms of denominators `(B, M, heads)`."""
    if len(keys) == 1:
        return ops.attention(q, keys[0], values[0], mask=seen, scale=scale, return_lse=True)  # type: ignore[return-value]
    count = keys[0].shape[1]
    pairs = (q[:, :, None] * keys[0][:, None]).flatten(1, 2)
    inner = None if seen is None else seen.repeat_interleave(count, 0)
    out, lse = (part.unflatten(1, (-1, count)) for part in _nested(pairs, keys[1:], values[1:], inner, scale))
    if seen is not None:
        lse = lse.masked_fill(~seen[..., None], -torch.inf)
    return (lse.softmax(2)[..., None] * out * values[0][:, None]).sum(2), lse.logsumexp(2)


@tables.table
def _multisets(channels: int, degree: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every product of up to `degree` channels: factors `(rank, degree)`, where `channels` stands for 1; how many of them
    are channels; and 1 over the factorials of how often each occurs."""
    sets = list(combinations_with_replacement(range(channels + 1), degree))
    orders = [sum(c < channels for c in one) for one in sets]
    shares = [1 / math.prod(math.factorial(one.count(c)) for c in set(one) - {channels}) for one in sets]
    return np.array(sets).reshape(len(sets), degree), np.array(orders), np.array(shares)


def monomials(x: Tensor, degree: int) -> Tensor:
    """All products of up to `degree` of the channels `(..., d)`, with repetition: `(..., binom(d + degree, degree))`."""
    factors = _multisets(x.shape[-1], degree)[0].to(x.device)
    x = torch.cat([x, torch.ones_like(x[..., :1])], -1)
    out = x[..., factors[:, 0]]
    for column in range(1, degree):
        out = out * x[..., factors[:, column]]
    return out


def polynomial_query(q: Tensor, degree: int, scale: float | None = None) -> Tensor:
    r"""Monomials of q, weighted so that their product with those of the keys is $\sum_{p \le g} s^p / p!$, s the score."""
    _, orders, shares = _multisets(q.shape[-1], degree)
    scale = 1 / q.shape[-1] if scale is None else scale
    return monomials(q, degree) * (shares * scale ** orders.double()).to(q)


def kronecker_attention_low_rank(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    degree: int,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    r"""`kronecker_attention` with the exponential's Taylor polynomial of `degree` g: nearly linear in N.

    With U the monomials of up to g channels, $\tilde A = U_Q (U_{K_1} \oslash U_{K_2})^\top$ has rank r = binom(d + g, g) and

    $$\tilde A (V_1 \oslash V_2) = U_Q \big[(U_{K_1}^\top V_1) \odot (U_{K_2}^\top V_2)\big],$$

    in N r d products. The relative error is about $s^{g+1}/(g+1)!$ for scores up to s. At the default scale entries up to B
    give scores up to B^t, so they have to be small. Polynomials of even degree are positive everywhere, those of odd degree
    are not. The causal form goes block by block: with S the sums over earlier blocks and D those over the tokens of this one
    that are seen, $U_Q [(S_1 + D_1) \odot (S_2 + D_2)]$ is multiplied out, and no D is written down. (The construction is this
    library's reading of the polynomial method that the abstract names.)

    Args and returns: as in `kronecker_attention`.
    """
    _check(q, keys, values, causal)
    spatial, wide = q.shape[1:-2], torch.promote_types(q.dtype, torch.float32)
    query = polynomial_query(q.flatten(1, -3).to(wide), degree, scale)
    mapped = [monomials(k.flatten(1, -3).to(wide), degree) for k in keys]
    ones = [_with_ones(v.flatten(1, -3).to(wide)) for v in values]
    if causal:
        sums = _running(query, mapped, ones)
    else:
        read: Any = 1
        for u, v in zip(mapped, ones, strict=True):
            read = read * torch.einsum("bnhr,bnhc->bhrc", u, v)
        sums = torch.einsum("bnhr,bhrc->bnhc", query, read)
    return (sums[..., :-1] / sums[..., -1:]).to(q.dtype).unflatten(1, spatial)


def _with_ones(v: Tensor) -> Tensor:
    """[V, 1]: the last channel becomes the denominator."""
    return torch.cat([v, torch.ones_like(v[..., :1])], -1)


def _running(query: Tensor, mapped: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """Causal sums: U_Q, then U and [V, 1] of every set, all `(B, N, heads, *)`, -> `(B, N, heads, dv + 1)`."""
    batch, size = query.shape[0], max(2, 2 * _TOKENS >> (len(mapped) - 1))
    query, *parts = (x.transpose(1, 2).flatten(0, 1) for x in (query, *mapped, *values))  # (B heads, N, *)
    keys, values = parts[: len(mapped)], parts[len(mapped) :]
    states = [u.new_zeros(len(u), u.shape[-1], v.shape[-1]) for u, v in zip(keys, values, strict=True)]
    outs = []
    for q, *now in zip(*(x.split(size, 1) for x in (query, *keys, *values)), strict=True):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # products of pairs are too many to keep
            outs.append(checkpoint(_block, q, *states, *now, use_reentrant=False))
        else:
            outs.append(_block(q, *states, *now))
        states = [
            state + u.transpose(-1, -2) @ v
            for state, u, v in zip(states, now[: len(keys)], now[len(keys) :], strict=True)
        ]
    return torch.cat(outs, 1).unflatten(0, (batch, -1)).transpose(1, 2)


def _block(query: Tensor, *parts: Tensor) -> Tensor:
    """The tokens of a block: U_Q, then the sums before it, U and [V, 1] of every set."""
    count = len(parts) // 3
    states, keys, values = (parts[i * count : (i + 1) * count] for i in range(3))
    seen = torch.ones(query.shape[1], query.shape[1], dtype=query.dtype, device=query.device).tril()
    return _multiplied_out(
        query, None, list(zip(states, keys, (seen[..., None] * v[:, None] for v in values), strict=True))
    )


def _multiplied_out(u: Tensor, weight: Tensor | None, sets: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    r"""$\sum_r u_{xr} w_{rc} \prod_m (S_m + D_m)_{rc}$, one set at a time: with its S, and with each token of D.

    Args:
        u: `(G, tokens, *earlier, rank)`; earlier are the tokens that were taken of the sets before.
        weight: `(G, rank, channels)`; None is 1. sets: S `(G, rank, channels)`, U `(G, tokens, rank)`, and for each
            query the values that it sees `(G, tokens, tokens, channels)`.

    Returns:
        `(G, tokens, *earlier, channels)`.
    """
    if not sets:
        assert weight is not None
        return (u.flatten(1, -2) @ weight).unflatten(1, u.shape[1:-1])
    (state, keys, values), *rest = sets
    before = _multiplied_out(u, state if weight is None else weight * state, rest)
    if weight is None and not rest:
        within = (u.flatten(1, -2) @ keys.transpose(-1, -2)).unflatten(1, u.shape[1:-1])[..., None]
    else:
        beside = keys.view(len(keys), *[1] * (u.dim() - 2), *keys.shape[1:])
        within = _multiplied_out(u[..., None, :] * beside, weight, rest)
    values = values.view(*values.shape[:2], *[1] * (u.dim() - 3), *values.shape[2:])
    return before + (within * values).sum(-2)


def _check(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], causal: bool) -> None:
    if len(keys) != len(values) or not keys:
        raise ValueError(f"keys and values must be as many, at least one each, got {len(keys)} and {len(values)}.")
    for k, v in zip(keys, values, strict=True):
        checks.heads_last(q, k, v, same_grid=causal)
        if k.shape != keys[0].shape or v.shape != values[0].shape or k.shape[-2] != q.shape[-2]:
            raise ValueError(
                "all keys must have one shape, all values one, and q as many heads: got "
                f"{[tuple(x.shape) for x in (q, *keys, *values)]}."
            )


@register_mixer("kron_attention")
class KroneckerAttention(Mixer):
    r"""Attention over pairs of tokens, with linear maps of x for the query, both keys and both values, and heads.

    $$\mathrm{out} = W_o\,\big[D^{-1} e^{Q (K_1 \oslash K_2)^\top / d} (V_1 \oslash V_2)\big]_{heads}$$

    The paper defines the operation on given matrices; projections, heads, causal masks and training are this library's.

    Args:
        dim: channels. num_heads: divides dim.
        order: t; 3 reads pairs, 2 is ordinary attention (but for its scale), 4 reads triples.
        degree: None computes exactly, in N^t; a polynomial of this even degree approximates, in N binom(d + degree,
            degree) d: keep head_dim small.
        bound: B; entries of queries and keys are limited to B tanh(x / B). None is no limit, and 1 with a degree.
        scale: of the scores; None is 1 / head_dim.
    """

    can_causal: ClassVar[bool] = True
    can_cross: ClassVar[bool] = True
    can_stream: ClassVar[bool] = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        order: int = 3,
        degree: int | None = None,
        bound: float | None = None,
        scale: float | None = None,
        qkv_bias: bool = True,
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.head_dim = heads_of(dim, num_heads)
        if order < 2:
            raise ValueError(f"order must be at least 2 (ordinary attention), got {order}.")
        if degree is not None and (degree < 2 or degree % 2):
            raise ValueError(f"degree must be even and at least 2, so that no weight is negative, got {degree}.")
        if bound is not None:
            checks.positive("bound", bound)
        self.dim, self.num_heads, self.causal, self.order, self.degree = dim, num_heads, causal, order, degree
        self.scale = 1 / self.head_dim if scale is None else scale
        self.bound = 1.0 if bound is None and degree is not None else bound
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.k, self.v = (nn.Linear(dim, (order - 1) * dim, bias=qkv_bias) for _ in range(2))
        self.proj = nn.Linear(dim, dim)

    @classmethod
    def in_stack(cls, index: int, input_size: tuple[int, ...], dim: int, num_heads: int, **options: Any) -> Mixer:
        """Exact up to 128 tokens; beyond, unless told otherwise, a polynomial of degree 2."""
        options.setdefault("degree", None if math.prod(input_size) <= 128 else 2)
        return cls(dim, num_heads, **options)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """`(B, *S, dim)` -> the same shape; context `(B, *S_c, dim)`. Causal order on several axes is row-major."""
        self.check(x)
        if context is not None and self.causal:
            raise ValueError("a causal mixer takes no context: build it with causal=False for cross attention.")
        q, keys, values = self._project(x, x if context is None else context)
        if self.degree is None:
            out = kronecker_attention(q, keys, values, causal=self.causal, scale=self.scale)
        else:
            options: dict[str, Any] = {"degree": self.degree, "causal": self.causal, "scale": self.scale}
            out = kronecker_attention_low_rank(q, keys, values, **options)
        return self.proj(out.flatten(-2))

    def _project(self, x: Tensor, source: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        q = self.q(x).unflatten(-1, (self.num_heads, self.head_dim))
        keys, values = (
            list(part(source).unflatten(-1, (self.order - 1, self.num_heads, self.head_dim)).unbind(-3))
            for part in (self.k, self.v)
        )
        if self.bound is not None:
            q, *keys = (self.bound * torch.tanh(part / self.bound) for part in (q, *keys))
        return q, keys, values

    def step(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """One token `(B, dim)`.

        The state is all keys and values, exactly; with a degree the sums of U [V, 1]^T of each of their sets.
        """
        q, keys, values = self._project(x[:, None], x[:, None])
        if self.degree is None:
            if state is not None:
                keys, values = (
                    [torch.cat(pair, 1) for pair in zip(*both, strict=True)]
                    for both in zip(state, (keys, values), strict=True)
                )
            return self.proj(kronecker_attention(q, keys, values, scale=self.scale).flatten(1)), (keys, values)
        wide = torch.promote_types(x.dtype, torch.float32)
        new = [
            (monomials(k.to(wide), self.degree)[..., None] * _with_ones(v.to(wide))[..., None, :]).squeeze(1)
            for k, v in zip(keys, values, strict=True)
        ]
        state = new if state is None else [a + b for a, b in zip(state, new, strict=True)]
        query = polynomial_query(q.to(wide), self.degree, self.scale).squeeze(1)
        sums = (query[..., None, :] @ math.prod(state[1:], start=state[0])).squeeze(-2)
        return self.proj((sums[..., :-1] / sums[..., -1:]).flatten(1).to(x.dtype)), state

    def state_size(self, length: int) -> int:
        """All keys and values; with a degree, one matrix of rank x (head_dim + 1) a head and set: constant."""
        if self.degree is None:
            return 2 * (self.order - 1) * length * self.dim
        rank = math.comb(self.head_dim + self.degree, self.degree)
        return (self.order - 1) * self.num_heads * rank * (self.head_dim + 1)

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, order={self.order}, degree={self.degree}, bound={self.bound}, "
            f"causal={self.causal}"
        )


class KroneckerTransformer(Model):
    """Vectors in, logits for each of them out: linear, blocks of `KroneckerAttention`, LayerNorm, linear.

    The paper has no model; this one asks what a layer can find among tokens, without positions. Scores are scaled by
    head_dim^(-1/2), and the matrices of queries and keys start such that their entries vary by about 1: so do the scores
    then, of any order. (With 1 / head_dim the softmax would start flat.)

    Args:
        in_features: width of the input vectors. num_classes: of the answers.
        dim, depth, num_heads, mlp_ratio: as usual. order, degree, bound: see `KroneckerAttention`.
    """

    def __init__(
        self,
        in_features: int = 6,
        num_classes: int = 2,
        dim: int = 64,
        depth: int = 1,
        num_heads: int = 4,
        mlp_ratio: float = 2.0,
        order: int = 3,
        degree: int | None = None,
        bound: float | None = None,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.embed = nn.Linear(in_features, dim)
        self.blocks = nn.Sequential(
            *(
                Block(
                    dim,
                    KroneckerAttention(
                        dim, num_heads, order=order, degree=degree, bound=bound, scale=heads_of(dim, num_heads) ** -0.5
                    ),
                    mlp_ratio=mlp_ratio,
                    drop_path=rate,
                )
                for rate in linear_rates(drop_path_rate, depth)
            )
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)
        for block in self.blocks:
            for projection in (block.mixer.q, block.mixer.k):
                nn.init.normal_(projection.weight, std=dim**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, N, in_features)` -> logits `(B, N, num_classes)`."""
        return self.head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """`(B, N, in_features)` -> `(B, N, dim)` after the last norm."""
        checks.grid("x", x, (1,), self.in_features)
        return self.norm(self.blocks(self.embed(x)))


_NO_COUNT = "the paper defines an operation and no model; sizes are this library's"

SYSTEM = register_system(
    System(
        slug="kron_attention",
        title="How to Capture Higher-order Correlations? Generalizing Matrix Softmax Attention to Kronecker Computation",
        year=2023,
        arxiv="2310.04064",
        evidence="abstract_only",
        idea="A softmax over all pairs of keys, read through products of two sets of values; low rank where entries are small.",
        mixers=("kron_attention",),
        variants=(
            Variant("kron_attention_order3", KroneckerTransformer, inputs=((1, 12, 6),), source=_NO_COUNT),
            Variant(
                "kron_attention_order4",
                KroneckerTransformer,
                inputs=((1, 12, 6),),
                source=_NO_COUNT,
                options={"order": 4},
            ),
        ),
        reports=(
            "No experiments. Entries o((log n)^(1/3)): an approximation in n^(1+o(1)) time; entries Omega((log n)^(1/3)): "
            "n^(3-o(1)) is needed under SETH; for order t the threshold is (log n)^(1/t) (abstract)",
        ),
    )
)
