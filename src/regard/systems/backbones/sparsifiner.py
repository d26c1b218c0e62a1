"""Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers (Wei et al., 2023, arXiv
2303.13755).

A cheap predictor guesses the attention map of each image in low-rank form, and the attention itself looks only at the
keys that the guess ranks highest for each query.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import checks, ops
from regard.checkpoint import KeyMap
from regard.layers import Block, ConvNorm, Mixer, PatchEmbed, ProjectedCore, attach_loss, heads_of, resize_map
from regard.registry import System, Variant, register_mixer, register_system
from regard.skeletons import DeiT, Place
from regard.skeletons.base import make_head


class MaskPredictor(nn.Module):
    r"""The attention map guessed from projections of its queries and keys (the paper's mask predictor).

    $$C = \mathrm{softmax}_K(s\,(q W_q)(P_1^\top k W_k)^\top),\quad \hat A = C\,B,\quad B = P_2^\top$$

    W map a head's d channels to d / `reduce_channels`, shared by all heads; P_1 and P_2 `(N, K)` map N tokens to
    K = N / `reduce_tokens`. In use both factors are sparse: of C the largest coefficients of each row are kept, and of
    |B| what exceeds `threshold`. On a grid of another size P_1 and P_2 are interpolated.

    Args:
        input_size: the grid, of N tokens with the class token.
        authors_quirks: s = num_heads^-0.5, as released; otherwise the width of q W_q to the power of -0.5.
    """

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        input_size: Sequence[int],
        *,
        class_token: bool = False,
        reduce_tokens: int = 6,
        reduce_channels: int = 2,
        top_coefficients: int = 8,
        threshold: float = 0.02,
        authors_quirks: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("reduce_tokens", reduce_tokens), ("reduce_channels", reduce_channels)):
            checks.positive(name, value)
        self.input_size, self.first = tuple(input_size), int(class_token)
        self.top_coefficients, self.threshold = top_coefficients, threshold
        tokens, width = math.prod(input_size) + self.first, max(head_dim // reduce_channels, 1)
        self.scale = (num_heads if authors_quirks else width) ** -0.5
        self.proj_c_q, self.proj_c_k = nn.Linear(head_dim, width), nn.Linear(head_dim, width)
        self.proj_n, self.proj_back_n = (
            nn.Parameter(torch.empty(tokens, max(tokens // reduce_tokens, 1))) for _ in range(2)
        )
        for table in (self.proj_n, self.proj_back_n):
            nn.init.trunc_normal_(table, std=0.02)

    def forward(self, q: Tensor, k: Tensor, spatial: Sequence[int], raw: bool = False) -> tuple[Tensor, Tensor]:
        """The factor C and the guess, for the queries of the grid `spatial`.

        Args:
            q: `(B, prod(spatial), heads, head_dim)`. k: `(B, N, heads, head_dim)`, the class token first if there is one.
            raw: without making the factors sparse.

        Returns:
            `(B, heads, prod(spatial), K)` and `(B, heads, prod(spatial), N)`.
        """
        down, basis = (self._at(table, spatial) for table in (self.proj_n, self.proj_back_n))
        q, k = self.proj_c_q(q).transpose(1, 2), self.proj_c_k(k).permute(0, 2, 3, 1)
        coefficients = (q @ (k @ down) * self.scale).softmax(-1)
        if not raw:
            basis = F.threshold(basis.abs(), self.threshold, 0.0)
            best = coefficients.topk(min(self.top_coefficients, coefficients.shape[-1]), sorted=False)
            coefficients = torch.zeros_like(coefficients).scatter(-1, best.indices, best.values)
        return coefficients, coefficients @ basis.t()

    def _at(self, table: Tensor, spatial: Sequence[int]) -> Tensor:
        if tuple(spatial) == self.input_size:
            return table
        grid = table[self.first :].t().unflatten(1, self.input_size)[None]
        return torch.cat([table[: self.first], resize_map(grid, spatial)[0].flatten(1).t()])


class SparseCore(nn.Module):
    """Attention of each query over the `keep_rate` of all keys that the predictor ranks highest.

    A class token asks all keys; as a key it has to be chosen like others. The mask carries no gradient. In training the
    predictor learns from a loss of its own, that the layer brings along: `self_distill` times the summed squared
    difference between the raw guess and the dense attention map, with gradients to the predictor only.

    As in the authors' code the map is formed densely and masked.
    """

    def __init__(
        self, dim: int, num_heads: int, input_size: Sequence[int], keep_rate: float, self_distill: float, **options: Any
    ) -> None:
        super().__init__()
        if not 0 < keep_rate <= 1:
            raise ValueError(f"keep_rate must be above 0 and at most 1, got {keep_rate}.")
        self.num_heads, self.keep_rate, self.self_distill, self.dense = num_heads, keep_rate, self_distill, False
        self.predictor = MaskPredictor(heads_of(dim, num_heads), num_heads, input_size, **options)

    def connectivity(self, q: Tensor, k: Tensor, spatial: Sequence[int]) -> Tensor | None:
        """Which keys `(B, N, heads, head_dim)` the queries of the grid may see: boolean `(B, heads, Nq, N)`; None is all."""
        if self.dense:
            return None
        guess = self.predictor(q, k, spatial)[1].detach()
        best = guess.topk(math.ceil(self.keep_rate * k.shape[1]), sorted=False).indices
        return torch.zeros_like(guess, dtype=torch.bool).scatter(-1, best, True)

    def distillation(self, q: Tensor, k: Tensor, spatial: Sequence[int]) -> Tensor:
        """Squared difference of raw guess and dense attention, summed over a sample's map, mean over samples."""
        q, k = q.detach(), k.detach()
        dense = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * q.shape[-1] ** -0.5).softmax(-1)
        return (self.predictor(q, k, spatial, raw=True)[1] - dense).square().sum() / max(len(q), 1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, first: tuple[Tensor, ...] | None = None) -> Any:
        """Grids `(B, *S, dim)` -> that shape; with `first`, q, k and v `(B, 1, dim)` of a class token, a pair."""
        spatial = q.shape[1:-1]
        tokens = [x.flatten(1, -2) for x in (q, k, v)]
        if first is not None:
            tokens = [torch.cat([one, rest], 1) for one, rest in zip(first, tokens, strict=True)]
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)) for x in tokens)
        asking = q[:, q.shape[1] - math.prod(spatial) :]
        mask = self.connectivity(asking, k, spatial)
        if mask is not None and first is not None:
            mask = F.pad(mask, (0, 0, 1, 0), value=True)
        out = ops.attention(q, k, v, mask=mask).flatten(-2)  # type: ignore[union-attr]
        if self.training and self.self_distill and self.predictor.proj_n.requires_grad:
            out = attach_loss(out, self.self_distill * self.distillation(asking, k, spatial))
        grid = out[:, out.shape[1] - math.prod(spatial) :].unflatten(1, spatial)
        return grid if first is None else (grid, out[:, :1])


