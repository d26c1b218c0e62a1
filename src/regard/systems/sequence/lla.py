"""Local Linear Attention: An Optimal Interpolation of Linear and Softmax Attention (Zuo et al., 2025, arXiv 2510.01450).

Softmax attention is the best constant that fits the values around a query; this is the intercept of the best linear map.
It needs one small ridge regression for every query, solved blockwise by conjugate gradients in memory linear in the length.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from regard import checks
from regard.layers import SoftmaxAttention
from regard.registry import System, Variant, register_mixer, register_system
from regard.skeletons.decoder_lm import DecoderLM

Method = Literal["cg", "solve"]
METHODS = ("cg", "solve")
_ROWS = 128
"""Queries of a block of the conjugate gradients."""


class LocalFit(NamedTuple):
    """The regression around every query, on `(..., N, *)`.

    Attributes:
        out: its intercept. slope: rho. denominator: of the weights. peak: the largest scaled score, taken off before exp.
    """

    out: Tensor
    slope: Tensor
    denominator: Tensor
    peak: Tensor


class Settings(NamedTuple):
    """The options of `local_linear_attention` that all of its parts read."""

    ridge: float
    scale: float
    causal: bool
    eps: float = 1e-6
    max_iters: int = 32
    tolerance: float = 1e-8
    authors_quirks: bool = False


def local_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    ridge: float = 0.1,
    causal: bool = False,
    scale: float | None = None,
    method: Method = "cg",
    block_size: int | None = None,
    eps: float = 1e-6,
    max_iters: int = 32,
    tolerance: float = 1e-8,
    authors_quirks: bool = False,
) -> Tensor:
    r"""The intercept b of a linear map fitted to the values, weighted as in softmax attention (the authors' `naive.py`).

    $$\min_{b, W} \sum_j w_{ij} \|v_j - b - W z_{ij}\|^2 + \lambda \omega_i \|W\|^2,\quad
      w_{ij} = e^{\mathrm{scale}\, q_i^\top k_j},\ z_{ij} = k_j - q_i$$

    $$o_i = \frac{\sum_j w_{ij} (1 - z_{ij}^\top \rho_i)\, v_j}{\sum_j w_{ij} (1 - z_{ij}^\top \rho_i)},\quad
      \rho_i = \Big(\sum_j w_{ij} z_{ij} z_{ij}^\top + \lambda \omega_i I\Big)^{-1} \mu_i,\quad
      \omega_i = \sum_j w_{ij},\ \mu_i = \sum_j w_{ij} z_{ij}$$

    A large λ gives softmax attention; a small one returns every linear map of the keys exactly, once more than head_dim keys
    are seen. Weights sum to one and may be negative. (λ is relative to ω, as in the authors' code; the paper adds λ I.)

    Args:
        q: `(B, *S, heads, head_dim)`. k: `(B, *S_k, heads, head_dim)`. v: `(B, *S_k, heads, value_dim)`.
        ridge: λ, above 0.
        causal: query i sees keys up to i + N_k - N (the ends of both are aligned).
        scale: None is head_dim ** -0.5. It is not applied to z.
        method: "cg" works through blocks of queries, with conjugate gradients forward and a closed form backward: Theta(N)
            memory. "solve" writes out all matrices and is differentiated by autograd: Theta(N^2 + N head_dim^2) memory.
        block_size: of "solve": only blocks of so many channels of the matrix are kept.
        eps: moves the denominator away from zero.
        max_iters, tolerance: of "cg", whose residual stops at `tolerance` of its first norm.
        authors_quirks: of "cg": its gradient takes λω for a constant, as the released kernels do.

    Returns:
        `(B, *S, heads, value_dim)`.
    """
    checks.heads_last(q, k, v, same_grid=False)
    checks.positive("ridge", ridge)
    checks.one_of("method", method, METHODS)
    if k.shape[-2] != q.shape[-2]:
        raise ValueError(f"q and k must have equally many heads, got {q.shape[-2]} and {k.shape[-2]}: repeat k and v.")
    if block_size is not None:
        if method != "solve":
            raise ValueError("block_size needs method='solve': the conjugate gradients take the whole matrix.")
        checks.divisible("head_dim", q.shape[-1], "block_size", block_size)
    spatial, wide = q.shape[1:-2], torch.promote_types(q.dtype, torch.float32)
    queries, keys, values = (x.flatten(1, -3).transpose(1, 2).to(wide) for x in (q, k, v))  # (B, heads, N, *)
    if causal and queries.shape[2] > keys.shape[2]:
        raise ValueError(
            f"causal: the first of {queries.shape[2]} queries would see none of {keys.shape[2]} keys: pass more keys."
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    settings = Settings(ridge, scale, causal, eps, max_iters, tolerance, authors_quirks)
    if method == "solve":
        out = solve_fit(queries, keys, values, settings, block_size).out
    else:
        out = _Blockwise.apply(queries, keys, values, settings)
    return out.to(q.dtype).transpose(1, 2).unflatten(1, spatial)


def _weights(q: Tensor, k: Tensor, at: Settings, first: int, ahead: int) -> tuple[Tensor, Tensor]:
    """Weights of queries `first`, ... on keys, and their peaks; keys more than `ahead` places after their query are hidden."""
    scores = at.scale * q @ k.transpose(-1, -2)
    if at.causal:
        places = torch.arange(first, first + q.shape[-2], device=q.device)[:, None] + ahead
        scores = scores.masked_fill(torch.arange(k.shape[-2], device=q.device) > places, -torch.inf)
    peak = scores.amax(-1, keepdim=True)
    return (scores - peak).exp(), peak


def _along(x: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """z_ij . x_i for all pairs, without z: `(..., N, N_k)`."""
    return x @ k.transpose(-1, -2) - (x * q).sum(-1, keepdim=True)


def _moment(weights: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """sum_j weights_ij z_ij: `(..., N, head_dim)`."""
    return weights @ k - weights.sum(-1, keepdim=True) * q


def _intercept(w: Tensor, q: Tensor, k: Tensor, v: Tensor, slope: Tensor, peak: Tensor, eps: float) -> LocalFit:
    weights = w * (1 - _along(slope, q, k))
    total = weights.sum(-1, keepdim=True)  # = omega - mu . rho
    total = total + eps * total.sign()
    return LocalFit((weights / total) @ v, slope, total, peak)


def solve_fit(q: Tensor, k: Tensor, v: Tensor, at: Settings, block_size: int | None = None) -> LocalFit:
    """Every matrix written out and solved, on `(B, heads, N, *)`; differentiable."""
    w, peak = _weights(q, k, at, 0, k.shape[-2] - q.shape[-2])
    size = block_size or q.shape[-1]
    omega, mean = w.sum(-1)[..., None, None, None], (w @ k).unflatten(-1, (-1, size))
    near, keys = q.unflatten(-1, (-1, size)), k.unflatten(-1, (-1, size))
    cross = mean[..., :, None] * near[..., None, :]
    matrix = torch.einsum("...ij,...jtd,...jte->...itde", w, keys, keys) - cross - cross.transpose(-1, -2)
    matrix = matrix + omega * near[..., :, None] * near[..., None, :]
    matrix = matrix + at.ridge * omega * torch.eye(size, dtype=q.dtype, device=q.device)
    slope = torch.linalg.solve(matrix, _moment(w, q, k).unflatten(-1, (-1, size))).flatten(-2)
    return _intercept(w, q, k, v, slope, peak, at.eps)


def _conjugate_gradients(w: Tensor, q: Tensor, k: Tensor, target: Tensor, at: Settings) -> Tensor:
    """x with (sum_j w z zᵀ + λ ω I) x = target for every query; only products with the matrix are formed.

    A query whose residual is small enough stands still; the loop ends when all do.
    """
    ridge = at.ridge * w.sum(-1, keepdim=True)
    x, residual, direction = torch.zeros_like(target), target, target
    size = residual.square().sum(-1, keepdim=True)
    limit = at.tolerance**2 * size
    for _ in range(at.max_iters):
        active = size > limit
        if not active.is_meta and not active.any():
            break
        image = _moment(w * _along(direction, q, k), q, k) + ridge * direction
        step = torch.where(active, size / (direction * image).sum(-1, keepdim=True), 0.0)
        x, residual = x + step * direction, residual - step * image
        before, size = size, residual.square().sum(-1, keepdim=True)
        direction = residual + torch.where(active, size / before, 0.0) * direction
    return x


def blockwise_fit(q: Tensor, k: Tensor, v: Tensor, at: Settings) -> LocalFit:
    """Blocks of queries, each solved by conjugate gradients, on `(B, heads, N, *)`."""
    ahead, fits = k.shape[-2] - q.shape[-2], []
    for first, rows, seen in _blocks(q, k, at.causal):
        queries, keys = q[..., rows, :], k[..., :seen, :]
        w, peak = _weights(queries, keys, at, first, ahead)
        slope = _conjugate_gradients(w, queries, keys, _moment(w, queries, keys), at)
        fits.append(_intercept(w, queries, keys, v[..., :seen, :], slope, peak, at.eps))
    return LocalFit(*(torch.cat(parts, -2) for parts in zip(*fits, strict=True)))


def _blocks(q: Tensor, k: Tensor, causal: bool) -> list[tuple[int, slice, int]]:
    """First query, queries and number of keys of every block."""
    count, keys = q.shape[-2], k.shape[-2]
    stops = [(first, min(first + _ROWS, count)) for first in range(0, count, _ROWS)]
    return [(first, slice(first, stop), keys - count + stop if causal else keys) for first, stop in stops]


class _Blockwise(torch.autograd.Function):
    """`blockwise_fit(...).out`; backward is a second solve with the same matrices."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, at: Settings) -> Tensor:
        fit = blockwise_fit(q, k, v, at)
        ctx.save_for_backward(q, k, v, fit.slope, fit.denominator)
        ctx.settings = at
        return fit.out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, slope, denominator = ctx.saved_tensors
        return (*blockwise_gradients(q, k, v, slope, denominator, grad, ctx.settings), None)


def blockwise_gradients(
    q: Tensor, k: Tensor, v: Tensor, slope: Tensor, denominator: Tensor, grad: Tensor, at: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Gradients of q, k and v, on `(B, heads, N, *)`.

    With S the weights, $G = \nabla o\,V^\top$, $C = G w / \mathrm{den}$, $\beta = \sum_j G S / \mathrm{den}$ and
    $U = \Sigma^{-1} \sum_j C z$, the gradient of mu is $D = 2 \beta \rho - U$ and that of rho, through the matrix,
    $\beta \rho - U$; all else is the chain rule through w and z.
    """
    ahead, grad_q = k.shape[-2] - q.shape[-2], []
    grad_k, grad_v = torch.zeros_like(k), torch.zeros_like(v)
    for first, rows, seen in _blocks(q, k, at.causal):
        near, rho, den, up = (x[..., rows, :] for x in (q, slope, denominator, grad))
        keys = k[..., :seen, :]
        w, _ = _weights(near, keys, at, first, ahead)
        along_rho = _along(rho, near, keys)
        share, gain = w * (1 - along_rho) / den, up @ v[..., :seen, :].transpose(-1, -2)
        pull = gain * w / den
        beta = (gain * share).sum(-1, keepdim=True) / den
        u = _conjugate_gradients(w, near, keys, _moment(pull, near, keys), at)
        d = 2 * beta * rho - u
        along_d, along_u = _along(d, near, keys), _along(u, near, keys)
        inner = along_d - beta + 0.5 * along_rho * (along_u - along_d)
        if not at.authors_quirks:  # λω is part of the matrix, so w acts through it too
            inner = inner + at.ridge * ((u - beta * rho) * rho).sum(-1, keepdim=True)
        through_scores = at.scale * (gain * share + w * inner)
        if not at.authors_quirks:  # eps breaks the invariance to the peak that is taken off all scores
            through_peak = through_scores.sum(-1, keepdim=True)
            through_scores = through_scores.scatter_add(-1, w.argmax(-1, keepdim=True), -through_peak)
        weighted_d, weighted_rho = w * along_d, w * along_rho
        grad_q.append(
            through_scores @ keys
            - w.sum(-1, keepdim=True) * d
            + (pull + weighted_d).sum(-1, keepdim=True) * rho
            - weighted_rho.sum(-1, keepdim=True) * u
        )
        grad_k[..., :seen, :] += (
            through_scores.transpose(-1, -2) @ near
            - (pull + weighted_d).transpose(-1, -2) @ rho
            + w.transpose(-1, -2) @ d
            + weighted_rho.transpose(-1, -2) @ u
        )
        grad_v[..., :seen, :] += share.transpose(-1, -2) @ up
    return torch.cat(grad_q, -2), grad_k, grad_v


@register_mixer("lla")
class LocalLinearAttention(SoftmaxAttention):
    r"""Multi-head attention whose weights are those of `local_linear_attention` (equations there).

    The paper defines the operation; projections and heads are those of softmax attention, which a large ridge gives back. A
    stream keeps all keys and values, and solves for the new query only.

    Args:
        dim: channels. num_heads: divides dim. ridge, method, max_iters, authors_quirks: see `local_linear_attention`.
        kv_heads: below `num_heads`, keys and values are shared between heads.
        qkv_bias: biases of q, k and v. causal: each position sees itself and earlier ones.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        ridge: float = 0.1,
        method: Method = "cg",
        max_iters: int = 32,
        authors_quirks: bool = False,
        kv_heads: int | None = None,
        qkv_bias: bool = True,
        causal: bool = False,
    ) -> None:
        super().__init__(dim, num_heads, kv_heads=kv_heads, qkv_bias=qkv_bias, causal=causal)
        checks.positive("ridge", ridge)
        checks.positive("max_iters", max_iters)
        self.ridge, self.method, self.max_iters = ridge, checks.one_of("method", method, METHODS), max_iters
        self.authors_quirks = authors_quirks

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
        """`(B, *S, num_heads, head_dim)` from keys and values `(B, *S_k, kv_heads, head_dim)`."""
        repeat = self.num_heads // self.kv_heads
        return local_linear_attention(
            q,
            k.repeat_interleave(repeat, -2),
            v.repeat_interleave(repeat, -2),
            ridge=self.ridge,
            causal=causal,
            method=self.method,  # type: ignore[arg-type]
            max_iters=self.max_iters,
            authors_quirks=self.authors_quirks,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ridge={self.ridge}, method={self.method}"


class LocalLinearLM(DecoderLM):
    """A decoder with local linear attention: two layers without short convolutions, as the paper's recall models.

    Args:
        vocab_size: number of different tokens. dim, depth, num_heads, mlp_ratio: as usual. length: the longest context.
        ridge: λ. max_iters: of the conjugate gradients.
    """

    def __init__(
        self,
        vocab_size: int = 8192,
        dim: int = 128,
        depth: int = 2,
        num_heads: int = 2,
        length: int = 256,
        mlp_ratio: float = 4.0,
        ridge: float = 0.1,
        max_iters: int = 32,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(
            vocab_size,
            dim,
            lambda _: LocalLinearAttention(dim, num_heads, ridge=ridge, max_iters=max_iters, causal=True),
            depth=depth,
            mlp_ratio=mlp_ratio,
            position="learned",
            length=length,
            drop_path_rate=drop_path_rate,
        )


SYSTEM = register_system(
    System(
        slug="lla",
        title="Local Linear Attention: An Optimal Interpolation of Linear and Softmax Attention For Test-Time Regression",
        year=2025,
        arxiv="2510.01450",
        evidence="authors_code",
        repo="Yifei-Zuo/FlashLLA",
        idea="The output is the intercept of a linear map fitted around the query, where softmax attention fits a constant.",
        mixers=("lla",),
        variants=(
            Variant(
                "lla_recall",
                LocalLinearLM,
                inputs=((1, 256),),
                source="the release holds the operation and no model; widths are this library's, vocabulary the paper's",
            ),
        ),
        reports=(
            "Error of the best fit where the target is not linear: linear attention Omega(1), softmax O(n^(-3/(d+3))); at the "
            "edge of the data softmax Omega(n^(-3/(d+3))), local linear O(n^(-4/(d+4))) (theory)",
            "Test-time regression of a piecewise linear stream: error falls within every segment; softmax's does not, and "
            "MesaNet's in the first only. In-context regression and associative recall of 8,192 keys: above softmax, Mamba, "
            "GLA, Hyena and Gated DeltaNet (figures); permutation states: on par with softmax",
            "The kernels' memory grows linearly with the length (H200)",
        ),
    )
)
