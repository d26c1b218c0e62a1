"""The decoder-only language model: tokens in, logits of the next token out, with any causal mixer inside."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import checks
from regard.checkpoint import drop_tied_head
from regard.layers import Block, linear_rates, run_stream, sincos
from regard.registry import mixer_class
from regard.skeletons.base import Model
from regard.skeletons.host import MixerClass, build_in_stack


class LMState(NamedTuple):
    """What a stream remembers: how many tokens went by, and the state of every block's mixer."""

    length: int
    blocks: tuple[Any, ...]


class DecoderBlock(Block):
    """The residual `Block` on `(B, N, dim)`, which can also run token by token where its mixer can."""

    def forward(self, x: Tensor, **options: Tensor) -> Tensor:
        """`(B, N, dim)` -> the same shape; `options` go to the mixer."""
        return self._residual(x, self.mixer(self.norm1(x), **options))

    def prefill(self, x: Tensor) -> tuple[Tensor, Any]:
        """`forward` and the mixer's state after the last token: from its own `prefill`, or else step by step."""
        h = self.norm1(x)
        if hasattr(self.mixer, "prefill"):
            out, state = self.mixer.prefill(h)
            return self._residual(x, out), state
        out, state = run_stream(self.mixer, h)
        return self._residual(x, out), state

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One token `(B, dim)` -> the same shape, and the new state."""
        out, state = self.mixer.step(self.norm1(x), state)
        return self._residual(x, out), state

    def _residual(self, x: Tensor, mixed: Tensor) -> Tensor:
        x = x + self.drop_path(self.scale1(mixed))
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))


class DecoderLM(Model):
    r"""embedding (+ position) -> blocks -> norm -> head, each position seeing itself and earlier ones only.

    $$p(t_{i+1} \mid t_{\le i}) = \mathrm{softmax}(E\,\mathrm{norm}(x_i))\quad\text{(E: the embedding again if tied)}$$

    Args:
        vocab_size: number of different tokens.
        dim: channels.
        mixers: one causal mixer for each block, or a function of the block's index (then with `depth`).
        mlp: dim -> the channel mixer of a block; None is `Mlp` with `mlp_ratio * dim` hidden channels.
        norm: dim -> a norm, for both branches of the blocks and before the head.
        position: "none" for mixers that know order themselves; "learned", a table of `length` entries; or "sine", a
            fixed code for any length. (Rotary codes act on queries and keys, so they belong into a mixer.)
        length: the longest context of a learned table.
        tied: the head shares the embedding's matrix.
        embed_scale: factor of the embedding; None is 1, or sqrt(dim) beside a sine code, which would drown it otherwise
            (Vaswani et al., 2017, section 3.4).
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        mixers: Sequence[nn.Module] | Callable[[int], nn.Module],
        *,
        depth: int | None = None,
        mlp: Callable[[int], nn.Module] | None = None,
        mlp_ratio: float = 4.0,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        position: Literal["none", "learned", "sine"] = "none",
        length: int | None = None,
        tied: bool = True,
        embed_scale: float | None = None,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        checks.positive("vocab_size", vocab_size)
        if not isinstance(mixers, (Sequence, nn.ModuleList)):
            if depth is None:
                raise ValueError("depth is missing: it says how many blocks the function `mixers` is called for.")
            mixers = [mixers(index) for index in range(depth)]
        elif depth not in (None, len(mixers)):
            raise ValueError(f"depth={depth} contradicts the {len(mixers)} mixers given: leave it out.")
        self.vocab_size, self.dim = vocab_size, dim
        self.embed_scale = (dim**0.5 if position == "sine" else 1.0) if embed_scale is None else embed_scale
        self.position = checks.one_of("position", position, ("none", "learned", "sine"))
        if position == "learned" and length is None:
            raise ValueError(
                "position='learned' needs length, the longest context: the table has one row for each place."
            )
        self.length = length if position == "learned" else None
        self.embed = nn.Embedding(vocab_size, dim)
        self.pos_embed = nn.Parameter(torch.empty(self.length, dim)) if self.length is not None else None
        rates = linear_rates(drop_path_rate, len(mixers))
        self.blocks = nn.ModuleList(
            DecoderBlock(
                dim, mixer, mlp=None if mlp is None else mlp(dim), mlp_ratio=mlp_ratio, norm=norm, drop_path=rate
            )
            for mixer, rate in zip(mixers, rates, strict=True)
        )
        self.norm = norm(dim)
        self.head = None if tied else nn.Linear(dim, vocab_size, bias=False)
        nn.init.normal_(self.embed.weight, std=dim**-0.5 if position == "sine" else 0.02)
        if self.pos_embed is not None:
            nn.init.normal_(self.pos_embed, std=0.02)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=0.02)

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Checkpoints of tied models may hold the shared matrix twice, under two names."""
        return drop_tied_head(state) if self.head is None else state

    @property
    def can_stream(self) -> bool:
        """Whether every mixer can go on token by token from a state."""
        return all(getattr(block.mixer, "can_stream", False) for block in self.blocks)

    def state_size(self, length: int) -> int | None:
        """Numbers kept for one sample after `length` tokens; None if some mixer cannot stream."""
        return sum(block.mixer.state_size(length) for block in self.blocks) if self.can_stream else None

    def no_weight_decay(self) -> set[str]:
        """The position table, and whatever the mixers exempt."""
        names = {"pos_embed"} if self.pos_embed is not None else set()
        for index, block in enumerate(self.blocks):
            exempt: set[str] = getattr(block.mixer, "no_weight_decay", set)()
            names |= {f"blocks.{index}.mixer.{name}" for name in exempt}
        return names

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens `(B, N)` int64 -> logits `(B, N, vocab_size)` of the token after each.

        Args:
            mask: `(B, N)`, True (or 1) for tokens, False for padding, where the mixers can leave tokens out.
        """
        return self.forward_head(self.forward_features(tokens, mask))

    def forward_features(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens `(B, N)` -> hidden states `(B, N, dim)` after the final norm."""
        return self.norm(self._maps(tokens, mask)[-1])

    def forward_head(self, x: Tensor) -> Tensor:
        """Hidden states -> logits."""
        return F.linear(x, self.embed.weight) if self.head is None else self.head(x)

    def forward_intermediates(self, tokens: Tensor) -> list[Tensor]:
        """Hidden states `(B, N, dim)` after every block, before the final norm."""
        return self._maps(tokens)[1:]

    def _maps(self, tokens: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        self._check(tokens)
        options = {}
        if mask is not None:
            if not all(getattr(block.mixer, "can_mask", False) for block in self.blocks):
                raise ValueError(
                    "the mixers of this model take no mask: pad at the end instead, and ignore those logits."
                )
            if mask.shape != tokens.shape:
                raise ValueError(f"mask must be {tuple(tokens.shape)} like tokens, got {tuple(mask.shape)}.")
            options["mask"] = mask.bool()
        maps = [self._embed(tokens, 0)]
        for block in self.blocks:
            maps.append(block(maps[-1], **options))
        return maps

    def _embed(self, tokens: Tensor, start: int) -> Tensor:
        x = self.embed(tokens) * self.embed_scale
        if self.position == "none":
            return x
        stop = start + tokens.shape[-1] if tokens.dim() == 2 else start + 1
        if self.pos_embed is not None:
            if stop > self.pos_embed.shape[0]:
                raise ValueError(
                    f"{stop} tokens are more than the position table holds ({self.pos_embed.shape[0]}): "
                    "pass fewer, or build the model with a larger length."
                )
            code = self.pos_embed[start:stop]
        else:
            code = sincos(torch.arange(start, stop, device=x.device), self.dim).to(x.dtype)
        return x + (code if tokens.dim() == 2 else code[0])

    def prefill(self, tokens: Tensor) -> tuple[Tensor, LMState]:
        """Tokens `(B, N)` -> logits `(B, N, vocab_size)` and the state from which `step` goes on."""
        self._check(tokens)
        self._check_stream()
        x, states = self._embed(tokens, 0), []
        for block in self.blocks:
            x, state = block.prefill(x)
            states.append(state)
        return self.forward_head(self.norm(x)), LMState(tokens.shape[1], tuple(states))

    def step(self, tokens: Tensor, state: LMState | None = None) -> tuple[Tensor, LMState]:
        """One token `(B,)` of each stream -> logits `(B, vocab_size)` and the new state."""
        self._check_stream()
        if tokens.dim() != 1:
            raise ValueError(f"tokens of a step must be (batch,), got {tuple(tokens.shape)}: use prefill for more.")
        start, before = (0, (None,) * len(self.blocks)) if state is None else state
        x, states = self._embed(tokens, start), []
        for block, memory in zip(self.blocks, before, strict=True):
            x, memory = block.step(x, memory)
            states.append(memory)
        return self.forward_head(self.norm(x)), LMState(start + 1, tuple(states))

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue `tokens` (B, N), N at least 1, by `max_new_tokens` sampled ones: `(B, N + max_new_tokens)`.

        Goes on from states where every mixer can stream, and otherwise computes the whole context for every token.
        Beyond the length of a learned position table, it is the last `length` tokens that are computed each time.

        Args:
            temperature: divides the logits; 0 takes the most probable token.
            top_k: sample among the k most probable only.
        """
        self._check(tokens)
        if max_new_tokens < 0 or temperature < 0 or (top_k is not None and top_k < 1):
            raise ValueError(
                "max_new_tokens and temperature must be at least 0 and top_k at least 1, "
                f"got {max_new_tokens}, {temperature} and {top_k}."
            )
        total = tokens.shape[1] + max_new_tokens
        stream = self.can_stream and (self.length is None or total - 1 <= self.length)
        was_training = self.training
        self.eval()
        state: LMState | None = None
        try:
            for _ in range(max_new_tokens):
                if not stream:
                    logits = self(tokens if self.length is None else tokens[:, -self.length :])[:, -1]
                elif state is None:
                    logits, state = self.prefill(tokens)
                    logits = logits[:, -1]
                else:
                    logits, state = self.step(tokens[:, -1], state)
                tokens = torch.cat([tokens, _sample(logits, temperature, top_k, generator)], 1)
        finally:
            self.train(was_training)
        return tokens

    def _check(self, tokens: Tensor) -> None:
        if tokens.dim() != 2 or tokens.shape[1] == 0 or tokens.is_floating_point():
            raise ValueError(
                "tokens must be whole numbers (batch, length) with at least one token, "
                f"got {tokens.dtype} {tuple(tokens.shape)}."
            )

    def _check_stream(self) -> None:
        if not self.can_stream:
            stuck = sorted({type(b.mixer).__name__ for b in self.blocks if not getattr(b.mixer, "can_stream", False)})
            raise ValueError(f"{', '.join(stuck)} cannot go on from a state: call the model on the whole context.")


def _sample(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """`(B, V)` -> `(B, 1)`."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)


def host_lm(
    mixer: str | MixerClass,
    vocab_size: int,
    *,
    dim: int = 96,
    depth: int = 2,
    num_heads: int = 4,
    length: int = 256,
    mlp_ratio: float = 4.0,
    position: Literal["none", "learned", "sine"] = "learned",
    **options: Any,
) -> DecoderLM:
    """The small language model that differs in its mixer only: what comparisons train.

    Args:
        mixer: a registered name or a class; it must be causal and take one spatial axis.
        length: tokens of context.
        options: the mixer's. A mixer that has an argument `depth` (its parts depend on its place among the blocks) is
            told it.

    Raises:
        ValueError: for a mixer that is not known, not causal, or does not take sequences.
    """
    made_by = mixer_class(mixer) if isinstance(mixer, str) else mixer
    if "depth" in inspect.signature(made_by).parameters:
        options.setdefault("depth", depth)
    mixers = [build_in_stack(mixer, index, (length,), dim, num_heads, causal=True, **options) for index in range(depth)]
    return DecoderLM(vocab_size, dim, mixers, mlp_ratio=mlp_ratio, position=position, length=length)
