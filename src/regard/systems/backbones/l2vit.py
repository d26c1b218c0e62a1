"""The Linear Attention Resurrection in Vision Transformer (Zheng, 2025, arXiv 2501.16182): L2ViT.

Linear attention lacks two things that softmax has: weights that are never negative, and weights that are concentrated.
ReLU features bring the first; a module of two depthwise convolutions after it brings the second. Blocks with it take
turns with plain window attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import checks, ops
from regard.checkpoint import KeyMap
from regard.layers import BatchNorm, ConvStem, Mixer, PositionedBlock, depthwise, heads_of, kernel_init
from regard.registry import README_FLOPS, System, Variant, image_variant, register_mixer, register_system
from regard.skeletons import Hierarchical, places
from regard.systems.backbones.davit import Downsample, DualBlock, SpatialAttention


def _flat_temperature(name: str, value: Tensor) -> dict[str, Tensor]:
    return {name: value.flatten() if name.endswith("temperature") else value}


@register_mixer("enhanced_linear")
class EnhancedLinearAttention(Mixer):
    r"""Linear attention of ReLU features with a temperature and a floor under its normaliser (as in the released code).

    $$\mathrm{out}_i = W_o\,\tau_h\,\frac{\phi(q_i)^\top \sum_j \phi(k_j)\,v_j^\top}
                                       {\max(c,\ \phi(q_i)^\top \sum_j \phi(k_j))},\quad \phi = \mathrm{ReLU},\ c = 100$$

    τ is learned for each head, d^(-1/2) at the start. It multiplies the output: on k it would cancel. The floor c is no
    epsilon: where activations are small or tokens few, it is what is divided by, and weights sum to less than τ.

    Args:
        dim: channels. num_heads: divides dim.
        floor: c.
    """

    authors_keys = KeyMap(convert=_flat_temperature)

    def __init__(self, dim: int, num_heads: int, *, floor: float = 100.0, qkv_bias: bool = True) -> None:
        super().__init__()
        self.head_dim = heads_of(dim, num_heads)
        checks.positive("floor", floor)
        self.dim, self.num_heads, self.floor = dim, num_heads, floor
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.temperature = nn.Parameter(torch.full((num_heads,), self.head_dim**-0.5))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        self.check(x)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        q, k = F.relu(q), F.relu(k)
        axes = tuple(range(1, k.dim() - 2))
        total = (q * k.sum(axes, keepdim=True)).sum(-1, keepdim=True).clamp(min=self.floor)
        out = ops.linear_attention(q, k, v, normalize=False) * self.temperature.unsqueeze(-1)  # type: ignore[operator]
        return self.proj((out / total).flatten(-2))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, floor={self.floor}"


class LocalConcentration(nn.Module):
    """conv2(BN(GELU(conv1(x)))) with depthwise convolutions: gathers what linear attention spreads (LCM)."""

    def __init__(self, dim: int, kernel_size: int = 7) -> None:
        super().__init__()
        self.conv1 = depthwise(dim, kernel_size)
        self.act = nn.GELU()
        self.norm = BatchNorm(dim)
        self.conv2 = depthwise(dim, kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, W, dim)` -> the same shape."""
        return self.conv2(self.norm(self.act(self.conv1(x))))


