"""DuoFormer: Leveraging Hierarchical Representations by Local and Global Attention (Tang et al., 2025, arXiv 2506.12982).

A convolutional network sees the image at four scales. For every patch, the positions of all scales that cover it become
one set of tokens, headed by a scale token: attention among the scales of a patch first, then among the scale tokens of
all patches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import checks
from regard.checkpoint import KeyMap
from regard.layers import (
    BatchNorm,
    Block,
    Conv2d,
    Mixer,
    ResNet,
    SoftmaxAttention,
    linear_rates,
    resize_sequence_table,
    split_qkv,
    vit_init,
)
from regard.layouts.windows import crop, pad_to_multiple, partition, reflect_to_multiple, unpartition
from regard.registry import System, Variant, image_variant, register_mixer, register_system
from regard.skeletons import ImageModel
from regard.skeletons.base import make_head

_STD = 0.036  # of all tables and tokens, as in the authors' code


@register_mixer("scale_patch")
class ScalePatchAttention(Mixer):
    r"""Attention among the scales of each cell, then among the cells, for 1, 2 or 3 spatial axes (scale and patch attention).

    $$T_p = [s, \mathrm{mean}_p, \dots, x_p] + E,\quad Y_p = \mathrm{MSA}(T_p),\quad
      \mathrm{out}_i = Y_{p(i), i} + \mathrm{MSA}([Y_{1, 0}, \dots, Y_{P, 0}])_{p(i)}$$

    A cell p is a box of 2^levels tokens a side. Its set holds a learned scale token s, the mean of the cell, the means of
    its 2 x 2 parts, and so on down to its own tokens x_p, with a learned position E for each place of the set. The second
    attention sees the scale tokens only, so a map of P cells costs P S² + P² pairs instead of N².

    Departure: in `DuoFormer` the scales are the maps of a convolutional network, every attention is a stack of layers, and
    the answer is read from the scale tokens. A mixer has one map, so here the coarser scales are its means, and what a
    cell's scale token has heard is added to all tokens of the cell. Sides that are no multiple of the cell are mirrored.

    Args:
        dim: channels. num_heads: divides dim; of both attentions.
        levels: scales beside the mean of a cell, at least 1. axes: number of spatial axes.
    """

    def __init__(self, dim: int, num_heads: int, *, levels: int = 2, axes: int = 2, qkv_bias: bool = True) -> None:
        super().__init__()
        checks.tuple_of("levels", levels, 1)
        self.dim, self.num_heads, self.levels, self.axes = dim, num_heads, levels, axes
        self.scales = SoftmaxAttention(dim, num_heads, qkv_bias=qkv_bias)
        self.patches = SoftmaxAttention(dim, num_heads, qkv_bias=qkv_bias)
        tokens = 1 + sum(2 ** (level * axes) for level in range(levels + 1))
        self.scale_token = nn.Parameter(nn.init.normal_(torch.empty(1, 1, 1, dim), std=_STD))
        self.position = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, tokens, dim), std=_STD))

    @classmethod
    def in_stack(cls, index: int, input_size: tuple[int, ...], dim: int, num_heads: int, **options: Any) -> Mixer:
        """Unless given, cells have 4 tokens a side on maps of at least 8, otherwise 2."""
        levels = 2 if min(input_size) >= 8 else 1
        return cls(dim, num_heads, **{"levels": levels, "axes": len(input_size), **options})

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        spatial = self.check(x)
        x = reflect_to_multiple(x, (2**self.levels,) * self.axes)
        whole, cell = x.shape[1:-1], (2**self.levels,) * self.axes
        sets = [self.scale_token.expand(x.shape[0], whole.numel() // 2 ** (self.levels * self.axes), -1, -1)]
        for level in range(self.levels + 1):
            step = 2 ** (self.levels - level)
            means = partition(x, (step,) * self.axes).mean(2).unflatten(1, [length // step for length in whole])
            sets.append(partition(means, (2**level,) * self.axes))
        tokens = torch.cat(sets, 2) + self.position
        heard = self.scales(tokens.flatten(0, 1)).view(tokens.shape)
        own = heard[:, :, -(2 ** (self.levels * self.axes)) :] + self.patches(heard[:, :, 0])[:, :, None]
        return crop(unpartition(own, cell, whole), spatial)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, levels={self.levels}"


class ChannelToken(nn.Module):
    """The scale token of every patch from all maps: strided convolutions and max pooling to the grid of the coarsest.

    Each finer map halves k times: k - 1 convolutions of stride 2, then max pooling. Their concatenation goes through four
    times 3 x 3 convolution, BatchNorm and ReLU.

    Args:
        dims: channels of the maps, finest first.
    """

    def __init__(self, dims: Sequence[int], dim: int) -> None:
        super().__init__()
        coarsest = len(dims) - 1
        self.reduce = nn.ModuleList(
            nn.Sequential(*(Conv2d(width, width, 3, stride=2, padding=1) for _ in range(coarsest - scale - 1)))
            for scale, width in enumerate(dims[:-1])
        )
        for layer in self.reduce.modules():
            if isinstance(layer, nn.Conv2d):
                _projection_init(layer)
        widths = [sum(dims), dim, dim, dim, dim]
        self.mix = nn.Sequential(
            *(
                nn.Sequential(Conv2d(a, b, 3, padding=1), BatchNorm(b), nn.ReLU())
                for a, b in zip(widths[:-1], widths[1:], strict=True)
            )
        )

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps, finest first, `(B, H_s, W_s, dims[s])` -> `(B, P, 1, dim)`, patches of the coarsest map in raster order."""
        small = [
            F.max_pool2d(reduce(x).movedim(-1, 1), 2).movedim(1, -1)
            for reduce, x in zip(self.reduce, maps[:-1], strict=True)
        ]
        return self.mix(torch.cat([*small, maps[-1]], -1)).flatten(1, 2).unsqueeze(2)


