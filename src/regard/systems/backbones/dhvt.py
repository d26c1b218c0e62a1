"""DHVT. Bridging the Gap Between Vision Transformers and CNNs on Small Datasets (Lu et al., 2022, arXiv 2210.05958).

With few images a plain vision transformer has to learn that neighbours belong together. DHVT says so: patches come from
convolutions, the MLP holds one, and "head tokens" let the attention heads read each other's channels.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import checks, ops
from regard.checkpoint import KeyMap
from regard.layers import BatchNorm, Conv2d, ConvNorm, Mixer, depthwise, heads_of
from regard.registry import System, Variant, image_variant, register_mixer, register_system
from regard.skeletons import DeiT


@register_mixer("head_token")
class HeadTokenAttention(Mixer):
    r"""Head-interacted attention (HI-MHSA): one more token for each head, made of the head's mean channels.

    $$t_h = \mathrm{GELU}(\mathrm{LN}(W_t\,\bar x^{(h)})) + e_h,\qquad
      [o_x, o_t] = \mathrm{MHSA}([x, t_1 \dots t_H])$$

    The mean $\bar x^{(h)}$ is over all tokens, of the d channels that belong to head h; W_t is d x dim, and the LayerNorm
    acts on each d of its outputs. Head tokens are queries, keys and values like others. Their mean output is added to the
    class token, where there is one; otherwise only keys and values of theirs are used.

    The LayerNorm follows the authors' code; the paper's equation is without.

    Args:
        class_token: `forward` takes and gives a class token beside the grid.
    """

    authors_keys = KeyMap(rules=((r"(^|\.mixer\.)pos_embed$", r"\1head_embed"),))

    def __init__(self, dim: int, num_heads: int, *, class_token: bool = False, qkv_bias: bool = True) -> None:
        super().__init__()
        self.head_dim = heads_of(dim, num_heads)
        self.dim, self.num_heads, self.class_token = dim, num_heads, class_token
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.ht_proj = nn.Linear(self.head_dim, dim)
        self.ht_norm = nn.LayerNorm(self.head_dim)
        self.head_embed = nn.Parameter(torch.empty(1, num_heads, dim))
        nn.init.trunc_normal_(self.head_embed, std=0.02)

    def head_tokens(self, tokens: Tensor) -> Tensor:
        """`(B, N, dim)` -> one token for each head `(B, num_heads, dim)`."""
        means = tokens.mean(1).unflatten(-1, (self.num_heads, self.head_dim))
        parts = self.ht_proj(means).unflatten(-1, (self.num_heads, self.head_dim))
        return F.gelu(self.ht_norm(parts)).flatten(-2) + self.head_embed

    def forward(self, x: Tensor, class_token: Tensor | None = None) -> Any:
        """`(B, *S, dim)` -> the same shape; built for a class token, also `(B, 1, dim)` -> a pair of such."""
        spatial = self.check(x)
        if (class_token is not None) != self.class_token:
            raise ValueError(f"this mixer was built with class_token={self.class_token}: call it accordingly.")
        tokens = x.flatten(1, -2)
        if class_token is not None:
            tokens = torch.cat([class_token, tokens], 1)
        whole = torch.cat([tokens, self.head_tokens(tokens)], 1)
        q, k, v = self.qkv(whole).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        if class_token is None:
            q = q[:, : tokens.shape[1]]
        out = self.proj(ops.attention(q, k, v).flatten(-2))  # type: ignore[union-attr]
        if class_token is None:
            return out.unflatten(1, spatial)
        first, grid, heads = out.split([1, tokens.shape[1] - 1, self.num_heads], 1)
        return grid.unflatten(1, spatial), first + heads.mean(1, keepdim=True)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, class_token={self.class_token}"


class DynamicAggregation(nn.Module):
    r"""DAFF, the feed-forward with a convolution, whose mean output re-weights the class token.

    $$y = g(W_1 x),\quad z = y + g(\mathrm{DW}_{3\times3}(y)),\quad o = \mathrm{BN}(W_2 z),\quad
      \mathrm{cls} \leftarrow \mathrm{cls} \odot \mathrm{fc}_2(\mathrm{GELU}(\mathrm{fc}_1(\mathrm{mean}(o))))$$

    with g = GELU of BatchNorm. The class token takes no other way through, and its weights are not bounded.

    Args:
        hidden: channels inside.
    """

    class_token: ClassVar[bool] = True

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = Conv2d(dim, hidden, 1)
        self.conv2 = depthwise(hidden, 3)
        self.conv3 = Conv2d(hidden, dim, 1)
        self.bn1, self.bn2, self.bn3 = BatchNorm(hidden), BatchNorm(hidden), BatchNorm(dim)
        self.compress = nn.Linear(dim, max(dim // 4, 1))
        self.excitation = nn.Linear(max(dim // 4, 1), dim)

    def forward(self, x: Tensor, class_token: Tensor) -> tuple[Tensor, Tensor]:
        """Grid `(B, H, W, dim)` and class token `(B, 1, dim)` -> the same shapes."""
        x = F.gelu(self.bn1(self.conv1(x)))
        x = x + F.gelu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        weight = self.excitation(F.gelu(self.compress(x.mean((1, 2)))))
        return x, class_token * weight.unsqueeze(1)


class Affine(nn.Module):
    """x * alpha + beta for each channel, which start at 1 and 0."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.alpha, self.beta = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """`(..., dim)` -> the same shape."""
        return x * self.alpha + self.beta


class OverlappingPatches(nn.Module):
    """SOPE, the sequential overlapping patch embedding: 3 x 3 convolutions of stride 2 between two affines.

    log2(patch_size) convolutions without bias, BatchNorm after each, GELU between them; channels double up to dim. As in
    the authors' code no GELU follows the last one, unless it is the only one.
    """

    def __init__(self, in_chans: int, dim: int, patch_size: int) -> None:
        super().__init__()
        steps = patch_size.bit_length() - 1
        if steps < 1 or 2**steps != patch_size:
            raise ValueError(f"patch_size must be a power of two from 2 on, got {patch_size}.")
        checks.divisible("dim", dim, "patch_size / 2", patch_size // 2)
        widths = [in_chans, *(dim >> shift for shift in reversed(range(steps)))]
        parts: list[nn.Module] = []
        for before, after in zip(widths[:-1], widths[1:], strict=True):
            parts += [ConvNorm(before, after, 3, stride=2), nn.GELU()]
        self.proj = nn.Sequential(*(parts if steps == 1 else parts[:-1]))
        self.pre_affine, self.post_affine = Affine(in_chans), Affine(dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, W, in_chans)` -> `(B, H / patch_size, W / patch_size, dim)`, sizes rounded up."""
        return self.post_affine(self.proj(self.pre_affine(x)))


