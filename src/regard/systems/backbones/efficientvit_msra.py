"""EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention (Liu et al., 2023, arXiv 2305.07027).

Heads that all read the same channels come to look alike. Here each head gets its own share of the channels, and the output
of the head before it on top. One such attention stands between several feed-forward layers, which need less memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import checks, ops
from regard.checkpoint import KeyMap
from regard.layers import LEVIT_NAMES, ConvNorm, DistanceBias, Mixer, Residual, flat_kernels, heads_of
from regard.layouts.windows import crop, map_windows, pad_to_multiple
from regard.registry import System, image_variant, register_mixer, register_system
from regard.skeletons import LightPyramid, Place
from regard.skeletons.light import feed_forward, local_mixing


@register_mixer("cascaded_group")
class CascadedGroupAttention(Mixer):
    r"""Heads in a row, each on its own channels plus what the head before it gave (CGA, section 3.1, eq. 2 and 3).

    $$y_i = \mathrm{softmax}(e^{-1/2}\,\mathrm{DW}_i(Q_i) K_i^\top + B_i)\,V_i,\quad
      Q_i, K_i, V_i = \mathrm{BN}(W_i (x_i + y_{i-1})),\quad y_0 = 0$$
    $$\mathrm{out} = \mathrm{BN}(W_o\,\mathrm{relu}[y_1, \dots, y_h])$$

    x_i is the i-th of h equal shares of the channels, and V_i as wide; Q_i and K_i have e channels. DW is a depthwise
    convolution with BatchNorm. B_i depends on the distance of two tokens along each axis. All this happens inside windows;
    at the end of a map that is no multiple of the window they are filled with zeros, which take part as they do in the
    authors' code. The last BatchNorm starts at zero, so that a residual block starts as nothing.

    Departure: a map smaller than the window along an axis is one window of its size there, with the biases interpolated;
    the authors refuse such maps.

    Args:
        dim: channels. num_heads: h, divides dim. qk_dim: e.
        kernel_sizes: of the convolution of each head's queries, at least one for each head; an integer is for all.
        window_size: one integer or one for each of `axes`.
        cascade: add the output of the head before; without it the heads are independent (the paper's ablation).
        axes: number of spatial axes.
    """

    authors_keys = KeyMap(
        rules=[(r"\bproj\.1\.", "proj."), (r"\battention_biases$", "bias.table"), *LEVIT_NAMES],
        drop=[r"attention_bias_idxs$"],
        convert=flat_kernels,
    )

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qk_dim: int = 16,
        kernel_sizes: int | Sequence[int] = 5,
        window_size: int | Sequence[int] = 7,
        cascade: bool = True,
        axes: int = 2,
    ) -> None:
        super().__init__()
        self.head_dim = heads_of(dim, num_heads)
        checks.positive("qk_dim", qk_dim)
        kernels = [kernel_sizes] * num_heads if isinstance(kernel_sizes, int) else list(kernel_sizes)
        if len(kernels) < num_heads:
            raise ValueError(
                f"kernel_sizes must have one entry for each of the {num_heads} heads, got {kernel_sizes!r}."
            )
        self.dim, self.num_heads, self.qk_dim, self.cascade, self.axes = dim, num_heads, qk_dim, cascade, axes
        self.window_size = checks.tuple_of("window_size", window_size, axes)
        self.qkvs = nn.ModuleList(ConvNorm(self.head_dim, 2 * qk_dim + self.head_dim) for _ in range(num_heads))
        self.dws = nn.ModuleList(
            ConvNorm(qk_dim, qk_dim, size, groups=qk_dim, axes=axes) for size in kernels[:num_heads]
        )
        self.bias = DistanceBias(self.window_size, num_heads)
        self.act = nn.ReLU()
        self.proj = ConvNorm(dim, dim, weight=0.0)

    @classmethod
    def in_stack(cls, index: int, input_size: tuple[int, ...], dim: int, num_heads: int, **options: Any) -> Mixer:
        """Unless given, windows are 7, and no larger than the grid."""
        options.setdefault("window_size", tuple(min(7, length) for length in input_size))
        return cls(dim, num_heads, axes=len(input_size), **options)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        spatial = self.check(x)
        sizes = [min(own, length) for own, length in zip(self.window_size, spatial, strict=True)]
        return crop(map_windows(self._within, sizes, pad_to_multiple(x, sizes)), spatial)

    def _within(self, windows: Tensor) -> Tensor:
        """`(windows, *sizes, dim)` -> the same shape."""
        biases = self.bias(windows.shape[1:-1])
        outs: list[Tensor] = []
        for head, share in enumerate(self.shares(windows)):
            q, k, v = self.project(head, share + outs[-1] if self.cascade and outs else share)
            out = ops.attention(q.unsqueeze(-2), k.unsqueeze(-2), v.unsqueeze(-2), bias=biases[head])
            outs.append(out.squeeze(-2))  # type: ignore[union-attr]
        return self.proj(self.act(torch.cat(outs, -1)))

    def shares(self, windows: Tensor) -> Sequence[Tensor]:
        """What each head reads besides the output of the one before."""
        return windows.chunk(self.num_heads, -1)

    def project(self, head: int, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values of a head: `(windows, *sizes, width)` each."""
        q, k, v = self.qkvs[head](x).split([self.qk_dim, self.qk_dim, self.head_dim], -1)
        return self.dws[head](q), k, v

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, qk_dim={self.qk_dim}, window_size={self.window_size}, "
            f"cascade={self.cascade}"
        )


