"""CSWin Transformer: A General Vision Transformer Backbone with Cross-Shaped Windows (Dong et al., 2021, arXiv 2107.00652).

Half of the heads attend inside vertical stripes, half inside horizontal ones, so that a token reaches a whole cross in
one layer. Stripes widen as the map shrinks. A convolution of the values is the only sense of position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from regard.checkpoint import KeyMap
from regard.layers import CrossShaped, Mixer
from regard.registry import README_FLOPS, System, image_variant, register_mixer, register_system
from regard.skeletons import CSWinPyramid, Place


@register_mixer("cross_shaped")
class CrossShapedAttention(CrossShaped):
    r"""Cross-shaped window self-attention with locally-enhanced positional encoding (section 3.2).

    $$\mathrm{out} = W_o\,[a_1, \dots, a_A],\quad
      a_i = \mathrm{softmax}(d^{-1/2} Q_i K_i^\top)\,V_i + \mathrm{DWConv}(V_i) \quad\text{within each stripe along axis } i$$

    with A the number of axes and $Q_i, K_i, V_i$ the i-th share of the channels: `(stripes, *stripe, dim / A)`. In the
    plane, the first half of the heads works in vertical stripes of H x `stripe` tokens, the second in horizontal ones of
    `stripe` x W; the 3 x 3 convolution sees zeros beyond its stripe. A token thus depends on
    stripe H + stripe W - stripe² tokens, at (H + W) / 2 stripe keys a head. With one axis it is dense attention.

    Departure: on a map that is no multiple of the stripe, the last stripe is narrower; the authors' classifier refuses
    such maps, their detector fills them with zeros that take part in the softmax.

    Args:
        dim: channels. num_heads: divides dim, at least one head for each axis.
        stripe: width of the stripes; None is one branch of all heads over the whole map (the paper's last stage).
        branch: what runs inside a stripe in place of aᵢ. axes: number of spatial axes.
    """

    @classmethod
    def in_stack(cls, index: int, input_size: tuple[int, ...], dim: int, num_heads: int, **options: Any) -> Mixer:
        """Unless given, stripes follow the paper's stages: 1 on 56 tokens a side, 2 on 28, half of smaller maps, all of 7."""
        side = max(input_size)
        stripe = 1 if side >= 56 else 2 if side >= 28 else -(-side // 2) if side > 7 else None
        return cls(dim, num_heads, **{"stripe": stripe, "axes": len(input_size), **options})


class CSWinTransformer(CSWinPyramid):
    """A convolution of stride 4, four stages of `Block(CrossShapedAttention)`, convolutions of stride 2 between them.

    Args:
        stripes: width of the stripes of each stage, None for the whole map. A stage whose map at `img_size` is not larger
            than its stripe is built for the whole map.
        host: arguments of `CSWinPyramid`: dim, num_heads, img_size, drop_path_rate, num_classes, ...
    """

    authors_keys = KeyMap(rules=CSWinPyramid.host_rules)

    def __init__(
        self,
        *,
        depths: Sequence[int] = (1, 2, 21, 1),
        stripes: Sequence[int | None] = (1, 2, 7, None),
        **host: Any,
    ) -> None:
        def mixer(at: Place) -> nn.Module:
            stripe = stripes[at.stage]
            whole = stripe is None or stripe >= max(at.grid)
            return CrossShapedAttention(at.dim, at.num_heads, stripe=None if whole else stripe)

        super().__init__(mixer=mixer, depths=depths, **host)


_DEEP = {"depths": (2, 4, 32, 2)}
_BASE = {**_DEEP, "dim": 96, "num_heads": (4, 8, 16, 32)}
_LARGE = {**_DEEP, "dim": 144, "num_heads": (6, 12, 24, 24)}
_FINE = {"stripes": (1, 2, 12, None)}

SYSTEM = register_system(
    System(
        slug="cswin",
        title="CSWin Transformer: A General Vision Transformer Backbone with Cross-Shaped Windows",
        year=2021,
        arxiv="2107.00652",
        evidence="authors_code",
        repo="microsoft/CSWin-Transformer",
        idea="Half of the heads attend in vertical stripes, half in horizontal ones: a cross in one layer.",
        mixers=("cross_shaped",),
        variants=(
            image_variant("cswin_tiny", CSWinTransformer, 22_320_552, 4.341, 0.2),
            image_variant("cswin_small", CSWinTransformer, 34_643_304, 6.827, 0.4, **_DEEP),
            image_variant("cswin_base", CSWinTransformer, 77_382_184, 15.0, 0.5, source=README_FLOPS, **_BASE),
            image_variant("cswin_base_384", CSWinTransformer, 77_382_184, 47.08, 0.5, 384, **_BASE, **_FINE),
            image_variant("cswin_large", CSWinTransformer, 173_262_664, 33.19, **_LARGE),
            image_variant("cswin_large_384", CSWinTransformer, 173_262_664, None, 0.0, 384, **_LARGE, **_FINE),
        ),
        reports=(
            "ImageNet-1K top-1 at 224 px: T 82.7, S 83.6, B 84.2; B at 384 px 85.5 (README)",
            "ImageNet-1K top-1 of L at 384 px, pre-trained on ImageNet-21K: 87.5",
            "+1.2 top-1, +2.0 box AP, +1.4 mask AP, +2.0 mIoU over Swin at similar FLOPs (abstract)",
        ),
    )
)
