"""MAFormer: A Transformer Network with Multi-scale Attention Fusion (Wang et al., 2022, arXiv 2209.01620).

Window attention makes fine local tokens; beside it, a fully connected layer over all positions compresses the map into
fewer global ones. The local tokens then ask the global ones: attention decides what each takes from the whole image.

A reconstruction, not a reproduction: no code was released, and the paper's text was not at hand. The equations are those
of its abstract and of a later paper that restates the block (U-MAFT, GeoInformatica 30:10, 2026, eq. 8-14); whatever is
marked "chosen" below is found in neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from regard import checks
from regard.layers import Block, Mixer, PositionTable, SoftmaxAttention, resize_map
from regard.registry import System, Variant, register_mixer, register_system
from regard.skeletons import Place, SwinPyramid
from regard.systems.backbones.swin import WindowAttention


class GlobalDownsampling(nn.Module):
    r"""Global Learning with Down-sampling (GLD): all positions to fewer tokens (eq. 10 of U-MAFT).

    $$X_G = \mathrm{FC}(X^\top)^\top + E,\quad \mathrm{FC}: \mathbb{R}^M \to \mathbb{R}^{N_G}$$

    X is the flattened map `(M, dim)`, and N_G = ratio M. The layer acts along positions and is shared by the channels; E
    is a learned position of each global token. Chosen: the layer has a bias, and since its weights are tied to M
    positions, a map of another size is first interpolated (linearly) to the built one, so that every map has N_G global
    tokens.

    Args:
        input_size: tokens along each axis of the map that the layer is built for.
        ratio: global tokens per position, above 0 and at most 1.
    """

    def __init__(self, dim: int, input_size: Sequence[int], *, ratio: float = 0.5) -> None:
        super().__init__()
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio must be above 0 and at most 1 (global tokens per position), got {ratio}.")
        positions = math.prod(input_size)
        self.input_size, self.count = tuple(input_size), max(round(ratio * positions), 1)
        self.fc = nn.Linear(positions, self.count)
        self.position = PositionTable((self.count,), dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> `(B, N_G, dim)`."""
        channels = resize_map(x.movedim(-1, 1), self.input_size).flatten(2)  # (B, dim, M)
        return self.position(self.fc(channels).transpose(1, 2))

    def extra_repr(self) -> str:
        return f"input_size={self.input_size}, count={self.count}"


