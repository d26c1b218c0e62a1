"""RMT: Retentive Networks Meet Vision Transformers (Fan et al., 2023, arXiv 2309.11523).

Each head of self-attention forgets with Manhattan distance, at a rate of its own: an explicit sense of space. On large
maps attention and decay fall apart into a pass along each row and one along each column, which cost far less.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regard import checks, ops
from regard.checkpoint import KeyMap
from regard.layers import ConvStem, Mixer, depthwise, heads_of, vit_init
from regard.layers.rotary import flat_angles, rotate
from regard.registry import System, Variant, image_variant, register_mixer, register_system
from regard.skeletons import ConvPyramid, Place

DECAYS = ("inside", "outside", "none")


@register_mixer("manhattan")
class ManhattanAttention(Mixer):
    r"""Manhattan self-attention: dense attention whose weights fade with distance (MaSA, section 3.2).

    $$\mathrm{out} = W_o\,(\mathrm{softmax}(d^{-1/2} Q K^\top + \log D)\,V + \mathrm{DWConv}(V)),\quad
      D_{ij} = \gamma^{\lVert p_i - p_j \rVert_1},\quad \gamma_h = 1 - 2^{-a - r h / H}$$

    for head h of H: the first forgets fastest. Q and K are turned by their token's row-major index (RetNet's rotation).
    Decomposed, the last axis is mixed first, then the others up to the first, each with its own distances; all
    passes use the same Q and K, and D is the product of the decays of the passes.

    The decay stands inside of the softmax, as in the authors' code, so that weights still sum to 1. The paper's equation
    has it outside, softmax(...) times D: `decay="outside"`.

    Args:
        dim: channels. num_heads: divides dim into heads of even width.
        decomposed: one pass along each axis.
        initial_decay, decay_range: a and r.
        decay: "inside", "outside", or "none" for attention without decay.
        kernel_size: of the depthwise convolution of the values (local context enhancement).
        axes: number of spatial axes.
    """

    authors_keys = KeyMap(
        rules=[
            (r"^retention\.", ""),
            (r"\b([qkv])_proj\.", r"\1."),
            (r"\blepe\.conv\.", "local."),
            (r"\bout_proj\.", "proj."),
        ],
        drop=[r"\bRelpos\."],
    )

    log_decay: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        decomposed: bool = False,
        initial_decay: float = 2.0,
        decay_range: float = 4.0,
        decay: str = "inside",
        kernel_size: int = 5,
        axes: int = 2,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        self.head_dim = heads_of(dim, num_heads)
        checks.divisible("the head width dim / num_heads", self.head_dim, "the channels that turn together", 2)
        checks.positive("initial_decay", initial_decay)
        self.dim, self.num_heads, self.decomposed, self.axes = dim, num_heads, decomposed, axes
        self.decay = checks.one_of("decay", decay, DECAYS)
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.k = nn.Linear(dim, dim, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.local = depthwise(dim, kernel_size, dims=axes)
        self.proj = nn.Linear(dim, dim)
        rates = [math.log1p(-(2.0 ** (-initial_decay - decay_range * h / num_heads))) for h in range(num_heads)]
        self.register_buffer("log_decay", torch.tensor(rates), persistent=False)

    @classmethod
    def in_stack(cls, index: int, input_size: tuple[int, ...], dim: int, num_heads: int, **options: Any) -> Mixer:
        """Unless given, decomposed on grids of more than 14 x 14 tokens."""
        options.setdefault("decomposed", math.prod(input_size) > 196)
        return cls(dim, num_heads, axes=len(input_size), **options)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        spatial = self.check(x)
        v = self.v(x)
        local = self.local(v)
        q, k, v = (t.unflatten(-1, (self.num_heads, self.head_dim)) for t in (self.q(x), self.k(x), v))
        angles = flat_angles(spatial, self.head_dim // 2).unsqueeze(-2)
        q, k = rotate(q, angles), rotate(k, angles)
        if self.decomposed:
            for axis in reversed(range(1, 1 + len(spatial))):
                v = self._along(axis, q, k, v)
        else:
            v = self._attend(q, k, v, spatial)
        return self.proj(v.flatten(-2) + local)

    def log_decays(self, spatial: Sequence[int]) -> Tensor:
        """log D, distances times the rate of each head: `(heads, N, N)` for a grid of N = prod(spatial) tokens."""
        distance = self.log_decay.new_zeros(1, 1)
        for length in spatial:
            place = torch.arange(length, device=distance.device)
            apart = (place[:, None] - place).abs()
            distance = (distance[:, None, :, None] + apart[None, :, None, :]).flatten(2).flatten(0, 1)
        return self.log_decay[:, None, None] * distance

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, spatial: Sequence[int]) -> Tensor:
        """Attention among all tokens of a grid: `(B, *spatial, heads, d)` -> the same shape."""
        if self.decay == "none":
            return ops.attention(q, k, v)  # type: ignore[return-value]
        if self.decay == "inside":
            return ops.attention(q, k, v, bias=self.log_decays(spatial))  # type: ignore[return-value]
        q, k, v = (t.flatten(1, -3).transpose(1, 2) for t in (q, k, v))  # (B, heads, N, d)
        weights = (self.head_dim**-0.5 * q @ k.transpose(-1, -2)).softmax(-1)
        out = (weights * self.log_decays(spatial).exp()) @ v
        return out.transpose(1, 2).unflatten(1, spatial)

    def _along(self, axis: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention among the tokens of each line along `axis`: `(B, *S, heads, d)` -> the same shape."""
        q, k, v = (t.movedim(axis, -3) for t in (q, k, v))
        lines, length = v.shape[:-3], v.shape[-3]
        q, k, v = (t.flatten(0, -4) for t in (q, k, v))
        out = self._attend(q, k, v, (length,))
        return out.unflatten(0, lines).movedim(-3, axis)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, decomposed={self.decomposed}, decay={self.decay!r}"


