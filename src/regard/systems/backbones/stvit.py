"""Vision Transformer with Super Token Sampling (Huang et al., 2022, arXiv 2211.11167; also called SViT).

Tokens are softly gathered into a coarse grid of super tokens, as pixels are into superpixels; the super tokens attend to
each other, and tokens read the result back by the same association. Early stages thus see the whole image.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import checks, ops
from regard.checkpoint import KeyMap
from regard.layers import BatchNorm, ConvStem, Mixer, heads_of
from regard.layouts.windows import crop, pad_to_multiple, partition, unpartition
from regard.registry import System, Variant, image_variant, register_mixer, register_system
from regard.skeletons import ConvPyramid, Place


def around(x: Tensor) -> Tensor:
    """The 3 x 3 (3, 3 x 3 x 3) neighbours of each place of a grid, zeros outside: `(B, *M, C)` -> `(B, *M, 9, C)`."""
    axes = x.dim() - 2
    padded = F.pad(x, [0, 0, *[1, 1] * axes])
    views = []
    for offset in product(range(3), repeat=axes):
        view = padded
        for axis, start in enumerate(offset):
            view = view.narrow(1 + axis, start, x.shape[1 + axis])
        views.append(view)
    return torch.stack(views, -2)


def gather(x: Tensor) -> Tensor:
    """Send 9 parts of each place to its neighbours and add up: `(B, *M, 9, C)` -> `(B, *M, C)`, the adjoint of `around`.

    What goes outside of the grid is lost.
    """
    axes, spatial = x.dim() - 3, x.shape[1:-2]
    total: Tensor | None = None
    for part, offset in zip(x.unbind(-2), product(range(3), repeat=axes), strict=True):
        pads = [0, 0]
        for start in reversed(offset):
            pads += [start, 2 - start]
        moved = F.pad(part, pads)
        total = moved if total is None else total + moved
    assert total is not None
    for axis, length in enumerate(spatial):
        total = total.narrow(1 + axis, 1, length)
    return total


@register_mixer("super_token")
class SuperTokenAttention(Mixer):
    r"""Super token attention: sample super tokens, attention among them, map back (section 3.2).

    $$Q = \mathrm{softmax}_9(C^{-1/2} X S_0^\top),\quad S = \hat Q^\top X,\quad
      \mathrm{out} = Q\,\mathrm{MHSA}(S)$$

    S_0 are the means of cells of `cell_size` tokens, the softmax runs over the cell of a token and the cells around
    it, and $\hat Q$ is Q with columns that sum to 1. Q has no gradient, and X is not projected before: the only weights
    are those of the attention among super tokens. Further iterations find Q again from S. With cells of one token it
    is plain attention.

    As published, neighbours outside the grid have the logit 0, and their share of the softmax is lost at the border.

    Departure: where cells do not divide the map, its end takes no part beyond the map's own tokens; the authors fill it
    with zeros that count as tokens.

    Args:
        dim: channels. num_heads: divides dim.
        cell_size: tokens of a cell, one integer or one for each of `axes`.
        iterations: how often the association is found.
        axes: number of spatial axes.
    """

    authors_keys = KeyMap(
        rules=[(r"\bstoken_refine\.", "")],
        drop=[r"\b(un)?fold\.weights$"],
        convert=ConvPyramid.host_convert,
    )

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        cell_size: int | Sequence[int] = 8,
        iterations: int = 1,
        axes: int = 2,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        self.head_dim = heads_of(dim, num_heads)
        checks.positive("iterations", iterations)
        self.dim, self.num_heads, self.iterations = dim, num_heads, iterations
        self.cell_size = checks.tuple_of("cell_size", cell_size, axes)
        self.axes = axes
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    @classmethod
    def in_stack(cls, index: int, input_size: tuple[int, ...], dim: int, num_heads: int, **options: Any) -> Mixer:
        """Unless given, cells are such that about 7 super tokens lie along a side, and of 2 tokens at least."""
        options.setdefault("cell_size", tuple(max(2, round(side / 7)) for side in input_size))
        return cls(dim, num_heads, axes=len(input_size), **options)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        spatial = self.check(x)
        if set(self.cell_size) == {1}:
            return self.attend(x)
        super_tokens, share = self.sample(x)
        out = share @ around(self.attend(super_tokens)).flatten(1, -3)
        padded = [count * side for count, side in zip(super_tokens.shape[1:-1], self.cell_size, strict=True)]
        return crop(unpartition(out, self.cell_size, padded), spatial)

    def sample(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The super tokens, and how far each token belongs to those around it.

        Returns:
            `(B, *M, C)`, and shares `(B, prod(M), T, 9)` for the T tokens of each cell: without gradient, summing to 1
            but for what the border loses, and zero where a cell reaches beyond the map.
        """
        spatial = x.shape[1:-1]
        grid = [-(-length // side) for length, side in zip(spatial, self.cell_size, strict=True)]
        tokens = partition(pad_to_multiple(x, self.cell_size), self.cell_size)  # (B, prod(M), T, C)
        real = partition(pad_to_multiple(x.new_ones(1, *spatial, 1), self.cell_size), self.cell_size)
        fixed = tokens.detach()
        centres = (fixed.sum(2) / real.sum(2)).unflatten(1, grid)
        for _ in range(self.iterations):
            near = around(centres.detach()).flatten(1, -3)  # (B, prod(M), 9, C)
            share = (self.dim**-0.5 * fixed @ near.transpose(-1, -2)).softmax(-1) * real
            mass = gather(share.sum(2).unsqueeze(-1).unflatten(1, grid)) + 1e-12
            centres = gather((share.transpose(-1, -2) @ tokens).unflatten(1, grid)) / mass
        return centres, share

    def attend(self, x: Tensor) -> Tensor:
        """Multi-head attention among all places: `(B, *M, dim)` -> the same shape. Rows of `qkv` are (head, q | k | v)."""
        q, k, v = self.qkv(x).unflatten(-1, (self.num_heads, 3, self.head_dim)).unbind(-2)
        return self.proj(ops.attention(q, k, v).flatten(-2))  # type: ignore[union-attr]

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, cell_size={self.cell_size}, iterations={self.iterations}"


class STViT(ConvPyramid):
    """Four convolutions to a quarter of the image, blocks of super token attention, linear to 1024, BatchNorm, SiLU, mean.

    Args:
        dims, depths, num_heads: of each stage. mlp_ratio: hidden width of the feed-forward networks.
        cell_sizes: tokens along the sides of a cell in each stage; 1 is plain attention.
        iterations: of the association.
        layer_scales: initial layer scale of each stage, None for none; None for all stages.
        projection: channels before the classifier.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0.
    """

    authors_keys = KeyMap(
        rules=[
            *ConvPyramid.host_rules,
            (r"\.pos_embed\.conv\.", ".position."),
            (r"\.mlp2\.conv\.conv\.", ".mlp.local."),
            (r"\.mlp2\.", ".mlp."),
            (r"\.attn\.", ".mixer."),
            *SuperTokenAttention.authors_keys.rules,
        ],
        drop=SuperTokenAttention.authors_keys.drop,
        convert=ConvPyramid.host_convert,
    )

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (3, 5, 9, 3),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratio: float = 4.0,
        cell_sizes: Sequence[int] = (8, 4, 1, 1),
        iterations: int = 1,
        layer_scales: Sequence[float | None] | None = None,
        projection: int = 1024,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        def mixer(at: Place) -> nn.Module:
            return SuperTokenAttention(at.dim, at.num_heads, cell_size=cell_sizes[at.stage], iterations=iterations)

        half = dims[0] // 2
        super().__init__(
            mixer=mixer,
            stem=ConvStem(in_chans, [half, half, dims[0], dims[0]], [2, 1, 2, 1], act_first=True),
            dims=dims,
            depths=depths,
            num_heads=num_heads,
            mlp_ratios=[mlp_ratio] * len(dims),
            layer_scales=layer_scales,
            mlp_norm=BatchNorm,
            projection=projection,
            drop_path_rate=drop_path_rate,
            num_classes=num_classes,
            in_chans=in_chans,
        )


def _variant(name: str, params: int, with_kernels: int, gmacs: float, drop: float, **options: Any) -> Variant:
    source = (
        "trainable parameters and multiply-adds of the authors' code (with the one-hot kernels by which it moves "
        f"neighbours, {with_kernels:,} parameters)"
    )
    return image_variant(name, STViT, params, gmacs, drop, source=source, **options)


_SCALES = (None, None, 1e-6, 1e-6)

SYSTEM = register_system(
    System(
        slug="stvit",
        title="Vision Transformer with Super Token Sampling",
        year=2022,
        arxiv="2211.11167",
        evidence="authors_code",
        repo="hhb072/STViT",
        idea="Tokens are softly gathered into super tokens, which attend to each other; the result is read back alike.",
        mixers=("super_token",),
        variants=(
            _variant("stvit_small", 25_495_624, 25_498_864, 4.367, 0.1),
            _variant(
                "stvit_base",
                51_691_288,
                51_696_148,
                9.872,
                0.4,
                dims=(96, 192, 384, 512),
                depths=(4, 6, 14, 6),
                num_heads=(2, 3, 6, 8),
                layer_scales=_SCALES,
            ),
            _variant(
                "stvit_large",
                94_971_096,
                94_977_252,
                15.597,
                0.6,
                dims=(96, 192, 448, 640),
                depths=(4, 7, 19, 8),
                num_heads=(2, 3, 7, 10),
                layer_scales=_SCALES,
            ),
        ),
        reports=(
            "ImageNet-1K top-1 at 224 px: S 83.6, B 84.8, L 85.3; at 384 px 85.0, 86.0, 86.4",
            "COCO 53.9 box / 46.8 mask AP, ADE20K 51.9 mIoU, both with the largest settings (abstract)",
        ),
    )
)
