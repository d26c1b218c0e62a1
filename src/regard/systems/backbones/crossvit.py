"""CrossViT: Cross-Attention Multi-Scale Vision Transformer for Image Classification (Chen et al., 2021, arXiv 2103.14899).

Two vision transformers look at the image in small and in large patches. Again and again the class token of each visits
the other: it alone asks the other's patches, which costs linear time, and carries the answer home.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import ops
from regard.checkpoint import KeyMap
from regard.layers import (
    Block,
    Conv2d,
    DropPath,
    Mixer,
    PatchEmbed,
    SoftmaxAttention,
    heads_of,
    linear_rates,
    resize_sequence_table,
    split_qkv,
    vit_init,
)
from regard.registry import System, Variant, image_variant, register_mixer, register_system
from regard.skeletons import ImageModel
from regard.skeletons.base import make_head

_NORM = partial(nn.LayerNorm, eps=1e-6)


@register_mixer("cross_token")
class CrossTokenAttention(Mixer):
    r"""Softmax attention of a few tokens over themselves and a context (section 3.3, cross-attention fusion).

    $$\mathrm{out} = W_o\,\mathrm{softmax}(d^{-1/2}\, (x W_q) ([x; c] W_k)^\top)\,[x; c] W_v$$

    With one token in x, as in CrossViT, the cost is linear in the context c; without a context it is attention of all
    tokens over all.
    """

    can_cross: ClassVar[bool] = True
    authors_keys = KeyMap(rules=[(r"(^|\.)w([qkv])\.", r"\1\2.")])

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool = True) -> None:
        super().__init__()
        self.head_dim = heads_of(dim, num_heads)
        self.dim, self.num_heads = dim, num_heads
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=qkv_bias) for _ in range(3))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """`(B, *S, dim)` -> the same shape; context `(B, *S_c, dim)`."""
        self.check(x)
        keys = x.flatten(1, -2)
        if context is not None:
            keys = torch.cat([keys, context.flatten(1, -2)], 1)
        q, k, v = (
            part.unflatten(-1, (self.num_heads, self.head_dim)) for part in (self.q(x), self.k(keys), self.v(keys))
        )
        return self.proj(ops.attention(q, k, v).flatten(-2))  # type: ignore[union-attr]

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}"


class CrossFusion(nn.Module):
    r"""Exchange between two branches through their class tokens (section 3.3).

    $$p = f(\mathrm{cls}),\quad y = p + \mathrm{CrossToken}(n(p), n(\text{patches of the other})),\quad
      \mathrm{cls} \leftarrow g(y)$$

    f and g are LayerNorm, GELU and a linear map, to the width of the other branch and back. Patches stay as they are,
    and both directions start from the same tokens.

    Args:
        dims: channels of the two branches.
    """

    def __init__(self, dims: Sequence[int], num_heads: int, drop_path: float = 0.0) -> None:
        super().__init__()

        def project(width: int, to: int) -> nn.Module:
            return nn.Sequential(_NORM(width), nn.GELU(), nn.Linear(width, to))

        away = list(zip(dims, dims[::-1], strict=True))
        self.enter = nn.ModuleList(project(own, other) for own, other in away)
        self.norms = nn.ModuleList(_NORM(other) for _, other in away)
        self.mixers = nn.ModuleList(CrossTokenAttention(other, num_heads) for _, other in away)
        self.leave = nn.ModuleList(project(other, own) for own, other in away)
        self.drop_path = DropPath(drop_path)

    def forward(self, branches: Sequence[Tensor]) -> list[Tensor]:
        """Two sequences `(B, 1 + N, dim)`, class token first -> the same shapes."""
        out = []
        parts = zip(branches, branches[::-1], self.enter, self.norms, self.mixers, self.leave, strict=True)
        for own, other, enter, norm, mixer, leave in parts:
            guest = enter(own[:, :1])
            guest = guest + self.drop_path(mixer(norm(guest), norm(other[:, 1:])))
            out.append(torch.cat([leave(guest), own[:, 1:]], 1))
        return out


class MultiScaleEncoder(nn.Module):
    """Transformer blocks in each branch, then a fusion of the two (section 3.2).

    Args:
        depths: number of blocks in each branch. rates: stochastic depth of block i of either branch, the last also of
            the fusion.
    """

    def __init__(
        self, dims: Sequence[int], depths: Sequence[int], num_heads: int, mlp_ratio: float, rates: Sequence[float]
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                *(
                    Block(dim, SoftmaxAttention(dim, num_heads), mlp_ratio=mlp_ratio, norm=_NORM, drop_path=rate)
                    for rate in rates[:depth]
                )
            )
            for dim, depth in zip(dims, depths, strict=True)
        )
        self.fusion: nn.Module = CrossFusion(dims, num_heads, rates[-1])

    def forward(self, branches: Sequence[Tensor]) -> list[Tensor]:
        """Two sequences `(B, 1 + N, dim)` -> the same shapes."""
        return self.fusion([blocks(tokens) for blocks, tokens in zip(self.blocks, branches, strict=True)])


class ConvPatches(nn.Module):
    """Patches by three convolutions with ReLU between them: the stem of the dagger models, for patches of 12 or 16."""

    def __init__(self, in_chans: int, dim: int, patch_size: int) -> None:
        super().__init__()
        strides = {12: (3, 1), 16: (2, 2)}.get(patch_size)
        if strides is None:
            raise ValueError(f"conv_patches=True takes patch_sizes of 12 or 16, got {patch_size}.")
        paddings = [0 if stride == 3 else 1 for stride in strides]
        self.proj = nn.Sequential(
            Conv2d(in_chans, dim // 4, 7, stride=4, padding=3),
            nn.ReLU(),
            Conv2d(dim // 4, dim // 2, 3, stride=strides[0], padding=paddings[0]),
            nn.ReLU(),
            Conv2d(dim // 2, dim, 3, stride=strides[1], padding=paddings[1]),
        )

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, W, in_chans)`, whole patches -> `(B, H/p, W/p, dim)`."""
        return self.proj(x)


