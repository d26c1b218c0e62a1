"""IA-RED²: Interpretability-Aware Redundancy Reduction for Vision Transformers (Pan et al., 2021, arXiv 2106.12620).

Before each group of blocks an interpreter scores every token against the class token, and the group goes on without the
tokens that score low. Interpreters learn by reward, for right answers from few tokens, and their scores serve as a heat map.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import checks, ops
from regard.checkpoint import KeyMap
from regard.layers import ContextBlock, Mixer, attach_loss, heads_of
from regard.layouts.ragged import offsets_from_ids
from regard.registry import System, Variant, register_mixer, register_system
from regard.skeletons import DeiT

THRESHOLD = 0.5
"""A token stays if its score is above it."""


class Interpreter(nn.Module):
    r"""The multi-head interpreter: how informative is each token to the class token?

    $$I_i = \frac{1}{H} \sum_h \sigma(d^{-1/2}\, q^{(h)\top}_{cls} k^{(h)}_i),\quad q, k = \mathrm{norm}(x)\,W$$

    The norm is a LayerNorm without weights. Tokens that were dropped before score 0, so they stay dropped.

    Args:
        authors_quirks: W makes values too, which nothing uses, as in the surviving code.
    """

    def __init__(self, dim: int, num_heads: int = 6, *, authors_quirks: bool = False) -> None:
        super().__init__()
        self.dim, self.num_heads, self.head_dim = dim, num_heads, heads_of(dim, num_heads)
        self.qk = nn.Linear(dim, (3 if authors_quirks else 2) * dim)

    def queries(self, first: Tensor) -> Tensor:
        """Queries `(..., num_heads, head_dim)` of class tokens `(..., dim)`."""
        return self._project(first, 0)

    def score(self, x: Tensor, queries: Tensor) -> Tensor:
        """Scores in 0..1 of tokens `(..., dim)`, whose leading axes those of the queries broadcast to."""
        logits = (self._project(x, 1) * queries).sum(-1) * self.head_dim**-0.5
        return logits.sigmoid().mean(-1)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        """`(B, 1 + N, dim)`, class token first, and which tokens are left `(B, 1 + N)`, 1 or 0 -> scores `(B, 1 + N)`."""
        return self.score(x, self.queries(x[:, :1])) * keep

    def _project(self, x: Tensor, part: int) -> Tensor:
        rows = slice(part * self.dim, (part + 1) * self.dim)
        x = F.linear(F.layer_norm(x, (self.dim,)), self.qk.weight[rows], self.qk.bias[rows])
        return x.unflatten(-1, (self.num_heads, self.head_dim))


class KeptAttention(nn.Module):
    r"""Softmax attention among the tokens that are left; the others get $W_o 0$ and nobody reads them.

    $$\mathrm{out} = W_o\,[\,u_i\,\mathrm{softmax}_{j:\,u_j = 1}(d^{-1/2} q_i^\top k_j)\,v_j\,],\quad q, k, v = x\,W_{qkv}$$
    """

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool = True) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, heads_of(dim, num_heads)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, left: Tensor | None = None) -> Tensor:
        """Dense or ragged, -> the shape of x.

        Args:
            x: `(B, N, dim)`, or the rows `(T, dim)` of the tokens that are left of all samples, laid end to end.
            left: u `(B, N)`, or the offsets `(B + 1,)` of the samples among the rows. None is all tokens.
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        out: Any
        if left is None:
            out = ops.attention(q, k, v)
        elif x.dim() == 2:
            out = ops.grouped_attention(q, k, v, left)
        else:
            out = ops.attention(q, k, v, mask=(left > THRESHOLD)[:, None, None]) * left[..., None, None]
        return self.proj(out.flatten(-2))


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


class Interpretation(NamedTuple):
    """What the model answered, and why.

    Attributes:
        logits: `(B, num_classes)`.
        scores: of each interpreter `(B, 1 + N)`, class token first; those of the first are the heat map of the paper.
        keeps: which tokens each group goes on with, 1 or 0, in the same shape.
        cost: share of all blocks' tokens that is left `(B,)`, the class token included.
    """

    logits: Tensor
    scores: list[Tensor]
    keeps: list[Tensor]
    cost: Tensor


