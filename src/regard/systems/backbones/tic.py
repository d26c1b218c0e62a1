"""TiC: Exploring Vision Transformer in Convolution (Zhang et al., 2023, arXiv 2310.04134).

MSA-Conv is self-attention inside the sliding window of a convolution: size, dilation and padding are those of a
convolution, so that any image fits. Features are rolled before some layers, which makes neighbours of distant borders.

The authors released the operator and its layer; the network here is a reconstruction from the paper's abstract.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from regard import checks, ops
from regard.checkpoint import KeyMap
from regard.layers import Block, Mixer, PatchEmbed, conv, flat_kernels, heads_of, vit_init
from regard.registry import System, Variant, register_mixer, register_system
from regard.skeletons import Hierarchical, places

Border = Literal["zeros", "inside"]


def convolutional_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    border: Border = "zeros",
) -> Tensor:
    r"""Softmax attention of every token over the window of a convolution around it, with zero padding.

    $$o_i = \sum_{t} \mathrm{softmax}_t(d^{-1/2}\, q_i^\top \bar k_{i + t})\, \bar v_{i + t}$$

    t runs over the places of the kernel, and $\bar k$, $\bar v$ are 0 outside of the map: places there have logit 0 and
    take a share of the softmax, as released. With border "inside" windows are pushed into the map instead, as in
    neighborhood attention.

    Args:
        q, k, v: `(batch, *spatial, heads, head_dim)`. kernel_size: odd. dilation: gap between places.
    """
    axes = q.dim() - 3
    kernel, gaps = (
        checks.tuple_of(name, value, axes) for name, value in (("kernel_size", kernel_size), ("dilation", dilation))
    )
    if any(width % 2 == 0 for width in kernel):
        raise ValueError(f"kernel_size must be odd, so that the window has a middle, got {kernel}.")
    checks.one_of("border", border, ("zeros", "inside"))
    if border == "inside":
        return ops.neighborhood_attention(q, k, v, kernel_size=kernel, dilation=gaps)  # type: ignore[return-value]
    # On the padded map no window of a true token touches the border, where neighborhood attention would push it.
    pads, spatial = [0, 0, 0, 0], q.shape[1:-2]
    before = [gap * (width // 2) for width, gap in zip(kernel, gaps, strict=True)]
    for first, length, width, gap in reversed(list(zip(before, spatial, kernel, gaps, strict=True))):
        pads += [first, max(first, width * gap - length - first)]
    out = ops.neighborhood_attention(*(F.pad(x, pads) for x in (q, k, v)), kernel_size=kernel, dilation=gaps)
    for axis, first in enumerate(before):
        out = out.narrow(1 + axis, first, spatial[axis])  # type: ignore[union-attr]
    return out  # type: ignore[return-value]


@register_mixer("msa_conv")
class MSAConv(Mixer):
    r"""The layer MSA-Conv: attention in the window, residual, convolution of the same kernel, ReLU.

    $$y = \mathrm{ReLU}(\mathrm{conv}_k(\mathrm{attention}_k(x W_q, x W_k, x W_v) + x))$$

    One head over all channels as released; several heads, for which the name stands, split the channels, down to one
    channel each (the paper's depthwise form, as we read it). There is no normalisation and no position term. The authors'
    dropout of attention weights is left out.

    Args:
        num_heads: divides dim. kernel_size, dilation: one integer, or one for each of `axes`; kernels are odd.
        border: what windows at the border see, see `convolutional_attention`.
        shift: share of the map by which it is rolled before the layer, and back after it, along each axis: with 1/2,
            tokens at opposite borders are neighbours. (The paper's multi-directional cyclic shift, as we read it.)
        out_dim, stride: of the convolution. axes: number of spatial axes.
    """

    authors_keys = KeyMap(
        rules=((r"(^|\.)qkv_conv\.", r"\1qkv."),),
        convert=lambda name, value: flat_kernels(name, value) if "qkv" in name else {name: value},
    )

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        kernel_size: int | Sequence[int] = 3,
        dilation: int | Sequence[int] = 1,
        border: Border = "zeros",
        shift: Sequence[float] | None = None,
        out_dim: int | None = None,
        stride: int = 1,
        axes: int = 2,
    ) -> None:
        super().__init__()
        self.head_dim = heads_of(dim, num_heads)
        self.dim, self.num_heads, self.axes, self.border = dim, num_heads, axes, border
        self.kernel_size = checks.tuple_of("kernel_size", kernel_size, axes)
        self.dilation = checks.tuple_of("dilation", dilation, axes)
        self.shift = tuple(shift or (0.0,) * axes)
        if len(self.shift) != axes or (any(self.shift) and stride > 1):
            raise ValueError(f"shift must hold {axes} shares, none with a stride above 1, got {self.shift}, {stride=}.")
        self.qkv = nn.Linear(dim, 3 * dim)
        padding = tuple(width // 2 for width in self.kernel_size)
        self.mlp = conv(axes)(dim, out_dim or dim, self.kernel_size, stride=stride, padding=padding, bias=False)

    @classmethod
    def in_stack(cls, index: int, input_size: tuple[int, ...], dim: int, num_heads: int, **options: Any) -> Mixer:
        """Directions take turns: none, then every axis by half the map, then all axes at once."""
        axes = len(input_size)
        turn = index % (axes + 2)
        shift = [0.5 if turn in (1 + axis, 1 + axes) else 0.0 for axis in range(axes)]
        return cls(dim, num_heads, **{"axes": axes, "shift": shift, **options})

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> `(B, *S', out_dim)`, the same shape by default."""
        spatial = self.check(x)
        steps = [int(share * length) for share, length in zip(self.shift, spatial, strict=True)]
        places = tuple(range(1, 1 + self.axes))
        if any(steps):
            x = x.roll(steps, places)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        windows = {"kernel_size": self.kernel_size, "dilation": self.dilation, "border": self.border}
        x = F.relu(self.mlp(convolutional_attention(q, k, v, **windows).flatten(-2) + x))
        return x.roll([-step for step in steps], places) if any(steps) else x

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, kernel_size={self.kernel_size}, dilation={self.dilation}, "
            f"border={self.border!r}, shift={self.shift}"
        )


class InterPooling(nn.Module):
    """Mean over 2 x 2 tokens, then an MSA-Conv that changes the width (the paper's inter-pooling, as we read it).

    An odd side is rounded up; its last mean is over the tokens that are there.
    """

    def __init__(self, dim: int, out_dim: int, num_heads: int) -> None:
        super().__init__()
        self.layer = MSAConv(dim, num_heads, out_dim=out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, W, dim)` -> `(B, H / 2, W / 2, out_dim)`."""
        x = F.avg_pool2d(x.movedim(-1, 1), 2, ceil_mode=True, count_include_pad=False).movedim(1, -1)
        return self.layer(x)


class TiC(Hierarchical):
    """Patches, four stages of blocks with MSA-Conv in place of attention, inter-pooling between them, mean, linear.

    A reconstruction: that there are stages, MSA-Conv, shifts in several directions and pooling between layers is the
    paper's; the residual blocks with LayerNorm and MLP, sizes and the order of the shifts are ours.

    Args:
        dims, depths, num_heads: of each stage. kernel_size: of all windows. patch_size: pixels of a token of the first.
        shift: whether blocks take turns in the directions of the cyclic shift.
    """

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        kernel_size: int = 3,
        mlp_ratio: float = 4.0,
        patch_size: int = 4,
        shift: bool = True,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        strides = [patch_size * 2**stage for stage in range(len(dims))]
        stages: list[list[nn.Module]] = []
        # No parameter depends on the size of the image; the grids of `places` are those of any one.
        for stage in places(dims, depths, num_heads, strides, strides[-1], drop_path_rate):
            blocks: list[nn.Module] = []
            for at in stage:
                index = at.index if shift else 0
                mixer = MSAConv.in_stack(index, at.grid, at.dim, at.num_heads, kernel_size=kernel_size)
                blocks.append(Block(at.dim, mixer, mlp_ratio=mlp_ratio, drop_path=at.drop_path))
            stages.append(blocks)
        pairs = zip(dims[:-1], dims[1:], num_heads[:-1], strict=True)
        super().__init__(
            stem=PatchEmbed(in_chans, dims[0], patch_size),
            downs=[nn.Identity(), *(InterPooling(a, b, heads) for a, b, heads in pairs)],
            stages=stages,
            dims=dims,
            strides=strides,
            norm=nn.LayerNorm(dims[-1]),
            num_classes=num_classes,
            in_chans=in_chans,
        )
        self.apply(vit_init)


def _layer(dim: int, out_dim: int, kernel_size: int, params: int) -> Variant:
    options = {"dim": dim, "out_dim": out_dim, "kernel_size": kernel_size}
    source = "parameters of the authors' class"
    return Variant(
        f"msa_conv_{dim}_{out_dim}_k{kernel_size}", MSAConv, params, None, ((1, 14, 14, dim),), source, options
    )


SYSTEM = register_system(
    System(
        slug="tic",
        title="TiC: Exploring Vision Transformer in Convolution",
        year=2023,
        arxiv="2310.04134",
        evidence="authors_code",
        repo="zs670980918/MSA-Conv",
        idea="Self-attention inside the window of a convolution; rolled features connect distant borders.",
        mixers=("msa_conv",),
        variants=(
            _layer(64, 64, 3, 49_344),
            _layer(64, 128, 3, 86_208),
            _layer(96, 96, 7, 479_520),
            _layer(128, 256, 5, 868_736),
            Variant("tic_reconstructed", TiC),
        ),
        reports=(
            "the authors' code holds the operator and its layer only: recordings and counts are theirs, the network is a "
            "reconstruction from the abstract, whose sizes are ours",
            "comparable to the state of the art on ImageNet-1K (abstract; no figures are known to us)",
        ),
    )
)
