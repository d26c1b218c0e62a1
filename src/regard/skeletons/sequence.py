"""Small models on sequences that differ in their mixer only: one for each place that attention can take.

The mixer is the self attention of `MixerEncoder`, and the cross attention of `MixerReader` (queries that know their
places, and read a sequence) and of `MixerTranslator` (symbols said one after another, each reading the sources). Self
attention beside a mixer in the place of cross attention is softmax for all. (For left to right there is `host_lm`.)
Mixers keep their own initial weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from regard import checks
from regard.layers import Block, Mlp, SoftmaxAttention, sincos
from regard.skeletons.encoder_decoder import EncoderDecoder
from regard.skeletons.host import MixerClass, build_in_stack


class Embedding(nn.Module):
    """Symbols `(B, N)` or features `(B, N, c)` -> `(B, N, dim)`, with a sine code of the place added.

    Args:
        inputs: how many symbols, or how many features. features: the latter.
        position: False for sets, whose elements have no order.
    """

    def __init__(self, inputs: int, dim: int, *, features: bool = False, position: bool = True) -> None:
        super().__init__()
        checks.positive("inputs", inputs)
        self.dim, self.position = dim, position
        self.table: nn.Module = nn.Linear(inputs, dim) if features else nn.Embedding(inputs, dim)

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """`start` is the place of the first one."""
        out = self.table(x)
        if not self.position:
            return out
        return out + sincos(torch.arange(start, start + out.shape[1], device=out.device), self.dim).to(out.dtype)


def _softmax_blocks(dim: int, depth: int, num_heads: int, mlp_ratio: float) -> nn.Sequential:
    made = (Block(dim, SoftmaxAttention(dim, num_heads), mlp_ratio=mlp_ratio) for _ in range(depth))
    return nn.Sequential(*made, nn.LayerNorm(dim))


class MixerEncoder(nn.Module):
    """An answer for every token: embedding, blocks of the mixer, norm, linear.

    Args:
        mixer: a registered name or a class that takes one spatial axis.
        inputs: how many symbols, or how many features of a token (with `features`). outputs: numbers of an answer.
        length: tokens of a sequence; told to mixers whose parameters depend on it.
        residual: answers are added to the features, of which there are as many: at first the model says what it is given.
    """

    def __init__(
        self,
        mixer: str | MixerClass,
        inputs: int,
        outputs: int,
        *,
        features: bool = False,
        residual: bool = False,
        length: int = 256,
        dim: int = 96,
        depth: int = 2,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        **options: Any,
    ) -> None:
        super().__init__()
        self.embed = Embedding(inputs, dim, features=features)
        blocks = (build_in_stack(mixer, index, (length,), dim, num_heads, **options) for index in range(depth))
        self.blocks = nn.Sequential(*(Block(dim, block, mlp_ratio=mlp_ratio) for block in blocks))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, outputs)
        if residual and not (features and inputs == outputs):
            raise ValueError(f"residual=True needs as many features as outputs, got {inputs} and {outputs}.")
        self.residual = residual
        if residual:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Symbols `(B, N)` or features `(B, N, c)` -> `(B, N, outputs)`."""
        out = self.head(self.norm(self.blocks(self.embed(x))))
        return x + out if self.residual else out


