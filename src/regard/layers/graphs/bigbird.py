"""BigBird's layer on graphs: attention to the ends of the sequence of nodes, to near ones, and to some at random."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import checks
from regard.layers.mixer import heads_of
from regard.layouts.ragged import slots


class BigBirdLayer(nn.Module):
    r"""Block-sparse attention and a feed-forward network, each with residual and LayerNorm (Zaheer et al., 2020,
    arXiv 2007.14062).

    $$h = \mathrm{LN}(x + W_o\,\mathrm{Attn}(x)),\quad \mathrm{out} = \mathrm{LN}(h + W_2\,\mathrm{ReLU}(W_1 h))$$

    The nodes of a graph, in their order, fall into blocks of `block_size`. A block sees the first, the last, itself, its
    two neighbours and `random_blocks` others, a draw of its own for each head; the first and the last see all. So a node
    costs the same whatever the size of the graph. A graph too small for anything to be left out gets full attention.
    Unlike everything else in a GPS layer, it depends on the order of the nodes.

    GraphGPS puts this whole layer where others have the attention alone. Departures from its release: random blocks are
    never among those seen anyway (there, such keys count twice); they are drawn from a generator of their own (there, from
    NumPy's global one, which every call sets back to seed 0); each graph has the blocks of its own size (there, of the
    largest in the batch, so that the last block may be padding); graphs of fewer than four blocks run.

    Args:
        bias: whether q, k and v have one. drop: after the attention and after the feed-forward network.
        seed: of the draw.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        block_size: int = 3,
        random_blocks: int = 3,
        bias: bool = False,
        drop: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        checks.positive("block_size", block_size)
        if random_blocks < 0:
            raise ValueError(f"random_blocks must be 0 or more, got {random_blocks}.")
        self.head_dim = heads_of(dim, num_heads)
        self.num_heads, self.block_size, self.random_blocks, self.seed = num_heads, block_size, random_blocks, seed
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=bias) for _ in range(3))
        self.proj, self.norm1 = nn.Linear(dim, dim), nn.LayerNorm(dim, eps=1e-6)
        self.fc1, self.fc2, self.norm2 = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.LayerNorm(dim, eps=1e-6)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """`(N, dim)`, graph by graph -> the same shape."""
        sizes = offsets.diff()
        blocks = -(-sizes // self.block_size)
        out = torch.zeros_like(x)
        for count in torch.unique(blocks[blocks > 0]).tolist():
            group = torch.nonzero(blocks == count).squeeze(1)
            rows, exists = slots(offsets[group], sizes[group])
            out = out.index_put((rows[exists],), self.dense(x[rows], exists)[exists])
        return out

    def dense(self, x: Tensor, exists: Tensor | None = None) -> Tensor:
        """`(B, N, dim)`, B graphs of as many blocks, padded at their ends where `exists` `(B, N)` is not set -> the same."""
        size, length = self.block_size, x.shape[1]
        if exists is None:
            exists = x.new_ones(x.shape[:2], dtype=torch.bool)
        pad = -length % size
        inside, exists = F.pad(x, (0, 0, 0, pad)), F.pad(exists, (0, pad))
        q, k, v = (
            part(inside).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        mixed = block_attention(q, k, v, exists, size, self.random_blocks, self.seed)
        h = self.norm1(x + self.drop(self.proj(mixed.transpose(1, 2).flatten(-2)[:, :length])))
        return self.norm2(h + self.drop(self.fc2(F.relu(self.fc1(h)))))


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, exists: Tensor, block_size: int, random_blocks: int, seed: int
) -> Tensor:
    """Attention by blocks as `BigBirdLayer` describes it.

    Args:
        q, k, v: `(B, heads, N, d)`, N a multiple of `block_size`. exists: `(B, N)`, which keys there are.

    Returns:
        `(B, heads, N, d)`.
    """
    batch, heads, length, width = q.shape
    count = length // block_size
    mask = exists[:, None, None]
    if count - 4 <= random_blocks:  # the second block leaves out count - 4 blocks, others one less
        return F.scaled_dot_product_attention(q, k, v, mask)
    near, is_first = seen_blocks(count, random_blocks, heads, seed)
    near, is_first = near.to(q.device), is_first.to(q.device)
    head = torch.arange(heads, device=q.device)[:, None, None]

    def gathered(x: Tensor) -> Tensor:
        """`(B, heads, N, d)` -> `(B, heads, count - 2, keys, d)`: what each block in the middle sees."""
        return x.unflatten(2, (count, block_size))[:, head, near].flatten(3, 4)

    seen = exists.unflatten(1, (count, block_size))[:, near] & is_first.unsqueeze(-1)
    ends = torch.cat([q[:, :, :block_size], q[:, :, -block_size:]], 2)
    first, last = F.scaled_dot_product_attention(ends, k, v, mask).chunk(2, 2)
    middle = F.scaled_dot_product_attention(
        q[:, :, block_size:-block_size].unflatten(2, (count - 2, block_size)).flatten(0, 1),
        gathered(k).flatten(0, 1),
        gathered(v).flatten(0, 1),
        seen.flatten(3, 4).flatten(0, 1).unsqueeze(-2),
    )
    return torch.cat([first, middle.reshape(batch, heads, length - 2 * block_size, width), last], 2)


@lru_cache(maxsize=64)
def seen_blocks(count: int, random_blocks: int, heads: int, seed: int) -> tuple[Tensor, Tensor]:
    """What blocks 1 to count - 2 see, of at least `random_blocks` + 5 blocks.

    Returns:
        `(heads, count - 2, 5 + random_blocks)` block numbers, and which of them do not stand there for a second time.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    block = torch.arange(1, count - 1, device="cpu")
    low, high = (block - 1).clamp(min=1), (block + 1).clamp(max=count - 2)
    left_out = count - 2 - (high - low + 1)
    drawn = torch.empty(heads, len(block), 0, dtype=torch.long, device="cpu")
    for _ in range(random_blocks):
        room = left_out - drawn.shape[-1]
        rank = (torch.rand(heads, len(block), generator=generator, device="cpu") * room).long()
        for earlier in drawn.sort().values.unbind(-1):
            rank = rank + (rank >= earlier)
        drawn = torch.cat([drawn, rank.unsqueeze(-1)], -1)
    others = drawn + 1
    others = others + (others >= low[:, None]) * (high - low + 1)[:, None]
    always = torch.stack([torch.zeros_like(block), block - 1, block, block + 1, torch.full_like(block, count - 1)], -1)
    first = torch.ones(5 + random_blocks, dtype=torch.bool, device="cpu").repeat(heads, len(block), 1)
    first[:, 0, 1] = first[:, -1, 3] = False
    return torch.cat([always.expand(heads, -1, -1), others], -1), first