class RMT(ConvPyramid):
    """Four convolutions to a quarter of the image, blocks of Manhattan attention, linear to 1024, BatchNorm, SiLU, mean.

    Args:
        dims, depths, num_heads, mlp_ratios: of each stage.
        decomposed: whether the attention of a stage runs along the axes one by one.
        initial_decays, decay_ranges: a and r of each stage, see `ManhattanAttention`. decay: where the decay stands.
        layer_scales: initial layer scale of each stage, None for none; None for all stages.
        projection: channels before the classifier.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0.
    """

    authors_keys = KeyMap(
        rules=[
            *ConvPyramid.host_rules,
            (r"\.retention_layer_norm\.", ".norm1."),
            (r"\.final_layer_norm\.", ".norm2."),
            (r"\.pos\.conv\.", ".position."),
            (r"\.ffn\.dwconv\.conv\.", ".mlp.local."),
            (r"\.ffn\.", ".mlp."),
            (r"\.retention\.", ".mixer."),
            *ManhattanAttention.authors_keys.rules,
        ],
        drop=ManhattanAttention.authors_keys.drop,
        convert=ConvPyramid.host_convert,
    )

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (3, 4, 18, 4),
        num_heads: Sequence[int] = (4, 4, 8, 16),
        mlp_ratios: Sequence[float] = (4, 4, 3, 3),
        decomposed: Sequence[bool] = (True, True, True, False),
        initial_decays: Sequence[float] = (2, 2, 2, 2),
        decay_ranges: Sequence[float] = (4, 4, 6, 6),
        decay: str = "inside",
        layer_scales: Sequence[float | None] | None = None,
        projection: int = 1024,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        def mixer(at: Place) -> nn.Module:
            return ManhattanAttention(
                at.dim,
                at.num_heads,
                decomposed=decomposed[at.stage],
                initial_decay=initial_decays[at.stage],
                decay_range=decay_ranges[at.stage],
                decay=decay,
            )

        super().__init__(
            mixer=mixer,
            stem=ConvStem(in_chans, [dims[0] // 2, dims[0] // 2, dims[0], dims[0]], [2, 1, 2, 1]),
            dims=dims,
            depths=depths,
            num_heads=num_heads,
            mlp_ratios=mlp_ratios,
            layer_scales=layer_scales,
            projection=projection,
            drop_path_rate=drop_path_rate,
            num_classes=num_classes,
            in_chans=in_chans,
        )
        self.apply(vit_init)


def _variant(name: str, params: int, gmacs: float, readme: float, drop: float, **options: Any) -> Variant:
    source = f"parameters of the authors' training log, multiply-adds counted in their code; README: {readme} G"
    return image_variant(name, RMT, params, gmacs, drop, source=source, **options)


_LARGE: dict[str, Any] = {"depths": (4, 8, 25, 8), "layer_scales": (None, None, 1e-6, 1e-6)}

SYSTEM = register_system(
    System(
        slug="rmt",
        title="RMT: Retentive Networks Meet Vision Transformers",
        year=2023,
        arxiv="2309.11523",
        evidence="authors_code",
        repo="qhfan/RMT",
        idea="Attention weights fade with Manhattan distance, at a rate for each head; rows and columns in two passes.",
        mixers=("manhattan",),
        variants=(
            _variant(
                "rmt_tiny",
                14_334_216,
                2.651,
                2.5,
                0.1,
                depths=(2, 2, 8, 2),
                mlp_ratios=(3, 3, 3, 3),
                decomposed=(True, True, False, False),
            ),
            _variant("rmt_small", 26_967_240, 4.800, 4.5, 0.15),
            _variant(
                "rmt_base",
                54_154_896,
                10.414,
                9.7,
                0.4,
                dims=(80, 160, 320, 512),
                num_heads=(5, 5, 10, 16),
                decay_ranges=(5, 5, 6, 6),
                **_LARGE,
            ),
            _variant(
                "rmt_large",
                95_464_864,
                19.545,
                18.2,
                0.5,
                dims=(112, 224, 448, 640),
                num_heads=(7, 7, 14, 20),
                decay_ranges=(6, 6, 6, 6),
                **_LARGE,
            ),
        ),
        reports=(
            "ImageNet-1K top-1 at 224 px: T 82.4, S 84.1, B 85.0, L 85.5; with token labelling S 84.8, B 85.6, L 86.1",
            "Plain attention in place of Manhattan attention: T 81.6 instead of 82.4 (paper, table 6)",
            "COCO Mask R-CNN 1x box / mask AP: S 49.0 / 43.9, B 51.1 / 45.5",
        ),
    )
)