class CrossViT(ImageModel):
    """Two branches, encoders that fuse them, LayerNorm and linear on each class token, mean of the two logits.

    Each branch resizes the image to its own resolution (bicubic), the nearest that is a whole number of its patches.
    The feature maps of `forward_intermediates` are those of the small and of the large patches, encoder by encoder; their
    strides are rounded to whole pixels.

    Args:
        dims: channels of the branches. depths: blocks of either branch, for each encoder. num_heads: of both branches.
        patch_sizes: pixels of a patch, in the branch's resolution.
        img_size, branch_sizes: an image of `img_size` pixels is resized to those of each branch; images of other sizes in
            proportion, with resized position tables.
        conv_patches: three convolutions as patch embedding (the dagger models).
    """

    norm: nn.ModuleList
    head: nn.ModuleList

    authors_keys = KeyMap(
        rules=(
            (r"^patch_embed\.", "stems."),
            (r"^blocks\.", "encoders."),
            (r"^(encoders\.\d+)\.projs\.", r"\1.fusion.enter."),
            (r"^(encoders\.\d+)\.revert_projs\.", r"\1.fusion.leave."),
            (r"\.fusion\.(\d)\.norm1\.", r".fusion.norms.\1."),
            (r"\.fusion\.(\d)\.attn\.", r".fusion.mixers.\1."),
            (r"\.attn\.", ".mixer."),
            *CrossTokenAttention.authors_keys.rules,
        ),
        convert=split_qkv,
    )

    def __init__(
        self,
        dims: Sequence[int] = (192, 384),
        depths: Sequence[Sequence[int]] = ((1, 4), (1, 4), (1, 4)),
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        patch_sizes: Sequence[int] = (12, 16),
        branch_sizes: Sequence[int] = (240, 224),
        img_size: int = 224,
        conv_patches: bool = False,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        for name, pair in (("dims", dims), ("patch_sizes", patch_sizes), ("branch_sizes", branch_sizes)):
            if len(pair) != 2:
                raise ValueError(f"{name} must hold one number for each of the two branches, got {tuple(pair)!r}.")
        self.in_chans, self.num_features = in_chans, sum(dims)
        self.patch_sizes, self.dims = tuple(patch_sizes), tuple(dims)
        self.scales = [size / img_size for size in branch_sizes]
        self.grids = [(size // patch,) * 2 for size, patch in zip(branch_sizes, patch_sizes, strict=True)]
        self.feature_dims = self.dims * len(depths)
        strides = [round(patch / scale) for patch, scale in zip(patch_sizes, self.scales, strict=True)]
        self.feature_strides = tuple(strides) * len(depths)

        embed: Any = ConvPatches if conv_patches else partial(PatchEmbed, norm=False)
        self.stems = nn.ModuleList(embed(in_chans, dim, patch) for dim, patch in zip(dims, patch_sizes, strict=True))
        self.cls_token = nn.ParameterList(torch.empty(1, 1, dim) for dim in dims)
        self.pos_embed = nn.ParameterList(
            torch.empty(1, 1 + height * width, dim) for (height, width), dim in zip(self.grids, dims, strict=True)
        )
        rates, self.encoders = linear_rates(drop_path_rate, sum(map(max, depths))), nn.ModuleList()
        for pair in depths:
            here, rates = rates[: max(pair)], rates[max(pair) :]
            self.encoders.append(MultiScaleEncoder(dims, pair, num_heads, mlp_ratio, here))
        self.norm = nn.ModuleList(_NORM(dim) for dim in dims)
        self.apply(vit_init)
        for table in (*self.cls_token, *self.pos_embed):
            nn.init.trunc_normal_(table, std=0.02)
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace both classifiers by fresh ones; 0 classes leave the two class tokens, concatenated."""
        self.num_classes, like = num_classes, self.cls_token[0]
        self.head = nn.ModuleList(make_head(dim, num_classes, like) for dim in self.dims)

    def no_weight_decay(self) -> set[str]:
        """Class tokens and position tables."""
        return {name for name, _ in self.named_parameters() if name.startswith(("cls_token.", "pos_embed."))}

    def _embed(self, x: Tensor) -> tuple[list[Tensor], list[tuple[int, int]]]:
        """Image -> both sequences `(B, 1 + N, dim)`, and their grids."""
        sequences, grids = [], []
        for branch, (patch, scale) in enumerate(zip(self.patch_sizes, self.scales, strict=True)):
            size = [max(1, round(side * scale / patch)) * patch for side in x.shape[2:]]
            image = x if list(x.shape[2:]) == size else F.interpolate(x, size, mode="bicubic", align_corners=False)
            tokens = self.stems[branch](image.movedim(1, -1))
            grids.append((tokens.shape[1], tokens.shape[2]))
            first = self.cls_token[branch].expand(x.shape[0], -1, -1)
            position = resize_sequence_table(self.pos_embed[branch], self.grids[branch], grids[branch])
            sequences.append(torch.cat([first, tokens.flatten(1, 2)], 1) + position)
        return sequences, grids

    def stages_forward(self, x: Tensor) -> list[Tensor]:
        """`(B, in_chans, H, W)` -> the patches of both branches after each encoder, as grids."""
        branches, grids = self._embed(x)
        maps = []
        for encoder in self.encoders:
            branches = encoder(branches)
            maps += [tokens[:, 1:].unflatten(1, grid) for tokens, grid in zip(branches, grids, strict=True)]
        return maps

    def forward_features(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
        """`(B, in_chans, H, W)` -> normalised tokens `(B, 1 + N, dim)` of both branches, class token first."""
        self.check_image(x)
        branches, _ = self._embed(x)
        for encoder in self.encoders:
            branches = encoder(branches)
        return [norm(tokens) for norm, tokens in zip(self.norm, branches, strict=True)]

    def forward_head(self, x: Sequence[Tensor], pre_logits: bool = False) -> Tensor:  # type: ignore[override]
        """Tokens of both branches -> logits `(B, num_classes)`, or both class tokens `(B, num_features)`."""
        firsts = [tokens[:, 0] for tokens in x]
        if pre_logits or self.num_classes == 0:
            return torch.cat(firsts, -1)
        small, large = (head(first) for head, first in zip(self.head, firsts, strict=True))
        return (small + large) / 2


def _variant(name: str, params: int, gmacs: float, dim: int, blocks: int, ratio: float, **options: Any) -> Variant:
    """Three encoders with one block on small patches and `blocks` on large ones; heads of 32 and 64 channels."""
    depths = ((1, blocks),) * 3
    return image_variant(
        f"crossvit_{name}",
        CrossViT,
        params,
        gmacs,
        dims=(dim, 2 * dim),
        depths=depths,
        num_heads=dim // 32,
        mlp_ratio=ratio,
        **options,
    )


_LARGE: dict[str, Any] = {"side": 384, "branch_sizes": (408, 384), "conv_patches": True}

SYSTEM = register_system(
    System(
        slug="crossvit",
        title="CrossViT: Cross-Attention Multi-Scale Vision Transformer for Image Classification",
        year=2021,
        arxiv="2103.14899",
        evidence="authors_code",
        repo="IBM/CrossViT",
        idea="Two branches with small and large patches; the class token of each asks the patches of the other.",
        mixers=("cross_token",),
        variants=(
            _variant("tiny", 7_014_800, 1.562734, 96, 4, 4.0),
            _variant("small", 26_856_272, 5.615558, 192, 4, 4.0),
            _variant("base", 105_025_232, 21.191473, 384, 4, 4.0),
            _variant("9", 8_553_296, 1.840796, 128, 3, 3.0),
            _variant("15", 27_528_464, 5.790572, 192, 5, 3.0),
            _variant("18", 43_271_408, 9.031159, 224, 6, 3.0),
            _variant("9_dagger", 8_776_592, 1.979049, 128, 3, 3.0, conv_patches=True),
            _variant("15_dagger", 28_209_008, 6.112305, 192, 5, 3.0, conv_patches=True),
            _variant("18_dagger", 44_266_976, 9.473219, 224, 6, 3.0, conv_patches=True),
            _variant("15_dagger_384", 28_500_080, 21.398550, 192, 5, 3.0, **_LARGE),
            _variant("18_dagger_384", 44_606_560, 32.409093, 224, 6, 3.0, **_LARGE),
        ),
        reports=(
            "ImageNet-1K top-1: Ti 73.4 (DeiT-Ti 72.2), S 81.0 (DeiT-S 79.8), B 82.2 (DeiT-B 81.8), 9 73.9, 15 81.5, "
            "18 82.5; dagger 77.1, 82.3, 82.8; at 384 pixels 83.5, 83.9",
            "CrossViT-S with other fusions (table 6): none 80.2, all-attention 80.0, class-token sum 80.3, pairwise sum "
            "80.3, cross-attention 81.0",
        ),
    )
)