class IARED2(DeiT):
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
        self.groups, self.active = groups, len(groups)
        self.interpreters = nn.ModuleList(
            Interpreter(dim, interpreter_heads, authors_quirks=authors_quirks) for _ in groups
        )

    def stage(self, active: int, learns: Literal["interpreter", "blocks", "all"] = "all") -> IARED2:
        """Set which groups drop tokens and what learns next.

        Args:
            active: so many groups drop tokens, later ones go on with what is left; 0 is a plain DeiT.
            learns: "interpreter": only that of the last active group. "blocks": those behind it, and the classifier. "all":
                everything.

        Returns:
            The model itself.
        """
        checks.one_of("learns", learns, ("interpreter", "blocks", "all"))
        if not (learns == "interpreter") <= active <= len(self.groups):
            raise ValueError(f"active must lie in {int(learns == 'interpreter')}..{len(self.groups)}, got {active!r}.")
        self.active, last = active, max(active - 1, 0)
        behind = [f"blocks.{index}." for index in range(sum(self.groups[:last]), len(self.blocks))]
        open_to = {"interpreter": (f"interpreters.{last}.",), "blocks": (*behind, "norm.", "head."), "all": ("",)}
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith(open_to[learns]))
        return self

    def _sequences(
        self, x: Tensor, notes: list[tuple[Tensor, Tensor]] | None = None, bound: float | None = None
    ) -> Iterator[tuple[Tensor, tuple[int, int]]]:
        """As in `DeiT`. Scores and masks of each active group go to `notes`; with `bound`, learning ones draw masks."""
        x, grid = self._embed(x)
        blocks = iter(self.blocks)
        keep = None
        for index, size in enumerate(self.groups):
            if index < self.active:
                before = x.new_ones(x.shape[:2]) if keep is None else keep
                interpreter = self.interpreters[index]
                draws = bound is not None and interpreter.qk.weight.requires_grad
                scores = interpreter(x.detach() if draws else x, before)
                keep = before * torch.bernoulli(_bounded(scores.detach(), bound)) if draws else scores > THRESHOLD
                keep = F.pad(keep[:, 1:].to(x.dtype), (1, 0), value=1.0)
                x = x * keep[..., None]
                if notes is not None:
                    notes.append((scores, keep))
            for block in islice(blocks, size):
                x = block(x) if keep is None else block(x, keep)
                yield x, grid

    def interpret(self, x: Tensor, bound: float | None = None) -> Interpretation:
        """`(B, in_chans, H, W)` -> logits with the scores and masks that led to them.

        Args:
            bound: draw the masks of interpreters that learn, see `policy_loss`; None takes every score above 0.5.
        """
        self.check_image(x)
        notes: list[tuple[Tensor, Tensor]] = []
        *_, (tokens, _) = self._sequences(x, notes, bound)
        scores, keeps = [note[0] for note in notes], [note[1] for note in notes]
        shares = [keep.mean(1) for keep in keeps] or [x.new_ones(len(x))]
        shares += shares[-1:] * (len(self.groups) - len(shares))
        cost = sum(size * share for size, share in zip(self.groups, shares, strict=True)) / sum(self.groups)
        return Interpretation(self.forward_head(self.norm(tokens)), scores, keeps, cost)

    def policy_loss(self, x: Tensor, labels: Tensor, *, error_penalty: float = 1.0, bound: float = 0.8) -> Tensor:
        r"""The loss of the interpreters that learn: REINFORCE, with the reward of the thresholded masks as baseline.

        $$L = -\frac{1}{N}\,(R(u) - R(\hat u)) \sum_i \log p(u_i),\quad
          R = 1 - \mathrm{cost}^2 \text{ if the answer is right, else } -\tau$$

        with u drawn from $p = b I + (1 - b)(1 - I)$ and $\hat u = [I > 0.5]$. For the first group the cost is the paper's
        share of kept tokens, because later groups go on with its mask; for later ones it counts the groups before, too. No
        gradient goes through the masks, or to the blocks.

        Args:
            labels: classes `(B,)`. error_penalty: τ.
            bound: b keeps draws from ending in certainty; in the surviving code that line is switched off (b = 1).
        """
        with torch.no_grad():
            baseline = self._reward(self.interpret(x), labels, error_penalty)
        played = self.interpret(x, bound)
        advantage = (self._reward(played, labels, error_penalty) - baseline).detach()
        chance = x.new_zeros(len(x))
        before = torch.ones_like(played.keeps[0]) if played.keeps else None
        for interpreter, scores, keep in zip(self.interpreters, played.scores, played.keeps, strict=False):
            if interpreter.qk.weight.requires_grad:
                drawn = F.binary_cross_entropy(_bounded(scores, bound), keep, reduction="none") * before
                chance = chance - drawn[:, 1:].mean(1)
            before = keep
        return -(advantage * chance).mean()

    @staticmethod
    def _reward(played: Interpretation, labels: Tensor, error_penalty: float) -> Tensor:
        right = played.logits.argmax(-1) == labels
        return torch.where(right, 1 - played.cost.square(), -error_penalty)

    def forward_gathered(self, x: Tensor) -> Tensor:
        """`(B, in_chans, H, W)` -> logits as `forward` gives them in evaluation, computed for the kept tokens only.

        Images keep different numbers of tokens: those of a batch are laid end to end, and nothing is padded. What is left
        depends on the data, so this form cannot be exported.
        """
        self.check_image(x)
        tokens, _ = self._embed(x)
        batch, count, _ = tokens.shape
        x, rows = tokens.flatten(0, 1), torch.arange(batch * count, device=x.device)
        offsets = torch.arange(batch + 1, device=x.device) * count
        blocks = iter(self.blocks)
        for index, size in enumerate(self.groups):
            if index < self.active:
                interpreter = self.interpreters[index]
                scores = interpreter.score(x, interpreter.queries(x[offsets[:-1]])[rows // count])
                stays = (scores > THRESHOLD) | (rows % count == 0)
                x, rows = x[stays], rows[stays]
                offsets = offsets_from_ids(rows // count, batch)
            for block in islice(blocks, size):
                x = block(x, offsets)
        return self.head(self.norm(x[offsets[:-1]]))


def _bounded(scores: Tensor, bound: float) -> Tensor:
    return bound * scores + (1 - bound) * (1 - scores)


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
        ),
        reports=(
            "up to 1.4 times as fast at a loss of less than 0.7 points, DeiT and TimeSformer (abstract)",
            "DeiT-S: 79.1 top-1 on ImageNet-1K at 3.15 G multiply-adds, with 79.8 at 4.58 before (a later comparison)",
            "heat maps judged better than raw attention and than interpretation methods made for it",
        ),
    )
)
