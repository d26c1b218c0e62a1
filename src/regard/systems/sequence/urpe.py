"""Universal relative position encoding: Your Transformer May Not be as Powerful as You Expect (Luo et al., 2022, 2205.13401).

Relative positions inside the softmax leave every row of the attention matrix summing to one, so that equal tokens stay
equal in all layers and no such Transformer can say where it is. Multiplying the softmax, after it, by a second learned
Toeplitz matrix C frees the sums of the rows, and the Transformer becomes a universal approximator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import checks
from regard.checkpoint import KeyMap, drop_tied_head
from regard.layers import Block, Mixer, OffsetTable, heads_of, linear_rates
from regard.registry import System, Variant, register_mixer, register_system
from regard.skeletons.base import Model

Position = Literal["urpe", "rpe", "none"]
POSITIONS = ("urpe", "rpe", "none")


def universal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    factor: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""$o = (\mathrm{softmax}(d^{-1/2} q k^\top + B) \odot C)\,v$ (eq. 8), with no normalisation after the product.

    B and C may be any matrices: Toeplitz for sequences, or read from classes of distances in a graph.

    Args:
        q: `(B, N, heads, head_dim)`. k, v: `(B, M, heads, head_dim)`.
        bias, factor: B and C, broadcastable to `(B, heads, N, M)`; None is 0 and 1.
        mask: True where a query may see a key, broadcastable likewise.

    Returns:
        o `(B, N, heads, head_dim)`, and the softmax before the product with C `(B, heads, N, M)`.
    """
    q, k, v = (x.transpose(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
    logits = q @ k.transpose(-1, -2)
    if bias is not None:
        logits = logits + bias
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    softmax = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(v.dtype)
    weights = softmax if factor is None else softmax * factor
    return (weights @ v).transpose(1, 2), softmax


@register_mixer("urpe")
class URPEAttention(Mixer):
    r"""Softmax attention with relative positions inside and outside of the softmax (eq. 8).

    $$\mathrm{out} = W_o\,[(\mathrm{softmax}(d^{-1/2} Q K^\top + B) \odot C)\,V]_{heads},\quad
      B_{ij} = b_{j-i},\ C_{ij} = c_{j-i}$$

    b and c are learned for each head and offset. c starts at 1, where the layer is the one with relative positions alone;
    it may become negative. Beyond `size` places, both take their outermost entries.

    Departure: on 2 and 3 axes, where the paper has sequences and graphs, offsets are vectors, so that B and C are block
    Toeplitz.

    Args:
        dim: channels. num_heads: divides dim.
        size: places along each of `axes` for which there are entries of b and c.
        position: "urpe", b and c; "rpe", b alone; "none", neither.
        buckets: share entries between distant offsets (see `OffsetTable`); the release has 64 unless told otherwise.
    """

    can_causal: ClassVar[bool] = True
    can_stream: ClassVar[bool] = True
    can_mask: ClassVar[bool] = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        size: int | Sequence[int] = 128,
        axes: int = 1,
        position: Position = "urpe",
        buckets: int | None = None,
        qkv_bias: bool = True,
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.head_dim = heads_of(dim, num_heads)
        self.dim, self.num_heads, self.causal = dim, num_heads, causal
        self.axes = None if position == "none" else axes
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=qkv_bias) for _ in range(3))
        self.proj = nn.Linear(dim, dim)
        self.bias, self.factor = offset_tables(checks.tuple_of("size", size, axes), num_heads, position, buckets)

    @classmethod
    def in_stack(cls, index: int, input_size: tuple[int, ...], dim: int, num_heads: int, **options: Any) -> Mixer:
        """One entry of b and c for every offset of the grid."""
        return cls(dim, num_heads, axes=len(input_size), **{"size": input_size, **options})

    def no_weight_decay(self) -> set[str]:
        """b and c."""
        return {f"{name}.table" for name in ("bias", "factor") if getattr(self, name) is not None}

    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, bias: Tensor | None = None, factor: Tensor | None = None
    ) -> Tensor:
        """`(B, *S, dim)` -> the same shape.

        Args:
            mask: `(B, N)`, N = prod(S), False for padding, which is not read.
            bias, factor: B and C in place of the mixer's own, broadcastable to `(B, heads, N, N)`: for hosts that share
                them among layers, and for graphs.
        """
        spatial = self.check(x)
        bias = self.bias.matrix(spatial) if bias is None and self.bias is not None else bias
        factor = self.factor.matrix(spatial) if factor is None and self.factor is not None else factor
        q, k, v = (part.flatten(1, -3) for part in self._qkv(x))
        seen = None if mask is None else mask[:, None, None]
        if self.causal:
            past = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=x.device).tril()
            # A row without any key would be NaN: padding in front of a stream reads itself.
            seen = past if seen is None else past & seen | torch.eye(len(past), dtype=torch.bool, device=x.device)
        out, _ = universal_attention(q, k, v, bias, factor, seen)
        return self.proj(out.flatten(-2)).view(x.shape)

    def _qkv(self, x: Tensor) -> list[Tensor]:
        return [part(x).unflatten(-1, (self.num_heads, self.head_dim)) for part in (self.q, self.k, self.v)]

    def step(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One token `(B, dim)`; the state is the keys and values so far, each `(B, t, heads, head_dim)`."""
        q, k, v = self._qkv(x[:, None])
        if state is not None:
            k, v = torch.cat([state[0], k], 1), torch.cat([state[1], v], 1)
        count = k.shape[1]
        # Offsets 1 - t .. 0, from the oldest token to this one.
        bias, factor = (
            None if table is None else table((count,))[:, None, :count] for table in (self.bias, self.factor)
        )
        out, _ = universal_attention(q, k, v, bias, factor)
        return self.proj(out.flatten(1)), (k, v)

    def state_size(self, length: int) -> int:
        """All keys and values: grows with the stream."""
        return 2 * length * self.dim

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, causal={self.causal}"


def offset_tables(
    size: Sequence[int], num_heads: int, position: Position, buckets: int | None = None, std: float = 0.02
) -> tuple[OffsetTable | None, OffsetTable | None]:
    """b from N(0, std^2) and c = 1, as far as `position` has them."""
    checks.one_of("position", position, POSITIONS)
    bias = None if position == "none" else OffsetTable(size, num_heads, std=std, buckets=buckets)
    return bias, OffsetTable(size, num_heads, value=1.0, buckets=buckets) if position == "urpe" else None


class PostNormBlock(Block):
    r"""$x \leftarrow n_1(x + \mathrm{mixer}(x)),\ x \leftarrow n_2(x + \mathrm{mlp}(x))$, as the first Transformer and BERT."""

    def forward(self, x: Tensor, **options: Tensor | None) -> Tensor:
        """`(B, N, dim)` -> the same shape; `options` go to the mixer."""
        x = self.norm1(x + self.drop_path(self.mixer(x, **options)))
        return self.norm2(x + self.drop_path(self.mlp(x)))


class TokenHead(nn.Module):
    """RoBERTa's head: linear, GELU, LayerNorm, a matrix of its own or the embedding's, bias."""

    def __init__(self, dim: int, vocab_size: int, tied: bool) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(dim, dim), nn.LayerNorm(dim)
        self.weight = None if tied else nn.Parameter(torch.empty(vocab_size, dim))
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """`(B, N, dim)` -> logits `(B, N, vocab_size)`."""
        return F.linear(self.norm(F.gelu(self.dense(x))), embedding if self.weight is None else self.weight, self.bias)


class URPETransformer(Model):
    """The encoder of the paper's synthetic tasks: RoBERTa's, without absolute positions.

    Embedding, LayerNorm, post-norm blocks of `URPEAttention` that share one b and one c, `TokenHead`.

    Args:
        vocab_size: number of different tokens, and of answers. dim, depth, num_heads, mlp_ratio: as usual.
        length: places for which b and c have entries.
        position, buckets: see `URPEAttention`.
        tied: the head shares the embedding's matrix.
        init_std: of all matrices and of b at first.
    """

    authors_keys = KeyMap(
        rules=[
            (r"^(?:en|de)coder\.(?:sentence_encoder\.)?", ""),
            (r"^lm_head\.", "head."),
            (r"^ur_rp_bias\.weight", "factor.table"),
            (r"^rp_bias\.weight", "bias.table"),
            (r"^embed_tokens\.", "embed."),
            (r"^emb_layer_norm\.", "norm."),
            (r"^layers\.", "blocks."),
            (r"\.self_attn_layer_norm\.", ".norm1."),
            (r"\.final_layer_norm\.", ".norm2."),
            (r"\.self_attn\.(\w+)_proj\.", r".mixer.\1."),
            (r"\.mixer\.out\.", ".mixer.proj."),
            (r"\.(fc[12])\.", r".mlp.\1."),
            (r"\.layer_norm\.", ".norm."),
        ]
    )

    def __init__(
        self,
        vocab_size: int = 1011,
        dim: int = 768,
        depth: int = 3,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        length: int = 128,
        position: Position = "urpe",
        buckets: int | None = None,
        tied: bool = True,
        init_std: float = 0.02,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        checks.positive("vocab_size", vocab_size)
        checks.positive("length", length)
        self.dim, self.vocab_size = dim, vocab_size
        self.embed, self.norm = nn.Embedding(vocab_size, dim), nn.LayerNorm(dim)
        self.bias, self.factor = offset_tables((length,), num_heads, position, buckets, init_std)
        self.blocks = nn.ModuleList(
            PostNormBlock(dim, URPEAttention(dim, num_heads, position="none"), mlp_ratio=mlp_ratio, drop_path=rate)
            for rate in linear_rates(drop_path_rate, depth)
        )
        self.head = TokenHead(dim, vocab_size, tied)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2 and not name.endswith(".table"):
                nn.init.normal_(parameter, std=init_std)
            elif name.endswith(".bias"):
                nn.init.zeros_(parameter)

    def no_weight_decay(self) -> set[str]:
        """b and c."""
        return {f"{name}.table" for name in ("bias", "factor") if getattr(self, name) is not None}

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens `(B, N)` int64 -> logits `(B, N, vocab_size)`; `mask` `(B, N)` is False (or 0) for padding."""
        return self.forward_head(self.forward_features(tokens, mask))

    def forward_features(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens `(B, N)` -> states `(B, N, dim)` after the last block."""
        return self.forward_intermediates(tokens, mask)[-1]

    def forward_intermediates(self, tokens: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        """States `(B, N, dim)` after every block."""
        if tokens.dim() != 2 or tokens.shape[1] == 0 or tokens.is_floating_point():
            raise ValueError(
                "tokens must be whole numbers (batch, length) with at least one token, "
                f"got {tokens.dtype} {tuple(tokens.shape)}."
            )
        if mask is not None and mask.shape != tokens.shape:
            raise ValueError(f"mask must be {tuple(tokens.shape)} like tokens, got {tuple(mask.shape)}.")
        x, mask = self.norm(self.embed(tokens)), None if mask is None else mask.bool()
        if mask is not None:
            x = x * mask[..., None]
        shared = {
            name: None if table is None else table.matrix(tokens.shape[1:])
            for name, table in (("bias", self.bias), ("factor", self.factor))
        }
        states = []
        for block in self.blocks:
            x = block(x, mask=mask, **shared)
            states.append(x)
        return states

    def forward_head(self, x: Tensor) -> Tensor:
        """States -> logits."""
        return self.head(x, self.embed.weight)

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Checkpoints of tied models hold the shared matrix twice, under two names."""
        return drop_tied_head(state) if self.head.weight is None else state


_COUNTS = {
    # position: even tokens (tied head) and position identification (its own matrix), 1,000 and 10,000 different tokens
    "urpe": (22_640_859, 23_417_307, 29_561_859, 37_250_307),
    "rpe": (22_637_799, 23_414_247, 29_558_799, 37_247_247),
    "none": (22_634_739, 23_411_187, 29_555_739, 37_244_187),
}
_CASES = (
    ("1k_even_tokens", 1011, True),
    ("1k_position", 1011, False),
    ("10k_even_tokens", 10011, True),
    ("10k_position", 10011, False),
)
_PREFIX = {"urpe": "urpe", "rpe": "urpe_rpe_alone", "none": "urpe_no_positions"}

SYSTEM = register_system(
    System(
        slug="urpe",
        title="Your Transformer May Not be as Powerful as You Expect",
        year=2022,
        arxiv="2205.13401",
        evidence="authors_code",
        repo="lsj2408/URPE",
        idea="A second learned Toeplitz matrix multiplies the softmax after it, so that rows need not sum to one.",
        mixers=("urpe",),
        variants=tuple(
            Variant(
                f"{_PREFIX[position]}_{case}",
                URPETransformer,
                count,
                inputs=((1, 128),),
                source="parameters of the authors' code with the flags of its scripts for the synthetic tasks",
                options={"vocab_size": vocab_size, "position": position, "tied": tied},
            )
            for position, counts in _COUNTS.items()
            for (case, vocab_size, tied), count in zip(_CASES, counts, strict=True)
        ),
        reports=(
            "Position identification and even token prediction, 128 tokens out of 10, 1,000 or 10,000: URPE 100 %; relative "
            "positions alone about 10 % and slightly above 50 % (read from a bar chart)",
            "WikiText-103, Transformer-XL base (151M), perplexity valid / test: 23.1 / 24.0, with URPE 22.4 / 23.2. Its code "
            "and dimensions are not released, nor are Graphormer's",
            "Graphormer with C from classes of shortest paths: ZINC subset MAE 0.122 -> 0.086 (489,321 -> 491,737 parameters), "
            "ZINC full 0.052 -> 0.028, PCQM4M (12.5M) valid MAE 0.1264 -> 0.1238",
            "Run time at 128 / 256 / 512 tokens 4.55 / 5.60 / 6.79 without C, 4.59 / 5.66 / 6.91 with C; memory 0.96 / 1.12 / "
            "1.86 and 0.97 / 1.17 / 2.04 (poster, units not given)",
        ),
    )
)
