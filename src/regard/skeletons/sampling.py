"""Answers of a language model: many prompts at once, each up to its end token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from regard import checks


@torch.no_grad()
def sample_answers(
    model: nn.Module,
    prompts: Sequence[Tensor],
    max_new_tokens: int,
    *,
    end: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Continue every prompt until it says `end`, in evaluation mode.

    Prompts of one length run together, so nothing is padded on the left and no mask is needed; models that can go on from
    a state (`prefill` and `step`) do so, others compute the whole context for every token.

    Args:
        model: tokens `(B, N)` -> logits `(B, N, V)`. prompts: whole numbers `(N_i,)`, N_i at least 1.
        temperature: divides the logits; 0 takes the most probable token.

    Returns:
        `(B, L)` prompts and answers, filled up with `end`, and `(B, L)` boolean, True for the answers, their end included.
    """
    if not len(prompts) or any(p.dim() != 1 or len(p) == 0 or p.is_floating_point() for p in prompts):
        raise ValueError(
            "prompts must be tensors of whole numbers (N,) with at least one token each, and at least one."
        )
    checks.positive("max_new_tokens", max_new_tokens)
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}.")
    lengths = [len(prompt) for prompt in prompts]
    device = prompts[0].device
    tokens = torch.full((len(prompts), max(lengths) + max_new_tokens), end, device=device)
    answer = torch.zeros_like(tokens, dtype=torch.bool)
    was_training = model.training
    model.eval()
    try:
        for length in sorted(set(lengths)):
            rows = torch.tensor([row for row, of in enumerate(lengths) if of == length], device=device)
            known = torch.stack([prompts[row] for row in rows.tolist()])
            said = _continue(model, known, max_new_tokens, end, temperature, generator)
            stop = length + said.shape[1]
            tokens[rows, :stop] = torch.cat([known, said], 1)
            ended = (said == end).cumsum(1) - (said == end).long()  # ends before each token
            answer[rows, length:stop] = ended == 0
    finally:
        model.train(was_training)
    used = max(max(lengths), int(answer.any(0).nonzero().max()) + 1)
    return tokens[:, :used], answer[:, :used]


def _continue(
    model: nn.Module,
    tokens: Tensor,
    max_new_tokens: int,
    end: int,
    temperature: float,
    generator: torch.Generator | None,
) -> Tensor:
    """`(B, N)` -> up to `max_new_tokens` further tokens; rows that ended go on with `end`."""
    stream = getattr(model, "can_stream", False)
    said: list[Tensor] = []
    over = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    state = None
    while len(said) < max_new_tokens and not over.all():
        if not stream:
            logits = model(torch.cat([tokens, *(token[:, None] for token in said)], 1))[:, -1]
        elif state is None:
            logits, state = model.prefill(tokens)
            logits = logits[:, -1]
        else:
            logits, state = model.step(said[-1], state)
        if temperature == 0:
            token = logits.argmax(-1)
        else:
            token = torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator)[:, 0]
        said.append(token.masked_fill(over, end))
        over = over | (said[-1] == end)
    return torch.stack(said, 1)