class GlobalBlock(PositionedBlock):
    r"""A block of linear attention: position, attention, local concentration, MLP, each with a residual connection.

    $x \leftarrow x + c(x)$, $x \leftarrow x + \mathrm{mixer}(n_1(x))$, $x \leftarrow x + \mathrm{local}(n_3(x))$,
    $x \leftarrow x + \mathrm{mlp}(n_2(x))$ with a depthwise 3 x 3 convolution c.

    Args:
        mixer: `EnhancedLinearAttention` in the paper. concentrate: False leaves `local` out.
    """

    authors_keys = KeyMap(
        rules=[
            (r"\battn\.", "mixer."),
            (r"\blocal_mp\.bn\.", "local.norm."),
            (r"\blocal_mp\.", "local."),
            (r"\bcpe\.0\.proj\.", "position."),
        ],
        convert=_flat_temperature,
    )

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        *,
        mlp_ratio: float = 4.0,
        kernel_size: int = 7,
        concentrate: bool = True,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(dim, mixer, mlp_ratio=mlp_ratio, drop_path=drop_path)
        self.local: nn.Module | None = None
        if concentrate:
            self.norm3 = nn.LayerNorm(dim)
            self.local = LocalConcentration(dim, kernel_size)

    def forward(self, x: Tensor, *extra: Tensor) -> Tensor:
        """`(B, H, W, dim)` -> the same shape. `extra` goes to the mixer as it is."""
        x = x + self.position(x)
        x = x + self.drop_path(self.mixer(self.norm1(x), *extra))
        if self.local is not None:
            x = x + self.drop_path(self.local(self.norm3(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class L2ViT(Hierarchical):
    """Two convolutions and LayerNorm, stages where window attention and linear attention take turns, LayerNorm, mean.

    Local blocks are DaViT's: window attention without shift or bias, a depthwise convolution before each branch, and
    zeros that take part where windows reach beyond the map.

    Args:
        dims, depths, num_heads: of each stage; its odd blocks are global.
        window_size: of the local blocks. mlp_ratio: hidden width of the MLPs.
        kernel_size: of the local concentration.
        floor: under the normaliser, see `EnhancedLinearAttention`.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0.
    """

    authors_keys = KeyMap(
        rules=[
            (r"^downsample_layers\.0\.proj\.proj\.", "stem.0."),
            (r"^downsample_layers\.0\.norm\.", "stem.1."),
            (r"^downsample_layers\.", "downs."),
            (r"^(stages\.\d+\.\d*[02468])\.cpe\.0\.proj\.", r"\1.position1."),
            (r"^(stages\.\d+\.\d*[02468])\.cpe\.1\.proj\.", r"\1.position2."),
            *GlobalBlock.authors_keys.rules,
        ],
        convert=_flat_temperature,
    )

    def __init__(
        self,
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        kernel_size: int = 7,
        floor: float = 100.0,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        strides = [4 * 2**stage for stage in range(len(dims))]
        stages: list[list[nn.Module]] = []
        for blocks in places(dims, depths, num_heads, strides, 224, drop_path_rate):
            stages.append([])
            for at in blocks:
                options = {"mlp_ratio": mlp_ratio, "drop_path": at.drop_path}
                if at.index % 2:
                    mixer = EnhancedLinearAttention(at.dim, at.num_heads, floor=floor)
                    stages[-1].append(GlobalBlock(at.dim, mixer, kernel_size=kernel_size, **options))
                else:
                    window = SpatialAttention(at.dim, at.num_heads, window_size=window_size)
                    stages[-1].append(DualBlock(at.dim, window, **options))
        super().__init__(
            stem=nn.Sequential(ConvStem(in_chans, [dims[0] // 2, dims[0]], [2, 2], act=nn.ReLU), nn.LayerNorm(dims[0])),
            downs=[nn.Identity(), *(Downsample(a, b) for a, b in pairwise(dims))],
            stages=stages,
            dims=dims,
            strides=strides,
            norm=nn.LayerNorm(dims[-1]),
            num_classes=num_classes,
            in_chans=in_chans,
        )
        self.apply(kernel_init)


_DEEP = (2, 2, 18, 2)
_BASE = {"dims": (128, 256, 512, 1024), "depths": _DEEP, "num_heads": (4, 8, 16, 32)}

SYSTEM = register_system(
    System(
        slug="l2vit",
        title="The Linear Attention Resurrection in Vision Transformer",
        year=2025,
        arxiv="2501.16182",
        evidence="authors_code",
        repo="ChuanyangZheng/L2ViT",
        idea="Linear attention of ReLU features, made local again by depthwise convolutions, in turns with windows.",
        mixers=("enhanced_linear",),
        variants=(
            image_variant("l2vit_tiny", L2ViT, 28_596_781, 4.714),
            image_variant("l2vit_small", L2ViT, 50_199_157, 9.018, depths=_DEEP),
            image_variant("l2vit_base", L2ViT, 88_577_188, 15.858, 0.3, **_BASE),
            Variant(
                "l2vit_base_384",
                L2ViT,
                88_577_188,
                47.5,
                inputs=((1, 3, 384, 384),),
                source=README_FLOPS,
                options={**_BASE, "window_size": 12, "drop_path_rate": 0.2},
            ),
        ),
        reports=(
            "ImageNet-1K top-1 at 224 px: T 83.1, S 84.1, B 84.4; B pre-trained on ImageNet-22K 86.0, at 384 px 87.0",
        ),
    )
)
