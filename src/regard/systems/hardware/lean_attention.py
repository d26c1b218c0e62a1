"""Lean Attention: Hardware-Aware Scalable Attention for the Decode-Phase of Transformers (Sanovar et al., 2024).

arXiv 2405.10480. When one token is decoded, there are often fewer heads than multiprocessors. So the blocks of keys of
all heads and sequences are put into one list, which is cut into equal ranges, wherever heads begin and end (stream-K);
what the workers have found of a head is merged exactly, because rescaled softmax sums can be added in any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from regard import checks
from regard.checkpoint import KeyMap
from regard.flops import counted
from regard.layers import Mlp, SoftmaxAttention, split_qkv
from regard.ops.dense import attention_macs
from regard.registry import System, Variant, register_mixer, register_system
from regard.skeletons import DecoderLM
from regard.systems.hardware._stream_k import LeanPlan, lean_plan


class Partial(NamedTuple):
    r"""Attention to a part of the keys, not yet normalised.

    Attributes:
        top: m, the largest logit, `(parts, rows)`; -inf if a row has no key in the part.
        total: $l = \sum_j e^{s_j - m}$, `(parts, rows)`.
        out: $\tilde O = \sum_j e^{s_j - m} v_j$, `(parts, rows, value_dim)`.
    """

    top: Tensor
    total: Tensor
    out: Tensor


def merge_partials(parts: Partial, into: Tensor, count: int) -> Partial:
    r"""Reduce parts into `count` larger ones: the paper's softmax re-scaling, associative and commutative.

    Its identity is (-inf, 0, 0).

    $$m = \max_n m_n,\qquad l = \sum_n e^{m_n - m} l_n,\qquad \tilde O = \sum_n e^{m_n - m} \tilde O_n$$

    Args:
        into: `(parts,)` which of the larger ones each part belongs to.
    """
    rows = parts.top.shape[1]
    top = parts.top.new_full((count, rows), -torch.inf)
    top = top.scatter_reduce(0, into[:, None].expand_as(parts.top), parts.top, "amax")
    scale = torch.exp(parts.top - _finite(top)[into])
    total = torch.zeros_like(top).index_add(0, into, scale * parts.total)
    out = parts.out.new_zeros(count, *parts.out.shape[1:]).index_add(0, into, scale[..., None] * parts.out)
    return Partial(top, total, out)


def _finite(top: Tensor) -> Tensor:
    return torch.where(top == -torch.inf, 0.0, top)


def lean_pieces(
    q: Tensor, k: Tensor, v: Tensor, plan: LeanPlan, lengths: Sequence[int], *, causal: bool, scale: float
) -> Partial:
    """What the workers hold when they are done: one part for each of `plan.schedule.pieces`.

    Each tile is computed as a LeanTile of its own, then the tiles of a piece are reduced.

    Args:
        q: `(B, Nq, heads, head_dim)`. k, v: `(B, Nk, kv_heads, ...)`, of which `lengths` keys exist.
    """
    queries, keys, (rows, columns) = q.shape[1], k.shape[1], plan.block
    rows, columns = min(rows, queries), min(columns, keys)  # less padding where there is one block only
    tiles, pieces = plan.schedule.tiles, plan.schedule.pieces

    def whole(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=q.device)

    batch, head, index = (whole([output[axis] for output in plan.outputs]) for axis in range(3))
    place = index[:, None] * rows + torch.arange(rows, device=q.device)  # (outputs, rows of one head)
    grouped = q.unflatten(2, (k.shape[2], -1))  # query heads that share keys become rows
    blocks = grouped[batch[:, None], place.clamp(max=queries - 1), head[:, None]].flatten(1, 2) * scale

    of = whole([output for output, count in enumerate(tiles) for _ in range(count)])
    first = whole([columns * tile for count in tiles for tile in range(count)])
    key = first[:, None] + torch.arange(columns, device=q.device)  # (tiles, columns)
    chosen = batch[of, None], key.clamp(max=keys - 1), head[of, None]
    length = whole(lengths)[batch][of]
    visible = (key < length[:, None])[:, None]
    if causal:
        visible = visible & (key[:, None] <= (place[of] + (length - queries)[:, None])[..., None])
        visible = visible.repeat_interleave(grouped.shape[3], 1)
    logits = (blocks[of] @ k[chosen].transpose(1, 2)).masked_fill(~visible, -torch.inf)
    top = logits.amax(-1).detach()  # the result does not depend on it
    weights = torch.exp(logits - _finite(top)[..., None])
    done = Partial(top, weights.sum(-1), weights @ v[chosen])
    return merge_partials(done, whole([n for n, piece in enumerate(pieces) for _ in range(piece.tiles)]), len(pieces))


def lean_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Sequence[int] | None = None,
    causal: bool = False,
    scale: float | None = None,
    units: int = 108,
    workers: int | None = None,
    block: tuple[int, int] | None = None,
    order: Literal["batch", "head"] = "batch",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Exact softmax attention, computed in the pieces into which stream-K cuts it.

    $$o = \tilde O / l,\qquad \mathrm{lse} = m + \ln l\qquad\text{of the pieces merged}$$

    What a GPU would do side by side is done here by batched products, on any device and with gradients: the result, its
    rounding included, is that of the schedule; the speed is not.

    Args:
        q: `(B, *S, heads, head_dim)`, one query a sequence to decode.
        k, v: `(B, *S_k, kv_heads, head_dim)` and value_dim, the cache; kv_heads divides heads.
        lengths: how many keys of each sequence exist, in a ragged batch; a sequence without keys gets zeros.
        causal: query i sees keys up to i + length - Nq.
        scale: None is head_dim ** -0.5.
        units, workers, block, order: see `lean_plan`.
        return_lse: also return the log of the softmax denominator, `(B, *S, heads)`.

    Returns:
        `(B, *S, heads, value_dim)`, with the log-sum-exp if asked for.

    Raises:
        ValueError: for shapes that do not fit, or lengths beyond the cache.

    Example:
        >>> q, cache = torch.randn(1, 1, 8, 64), torch.randn(2, 1, 1000, 2, 64)
        >>> lean_attention(q, *cache).shape
        torch.Size([1, 1, 8, 64])
    """
    checks.heads_last(q, k, v, same_grid=False)
    checks.no_half_on_cpu("lean_attention", q)
    spatial = q.shape[1:-2]
    q, k, v = (x.flatten(1, -3) for x in (q, k, v))
    known = (k.shape[1],) * len(q) if lengths is None else tuple(int(length) for length in lengths)
    if len(known) != len(q) or any(not 0 <= length <= k.shape[1] for length in known):
        raise ValueError(f"lengths must hold {len(q)} numbers from 0 to {k.shape[1]}, got {known}.")
    sizes = {"heads": q.shape[2], "kv_heads": k.shape[2], "head_dim": q.shape[3]}
    how: dict[str, Any] = {"units": units, "workers": workers, "block": block, "order": order}
    plan = lean_plan(len(q), q.shape[1], known, **sizes, causal=causal, **how)
    run = partial(_run, plan=plan, lengths=known, causal=causal, scale=q.shape[-1] ** -0.5 if scale is None else scale)
    out, lse = counted(attention_macs, run, (q, k, v), {})
    out = out.unflatten(1, spatial)
    return (out, lse.unflatten(1, spatial)) if return_lse else out


