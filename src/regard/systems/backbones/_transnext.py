"""TransNeXt: Robust Foveal Visual Perception for Vision Transformers (Shi, 2024, arXiv 2311.17132): the host of MoH-ViT.

Each token sees its 3 x 3 neighbours sharply and the whole image coarsely, both in one softmax over cosines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import checks, ops
from regard.checkpoint import KeyMap
from regard.layers import Block, ConvEmbed, Mixer, depthwise, fan_out_init, flat_kernels, heads_of, split_qkv
from regard.layouts.tables import table
from regard.skeletons import Hierarchical, Place, places


@table
def _offsets(length: int, coarse: int) -> tuple[np.ndarray, np.ndarray]:
    """Distances along an axis from places to the middles of its pooled parts, and which of them each pair has.

    Parts are those of adaptive pooling: from floor(i length / coarse) to ceil((i + 1) length / coarse).
    """
    part = np.arange(coarse)
    first, last = part * length // coarse, -(-(part + 1) * length // coarse) - 1
    distance = np.arange(length, dtype=np.float32)[:, None] - ((first + last) / 2).astype(np.float32)
    values, index = np.unique(distance, return_inverse=True)
    return values, index.reshape(distance.shape).astype(np.int64)


@table
def _window(height: int, width: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Which places of each token's window lie outside of the map `(N, size²)`, and how many do not `(N,)`."""
    inside = np.pad(np.ones((height, width), dtype=bool), size // 2)
    inside = np.lib.stride_tricks.sliding_window_view(inside, (size, size)).reshape(height * width, size * size)
    return ~inside, inside.sum(-1).astype(np.float32)


class ContinuousBias(nn.Module):
    r"""A bias for each head and pair of places, computed from their offset by a small network (log-spaced, as Swin v2).

    $$b = W_2\,\mathrm{ReLU}(W_1 \hat o),\quad \hat o = \mathrm{sign}(o)\,\log_8(1 + |o|),\quad
      o = 8\,(\text{query} - \text{key}) / (\text{grid} - 1)$$

    Args:
        grid: size of the map on which the model is trained; offsets on other maps keep its unit.
    """

    def __init__(self, num_heads: int, grid: Sequence[int], hidden: int = 512) -> None:
        super().__init__()
        self.grid = tuple(grid)
        self.fc1 = nn.Linear(2, hidden)
        self.fc2 = nn.Linear(hidden, num_heads)

    def forward(self, spatial: Sequence[int], coarse: Sequence[int]) -> Tensor:
        """The biases between a map and a pooled copy of it: `(heads, prod(spatial), prod(coarse))`."""
        device, lines, places = self.fc1.weight.device, [], []
        for length, parts, size in zip(spatial, coarse, self.grid, strict=True):
            values, index = _offsets(length, parts)
            values = values.to(device) * (8 / max(size - 1, 1))
            lines.append(values.sign() * (values.abs() + 1).log2() / 3)
            places.append(index.to(device))
        rows, columns = lines
        offsets = torch.stack([x.flatten() for x in torch.meshgrid(rows, columns, indexing="ij")], -1)
        biases = self.fc2(F.relu(self.fc1(offsets.to(self.fc1.weight))))
        index = places[0][:, None, :, None] * len(columns) + places[1][None, :, None, :]
        return biases[index.flatten(2).flatten(0, 1)].permute(2, 0, 1)


class CosineAttention(Mixer):
    r"""Attention of the last stage: cosines with a query embedding, scaled by temperature and log of the keys' number.

    $$\mathrm{softmax}\big(\tau \log N\,(\hat q + e)\,\hat k^\top + b\big) V,\quad \hat q = q / \lVert q \rVert,\
      \hat k = k / \lVert k \rVert$$

    with τ = softplus(t) and e learned for each head, b as in `ContinuousBias`.

    Args:
        input_size: the map on which the model is trained. router: tokens -> gates `(..., num_heads)` of the heads'
            outputs; None leaves them as they are.
    """

    dims: ClassVar[tuple[int, ...]] = (2,)

    def __init__(self, dim: int, num_heads: int, *, input_size: Sequence[int], router: nn.Module | None = None) -> None:
        super().__init__()
        self.head_dim = heads_of(dim, num_heads)
        self.dim, self.num_heads, self.router = dim, num_heads, router
        self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.temperature = nn.Parameter(torch.full((num_heads, 1), 1 / 0.24).expm1().log())  # τ starts at 1 / 0.24
        self.query_embedding = nn.Parameter(torch.empty(num_heads, self.head_dim))
        nn.init.trunc_normal_(self.query_embedding, std=0.02)
        self.bias = ContinuousBias(num_heads, checks.tuple_of("input_size", input_size, 2))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, W, dim)` -> the same shape."""
        spatial = self.check(x)
        k, v = self.kv(x).unflatten(-1, (2, self.num_heads, self.head_dim)).unbind(-3)
        _, q = self._queries(x, math.log(spatial[0] * spatial[1]))
        out = ops.attention(q, F.normalize(k, dim=-1), v, bias=self.bias(spatial, spatial), scale=1.0)
        return self._read(x, out)  # type: ignore[arg-type]

    def _queries(self, x: Tensor, length: Tensor | float) -> tuple[Tensor, Tensor]:
        """Unit queries `(B, H, W, heads, head_dim)`, and the same embedded and scaled."""
        q = F.normalize(self.q(x).unflatten(-1, (self.num_heads, self.head_dim)), dim=-1)
        return q, (q + self.query_embedding) * F.softplus(self.temperature) * length

    def _read(self, x: Tensor, out: Tensor) -> Tensor:
        """Gate the heads and project them."""
        if self.router is not None:
            out = out * self.router(x)[..., None]
        return self.proj(out.flatten(-2))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}"


class AggregatedAttention(CosineAttention):
    r"""Attention to a small window and to the pooled map, in one softmax.

    $$\mathrm{out} = (A_{near} + \hat q\,T + c)\,V_{near} + A_{far}\,V_{far},\quad
      [A_{near}, A_{far}] = \mathrm{softmax}\big(\tau \log n\,(\hat q + e)\,[\hat K_{near}, \hat K_{far}]^\top + b\big)$$

    n counts the keys of a token, T and c (learned) add weights of the window that depend on the query alone, and keys and
    values of the map come from LN(pool(GELU(W x))). Places of a window outside of the map are masked.

    Args:
        reduction: the map is pooled to 1 / reduction of its sides. window_size: odd.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        input_size: Sequence[int],
        reduction: int,
        window_size: int = 3,
        router: nn.Module | None = None,
    ) -> None:
        super().__init__(dim, num_heads, input_size=input_size, router=router)
        checks.odd("window_size", window_size)
        checks.positive("reduction", reduction)
        self.reduction, self.window_size = reduction, window_size
        self.reduce, self.norm = nn.Linear(dim, dim), nn.LayerNorm(dim)
        self.near_bias = nn.Parameter(torch.empty(num_heads, window_size**2))
        self.near_tokens = nn.Parameter(torch.empty(num_heads, self.head_dim, window_size**2))
        self.near_offset = nn.Parameter(torch.zeros(num_heads, window_size**2))
        nn.init.trunc_normal_(self.near_bias, std=0.0004)
        nn.init.trunc_normal_(self.near_tokens, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, W, dim)` -> the same shape."""
        spatial = self.check(x)
        height, width = spatial
        coarse = (max(height // self.reduction, 1), max(width // self.reduction, 1))
        outside, near = (part.to(x.device) for part in _window(height, width, self.window_size))
        length = (near + coarse[0] * coarse[1]).log().to(x.dtype).view(height, width, 1, 1)
        q, scaled = (part.flatten(1, 2).transpose(1, 2) for part in self._queries(x, length))  # (B, heads, N, head_dim)
        k, v = self.kv(x).unflatten(-1, (2, self.num_heads, self.head_dim)).unbind(-3)
        k, v = self._windows(F.normalize(k, dim=-1)), self._windows(v)  # (B, heads, N, head_dim, window)
        pooled = F.adaptive_avg_pool2d(F.gelu(self.reduce(x)).movedim(-1, 1), coarse)
        far = self.kv(self.norm(pooled.flatten(2).transpose(1, 2))).unflatten(-1, (2, self.num_heads, self.head_dim))
        far_k, far_v = far.permute(2, 0, 3, 1, 4)  # (B, heads, M, head_dim)
        logits = torch.cat(
            [
                ((scaled[..., None, :] @ k).squeeze(-2) + self.near_bias[:, None]).masked_fill(outside, -torch.inf),
                scaled @ F.normalize(far_k, dim=-1).transpose(-2, -1) + self.bias(spatial, coarse),
            ],
            -1,
        )
        weights, far_weights = logits.softmax(-1).split([self.window_size**2, coarse[0] * coarse[1]], -1)
        weights = weights + q @ self.near_tokens + self.near_offset[:, None]
        out = (v @ weights[..., None]).squeeze(-1) + far_weights @ far_v
        return self._read(x, out.transpose(1, 2).unflatten(1, spatial))

    def _windows(self, x: Tensor) -> Tensor:
        """`(B, H, W, heads, head_dim)` -> all windows, zero outside of the map: `(B, heads, N, head_dim, window)`."""
        height, width = x.shape[1:3]
        margin, size = self.window_size // 2, range(self.window_size)
        padded = F.pad(x, (0, 0, 0, 0, margin, margin, margin, margin))
        shifted = [padded[:, row : row + height, column : column + width] for row in size for column in size]
        return torch.stack(shifted, -1).flatten(1, 2).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, reduction={self.reduction}, window_size={self.window_size}"


class ConvGLU(nn.Module):
    """fc2(GELU(DWConv(u)) * w) with (u, w) = fc1(x): a gated MLP whose gate sees the 3 x 3 neighbourhood.

    It is a third narrower than a plain MLP of `hidden` channels, which makes both equally large.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        hidden = int(2 * hidden / 3)
        self.fc1 = nn.Linear(dim, 2 * hidden)
        self.local = depthwise(hidden, 3)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, W, dim)` -> the same shape."""
        gate, value = self.fc1(x).chunk(2, -1)
        return self.fc2(F.gelu(self.local(gate)) * value)


def _ours(name: str, value: Tensor) -> dict[str, Tensor]:
    if name.endswith(("temperature", "query_embedding", "near_offset")):
        return {name: value.squeeze(1)}
    return {
        part: tensor for key, one in flat_kernels(name, value).items() for part, tensor in split_qkv(key, one).items()
    }


class TransNeXt(Hierarchical):
    """Overlapping patches, four stages of aggregated attention and `ConvGLU`, LayerNorm after each, mean, linear.

    Args:
        dims, depths, num_heads, mlp_ratios: of each stage.
        reductions: how far the pooled maps are reduced; a stage of 1 has `CosineAttention`.
        router: builds the router of a block's heads, or None.
        img_size: offsets of the position bias have the unit of its maps; images of other sizes run too.
    """

    authors_keys = KeyMap(
        rules=(
            (r"^patch_embed1\.", "stem."),
            (r"^norm([123])\.", r"downs.\1.0."),
            (r"^norm4\.", "norm."),
            (r"^patch_embed(\d)\.", lambda m: f"downs.{int(m[1]) - 1}.1."),
            (r"^block(\d)\.", lambda m: f"stages.{int(m[1]) - 1}."),
            (r"\.attn\.", ".mixer."),
            (r"\.dwconv\.dwconv\.", ".local."),
            (r"\bcpb_fc", "bias.fc"),
            (r"\bsr\.", "reduce."),
            (r"\brelative_pos_bias_local\b", "near_bias"),
            (r"\blearnable_tokens\b", "near_tokens"),
            (r"\blearnable_bias\b", "near_offset"),
        ),
        convert=_ours,
    )

    def __init__(
        self,
        *,
        dims: Sequence[int] = (72, 144, 288, 576),
        depths: Sequence[int] = (5, 5, 22, 5),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        reductions: Sequence[int] = (8, 4, 2, 1),
        router: Callable[[Place], nn.Module] | None = None,
        patch_size: int = 4,
        norm_eps: float = 1e-6,
        img_size: int = 224,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        norm = partial(nn.LayerNorm, eps=norm_eps)
        strides = [patch_size * 2**stage for stage in range(len(dims))]

        def block(at: Place, mlp_ratio: float, reduction: int) -> Block:
            options: dict[str, Any] = {"input_size": at.grid, "router": None if router is None else router(at)}
            kind = partial(AggregatedAttention, reduction=reduction) if reduction > 1 else CosineAttention
            mixer = kind(at.dim, at.num_heads, **options)
            return Block(at.dim, mixer, mlp=ConvGLU(at.dim, int(at.dim * mlp_ratio)), norm=norm, drop_path=at.drop_path)

        stages = places(dims, depths, num_heads, strides, img_size, drop_path_rate)
        super().__init__(
            stem=ConvEmbed(in_chans, dims[0], 2 * patch_size - 1, patch_size, patch_size - 1),
            downs=[
                nn.Identity(),
                *(nn.Sequential(norm(a), ConvEmbed(a, b, 3, 2, 1)) for a, b in zip(dims[:-1], dims[1:], strict=True)),
            ],
            stages=[
                [block(at, ratio, reduction) for at in stage]
                for stage, ratio, reduction in zip(stages, mlp_ratios, reductions, strict=True)
            ],
            dims=dims,
            strides=strides,
            norm=norm(dims[-1]),
            num_classes=num_classes,
            in_chans=in_chans,
        )
        self.apply(fan_out_init)

    def no_weight_decay(self) -> set[str]:
        """Query embeddings, temperatures and whatever makes position biases."""
        kept = ("query_embedding", "temperature", "near_bias", "mixer.bias.")
        return {name for name, _ in self.named_parameters() if any(part in name for part in kept)}