def patch_tokens(maps: Sequence[Tensor]) -> Tensor:
    """Maps, coarsest first, each twice as fine as the one before -> the tokens of each patch `(B, P, 1 + 4 + ..., dim)`.

    Places of a cell are in row-major order, but those of the 2 x 2 cell by columns: so are the authors' position tables.
    """
    sets = []
    for level, x in enumerate(maps):
        cells = partition(x, (2**level, 2**level))
        sets.append(cells.unflatten(2, (2, 2)).transpose(2, 3).flatten(2, 3) if level == 1 else cells)
    return torch.cat(sets, 2)


class ScalePatchFormer(nn.Module):
    r"""The transformer: scale attention in every patch, then patch attention among their scale tokens.

    $$T \leftarrow \mathrm{Block}(T)\ \text{in each patch};\quad
      Z = [c, T_{1,0}, \dots, T_{P,0}] + E;\quad Z \leftarrow \mathrm{MSA}(Z)$$

    Scale blocks are those of a ViT. Patch layers are bare attention, without residual connection, norm or MLP: so they are
    in the authors' code, on purpose. Deep stacks of them start close to zero; `patch_residual` adds Z to each.

    Args:
        tokens: of a patch, its scale token included. grid: patches along height and width, for the position table.
        depths: scale blocks, and patch layers. drop_path_rate: of the last scale block; it rises linearly from 0.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        tokens: int,
        grid: tuple[int, int] = (7, 7),
        depths: tuple[int, int] = (12, 12),
        mlp_ratio: float = 4.0,
        patch_residual: bool = False,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        norm: Callable[[int], nn.Module] = partial(nn.LayerNorm, eps=1e-6)
        rates = linear_rates(drop_path_rate, depths[0]) if depths[0] else []
        self.grid, self.patch_residual = grid, patch_residual
        self.scale_blocks = nn.Sequential(
            *(
                Block(dim, SoftmaxAttention(dim, num_heads), mlp_ratio=mlp_ratio, norm=norm, drop_path=rate)
                for rate in rates
            )
        )
        self.patch_layers = nn.ModuleList(SoftmaxAttention(dim, num_heads) for _ in range(depths[1]))
        self.scale_position = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, tokens, dim), std=_STD))
        self.cls_token = nn.Parameter(nn.init.normal_(torch.empty(1, 1, dim), std=_STD))
        self.patch_position = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1 + grid[0] * grid[1], dim), std=_STD))
        self.apply(vit_init)

    def mix_scales(self, x: Tensor) -> Tensor:
        """Tokens `(B, P, S, dim)`, scale token first -> scale tokens `(B, P, dim)`. No patch sees another."""
        if x.shape[2] != self.scale_position.shape[2]:
            raise ValueError(f"x must hold {self.scale_position.shape[2]} tokens of each patch, got {tuple(x.shape)}.")
        tokens = (x + self.scale_position).flatten(0, 1)
        return self.scale_blocks(tokens)[:, 0].unflatten(0, x.shape[:2])

    def mix_patches(self, x: Tensor, grid: tuple[int, int]) -> list[Tensor]:
        """Scale tokens `(B, P, dim)` of a grid -> `(B, 1 + P, dim)`, class token first, before and after each layer."""
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1)
        states = [x + resize_sequence_table(self.patch_position, self.grid, grid)]
        for layer in self.patch_layers:
            x = layer(states[-1])
            states.append(states[-1] + x if self.patch_residual else x)
        return states

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens `(B, P, S, dim)` of the patches of a grid -> `(B, 1 + P, dim)`, class token first."""
        return self.mix_patches(self.mix_scales(x), grid)[-1]


