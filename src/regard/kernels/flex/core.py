"""What every op that is said as a FlexAttention shares: when it can run, the call, the blocks of its mask."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from regard.kernels import libraries

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
WORTH = 512
"""Fewer tokens than these do not repay a compilation of many seconds (an estimate, not a measurement)."""

_PAIRS = 1 << 24  # pairs that are looked at at once where blocks are found
_SHAPES = 256  # combinations of sizes and options that are compiled, before PyTorch falls back to the unfused form

Mod = Callable[..., Tensor]
"""A mask `(batch, head, query, key) -> seen` or a change of scores `(score, batch, head, query, key) -> score`."""


def refuses(q: Tensor, k: Tensor, v: Tensor, *args: Any, bias: Tensor | None = None, **kwargs: Any) -> str | None:
    """Why FlexAttention cannot take these arguments, or None."""
    if q.device.type not in ("cuda", "cpu"):
        return f"q is on {q.device.type}, FlexAttention runs on CUDA, and unfused on CPU"
    if not q.numel() or not k.numel():
        return f"{'k' if q.numel() else 'q'} is empty"
    if type(q) not in (Tensor, nn.Parameter):
        return f"q is a {type(q).__name__}, FlexAttention takes plain tensors"
    if torch.compiler.is_exporting():
        return "an exported program should not need FlexAttention"
    if not torch.compiler.is_compiling() and is_in_torch_dispatch_mode():
        return "a dispatch mode is active that does not know FlexAttention"
    if q.device.type == "cpu":
        wanted = libraries.wants_gradient(q, k, v, *(() if bias is None else (bias,)))
        return "FlexAttention has no backward on CPU: use torch.no_grad()" if wanted else None
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"q is {q.dtype}, FlexAttention takes float32, float16 and bfloat16 on CUDA"
    if min(q.shape[-1], v.shape[-1]) < 16 or max(q.shape[-1], v.shape[-1]) > 256:
        return f"FlexAttention needs a head_dim and value_dim of 16 to 256, got {q.shape[-1]} and {v.shape[-1]}"
    return None if libraries.installed("triton") else "triton is not installed: pip install triton"


def declines(q: Tensor, bias: Tensor | None) -> str | None:
    """Why "auto" leaves FlexAttention alone whatever the op, or None."""
    if q.device.type == "cpu":
        return "on CPU it holds all pairs at once"
    if bias is not None and bias.requires_grad and torch.are_deterministic_algorithms_enabled():
        return "its gradient of a bias is summed in no fixed order"
    return None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    score_mod: Mod | None = None,
    blocks: BlockMask | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    dynamic: bool = False,
) -> Any:
    """`(B, N, heads, d)`, `(B, M, kv_heads, d)`, `(B, M, kv_heads, e)` -> `(B, N, heads, e)` [and lse `(B, N, heads)`]."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    call = _compiled(dynamic) if q.is_cuda and not torch.compiler.is_compiling() else flex_attention
    out, aux = call(
        *(x.transpose(1, 2) for x in (q, k, v)),
        score_mod=score_mod,
        block_mask=blocks,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
        return_aux=AuxRequest(lse=return_lse),
    )
    out = out.transpose(1, 2)
    return (out, aux.lse.transpose(1, 2).to(q.dtype)) if return_lse else out


@lru_cache
def _compiled(dynamic: bool) -> Callable[..., Any]:
    import torch._dynamo
    from torch.nn.attention.flex_attention import flex_attention

    return torch._dynamo.config.patch(recompile_limit=_SHAPES)(torch.compile(flex_attention, dynamic=dynamic))


# Blocks of 128 x 128 pairs that hold a visible pair are visited; in those that hold nothing else no mask is asked.


def block_mask(build: Callable[..., Mod], sizes: tuple[Any, ...], queries: int, keys: int, x: Tensor) -> BlockMask:
    """The block mask of `build(*sizes)`, which is found once."""
    if torch.compiler.is_compiling():
        some, every = _blocks(build, sizes, queries, keys, x.device)
        return assemble(build(*sizes), some, every, queries, keys)
    return _kept_mask(build, sizes, queries, keys, x.device)


@lru_cache(maxsize=64)
def _kept_mask(
    build: Callable[..., Mod], sizes: tuple[Any, ...], queries: int, keys: int, device: torch.device
) -> BlockMask:
    with torch.inference_mode(False):  # kept for calls that train
        return assemble(build(*sizes), *_found_blocks(build, sizes, queries, keys, device), queries, keys)


@torch.compiler.assume_constant_result
def _blocks(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _found_blocks(*arguments)


@lru_cache(maxsize=64)
def _found_blocks(
    build: Callable[..., Mod], sizes: tuple[Any, ...], queries: int, keys: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Look at all pairs once: which blocks hold some visible ones, which nothing else."""
    mask_mod = build(*sizes)
    key = torch.arange(keys, device=device)
    at_once = max(1, _PAIRS // (BLOCK * keys)) * BLOCK
    counts = []
    for first in range(0, queries, at_once):
        query = torch.arange(first, min(first + at_once, queries), device=device)
        pairs = mask_mod(None, None, query[:, None], key)
        pairs = F.pad(pairs, (0, -keys % BLOCK, 0, -len(query) % BLOCK))
        counts.append(pairs.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).sum((1, 3)))
    visible = torch.cat(counts)
    return visible > 0, visible == BLOCK**2


def assemble(mask_mod: Mod, some: Tensor, every: Tensor, queries: int, keys: int) -> BlockMask:
    """A block mask from which blocks hold some visible pairs and which nothing else: `(query blocks, key blocks)`."""
    from torch.nn.attention.flex_attention import BlockMask

    return BlockMask.from_kv_blocks(
        *_listed(some & ~every), *_listed(every), BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=(queries, keys)
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """`(n, m)` booleans -> how many are true in each row, and their places first: `(1, 1, n)`, `(1, 1, n, m)`."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]
