"""SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design (Yun and Ro, 2024, arXiv 2401.16456).

Many heads on all channels are redundant and bound by memory traffic. Here one head attends on a fifth of the channels, and
a projection mixes what it read with the channels that were left alone. Maps are coarse from the start: 1/16 of the image.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from regard import checks, ops
from regard.checkpoint import KeyMap
from regard.layers import LEVIT_NAMES, ConvNorm, GlobalNorm, Mixer, Residual, flat_kernels
from regard.registry import System, image_variant, register_mixer, register_system
from regard.skeletons import LightPyramid, Place
from regard.skeletons.light import feed_forward, local_mixing


@register_mixer("single_head")
class SingleHeadAttention(Mixer):
    r"""One head of softmax attention on the first r of the channels (SHSA).

    $$\mathrm{out} = \mathrm{BN}(W_o\,\mathrm{relu}[\,\mathrm{softmax}(e^{-1/2} Q K^\top)\,V,\; x_2\,]),\quad
      Q, K, V = \mathrm{BN}(W\,\mathrm{GN}(x_1)),\quad [x_1, x_2] = x$$

    x_1 has r channels and V as many, Q and K have e. GN takes its statistics over the whole map. It knows no positions.
    The last BatchNorm starts at zero, so that a residual block starts as nothing.

    Args:
        dim: channels. num_heads: taken so that every mixer is built alike; there is one head.
        partial_dim: r; None is dim / 4.67, the share of the paper.
        qk_dim: e.
    """

    has_heads: ClassVar[bool] = False
    authors_keys = KeyMap(
        rules=[(r"\bpre_norm\.", "norm."), (r"\bproj\.1\.", "proj."), *LEVIT_NAMES], convert=flat_kernels
    )

    def __init__(self, dim: int, num_heads: int = 1, *, partial_dim: int | None = None, qk_dim: int = 16) -> None:
        super().__init__()
        checks.positive("dim", dim)
        checks.positive("qk_dim", qk_dim)
        partial_dim = max(round(dim / 4.67), 1) if partial_dim is None else partial_dim
        if not 0 < partial_dim <= dim:
            raise ValueError(f"partial_dim must lie in 1..dim={dim}, got {partial_dim}.")
        self.dim, self.num_heads, self.partial_dim, self.qk_dim = dim, num_heads, partial_dim, qk_dim
        self.norm = GlobalNorm(partial_dim)
        self.qkv = ConvNorm(partial_dim, 2 * qk_dim + partial_dim)
        self.act = nn.ReLU()
        self.proj = ConvNorm(dim, dim, weight=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        self.check(x)
        attended, rest = x.split([self.partial_dim, self.dim - self.partial_dim], -1)
        q, k, v = self.qkv(self.norm(attended)).unsqueeze(-2).split([self.qk_dim, self.qk_dim, self.partial_dim], -1)
        attended = ops.attention(q, k, v).squeeze(-2)  # type: ignore[union-attr]
        return self.proj(self.act(torch.cat([attended, rest], -1)))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, partial_dim={self.partial_dim}, qk_dim={self.qk_dim}"


class SHViT(LightPyramid):
    """`LightPyramid` of blocks "local mixing, single-head attention, feed-forward", all residual.

    Args:
        dims, depths: channels and blocks of each stage.
        partial_dims: attended channels of each stage. qk_dim: width of queries and keys.
        attends: for each stage, whether its blocks have attention at all.
        host: further arguments of `LightPyramid`: stem_stride, drop_path_rate, num_classes, ...
    """

    authors_keys = KeyMap(
        rules=[*LightPyramid.host_rules, *SingleHeadAttention.authors_keys.rules], convert=flat_kernels
    )

    def __init__(
        self,
        dims: Sequence[int] = (128, 224, 320),
        depths: Sequence[int] = (2, 4, 5),
        partial_dims: Sequence[int] = (32, 48, 68),
        qk_dim: int = 16,
        attends: Sequence[bool] = (False, True, True),
        **host: Any,
    ) -> None:
        for argument, given in (("depths", depths), ("partial_dims", partial_dims), ("attends", attends)):
            if len(given) != len(dims):
                raise ValueError(f"{argument} must have one entry for each of the {len(dims)} stages, got {given!r}.")

        def block(at: Place) -> nn.Module:
            parts: dict[str, nn.Module] = {"conv": local_mixing(at.dim, weight=0.0, drop_path=at.drop_path)}
            if attends[at.stage]:
                mixer = SingleHeadAttention(at.dim, partial_dim=partial_dims[at.stage], qk_dim=qk_dim)
                parts["mixer"] = Residual(mixer, at.drop_path)
            parts["ffn"] = feed_forward(at.dim, drop_path=at.drop_path)
            return nn.Sequential(OrderedDict(parts))

        super().__init__(block=block, dims=dims, depths=depths, num_heads=[1] * len(dims), **host)


_SOURCE = "class and table of the authors' repository; multiply-adds with BatchNorm folded"

SYSTEM = register_system(
    System(
        slug="shvit",
        title="SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design",
        year=2024,
        arxiv="2401.16456",
        evidence="authors_code",
        repo="ysj9909/SHViT",
        idea="One attention head on a fifth of the channels; a projection mixes it with the channels left alone.",
        mixers=("single_head",),
        variants=(
            image_variant("shvit_s1", SHViT, 6_330_808, 0.2414, source=_SOURCE),
            image_variant(
                "shvit_s2",
                SHViT,
                11_483_072,
                0.3655,
                source=_SOURCE,
                dims=(128, 308, 448),
                partial_dims=(32, 66, 96),
            ),
            image_variant(
                "shvit_s3",
                SHViT,
                14_245_273,
                0.6007,
                source=_SOURCE,
                dims=(192, 352, 448),
                depths=(3, 5, 5),
                partial_dims=(48, 75, 96),
            ),
            image_variant(
                "shvit_s4",
                SHViT,
                16_588_484,
                0.9864,
                side=256,
                source=_SOURCE,
                dims=(224, 336, 448),
                depths=(4, 7, 6),
                partial_dims=(48, 72, 96),
            ),
        ),
        reports=(
            "ImageNet-1K top-1: S1 72.8, S2 75.2, S3 77.4 at 224 px, S4 79.4 at 256 px (README)",
            "S4 is 3.3 / 8.1 / 2.4 times as fast as MobileViTv2-1.0 on GPU / CPU / iPhone 12, at +1.3 top-1 (abstract)",
        ),
    )
)
