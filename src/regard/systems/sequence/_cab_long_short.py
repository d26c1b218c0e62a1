"""Transformer-LS: a window of near tokens and summaries of all, in one softmax (Zhu et al., 2021, arXiv 2107.02192)."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import checks, ops
from regard.checkpoint import KeyMap
from regard.layers import Mixer, heads_of, sincos
from regard.registry import register_mixer
from regard.systems.sequence._cab_attention import Tiles, key_mask

_LEAST = torch.finfo(torch.float32).min
"""The logit of padding in a softmax over tokens: finite, so that padding alone gives no NaN."""
_TILE = 32


@register_mixer("transformer_ls")
class LongShortTransformerAttention(Mixer):
    r"""Every token attends its neighbourhood and r summaries of the whole sequence (section 3.3).

    $$o = \mathrm{softmax}\big(d^{-1/2}\, q\, [\mathrm{LN}_2(P^\top K);\, K_{near}]^\top\big)
      \,[\mathrm{LN}_2(P^\top V);\, V_{near}],\quad
      P = \mathrm{softmax}_{tokens}(x W_p),\ K, V = \mathrm{LN}_1(x W_k), \mathrm{LN}_1(x W_v)$$

    with summaries of each head's own P. The sequence is cut into tiles of w tokens, whose queries share the keys of the tile
    and of w / 2 tokens on either side. The norms run over the channels of all heads. Padding is expected at the end (in
    front it would move the tiles).

    Args:
        dim: channels. num_heads: divides dim.
        window_size: w. landmarks: r.
    """

    dims: ClassVar[tuple[int, ...]] = (1,)
    can_mask: ClassVar[bool] = True
    authors_keys = KeyMap(
        rules=[
            (r"\bW_([qkv])\.", r"\1."),
            (r"\bW_o\.", "proj."),
            (r"\bdconv_fc\.", "compress."),
            (r"\bdual_ln_l\.", "norm_near."),
            (r"\bdual_ln_s\.", "norm_far."),
        ]
    )

    def __init__(self, dim: int, num_heads: int, *, window_size: int = 15, landmarks: int = 16) -> None:
        super().__init__()
        self.head_dim = heads_of(dim, num_heads)
        checks.positive("window_size", window_size)
        checks.positive("landmarks", landmarks)
        self.dim, self.num_heads, self.window_size, self.landmarks = dim, num_heads, window_size, landmarks
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_near, self.norm_far = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.compress = nn.Linear(dim, num_heads * landmarks)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`(B, N, dim)` -> the same shape; mask `(B, N)`, False at padding, which is not read."""
        (length,) = self.check(x)
        batch, heads = len(x), (self.num_heads, self.head_dim)
        weights = self.compress(x)
        if mask is not None:
            mask = key_mask(mask, x)
            weights = weights.masked_fill(~mask[..., None], _LEAST)
        weights = weights.softmax(1).unflatten(-1, (self.num_heads, self.landmarks))
        q = self.q(x).unflatten(-1, heads)
        side = max(self.window_size // 2, 1)
        tiles = Tiles(length, self.window_size, side, side, x.device)
        near = [self.norm_near(part(x)).unflatten(-1, heads) for part in (self.k, self.v)]
        far = [torch.einsum("bnhr,bnhd->brhd", weights, part).flatten(-2) for part in near]
        far = [self.norm_far(part).unflatten(-1, heads)[:, None].expand(-1, tiles.count, -1, -1, -1) for part in far]
        keys, values = (torch.cat([a, tiles.keys(b)], 2).flatten(0, 1) for a, b in zip(far, near, strict=True))
        visible = (tiles.inside if mask is None else tiles.inside & tiles.keys(mask)).expand(batch, -1, -1)
        rows = F.pad(visible, (self.landmarks, 0), value=True).flatten(0, 1)[:, None, None]
        out = tiles.join(ops.attention(tiles.queries(q).flatten(0, 1), keys, values, mask=rows), batch)  # type: ignore[arg-type]
        if mask is not None:
            out = out * mask[..., None, None]
        return self.proj(out.flatten(-2))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, window_size={self.window_size}, landmarks={self.landmarks}"


class LongShortState(NamedTuple):
    """What a causal stream remembers.

    Attributes:
        keys, values: of the last w tokens, `(B, t, heads, head_dim)`.
        chunk: of the tokens of the unfinished chunk, `(B, t, 2 dim + heads rank)`: keys, values and weights of theirs.
        far_keys, far_values: the summaries, `(B, m, heads, head_dim)`: the part that grows, by `rank` a chunk.
    """

    keys: Tensor
    values: Tensor
    chunk: Tensor
    far_keys: Tensor
    far_values: Tensor


@register_mixer("causal_transformer_ls")
class CausalLongShortAttention(Mixer):
    r"""Every token attends the last w tokens and summaries of all whole chunks before its own (section 3.4).

    $$o_i = \mathrm{softmax}_{S_i \cup W_i}\,[v],\quad
      s_{ij} = (\hat q_i + u)^\top k_j + (\hat q_i + t)^\top R\,p_{i-j}\ (j \in W_i),\quad
      s_{ic} = \hat q_i^\top (\kappa_c + R' p_{\delta})\ (c \in S_i)$$

    $\hat q = d^{-1/2} q$; W_i: tokens i - w + 1 to i, keys and values under a LayerNorm; S_i: for each chunk of C tokens
    before that of i, `rank` means of its keys and values, weighted by a softmax of x W_p, under another LayerNorm; p: sine
    code, of the distance, and of the number δ of summaries between. The terms are Transformer-XL's.

    `authors_quirks`: the release puts `memory` tokens of zeros before the sequence, which have summaries and places in
    windows like any others, and ignores masks.

    Args:
        dim: channels. num_heads: divides dim.
        window_size: w. chunk_size: C. rank: summaries of a chunk.
        causal: must be True; "transformer_ls" is the mixer for both directions.
        memory: tokens of zeros, with `authors_quirks` only; a multiple of C.
    """

    dims: ClassVar[tuple[int, ...]] = (1,)
    can_causal: ClassVar[bool] = True
    can_stream: ClassVar[bool] = True
    can_mask: ClassVar[bool] = True
    authors_keys = KeyMap(
        rules=[
            (r"\bproj_query\.", "q."),
            (r"\bproj_key\.", "k."),
            (r"\bproj_val\.", "v."),
            (r"\bproj_out\.", "proj."),
            (r"\bdconv_1\.", "compress."),
            (r"\bdual_ln_win\.", "norm_near."),
            (r"\bdual_ln_dproj\.", "norm_far."),
            (r"\br_net\.", "position_near."),
            (r"\br_net_chunk\.", "position_far."),
            (r"\br_w_bias$", "content_bias"),
            (r"\br_r_bias$", "position_bias"),
        ],
        drop=[r"\bpos_emb\.inv_freq$"],
        convert=lambda name, value: {name: value.flatten(0, -2) if name.endswith("_bias") else value},
    )

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window_size: int = 256,
        chunk_size: int = 32,
        rank: int = 1,
        causal: bool = True,
        memory: int = 1024,
        authors_quirks: bool = False,
    ) -> None:
        super().__init__()
        self.head_dim = heads_of(dim, num_heads)
        if not causal:
            raise ValueError("this mixer is causal by its idea: use mixer 'transformer_ls' for both directions.")
        checks.divisible("dim", dim, "2", 2)  # sines and cosines
        for name, number in (("window_size", window_size), ("chunk_size", chunk_size), ("rank", rank)):
            checks.positive(name, number)
        if authors_quirks:
            checks.divisible("memory", memory, "chunk_size", chunk_size)
        self.dim, self.num_heads, self.causal, self.window_size = dim, num_heads, causal, window_size
        self.chunk_size, self.rank, self.memory = chunk_size, rank, memory if authors_quirks else 0
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        for part in (self.q, self.k, self.v, self.proj):
            nn.init.xavier_normal_(part.weight)
        self.compress = nn.Linear(dim, num_heads * rank)
        self.norm_near, self.norm_far = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.position_near, self.position_far = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim)
        self.content_bias, self.position_bias = (nn.Parameter(torch.zeros(num_heads, self.head_dim)) for _ in range(2))

    @classmethod
    def in_stack(cls, index: int, input_size: tuple[int, ...], dim: int, num_heads: int, **options: Any) -> Mixer:
        """At least four chunks in a sequence, and windows of two chunks at least."""
        chunk = options.setdefault("chunk_size", max(min(32, input_size[0] // 4), 1))
        options.setdefault("window_size", min(256, 2 * chunk))
        return cls(dim, num_heads, **options)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`(B, N, dim)` -> the same shape; mask `(B, N)`, False at padding, which is not read."""
        self.check(x)
        if mask is not None:
            mask = key_mask(mask, x)
        if self.memory:
            x, mask = F.pad(x, (0, 0, self.memory, 0)), None
        q, k, v = self._heads(self.q(x)) * self.head_dim**-0.5, self.k(x), self.v(x)
        outs, lses = zip(self._near(q, k, v, mask), *self._far(q, k, v, self.compress(x), mask), strict=True)
        out, _ = ops.merge_attention(outs, lses)
        return self.proj(out[:, self.memory :].flatten(-2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim))

    def _near(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Over windows: `(B, N, heads, head_dim)` and the log-sum-exp `(B, N, heads)`."""
        batch, before = len(q), self.window_size - 1
        tiles = Tiles(q.shape[1], max(_TILE, self.window_size), before, 0, q.device)
        visible = tiles.inside if mask is None else tiles.inside & tiles.keys(mask)
        rows = visible[..., None, :] & (tiles.offset >= -before) & (tiles.offset <= 0)  # (B or 1, n, T, K)
        scores = tiles.queries(self._near_positions(q, self.window_size)).transpose(2, 3)  # (B, n, heads, T, w)
        index = (-tiles.offset).clamp(0, before).expand(*scores.shape[:3], -1, -1)
        bias = scores.gather(-1, index).flatten(0, 1)
        keys, values = (tiles.keys(self._heads(self.norm_near(part))).flatten(0, 1) for part in (k, v))
        queries = tiles.queries(q + self.content_bias).flatten(0, 1)
        rows = rows.expand(batch, -1, -1, -1).flatten(0, 1)[:, None]
        out, lse = ops.attention(queries, keys, values, bias=bias, mask=rows, scale=1.0, return_lse=True)
        return tiles.join(out, batch), tiles.join(lse, batch)

    def _near_positions(self, q: Tensor, count: int) -> Tensor:
        """Scores of the distances 0 .. count - 1: `(B, N, heads, count)`."""
        code = sincos(torch.arange(count, device=q.device), self.dim, interleaved=False).to(q.dtype)
        return torch.einsum("bnhd,mhd->bnhm", q + self.position_bias, self._heads(self.position_near(code)))

    def _far(
        self, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, mask: Tensor | None
    ) -> list[tuple[Tensor, Tensor]]:
        """As `_near`, over summaries; nothing if the sequence has no whole chunk."""
        chunks = q.shape[1] // self.chunk_size
        if chunks == 0:
            return []
        whole = slice(0, chunks * self.chunk_size)
        keys, values = self._summaries(
            k[:, whole], v[:, whole], weights[:, whole], None if mask is None else mask[:, whole]
        )
        before = torch.arange(q.shape[1], device=q.device)[:, None] // self.chunk_size * self.rank
        between = before - 1 - torch.arange(keys.shape[1], device=q.device)  # (N, m): negative if not in the past
        bias = self._far_positions(q, keys.shape[1])
        bias = bias.gather(-1, between.clamp(min=0).expand_as(bias))
        rows = (between >= 0)[None, None]
        if mask is not None:
            rows = (
                rows & mask[:, whole].unflatten(1, (chunks, -1)).any(-1).repeat_interleave(self.rank, 1)[:, None, None]
            )
        return [ops.attention(q, keys, values, bias=bias, mask=rows, scale=1.0, return_lse=True)]  # type: ignore[list-item]

    def _far_positions(self, q: Tensor, count: int) -> Tensor:
        """Scores of 0 .. count - 1 summaries between: `(B, heads, N, count)`."""
        code = sincos(torch.arange(count, device=q.device), self.dim, interleaved=False).to(q.dtype)
        return torch.einsum("bnhd,mhd->bhnm", q, self._heads(self.position_far(code)))

    def _summaries(self, k: Tensor, v: Tensor, weights: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys and values of whole chunks, `(B, chunks rank, heads, head_dim)` both."""
        if mask is not None:
            weights = weights.masked_fill(~mask[..., None], _LEAST)
        chunked = (-1, self.chunk_size)
        if len(k) == 0:
            chunked = (k.shape[1] // self.chunk_size, self.chunk_size)
        weights = weights.unflatten(1, chunked).softmax(2).unflatten(-1, (self.num_heads, self.rank))
        means = [
            torch.einsum("bmchr,bmchd->bmrhd", weights, self._heads(part).unflatten(1, chunked)).flatten(1, 2)
            for part in (k, v)
        ]
        keys, values = (self._heads(self.norm_far(part.flatten(-2))) for part in means)
        return keys, values

    def step(self, x: Tensor, state: LongShortState | None = None) -> tuple[Tensor, LongShortState]:
        """One token `(B, dim)`."""
        if state is None:
            nothing = x.new_zeros(len(x), 0, self.num_heads, self.head_dim)
            chunk = x.new_zeros(len(x), 0, 2 * self.dim + self.num_heads * self.rank)
            state = LongShortState(nothing, nothing, chunk, nothing, nothing)
            for _ in range(self.memory):
                state = self._append(torch.zeros_like(x), state)
        chunks_before = state.far_keys.shape[1]
        after = self._append(x, state)
        q = self._heads(self.q(x)[:, None]) * self.head_dim**-0.5
        near = self._near_positions(q, after.keys.shape[1])[:, 0].flip(-1)
        near = near + torch.einsum("hd,bnhd->bhn", self.content_bias, after.keys)
        far = self._far_positions(q, chunks_before)[:, :, 0].flip(-1)
        keys = torch.cat([state.far_keys, after.keys], 1)
        values = torch.cat([state.far_values, after.values], 1)
        out = ops.attention(q, keys, values, bias=torch.cat([far, near], -1)[:, :, None], scale=1.0)
        return self.proj(out.flatten(1)), after  # type: ignore[union-attr]

    def _append(self, x: Tensor, state: LongShortState) -> LongShortState:
        """The state after one more token; a chunk that is full becomes a summary, for the tokens to come."""
        k, v = self.k(x)[:, None], self.v(x)[:, None]
        keys, values = (
            torch.cat([old, self._heads(self.norm_near(new))], 1)[:, -self.window_size :]
            for old, new in ((state.keys, k), (state.values, v))
        )
        chunk = torch.cat([state.chunk, torch.cat([k, v, self.compress(x)[:, None]], -1)], 1)
        if chunk.shape[1] < self.chunk_size:
            return state._replace(keys=keys, values=values, chunk=chunk)
        widths = [self.dim, self.dim, self.num_heads * self.rank]
        keys_of, values_of, weights = chunk.split(widths, -1)
        summary = self._summaries(keys_of, values_of, weights, None)
        far = [torch.cat(pair, 1) for pair in zip((state.far_keys, state.far_values), summary, strict=True)]
        return LongShortState(keys, values, chunk[:, :0], *far)

    def state_size(self, length: int) -> int:
        """A window, an unfinished chunk, and `rank` keys and values for every chunk: grows C / rank times slower than both."""
        unfinished = (2 * self.dim + self.num_heads * self.rank) * (length % self.chunk_size)
        return 2 * self.dim * (min(length, self.window_size) + self.rank * (length // self.chunk_size)) + unfinished

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, window_size={self.window_size}, chunk_size={self.chunk_size}, "
            f"rank={self.rank}"
        )