_PREDICTOR = (r"(^|\.)mask_predictor\.", r"\1core.predictor.")


def _stem_part(part: str) -> Callable[[re.Match[str]], str]:
    """LV-ViT numbers convolutions and norms 1, 2, 3; ReLUs stand between ours."""
    return lambda match: f"stem.{2 * int(match[1]) - 2}.{part}."


@register_mixer("predicted_sparse")
class PredictedSparseAttention(ProjectedCore):
    r"""Attention over the keys that a low-rank guess of its map ranks highest, for 1, 2 or 3 spatial axes.

    $$\mathrm{out} = W_o\,\mathrm{softmax}(d^{-1/2} Q K^\top + \log M)\,V,\quad
      M_{ij} = [\,j \in \mathrm{top}_k(\hat A_i)\,],\quad k = \lceil \mathrm{keep\_rate} \cdot N \rceil$$

    with the guess of `MaskPredictor`, as `SparseCore` uses it. Left out: the paper's combination with token pruning.

    Args:
        input_size: the grid for which the predictor's tables are built; other grids run with interpolated ones.
        keep_rate: share of the keys that a query sees.
        class_token: `forward` takes and gives a class token beside the grid.
        self_distill: weight of the predictor's own loss in training; 0 leaves the predictor as it is.
        predictor: further arguments of `MaskPredictor`: reduce_tokens, reduce_channels, top_coefficients, threshold,
            authors_quirks.
    """

    authors_keys = KeyMap(rules=(_PREDICTOR,))

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        input_size: Sequence[int] = (14, 14),
        keep_rate: float = 0.25,
        class_token: bool = False,
        self_distill: float = 0.01,
        qkv_bias: bool = True,
        **predictor: Any,
    ) -> None:
        heads_of(dim, num_heads)
        core = SparseCore(dim, num_heads, input_size, keep_rate, self_distill, class_token=class_token, **predictor)
        super().__init__(dim, num_heads, core, axes=len(input_size), class_token=class_token, qkv_bias=qkv_bias)

    @classmethod
    def in_stack(cls, index: int, input_size: tuple[int, ...], dim: int, num_heads: int, **options: Any) -> Mixer:
        """The tables are built for the grid."""
        return cls(dim, num_heads, **{"input_size": input_size, **options})


