"""Sequence to sequence: inputs are read once, then symbols are said one after another until the end symbol."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from regard import checks
from regard.skeletons.base import Model

END, START = 0, -1
"""The symbol that ends an answer, and what stands before the first symbol (padding of targets is read as START, too)."""


class EncoderDecoder(Model):
    """What encoder-decoder models share: teacher forcing, greedy decoding and beam search.

    Subclasses define `encode` and `advance`. Memory and state may be nested tuples; all their tensors have the batch
    first, so that a search can repeat and reorder them.
    """

    def encode(self, inputs: Tensor, lengths: Tensor | None) -> tuple[Any, Any]:
        """Inputs `(B, N, ...)`, of which the first `lengths` (B,) are real -> what is read, and the first state."""
        raise NotImplementedError

    def advance(self, symbols: Tensor, memory: Any, state: Any) -> tuple[Tensor, Any]:
        """The symbols said last `(B,)`, or START -> logits `(B, V)` of those to say next, and the new state."""
        raise NotImplementedError

    def forward(self, inputs: Tensor, lengths: Tensor | None, targets: Tensor) -> Tensor:
        """Teacher forcing: logits `(B, M, V)`, those of step t given `targets[:, :t]`; targets `(B, M)` int64."""
        memory, state = self.encode(inputs, lengths)
        logits = []
        for symbols in self.shifted(targets).unbind(1):
            out, state = self.advance(symbols, memory, state)
            logits.append(out)
        return torch.stack(logits, 1)

    @staticmethod
    def shifted(targets: Tensor) -> Tensor:
        """What the decoder has said before each step: `(B, M)`, START first."""
        if targets.dim() != 2 or targets.shape[1] == 0 or targets.is_floating_point():
            raise ValueError(
                f"targets must be symbols (batch, steps), int64, got {targets.dtype} {tuple(targets.shape)}."
            )
        return F.pad(targets[:, :-1], (1, 0), value=START)

    @torch.no_grad()
    def search(
        self,
        inputs: Tensor,
        lengths: Tensor | None,
        *,
        max_length: int,
        beam: int = 1,
        allow: Callable[[Tensor, Any], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Beam search for the most probable answers; a beam of 1 is greedy decoding.

        Args:
            max_length: most symbols of an answer, the end included.
            beam: how many unfinished answers are kept for each input.
            allow: symbols so far `(R, t)` and memory (both repeated for every answer kept) -> `(R, V)`, True for those
                that may follow. Probabilities stay those of the model (they are not shared out again among the allowed).

        Returns:
            answers `(B, beam, M)`, the best first, filled up with END, and their log-probabilities `(B, beam)`.
        """
        checks.positive("max_length", max_length)
        checks.positive("beam", beam)
        batch = len(inputs)
        memory, state = tree_map(lambda t: t.repeat_interleave(beam, 0), self.encode(inputs, lengths))
        first_row = torch.arange(batch, device=inputs.device)[:, None] * beam  # (B, 1)
        score = torch.full((batch, beam), -torch.inf, device=inputs.device)
        score[:, 0] = 0  # the copies of one beginning must not fill the beam
        last = torch.full((batch * beam,), START, device=inputs.device)
        symbols = last.new_empty(batch * beam, 0)
        done = torch.zeros_like(last, dtype=torch.bool)
        for _ in range(max_length):
            logits, state = self.advance(last, memory, state)
            gain = logits.log_softmax(-1).float()
            if allow is not None:
                gain = gain.masked_fill(~allow(symbols, memory), -torch.inf)
            stay = torch.full_like(gain[0], -torch.inf)
            stay[END] = 0
            gain = torch.where(done[:, None], stay, gain)
            score, picked = (score.view(-1, 1) + gain).view(batch, -1).topk(beam)
            parents = (first_row + picked // logits.shape[-1]).flatten()
            last = (picked % logits.shape[-1]).flatten()
            state = tree_map(lambda t, rows=parents: t[rows], state)
            symbols = torch.cat([symbols[parents], last[:, None]], 1)
            done = done[parents] | (last == END)
            if done.all():
                break
        return symbols.view(batch, beam, -1), score
