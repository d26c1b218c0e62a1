"""InLine attention. Bridging the Divide: Reconsidering Softmax and Linear Attention (Han et al., 2024, arXiv 2412.06590).

Linear attention divides by a sum, and so gives collinear queries the same weights; it also lacks softmax's sense of
locality. InLine subtracts the mean in place of the division, and adds a convolution whose kernels the image decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import checks, ops
from regard.checkpoint import KeyMap
from regard.layers import Block, CrossShaped, ProjectedCore, SpatialReductionAttention, depthwise, heads_of
from regard.registry import README_FLOPS, System, image_variant, register_mixer, register_system
from regard.skeletons import PVT, CSWinPyramid, DeiT, Place, SwinPyramid
from regard.systems.backbones.swin import WindowAttention

FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "exp": lambda x: torch.exp(0.2 * x),
}
"""The feature maps φ of the authors' code; all published models use the identity."""

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def injective_linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    r"""Linear attention normalised by subtraction (eq. 5), for features q and k that may be negative.

    $$o_i = \sum_j w_{ij} v_j,\quad w_{ij} = \frac{s}{N}\,q_i^\top (k_j - \bar k) + \frac1N,\quad s = d^{-1/2}$$

    The weights sum to 1 and may be negative. Two queries have equal weights only if their difference is orthogonal to
    all centred keys. The factor s / N, which the paper leaves to φ, is shared out between k and v so that half precision
    does not overflow.

    Args:
        q: `(batch, *spatial, heads, head_dim)`. k, v: `(batch, *spatial_k, heads, head_dim)`, N tokens.

    Returns:
        The shape of q, at a cost of N head_dim² a head.
    """
    k, v = k.flatten(1, -3), v.flatten(1, -3)
    scale = q.shape[-1] ** -0.5
    share = (scale / k.shape[1]) ** 0.5
    out = ops.linear_attention(q, k * share, v * share, normalize=False)
    mean_k, mean_v = (t.mean(1).view(t.shape[0], *[1] * (q.dim() - 3), *t.shape[2:]) for t in (k, v))
    return out + (1 - scale * (q * mean_k).sum(-1, keepdim=True)) * mean_v  # type: ignore[operator]


class LocalResidual(nn.Module):
    """A depthwise convolution with 3 kernels a side, made for each sample from a summary of it.

    The kernels come from two linear layers that keep to the heads: summary -> GELU -> 3^axes weights for each channel.
    """

    def __init__(self, dim: int, num_heads: int, *, axes: int = 2) -> None:
        super().__init__()
        self.axes = axes
        self.kernels = nn.Sequential(
            nn.Conv1d(dim, dim, 1, groups=num_heads), nn.GELU(), nn.Conv1d(dim, dim * 3**axes, 1, groups=num_heads)
        )

    def forward(self, v: Tensor, summary: Tensor) -> Tensor:
        """Grid `(B, *S, dim)`, summary `(B, dim)` -> the grid's shape."""
        batch, dim = summary.shape
        if batch == 0:
            return torch.zeros_like(v)
        kernels = self.kernels(summary[..., None]).reshape(batch * dim, 1, *[3] * self.axes)
        image = v.movedim(-1, 1).reshape(1, batch * dim, *v.shape[1:-1])
        out = _CONV[self.axes](image, kernels, padding=1, groups=batch * dim)
        return out.reshape(batch, dim, *v.shape[1:-1]).movedim(1, -1)


