"""What the attentions of CAB have in common: projections of their own, padded keys left out; and the two plain ones."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import checks, ops
from regard.checkpoint import KeyMap
from regard.layers import Mixer, heads_of
from regard.registry import register_mixer

KV = tuple[Tensor, Tensor]
_TILE = 32
"""Least number of queries that share one gathered stretch of keys."""


class MaskedAttention(Mixer):
    """out = W_o attend(x W_q, s W_k, s W_v), s the context or x itself; keys at padding are left out.

    Subclasses define `attend`, on tokens flattened to one axis. A causal instance takes no context. Queries of cross
    attention do not know of each other unless a subclass says so, so that it serves a causal decoder as well.

    Args:
        dim: channels. num_heads: divides dim.
        qkv_bias: of the projections of q, k and v.
        causal: position t reads positions up to t only, along one axis.
        authors_quirks: do as the released code does where it departs from the papers; each class says how.
    """

    dims: ClassVar[tuple[int, ...]] = (1, 2, 3)
    can_mask: ClassVar[bool] = True
    authors_keys = KeyMap(rules=[(r"\b([qkv])_proj\.", r"\1."), (r"\bout_proj\.", "proj.")])

    def __init__(
        self, dim: int, num_heads: int, *, qkv_bias: bool = True, causal: bool = False, authors_quirks: bool = False
    ) -> None:
        super().__init__()
        self.head_dim = heads_of(dim, num_heads)
        if causal and not self.can_causal:
            raise ValueError(f"{type(self).__name__} is not causal: build it with causal=False.")
        self.dim, self.num_heads, self.causal, self.authors_quirks = dim, num_heads, causal, authors_quirks
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=qkv_bias) for _ in range(3))
        self.proj = nn.Linear(dim, dim)
        for part, gain in ((self.q, 2**-0.5), (self.k, 2**-0.5), (self.v, 2**-0.5), (self.proj, 1.0)):
            nn.init.xavier_uniform_(part.weight, gain)
            if part.bias is not None:
                nn.init.zeros_(part.bias)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """`(B, *S, dim)` -> the same shape; context `(B, *S_c, dim)`.

        Args:
            mask: `(B, *S)`, or `(B, *S_c)` with a context: True for tokens, False for padding, which is not read. (What
                comes out at padding has no meaning.)
        """
        spatial = self.check(x)
        if context is not None and (self.causal or not self.can_cross):
            raise ValueError(
                "a causal mixer takes no context: build it with causal=False for cross attention."
                if self.can_cross
                else f"{type(self).__name__} mixes one sequence with itself: it takes no context."
            )
        if self.causal and len(spatial) > 1:
            raise ValueError(f"causal attention takes x (batch, length, dim), got {tuple(x.shape)}: flatten it first.")
        source = x if context is None else context
        if mask is not None:
            mask = key_mask(mask, source).flatten(1)
        q, k, v = self.split_heads(self.q(x)), self.split_heads(self.k(source)), self.split_heads(self.v(source))
        out = (self.attend if context is None else self.attend_context)(q, k, v, mask)
        return self.proj(out.to(x.dtype).flatten(-2)).unflatten(1, spatial)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """q `(B, N, heads, head_dim)`, k and v `(B, N_k, heads, head_dim)`, mask `(B, N_k)` -> the shape of q."""
        raise NotImplementedError

    def attend_context(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """`attend` to the keys and values of a context: the same, unless a subclass says otherwise."""
        return self.attend(q, k, v, mask)

    def split_heads(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> `(B, N, heads, head_dim)`."""
        return x.flatten(1, -2).unflatten(-1, (self.num_heads, self.head_dim))

    def _token(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v `(B, 1, heads, head_dim)` of one token `(B, dim)` of a stream."""
        if not self.causal:
            raise ValueError("a stream needs a causal mixer: build it with causal=True.")
        return (
            self.split_heads(self.q(x)[:, None]),
            self.split_heads(self.k(x)[:, None]),
            self.split_heads(self.v(x)[:, None]),
        )

    def _read(self, out: Tensor, x: Tensor) -> Tensor:
        """`(B, 1, heads, head_dim)` -> `(B, dim)` in the dtype of x."""
        return self.proj(out.to(x.dtype).flatten(1))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, causal={self.causal}"


def key_mask(mask: Tensor, source: Tensor) -> Tensor:
    """Check a mask of tokens (True) and padding (False) of `source` and return it as booleans.

    Raises:
        ValueError: for another shape or type.
    """
    if mask.shape != source.shape[:-1]:
        raise ValueError(f"mask must be {tuple(source.shape[:-1])}, one entry for each key, got {tuple(mask.shape)}.")
    if mask.is_floating_point():
        raise ValueError(f"mask must be boolean (True for tokens, False for padding), got {mask.dtype}.")
    return mask.bool()


def heads_first(mask: Tensor, heads: int) -> Tensor:
    """A defect of the release: `(B, N)` -> `(B, heads, N)`, repeated as if heads came before samples.

    Head h of sample b gets the mask of sample (b heads + h) mod B.
    """
    return mask.repeat(heads, 1).view(mask.shape[0], heads, -1)


class PaddedSoftmax(MaskedAttention):
    """Multi-head softmax attention, "vanilla" in CAB: mixer "softmax" with padding left out and a matrix each for q, k, v."""

    can_causal: ClassVar[bool] = True
    can_cross: ClassVar[bool] = True
    can_stream: ClassVar[bool] = True

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """See the base class."""
        rows = None if mask is None else mask[:, None, None]
        return ops.attention(q, k, v, mask=rows, causal=self.causal)  # type: ignore[return-value]

    def step(self, x: Tensor, state: KV | None = None) -> tuple[Tensor, KV]:
        """One token `(B, dim)`; the state is all keys and values, `(B, t, heads, head_dim)`."""
        q, k, v = self._token(x)
        if state is not None:
            k, v = torch.cat([state[0], k], 1), torch.cat([state[1], v], 1)
        return self._read(ops.attention(q, k, v), x), (k, v)  # type: ignore[arg-type]

    def state_size(self, length: int) -> int:
        """All keys and values: grows with the stream."""
        return 2 * length * self.dim


@register_mixer("local")
class LocalAttention(MaskedAttention):
    r"""Softmax attention of every token over a window around it (CAB's "local"; Luong et al., 2015).

    $$o_i = \sum_{|i - j| \le w} \mathrm{softmax}_j(d^{-1/2}\, q_i^\top k_j)\, v_j;\quad
      \text{causal: } i - w < j \le i$$

    Windows are cut off at the ends of the sequence (those of mixer "neighborhood" are moved inwards). A causal stream
    remembers w keys and values.

    `authors_quirks`: given a mask, the release leaves out what lies outside of the sequence *and* is padding: it attends
    padding inside, and the last (first) token once more for every place behind (before) the sequence.

    Args:
        window_size: w. The others: see `MaskedAttention`.
    """

    dims: ClassVar[tuple[int, ...]] = (1,)
    can_causal: ClassVar[bool] = True
    can_stream: ClassVar[bool] = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window_size: int = 15,
        qkv_bias: bool = True,
        causal: bool = False,
        authors_quirks: bool = False,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias=qkv_bias, causal=causal, authors_quirks=authors_quirks)
        checks.positive("window_size", window_size)
        self.window_size = window_size

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """See the base class."""
        before, after = (self.window_size - 1, 0) if self.causal else (self.window_size, self.window_size)
        tiles = Tiles(q.shape[1], max(_TILE, before + after), before, after, q.device)
        visible = tiles.inside
        if mask is not None:
            padded = tiles.keys(mask)
            visible = visible | padded if self.authors_quirks else visible & padded
        rows = visible[..., None, :] & (tiles.offset >= -before) & (tiles.offset <= after)  # (B or 1, n, T, K)
        rows = rows.expand(len(q), -1, -1, -1).flatten(0, 1)[:, None]
        parts = (part.flatten(0, 1) for part in (tiles.queries(q), tiles.keys(k), tiles.keys(v)))
        return tiles.join(ops.attention(*parts, mask=rows), len(q))  # type: ignore[arg-type]

    def step(self, x: Tensor, state: KV | None = None) -> tuple[Tensor, KV]:
        """One token `(B, dim)`; the state is the keys and values of the last `window_size` tokens."""
        q, k, v = self._token(x)
        if state is not None:
            k, v = (torch.cat([old, new], 1)[:, -self.window_size :] for old, new in zip(state, (k, v), strict=True))
        return self._read(ops.attention(q, k, v), x), (k, v)  # type: ignore[arg-type]

    def state_size(self, length: int) -> int:
        """Keys and values of one window: constant from there on."""
        return 2 * min(length, self.window_size) * self.dim

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, window_size={self.window_size}"


class Tiles:
    """Tiles of T consecutive queries, and K = before + T + after keys around each; n tiles cover the sequence.

    Attributes:
        places: of the keys in the sequence, `(n, K)`; some lie outside. inside: which do not.
        offset: place of key minus place of query, `(T, K)`.
    """

    def __init__(self, length: int, size: int, before: int, after: int, device: torch.device) -> None:
        size = min(size, length)
        self.length, self.size, self.count = length, size, -(-length // size)
        reach = torch.arange(-before, size + after, device=device)
        self.places = size * torch.arange(self.count, device=device)[:, None] + reach
        self.inside = (self.places >= 0) & (self.places < length)
        self.offset = reach - torch.arange(size, device=device)[:, None]

    def queries(self, x: Tensor) -> Tensor:
        """`(B, N, ...)` -> `(B, n, T, ...)`, the last tile filled up with zeros."""
        rest = self.count * self.size - self.length
        return F.pad(x, (*(0, 0) * (x.dim() - 2), 0, rest)).unflatten(1, (self.count, self.size))

    def keys(self, x: Tensor) -> Tensor:
        """`(B, N, ...)` -> `(B, n, K, ...)`; outside stands the nearest token."""
        return x[:, self.places.clamp(0, self.length - 1)]

    def join(self, x: Tensor, batch: int) -> Tensor:
        """`(B n, T, ...)` -> `(B, N, ...)`."""
        return x.unflatten(0, (batch, self.count)).flatten(1, 2)[:, : self.length]
