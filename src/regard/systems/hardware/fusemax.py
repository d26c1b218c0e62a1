"""FuseMax: Leveraging Extended Einsums to Optimize Attention Accelerator Design (Nayak et al., 2024, arXiv 2406.10491).

Attention written as a cascade of Einsums shows how often it must go through all keys, whatever the hardware: three times
for the usual softmax, twice with local maxima, once if running sums are corrected and the division comes last. The
one-pass cascade keeps a spatial array busy at any length, with a buffer that does not grow. Here the cascades as text that
is counted and run, attention that runs them, and the paper's accelerator model (`regard.systems.hardware._accelerators`).
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import checks
from regard.flops import counted
from regard.layers import Block, Mlp, SoftmaxAttention
from regard.ops.dense import attention_macs
from regard.registry import System, Variant, register_mixer, register_system
from regard.skeletons import Model
from regard.systems.hardware._accelerators import (
    ACCELERATORS,
    array_sizes,
    energy_ratio,
    linear_layers,
    speedup,
    workload,
)
from regard.systems.hardware._einsums import Cascade

__all__ = [
    "ACCELERATORS",
    "CASCADES",
    "Cascade",
    "array_sizes",
    "cascade_attention",
    "energy_ratio",
    "linear_layers",
    "speedup",
    "workload",
]

# Ranks: p queries, m keys (i chunks of j), e and f channels of queries and values. The names are the artefact's.
THREE_PASSES = Cascade("""
    QK[p, m] = sum[e](Q[p, e] * K[m, e])
    GM[p] = max[m](QK[p, m])
    SN[p, m] = exp(QK[p, m] - GM[p])
    SD[p] = sum[m](SN[p, m])
    A[p, m] = SN[p, m] / SD[p]
    AV[p, f] = sum[m](A[p, m] * V[m, f])
""")
"""The numerically stable softmax, as in PyTorch, TensorFlow and FLAT."""

TWO_PASSES = Cascade("""
    QK[p, i, j] = sum[e](Q[p, e] * K[i, j, e]) + PAD[i, j]
    LM[p, i] = max[j](QK[p, i, j])
    SLN[p, i, j] = exp(QK[p, i, j] - LM[p, i])
    SLD[p, i] = sum[j](SLN[p, i, j])
    GM[p] = max[i](LM[p, i])
    PLM[p, i] = exp(LM[p, i] - GM[p])
    SD[p] = sum[i](SLD[p, i] * PLM[p, i])
    SN[p, i, j] = SLN[p, i, j] * PLM[p, i]
    A[p, i, j] = SN[p, i, j] / SD[p]
    AV[p, f] = sum[i, j](A[p, i, j] * V[i, j, f])
""")
"""Maxima of chunks in the first pass, corrected by the global one in the second, as in TileFlow and Choi et al."""

ONE_PASS = Cascade("""
    RM[0, p] = -inf
    RD[0, p] = 0
    RNV[0, p, f] = 0
    QK[i, p, j] = sum[e](Q[p, e] * K[i, j, e]) + PAD[i, j]
    LM[i, p] = max[j](QK[i, p, j])
    RM[i + 1, p] = maximum(RM[i, p], LM[i, p])
    SLN[i, p, j] = exp(QK[i, p, j] - RM[i + 1, p])
    SLD[i, p] = sum[j](SLN[i, p, j])
    SLNV[i, p, f] = sum[j](SLN[i, p, j] * V[i, j, f])
    PRM[i, p] = exp(RM[i, p] - RM[i + 1, p])
    SPD[i, p] = RD[i, p] * PRM[i, p]
    RD[i + 1, p] = SLD[i, p] + SPD[i, p]
    SPNV[i, p, f] = RNV[i, p, f] * PRM[i, p]
    RNV[i + 1, p, f] = SLNV[i, p, f] + SPNV[i, p, f]
    AV[p, f] = RNV[-1, p, f] / RD[-1, p]
