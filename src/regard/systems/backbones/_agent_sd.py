"""AgentSD: agent attention for trained diffusion models, without further training (arXiv 2312.08874).

Similar tokens are merged before self-attention and copied back after it (token merging, arXiv 2303.17604); a second,
far stronger merge of the same tokens gives the agents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import checks, ops
from regard.checkpoint import KeyMap
from regard.layers import Mlp
from regard.layouts.windows import partition


@dataclass(frozen=True)
class AgentSD:
    """How a diffusion block saves: the defaults are the authors' for the first 20 denoising steps.

    Attributes:
        ratio: share of the tokens merged away. agent_ratio: the same for the agents.
        cell: one token in each cell of this size is a target, into which others merge.
        read_power: the second softmax is scaled by head_dim^(-read_power / 2). shortcut: k in O + k V.
        min_tokens: smaller grids are left alone (the authors name the strongest downsampling instead).
        random_targets: draw the target of each cell for an even batch; it is the first one for an odd batch, whose
            prompted and unprompted images cannot share the draw.
    """

    ratio: float = 0.4
    agent_ratio: float = 0.95
    cell: int | tuple[int, ...] = 4
    read_power: float = 0.3
    shortcut: float = 0.075
    min_tokens: int = 0
    random_targets: bool = True

    @classmethod
    def at_step(cls, step: int) -> AgentSD:
        """The authors' schedule: from denoising step 20 on, merge gently (and then without agents, see the block)."""
        return cls() if step < 20 else cls(agent_ratio=0.5, cell=2)


@dataclass(frozen=True)
class Matching:
    """Which tokens merge into which: Nt targets, Ns sources, the source most similar to its target first.

    Attributes:
        targets: `(Nt,)` places in the flat grid. sources: `(B, Ns)` places. partner: `(B, Ns)` index of the target.
    """

    targets: Tensor
    sources: Tensor
    partner: Tensor

    def merge(self, x: Tensor, count: int) -> Tensor:
        """Average the first `count` sources into their targets: `(B, N, C)` -> `(B, N - count, C)`, targets last."""
        merged, kept = self.sources.split([count, self.sources.shape[1] - count], 1)
        into = self.partner[:, :count, None].expand(-1, -1, x.shape[-1])
        targets = x[:, self.targets].scatter_reduce(1, into, _take(x, merged), "mean")
        return torch.cat([_take(x, kept), targets], 1)

    def unmerge(self, y: Tensor, count: int) -> Tensor:
        """Give every merged source the value of its target: `(B, N - count, C)` -> `(B, N, C)`."""
        kept, targets = y.split([self.sources.shape[1] - count, len(self.targets)], 1)
        values = torch.cat([_take(targets, self.partner[:, :count]), kept, targets], 1)
        places = torch.cat([self.sources, self.targets.expand(len(y), -1)], 1)
        return torch.zeros_like(values).scatter(1, places[..., None].expand_as(values), values)


def _take(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


@torch.no_grad()
def match_tokens(
    metric: Tensor, cell: int | Sequence[int], *, random_targets: bool = False, generator: torch.Generator | None = None
) -> Matching:
    """Pair each token with the most similar target (cosine), one target in each whole cell of the grid.

    Args:
        metric: `(B, *S, C)` what tokens are compared by. cell: its size, for all axes or one for each.
        random_targets: draw the target of each cell, the same for the whole batch; otherwise its first token.
    """
    spatial = metric.shape[1:-1]
    cell = checks.tuple_of("cell", cell, len(spatial))
    sizes = [min(size, length) for size, length in zip(cell, spatial, strict=True)]
    flat = F.normalize(metric.flatten(1, -2), dim=-1)
    place = torch.arange(flat.shape[1], device=metric.device).view(1, *spatial)
    for axis, (length, size) in enumerate(zip(spatial, sizes, strict=True)):
        place = place.narrow(1 + axis, 0, length - length % size)
    cells = partition(place, sizes)[0]  # (cells, tokens)
    pick = torch.zeros(len(cells), 1, dtype=torch.long, device=metric.device)
    if random_targets:
        pick = torch.randint(cells.shape[1], pick.shape, generator=generator, device=metric.device)
    targets = cells.gather(1, pick)[:, 0]
    is_target = torch.zeros(flat.shape[1], dtype=torch.long, device=metric.device).scatter(0, targets, 1)
    sources = is_target.argsort(stable=True)[: flat.shape[1] - len(targets)]
    best, partner = (flat[:, sources] @ flat[:, targets].transpose(1, 2)).max(-1)
    order = best.argsort(-1, descending=True)
    return Matching(targets, sources[order], partner.gather(1, order))


class DiffusionAttention(nn.Module):
    r"""Attention of a latent diffusion block, over itself or a context, on sequences `(B, N, dim)`.

    With agents (AgentSD): $O = \mathrm{softmax}(s^{p} Q A^\top)\,\mathrm{softmax}(s A K^\top) V + k V$.
    """

    def __init__(self, dim: int, num_heads: int, head_dim: int, context_dim: int | None = None) -> None:
        super().__init__()
        width, source = num_heads * head_dim, dim if context_dim is None else context_dim
        self.head_dim = head_dim
        self.q = nn.Linear(dim, width, bias=False)
        self.k, self.v = nn.Linear(source, width, bias=False), nn.Linear(source, width, bias=False)
        self.proj = nn.Linear(width, dim)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        agents: Tensor | None = None,
        read_power: float = 1.0,
        shortcut: float = 0.0,
    ) -> Tensor:
        """`(B, N, dim)`, with a context `(B, M, context_dim)` or agents `(B, n, dim)` -> `(B, N, dim)`."""
        source = x if context is None else context
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (self.q(x), self.k(source), self.v(source)))
        if agents is None:
            return self.proj(ops.attention(q, k, v).flatten(-2))  # type: ignore[union-attr]
        scale = self.head_dim**-0.5
        # Both softmaxes of the op have one scale; the queries carry what the second one has besides.
        out = ops.landmark_attention(
            q * scale ** (read_power - 1), self.q(agents).unflatten(-1, (-1, self.head_dim)), k, v, scale=scale
        )
        return self.proj((out + shortcut * v).flatten(-2))