def _run(
    q: Tensor, k: Tensor, v: Tensor, *, plan: LeanPlan, lengths: Sequence[int], causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    dtype = q.dtype
    if dtype.itemsize < 4:  # tiles are products of half numbers on GPUs, but what is summed is float32
        q, k, v = q.float(), k.float(), v.float()
    parts = lean_pieces(q, k, v, plan, lengths, causal=causal, scale=scale)
    rank = {output: number for number, output in enumerate(sorted(plan.outputs))}  # by batch element, head, block
    into = [rank[plan.outputs[piece.output]] for piece in plan.schedule.pieces]
    done = merge_partials(parts, torch.tensor(into, dtype=torch.long, device=q.device), len(rank))
    out = done.out / torch.where(done.total == 0, 1.0, done.total)[..., None]
    lse = done.top + done.total.log()

    # Row r of an output is query r // group of its block and head r % group of its group.
    group, rows = q.shape[2] // k.shape[2], min(plan.block[0], q.shape[1])
    blocks = -(-q.shape[1] // rows)
    query, head = torch.arange(q.shape[1], device=q.device), torch.arange(q.shape[2], device=q.device)
    output = (head // group * blocks)[None] + (query // rows)[:, None]  # within a sequence, (Nq, heads)
    row = output * rows * group + (query % rows * group)[:, None] + (head % group)[None]
    shape = len(q), k.shape[2] * blocks
    out, lse = (x.unflatten(0, shape).flatten(1, 2)[:, row] for x in (out, lse))
    return out.to(dtype), lse


@register_mixer("lean")
class LeanAttention(SoftmaxAttention):
    r"""Multi-head softmax attention whose core is `lean_attention`, for decoding from a cache, and for prefill.

    The function is that of mixer "softmax", the parameters too; what differs is who would compute what. On a processor
    with few cores there is little to balance: use it to study schedules, and "softmax" to be fast.

    Args:
        dim, num_heads, kv_heads, qkv_bias, causal: as of `SoftmaxAttention`.
        units: multiprocessors of the GPU whose schedule is followed (108: A100, 132: H100).
        block: queries and keys of a tile; None as released.
    """

    dims: ClassVar[tuple[int, ...]] = (1, 2, 3)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        kv_heads: int | None = None,
        qkv_bias: bool = True,
        causal: bool = False,
        units: int = 108,
        block: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(dim, num_heads, kv_heads=kv_heads, qkv_bias=qkv_bias, causal=causal)
        self.units, self.block = units, None if block is None else (block[0], block[1])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
        """By the schedule of this call's shapes."""
        return lean_attention(q, k, v, causal=causal, units=self.units, block=self.block)  # type: ignore[return-value]

    def prefill(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """`(B, N, dim)` after the tokens in `state` -> the same shape, and the cache to decode from."""
        self.check(x)
        q = self.q(x).unflatten(-1, (self.num_heads, self.head_dim))
        k, v = self.kv(x).unflatten(-1, (2, self.kv_heads, self.head_dim)).unbind(-3)
        if state is not None:
            k, v = torch.cat([state[0], k], 1), torch.cat([state[1], v], 1)
        return self.proj(self.attend(q, k, v, causal=True).flatten(-2)), (k, v)


def _linear(name: str, value: Tensor) -> dict[str, Tensor]:
    """GPT-2 keeps its matrices the other way round, and q, k and v as one."""
    if name.startswith("blocks.") and value.dim() == 2:
        value = value.t()
    return split_qkv(name, value)


class LeanDecoder(DecoderLM):
    """GPT-2 (Radford et al., 2019) that decodes with lean attention: the loop around the kernel, with its cache.

    The paper ends at the operator, which replaces dense attention in any decoder and adds no parameter; this is the
    decoder whose public weights (under the names of Hugging Face's GPT-2) are most at hand.

    Args:
        vocab_size: number of different tokens. dim, depth, num_heads: as usual.
        kv_heads: keys and values are shared between query heads if there are fewer.
        length: the longest context.
        units: multiprocessors of the GPU whose schedule is followed.
    """

    authors_keys = KeyMap(
        rules=[
            (r"^transformer\.", ""),
            (r"^wte\.", "embed."),
            (r"^wpe\.weight", "pos_embed"),
            (r"^h\.", "blocks."),
            (r"^ln_f\.", "norm."),
            (r"\.ln_([12])\.", r".norm\1."),
            (r"\.attn\.c_attn\.", ".mixer.qkv."),
            (r"\.attn\.c_proj\.", ".mixer.proj."),
            (r"\.mlp\.c_fc\.", ".mlp.fc1."),
            (r"\.mlp\.c_proj\.", ".mlp.fc2."),
        ],
        drop=[r"\.attn\.(masked_)?bias$", r"^lm_head\."],
        convert=_linear,
    )

    def __init__(
        self,
        vocab_size: int = 50257,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        kv_heads: int | None = None,
        length: int = 1024,
        units: int = 108,
        drop_path_rate: float = 0.0,
    ) -> None:
        mixer = partial(LeanAttention, dim, num_heads, kv_heads=kv_heads, causal=True, units=units)
        super().__init__(
            vocab_size,
            dim,
            [mixer() for _ in range(depth)],
            mlp=lambda width: Mlp(width, 4 * width, act=partial(nn.GELU, approximate="tanh")),
            position="learned",
            length=length,
            drop_path_rate=drop_path_rate,
        )


def _gpt2(name: str, params: int, **options: Any) -> Variant:
    source = "GPT-2's count (openai-community on Hugging Face); the paper, a kernel's, publishes no model"
    return Variant(name, LeanDecoder, params, inputs=((1, 1024),), source=source, options=options)


SYSTEM = register_system(
    System(
        slug="lean_attention",
        title="Lean Attention: Hardware-Aware Scalable Attention Mechanism for the Decode-Phase of Transformers",
        year=2024,
        arxiv="2405.10480",
        evidence="other_code",
        repo="microsoft/onnxruntime",
        idea="Exact decoding: the blocks of keys of all heads and sequences form one list, cut into equal ranges for the "
        "workers (stream-K), whose unnormalised softmax sums are merged. Here the schedule, its arithmetic and a model of "
        "its load balance; the published speeds are those of GPU kernels, which this library does not contain.",
        mixers=("lean",),
        variants=(
            _gpt2("lean_gpt2", 124_439_808),
            _gpt2("lean_gpt2_medium", 354_823_168, dim=1024, depth=24, num_heads=16),
            _gpt2("lean_gpt2_large", 774_030_080, dim=1280, depth=36, num_heads=20),
            _gpt2("lean_gpt2_xl", 1_557_611_200, dim=1600, depth=48, num_heads=25),
        ),
        reports=(
            "Published as an operator with two modes, which `lean_plan` covers: decode (one query, heads of shared keys "
            "stacked, contexts of 1k to 512k) and causal prefill",
            "First version, abstract: 2.6x over FlashAttention-2 on average, up to 8.33x at a context of 512k",
            "Later versions, abstract: 1.73x over FlashDecoding on average, up to 2.18x at 256k; near-perfect occupancy at "
            "any context size (A100 and H100)",
        ),
    )
)