class CrossBlock(nn.Module):
    r"""A decoder's block: softmax attention among the targets, the mixer from targets to sources, MLP.

    $$x \leftarrow x + \mathrm{attention}(n_1(x)),\quad x \leftarrow x + \mathrm{mixer}(n_2(x), c),\quad
      x \leftarrow x + \mathrm{mlp}(n_3(x))$$

    Args:
        mixer: called with the targets `(B, M, dim)` and the sources `(B, N, dim)`.
        causal: a target sees itself and earlier targets only.
    """

    def __init__(
        self, dim: int, num_heads: int, mixer: nn.Module, *, causal: bool = False, mlp_ratio: float = 4.0
    ) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim), SoftmaxAttention(dim, num_heads, causal=causal)
        self.norm2, self.mixer = nn.LayerNorm(dim), mixer
        self.norm3, self.mlp = nn.LayerNorm(dim), Mlp(dim, int(mlp_ratio * dim))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Targets `(B, M, dim)` and sources `(B, N, dim)` -> the shape of the targets."""
        return self._read(x + self.attention(self.norm1(x)), context)

    def start(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """The state before the first target: no keys, no values."""
        none = context.new_zeros(len(context), 0, self.attention.num_heads, self.attention.head_dim)
        return none, none

    def step(self, x: Tensor, context: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Any]:
        """One target `(B, dim)` and the sources -> the same shape, and the new state."""
        out, state = self.attention.step(self.norm1(x), state)
        return self._read((x + out)[:, None], context)[:, 0], state

    def _read(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.mixer(self.norm2(x), context)
        return x + self.mlp(self.norm3(x))


def _cross_blocks(
    mixer: str | MixerClass, length: int, dim: int, depth: int, num_heads: int, **options: Any
) -> nn.ModuleList:
    block = {name: options.pop(name) for name in ("causal", "mlp_ratio") if name in options}
    made = (build_in_stack(mixer, index, (length,), dim, num_heads, cross=True, **options) for index in range(depth))
    return nn.ModuleList(CrossBlock(dim, num_heads, one, **block) for one in made)


class MixerReader(nn.Module):
    """Learned queries read a sequence, all at once: softmax encoder of the sequence, decoder with the mixer across.

    Args:
        mixer: a registered name or a class that takes a context.
        inputs: features of what is read. queries: how many answers. outputs: numbers of an answer.
        position: False if what is read is a set.
    """

    def __init__(
        self,
        mixer: str | MixerClass,
        inputs: int,
        queries: int,
        outputs: int,
        *,
        position: bool = True,
        dim: int = 64,
        depth: int = 2,
        num_heads: int = 4,
        mlp_ratio: float = 2.0,
        **options: Any,
    ) -> None:
        super().__init__()
        self.embed = Embedding(inputs, dim, features=True, position=position)
        self.encoder = _softmax_blocks(dim, 1, num_heads, mlp_ratio)
        # Neighbours in the answer begin alike: a sine code that learns.
        self.queries = nn.Parameter(sincos(torch.arange(queries, device="cpu"), dim).clone())
        self.blocks = _cross_blocks(mixer, queries, dim, depth, num_heads, mlp_ratio=mlp_ratio, **options)
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, outputs)

    def no_weight_decay(self) -> set[str]:
        """The queries."""
        return {"queries"}

    def forward(self, x: Tensor) -> Tensor:
        """Features `(B, N, inputs)` -> answers `(B, queries, outputs)`."""
        context = self.encoder(self.embed(x))
        y = self.queries.expand(len(x), -1, -1)
        for block in self.blocks:
            y = block(y, context)
        return self.head(self.norm(y))


class MixerTranslator(EncoderDecoder):
    """Symbols in, other symbols out, one after another: softmax encoder, causal softmax decoder, the mixer across.

    Args:
        mixer: a registered name or a class that takes a context.
        inputs: symbols of the source. outputs: symbols of the answer, the end included.
        length: symbols of the longest answer.
    """

    def __init__(
        self,
        mixer: str | MixerClass,
        inputs: int,
        outputs: int,
        *,
        length: int = 32,
        dim: int = 64,
        depth: int = 2,
        num_heads: int = 4,
        mlp_ratio: float = 2.0,
        **options: Any,
    ) -> None:
        super().__init__()
        self.embed = Embedding(inputs, dim)
        self.encoder = _softmax_blocks(dim, 1, num_heads, mlp_ratio)
        self.said = Embedding(outputs + 1, dim)  # one more: nothing was said yet
        self.blocks = _cross_blocks(mixer, length, dim, depth, num_heads, causal=True, mlp_ratio=mlp_ratio, **options)
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, outputs)

    def encode(self, inputs: Tensor, lengths: Tensor | None) -> tuple[Tensor, Any]:
        """Symbols `(B, N)`, all of them real, so lengths is None -> what is read, and the first state."""
        if lengths is not None:
            raise ValueError("lengths must be None: few mixers can leave padding out, so sources are of one length.")
        memory = self.encoder(self.embed(inputs))
        return memory, tuple(block.start(memory) for block in self.blocks)

    def advance(self, symbols: Tensor, memory: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The symbols said last `(B,)`, or START -> logits `(B, outputs)`, and the new state."""
        place, states = state[0][0].shape[1], []  # as many as there are keys
        x = self.said(symbols[:, None] + 1, place)[:, 0]
        for block, known in zip(self.blocks, state, strict=True):
            x, known = block.step(x, memory, known)
            states.append(known)
        return self.head(self.norm(x)), tuple(states)

    def forward(self, inputs: Tensor, lengths: Tensor | None, targets: Tensor) -> Tensor:
        """Teacher forcing, all steps at once: logits `(B, M, outputs)`, those of step t given `targets[:, :t]`."""
        memory, _ = self.encode(inputs, lengths)
        x = self.said(self.shifted(targets) + 1)
        for block in self.blocks:
            x = block(x, memory)
        return self.head(self.norm(x))
