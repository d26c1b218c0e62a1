"""Breaking the Low-Rank Dilemma of Linear Attention (Fan et al., 2024, arXiv 2411.07635).

Linear attention squeezes all tokens through one small matrix, whose rank, and that of what comes out of it, is low. Keys
weighted by their relevance to a global query raise the first, a product with a projection of each token the second.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from regard import checks, ops
from regard.checkpoint import KeyMap
from regard.layers import ConvStem, Mixer, depthwise, heads_of, kernel_init
from regard.layers.rotary import axial_angles, rotate
from regard.registry import System, Variant, image_variant, register_mixer, register_system
from regard.skeletons import ConvPyramid, Place


class GatedAttention(Mixer):
    r"""What both attentions of RAVLT share: projections, a convolution of the values, rotations, and the gate.

    $$\mathrm{out} = W_p\,((\mathrm{mix}(Q, K, V) + \mathrm{DWConv}(V)) \odot G),\quad Q, K, V, G = x W$$

    The gate G is a plain projection, without an activation. Pairs of channels of queries and keys are turned by the place
    along the axes, a share of the channels for each axis.

    Args:
        dim: channels. num_heads: divides dim into heads of even width.
        gate: False leaves G out.
        kernel_size: of the depthwise convolution of the values.
        axes: number of spatial axes.
    """

    authors_keys = KeyMap(
        rules=[(r"\bqkvo\.", "project."), (r"\blepe\.", "local.")],
        convert=ConvPyramid.host_convert,
    )

    def __init__(self, dim: int, num_heads: int, *, gate: bool = True, kernel_size: int = 5, axes: int = 2) -> None:
        super().__init__()
        self.head_dim = heads_of(dim, num_heads)
        checks.divisible("the head width dim / num_heads", self.head_dim, "the channels that turn together", 2)
        self.dim, self.num_heads, self.gate, self.axes = dim, num_heads, gate, axes
        self.project = nn.Linear(dim, (4 if gate else 3) * dim)
        self.local = depthwise(dim, kernel_size, dims=axes)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        spatial = self.check(x)
        q, k, v, *gate = self.project(x).split(self.dim, -1)
        local = self.local(v)
        q, k, v = (t.unflatten(-1, (self.num_heads, self.head_dim)) for t in (q, k, v))
        y = self.mix(q, k, v, axial_angles(spatial, self.head_dim // 2).unsqueeze(-2)).flatten(-2) + local
        return self.proj(y * gate[0] if gate else y)

    @abstractmethod
    def mix(self, q: Tensor, k: Tensor, v: Tensor, angles: Tensor) -> Tensor:
        """`(B, *S, heads, d)` each, angles `(*S, 1, d / 2)` -> the mixed values, `(B, *S, heads, d)`."""

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, gate={self.gate}"


@register_mixer("rank_augmented_linear")
class RankAugmentedLinearAttention(GatedAttention):
    r"""RALA: linear attention of weighted keys, gated (as in the released code).

    $$\mathrm{mix}_i = \frac{R_i\phi(q_i)^\top\,\frac1N\sum_j \alpha_j\, R_j\phi(k_j)\,v_j^\top}
                            {\phi(q_i)^\top\,\frac1N\sum_j \alpha_j\,\phi(k_j) + 10^{-6}},\quad
      \alpha = N\,\mathrm{softmax}_j(d^{-1/2}\,\bar q^\top \phi(k_j)),\quad \bar q = \tfrac1N \textstyle\sum_i \phi(q_i)$$

    with φ = ELU + 1 and R the rotation by a token's place. The weights α sum to N. As in the authors' code only the
    numerator is rotated, so the weights of a query need not sum to 1. Projections, gate and arguments: `GatedAttention`.

    Args:
        reweight: False takes α = 1; with `gate=False` too, this is linear attention with rotations.
    """

    def __init__(self, dim: int, num_heads: int, *, reweight: bool = True, **options: Any) -> None:
        super().__init__(dim, num_heads, **options)
        self.reweight = reweight

    @classmethod
    def in_stack(cls, index: int, input_size: tuple[int, ...], dim: int, num_heads: int, **options: Any) -> Mixer:
        """For grids of as many axes as `input_size`."""
        return cls(dim, num_heads, axes=len(input_size), **options)

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """φ(q), and φ(k) weighted by its relevance: `(B, *S, heads, d)` each."""
        q, k = F.elu(q) + 1, F.elu(k) + 1
        if not self.reweight:
            return q, k
        tokens, mean = k.flatten(1, -3), q.flatten(1, -3).mean(1, keepdim=True)
        relevance = (self.head_dim**-0.5 * mean * tokens).sum(-1).softmax(1)  # (B, N, heads)
        return q, k * (relevance * tokens.shape[1]).view(k.shape[:-1]).unsqueeze(-1)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, angles: Tensor) -> Tensor:
        """See the class."""
        q, k = self.features(q, k)
        axes = tuple(range(1, k.dim() - 2))
        total = (q * k.mean(axes, keepdim=True)).sum(-1, keepdim=True) + 1e-6
        # Each factor gets its root of N, so that sums stay in range in low precision.
        root = v.flatten(1, -3).shape[1] ** -0.5
        out = ops.linear_attention(rotate(q, angles), rotate(k, angles) * root, v * root, normalize=False)
        return out / total  # type: ignore[operator]


class GatedSoftmaxAttention(GatedAttention):
    r"""Softmax attention with the projections, rotations and gate of RALA: RAVLT's last two stages.

    $$\mathrm{mix}_i = \textstyle\sum_j \mathrm{softmax}_j(d^{-1/2} (R_i q_i)^\top R_j k_j)\,v_j$$
    """

    def mix(self, q: Tensor, k: Tensor, v: Tensor, angles: Tensor) -> Tensor:
        """See the class."""
        return ops.attention(rotate(q, angles), rotate(k, angles), v)  # type: ignore[return-value]


class RAVLT(ConvPyramid):
    """Four convolutions to a quarter of the image, blocks of gated attention, linear to 1024, BatchNorm, SiLU, mean.

    Args:
        dims, depths, num_heads: of each stage. mlp_ratio: hidden width of the feed-forward networks.
        attention: "linear" (RALA) or "softmax" for each stage. The released models have linear attention in the first
            two stages only, so their last two are not linear in the number of tokens; the parameters are as many.
        layer_scales: initial layer scale of each stage, None for none.
        projection: channels before the classifier.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0.
    """

    authors_keys = KeyMap(
        rules=[
            *ConvPyramid.host_rules,
            (r"\.pos\.", ".position."),
            (r"\.ffn\.dwconv\.", ".mlp.local."),
            (r"\.ffn\.", ".mlp."),
            (r"\.attn\.", ".mixer."),
            *GatedAttention.authors_keys.rules,
        ],
        drop=[r"\.RoPE\.angle$"],
        convert=ConvPyramid.host_convert,
    )

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (3, 5, 9, 3),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratio: float | Sequence[float] = 3.5,
        attention: Sequence[str] = ("linear", "linear", "softmax", "softmax"),
        layer_scales: Sequence[float | None] = (1.0, 1.0, 1.0, 1.0),
        projection: int = 1024,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        kinds = {"linear": RankAugmentedLinearAttention, "softmax": GatedSoftmaxAttention}
        for kind in attention:
            checks.one_of("attention", kind, kinds)

        def mixer(at: Place) -> nn.Module:
            return kinds[attention[at.stage]](at.dim, at.num_heads)

        half = dims[0] // 2
        super().__init__(
            mixer=mixer,
            stem=ConvStem(in_chans, [half, half, half, dims[0]], [2, 1, 1, 2]),
            dims=dims,
            depths=depths,
            num_heads=num_heads,
            mlp_ratios=[mlp_ratio] * len(dims) if isinstance(mlp_ratio, (int, float)) else mlp_ratio,
            layer_scales=layer_scales,
            projection=projection,
            drop_path_rate=drop_path_rate,
            num_classes=num_classes,
            in_chans=in_chans,
        )
        self.apply(kernel_init)


def _variant(name: str, params: int, gmacs: float, table: float, drop: float, **options: Any) -> Variant:
    source = (
        f"parameters and multiply-adds of the authors' code; their table has {table} G, without part of the attention"
    )
    return image_variant(name, RAVLT, params, gmacs, drop, source=source, **options)


SYSTEM = register_system(
    System(
        slug="rala",
        title="Breaking the Low-Rank Dilemma of Linear Attention",
        year=2024,
        arxiv="2411.07635",
        evidence="authors_code",
        repo="qhfan/RALA",
        idea="Linear attention whose keys are weighted by relevance and whose output is gated, to raise both ranks.",
        mixers=("rank_augmented_linear",),
        variants=(
            _variant(
                "ravlt_tiny",
                14_897_768,
                2.63,
                2.4,
                0.1,
                dims=(64, 128, 256, 512),
                depths=(2, 2, 6, 2),
                num_heads=(1, 2, 4, 8),
            ),
            _variant("ravlt_small", 25_591_208, 4.90, 4.6, 0.15),
            _variant(
                "ravlt_base",
                48_241_288,
                10.62,
                9.9,
                0.4,
                dims=(96, 192, 384, 512),
                depths=(4, 6, 12, 6),
                num_heads=(1, 2, 6, 8),
                layer_scales=(1.0, 1.0, 1e-6, 1e-6),
            ),
            _variant(
                "ravlt_large",
                95_242_440,
                17.26,
                16.0,
                0.55,
                dims=(96, 192, 448, 640),
                depths=(4, 7, 19, 8),
                num_heads=(1, 2, 7, 10),
                layer_scales=(1e-6, 1e-6, 1e-6, 1e-6),
            ),
        ),
        reports=(
            "ImageNet-1K top-1 at 224 px: S 84.4 with 26M parameters and 4.6 G multiply-adds",
            "COCO Mask R-CNN 1x box / mask AP: T 47.3 / 42.7, S 49.8 / 44.6, B 51.2 / 45.7, L 52.3 / 46.4",
            "ADE20K Semantic FPN mIoU: T 47.9, S 49.5, B 51.9, L 52.6",
        ),
    )
)