@register_mixer("multi_scale_fusion")
class MultiScaleFusion(Mixer):
    r"""Local tokens from windows ask global tokens from a fully connected layer, for 1, 2 or 3 axes (eq. 8-14 of U-MAFT).

    $$L = \mathrm{LWA}(x),\quad X_G = \mathrm{GLD}(x),\quad \mathrm{out} = L + W_o\,\mathrm{softmax}(d^{-1/2} Q K^\top) V,
      \quad Q = L W_q,\quad K, V = X_G W_{kv}$$

    LWA is window attention with a bias by relative position (as in Swin, not shifted), GLD is `GlobalDownsampling`; the
    softmax runs over its N_G tokens. With N positions the fusion costs 2 N N_G dim multiply-adds and GLD N N_G dim, so
    the cost still grows with the square of the map.

    In the published block the local branch goes through an MLP before it asks: `FusionBlock` puts the three parts of
    this mixer together in that order. Chosen: several heads, the output projection, and the sum with L.

    Args:
        dim: channels. num_heads: divides dim; of windows and fusion alike.
        window_size: of the local branch, one integer or one for each of `axes`.
        ratio: global tokens per position (the restating paper's best is 0.5).
        input_size: the map that GLD is built for, one integer or one for each axis; None is two windows along each. Maps
            of other sizes are interpolated for it.
        axes: number of spatial axes.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window_size: int | Sequence[int] = 7,
        ratio: float = 0.5,
        input_size: int | Sequence[int] | None = None,
        axes: int = 2,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        self.local = WindowAttention(dim, num_heads, window_size=window_size, axes=axes, qkv_bias=qkv_bias)
        self.dim, self.num_heads, self.axes = dim, num_heads, axes
        usual = [2 * side for side in self.local.window_size] if input_size is None else input_size
        self.compress = GlobalDownsampling(dim, checks.tuple_of("input_size", usual, axes), ratio=ratio)
        self.fuse = SoftmaxAttention(dim, num_heads, qkv_bias=qkv_bias)

    @classmethod
    def in_stack(cls, index: int, input_size: tuple[int, ...], dim: int, num_heads: int, **options: Any) -> Mixer:
        """GLD is built for the grid. Unless given, windows are chosen as for (shifted) window attention."""
        if "window_size" not in options:
            options["window_size"] = WindowAttention.in_stack(0, input_size, dim, num_heads).window_size
        return cls(dim, num_heads, **{"input_size": input_size, "axes": len(input_size), **options})

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        self.check(x)
        local = self.local(x)
        return local + self.fuse(local, self.compress(x))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}"


class FusionBlock(Block):
    r"""The published block: the parts of a `MultiScaleFusion`, with an MLP before the local tokens ask.

    $$u = n_1(x),\quad L = x + \mathrm{LWA}(u),\quad X_L = L + \mathrm{MLP}(n_2(L)),\quad
      \mathrm{out} = X_L + \mathrm{MAF}(n_3(X_L), \mathrm{GLD}(u))$$

    Chosen: the norms n₁ before GLD, n₂ and n₃, and the residual connection of the fusion.

    Args:
        mixer: its `local`, `compress` and `fuse` are used. options: those of `Block`.
    """

    mixer: MultiScaleFusion

    def __init__(
        self, dim: int, mixer: MultiScaleFusion, *, norm: Callable[[int], nn.Module] = nn.LayerNorm, **options: Any
    ) -> None:
        super().__init__(dim, mixer, norm=norm, **options)
        self.norm3 = norm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        u = self.norm1(x)
        local = x + self.drop_path(self.scale1(self.mixer.local(u)))
        local = local + self.drop_path(self.scale2(self.mlp(self.norm2(local))))
        return local + self.drop_path(self.mixer.fuse(self.norm3(local), self.mixer.compress(u)))


class MAFormer(SwinPyramid):
    """Patches of 4 x 4, stages of `FusionBlock`, then stages of dense attention, patch merging between them.

    Large maps come first, and there dense attention would be dear: the first two stages fuse, the last two hold ordinary
    transformer blocks. Sizes are chosen: those of the encoder of U-MAFT (its table 2).

    Args:
        window_size: of the local branch, where the map at `img_size` is not smaller.
        ratio: global tokens per position. fused_stages: how many stages, from the first, have `FusionBlock`s.
        img_size: GLD is built for it; on images of other sizes the maps are interpolated for GLD.
        host: arguments of `SwinPyramid`: mlp_ratio, drop_path_rate, num_classes, ...
    """

    def __init__(
        self,
        *,
        dim: int = 64,
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (2, 4, 8, 8),
        window_size: int = 7,
        ratio: float = 0.5,
        fused_stages: int = 2,
        **host: Any,
    ) -> None:
        def mixer(at: Place) -> nn.Module:
            if at.stage >= fused_stages:
                return SoftmaxAttention(at.dim, at.num_heads)
            window = min(window_size, *at.grid)
            return MultiScaleFusion(at.dim, at.num_heads, window_size=window, ratio=ratio, input_size=at.grid)

        def block(dim: int, mixer: nn.Module, **options: Any) -> nn.Module:
            kind = FusionBlock if isinstance(mixer, MultiScaleFusion) else Block
            return kind(dim, mixer, **options)

        super().__init__(mixer=mixer, block=block, dim=dim, depths=depths, num_heads=num_heads, **host)

    def no_weight_decay(self) -> set[str]:
        """The position tables."""
        return {name for name, _ in self.named_parameters() if name.endswith(("bias.table", "position.table"))}


SYSTEM = register_system(
    System(
        slug="maformer",
        title="MAFormer: A Transformer Network with Multi-scale Attention Fusion for Visual Recognition",
        year=2022,
        arxiv="2209.01620",
        evidence="abstract_only",
        idea="Tokens of local windows ask fewer, global tokens, which a fully connected layer makes of the whole map.",
        mixers=("multi_scale_fusion",),
        variants=(Variant("maformer_reconstructed", MAFormer),),
        reports=(
            "no code was released: a reconstruction from the abstract and from a later paper that restates the block; "
            "depths, widths and heads are that paper's, and no published count is known to hold it to",
            "ImageNet-1K top-1 of MAFormer-L 85.9, 1.7 above CSWin-B and 0.6 above LV-ViT-L (abstract)",
            "COCO: 1.7 box AP and 1.4 mask AP above CSWin at similar size (abstract)",
        ),
    )
)
