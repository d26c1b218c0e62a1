"""Attention with bounded-memory control: keys and values gathered in a few slots (Peng et al., 2022, arXiv 2110.02488)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import checks, ops
from regard.checkpoint import KeyMap
from regard.registry import register_mixer
from regard.systems.sequence._cab_attention import MaskedAttention

_BLOCK = 64
"""Tokens between which weights are formed in pairs; slots are kept once for each block."""
_NEVER = -1e30
"""The logit of what is not there: finite, so that a slot in which nothing was written yet gives no NaN."""


class SlotState(NamedTuple):
    """What a causal stream remembers: constant in the number of tokens seen.

    Attributes:
        keys, values: what the slots hold, `(B, heads, slots, head_dim)`.
        key_lse, value_lse: log of the sums by which those were divided, `(B, heads, slots)`.
    """

    keys: Tensor
    key_lse: Tensor
    values: Tensor
    value_lse: Tensor


@register_mixer("abc")
class ABCAttention(MaskedAttention):
    r"""Attention over r slots, into which learned logits write keys and values ("ABC-MLP", section 4).

    $$\tilde K_t = \sum_{j \le t} \frac{e^{W_k^\top k_j}}{\sum_{i \le t} e^{W_k^\top k_i}} \otimes k_j,\quad
      \tilde V_t \text{ likewise of } v,\quad
      o_t = \tilde V_t^\top\,\mathrm{softmax}(d^{-1/2} \tilde K_t\, q_t)$$

    with sums over all tokens where it is not causal. Costs N r head_dim a head. Causal, the slots of all places are never
    written out; see `RunningSlots`.

    `authors_quirks`: causal, the release leaves the sum over j out, so that slots hold the present token alone, scaled, and
    the output of a head is a multiple of the present value.

    Args:
        slots: r. The others: see `MaskedAttention`.
    """

    can_causal: ClassVar[bool] = True
    can_cross: ClassVar[bool] = True
    can_stream: ClassVar[bool] = True
    authors_keys = KeyMap(rules=[*MaskedAttention.authors_keys.rules, (r"\bcompress_([kv])$", r"slots_\1")])

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        slots: int = 16,
        qkv_bias: bool = True,
        causal: bool = False,
        authors_quirks: bool = False,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias=qkv_bias, causal=causal, authors_quirks=authors_quirks)
        checks.positive("slots", slots)
        self.slots = slots
        self.slots_k, self.slots_v = (nn.Parameter(torch.empty(self.head_dim, slots)) for _ in range(2))
        for table in (self.slots_k, self.slots_v):
            nn.init.xavier_uniform_(table, 2**-0.5)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """See the base class."""
        if self.causal:
            return self._scan(q, k, v, mask, None)[0]
        return ops.attention(q, self._gather(self.slots_k, k, mask), self._gather(self.slots_v, v, mask))  # type: ignore[return-value]

    def _gather(self, table: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        """Columns of the table are queries to the tokens: `(B, slots, heads, head_dim)`."""
        queries = table.t()[None, :, None].to(x.dtype).expand(len(x), -1, self.num_heads, -1)
        return ops.attention(queries, x, x, mask=None if mask is None else mask[:, None, None], scale=1.0)  # type: ignore[return-value]

    def prefill(self, x: Tensor, state: SlotState | None = None) -> tuple[Tensor, SlotState]:
        """Causal `forward` on tokens `(B, N, dim)` that follow `state`, and the state after them."""
        self.check(x)
        if not self.causal:
            raise ValueError("a stream needs a causal mixer: build it with causal=True.")
        q, k, v = self.split_heads(self.q(x)), self.split_heads(self.k(x)), self.split_heads(self.v(x))
        out, state = self._scan(q, k, v, None, state)
        return self.proj(out.to(x.dtype).flatten(-2)), state

    def step(self, x: Tensor, state: SlotState | None = None) -> tuple[Tensor, SlotState]:
        """One token `(B, dim)`; the state has a constant size."""
        out, state = self.prefill(x[:, None], state)
        return out.squeeze(1), state

    def _scan(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, state: SlotState | None
    ) -> tuple[Tensor, SlotState]:
        wide = torch.promote_types(q.dtype, torch.float32)
        length = q.shape[1]
        block = min(_BLOCK, 1 << (length - 1).bit_length())
        q, k, v = (
            F.pad(x.transpose(1, 2).to(wide), (0, 0, 0, -length % block)) for x in (q * self.head_dim**-0.5, k, v)
        )  # (B, h, N, d)
        if state is None:
            nothing = q.new_zeros(*q.shape[:2], self.slots, self.head_dim)
            state = SlotState(nothing, nothing[..., 0] + _NEVER, nothing, nothing[..., 0] + _NEVER)
        hidden = torch.arange(q.shape[2], device=q.device) >= length
        if mask is not None:
            hidden = hidden | ~F.pad(mask, (0, -length % block))[:, None]
        keys, values = (
            RunningSlots((x @ table.to(wide)).masked_fill(hidden[..., None], _NEVER), x, held, lse, block)
            for x, table, held, lse in (
                (k, self.slots_k, state.keys, state.key_lse),
                (v, self.slots_v, state.values, state.value_lse),
            )
        )
        past = not self.authors_quirks
        out = values.read(keys.scores(q, past).softmax(-1), past)
        after = SlotState(keys.held[:, :, -1], keys.lse[:, :, -1], values.held[:, :, -1], values.lse[:, :, -1])
        return out[:, :, :length].transpose(1, 2), after

    def state_size(self, length: int) -> int:
        """Constant: two vectors and two numbers a slot and head."""
        return 2 * self.num_heads * self.slots * (self.head_dim + 1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, slots={self.slots}"


class RunningSlots:
    r"""What slots hold after each token of a sequence, without ever writing it out: $S_t = \sum_{j \le t} w_{tj} x_j^\top$.

    $w_{tjr} = e^{a_{jr} - l_{tr}}$ with l the running log-sum-exp of a. l never falls, so that for any token c between j and
    t the weight is a product of two numbers of at most 1, $e^{a_j - l_c}\,e^{l_c - l_t}$, one for each side: products of
    matrices, and no overflow. c is the end of the block before for all tokens before it; inside a block it is the middle, for
    those on either side of it, and so on in both halves.

    Args:
        logits: a, `(B, heads, N, slots)`; N is a multiple of `block`. x: `(B, heads, N, d)`.
        held, lse: of the stream before, `(B, heads, slots, d)` and `(B, heads, slots)`.
        block: a power of 2.

    Attributes:
        lse: l, `(B, heads, N, slots)`. held: contents before the first block and after each, `(B, heads, n + 1, slots, d)`.
    """

    def __init__(self, logits: Tensor, x: Tensor, held: Tensor, lse: Tensor, block: int) -> None:
        self.logits, self.x, self.block = logits, x, block
        self.lse = torch.logaddexp(lse[:, :, None], logits.logcumsumexp(2))
        ends = torch.cat([lse[:, :, None], self.lse[:, :, block - 1 :: block]], 2)  # (B, h, n + 1, r)
        written = (self._blocks(logits) - ends[:, :, 1:, None]).exp().mT @ self._blocks(x)  # (B, h, n, r, d)
        contents = [held]
        for fresh, fade in zip(written.unbind(2), (ends[:, :, :-1] - ends[:, :, 1:]).exp().unbind(2), strict=True):
            contents.append(fade[..., None] * contents[-1] + fresh)
        self.held = torch.stack(contents, 2)
        self.kept = (
            ends[:, :, :-1, None] - self._blocks(self.lse)
        ).exp()  # of the block's beginning (B, h, n, block, r)

    def scores(self, q: Tensor, past: bool) -> Tensor:
        """S_t q_t, `(B, heads, N, slots)`; without `past`, of what token t itself has written."""
        own = (self.logits - self.lse).exp() * (q * self.x).sum(-1, keepdim=True)
        if not past:
            return own
        total = own + ((self._blocks(q) @ self.held[:, :, :-1].mT) * self.kept).flatten(2, 3)
        for size, wrote, reads in self._levels():
            products = self._halves(q, size)[..., 1, :, :] @ self._halves(self.x, size)[..., 0, :, :].mT
            total = total + _second(products @ wrote * reads)
        return total

    def read(self, probs: Tensor, past: bool) -> Tensor:
        """S_t^T p_t for p `(B, heads, N, slots)`: `(B, heads, N, d)`; `past` as above."""
        own = (probs * (self.logits - self.lse).exp()).sum(-1, keepdim=True) * self.x
        if not past:
            return own
        total = own + ((self._blocks(probs) * self.kept) @ self.held[:, :, :-1]).flatten(2, 3)
        for size, wrote, reads in self._levels():
            weights = (self._halves(probs, size)[..., 1, :, :] * reads) @ wrote.mT
            total = total + _second(weights @ self._halves(self.x, size)[..., 0, :, :])
        return total

    def _levels(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """For halves of 1, 2, 4, ... tokens: the weights of the first half at its end, and of that end in the second."""
        size = 1
        while size < self.block:
            lse = self._halves(self.lse, size)
            middle = lse[..., 0, -1:, :]
            wrote = (self._halves(self.logits, size)[..., 0, :, :] - middle).exp()
            yield size, wrote, (middle - lse[..., 1, :, :]).exp()
            size *= 2

    def _blocks(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (x.shape[2] // self.block, self.block))

    @staticmethod
    def _halves(x: Tensor, size: int) -> Tensor:
        return x.unflatten(2, (x.shape[2] // (2 * size), 2, size))


def _second(x: Tensor) -> Tensor:
    """`(B, heads, pairs, size, c)` as the second of both halves, zeros as the first: `(B, heads, N, c)`."""
    return torch.stack([torch.zeros_like(x), x], 3).flatten(2, 4)
