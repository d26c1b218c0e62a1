"""Swin Transformer: Hierarchical Vision Transformer using Shifted Windows (Liu et al., 2021, arXiv 2103.14030).

Attention stays inside windows of M x M tokens, so its cost is linear in the image. Every second block shifts the
windows by half their size, which connects neighbours. A learned bias for each relative offset is the only sense of
position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from regard import checks, ops
from regard.checkpoint import KeyMap
from regard.layers import Mixer, RelativePositionBias, heads_of, resize_bias_tables
from regard.registry import System, Variant, register_mixer, register_system
from regard.skeletons import Place, SwinPyramid


@register_mixer("window")
class WindowAttention(Mixer):
    r"""(Shifted) window attention with relative position bias, for 1, 2 or 3 spatial axes (section 3.2, eq. 4).

    $$\mathrm{out} = W_o\,\mathrm{softmax}(d^{-1/2} Q K^\top + B)\,V \quad\text{within each window}$$

    B[i, j] depends on the offset i - j only. On a map not larger than the window along its shorter side, one window of
    that side is used and nothing is shifted, as in the authors' code; the bias table keeps its size.

    Departure: on a map that is no multiple of the window, the windows at its end are smaller; the authors' classifier
    refuses such maps, their detector fills them with zeros that take part in the softmax.

    Args:
        dim: channels. num_heads: divides dim. window_size: M, one integer or one for each of `axes`.
        shift: False, or True for half a window.
        axes: number of spatial axes.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window_size: int | Sequence[int] = 7,
        shift: bool = False,
        axes: int = 2,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        self.head_dim = heads_of(dim, num_heads)
        self.dim, self.num_heads, self.shift, self.axes = dim, num_heads, shift, axes
        self.window_size = checks.tuple_of("window_size", window_size, axes)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.bias = RelativePositionBias(self.window_size, num_heads)
        self.proj = nn.Linear(dim, dim)

    @classmethod
    def in_stack(cls, index: int, input_size: tuple[int, ...], dim: int, num_heads: int, **options: Any) -> Mixer:
        """Every second block is shifted. Unless given, windows are 7 or the largest side up to 8 that divides the grid."""
        window = options.pop("window_size", None)
        if window is None:
            window = tuple(next((w for w in (7, 8, 6, 5, 4) if side % w == 0 and w < side), 7) for side in input_size)
        window = checks.tuple_of("window_size", window, len(input_size))
        window = tuple(min(size, length) for size, length in zip(window, input_size, strict=True))
        return cls(dim, num_heads, window_size=window, shift=index % 2 == 1, axes=len(input_size), **options)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        spatial = self.check(x)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        size = self.window_size
        shift = tuple(length // 2 for length in size) if self.shift else (0,) * self.axes
        if any(length <= side for length, side in zip(spatial, size, strict=True)):
            # The map is one window along some axis: clip windows to the map, and shift nothing (authors' rule).
            size, shift = tuple(map(min, spatial, size)), (0,) * self.axes
        out = ops.window_attention(q, k, v, window_size=size, shift=shift, bias=self.bias(size))
        return self.proj(out.flatten(-2))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, window_size={self.window_size}, shift={self.shift}"


class SwinTransformer(SwinPyramid):
    """Patches of 4 x 4, four stages of `Block(WindowAttention)`, patch merging between them, LayerNorm, mean, linear.

    Args:
        window_size: M of every stage; a stage whose map at `img_size` is smaller gets (and learns the bias of) a window
            of the map's size.
        host: arguments of `SwinPyramid`: dim, depths, num_heads, img_size, drop_path_rate, num_classes, ...
    """

    authors_keys = KeyMap(rules=SwinPyramid.host_rules, drop=SwinPyramid.host_drop)

    def __init__(self, *, window_size: int = 7, **host: Any) -> None:
        def mixer(at: Place) -> nn.Module:
            window = min(window_size, *at.grid)
            return WindowAttention(at.dim, at.num_heads, window_size=window, shift=at.index % 2 == 1)

        super().__init__(mixer=mixer, **host)

    def no_weight_decay(self) -> set[str]:
        """The position tables."""
        return {name for name, _ in self.named_parameters() if name.endswith("bias.table")}

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Resize bias tables of another window size (bicubic, as the authors do for finer resolutions)."""
        return resize_bias_tables(state, self.state_dict())


_LARGE = {"depths": (2, 2, 18, 2)}
_README = "table and class of the authors' repository"

SYSTEM = register_system(
    System(
        slug="swin",
        title="Swin Transformer: Hierarchical Vision Transformer using Shifted Windows",
        year=2021,
        arxiv="2103.14030",
        evidence="authors_code",
        repo="microsoft/Swin-Transformer",
        idea="Attention inside windows, which every second block shifts by half a window to connect neighbours.",
        mixers=("window",),
        variants=(
            Variant("swin_tiny", SwinTransformer, 28_288_354, 4.494, source=_README, options={"drop_path_rate": 0.2}),
            Variant(
                "swin_small",
                SwinTransformer,
                49_606_258,
                8.7,
                source=_README,
                options={**_LARGE, "drop_path_rate": 0.3},
            ),
            Variant(
                "swin_base",
                SwinTransformer,
                87_768_224,
                15.4,
                source=_README,
                options={**_LARGE, "dim": 128, "num_heads": (4, 8, 16, 32), "drop_path_rate": 0.5},
            ),
            Variant(
                "swin_base_384",
                SwinTransformer,
                87_903_584,
                47.1,
                inputs=((1, 3, 384, 384),),
                source=_README,
                options={
                    **_LARGE,
                    "dim": 128,
                    "num_heads": (4, 8, 16, 32),
                    "window_size": 12,
                    "img_size": 384,
                    "drop_path_rate": 0.5,
                },
            ),
            Variant(
                "swin_large",
                SwinTransformer,
                196_532_476,
                34.5,
                source=_README,
                options={**_LARGE, "dim": 192, "num_heads": (6, 12, 24, 48), "drop_path_rate": 0.2},
            ),
        ),
        reports=(
            "ImageNet-1K top-1 at 224 px: T 81.2, S 83.2, B 83.5; B at 384 px 84.5 (README)",
            "Swin-T without shifting 80.2, with 81.3 top-1 (paper, table 4)",
        ),
    )
)
