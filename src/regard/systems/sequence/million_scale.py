"""A Unified View of Long-Sequence Models towards Modeling Million-Scale Dependencies (Xu et al., 2023, arXiv 2302.06218).

One template, P(X) = M(X) X H, covers the token mixers for long sequences, and attention that is distributed over several
processors is the building block for dependencies over millions of tokens. A reconstruction: only the abstract and the table
of symbols were to be read. Ours are the template's exact form and how it is measured (`mixing_matrix`), the three ways
to distribute attention (`regard.ops.distributed`), and the language model around it.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from regard import checks, ops
from regard.flops import counted
from regard.layers import Mixer, SoftmaxAttention, sincos
from regard.ops.distributed import METHODS, Method, distributed_attention
from regard.ops.shards import LAYOUTS, Layout, shard_positions
from regard.registry import System, Variant, register_mixer, register_system
from regard.skeletons.decoder_lm import DecoderLM
from regard.systems.sequence._template import Mixing, mixing_matrix
from regard.systems.sequence._template_table import TEMPLATE_INSTANCES, template_table

__all__ = [
    "TEMPLATE_INSTANCES",
    "DiagonalSSM",
    "DistributedAttention",
    "FNet",
    "MillionLM",
    "Mixing",
    "mixing_matrix",
    "spread",
    "template_table",
]


@register_mixer("fnet")
class FNet(Mixer):
    r"""Fourier transforms along the sequence and the channels, without parameters (Lee-Thorp et al., 2021, 2105.03824, eq. 3).

    $$\mathrm{out} = \mathrm{Re}(F^s X F^h) = C^s X C^h - S^s X S^h$$

    C and S are the cosine and sine matrices, so that the template needs two terms. Over N log N products a channel, in
    float32 at least; the transform goes over all spatial axes.

    Args:
        dim: channels. num_heads: taken so that every mixer is built alike; there are none.
        scaled: divide by sqrt(N dim), so that numbers keep their size; the paper's transform is not scaled, and a
            layer norm follows.
    """

    has_heads: ClassVar[bool] = False

    def __init__(self, dim: int, num_heads: int = 1, *, scaled: bool = True) -> None:
        super().__init__()
        checks.positive("dim", dim)
        self.dim, self.num_heads, self.scaled = dim, num_heads, scaled

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape and dtype."""
        self.check(x)
        if x.shape[0] == 0:  # MKL refuses to transform nothing
            return torch.zeros_like(x)
        return counted(_transform_macs, self._transform, (x,), {})

    def _transform(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
        norm = "ortho" if self.scaled else "backward"
        return torch.fft.fftn(wide, dim=tuple(range(1, x.dim())), norm=norm).real.to(x.dtype)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, scaled={self.scaled}"


def _transform_macs(x: Tensor) -> int:
    """n log2 n products for the transform of n real numbers, as `ops.fft_conv` counts."""
    points = math.prod(x.shape[1:])
    return x.shape[0] * round(points * math.log2(max(points, 2)))


class _Recurrence(NamedTuple):
    """The discrete system: poles `(dim, N)` and read-out `(directions, dim, N)`, complex."""

    pole: Tensor
    read: Tensor


@register_mixer("diagonal_ssm")
class DiagonalSSM(Mixer):
    r"""A diagonal state space model as a long convolution (Gu et al., 2022, arXiv 2206.11893, S4D-Lin).

    $$y_t = \sum_{s \ge 0} K_s x_{t-s} + D x_t,\quad K_s = 2\,\mathrm{Re} \sum_n C_n \bar B_n e^{s \Delta A_n},\quad
      \bar B_n = (e^{\Delta A_n} - 1) / A_n,\quad \mathrm{out} = W_o\, y$$

    with $A_n = -1/2 + i \pi n$ at the start, for each channel. M is the Toeplitz matrix of K, one for each channel. Without
    `causal` a second kernel looks ahead, from the next position on. This is the linear core: S4D has an activation between y
    and W_o, with which the whole is not linear any more (mixer "s4d"). Kernels come from outer products of powers, so that
    no array of N times the length exists.

    Args:
        dim: channels. num_heads: taken so that every mixer is built alike; there are none.
        states: N, complex numbers that each channel remembers.
        causal: no position sees later ones.
    """

    dims: ClassVar[tuple[int, ...]] = (1,)
    can_causal: ClassVar[bool] = True
    can_stream: ClassVar[bool] = True
    has_heads: ClassVar[bool] = False

    def __init__(self, dim: int, num_heads: int = 1, *, states: int = 16, causal: bool = False) -> None:
        super().__init__()
        checks.positive("dim", dim)
        checks.positive("states", states)
        self.dim, self.num_heads, self.states, self.causal = dim, num_heads, states, causal
        self.log_step = nn.Parameter(torch.empty(dim).uniform_(math.log(1e-3), math.log(1e-1)))
        self.log_decay = nn.Parameter(torch.full((dim, states), math.log(0.5)))
        self.frequency = nn.Parameter((math.pi * torch.arange(states)).repeat(dim, 1))
        self.read = nn.Parameter(torch.randn(1 if causal else 2, dim, states, 2) / math.sqrt(2))
        self.skip = nn.Parameter(torch.ones(dim))
        self.proj = nn.Linear(dim, dim)

    def no_weight_decay(self) -> set[str]:
        """The poles."""
        return {"log_step", "log_decay", "frequency"}

    def _discrete(self) -> _Recurrence:
        wide = torch.promote_types(self.read.dtype, torch.float32)
        step, decay, frequency = (p.to(wide) for p in (self.log_step.exp(), self.log_decay.exp(), self.frequency))
        pole = torch.complex(-decay, frequency)  # A
        exponent = pole * step[:, None]
        return _Recurrence(exponent, 2 * torch.view_as_complex(self.read.to(wide)) * torch.expm1(exponent) / pole)

    def kernel(self, length: int) -> Tensor:
        """K for lags 0 to length - 1, `(directions, length, dim)`, by outer products of powers: no N x length array."""
        exponent, read = self._discrete()
        inner = min(length, 256)
        fine = torch.arange(inner, device=exponent.device, dtype=exponent.real.dtype)
        coarse = inner * torch.arange(-(-length // inner), device=exponent.device, dtype=exponent.real.dtype)
        near = torch.exp(exponent[..., None] * fine)  # (dim, N, inner)
        far = read[..., None, :] * torch.exp(exponent[:, None] * coarse[:, None])  # (directions, dim, outer, N)
        return (far @ near).real.flatten(-2)[..., :length].transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, N, dim)` -> the same shape."""
        (length,) = self.check(x)
        kernel = self.kernel(length)
        taps = kernel[0] if self.causal else torch.cat([kernel[1, : length - 1].flip(0), kernel[0]])
        return self.proj(ops.fft_conv(x, taps.to(x.dtype), causal=self.causal, skip=self.skip))

    def step(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One token `(B, dim)`; the state is `(B, dim, N)` complex."""
        if not self.causal:
            raise ValueError("a stream needs a causal mixer: build it with causal=True.")
        exponent, read = self._discrete()
        state = x[..., None] if state is None else torch.exp(exponent) * state + x[..., None]
        y = (read[0] * state).sum(-1).real + self.skip * x
        return self.proj(y.to(x.dtype)), state

    def state_size(self, length: int) -> int:
        """Constant: real and imaginary part of N states a channel."""
        return 2 * self.dim * self.states

    def extra_repr(self) -> str:
        return f"dim={self.dim}, states={self.states}, causal={self.causal}"


@register_mixer("distributed")
class DistributedAttention(SoftmaxAttention):
    """Multi-head softmax attention of a sequence that may be spread over processes.

    The function and the parameters are those of mixer "softmax". After `spread(model, group)` the input is this rank's
    shard, `(B, tokens, dim)` or a grid that is cut along its first axis, and the output is too; before, the whole sequence
    is here. So that data-parallel training does not take other samples for other tokens, the group has to be given.

    Args:
        dim, num_heads, kv_heads, qkv_bias, causal: as of `SoftmaxAttention`.
        method, layout: see `regard.ops.distributed.distributed_attention`.
    """

    group: dist.ProcessGroup | None = None

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        kv_heads: int | None = None,
        qkv_bias: bool = True,
        causal: bool = False,
        method: Method = "ring",
        layout: Layout = "contiguous",
    ) -> None:
        super().__init__(dim, num_heads, kv_heads=kv_heads, qkv_bias=qkv_bias, causal=causal)
        self.method, self.layout = checks.one_of("method", method, METHODS), checks.one_of("layout", layout, LAYOUTS)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
        """With the shards of the other ranks, if there are any."""
        if self.group is None:
            return super().attend(q, k, v, causal=causal)
        how: dict[str, Any] = {"method": self.method, "layout": self.layout, "group": self.group}
        flat = (x.flatten(1, -3) for x in (q, k, v))
        return distributed_attention(*flat, causal=causal, **how).unflatten(1, q.shape[1:-2])

    def step(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One token `(B, dim)`, on one process."""
        if self.group is not None:
            raise ValueError("a stream runs on one process: call spread(model, None) first.")
        return super().step(x, state)

    def __getstate__(self) -> dict[str, Any]:
        """Copies are not spread: groups of processes can be neither copied nor saved."""
        return {**self.__dict__, "group": None}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, method={self.method}, layout={self.layout}"


class MillionLM(DecoderLM):
    """A decoder whose context may be spread over processes: every rank holds its shard of the tokens, and all parameters.

    After `spread(model, group)` it maps this rank's tokens `(B, tokens)` to their logits; all else is by token. With `total`
    targets in the whole batch, `cross_entropy(logits, targets, reduction="sum") / total` is this rank's part of the
    loss; gradients, summed over ranks, are those of one process. To train it so:

        torchrun --nproc-per-node 2 -m regard.training.sequence_parallel --length 2048 --steps 100

    Args:
        vocab_size: number of different tokens. dim, depth, num_heads, kv_heads, mlp_ratio: as usual.
        method, layout: see `regard.ops.distributed.distributed_attention`; "zigzag" balances causal work.
    """

    group: dist.ProcessGroup | None = None

    def __init__(
        self,
        vocab_size: int = 256,
        dim: int = 512,
        depth: int = 8,
        num_heads: int = 8,
        kv_heads: int | None = None,
        mlp_ratio: float = 4.0,
        method: Method = "ring",
        layout: Layout = "zigzag",
        drop_path_rate: float = 0.0,
    ) -> None:
        def mixer(index: int) -> nn.Module:
            return DistributedAttention(dim, num_heads, kv_heads=kv_heads, causal=True, method=method, layout=layout)

        super().__init__(
            vocab_size,
            dim,
            mixer,
            depth=depth,
            mlp_ratio=mlp_ratio,
            position="sine",
            drop_path_rate=drop_path_rate,
        )
        self.layout: Layout = layout

    def _embed(self, tokens: Tensor, start: int) -> Tensor:
        if self.group is None:
            return super()._embed(tokens, start)
        x = self.embed(tokens) * self.embed_scale
        places = shard_positions(tokens.shape[1], layout=self.layout, group=self.group, device=x.device)
        return x + sincos(places, self.dim).to(x.dtype)

    def __getstate__(self) -> dict[str, Any]:
        """As of `DistributedAttention`."""
        return {**self.__dict__, "group": None}


def spread(model: nn.Module, group: dist.ProcessGroup | None) -> nn.Module:
    """From now on the sequences of `model` are spread over the processes of `group`; None: they are whole again.

    Tells every `DistributedAttention` and `MillionLM` in it. Whatever else mixes tokens has to be able to work on shards.
    """
    for module in model.modules():
        if isinstance(module, (DistributedAttention, MillionLM)):
            module.group = group
    return model


SYSTEM = register_system(
    System(
        slug="million_scale",
        title="A Unified View of Long-Sequence Models towards Modeling Million-Scale Dependencies",
        year=2023,
        arxiv="2302.06218",
        evidence="abstract_only",
        idea="Token mixers for long sequences as one template M(X) X H, and exact softmax attention whose sequence is spread "
        "over processes. Reconstruction: the template's exact form, the ways to distribute attention and the model "
        "are this library's.",
        mixers=("distributed", "fnet", "diagonal_ssm"),
        variants=(
            Variant(
                "million_lm",
                MillionLM,
                None,
                inputs=((1, 1024),),
                source="the paper publishes no model; this one is the library's",
            ),
        ),
        reports=(
            "Attention scaled up by almost 40x on four GeForce RTX 4090, against multi-head attention that writes out its "
            "L x L weights (abstract). More than 4x, so part of it is what one device gains by not writing them out",
            "Longer context improves results, depending on the application; plain Transformers make poor use of it (abstract; "
            "figures not read)",
        ),
    )
)
