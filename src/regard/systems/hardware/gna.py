"""Generalized Neighborhood Attention, GNA (Hassani et al., 2025, arXiv 2504.16922).

Neighborhood attention with a stride: so many queries in a row share the window of their leader. Stride 1 is a sliding
window, stride = window are separate blocks. With a stride that suits the tiles of a kernel, all that the tiles compute is
needed; a simulator counts the tiles visited, and so says which stride that is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from regard import checks, ops
from regard.flops import counted
from regard.layouts.tiles import Axis, TileShapes, permute_tokens, unpermute_tokens
from regard.layouts.windows import crop
from regard.registry import System, Variant, register_mixer, register_system
from regard.systems.backbones.dinat import NeighborhoodAttention
from regard.systems.hardware._fused import Problem, attend
from regard.systems.hardware._simulator import Simulation, simulate, smallest_block_sparse_stride
from regard.systems.hardware.fna import Pattern, Result, fused_attention, macs_of, pattern, repeated, tile_shapes

__all__ = [
    "PATTERNS",
    "GeneralizedNeighborhoodAttention",
    "Simulation",
    "permuted_attention",
    "simulate",
    "smallest_block_sparse_stride",
]


def permuted_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kernel_size: Pattern,
    stride: Pattern = 1,
    dilation: Pattern = 1,
    causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    return_lse: bool = False,
    q_tile: Pattern | None = None,
    kv_tile: Pattern | None = None,
) -> Result:
    """`ops.neighborhood_attention` on permuted tokens (section 3.3): the way of the kernels for Hopper and Blackwell.

    Tokens are padded and put in the order of tiles, q in that of `q_tile`, k and v in that of `kv_tile`, so that a
    kernel which knows runs of tokens only works on boxes. It visits key tiles at multiples of their size, as the simulator
    counts them ("static"); ranks are recovered from the number of the tile, and padding is never seen. The result is
    put back.

    Args:
        q, k, v and the pattern: as in `ops.neighborhood_attention`.
        q_tile, kv_tile: tokens of a tile along each axis, by default the legal shapes that multiply the fewest numbers;
            cut to the longest dilation group.

    Returns:
        `(B, *S, heads, value_dim)`, with the log-sum-exp `(B, *S, heads)` if asked for.
    """
    axes = pattern(q, k, v, kernel_size, stride, dilation, causal)
    tiles = tile_shapes(axes, q_tile, kv_tile, aligned=True)
    run = partial(_permuted, axes=axes, tiles=tiles, scale=scale, return_lse=return_lse)
    return counted(macs_of(axes), run, (q, k, v), {})


def _permuted(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    axes: tuple[Axis, ...],
    tiles: TileShapes,
    scale: float | None,
    return_lse: bool,
) -> Result:
    q_tile, kv_tile = tiles
    spatial, gaps = q.shape[1:-2], [axis.dilation for axis in axes]
    scaled = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    queries = _in_tiles(scaled, q_tile, gaps).transpose(-2, -3)
    keys, values = (_in_tiles(repeated(x, q), kv_tile, gaps) for x in (k, v))
    results = attend(queries.contiguous(), keys, values, None, Problem(axes, q_tile, kv_tile, permuted=True))
    out, lse = (_from_tiles(x.transpose(-2, -3), spatial, q_tile, gaps) for x in results)
    return (out, lse.squeeze(-1).to(q.dtype)) if return_lse else out


def _in_tiles(x: Tensor, tile: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """`(B, *S, heads, d)` -> `(B, n1, n2, .., T, heads, d)`; along each axis the tiles of one dilation group after another."""
    axes, batch = len(tile), x.shape[0]
    counts = [-(-size // (side * gap)) for size, side, gap in zip(x.shape[1:], tile, dilation, strict=False)]
    x = permute_tokens(x, tile, dilation).unflatten(0, (batch, *dilation))
    x = x.unflatten(1 + axes, (*counts, x.shape[1 + axes] // torch.Size(counts).numel()))
    order = [place for axis in range(axes) for place in (1 + axis, 1 + axes + axis)]
    x = x.permute(0, *order, *range(1 + 2 * axes, x.dim()))
    for axis in range(axes):
        x = x.flatten(1 + axis, 2 + axis)
    return x


def _from_tiles(x: Tensor, spatial: Sequence[int], tile: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """`(B, n1, n2, .., T, heads, d)` -> `(B, *spatial, heads, d)`: undoes `_in_tiles`."""
    axes = len(tile)
    for axis in reversed(range(axes)):
        x = x.unflatten(1 + axis, (dilation[axis], -1))
    x = x.permute(0, *range(1, 1 + 2 * axes, 2), *range(2, 2 + 2 * axes, 2), *range(1 + 2 * axes, x.dim()))
    return unpermute_tokens(x.flatten(1 + axes, 1 + 2 * axes).flatten(0, axes), spatial, tile, dilation)


@register_mixer("gna")
class GeneralizedNeighborhoodAttention(NeighborhoodAttention):
    r"""Strided neighborhood attention, also to context tokens besides the map (section 3.1).

    Along each axis, in ranks of a dilation group of L tokens, query i has the window of its leader

    $$l = \min(\lfloor i / s \rfloor s + \lfloor s / 2 \rfloor,\; L - 1)$$

    which is `kernel_size` wide and pushed inwards at the borders (see `ops.neighborhood_attention`; causal axes: the
    leader is the last of its `stride` queries, and the window ends at the query). Context is attended to by ordinary
    attention; its result and the window's are merged by their log-sum-exps, so that both share one softmax.

    The authors' modules refuse maps smaller than kernel_size * dilation; here they are padded as in NAT. They leave the
    projection of context tokens to the model around; here it is that of the map.

    Args:
        dim: channels. num_heads: divides dim. axes: number of spatial axes.
        kernel_size, stride, dilation, causal: one value or one for each of `axes`; stride at most kernel_size.
        form: "permuted" tokens with static tiles, "fused" as in FNA, or "op" for `ops.neighborhood_attention`.
        q_tile, kv_tile: tiles of the first two forms; by default the best legal shapes.
    """

    can_cross: ClassVar[bool] = True
    forms: ClassVar[tuple[str, ...]] = ("permuted", "fused", "op")

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        kernel_size: Pattern = 8,
        stride: Pattern = 1,
        dilation: Pattern = 1,
        causal: bool | Sequence[bool] = False,
        axes: int = 2,
        qkv_bias: bool = True,
        form: Literal["permuted", "fused", "op"] = "permuted",
        q_tile: Pattern | None = None,
        kv_tile: Pattern | None = None,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            kernel_size=kernel_size,
            stride=stride,
            dilation=dilation,
            causal=causal,
            axes=axes,
            rel_pos_bias=False,
            qkv_bias=qkv_bias,
        )
        self.form = checks.one_of("form", form, self.forms)
        self.q_tile, self.kv_tile = q_tile, kv_tile

    @classmethod
    def in_stack(
        cls, index: int, input_size: tuple[int, ...], dim: int, num_heads: int, **options: Any
    ) -> GeneralizedNeighborhoodAttention:
        """Windows no wider than the grid; unless given, strides of half a window (1 if causal, so that it streams)."""
        asked = checks.tuple_of("kernel_size", options.pop("kernel_size", 8), len(input_size))
        kernel = [min(width, length) for width, length in zip(asked, input_size, strict=True)]
        options.setdefault("stride", 1 if options.get("causal") else [max(width // 2, 1) for width in kernel])
        return cls(dim, num_heads, kernel_size=kernel, axes=len(input_size), **options)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """`(B, *S, dim)`, and context tokens `(B, n, dim)` that all queries see -> the shape of x."""
        if context is None:
            return super().forward(x)
        spatial = self.check(x)
        checks.grid("context", context, (1,), self.dim)
        q, k, v = self.project(x)
        near = [crop(part, spatial) for part in self._run(q, k, v, return_lse=True)]
        _, k, v = self.qkv(context).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        far = ops.attention(crop(q, spatial), k, v, return_lse=True)
        out, _ = ops.merge_attention(*zip(near, far, strict=True))
        return self.proj(out.flatten(-2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The mechanism without its projections, `(B, *S, heads, head_dim)` -> the same shape."""
        return self._run(q, k, v)

    def _run(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        options |= {"stride": self.stride, "dilation": self.dilation, "causal": self.causal}
        if self.form == "op":
            return ops.neighborhood_attention(q, k, v, kernel_size=self.kernel_size, **options)
        run = permuted_attention if self.form == "permuted" else fused_attention
        return run(q, k, v, kernel_size=self.kernel_size, q_tile=self.q_tile, kv_tile=self.kv_tile, **options)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, form={self.form}"


def _cosmos(kernel: tuple[int, int], stride: tuple[int, int] = (4, 8), dilation: tuple[int, int] = (1, 1)) -> Any:
    tiles = {"q_tile": (4, 8), "kv_tile": (4, 8)}
    return {"input_size": (44, 80), "kernel_size": kernel, "stride": stride, "dilation": dilation, **tiles}


PATTERNS: Mapping[str, dict[str, Any]] = MappingProxyType(
    {
        "sequence_32k": {
            "input_size": 32768,
            "kernel_size": 2048,
            "stride": 256,
            "q_tile": 256,
            "kv_tile": 128,
        },
        "flux_4k": {
            "input_size": (256, 256),
            "kernel_size": (80, 80),
            "stride": (16, 16),
            "q_tile": (16, 16),
            "kv_tile": (16, 8),
        },
        "hunyuan_video": {
            "input_size": (30, 48, 80),
            "kernel_size": (18, 24, 24),
            "stride": (16, 8, 8),
            "q_tile": (4, 8, 8),
            "kv_tile": (2, 8, 8),
        },
        "cosmos_92": _cosmos((12, 24)),
        "cosmos_77": _cosmos((20, 40)),
        "cosmos_55": _cosmos((28, 56)),
        "cosmos_98": _cosmos((4, 16), (1, 1), (11, 5)),
        "cosmos_95": _cosmos((12, 16), (4, 1), (1, 5)),
    }
)
"""Published patterns by name, as arguments of `simulate`, with tiles of the kernels for Blackwell GPUs.

Those of Cosmos-Predict2 (720p, named by their sparsity in per cent) are given for one frame, with tiles of 4 x 8: along
time the windows hold the whole clip.
"""


def _module(axes: int) -> Variant:
    return Variant(
        f"gna_module_{axes}d",
        partial(GeneralizedNeighborhoodAttention, 64, 2, kernel_size=4, stride=2),
        16_640,
        inputs=((1, *[8] * axes, 64),),
        source="count of the authors' module (version 0.21.6)",
        options={"axes": axes},
    )


def _layer(name: str) -> Variant:
    """The attention layer of a published use: 24 heads of 128 channels."""
    config = dict(PATTERNS[name])
    size = config.pop("input_size")
    build = partial(GeneralizedNeighborhoodAttention, 3072, 24)
    return Variant(f"gna_{name}_layer", build, inputs=((1, *size, 3072),), options={"axes": len(size), **config})


SYSTEM = register_system(
    System(
        slug="gna",
        title="Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of Light",
        year=2025,
        arxiv="2504.16922",
        evidence="authors_code",
        repo="SHI-Labs/NATTEN",
        idea="Strided neighborhoods between sliding windows and blocks, with strides chosen by counting visited tiles.",
        mixers=("gna",),
        variants=(_module(1), _module(2), _module(3), _layer("flux_4k"), _layer("hunyuan_video")),
        reports=(
            "End to end on B200, without fine-tuning: 28 % to 46 % faster for Cosmos-7B, HunyuanVideo and FLUX (abstract)",
            "H100, kernel over cuDNN: 1-D (32k tokens, window 2k) 8.3x, with stride 256 12.6x, blocked 13.3x; FLUX 4K "
            "97.4 ms, 16.2 ms, with stride 7.9 ms; HunyuanVideo 283.3 ms, 79.0 ms, with stride 23.4 ms (documentation)",
            "B200: FLUX 4K 43.3 ms, 8.7 ms, with stride 4.1 ms; HunyuanVideo 135.3 ms, 42.2 ms, with stride 13.0 ms "
            "(documentation)",
        ),
    )
)
