"""IA-RED²: Interpretability-Aware Redundancy Reduction for Vision Transformers (Pan et al., 2021, arXiv 2106.12620).

Before each group of blocks an interpreter scores every token against the class token, and the group goes on without the
tokens that score low. Interpreters learn by reward, for right answers from few tokens, and their scores serve as a heat map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regard import checks
from regard.checkpoint import KeyMap
from regard.layers import ContextBlock, Mixer, attach_loss
from regard.layouts.ragged import offsets_from_ids
from regard.registry import System, Variant, register_mixer, register_system
from regard.skeletons import Clip, DeiT, TimeSformer
from regard.skeletons.timesformer import Attend
from regard.systems.backbones._interpreted import THRESHOLD, Interpreted, Interpreter, KeptAttention


@register_mixer("interpreted")
class InterpretedAttention(Mixer):
    r"""Attention among the tokens that an interpreter finds informative, for 1, 2 or 3 spatial axes.

    `KeptAttention` with $u_i = [I_i > 0.5]$ from an `Interpreter`, for use in any host. Departures from the paper: the mean
    token stands for the class token; a token that one layer drops may return in the next; and a mixer knows no reward, so
    the interpreter learns by the straight-through estimator (du/dI = 1 where a token asks) and by `efficiency` times the
    squared mean score, which the layer attaches to the loss. `IARED2` has the paper's form.

    Args:
        efficiency: weight of that price of tokens in training; 0 for none.
    """

    def __init__(self, dim: int, num_heads: int, *, efficiency: float = 0.01, qkv_bias: bool = True) -> None:
        super().__init__()
        self.dim, self.num_heads, self.efficiency = dim, num_heads, efficiency
        self.interpreter = Interpreter(dim, num_heads)
        self.attention = KeptAttention(dim, num_heads, qkv_bias=qkv_bias)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        spatial = self.check(x)
        tokens = x.flatten(1, -2)
        scores = self.interpreter.score(tokens, self.interpreter.queries(tokens.mean(1, keepdim=True)))
        keep = (scores > THRESHOLD).to(scores.dtype) + (scores - scores.detach())
        out = self.attention(tokens, keep).unflatten(1, spatial)
        if self.training and self.efficiency:
            price = scores.mean(1).square().sum() / max(len(scores), 1)
            out = attach_loss(out, self.efficiency * price)
        return out

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, efficiency={self.efficiency}"


class IARED2(Interpreted, DeiT):
    """DeiT in groups of blocks, each behind an interpreter that drops tokens.

    `forward` keeps shapes: dropped tokens are zeroed and masked, in training as in export. `forward_gathered` gives the same
    logits and really goes on without them.

    The authors start from a trained DeiT and go from group to group (`stage`): first the group's interpreter learns, from
    `policy_loss`, then the blocks behind it, from cross entropy. Cross entropy alone trains no interpreter.

    Args:
        groups: number of blocks in each group. interpreter_heads: heads of the interpreters.
        authors_quirks: as in `Interpreter`.
        host: arguments of `DeiT`: img_size, drop_path_rate, num_classes, ...
    """

    plain_block = ContextBlock
    authors_keys = KeyMap(
        rules=(*DeiT.host_rules, (r"^groups\.(\d+)\.agent\.", r"interpreters.\1.")),
        drop=(r"^groups\.\d+\.block_list\.",),  # the same tensors as blocks.*
    )

    def __init__(
        self,
        *,
        dim: int = 384,
        num_heads: int = 6,
        groups: Sequence[int] = (4, 4, 4),
        interpreter_heads: int = 6,
        qkv_bias: bool = True,
        authors_quirks: bool = False,
        **host: Any,
    ) -> None:
        groups = checks.tuple_of("groups", groups, len(groups))
        super().__init__(
            mixer=lambda at: KeptAttention(at.dim, at.num_heads, qkv_bias=qkv_bias),
            dim=dim,
            num_heads=num_heads,
            depth=sum(groups),
            **host,
        )
        self._interpret_by(groups, dim, interpreter_heads, authors_quirks)

    def _check(self, x: Tensor) -> None:
        self.check_image(x)

    def _context(self, grid: tuple[int, ...], keep: Tensor | None) -> tuple[Tensor, ...]:
        return () if keep is None else (keep,)

    def _gathered_context(self, grid: tuple[int, ...], rows: Tensor, batch: int) -> tuple[Tensor]:
        return (offsets_from_ids(rows // (1 + math.prod(grid)), batch),)


class IARED2TimeSformer(Interpreted, TimeSformer):
    """TimeSformer in groups of blocks, each behind an interpreter that drops tokens of single frames.

    As `IARED2`, with clips `(B, T, in_chans, H, W)` in place of images. A token is scored against the class token wherever
    and whenever it is; attention over time is among the frames that still have the place, attention within a frame among
    the class token and what the frame has left. A reconstruction: the abstract names host and speed; groups, heads of the
    interpreters and this use of masks are ours, after the image side.

    Args:
        groups: number of blocks in each group. interpreter_heads: heads of the interpreters; None is `num_heads`.
        host: arguments of `TimeSformer`: img_size, num_frames, drop_path_rate, num_classes, ...
    """

    authors_keys = KeyMap(rules=TimeSformer.authors_keys.rules)

    def __init__(
        self,
        *,
        dim: int = 768,
        num_heads: int = 12,
        groups: Sequence[int] = (4, 4, 4),
        interpreter_heads: int | None = None,
        **host: Any,
    ) -> None:
        groups = checks.tuple_of("groups", groups, len(groups))
        super().__init__(attention=KeptAttention, dim=dim, num_heads=num_heads, depth=sum(groups), **host)
        self._interpret_by(groups, dim, num_heads if interpreter_heads is None else interpreter_heads)

    def _check(self, x: Tensor) -> None:
        self.check_clip(x)

    def _context(self, grid: tuple[int, int, int], keep: Tensor | None) -> tuple[Clip]:
        return (Clip(grid, keep),)

    def _gathered_context(self, grid: tuple[int, ...], rows: Tensor, batch: int) -> tuple[GatheredClip]:
        return (GatheredClip(grid, rows, batch),)


class GatheredClip:
    """The grouping of `Clip` for what is left of all samples, laid end to end: tokens `(rows, dim)`, attended in ragged groups.

    Args:
        grid: T, H, W. rows: rising numbers of the tokens among all `batch * (1 + T H W)`, every class token included.
    """

    def __init__(self, grid: tuple[int, ...], rows: Tensor, batch: int) -> None:
        times, places = grid[0], math.prod(grid[1:])
        sample, token = rows // (1 + times * places), rows % (1 + times * places) - 1
        inner, first = (token >= 0).nonzero().squeeze(1), (token < 0).nonzero().squeeze(1)
        frame = sample[inner] * times + token[inner] // places
        place = sample[inner] * places + token[inner] % places
        self.by_place, self.place_offsets = _grouped(inner, place, batch * places)
        frames = torch.arange(batch * times, device=rows.device)
        copies = first.repeat_interleave(times)
        both = torch.cat([copies, inner]), torch.cat([frames, frame])
        self.by_frame, self.frame_offsets = _grouped(*both, batch * times)
        self.times, self.copied = times, (token[self.by_frame] < 0)[:, None]

    def along_time(self, x: Tensor, attend: Attend) -> Tensor:
        """`attend` gets the frames of each place in turn."""
        return torch.zeros_like(x).index_copy(0, self.by_place, attend(x[self.by_place], self.place_offsets))

    def within_frames(self, x: Tensor, attend: Attend) -> Tensor:
        """`attend` gets each frame in turn, the class token before its places."""
        out = attend(x[self.by_frame], self.frame_offsets)
        return torch.zeros_like(x).index_add(0, self.by_frame, torch.where(self.copied, out / self.times, out))


def _grouped(rows: Tensor, group: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Rows in the order of their groups, and the offsets of the groups among them."""
    order = group.argsort(stable=True)
    return rows[order], offsets_from_ids(group[order], groups)


