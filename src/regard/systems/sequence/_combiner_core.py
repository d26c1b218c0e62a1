"""What all patterns of Combiner share: one softmax over direct keys and over summaries of regions.

All queries, keys and values are `(B, N, heads, head_dim)`, or the same cut into segments (`(B, segments, places, ...)`,
also called rows and columns). Queries are not scaled beforehand: the ops scale, and maxima and sums commute with that.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import checks, ops
from regard.checkpoint import KeyMap
from regard.flops import counted
from regard.layers import Mixer, heads_of

Part = tuple[Tensor, Tensor]
"""Attention over one group of keys, `(..., heads, head_dim)`, and the log of its denominator, `(..., heads)`."""
Summary = tuple[Tensor, Tensor]
"""Keys and values of regions."""
SEGMENT = 32
"""Tokens of a segment unless one is told otherwise (the release's default)."""


def attend(q: Tensor, k: Tensor, v: Tensor, pairs: Tensor | None = None, seen: Tensor | None = None) -> Part:
    """Attention inside each of n lines, for `merge_attention`: `(B, n, Q, ...)` on `(B, n, K, ...)`.

    Args:
        pairs: `(Q, K)`, True where a query may see a key of its line. seen: `(B, n, K)`, True for keys that exist.
    """
    lines = [x.flatten(0, 1) for x in (q, k, v)]
    out, lse = ops.attention(*lines, mask=_mask(pairs, seen), return_lse=True)
    return out.unflatten(0, q.shape[:2]), lse.unflatten(0, q.shape[:2])


def read(q: Tensor, k: Tensor, v: Tensor, pairs: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
    """As `attend`, the result alone: the value of a summary, which is normalised inside its region."""
    out: Any = ops.attention(*(x.flatten(0, 1) for x in (q, k, v)), mask=_mask(pairs, seen))
    return out.unflatten(0, q.shape[:2])


def _mask(pairs: Tensor | None, seen: Tensor | None) -> Tensor | None:
    if seen is None:
        return pairs
    seen = seen.flatten(0, 1)[:, None, None]
    return seen if pairs is None else pairs & seen


def _one_key(q: Tensor, k: Tensor, v: Tensor) -> Part:
    return v.expand(q.shape), (q * k).sum(-1) * q.shape[-1] ** -0.5


def attend_one(q: Tensor, k: Tensor, v: Tensor) -> Part:
    """Attention of every query to the one key at its place; k and v broadcast to the shape of q."""
    return counted(lambda q, k, v: 2 * q.numel(), _one_key, (q, k, v), {})


def merged(parts: Sequence[Part]) -> Tensor:
    """One softmax over all groups of keys."""
    return ops.merge_attention(*zip(*parts, strict=True))[0]


def turn(x: Tensor) -> Tensor:
    """Columns as lines, in place of rows: `(B, n, m, ...)` -> `(B, m, n, ...)`."""
    return x.transpose(1, 2)


def past(n: int, x: Tensor, *, strict: bool = False) -> Tensor:
    """`(n, n)`: True where the key is not after the query (strict: before it)."""
    return torch.ones(n, n, dtype=torch.bool, device=x.device).tril(-1 if strict else 0)


def others(n: int, x: Tensor) -> Tensor:
    """`(n, n)`: True off the diagonal."""
    return ~torch.eye(n, dtype=torch.bool, device=x.device)


def largest(x: Tensor, seen: Tensor | None, axis: int) -> Tensor:
    """Maximum along `axis` over what is seen, 0 where nothing is; that axis keeps length 1."""
    if seen is None:
        return x.amax(axis, keepdim=True)
    seen = seen[..., None, None]
    found = x.masked_fill(~seen, -math.inf).amax(axis, keepdim=True)
    return found.where(seen.any(axis, keepdim=True), 0.0)


class Combiner(Mixer, ABC):
    r"""What the four patterns share: the projections, and one softmax over direct keys and summaries (section 3).

    $$o_i = \frac{1}{Z_i} \Big(\sum_{j \in \Omega_i^0} e^{q_i \cdot k_j} v_j +
      \sum_r e^{q_i \cdot \bar k_r} \bar v_r\Big),\quad
      \bar v_r = \sum_{j \in \Omega^r} \mathrm{softmax}_j(\bar q_r \cdot k_j)\, v_j$$

    $Z_i$ sums the exponentials; $\Omega_i^0$ and the regions $\Omega_i^r$ cover everything that i may see; q is scaled by
    head_dim^(-1/2); $\bar q_r, \bar k_r$ are maxima over the region, channel by channel. Grids are taken in raster order.

    Departures: left out are summaries by DeepSets, the routed pattern (the release has no code for it), and dropout inside the
    local attention. Bidirectional patterns keep the regions apart from the direct keys, as the factorisation asks; the
    release's do not (`authors_quirks`).

    Args:
        dim: channels. num_heads: divides dim.
        causal: a token sees itself and earlier ones.
        bias: of all projections (the release has none in JAX, and has them in TensorFlow).
    """

    can_causal: ClassVar[bool] = True
    can_stream: ClassVar[bool] = True
    can_mask: ClassVar[bool] = True

    def __init__(self, dim: int, num_heads: int, *, causal: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.head_dim = heads_of(dim, num_heads)
        self.dim, self.num_heads, self.causal = dim, num_heads, causal
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim, bias=bias) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`(B, *S, dim)` -> the same shape; `mask` `(B, N)`, N = prod(S), is False at padding, which is not read."""
        spatial = self.check(x)
        tokens = x.flatten(1, -2)
        if mask is not None:
            if mask.shape != tokens.shape[:2] or mask.dtype != torch.bool:
                raise ValueError(
                    f"mask must be boolean {tuple(tokens.shape[:2])} (True = token), got {mask.dtype} {tuple(mask.shape)}."
                )
            tokens = tokens.where(mask[..., None], 0.0)
        out = self.mix(tokens, mask, spatial[-1] if len(spatial) > 1 else None)
        return self.proj(out.flatten(-2)).view(x.shape)

    @abstractmethod
    def mix(self, x: Tensor, mask: Tensor | None, width: int | None = None) -> Tensor:
        """`(B, N, dim)`, of a grid whose last axis has length `width` if there is one -> `(B, N, heads, head_dim)`."""

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim))

    def _qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self._split(self.q(x)), self._split(self.k(x)), self._split(self.v(x))

    def _check_stream(self) -> None:
        if not self.causal:
            raise ValueError("a stream needs a causal mixer: build it with causal=True.")

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, causal={self.causal}"


def appended(old: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Each of `old`, if there are any, with its part of `new` along axis 1."""
    return tuple(torch.cat(pair, 1) for pair in zip(old, new, strict=True)) if old else new


class SegmentState(NamedTuple):
    """What a stream remembers.

    Attributes:
        segment: inputs, keys and values of the segment that is under way. memory: summaries of those that ended.
    """

    segment: tuple[Tensor, ...] = ()
    memory: tuple[Tensor, ...] = ()


class Segmented(Combiner):
    """The patterns that cut a sequence into segments, the rows of an image. Direct keys are those of the own segment.

    Sequences are filled up to whole segments; what fills them is never read.

    Args:
        segment_size: tokens of a segment; None is the length of the last axis on grids, and the release's 32 on sequences.
        authors_quirks: of bidirectional attention: also summarise what is attended directly, as the release does.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        segment_size: int | None = None,
        causal: bool = False,
        bias: bool = False,
        authors_quirks: bool = False,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal, bias=bias)
        if segment_size is not None:
            checks.tuple_of("segment_size", segment_size, 1)
        self.segment_size, self.authors_quirks = segment_size, authors_quirks

    @classmethod
    def in_stack(cls, index: int, input_size: tuple[int, ...], dim: int, num_heads: int, **options: Any) -> Mixer:
        """Segments are rows of a grid; on a sequence, the square root of its length, which makes the cost N^(3/2)."""
        if len(input_size) == 1:
            options.setdefault("segment_size", math.isqrt(input_size[0] - 1) + 1)
        return cls(dim, num_heads, **options)

    def mix(self, x: Tensor, mask: Tensor | None, width: int | None = None) -> Tensor:
        """`(B, N, dim)` -> `(B, N, heads, head_dim)`; `width` is the segment unless one was chosen."""
        length = x.shape[1]
        size = self.segment_size or width or SEGMENT
        extra = -length % size
        seen = mask
        if extra and not self.causal and mask is None:
            seen = x.new_ones(x.shape[:2], dtype=torch.bool)
        x = F.pad(x, (0, 0, 0, extra)).unflatten(1, (-1, size))
        if seen is not None:
            seen = F.pad(seen, (0, extra)).unflatten(1, (-1, size))
        return self.join(*self._qkv(x), x, seen).flatten(1, 2)[:, :length]

    @abstractmethod
    def join(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, seen: Tensor | None) -> Tensor:
        """The one softmax over segments `(B, S, m, heads, head_dim)` with inputs `(B, S, m, dim)` -> as q."""

    @abstractmethod
    def remember(self, memory: tuple[Tensor, ...], x: Tensor) -> tuple[Tensor, ...]:
        """The memory after one or more whole segments with inputs `(B, S, m, dim)`."""

    @abstractmethod
    def recall(self, memory: tuple[Tensor, ...], place: int) -> list[Summary]:
        """Keys and values, each `(B, K, heads, head_dim)`, that the token at `place` of a segment sees of earlier ones."""

    @abstractmethod
    def memory_size(self, segments: int, size: int) -> int:
        """Numbers in the memory of so many segments."""

    @property
    def _stream_size(self) -> int:
        return self.segment_size or SEGMENT

    def prefill(self, x: Tensor) -> tuple[Tensor, SegmentState]:
        """Causal `forward` on the first tokens `(B, N, dim)` of a stream, and the state after them."""
        self._check_stream()
        out, size = self(x), self._stream_size
        whole, rest = x.split([x.shape[1] // size * size, x.shape[1] % size], 1)
        memory = self.remember((), whole.unflatten(1, (-1, size))) if whole.shape[1] else ()
        segment = (rest, self._split(self.k(rest)), self._split(self.v(rest))) if rest.shape[1] else ()
        return out, SegmentState(segment, memory)

    def step(self, x: Tensor, state: SegmentState | None = None) -> tuple[Tensor, SegmentState]:
        """One token `(B, dim)`; the state grows as `state_size` says."""
        self._check_stream()
        segment, memory = SegmentState() if state is None else state
        q, k, v = self._qkv(x[:, None])
        segment = appended(segment, (x[:, None], k, v))
        place = segment[0].shape[1] - 1
        reached = [segment[1:], *(self.recall(memory, place) if memory else ())]
        keys, values = (torch.cat(group, 1) for group in zip(*reached, strict=True))
        out: Any = ops.attention(q, keys, values)
        if place + 1 == self._stream_size:
            return self.proj(out.flatten(1)), SegmentState((), self.remember(memory, segment[0][:, None]))
        return self.proj(out.flatten(1)), SegmentState(segment, memory)

    def state_size(self, length: int) -> int:
        """Three vectors for every token of the segment under way, and the memory of those before."""
        segments, rest = divmod(length, self._stream_size)
        return 3 * self.dim * rest + self.memory_size(segments, self._stream_size)

    def _reachable(self, n: int, x: Tensor) -> Tensor | None:
        """`(n, n)`: which segments a segment summarises."""
        if self.causal:
            return past(n, x, strict=True)
        return None if self.authors_quirks else others(n, x)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, segment_size={self.segment_size}"


def renamed(*rules: tuple[str, str]) -> KeyMap:
    """Names of the release's projections, in JAX (`query.kernel`) and TensorFlow (`q/weight`), as ours; kernels as ours."""
    shared = (
        (r"/", "."),
        *rules,
        (r"\bquery\.", "q."),
        (r"\bkey\.", "k."),
        (r"\bvalue\.", "v."),
        (r"\bdense\.|\bDenseGeneral_0\.", "proj."),
        (r"\.(?:kernel|scale|gamma)$", ".weight"),
        (r"\.beta$", ".bias"),
    )
    return KeyMap(shared, convert=as_linear)


def as_linear(name: str, value: Tensor) -> dict[str, Tensor]:
    """Kernels `(in, heads, head_dim)`, `(heads, head_dim, out)` and `(in, out)` as weights of linear layers."""
    if name.endswith("bias"):
        value = value.flatten()
    elif value.dim() == 3:
        value = (value.flatten(0, 1) if name.endswith("proj.weight") else value.flatten(1)).t()
    elif value.dim() == 2 and "embed" not in name:
        value = value.t()
    return {name: value}
