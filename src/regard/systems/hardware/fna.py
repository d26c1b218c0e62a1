"""Faster Neighborhood Attention, FNA (Hassani, Hwu and Shi, 2024, arXiv 2403.04690).

Neighborhood attention as products of matrices: a tile of queries, a box in space, against the box of keys around it.
Unfused, the window's entries of each product are kept and a softmax taken; fused, the box of keys is walked tile by tile
with an online softmax, so that attention weights are never stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

from torch import Tensor

from regard import checks, ops
from regard.flops import counted
from regard.layouts.neighborhoods import restore
from regard.layouts.tiles import Axis, TileShapes, best_tiles, fitted, tile_walk
from regard.ops.neighborhood import neighborhood_arguments, neighborhood_macs
from regard.registry import System, Variant, register_mixer, register_system
from regard.systems.backbones.dinat import SYSTEM as DINAT
from regard.systems.backbones.dinat import DiNAT, NeighborhoodAttention
from regard.systems.hardware._fused import Problem, attend, boxes
from regard.systems.hardware._unfused import query_key, weights_value

Pattern = int | Sequence[int]
Result = Tensor | tuple[Tensor, Tensor]


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kernel_size: Pattern,
    stride: Pattern = 1,
    dilation: Pattern = 1,
    causal: bool | Sequence[bool] = False,
    bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    q_tile: Pattern | None = None,
    kv_tile: Pattern | None = None,
) -> Result:
    r"""`ops.neighborhood_attention`, tile by tile with an online softmax (section 3.3).

    For a tile of queries the keys that any of them sees are a box. It is walked in key tiles from its first key; with
    A = scale Q K^T + b, and -inf where a query does not see a key,

    $$m' = \max(m, \mathrm{rowmax} A),\quad s \leftarrow s\, e^{m - m'} + \mathrm{rowsum}\, e^{A - m'},\quad
      O \leftarrow O\, e^{m - m'} + e^{A - m'} V$$

    and the result is O / s with log-sum-exp m + log s. The backward pass makes the weights again from the log-sum-exp, so
    the memory does not depend on the kernel size. Beyond the paper: `stride`, and gradients of the bias.

    Args:
        q, k, v and the pattern: as in `ops.neighborhood_attention`.
        q_tile, kv_tile: tokens of a tile along each axis; by default the legal shapes that multiply the fewest numbers.
            They are cut to the longest dilation group.

    Returns:
        `(B, *S, heads, value_dim)`, with the log-sum-exp `(B, *S, heads)` if asked for.
    """
    axes = pattern(q, k, v, kernel_size, stride, dilation, causal, bias)
    tiles = tile_shapes(axes, q_tile, kv_tile)
    run = partial(_fused, axes=axes, tiles=tiles, bias=bias, scale=scale, return_lse=return_lse)
    return counted(macs_of(axes), run, (q, k, v), {})


def unfused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kernel_size: Pattern,
    stride: Pattern = 1,
    dilation: Pattern = 1,
    causal: bool | Sequence[bool] = False,
    bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    return_weights: bool = False,
    q_tile: Pattern | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """`ops.neighborhood_attention` in three steps: products of boxes, softmax, products of boxes (section 3.2).

    The weights over the window are stored: prod(kernel_size) numbers a query and head.

    Args:
        q, k, v and the pattern: as in `ops.neighborhood_attention`. q_tile: queries of a box along each axis.
        return_weights: also return the weights `(B, *S, heads, prod(kernel_size))`, keys row-major from the window's
            first; those that a causal axis hides are 0.

    Returns:
        `(B, *S, heads, value_dim)`, then the log-sum-exp and the weights if asked for.
    """
    axes = pattern(q, k, v, kernel_size, stride, dilation, causal, bias)
    tile, _ = tile_shapes(axes, q_tile, None)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = repeated(k, q), repeated(v, q)

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        logits = query_key(q * scale, k, axes, tile, bias)
        weights = logits.softmax(-1)
        results = [weights_value(weights, v, axes, tile)]
        results += [logits.logsumexp(-1)] if return_lse else []
        return (*results, weights) if return_weights else tuple(results)

    results = counted(macs_of(axes), run, (q, k, v), {})
    return results if len(results) > 1 else results[0]


def _fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    axes: tuple[Axis, ...],
    tiles: TileShapes,
    bias: Tensor | None,
    scale: float | None,
    return_lse: bool,
) -> Result:
    walks = [tile_walk(axis, side, keys, False, q.device) for axis, side, keys in zip(axes, *tiles, strict=True)]
    scaled = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    queries = boxes(scaled[..., None, :, :], [walk.queries for walk in walks])
    k, v = repeated(k, q)[..., None, :, :], repeated(v, q)[..., None, :, :]
    out, lse = attend(queries, k, v, bias, Problem(axes, *tiles))
    out = restore(out, walks)
    return (out, restore(lse, walks).squeeze(-1).to(q.dtype)) if return_lse else out


def pattern(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: Pattern,
    stride: Pattern,
    dilation: Pattern,
    causal: bool | Sequence[bool],
    bias: Tensor | None = None,
) -> tuple[Axis, ...]:
    """Check what `ops.neighborhood_attention` takes; the pattern along each axis."""
    parts = neighborhood_arguments(q, k, v, kernel_size, stride, dilation, causal, bias)
    return tuple(Axis(*axis) for axis in zip(q.shape[1:-2], *parts, strict=True))


def tile_shapes(
    axes: tuple[Axis, ...], q_tile: Pattern | None, kv_tile: Pattern | None, aligned: bool = False
) -> TileShapes:
    """The tiles asked for, or the best legal ones where none are, cut to the pattern's dilation groups."""
    best = (None, None) if q_tile is not None and kv_tile is not None else best_tiles(axes, aligned)
    q, kv = (
        default if tile is None else checks.tuple_of(name, tile, len(axes))
        for name, tile, default in zip(("q_tile", "kv_tile"), (q_tile, kv_tile), best, strict=True)
    )
    return fitted(q, axes), fitted(kv, axes)  # type: ignore[arg-type]


def macs_of(axes: tuple[Axis, ...]) -> Callable[..., int]:
    """Multiply-adds of the definition as a function of q, k and v."""
    return partial(neighborhood_macs, kernel_size=[axis.kernel for axis in axes])


def repeated(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values with as many heads as q."""
    times = q.shape[-2] // x.shape[-2]
    return x.repeat_interleave(times, -2) if times > 1 else x


@register_mixer("fna")
class FusedNeighborhoodAttention(NeighborhoodAttention):
    """Neighborhood attention computed by the fused walk, the unfused products, or the library's fastest path.

    The equations are those of `NeighborhoodAttention`; only the way differs. So do the defaults: no position bias, as in
    the authors' modules since version 0.17. Those refuse maps smaller than kernel_size * dilation; here they are padded
    as in NAT.

    Args:
        kernel_size, dilation, causal: one value or one for each of `axes`.
        form: "fused", "unfused", or "op" for `ops.neighborhood_attention`.
        q_tile, kv_tile: tiles of the first two forms; by default the best legal shapes.
    """

    forms: ClassVar[tuple[str, ...]] = ("fused", "unfused", "op")

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        kernel_size: Pattern = 7,
        dilation: Pattern = 1,
        causal: bool | Sequence[bool] = False,
        axes: int = 2,
        rel_pos_bias: bool = False,
        qkv_bias: bool = True,
        form: Literal["fused", "unfused", "op"] = "fused",
        q_tile: Pattern | None = None,
        kv_tile: Pattern | None = None,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            kernel_size=kernel_size,
            dilation=dilation,
            causal=causal,
            axes=axes,
            rel_pos_bias=rel_pos_bias,
            qkv_bias=qkv_bias,
        )
        self.form = checks.one_of("form", form, self.forms)
        self.q_tile, self.kv_tile = q_tile, kv_tile

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The mechanism without its projections, `(B, *S, heads, head_dim)` -> the same shape."""
        options: dict[str, Any] = {"dilation": self.dilation, "causal": self.causal, "bias": self.rpb}
        run: Callable[..., Any] = ops.neighborhood_attention
        if self.form == "fused":
            run, options = fused_attention, {**options, "q_tile": self.q_tile, "kv_tile": self.kv_tile}
        elif self.form == "unfused":
            run, options = unfused_attention, {**options, "q_tile": self.q_tile}
        return run(q, k, v, kernel_size=self.kernel_size, **options)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, form={self.form}"


class FusedDiNAT(DiNAT):
    """NAT and DiNAT with fused neighborhood attention; the same parameters under the same names. See `DiNAT`."""

    mixer = FusedNeighborhoodAttention


def _module(axes: int, rel_pos_bias: bool, params: int) -> Variant:
    return Variant(
        f"fna_module_{axes}d" + ("_rpb" if rel_pos_bias else ""),
        partial(FusedNeighborhoodAttention, 64, 2, kernel_size=7),
        params,
        inputs=((1, *[14] * axes, 64),),
        source="count of the authors' module (version 0.17.5)",
        options={"axes": axes, "rel_pos_bias": rel_pos_bias},
    )


SYSTEM = register_system(
    System(
        slug="fna",
        title="Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self Attention at the Threadblock Level",
        year=2024,
        arxiv="2403.04690",
        evidence="authors_code",
        repo="SHI-Labs/NATTEN",
        idea="Neighborhood attention as matrix products of tiles in space: unfused, or fused with an online softmax.",
        mixers=("fna",),
        variants=(
            _module(1, False, 16_640),
            _module(1, True, 16_666),
            _module(2, False, 16_640),
            _module(2, True, 16_978),
            _module(3, False, 16_640),
            _module(3, True, 21_034),
            *(
                replace(variant, name=f"fna_{variant.name}", build=FusedDiNAT)
                for variant in DINAT.variants
                if variant.build is DiNAT
            ),
        ),
        reports=(
            "Unfused GEMM kernels over naive CUDA kernels, improvement of latency on average: single precision 895 % (1-D) "
            "and 272 % (2-D), half precision 496 % (1-D) and 113 % (2-D) (abstract)",
            "Fused kernels over naive ones, half precision, on average: 1607 % (1-D) and 581 % (2-D) (abstract)",
        ),
    )
)