class InLineCore(nn.Module):
    r"""InLine attention on given q, k, v: $O = \mathrm{InL}(\phi(Q), \phi(K), V) + \mathrm{DWConv}_{r(x)}(V)$.

    Arguments as in `InLineAttention`; `lepe` adds a convolution with learned kernels, which the CSWin host has besides.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        axes: int = 2,
        feature: str = "identity",
        residual: bool = True,
        lepe: bool = False,
    ) -> None:
        super().__init__()
        self.head_dim, self.num_heads = heads_of(dim, num_heads), num_heads
        self.feature = checks.one_of("feature", feature, FEATURES)
        self.residual = LocalResidual(dim, num_heads, axes=axes) if residual else None
        self.local = depthwise(dim, 3, dims=axes) if lepe else None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, summary: Tensor, first: tuple[Tensor, ...] | None = None) -> Any:
        """Grids `(B, *S, dim)` and the summary `(B, dim)` that decides the kernels -> the grids' shape.

        With `first`, the q, k and v `(B, 1, dim)` of a class token, also its output.
        """
        spatial, phi = q.shape[1:-1], FEATURES[self.feature]
        tokens = [t.flatten(1, -2) for t in (phi(q), phi(k), v)]
        if first is not None:
            ahead = (phi(first[0]), phi(first[1]), first[2])
            tokens = [torch.cat([one, rest], 1) for one, rest in zip(ahead, tokens, strict=True)]
        out = injective_linear_attention(*(t.unflatten(-1, (self.num_heads, self.head_dim)) for t in tokens)).flatten(
            -2
        )
        grid = out[:, out.shape[1] - math.prod(spatial) :].unflatten(1, spatial)
        if self.residual is not None:
            grid = grid + self.residual(v, summary)
        if self.local is not None:
            grid = grid + self.local(v)
        return grid if first is None else (grid, out[:, :1])

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, feature={self.feature}"


_KERNELS = (r"(^|\.)residual\.(\d)\.", r"\1core.residual.kernels.\2.")


@register_mixer("inline")
class InLineAttention(ProjectedCore):
    """InLine attention with its projections, for 1, 2 or 3 spatial axes; nothing in it depends on the size of the grid.

    out = W_o `InLineCore`(x W_q, x W_k, x W_v); the kernels of the local residual come from the mean token of x.

    Args:
        axes: number of spatial axes. feature: φ, one of `FEATURES`.
        residual: False leaves out the local residual (the paper's ablation).
        class_token: `forward` takes and gives a class token beside the grid; it is outside of the convolution.
        joint_qkv: one matrix for q, k and v; otherwise one for q and one for k and v (as PVT has).
    """

    authors_keys = KeyMap(rules=(_KERNELS,))

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        axes: int = 2,
        feature: str = "identity",
        residual: bool = True,
        class_token: bool = False,
        qkv_bias: bool = True,
        joint_qkv: bool = True,
    ) -> None:
        checks.one_of("axes", str(axes), ("1", "2", "3"))
        core = InLineCore(dim, num_heads, axes=axes, feature=feature, residual=residual)
        super().__init__(
            dim, num_heads, core, axes=axes, class_token=class_token, qkv_bias=qkv_bias, joint_qkv=joint_qkv
        )

    def core_inputs(self, x: Tensor, class_token: Tensor | None) -> dict[str, Tensor]:
        """The mean token, which decides the kernels of the local residual."""
        tokens = x.flatten(1, -2)
        return {"summary": (tokens if class_token is None else torch.cat([class_token, tokens], 1)).mean(1)}


class InLineDeiT(DeiT):
    """DeiT with InLine attention in all blocks (heads of width 32, unlike DeiT's 64)."""

    authors_keys = KeyMap(rules=(*DeiT.host_rules, _KERNELS))

    def __init__(self, num_heads: int = 6, **host: Any) -> None:
        super().__init__(
            mixer=lambda at: InLineAttention(at.dim, at.num_heads, class_token=True), num_heads=num_heads, **host
        )


class InLinePVT(PVT):
    """PVT with InLine attention (without spatial reduction of the keys) in the first blocks of each stage.

    Args:
        inline_blocks: how many blocks of each stage are InLine; None is all. The others have PVT's own attention, whose
            keys are reduced by `reductions`.
    """

    authors_keys = KeyMap(rules=(*PVT.host_rules, _KERNELS))

    def __init__(
        self,
        num_heads: Sequence[int] = (2, 4, 10, 16),
        inline_blocks: Sequence[int] | None = None,
        reductions: Sequence[int] = (8, 4, 2, 1),
        **host: Any,
    ) -> None:
        def mixer(at: Place) -> nn.Module:
            if inline_blocks is not None and at.index >= inline_blocks[at.stage]:
                return SpatialReductionAttention(at.dim, at.num_heads, reduction=reductions[at.stage])
            return InLineAttention(at.dim, at.num_heads, joint_qkv=False)

        super().__init__(mixer=mixer, num_heads=num_heads, **host)


class InLineSwin(SwinPyramid):
    """Swin with InLine attention over the whole map in the first blocks of each stage, (shifted) windows in the others.

    Args:
        inline_blocks: how many blocks of each stage are InLine. window_size: of the others.
    """

    authors_keys = KeyMap(rules=(*SwinPyramid.host_rules, _KERNELS), drop=SwinPyramid.host_drop)

    def __init__(self, inline_blocks: Sequence[int] = (2, 2, 6, 0), window_size: int = 7, **host: Any) -> None:
        def mixer(at: Place) -> nn.Module:
            if at.index >= inline_blocks[at.stage]:
                window = min(window_size, *at.grid)
                return WindowAttention(at.dim, at.num_heads, window_size=window, shift=at.index % 2 == 1)
            return InLineAttention(at.dim, at.num_heads)

        super().__init__(mixer=mixer, **host)


class SummaryBlock(Block):
    """A `Block` whose mixer gets the mean of the tokens before the norm, as the authors' CSWin has it."""

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        x = x + self.drop_path(self.scale1(self.mixer(self.norm1(x), summary=x.flatten(1, -2).mean(1))))
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))