class DiffusionBlock(nn.Module):
    """Self-attention, cross-attention, MLP, each with its residual: the transformer block of latent diffusion models.

    `block.agent_sd = AgentSD(...)` turns AgentSD on for the self-attention, None turns it off; `apply_agent_sd` does so
    for a whole model. Tokens are compared as they enter the block, and merged as they leave the first norm. Where
    agents would not be fewer than half of the merged tokens, ordinary attention runs on those.
    """

    authors_keys = KeyMap(
        rules=(
            (r"to_out\.0\.", "proj."),
            (r"\.to_([qkv])\.", r".\1."),
            (r"^ff\.0\.", "mlp.fc1."),
            (r"^ff\.2\.", "mlp.fc2."),
        )
    )

    def __init__(
        self, dim: int, num_heads: int, head_dim: int, *, context_dim: int | None = None, mlp_ratio: float = 4.0
    ) -> None:
        super().__init__()
        self.dim = dim
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn1 = DiffusionAttention(dim, num_heads, head_dim)
        self.attn2 = DiffusionAttention(dim, num_heads, head_dim, context_dim)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))
        self.agent_sd: AgentSD | None = None

    def forward(self, x: Tensor, context: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Grid `(B, *S, dim)`, context `(B, M, context_dim)` -> the grid's shape; `generator` draws the targets."""
        spatial = checks.grid("x", x, (1, 2, 3), self.dim)
        tokens = x.flatten(1, -2)
        tokens = tokens + self._mix(x, self.norm1(tokens), generator)
        tokens = tokens + self.attn2(self.norm2(tokens), context)
        return (tokens + self.mlp(self.norm3(tokens))).unflatten(1, spatial)

    def _mix(self, x: Tensor, tokens: Tensor, generator: torch.Generator | None) -> Tensor:
        own, length = self.agent_sd, tokens.shape[1]
        if own is None or length < own.min_tokens:
            return self.attn1(tokens)
        draw = own.random_targets and len(x) % 2 == 0
        matching = match_tokens(x, own.cell, random_targets=draw, generator=generator)
        count, more = (min(int(length * ratio), matching.sources.shape[1]) for ratio in (own.ratio, own.agent_ratio))
        merged = matching.merge(tokens, count)
        if 2 * (length - more) < length - count:
            agents = matching.merge(tokens, more)
            out = self.attn1(merged, agents=agents, read_power=own.read_power, shortcut=own.shortcut)
        else:
            out = self.attn1(merged)
        return matching.unmerge(out, count)


def apply_agent_sd(model: nn.Module, settings: AgentSD | None) -> None:
    """Turn AgentSD on (or off, with None) in every `DiffusionBlock` of a model; call again as the steps go on.

    Raises:
        ValueError: if the model has no such block.
    """
    blocks = [module for module in model.modules() if isinstance(module, DiffusionBlock)]
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no DiffusionBlock to apply AgentSD to.")
    for block in blocks:
        block.agent_sd = settings
