"""The interpreters of IA-RED² (arXiv 2106.12620), and what every host does with them: drop tokens, and learn to.

Hosts are vision transformers of images and of clips; they differ in how blocks get to know which tokens are left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import checks, ops
from regard.layers import heads_of

THRESHOLD = 0.5
"""A token stays if its score is above it."""

M = TypeVar("M", bound="Interpreted")


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


class Interpreted(nn.Module):
    """Mixed into a host whose sequences begin with a class token: groups of blocks, each behind an interpreter.

    The host says what its blocks take besides tokens (`_context`, `_gathered_context`) and checks its input (`_check`).
    """

    groups: tuple[int, ...]
    active: int

    if TYPE_CHECKING:  # the host's
        blocks: Any
        norm: Any
        head: nn.Module

        def _embed(self, x: Tensor) -> tuple[Tensor, Any]: ...

        def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor: ...

    def _check(self, x: Tensor) -> None:
        raise NotImplementedError

    def _context(self, grid: Any, keep: Tensor | None) -> tuple[Any, ...]:
        """What blocks take besides sequences `(B, 1 + N, dim)`, where `keep` of the same shape says which tokens are left."""
        raise NotImplementedError

    def _gathered_context(self, grid: Any, rows: Tensor, batch: int) -> tuple[Any, ...]:
        """What blocks take besides tokens laid end to end, those `rows` of all `batch * (1 + N)`."""
        raise NotImplementedError

    def _interpret_by(self, groups: Sequence[int], dim: int, num_heads: int, authors_quirks: bool = False) -> None:
        """Add the interpreters; to be called when the host's parts are there."""
        self.groups, self.active = tuple(groups), len(groups)
        self.interpreters = nn.ModuleList(Interpreter(dim, num_heads, authors_quirks=authors_quirks) for _ in groups)

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of a host without interpreters, from which training starts, leave these as they are."""
        if any(name.startswith("interpreters.") for name in state):
            return state
        return {f"interpreters.{name}": value for name, value in self.interpreters.state_dict().items()} | state

    def stage(self: M, active: int, learns: Literal["interpreter", "blocks", "all"] = "all") -> M:
        """Set which groups drop tokens and what learns next.

        Args:
            active: so many groups drop tokens, later ones go on with what is left; 0 is the plain host.
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
    ) -> Iterator[tuple[Tensor, Any]]:
        """As the host's. Scores and masks of each active group go to `notes`; with `bound`, learning ones draw masks."""
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
            context = self._context(grid, keep)
            for block in islice(blocks, size):
                x = block(x, *context)
                yield x, grid

    def interpret(self, x: Tensor, bound: float | None = None) -> Interpretation:
        """Images or clips -> logits with the scores and masks that led to them.

        Args:
            bound: draw the masks of interpreters that learn, see `policy_loss`; None takes every score above 0.5.
        """
        self._check(x)
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
        """Images or clips -> logits as `forward` gives them in evaluation, computed for the kept tokens only.

        Samples keep different numbers of tokens: those of a batch are laid end to end, and nothing is padded. What is left
        depends on the data, so this form cannot be exported.
        """
        self._check(x)
        tokens, grid = self._embed(x)
        batch, count, _ = tokens.shape
        x, rows = tokens.flatten(0, 1), torch.arange(batch * count, device=x.device)
        blocks = iter(self.blocks)
        for index, size in enumerate(self.groups):
            if index < self.active:
                interpreter = self.interpreters[index]
                scores = interpreter.score(x, interpreter.queries(x[rows % count == 0])[rows // count])
                stays = (scores > THRESHOLD) | (rows % count == 0)
                x, rows = x[stays], rows[stays]
            context = self._gathered_context(grid, rows, batch)
            for block in islice(blocks, size):
                x = block(x, *context)
        return self.head(self.norm(x[rows % count == 0]))


def _bounded(scores: Tensor, bound: float) -> Tensor:
    return bound * scores + (1 - bound) * (1 - scores)