class InLineCSWin(CSWinPyramid):
    """CSWin with InLine attention over the whole map in the first blocks of each stage, cross-shaped windows in others.

    Its InLine blocks keep CSWin's convolution of the values, and take the summary from before the block's norm.

    Args:
        inline_blocks: how many blocks of each stage are InLine. stripes: width of the stripes of the others, in each
            stage; None for the whole map.
    """

    authors_keys = KeyMap(rules=(*CSWinPyramid.host_rules, (r"\.(branches\.0\.residual)\.(\d)\.", r".\1.kernels.\2.")))

    def __init__(
        self,
        inline_blocks: Sequence[int] = (2, 4, 0, 0),
        stripes: Sequence[int | None] = (1, 2, 7, None),
        **host: Any,
    ) -> None:
        def mixer(at: Place) -> nn.Module:
            if at.index >= inline_blocks[at.stage]:
                return CrossShaped(at.dim, at.num_heads, stripe=stripes[at.stage])
            return CrossShaped(
                at.dim, at.num_heads, stripe=None, branch=lambda dim, heads: InLineCore(dim, heads, lepe=True)
            )

        def block(dim: int, mixer: CrossShaped, **options: Any) -> Block:
            kind = SummaryBlock if isinstance(mixer.branches[0], InLineCore) else Block
            return kind(dim, mixer, **options)

        super().__init__(mixer=mixer, block=block, **host)


_SWIN_B = {"dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32), "inline_blocks": (2, 2, 2, 0)}
_CSWIN_S = {"depths": (3, 6, 29, 2), "inline_blocks": (3, 6, 0, 0)}
_CSWIN_B = {**_CSWIN_S, "dim": 96, "num_heads": (4, 8, 16, 32)}


SYSTEM = register_system(
    System(
        slug="inline_attention",
        title="Bridging the Divide: Reconsidering Softmax and Linear Attention",
        year=2024,
        arxiv="2412.06590",
        evidence="authors_code",
        repo="LeapLabTHU/InLine",
        idea="Linear attention normalised by subtraction, which keeps different queries apart, with a local residual.",
        mixers=("inline",),
        variants=(
            image_variant("inline_deit_tiny", InLineDeiT, 6_477_736, 1.114),
            image_variant("inline_deit_small", InLineDeiT, 16_734_760, 4.979, 0.0, 288, dim=320, num_heads=10),
            image_variant("inline_deit_base", InLineDeiT, 23_797_096, 17.207, 0.0, 448, dim=384, num_heads=12),
            image_variant("inline_pvt_tiny", InLinePVT, 12_032_232, 1.986, 0.1),
            image_variant("inline_pvt_small", InLinePVT, 21_556_136, 3.932, 0.1, depths=(3, 4, 6, 3)),
            image_variant("inline_pvt_medium", InLinePVT, 37_618_856, 6.887, 0.3, depths=(3, 4, 18, 3)),
            image_variant("inline_pvt_large", InLinePVT, 51_154_280, 10.164, 0.3, depths=(3, 8, 27, 3)),
            image_variant("inline_swin_tiny", InLineSwin, 29_223_544, 4.478, 0.2),
            image_variant(
                "inline_swin_small",
                InLineSwin,
                49_793_296,
                8.747,
                0.3,
                depths=(2, 2, 18, 2),
                inline_blocks=(2, 2, 0, 0),
            ),
            image_variant("inline_swin_base", InLineSwin, 88_350_120, 15.435, 0.5, **_SWIN_B),
            image_variant("inline_swin_base_384", InLineSwin, 88_465_320, None, 0.5, 384, **_SWIN_B, window_size=12),
            image_variant("inline_cswin_tiny", InLineCSWin, 20_604_520, 4.331, 0.2),
            image_variant("inline_cswin_small", InLineCSWin, 33_032_872, 6.802, 0.4, **_CSWIN_S),
            image_variant(
                "inline_cswin_base", InLineCSWin, 73_413_640, 14.9, 0.5, 224, source=README_FLOPS, **_CSWIN_B
            ),
            image_variant(
                "inline_cswin_base_384", InLineCSWin, 73_413_640, None, 0.7, 384, **_CSWIN_B, stripes=(1, 2, 12, None)
            ),
        ),
        reports=(
            "ImageNet-1K top-1 against the host at about equal FLOPs: DeiT-T 72.2 -> 74.5, PVT-S 79.8 -> 82.0, "
            "Swin-T 81.3 -> 82.4, Swin-B 83.5 -> 84.1",
            "the README prints 25, 43 and 96 M parameters for InLine-CSWin-T, -S and -B; its code has 20.6, 33.0 and 73.4 M",
        ),
    )
)