class EfficientViT(LightPyramid):
    """`LightPyramid` of blocks "local mixing, feed-forward, attention, local mixing, feed-forward", all residual.

    Args:
        dims, depths, num_heads: channels, blocks and heads of each stage.
        kernel_sizes: of the convolution of each head's queries; stages with fewer heads use the first ones.
        window_size: of each stage; a stage whose map at `img_size` is smaller gets a window of the map's size.
        qk_dim: width of a head's queries and keys.
        host: further arguments of `LightPyramid`: stem_stride, img_size, drop_path_rate, num_classes, ...
    """

    authors_keys = KeyMap(
        rules=[
            (r"\.dw0\.m\.", ".0.branch."),
            (r"\.ffn0\.m\.", ".1.branch."),
            (r"\.mixer\.m\.attn\.", ".2.branch."),
            (r"\.dw1\.m\.", ".3.branch."),
            (r"\.ffn1\.m\.", ".4.branch."),
            *LightPyramid.host_rules,
            *CascadedGroupAttention.authors_keys.rules,
        ],
        drop=CascadedGroupAttention.authors_keys.drop,
        convert=flat_kernels,
    )

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 192),
        depths: Sequence[int] = (1, 2, 3),
        num_heads: Sequence[int] = (4, 4, 4),
        kernel_sizes: Sequence[int] = (5, 5, 5, 5),
        window_size: Sequence[int] = (7, 7, 7),
        qk_dim: int = 16,
        **host: Any,
    ) -> None:
        def block(at: Place) -> nn.Module:
            mixer = CascadedGroupAttention(
                at.dim,
                at.num_heads,
                qk_dim=qk_dim,
                kernel_sizes=kernel_sizes,
                window_size=min(window_size[at.stage], *at.grid),
            )
            return nn.Sequential(
                local_mixing(at.dim, weight=0.0, drop_path=at.drop_path),
                feed_forward(at.dim, drop_path=at.drop_path),
                Residual(mixer, at.drop_path),
                local_mixing(at.dim, weight=0.0, drop_path=at.drop_path),
                feed_forward(at.dim, drop_path=at.drop_path),
            )

        super().__init__(block=block, dims=dims, depths=depths, num_heads=num_heads, **host)

    def no_weight_decay(self) -> set[str]:
        """The position tables."""
        return {name for name, _ in self.named_parameters() if name.endswith("bias.table")}

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Resize position tables of another window size (bicubic, as the authors do for finer resolutions)."""
        for name in self.no_weight_decay() & state.keys():
            old, new = (round(tensor.shape[1] ** 0.5) for tensor in (state[name], self.get_parameter(name)))
            if old != new:
                grid = state[name].unflatten(1, (old, old))[None]
                state[name] = F.interpolate(grid, (new, new), mode="bicubic", align_corners=False)[0].flatten(1)
        return state


_SOURCE = "class and table of the authors' repository; multiply-adds with BatchNorm folded"
_FALLING = {"kernel_sizes": (7, 5, 3, 3)}

SYSTEM = register_system(
    System(
        slug="efficientvit_msra",
        title="EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention",
        year=2023,
        arxiv="2305.07027",
        evidence="authors_code",
        repo="microsoft/Cream",
        idea="Each attention head reads its own share of the channels, and the output of the head before it on top.",
        mixers=("cascaded_group",),
        variants=(
            image_variant("efficientvit_m0", EfficientViT, 2_349_436, 0.0792, source=_SOURCE),
            image_variant(
                "efficientvit_m1",
                EfficientViT,
                2_980_560,
                0.1671,
                source=_SOURCE,
                dims=(128, 144, 192),
                num_heads=(2, 3, 3),
                **_FALLING,
            ),
            image_variant(
                "efficientvit_m2",
                EfficientViT,
                4_187_554,
                0.2010,
                source=_SOURCE,
                dims=(128, 192, 224),
                num_heads=(4, 3, 2),
                **_FALLING,
            ),
            image_variant(
                "efficientvit_m3",
                EfficientViT,
                6_900_722,
                0.2627,
                source=_SOURCE,
                dims=(128, 240, 320),
                num_heads=(4, 3, 4),
            ),
            image_variant(
                "efficientvit_m4",
                EfficientViT,
                8_804_228,
                0.2993,
                source=_SOURCE,
                dims=(128, 256, 384),
                **_FALLING,
            ),
            image_variant(
                "efficientvit_m5",
                EfficientViT,
                12_473_772,
                0.5216,
                source=_SOURCE,
                dims=(192, 288, 384),
                depths=(1, 3, 4),
                num_heads=(3, 3, 4),
                **_FALLING,
            ),
        ),
        reports=(
            "ImageNet-1K top-1 at 224 px: M0 63.2, M1 68.4, M2 70.8, M3 73.4, M4 74.3, M5 77.1 (README)",
            "M5 is 1.9 points above MobileNetV3-Large at 1.40 / 1.45 times its throughput on a V100 / Xeon (abstract)",
            "M2 is 1.8 points above MobileViT-XXS at 5.8 / 3.7 times its throughput on GPU / CPU (abstract)",
        ),
    )
)