class DuoFormer(ImageModel):
    """ResNet, a linear layer for each scale, tokens by patch, `ScalePatchFormer`, LayerNorm, linear on its class token.

    An image whose sides are no multiple of 32 is zero-padded at its end. To train on a frozen trunk, as the paper mostly
    does: `model.trunk.requires_grad_(False)`.

    Args:
        scales: maps used, from the coarsest, 1 to 4; patches have 1, 5, 21 or 85 tokens beside the scale token.
        scale_token: "channel" makes it from all four maps (`ChannelToken`), "learned" is one vector for all patches
            (the authors call it "random").
        depths, patch_residual: of the `ScalePatchFormer`.
        width, trunk_depths, bottleneck: of the `ResNet`; the defaults are ResNet-50.
        img_size: the position table of the patches is built for it; images of other sizes run too.
        authors_quirks: classify the class token as it is; the released model computes its norm and does not use it.
    """

    authors_keys = KeyMap(
        rules=[
            (r"^resnet_projector\.0\.", "trunk.stem.conv."),
            (r"^resnet_projector\.1\.", "trunk.stem.norm."),
            (r"^resnet_projector\.([4-7])\.", lambda m: f"trunk.stages.{int(m[1]) - 4}."),
            (r"^(trunk\.stages\.\d+\.\d+\.conv\d)\.", r"\1.conv."),
            (r"^(trunk\.stages\.\d+\.\d+)\.bn(\d)\.", r"\1.conv\2.norm."),
            (r"^(trunk\.stages\.\d+\.\d+)\.downsample\.0\.", r"\1.shortcut.conv."),
            (r"^(trunk\.stages\.\d+\.\d+)\.downsample\.1\.", r"\1.shortcut.norm."),
            (r"^projection\.proj_heads(\d)\.", lambda m: f"projections.{3 - int(m[1])}."),
            (r"^projection\.proj_heads\.", "projections.0."),
            (r"^chann_proj(\d)\.conv(\d)\.", lambda m: f"token.reduce.{int(m[1]) - 1}.{int(m[2]) - 1}."),
            (r"^chann_proj_all\.nConvs\.(\d)\.conv\.", r"token.mix.\1.0."),
            (r"^chann_proj_all\.nConvs\.(\d)\.norm\.", r"token.mix.\1.1."),
            (r"^channel_token$", "scale_token"),
            (r"^vision_transformer\.fc_norm\.", "norm."),
            (r"^vision_transformer\.head\.", "head."),
            (r"^vision_transformer\.", "former."),
            (r"\bscaleBlocks\.(\d+)\.attn\.", r"scale_blocks.\1.mixer."),
            (r"\bscaleBlocks\.", "scale_blocks."),
            (r"\bblocks\.(\d+)\.attn\.", r"patch_layers.\1."),
            (r"\bpos_embed_for_scale$", "scale_position"),
            (r"\bpos_embed$", "patch_position"),
        ],
        convert=split_qkv,
    )

    def __init__(
        self,
        *,
        scales: int = 4,
        scale_token: str = "channel",
        dim: int = 768,
        depths: tuple[int, int] = (12, 12),
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        patch_residual: bool = False,
        width: int = 64,
        trunk_depths: Sequence[int] = (3, 4, 6, 3),
        bottleneck: bool = True,
        img_size: int = 224,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
        authors_quirks: bool = False,
    ) -> None:
        super().__init__()
        checks.one_of("scale_token", scale_token, ("channel", "learned"))
        if len(trunk_depths) != 4 or not 1 <= scales <= 4:
            raise ValueError(
                f"a trunk of 4 stages and 1 to 4 scales are needed, got {trunk_depths} and scales={scales}."
            )
        self.in_chans, self.num_features, self.scales, self.authors_quirks = in_chans, dim, scales, authors_quirks
        self.trunk = ResNet(in_chans, width=width, depths=trunk_depths, bottleneck=bottleneck)
        self.feature_dims, self.feature_strides = (*self.trunk.dims, dim), (*self.trunk.strides, 32)
        self.projections = nn.ModuleList(nn.Linear(wide, dim) for wide in self.trunk.dims[: -scales - 1 : -1])
        self.projections.apply(_projection_init)
        learned = nn.Parameter(nn.init.normal_(torch.empty(1, 1, 1, dim), std=_STD))
        self.scale_token = learned if scale_token == "learned" else None
        self.token = ChannelToken(self.trunk.dims, dim) if scale_token == "channel" else None
        side = -(-img_size // 32)
        self.former = ScalePatchFormer(
            dim,
            num_heads,
            tokens=1 + sum(4**scale for scale in range(scales)),
            grid=(side, side),
            depths=depths,
            mlp_ratio=mlp_ratio,
            patch_residual=patch_residual,
            drop_path_rate=drop_path_rate,
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.num_classes, self.head = num_classes, make_head(dim, num_classes)

    def no_weight_decay(self) -> set[str]:
        """Position tables, class and scale token."""
        tables = {"former.scale_position", "former.patch_position", "former.cls_token"}
        return tables | ({"scale_token"} if self.scale_token is not None else set())

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """1 x 1 kernels become matrices where this model has linear layers."""
        own = self.state_dict()
        return {key: value.flatten(1) if key in own and own[key].dim() == 2 else value for key, value in state.items()}

    def _sequence(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Image -> the maps of the trunk, finest first, and `(B, 1 + P, dim)`, class token first."""
        maps = self.trunk(pad_to_multiple(x.movedim(1, -1), (32, 32)))
        grid = (maps[-1].shape[1], maps[-1].shape[2])
        tokens = patch_tokens([project(x) for project, x in zip(self.projections, maps[::-1], strict=False)])
        if self.token is not None:
            first = self.token(maps)
        else:
            assert self.scale_token is not None
            first = self.scale_token.expand(*tokens.shape[:2], -1, -1)
        return maps, self.former(torch.cat([first, tokens], 2), grid)

    def stages_forward(self, x: Tensor) -> list[Tensor]:
        """`(B, in_chans, H, W)` -> the four maps of the trunk, and the patches after patch attention."""
        maps, tokens = self._sequence(x)
        return [*maps, tokens[:, 1:].unflatten(1, maps[-1].shape[1:3])]

    def forward_features(self, x: Tensor) -> Tensor:
        """`(B, in_chans, H, W)` -> tokens `(B, 1 + P, dim)`, class token first, normalised but for `authors_quirks`."""
        self.check_image(x)
        _, tokens = self._sequence(x)
        return tokens if self.authors_quirks else self.norm(tokens)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens -> logits `(B, num_classes)` from the class token, or the class token `(B, dim)`."""
        return x[:, 0] if pre_logits else self.head(x[:, 0])


def _projection_init(layer: nn.Module) -> None:
    """Kernels from a normal of deviation sqrt(2 / fan-in), biases close to zero (authors' code)."""
    if isinstance(layer, (nn.Linear, nn.Conv2d)):
        nn.init.kaiming_normal_(layer.weight)
        if layer.bias is not None:
            nn.init.normal_(layer.bias, std=1e-6)


def _variant(scales: int, params: int) -> Variant:
    source = "sum of the parts counted from the authors' classes, with 4 classes and the channel token"
    return image_variant(
        f"duoformer_r50_{scales}", DuoFormer, params, None, source=source, scales=scales, num_classes=4
    )


SYSTEM = register_system(
    System(
        slug="duoformer",
        title="DuoFormer: Leveraging Hierarchical Representations by Local and Global Attention Vision Transformer",
        year=2025,
        arxiv="2506.12982",
        evidence="authors_code",
        repo="xiaoyatang/duoformer_TCGA",
        idea="Attention among the tokens of all scales that cover a patch, then among one token of each patch.",
        mixers=("scale_patch",),
        variants=(_variant(2, 185_336_644), _variant(3, 185_742_916), _variant(4, 185_989_444)),
        reports=(
            "the released model cannot be built as it stands: its transformer refuses arguments of its caller, and has "
            "positions for 21 tokens where two scales have 6 (with them, 185,348,164 parameters); the parts run, and "
            "recordings and counts are theirs",
            "Utah and TCGA ccRCC patches: up to 3.83 points above ResNets and hybrid ViTs with supervised, up to 9.88 with "
            "self-supervised pre-training (earlier version, arXiv 2407.13920)",
        ),
    )
)