""")
"""Running maximum, denominator and numerator, divided in the end (as in FlashAttention-2): what FuseMax maps."""

CASCADES = {1: ONE_PASS, 2: TWO_PASSES, 3: THREE_PASSES}


def cascade_attention(
    q: Tensor, k: Tensor, v: Tensor, *, passes: int = 1, chunk: int = 256, scale: float | None = None
) -> Tensor:
    """Exact softmax attention by a cascade of Einsums, each evaluated as it is written.

    The last chunk is padded (PAD is 0 for keys and -inf for padding, which is not in the paper); the scale, which the
    paper drops, is applied to the queries.

    Args:
        q: `(B, *S, heads, head_dim)`. k, v: `(B, *S_k, kv_heads, head_dim)` and value_dim; kv_heads divides heads.
        passes: over the keys: 1, 2 or 3.
        chunk: keys at a time, for 1 and 2 passes (256: the side of the paper's array).
        scale: None is head_dim ** -0.5.

    Returns:
        `(B, *S, heads, value_dim)`.

    Raises:
        ValueError: for another number of passes, or shapes that do not fit.
    """
    checks.heads_last(q, k, v, same_grid=False)
    checks.no_half_on_cpu("cascade_attention", q)
    checks.positive("chunk", chunk)
    if passes not in CASCADES:
        raise ValueError(f"passes must be 1, 2 or 3, got {passes!r}.")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return counted(attention_macs, partial(_run, passes=passes, chunk=chunk, scale=scale), (q, k, v), {})


def _run(q: Tensor, k: Tensor, v: Tensor, *, passes: int, chunk: int, scale: float) -> Tensor:
    spatial, dtype, group = q.shape[1:-2], q.dtype, q.shape[-2] // k.shape[-2]
    if dtype.itemsize < 4:
        q, k, v = q.float(), k.float(), v.float()
    # Query heads that share keys are further queries: (B, kv_heads, Nq group, head_dim).
    queries = (q * scale).flatten(1, -3).unflatten(2, (k.shape[-2], group)).transpose(1, 2).flatten(2, 3)
    keys, values = (x.flatten(1, -3).transpose(1, 2) for x in (k, v))
    inputs = {"Q": queries, "K": keys, "V": values}
    if passes < 3:
        count = keys.shape[2]
        chunk = min(chunk, count)
        missing = -count % chunk
        padding = queries.new_zeros(1, 1).expand(-(-count // chunk), chunk)
        if missing:
            inputs |= {name: F.pad(inputs[name], (0, 0, 0, missing)) for name in ("K", "V")}
            beyond = torch.arange(count + missing, device=q.device).unflatten(0, (-1, chunk)) >= count
            padding = padding.masked_fill(beyond, -torch.inf)
        inputs |= {name: inputs[name].unflatten(2, (-1, chunk)) for name in ("K", "V")} | {"PAD": padding}
    (out,) = CASCADES[passes].run("AV", **inputs)
    return out.unflatten(2, (-1, group)).transpose(1, 2).flatten(2, 3).unflatten(1, spatial).to(dtype)


@register_mixer("softmax_cascade")
class CascadeAttention(SoftmaxAttention):
    """Multi-head softmax attention that runs one of the paper's cascades.

    The function is that of mixer "softmax"; what differs is what has to be remembered. With one pass that is a chunk of
    logits, with two or three all of them. As in the paper there is no causal mask and no decoding.

    Args:
        dim, num_heads, kv_heads, qkv_bias: as of `SoftmaxAttention`.
        passes, chunk: see `cascade_attention`.
    """

    dims: ClassVar[tuple[int, ...]] = (1, 2, 3)
    can_causal: ClassVar[bool] = False
    can_stream: ClassVar[bool] = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        kv_heads: int | None = None,
        qkv_bias: bool = True,
        passes: int = 1,
        chunk: int = 256,
    ) -> None:
        super().__init__(dim, num_heads, kv_heads=kv_heads, qkv_bias=qkv_bias)
        if passes not in CASCADES:
            raise ValueError(f"passes must be 1, 2 or 3, got {passes!r}.")
        checks.positive("chunk", chunk)
        self.passes, self.chunk = passes, chunk

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
        """By the cascade."""
        return cascade_attention(q, k, v, passes=self.passes, chunk=self.chunk)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, passes={self.passes}, chunk={self.chunk}"


class FuseMaxEncoder(Model):
    """Encoder layers in the sizes that the paper evaluates, on embedded tokens.

    Without biases and norm weights: these are the matrices whose bytes the artefact counts.

    Args:
        dim, num_heads, head_dim: width and heads; the paper's XLM and the others have num_heads head_dim = dim.
        hidden: width of the feed-forward part. depth: number of layers; the tables are of one.
        passes, chunk: see `cascade_attention`.
    """

    def __init__(
        self, dim: int, num_heads: int, hidden: int, depth: int = 1, passes: int = 1, chunk: int = 256
    ) -> None:
        super().__init__()
        self.dim = dim

        def layer() -> Block:
            mixer = CascadeAttention(dim, num_heads, qkv_bias=False, passes=passes, chunk=chunk)
            mixer.proj = nn.Linear(dim, dim, bias=False)
            norm = partial(nn.LayerNorm, elementwise_affine=False)
            return Block(dim, mixer, mlp=Mlp(dim, hidden, bias=False), norm=norm)

        self.layers = nn.Sequential(*(layer() for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, N, dim)` -> the same shape."""
        checks.grid("x", x, (1,), self.dim)
        return self.layers(x)


def _variant(model: str, params: int, gmacs: float) -> Variant:
    at = workload(model, 1024)
    options = {"dim": at.dim, "num_heads": at.heads, "hidden": at.hidden}
    source = (
        "one encoder layer as the artefact evaluates it, 1K tokens: its weights as counted in bytes by end2end-flat.csv "
        "(its mapper loads XLM's several times), multiply-adds of linear layers and of QK and SLNV"
    )
    return Variant(f"fusemax_{model.lower()}", FuseMaxEncoder, params, gmacs, ((1, 1024, at.dim),), source, options)


SYSTEM = register_system(
    System(
        slug="fusemax",
        title="FuseMax: Leveraging Extended Einsums to Optimize Attention Accelerator Design",
        year=2024,
        arxiv="2406.10491",
        evidence="authors_code",
        repo="FPSG-UIUC/micro24-fusemax-artifact",
        idea="Cascades of Einsums tell how many passes over the keys attention takes; the one-pass cascade, mapped onto a "
        "spatial array, keeps it busy at any length. Here cascades as text that is counted and run, and the accelerator "
        "model: time and traffic are the artefact's, energy is approximate (what moves on the chip is fitted to its rows).",
        mixers=("softmax_cascade",),
        variants=(
            _variant("BERT", 7_077_888, 8.8584),
            _variant("TrXL", 12_582_912, 15.0324),
            _variant("T5", 3_145_728, 4.2950),
            _variant("XLM", 50_331_648, 55.8346),
        ),
        reports=(
            "Attention of BERT, TrXL, T5 and XLM, 1K to 1M tokens, on a cloud-sized chip: 6.7x the speed of FLAT at 79 % of "
            "its energy; whole encoder layers 5.3x at 83 %",
            "By parts: the cascade alone on FLAT's chip 0.91x, with the new elements 2.18x, interleaved 6.72x",
            "Utilisation of the 2D array 0.89 at 1K tokens to 0.993 at 1M (BERT), FLAT 0.125 to 64K and 0.108 beyond",
            "Passes of published systems: three in PyTorch, TensorFlow, FLAT and E.T.; two in TileFlow and Choi et al.; one in "
            "FlashAttention(-2) and Rabe and Staats",
        ),
    )
)
