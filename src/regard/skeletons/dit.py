"""DiT (Peebles and Xie, 2023, arXiv 2212.09748) as a host: a transformer that denoises latents of images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from regard import checks
from regard.layers import Mlp, PatchEmbed, sincos
from regard.skeletons.base import Model
from regard.skeletons.place import MixerAt, Place


def time_code(t: Tensor, dim: int) -> Tensor:
    """Cosines, then sines of t / 10000^(2 i / dim): `(B,)` -> `(B, dim)` float32, the precision of published weights."""
    rates = torch.exp(-math.log(10000.0) * torch.arange(dim // 2, dtype=torch.float32, device=t.device) / (dim // 2))
    angles = t.float()[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], -1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift, the same for all places of a sample: `(B, H, W, dim)` and `(B, 1, 1, dim)`."""
    return x * (1 + scale) + shift


class AdaptiveBlock(nn.Module):
    r"""Residual block whose norms and branches are steered by a condition c (adaLN-Zero, section 3.2).

    $$x \leftarrow x + \gamma_1\,\mathrm{mixer}(n(x)(1 + \sigma_1) + \mu_1),\quad
      x \leftarrow x + \gamma_2\,\mathrm{mlp}(n(x)(1 + \sigma_2) + \mu_2),\quad (\mu, \sigma, \gamma) = W\,\mathrm{silu}(c)$$
    """

    def __init__(self, dim: int, mixer: nn.Module, *, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mixer = mixer
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act=partial(nn.GELU, approximate="tanh"))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """`(B, H, W, dim)` and `(B, dim)` -> `(B, H, W, dim)`."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, None, None].chunk(6, -1)
        x = x + gate1 * self.mixer(modulate(self.norm(x), shift1, scale1))
        return x + gate2 * self.mlp(modulate(self.norm(x), shift2, scale2))


class DiT(Model):
    """Patches with a fixed sine code, `AdaptiveBlock`s conditioned on time and class, LayerNorm, linear, back to pixels.

    Fresh, it predicts zero: the last layer and all gates of the branches start at zero.

    Args:
        mixer: builds the mixer of each block.
        num_heads: of all blocks, or one number for each.
        input_size: side of the latent that mixers are built for; others run too.
        num_classes: a further class, `num_classes` itself, stands for "none".
        class_drop: in training, the share of samples whose class becomes "none" (classifier-free guidance).
        learn_sigma: predicts variances besides the noise, so twice as many channels.
    """

    host_rules: ClassVar = (
        (r"^x_embedder\.", "stem."),
        (r"^t_embedder\.mlp\.", "time."),
        (r"^y_embedder\.embedding_table\.", "label."),
        (r"\.attn\.", ".mixer."),
        (r"^final_layer\.linear\.", "head."),
        (r"^final_layer\.", ""),
        (r"\badaLN_modulation\.", "modulation."),
    )
    """The authors' names outside of the mixers."""
    host_drop: ClassVar = (r"^pos_embed$",)

    def __init__(
        self,
        *,
        mixer: MixerAt,
        dim: int = 384,
        depth: int = 12,
        num_heads: int | Sequence[int] = 6,
        mlp_ratio: float = 4.0,
        patch_size: int = 2,
        input_size: int = 32,
        in_chans: int = 4,
        num_classes: int = 1000,
        class_drop: float = 0.1,
        learn_sigma: bool = True,
    ) -> None:
        super().__init__()
        checks.divisible("dim", dim, "the sine code's parts", 4)
        heads = checks.tuple_of("num_heads", num_heads, depth, each="block")
        self.dim, self.in_chans, self.num_classes, self.class_drop = dim, in_chans, num_classes, class_drop
        self.patch_size, self.out_chans = patch_size, in_chans * (2 if learn_sigma else 1)
        self.stem = PatchEmbed(in_chans, dim, patch_size, norm=False)
        self.time = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label = nn.Embedding(num_classes + 1, dim)
        side = -(-input_size // patch_size)
        self.blocks = nn.ModuleList(
            AdaptiveBlock(dim, mixer(Place(0, index, dim, count, (side, side), 0.0)), mlp_ratio=mlp_ratio)
            for index, count in enumerate(heads)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))
        self.head = nn.Linear(dim, patch_size**2 * self.out_chans)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))  # a view: kernels are linear maps of their patch
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for parameter in (*self.label.parameters(), *self.time.parameters()):
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        for last in (*(block.modulation for block in self.blocks), self.modulation, self.head):
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Noisy latents `(B, in_chans, H, W)`, times `(B,)`, classes `(B,)` -> `(B, out_chans, H, W)`, noise first."""
        tokens = self.forward_features(x, t, y)
        patches = tokens.unflatten(-1, (self.patch_size, self.patch_size, self.out_chans))  # (B, h, w, p, p, C)
        image = patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return image[..., : x.shape[2], : x.shape[3]]

    def forward_features(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The same inputs -> what each patch predicts, `(B, h, w, patch_size² out_chans)`."""
        checks.image(x, self.in_chans)
        for name, value in (("t", t), ("y", y)):
            if value.shape != x.shape[:1]:
                raise ValueError(f"{name} must be {tuple(x.shape[:1])}, one for each sample, got {tuple(value.shape)}.")
        if self.training and self.class_drop:
            y = torch.where(torch.rand(y.shape, device=y.device) < self.class_drop, self.num_classes, y)
        condition = self.time(time_code(t, 256).to(x.dtype)) + self.label(y)
        x = self.stem(x.movedim(1, -1))
        x = x + self._position(x)
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.modulation(condition)[:, None, None].chunk(2, -1)
        return self.head(modulate(self.norm(x), shift, scale))

    def _position(self, x: Tensor) -> Tensor:
        """Half of the channels tell the column, the other half the row: `(H, W, dim)`."""
        rows, columns = (
            sincos(torch.arange(length, device=x.device), self.dim // 2, interleaved=False).to(x.dtype)
            for length in x.shape[1:3]
        )
        height, width = x.shape[1:3]
        return torch.cat([columns[None].expand(height, -1, -1), rows[:, None].expand(-1, width, -1)], -1)

    def guided(self, x: Tensor, t: Tensor, y: Tensor, scale: float) -> Tensor:
        """`forward` with classifier-free guidance: noise e_none + scale (e_y - e_none); variances are those of the class."""
        none = torch.full_like(y, self.num_classes)
        out, free = self(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, none])).chunk(2)
        noise = free[:, : self.in_chans] + scale * (out - free)[:, : self.in_chans]
        return torch.cat([noise, out[:, self.in_chans :]], 1)