def _timesformer(name: str, params: int, gmacs: float, frames: int, side: int) -> Variant:
    """The video host of the paper, as its own authors publish it."""
    return Variant(
        f"timesformer_{name}",
        TimeSformer,
        params,
        gmacs,
        ((1, frames, 3, side, side),),
        "parameters of TimeSformer's code (400 classes; the 121.4 M of its paper are with 174); a third of the FLOPs "
        "published for three crops",
        {"num_frames": frames, "img_size": side, "drop_path_rate": 0.1},
    )


SYSTEM = register_system(
    System(
        slug="ia_red2",
        title="IA-RED²: Interpretability-Aware Redundancy Reduction for Vision Transformers",
        year=2021,
        arxiv="2106.12620",
        evidence="other_code",
        repo="joon-stack/ltrp",
        idea="Before each group of blocks an interpreter, trained by reward, drops the tokens that say little.",
        mixers=("interpreted",),
        variants=(
            Variant(
                "ia_red2_deit_small",
                IARED2,
                23_381_224,
                source="parameters of the model file that survives in another repository; a third of the interpreters' is "
                "not used",
                options={"authors_quirks": True},
            ),
            Variant("ia_red2_deit_base", IARED2, options={"dim": 768, "num_heads": 12}),
            _timesformer("base", 121_566_352, 590 / 3, 8, 224),
            _timesformer("hr", 122_024_080, 5109 / 3, 16, 448),
            _timesformer("large", 121_633_936, 7140 / 3, 96, 224),
            Variant(
                "ia_red2_timesformer",
                IARED2TimeSformer,
                inputs=((1, 8, 3, 224, 224),),
                source="of the video models only the host's name is published; this is its base size in three groups",
            ),
        ),
        reports=(
            "up to 1.4 times as fast at a loss of less than 0.7 points, DeiT and TimeSformer (abstract)",
            "DeiT-S: 79.1 top-1 on ImageNet-1K at 3.15 G multiply-adds, with 79.8 at 4.58 before (a later comparison)",
            "heat maps judged better than raw attention and than interpretation methods made for it",
        ),
    )
)
