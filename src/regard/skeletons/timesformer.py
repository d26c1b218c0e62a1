"""TimeSformer (Bertasius et al., 2021, arXiv 2102.05095) as a host: attention over time, then within frames."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import checks
from regard.checkpoint import KeyMap
from regard.layers import (
    DropPath,
    Mlp,
    PatchEmbed,
    SoftmaxAttention,
    linear_rates,
    resize_map,
    resize_sequence_table,
    split_qkv,
    vit_init,
)
from regard.skeletons.base import Model, make_head

Attend = Callable[..., Tensor]
"""Attention within the groups that a `Grouping` makes: the groups, and where tokens are left out, what is left of each."""


class Grouping(Protocol):
    """How tokens "class token, then a clip" are grouped for divided attention, in whatever form they are kept."""

    def along_time(self, x: Tensor, attend: Attend) -> Tensor:
        """Each place of the clip by itself, over all times: the shape of x, zeros for the class token."""

    def within_frames(self, x: Tensor, attend: Attend) -> Tensor:
        """Each frame by itself, with the class token; what the class token reads is averaged over the frames."""


@dataclass(frozen=True)
class Clip:
    """A `Grouping` of sequences `(B, 1 + T H W, dim)`: class token, then frame by frame, each in row-major order.

    Args:
        grid: T, H, W. left: which tokens take part, `(B, 1 + T H W)`, 1 or 0; None is all of them.
    """

    grid: tuple[int, int, int]
    left: Tensor | None = None

    def along_time(self, x: Tensor, attend: Attend) -> Tensor:
        """`attend` gets `(B H W, T, dim)`."""
        out = attend(*map(self._places, self._with_left(x)))
        out = out.unflatten(0, (x.shape[0], math.prod(self.grid[1:]))).transpose(1, 2).flatten(1, 2)
        return F.pad(out, (0, 0, 1, 0))

    def within_frames(self, x: Tensor, attend: Attend) -> Tensor:
        """`attend` gets `(B T, 1 + H W, dim)`."""
        out = attend(*map(self._frames, self._with_left(x))).unflatten(0, (x.shape[0], self.grid[0]))
        return torch.cat([out[:, :, 0].mean(1, keepdim=True), out[:, :, 1:].flatten(1, 2)], 1)

    def _with_left(self, x: Tensor) -> list[Tensor]:
        return [x] if self.left is None else [x, self.left]

    def _by_frame(self, x: Tensor) -> Tensor:
        return x[:, 1:].unflatten(1, (self.grid[0], math.prod(self.grid[1:])))

    def _places(self, x: Tensor) -> Tensor:
        return self._by_frame(x).transpose(1, 2).flatten(0, 1)

    def _frames(self, x: Tensor) -> Tensor:
        first = x[:, None, :1].repeat_interleave(self.grid[0], 1)
        return torch.cat([first, self._by_frame(x)], 2).flatten(0, 1)


class DividedBlock(nn.Module):
    r"""Divided space-time attention and an MLP (section 3; figure 2, "T+S").

    $$x \leftarrow x + W\,\mathrm{temporal}(n_t(x)),\quad x \leftarrow x + \mathrm{spatial}(n_1(x)),\quad
      x \leftarrow x + \mathrm{mlp}(n_2(x))$$

    Temporal attention is among the times at one place and passes the class token by. Spatial attention is within a frame,
    of which the class token is one more token; what it reads there is averaged over the frames. W is zero at first, so a
    fresh block treats frames as images. Stochastic depth drops a branch of a whole clip, W included; in the release, those
    of single places and frames, before W.
    """

    def __init__(
        self,
        dim: int,
        attention: Callable[[], nn.Module],
        *,
        mlp_ratio: float,
        norm: Callable[[int], nn.Module],
        drop_path: float,
    ) -> None:
        super().__init__()
        self.temporal_norm1, self.temporal_attn = norm(dim), attention()
        self.temporal_fc = nn.Linear(dim, dim)
        self.norm1, self.attn = norm(dim), attention()
        self.norm2, self.mlp = norm(dim), Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, clip: Grouping) -> Tensor:
        """Tokens as `clip` groups them -> the same shape."""
        x = x + self.drop_path(clip.along_time(self.temporal_norm1(x), self._over_time))
        x = x + self.drop_path(clip.within_frames(self.norm1(x), self.attn))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _over_time(self, x: Tensor, *left: Tensor) -> Tensor:
        return self.temporal_fc(self.temporal_attn(x, *left))


class TimeSformer(Model):
    """Patches of frames, class token, tables of places and times, divided blocks, LayerNorm, linear on the class token.

    Takes clips `(B, T, in_chans, H, W)`, the released code `(B, in_chans, T, H, W)`. At another size or number of frames
    the tables are interpolated (the release takes the nearest entry).

    Args:
        attention: dim, num_heads -> the attention of a block, called with groups of tokens `(groups, N, dim)`; None is
            `SoftmaxAttention`. img_size, num_frames: what the tables are built for.
    """

    authors_keys = KeyMap(rules=((r"^model\.", ""), (r"^patch_embed\.", "stem.")), convert=split_qkv)

    def __init__(
        self,
        *,
        attention: Callable[[int, int], nn.Module] | None = None,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        patch_size: int = 16,
        img_size: int = 224,
        num_frames: int = 8,
        drop_path_rate: float = 0.0,
        num_classes: int = 400,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        for name, value in (("patch_size", patch_size), ("img_size", img_size), ("num_frames", num_frames)):
            checks.positive(name, value)
        made = partial(SoftmaxAttention if attention is None else attention, dim, num_heads)
        norm = partial(nn.LayerNorm, eps=1e-6)
        side = -(-img_size // patch_size)
        self.in_chans, self.num_classes, self.num_features, self.grid = in_chans, num_classes, dim, (side, side)
        self.stem = PatchEmbed(in_chans, dim, patch_size, norm=False)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + side * side, dim))
        self.time_embed = nn.Parameter(torch.zeros(1, num_frames, dim))
        self.blocks = nn.ModuleList(
            DividedBlock(dim, made, mlp_ratio=mlp_ratio, norm=norm, drop_path=rate)
            for rate in linear_rates(drop_path_rate, depth)
        )
        self.norm = norm(dim)
        self.head = make_head(dim, num_classes)
        self.apply(vit_init)
        for table in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(table, std=0.02)
        for block in cast(Iterable[DividedBlock], self.blocks):
            nn.init.zeros_(block.temporal_fc.weight)

    def no_weight_decay(self) -> set[str]:
        """Class token and tables."""
        return {"cls_token", "pos_embed", "time_embed"}

    def check_clip(self, x: Tensor) -> None:
        """Check the input at the door."""
        checks.clip(x, self.in_chans)
        checks.no_half_on_cpu(type(self).__name__, x)

    def _embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """Clip -> sequence `(B, 1 + T H W, dim)`, and T, H, W in tokens."""
        frames = self.stem(x.flatten(0, 1).movedim(1, -1))
        grid = (x.shape[1], frames.shape[1], frames.shape[2])
        places = resize_sequence_table(self.pos_embed, self.grid, grid[1:])
        times = resize_map(self.time_embed.transpose(1, 2), grid[:1]).transpose(1, 2)
        tokens = frames.unflatten(0, x.shape[:2]).flatten(2, 3) + places[:, None, 1:] + times[:, :, None]
        first = (self.cls_token + places[:, :1]).expand(x.shape[0], -1, -1)
        return torch.cat([first, tokens.flatten(1, 2)], 1), grid

    def _sequences(self, x: Tensor) -> Iterator[tuple[Tensor, tuple[int, int, int]]]:
        """Tokens `(B, 1 + T H W, dim)` after each block, and T, H, W."""
        x, grid = self._embed(x)
        for block in self.blocks:
            x = block(x, Clip(grid))
            yield x, grid

    def forward_features(self, x: Tensor) -> Tensor:
        """`(B, T, in_chans, H, W)` -> normalised tokens `(B, 1 + T H' W', dim)`, class token first, then frame by frame."""
        self.check_clip(x)
        *_, (tokens, _) = self._sequences(x)
        return self.norm(tokens)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Normalised tokens -> logits `(B, num_classes)`, or `(B, dim)` before the classifier."""
        return x[:, 0] if pre_logits else self.head(x[:, 0])

    def forward(self, x: Tensor) -> Tensor:
        """`(B, T, in_chans, H, W)` -> logits `(B, num_classes)`."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(self, x: Tensor, indices: Sequence[int] | None = None) -> list[Tensor]:
        """Maps `(B, T, dim, H', W')` after the blocks (all, or those in `indices`), before the final norm.

        Raises:
            ValueError: for a block that does not exist.
        """
        self.check_clip(x)
        maps = [tokens[:, 1:].unflatten(1, grid).movedim(-1, 2) for tokens, grid in self._sequences(x)]
        wanted = range(len(maps)) if indices is None else indices
        for index in wanted:
            if not -len(maps) <= index < len(maps):
                raise ValueError(f"indices must lie in 0..{len(maps) - 1}, got {index}.")
        return [maps[index] for index in wanted]

    def get_classifier(self) -> nn.Module:
        """The classifier, such as one freezes the rest for."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a fresh one; 0 classes leave the class token."""
        self.num_classes = num_classes
        self.head = make_head(self.num_features, num_classes, like=self.cls_token)
