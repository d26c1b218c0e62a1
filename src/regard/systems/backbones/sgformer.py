"""SG-Former: Self-guided Transformer with Evolving Token Reallocation (Ren et al., 2023, arXiv 2308.12216).

Blocks come in pairs. The first attends to the whole map coarsely and to windows finely, and notes which tokens were
attended to. The second merges the others into few tokens and keeps those that matter fine, and attends to the result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from regard import checks, ops
from regard.checkpoint import KeyMap
from regard.layers import (
    Block,
    Conv2d,
    GlobalNorm,
    Mixer,
    Mlp,
    PositionTable,
    conv,
    depthwise,
    fan_out_init,
    heads_of,
    sincos,
)
from regard.layouts.windows import crop, map_windows, pad_to_multiple
from regard.registry import System, image_variant, register_mixer, register_system
from regard.skeletons import Hierarchical, Place, places

_norm = partial(nn.LayerNorm, eps=1e-6)


class _Localised(Mixer):
    """What the three attentions share: $W_o (\\mathrm{attention}(x) + \\mathrm{DWConv}_{3 \\times 3}(x W_l))$."""

    def __init__(self, dim: int, num_heads: int, axes: int) -> None:
        super().__init__()
        self.head_dim = heads_of(dim, num_heads)
        self.dim, self.num_heads, self.axes = dim, num_heads, axes
        self.local = nn.Sequential(nn.Linear(dim, dim), depthwise(dim, 3, dims=axes))
        self.proj = nn.Linear(dim, dim)

    def _heads(self, x: Tensor) -> Tensor:
        """`(..., channels)` -> `(..., heads, head_dim)`."""
        return x.unflatten(-1, (-1, self.head_dim))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}"


class LocalisedAttention(_Localised):
    """Dense attention with the local term: what stages without reduction use."""

    def __init__(self, dim: int, num_heads: int, *, axes: int = 2, qkv_bias: bool = True) -> None:
        super().__init__(dim, num_heads, axes)
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        self.check(x)
        k, v = (self._heads(t) for t in self.kv(x).chunk(2, -1))
        return self.proj(ops.attention(self._heads(self.q(x)), k, v).flatten(-2) + self.local(x))  # type: ignore[union-attr]


def attention_received(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Dense attention `(B, N, heads, head_dim)`, and the mean weight that each key gets over queries and heads `(B, Nk)`."""
    q, k, v = (x.transpose(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
    weights = (q @ k.mT).softmax(-1)
    return (weights @ v).transpose(1, 2), weights.detach().mean((1, 2))


class HybridScaleAttention(_Localised):
    r"""One half of the heads attends to the map at coarse scale, the other inside windows (section 3.2).

    $$\mathrm{out} = W_o\,([A_1 V_1, A_2 V_2] + \mathrm{DWConv}(x W_l)),\quad
      K_1, V_1 = \mathrm{GELU}(\mathrm{LN}(\mathrm{conv}_{s, \mathrm{stride} s}(x)))\,W_{kv1}$$

    with A₁ over all coarse tokens and A₂ over the tokens of a window. The saliency of a token is the mean weight that it
    gets from the queries of its window, plus the one that its coarse token gets from all; no gradient flows through it.

    A side that is no multiple of the reduction is zero-padded at its end for the coarse tokens; windows at the end of a
    map that is no multiple of them are smaller. The authors' code refuses such maps.

    Args:
        dim: channels. num_heads: at least 2; half of them, rounded down, are coarse.
        reduction: s, tokens that a coarse one stands for along each axis. window_size: of the other half.
        axes: number of spatial axes.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        reduction: int = 8,
        window_size: int = 7,
        axes: int = 2,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__(dim, num_heads, axes)
        checks.positive("reduction", reduction)
        checks.positive("window_size", window_size)
        if num_heads < 2:
            raise ValueError(f"num_heads must be at least 2, one for each scale, got {num_heads}.")
        self.reduction, self.window_size = reduction, window_size
        coarse = num_heads // 2 * self.head_dim
        self.reduce = nn.Sequential(conv(axes)(dim, dim, reduction, stride=reduction), nn.LayerNorm(dim), nn.GELU())
        self.q1 = nn.Linear(dim, coarse, bias=qkv_bias)
        self.kv1 = nn.Linear(dim, 2 * coarse, bias=qkv_bias)
        self.q2 = nn.Linear(dim, dim - coarse, bias=qkv_bias)
        self.kv2 = nn.Linear(dim, 2 * (dim - coarse), bias=qkv_bias)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        return self.with_saliency(x)[0]

    def with_saliency(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`(B, *S, dim)` -> the same shape, and the saliency of every token `(B, *S)`."""
        spatial = self.check(x)
        coarse = self.reduce(pad_to_multiple(x, [self.reduction] * self.axes))
        tokens = [self._heads(t.flatten(1, -2)) for t in (self.q1(x), *self.kv1(coarse).chunk(2, -1))]
        out, received = attention_received(*tokens)
        saliency = received.unflatten(1, coarse.shape[1:-1])
        for axis in range(self.axes):
            saliency = saliency.repeat_interleave(self.reduction, 1 + axis)
        near = map_windows(self._window, [self.window_size] * self.axes, self.q2(x), *self.kv2(x).chunk(2, -1))
        out = torch.cat([out.flatten(2).unflatten(1, spatial), near[..., :-1]], -1)
        return self.proj(out + self.local(x)), near[..., -1].detach() + crop(saliency, spatial)

    def _window(self, *qkv: Tensor) -> Tensor:
        """Windows `(N, *size, channels)` -> attention inside them, with the saliency as one more channel."""
        out, received = attention_received(*(self._heads(t.flatten(1, -2)) for t in qkv))
        return torch.cat([out.flatten(2), received[..., None]], -1).unflatten(1, qkv[0].shape[1:-1])


@register_mixer("self_guided")
class SelfGuidedAttention(_Localised):
    r"""Attention to tokens that were merged according to their saliency (section 3.3).

    $$\mathrm{out} = W_o\,(\mathrm{softmax}(d^{-1/2} Q K^\top) V + \mathrm{DWConv}(x W_l)),\quad
      K, V \text{ from } [m_1(x_{low}), m_2(x_{middle}), m_3(x_{high})]$$

    Tokens are sorted by saliency into the lowest quarter, the middle half and the highest quarter (with two runs: two
    halves). Neighbours in that order form runs of r tokens; a learned sum $m(x) = \sum_i w_i x_i + b$, the same for all
    channels, merges each run to one. The last run of a part is filled up with zeros. No gradient flows through the order.

    In the paper the saliency comes from the `HybridScaleAttention` of the block before. Alone, the mixer sorts by the
    weight that the mean query pays to each token; in a stack, the two take turns, each by itself.

    Departure: the authors' code sorts twice, by rows and by columns, for the two halves of the heads. The two orders
    differ in ties only; here there is one.

    Args:
        dim: channels. num_heads: at least 2.
        runs: r of each part, the least salient first: three, two or one number.
        axes: number of spatial axes.
    """

    def __init__(
        self, dim: int, num_heads: int, *, runs: Sequence[int] = (196, 56, 28), axes: int = 2, qkv_bias: bool = True
    ) -> None:
        super().__init__(dim, num_heads, axes)
        if not 1 <= len(runs) <= 3:
            raise ValueError(f"runs must hold one to three numbers, got {tuple(runs)!r}.")
        self.runs = checks.tuple_of("runs", tuple(runs), len(runs))
        if num_heads < 2:
            raise ValueError(f"num_heads must be at least 2, got {num_heads}.")
        first = num_heads // 2 * self.head_dim
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv1 = nn.Linear(dim, 2 * first, bias=qkv_bias)
        self.kv2 = nn.Linear(dim, 2 * (dim - first), bias=qkv_bias)
        self.merges = nn.ModuleList(nn.Linear(run, 1) for run in runs)

    @classmethod
    def in_stack(cls, index: int, input_size: tuple[int, ...], dim: int, num_heads: int, **options: Any) -> Mixer:
        """Hybrid-scale and self-guided attention in turn, reduced as in the paper's stages relative to the map."""
        if index % 2 == 0:
            reduction = -(-max(input_size) // 7)
            return HybridScaleAttention(dim, num_heads, reduction=reduction, axes=len(input_size))
        tokens = math.prod(input_size)
        runs = tuple(max(tokens // share, 1) for share in (16, 56, 112))
        return cls(dim, num_heads, **{"runs": runs, "axes": len(input_size), **options})

    def forward(self, x: Tensor, saliency: Tensor | None = None) -> Tensor:
        """`(B, *S, dim)`, saliency `(B, *S)` -> the shape of x."""
        spatial = self.check(x)
        q, tokens = self._heads(self.q(x)), x.flatten(1, -2)
        if saliency is None:
            saliency = self._own_saliency(q, tokens)
        elif saliency.shape != x.shape[:-1]:
            raise ValueError(
                f"saliency must be {tuple(x.shape[:-1])}, one number a token, got {tuple(saliency.shape)}."
            )
        # ONNX knows no stable sort by that name, but its sort leaves equal values in the order of their places.
        stable = {} if torch.compiler.is_exporting() else {"stable": True}
        order = saliency.flatten(1).sort(dim=1, **stable).indices
        few = self._merge(tokens.gather(1, order[..., None].expand_as(tokens)))
        k, v = (torch.cat(pair, -2) for pair in zip(*(self._keys(m, few) for m in (self.kv1, self.kv2)), strict=True))
        out = ops.attention(q, k, v)
        return self.proj(out.flatten(-2).view(*x.shape[:1], *spatial, self.dim) + self.local(x))  # type: ignore[union-attr]

    def _keys(self, layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        k, v = layer(x).chunk(2, -1)
        return self._heads(k), self._heads(v)

    def _merge(self, x: Tensor) -> Tensor:
        """Sorted tokens `(B, N, dim)` -> merged tokens `(B, n, dim)`."""
        count = x.shape[1]
        cuts = {1: [], 2: [count // 2], 3: [count // 4, count // 4 * 3]}[len(self.runs)]
        parts = []
        for part, run, merge in zip(x.tensor_split(cuts, 1), self.runs, self.merges, strict=True):
            part = pad_to_multiple(part, [run])
            parts.append(merge(part.unflatten(1, (part.shape[1] // run, run)).mT).squeeze(-1))
        return torch.cat(parts, 1)

    def _own_saliency(self, q: Tensor, tokens: Tensor) -> Tensor:
        keys, _ = self._keys(self.kv1, tokens)
        mean = q.detach().flatten(1, -3).mean(1)[..., : keys.shape[-2], :]
        return torch.einsum("bhd,bnhd->bnh", mean * self.head_dim**-0.5, keys.detach()).softmax(1).mean(-1)


class LocalMlp(Mlp):
    """fc2(GELU(u + DWConv(u))) with u = fc1(x)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__(dim, hidden)
        self.local = depthwise(hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, W, dim)` -> the same shape."""
        x = self.fc1(x)
        return self.fc2(self.act(x + self.local(x)))


class GuidedStage(nn.Module):
    """Blocks of hybrid-scale attention, each guiding the self-guided block after it, and a LayerNorm.

    Args:
        blocks: where they are. reduction: of the hybrid blocks; with 1 all blocks have dense attention. window_size: theirs.
        runs: of the self-guided blocks. ratio: hidden width of the MLPs.
    """

    def __init__(
        self, blocks: Sequence[Place], reduction: int, runs: Sequence[int], ratio: float, window_size: int
    ) -> None:
        super().__init__()

        def mixer(at: Place) -> Mixer:
            if reduction == 1:
                return LocalisedAttention(at.dim, at.num_heads)
            if at.index % 2:
                return SelfGuidedAttention(at.dim, at.num_heads, runs=runs)
            return HybridScaleAttention(at.dim, at.num_heads, reduction=reduction, window_size=window_size)

        self.blocks = nn.ModuleList(
            Block(at.dim, mixer(at), mlp=LocalMlp(at.dim, int(at.dim * ratio)), norm=_norm, drop_path=at.drop_path)
            for at in blocks
        )
        self.norm = _norm(blocks[0].dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, W, dim)` -> the same shape."""
        saliency = None
        for block in self.blocks:
            mixed = block.norm1(x)
            if isinstance(block.mixer, HybridScaleAttention):
                mixed, saliency = block.mixer.with_saliency(mixed)
            elif isinstance(block.mixer, SelfGuidedAttention):
                mixed = block.mixer(mixed, saliency)
            else:
                mixed = block.mixer(mixed)
            x = x + block.drop_path(mixed)
            x = x + block.drop_path(block.mlp(block.norm2(x)))
        return self.norm(x)


def _conv(in_chans: int, dim: int, kernel_size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution without bias and a GroupNorm of one group."""
    padding = kernel_size // 2
    return nn.Sequential(
        Conv2d(in_chans, dim, kernel_size, stride, padding, groups=groups, bias=False), GlobalNorm(dim)
    )


class SGFormer(Hierarchical):
    """Convolutional stem with a position table, stages of block pairs, convolutions of stride 2 between them, mean, linear.

    Args:
        dims, depths, num_heads, mlp_ratios: of each stage.
        reductions: of the hybrid attention of each stage; 1 is dense attention. window_size: of its other half.
        runs: how many tokens are merged to one in each stage, the least salient first; see `SelfGuidedAttention`.
        img_size: the position table is built for it; images of other sizes run too.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0.
    """

    authors_keys = KeyMap(
        rules=[
            (r"^pos_embed$", "stem.1.table"),
            (r"^patch_embed1\.conv\.(\d)\.", r"stem.0.\1."),
            (r"^patch_embed1\.norm\.", "stem.0.5."),
            (r"^patch_embed(\d)\.conv(\d)\.", lambda m: f"downs.{int(m[1]) - 1}.{2 * int(m[2]) - 2}."),
            (r"\.c\.weight$", ".0.weight"),
            (r"\.bn\.", ".1."),
            (r"^block(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.0.blocks."),
            (r"^norm(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.0.norm."),
            (r"(^|\.)lepe_linear\.", r"\1local.0."),
            (r"(^|\.)lepe_conv\.", r"\1local.1."),
            (r"(attn\.|hybrid\.)sr\.", r"\1reduce.0."),
            (r"(attn\.|hybrid\.)norm\.", r"\1reduce.1."),
            (r"(attn|guided)\.f(\d)\.", lambda m: f"{m[1]}.merges.{int(m[2]) - 1}."),
            (r"\.attn\.", ".mixer."),
            (r"\.dwconv\.dwconv\.", ".local."),
        ]
    )

    def __init__(
        self,
        *,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 4, 16, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        reductions: Sequence[int] = (8, 4, 2, 1),
        runs: Sequence[Sequence[int]] = ((196, 56, 28), (49, 14, 7), (2, 1), (1,)),
        mlp_ratios: Sequence[float] = (4, 4, 4, 4),
        window_size: int = 7,
        img_size: int = 224,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        strides = [4 * 2**stage for stage in range(len(dims))]
        stages = list(places(dims, depths, num_heads, strides, img_size, drop_path_rate))
        width = dims[0]
        first, last = [_conv(in_chans, width, 3, 2), nn.GELU()], [_conv(width, width, 3, 2), nn.LayerNorm(width)]
        table = PositionTable(stages[0][0].grid, width)
        super().__init__(
            stem=nn.Sequential(nn.Sequential(*first, _conv(width, width, 3), nn.GELU(), *last), table),
            downs=[
                nn.Identity(),
                *(
                    nn.Sequential(_conv(a, b, 1), nn.GELU(), _conv(b, b, 3, 2, groups=b), nn.GELU(), _conv(b, b, 1))
                    for a, b in pairwise(dims)
                ),
            ],
            stages=[
                [GuidedStage(blocks, reduction, run, ratio, window_size)]
                for blocks, reduction, run, ratio in zip(stages, reductions, runs, mlp_ratios, strict=True)
            ],
            dims=dims,
            strides=strides,
            num_classes=num_classes,
            in_chans=in_chans,
        )
        self.apply(fan_out_init)
        rows, columns = (sincos(torch.arange(side), width // 2, interleaved=False) for side in table.grid)
        grid = [columns[None].expand(*table.grid, -1), rows[:, None].expand(*table.grid, -1)]
        with torch.no_grad():
            table.table.copy_(torch.cat(grid, -1).view(1, -1, width))

    def no_weight_decay(self) -> set[str]:
        """The position table."""
        return {"stem.1.table"}


SYSTEM = register_system(
    System(
        slug="sgformer",
        title="SG-Former: Self-guided Transformer with Evolving Token Reallocation",
        year=2023,
        arxiv="2308.12216",
        evidence="authors_code",
        repo="OliverRensu/SG-Former",
        idea="Tokens that attention finds salient stay fine in the next block's keys, all others are merged.",
        mixers=("self_guided",),
        variants=(
            image_variant("sgformer_small", SGFormer, 22_545_981, 4.818, 0.1),
            image_variant("sgformer_medium", SGFormer, 38_689_316, 7.470, 0.2, depths=(2, 6, 28, 2)),
            image_variant(
                "sgformer_base",
                SGFormer,
                77_950_293,
                15.610,
                0.4,
                dims=(96, 192, 384, 768),
                depths=(4, 6, 24, 2),
                num_heads=(4, 6, 12, 24),
            ),
        ),
        reports=(
            "ImageNet-1K top-1 at 224 px: S 83.2, M 84.1, B 84.7",
            "Base: 51.2 box AP on COCO, 52.7 mIoU on ADE20K; +1.3 top-1, +2.7 box AP, +3 mIoU over Swin (abstract)",
        ),
    )
)
