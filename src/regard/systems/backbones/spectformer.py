"""SpectFormer: Frequency and Attention is what you need in a Vision Transformer (Patro et al., 2023, arXiv 2304.06446).

Early layers mix tokens in the frequency domain, by a learned factor for each frequency and channel; later layers attend.
One form keeps one resolution, as a vision transformer does; the other is a pyramid of four stages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from regard import checks
from regard.checkpoint import KeyMap
from regard.layers import (
    Block,
    ConvEmbed,
    ConvNorm,
    GlobalFilter,
    Mixer,
    Mlp,
    PatchEmbed,
    SoftmaxAttention,
    depthwise,
    split_qkv,
    vit_init,
)
from regard.registry import System, Variant, image_variant, register_mixer, register_system
from regard.skeletons import Hierarchical, Isotropic, places
from regard.skeletons.base import make_head

_norm = partial(nn.LayerNorm, eps=1e-6)


@register_mixer("spectral_gating")
class SpectralGating(Mixer):
    r"""Fourier transform, a learned complex factor for each frequency and channel, and back (SGN).

    $$\mathrm{out} = \mathcal{F}^{-1}(W \odot \mathcal{F}(x))$$

    The same filter for every image: a circular convolution as large as the map, see `GlobalFilter`.

    Departure: on maps of another size the factors are interpolated; the authors refuse such maps.

    Args:
        dim: channels. num_heads: taken so that every mixer is built alike; nothing depends on it.
        grid: the map whose frequencies have factors, one integer for each spatial axis (an integer is a square map).
    """

    has_heads: ClassVar[bool] = False
    authors_keys = KeyMap(rules=[(r"\bcomplex_weight$", "filter.weight")])

    def __init__(self, dim: int, num_heads: int = 1, *, grid: int | Sequence[int] = 14) -> None:
        super().__init__()
        grid = checks.tuple_of("grid", grid, 2 if isinstance(grid, int) else len(grid))
        self.dim, self.num_heads, self.axes = dim, num_heads, len(grid)
        self.filter = GlobalFilter(dim, grid)

    @classmethod
    def in_stack(cls, index: int, input_size: tuple[int, ...], dim: int, num_heads: int, **options: Any) -> Mixer:
        """The frequencies of this grid."""
        return cls(dim, num_heads, grid=input_size, **options)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        self.check(x)
        return self.filter(x)


class SpectralBlock(Block):
    r"""One residual branch for both parts: $x \leftarrow x + \mathrm{mlp}(n_2(\mathrm{mixer}(n_1(x))))$ (as in GFNet)."""

    def forward(self, x: Tensor, *extra: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        return x + self.drop_path(self.mlp(self.norm2(self.mixer(self.norm1(x)))))


class SpectFormer(Isotropic):
    """Patches, learned positions, spectral blocks, attention blocks, LayerNorm, mean, linear ("vanilla").

    Args:
        dim, depth, mlp_ratio: of all blocks. num_heads: of the attention blocks.
        spectral_blocks: how many blocks at the beginning are spectral, or which ones (0, 1, ...).
        patch_size: pixels per token. img_size: fixes positions and filters; other sizes interpolate them.
    """

    authors_keys = KeyMap(
        rules=[
            (r"^patch_embed\.", "stem."),
            (r"\.(attn|filter)\.", ".mixer."),
            *SpectralGating.authors_keys.rules,
        ],
        convert=split_qkv,
    )

    def __init__(
        self,
        dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        spectral_blocks: int | Sequence[int] = 4,
        mlp_ratio: float = 4.0,
        patch_size: int = 16,
        img_size: int = 224,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        spectral = range(spectral_blocks) if isinstance(spectral_blocks, int) else spectral_blocks
        (stage,) = places([dim], [depth], [num_heads], [patch_size], img_size, drop_path_rate)
        blocks: list[nn.Module] = []
        for at in stage:
            options: dict[str, Any] = {"mlp_ratio": mlp_ratio, "norm": _norm, "drop_path": at.drop_path}
            if at.index in spectral:
                blocks.append(SpectralBlock(dim, SpectralGating(dim, grid=at.grid), **options))
            else:
                blocks.append(Block(dim, SoftmaxAttention(dim, num_heads), **options))
        super().__init__(
            stem=PatchEmbed(in_chans, dim, patch_size, norm=False),
            blocks=blocks,
            dim=dim,
            grid=stage[0].grid,
            stride=patch_size,
            num_classes=num_classes,
            in_chans=in_chans,
            norm=_norm(dim),
            position=True,
        )
        self.apply(vit_init)

    def no_weight_decay(self) -> set[str]:
        """The position table."""
        return {"pos_embed"}


class LocalMlp(Mlp):
    """fc2(GELU(DWConv(fc1(x)))) (PVTv2)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__(dim, hidden)
        self.local = depthwise(hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, W, dim)` -> the same shape."""
        return self.fc2(self.act(self.local(self.fc1(x))))


class ClassBlock(Block):
    """A `Block` on sequences in which the first token alone asks and changes (class attention of CaiT)."""

    def forward(self, x: Tensor, *extra: Tensor) -> Tensor:
        """`(B, 1 + N, dim)` -> the same shape."""
        tokens, first = self.norm1(x), x[:, :1]
        first = first + self.mixer(tokens[:, :1], tokens)
        return torch.cat([first + self.mlp(self.norm2(first)), x[:, 1:]], 1)


def _init(module: nn.Module) -> None:
    """`vit_init`, and kernels from a normal whose variance is 2 over the outputs that an input reaches."""
    vit_init(module)
    if isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class SpectFormerPyramid(Hierarchical):
    """A convolutional stem, two spectral stages, two of attention, class attention, LayerNorm, linear ("hierarchical").

    The class token is the mean of the last map; one `ClassBlock` refines it.

    Args:
        dims, depths, num_heads, mlp_ratios: of each stage. spectral_stages: how many stages at the beginning are spectral.
        stem_dim: channels inside the stem.
        token_label: a second classifier looks at each token of the last map; the logits are those of the class token
            plus half the largest of the tokens'. The authors train it on labels for each token from another network
            ("token labelling"), which is not done here: its logits then learn through the sum.
        img_size: fixes the filters; other sizes interpolate them.
    """

    authors_keys = KeyMap(
        rules=[
            (r"^patch_embed1\.conv\.([036])\.", lambda m: f"stem.{2 * int(m[1]) // 3}.conv."),
            (r"^patch_embed1\.conv\.([147])\.", lambda m: f"stem.{2 * int(m[1]) // 3}.norm."),
            (r"^patch_embed1\.", "stem.6."),
            (r"^patch_embed(\d)\.", lambda m: f"downs.{int(m[1]) - 1}.1."),
            (r"^norm4\.", "norm."),
            (r"^norm([123])\.", r"downs.\1.0."),
            (r"^block(\d)\.(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.{m[2]}."),
            (r"^post_network\.0\.", "class_block."),
            (r"\.attn\.", ".mixer."),
            (r"\.mlp\.dwconv\.dwconv\.", ".mlp.local."),
            *SpectralGating.authors_keys.rules,
        ]
    )

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 320, 448),
        depths: Sequence[int] = (3, 4, 6, 3),
        num_heads: Sequence[int] = (2, 4, 10, 14),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        spectral_stages: int = 2,
        stem_dim: int = 32,
        token_label: bool = True,
        img_size: int = 224,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        strides = [4 * 2**stage for stage in range(len(dims))]
        stages: list[list[nn.Module]] = []
        for blocks, ratio in zip(
            places(dims, depths, num_heads, strides, img_size, drop_path_rate), mlp_ratios, strict=True
        ):
            stages.append([])
            for at in blocks:
                attends = at.stage >= spectral_stages
                mixer = SoftmaxAttention(at.dim, at.num_heads) if attends else SpectralGating(at.dim, grid=at.grid)
                mlp = LocalMlp(at.dim, int(at.dim * ratio))
                stages[-1].append(Block(at.dim, mixer, mlp=mlp, norm=_norm, drop_path=at.drop_path))
        stem: list[nn.Module] = []
        for width, size, stride in ((in_chans, 7, 2), (stem_dim, 3, 1), (stem_dim, 3, 1)):
            stem += [ConvNorm(width, stem_dim, size, stride=stride), nn.ReLU()]
        super().__init__(
            stem=nn.Sequential(*stem, ConvEmbed(stem_dim, dims[0], 3, 2, 1)),
            downs=[
                nn.Identity(),
                *(
                    nn.Sequential(_norm(width), ConvEmbed(width, wider, 3, 2, 1))
                    for width, wider in zip(dims[:-1], dims[1:], strict=True)
                ),
            ],
            stages=stages,
            dims=dims,
            strides=strides,
            norm=_norm(dims[-1]),
            num_classes=num_classes,
            in_chans=in_chans,
        )
        attention = SoftmaxAttention(dims[-1], num_heads[-1])
        self.class_block = ClassBlock(dims[-1], attention, mlp_ratio=mlp_ratios[-1], norm=_norm)
        self.aux_head = make_head(dims[-1], num_classes) if token_label else None
        self.apply(_init)

    def forward_features(self, x: Tensor) -> Tensor:
        """`(B, in_chans, H, W)` -> normalised tokens `(B, 1 + H' W', num_features)`, class token first."""
        self.check_image(x)
        tokens = self.stages_forward(x)[-1].flatten(1, 2)
        return self.norm(self.class_block(torch.cat([tokens.mean(1, keepdim=True), tokens], 1)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Normalised tokens -> logits `(B, num_classes)`, or the class token `(B, num_features)` before the classifier."""
        if pre_logits or self.num_classes == 0:
            return x[:, 0]
        logits = self.head(x[:, 0])
        return logits if self.aux_head is None else logits + 0.5 * self.aux_head(x[:, 1:]).amax(1)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifiers by fresh ones; 0 classes leave the class token."""
        super().reset_classifier(num_classes)
        if self.aux_head is not None:
            self.aux_head = make_head(self.num_features, num_classes, like=self.norm.weight)


_LOG = "class and training log of the authors' repository; multiply-adds of the paper's table"


def _pyramid(name: str, params: int, plain: int, gmacs: float, **options: Any) -> tuple[Variant, Variant]:
    """A pyramid with the second classifier of token labelling, and without it."""
    options["source"] = "class of the authors' repository; multiply-adds counted on it"
    return (
        image_variant(name, SpectFormerPyramid, params, gmacs, **options),
        image_variant(f"{name}_one_head", SpectFormerPyramid, plain, gmacs, **options, token_label=False),
    )


SYSTEM = register_system(
    System(
        slug="spectformer",
        title="SpectFormer: Frequency and Attention is what you need in a Vision Transformer",
        year=2023,
        arxiv="2304.06446",
        evidence="authors_code",
        repo="badripatro/SpectFormers",
        idea="Learned filters in the frequency domain in the first layers, attention in the later ones.",
        mixers=("spectral_gating",),
        variants=(
            image_variant(
                "spectformer_tiny",
                SpectFormer,
                9_158_376,
                None,  # the table's one decimal (1.8) is too coarse for the 1.84 that are counted
                source=_LOG,
                dim=256,
                num_heads=4,
            ),
            image_variant("spectformer_xs", SpectFormer, 20_028_520, 4.003, source=_LOG),
            image_variant("spectformer_small", SpectFormer, 32_449_768, 6.643, source=_LOG, depth=19),
            image_variant(
                "spectformer_base", SpectFormer, 57_159_656, 11.5, source=_LOG, dim=512, depth=19, num_heads=8
            ),
            *_pyramid("spectformer_h_small", 22_226_928, 21_777_928, 4.064),
            *_pyramid(
                "spectformer_h_base",
                33_052_880,
                32_539_880,
                6.613,
                dims=(64, 128, 320, 512),
                depths=(3, 4, 12, 3),
                num_heads=(2, 4, 10, 16),
                stem_dim=64,
            ),
            *_pyramid(
                "spectformer_h_large",
                54_675_792,
                54_162_792,
                13.222,
                dims=(96, 192, 384, 512),
                depths=(3, 6, 18, 3),
                num_heads=(3, 6, 12, 16),
                stem_dim=64,
            ),
        ),
        reports=(
            "ImageNet-1K top-1: T 76.9, XS 80.2, S 81.7, B 82.1 (README and logs)",
            "ImageNet-1K top-1 with token labelling: H-S 84.25, H-B 85.0, H-L 85.7 (README)",
        ),
    )
)