class Sparsifiner(DeiT):
    """DeiT with predicted sparse attention in all blocks.

    The authors start from a trained DeiT and train in two stages (`stage`): the predictors only, then the rest only, by
    cross entropy and by distillation from that DeiT. Without stages everything learns together.

    Args:
        keep_rate, self_distill: as in `PredictedSparseAttention`. predictor: arguments of `MaskPredictor`.
        host: arguments of `DeiT`: depth, img_size, drop_path_rate, num_classes, ...
    """

    authors_keys = KeyMap(rules=(*DeiT.host_rules, _PREDICTOR))

    def __init__(
        self,
        *,
        dim: int = 384,
        num_heads: int = 6,
        keep_rate: float = 0.25,
        self_distill: float = 0.01,
        qkv_bias: bool = True,
        predictor: dict[str, Any] | None = None,
        **host: Any,
    ) -> None:
        def mixer(at: Place) -> nn.Module:
            return PredictedSparseAttention(
                at.dim,
                at.num_heads,
                input_size=at.grid,
                keep_rate=keep_rate,
                class_token=True,
                self_distill=self_distill,
                qkv_bias=qkv_bias,
                **(predictor or {}),
            )

        super().__init__(mixer=mixer, dim=dim, num_heads=num_heads, **host)

    def stage(self, name: Literal["reconstruct", "distill", "joint"]) -> Sparsifiner:
        """Set what learns next (the paper's training schedule).

        Args:
            name: "reconstruct": only the predictors, from dense attention. "distill": all but the predictors, under their
                masks. "joint": everything, under masks.

        Returns:
            The model itself.
        """
        checks.one_of("name", name, ("reconstruct", "distill", "joint"))
        for module in self.modules():
            if isinstance(module, SparseCore):
                module.dense = name == "reconstruct"
        for key, parameter in self.named_parameters():
            parameter.requires_grad_(name == "joint" or (".predictor." in key) == (name == "reconstruct"))
        return self


class Scale(nn.Module):
    """x times a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return x * self.factor


class SparsifinerLVViT(Sparsifiner):
    """The same in LV-ViT (Jiang et al., 2021, arXiv 2104.10858): convolutional stem, halved branches, token labels.

    `aux_head` gives logits of every patch, to be trained by labels of patches. In evaluation half of their maximum is
    added to the logits of the class token, as released.

    Args:
        skip: residual branches are divided by it. stem_dim: channels of the stem.
    """

    authors_keys = KeyMap(
        rules=(
            *((rf"^patch_embed\.{kind}(\d)\.", _stem_part(part)) for kind, part in (("conv", "conv"), ("bn", "norm"))),
            (r"^patch_embed\.proj\.", "stem.6.proj."),
            *Sparsifiner.authors_keys.rules,
        )
    )

    def __init__(
        self,
        *,
        dim: int = 384,
        depth: int = 16,
        mlp_ratio: float = 3.0,
        skip: float = 2.0,
        stem_dim: int = 64,
        patch_size: int = 16,
        in_chans: int = 3,
        qkv_bias: bool = False,
        **options: Any,
    ) -> None:
        checks.divisible("patch_size", patch_size, "the stem's stride", 2)
        stem = nn.Sequential(
            *(ConvNorm(in_chans, stem_dim, 7, stride=2), nn.ReLU()),
            *(ConvNorm(stem_dim, stem_dim, 3), nn.ReLU()),
            *(ConvNorm(stem_dim, stem_dim, 3), nn.ReLU()),
            PatchEmbed(stem_dim, dim, patch_size // 2, norm=False),
        )
        super().__init__(
            stem=stem,
            dim=dim,
            depth=depth,
            mlp_ratio=mlp_ratio,
            patch_size=patch_size,
            in_chans=in_chans,
            qkv_bias=qkv_bias,
            **options,
        )
        self.aux_head = make_head(dim, self.num_classes)
        for module in self.modules():
            if isinstance(module, Block):
                module.scale1, module.scale2 = Scale(1 / skip), Scale(1 / skip)
            elif isinstance(module, nn.LayerNorm):
                module.eps = 1e-5  # LV-ViT keeps PyTorch's; DeiT has 1e-6

    def reset_classifier(self, num_classes: int) -> None:
        """Replace both classifiers by fresh ones; 0 classes leave the class token."""
        super().reset_classifier(num_classes)
        self.aux_head = make_head(self.num_features, num_classes, like=self.cls_token)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Normalised tokens -> logits `(B, num_classes)`, or the class token `(B, dim)`."""
        logits = super().forward_head(x, pre_logits)
        if pre_logits or self.training or self.num_classes == 0:
            return logits
        return logits + self.aux_head(x[:, 1:]).amax(1) / 2


_SOURCE = "parameters of the authors' code in the released configuration"

SYSTEM = register_system(
    System(
        slug="sparsifiner",
        title="Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers",
        year=2023,
        arxiv="2303.13755",
        evidence="authors_code",
        repo="lim142857/Sparsifiner",
        idea="A low-rank guess of each image's attention map decides which keys a query may see.",
        mixers=("predicted_sparse",),
        variants=(
            Variant("sparsifiner_deit_small", Sparsifiner, 22_251_880, source=_SOURCE),
            Variant("sparsifiner_lvvit_small", SparsifinerLVViT, 26_420_112, source=_SOURCE),
        ),
        reports=(
            "multiply-adds of attention reduced by 48 to 69 % at a loss of at most 0.4 points of ImageNet-1K top-1",
            "with token pruning besides, those of the whole model by more than 60 %",
        ),
    )
)