def _ours(name: str, value: Tensor) -> dict[str, Tensor]:
    """The authors' affines are (1, C, 1, 1)."""
    return {name: value.flatten() if name.endswith((".alpha", ".beta")) else value}


class DHVT(DeiT):
    """DeiT with overlapping patches, head tokens and the convolutional feed-forward; without position table.

    Args:
        patch_size: a power of two. mlp_ratio: hidden width of the feed-forward over dim.
        host: further arguments of `DeiT`: depth, img_size, drop_path_rate, num_classes, ...
    """

    authors_keys = KeyMap(
        rules=(
            *DeiT.host_rules,
            *HeadTokenAttention.authors_keys.rules,
            (r"^(stem\.proj\.\d)\.0\.", r"\1.conv."),
            (r"^(stem\.proj\.\d)\.1\.", r"\1.norm."),
        ),
        convert=_ours,
    )

    def __init__(
        self,
        *,
        dim: int = 192,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        patch_size: int = 4,
        in_chans: int = 3,
        **host: Any,
    ) -> None:
        super().__init__(
            mixer=lambda at: HeadTokenAttention(at.dim, at.num_heads, class_token=True),
            mlp=lambda width: DynamicAggregation(width, int(width * mlp_ratio)),
            stem=OverlappingPatches(in_chans, dim, patch_size),
            position=False,
            dim=dim,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            patch_size=patch_size,
            in_chans=in_chans,
            **host,
        )


def _variant(
    name: str, params: int, gmacs: float, side: int, classes: int, heads: int, patch: int, **options: Any
) -> Variant:
    """A published model: on CIFAR-100 (32 pixels), DomainNet or ImageNet-1K (224 pixels)."""
    options |= {"num_classes": classes, "num_heads": heads, "patch_size": patch, "img_size": side}
    return image_variant(f"dhvt_{name}", DHVT, params, gmacs, 0.1, side, **options)


_S = {"dim": 384}

SYSTEM = register_system(
    System(
        slug="dhvt",
        title="Bridging the Gap Between Vision Transformers and Convolutional Neural Networks on Small Datasets",
        year=2022,
        arxiv="2210.05958",
        evidence="authors_code",
        repo="ArieSeirack/DHVT",
        idea="A vision transformer for few images: convolutional patches and feed-forward, and a token for each head.",
        mixers=("head_token",),
        variants=(
            _variant("tiny_cifar_patch4", 6_008_650, 0.387796, 32, 100, 4, 4),
            _variant("small_cifar_patch4", 23_425_450, 1.528871, 32, 100, 8, 4, **_S),
            _variant("tiny_cifar_patch2", 5_845_162, 1.704947, 32, 100, 4, 2),
            _variant("small_cifar_patch2", 22_766_698, 6.194527, 32, 100, 8, 2, **_S),
            _variant("tiny_domainnet", 6_105_975, 1.358122, 224, 345, 4, 16),
            _variant("small_domainnet", 23_788_431, 5.032852, 224, 345, 6, 16, **_S),
            _variant("tiny_imagenet", 6_267_334, 1.354631, 224, 1000, 3, 16),
            _variant("small_imagenet", 24_040_606, 5.033103, 224, 1000, 6, 16, **_S),
        ),
        reports=(
            "CIFAR-100 from scratch, 300 epochs, top-1: T/4 80.93, S/4 82.91, T/2 83.54, S/2 85.68; DeiT-T 67.52, DeiT-S "
            "69.78, Swin-T 78.07, ResNeXt-29 82.23",
            "CIFAR-100, ablation on T/4: DeiT-T 67.59, with SOPE 73.68, with DAFF 79.47, with head tokens 69.10; both "
            "without position table 80.35; all three 80.85",
            "DomainNet, S: ClipArt 73.89, Painting 66.08, Sketch 68.72 (ResNet-50 71.90, 64.36, 67.45); ImageNet-1K T "
            "76.5, S 82.3",
        ),
    )
)
