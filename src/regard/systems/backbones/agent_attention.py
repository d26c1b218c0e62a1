"""Agent Attention: On the Integration of Softmax and Linear Attention (Han et al., 2023, arXiv 2312.08874).

A few agent tokens, pooled from the queries, gather from all keys with one softmax; every query reads from the agents
with a second one: a linear attention whose feature maps depend on the data, of cost N n instead of N².
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import checks, ops
from regard.checkpoint import KeyMap
from regard.layers import (
    CrossShaped,
    Mixer,
    ProjectedCore,
    SoftmaxAttention,
    SpatialReductionAttention,
    depthwise,
    heads_of,
    resize_map,
)
from regard.registry import README_FLOPS, System, image_variant, register_mixer, register_system
from regard.skeletons import PVT, CSWinPyramid, DeiT, Place, SwinPyramid
from regard.systems.backbones.swin import WindowAttention

_POOL = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


class AgentBias(nn.Module):
    """The paper's agent biases, B₁ for gathering and B₂ for reading, for any grid.

    Each is a coarse map of `base` places per axis for every head and agent, interpolated to the grid, plus one line for
    each axis, broadcast over the others, plus an entry of its own for the class token.

    Args:
        input_size: grid whose lines are learned; on other grids they are interpolated. None leaves the lines out, so
            that nothing depends on the size.
    """

    def __init__(
        self,
        num_heads: int,
        num_agents: int,
        *,
        axes: int = 2,
        input_size: Sequence[int] | None = None,
        class_token: bool = False,
        base: int = 7,
    ) -> None:
        super().__init__()
        shape = (num_heads, num_agents)

        def table(*size: int) -> nn.Parameter:
            return nn.Parameter(nn.init.trunc_normal_(torch.empty(*shape, *size), std=0.02))

        self.gather_map, self.read_map = table(*[base] * axes), table(*[base] * axes)
        self.gather_lines = nn.ParameterList(table(length) for length in input_size or ())
        self.read_lines = nn.ParameterList(table(length) for length in input_size or ())
        self.gather_class = table() if class_token else None
        self.read_class = table() if class_token else None

    def forward(self, spatial: Sequence[int]) -> tuple[Tensor, Tensor]:
        """B₁ `(heads, agents, N)` and B₂ `(heads, N, agents)` for a grid of N tokens; one more with a class token."""
        gather = self._over(spatial, self.gather_map, self.gather_lines, self.gather_class)
        read = self._over(spatial, self.read_map, self.read_lines, self.read_class)
        return gather, read.transpose(1, 2)

    def _over(self, spatial: Sequence[int], map_: Tensor, lines: nn.ParameterList, first: Tensor | None) -> Tensor:
        bias = resize_map(map_, spatial)  # (heads, agents, *spatial)
        for axis, line in enumerate(lines):
            shape = [1] * len(spatial)
            shape[axis] = spatial[axis]
            bias = bias + resize_map(line, spatial[axis : axis + 1]).unflatten(2, shape)
        bias = bias.flatten(2)
        return bias if first is None else torch.cat([first[..., None], bias], 2)


class AgentCore(nn.Module):
    r"""The paper's agent attention module on given q, k and v.

    $$A = \mathrm{pool}(Q),\quad
      O = \mathrm{softmax}(d^{-1/2} Q A^\top + B_2)\;\mathrm{softmax}(d^{-1/2} A K^\top + B_1)\,V + \mathrm{DWConv}(V)$$

    Agents are averages of q over boxes of the grid, taken before the heads are split; the class token is in no box and
    outside of the convolution, but is gathered from and reads. Arguments as in `AgentAttention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        agent_size: Sequence[int],
        input_size: Sequence[int] | None = None,
        class_token: bool = False,
        bias: bool = True,
        local: bool = True,
    ) -> None:
        super().__init__()
        self.head_dim, self.num_heads, self.agent_size = heads_of(dim, num_heads), num_heads, tuple(agent_size)
        axes, agents = len(agent_size), math.prod(agent_size)
        self.bias = (
            AgentBias(num_heads, agents, axes=axes, input_size=input_size, class_token=class_token) if bias else None
        )
        self.local = depthwise(dim, 3, dims=axes) if local else None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, first: tuple[Tensor, ...] | None = None) -> Any:
        """Grids `(B, *S, dim)` -> the same shape.

        With `first`, the q, k and v `(B, 1, dim)` of a class token, also its output.
        """
        spatial = q.shape[1:-1]
        agents = _POOL[len(spatial)](q.movedim(-1, 1), self.agent_size).flatten(2).transpose(1, 2)
        gather, read = (None, None) if self.bias is None else self.bias(spatial)
        tokens = [t.flatten(1, -2) for t in (q, k, v)]
        if first is not None:
            tokens = [torch.cat([one, rest], 1) for one, rest in zip(first, tokens, strict=True)]
        heads = [t.unflatten(-1, (self.num_heads, self.head_dim)) for t in (tokens[0], agents, tokens[1], tokens[2])]
        out = ops.landmark_attention(*heads, gather_bias=gather, read_bias=read).flatten(-2)
        grid = out[:, out.shape[1] - math.prod(spatial) :].unflatten(1, spatial)
        if self.local is not None:
            grid = grid + self.local(v)
        return grid if first is None else (grid, out[:, :1])

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, agent_size={self.agent_size}"


def _bias_tables(name: str, value: Tensor) -> dict[str, Tensor]:
    """The authors' bias tables, which carry axes for broadcasting, in our layout `(heads, agents, ...)`."""
    home, _, last = name.rpartition(".")
    if not last.endswith("_bias"):
        return {name: value}
    ours, table = {
        "an_bias": ("gather_map", lambda t: t),
        "na_bias": ("read_map", lambda t: t),
        "ah_bias": ("gather_lines.0", lambda t: t[0, :, :, :, 0]),
        "aw_bias": ("gather_lines.1", lambda t: t[0, :, :, 0]),
        "ha_bias": ("read_lines.0", lambda t: t[0, :, :, 0].transpose(1, 2)),
        "wa_bias": ("read_lines.1", lambda t: t[0, :, 0].transpose(1, 2)),
        "ac_bias": ("gather_class", lambda t: t[0, :, :, 0]),
        "ca_bias": ("read_class", lambda t: t[0, :, 0]),
    }[last]
    return {f"{home}.bias.{ours}".lstrip("."): table(value)}


_CORE = (r"(^|\.)(dwc|an_bias|na_bias|ah_bias|aw_bias|ha_bias|wa_bias|ac_bias|ca_bias)(\.|$)", r"\1core.\2\3")
_LOCAL = (r"\.dwc\.", ".local.")
_KEYS = KeyMap(rules=(_CORE, _LOCAL), convert=_bias_tables)


@register_mixer("agent")
class AgentAttention(ProjectedCore):
    """Agent attention with its projections, for 1, 2 or 3 spatial axes: out = W_o `AgentCore`(x W_q, x W_k, x W_v).

    Args:
        agent_size: agents along each axis (the paper's n is their product); None is about 49 in all.
        input_size: the usual grid, for which position biases are learned place by place; other grids interpolate them.
            None learns a coarse map only.
        axes: number of spatial axes, if `input_size` does not say it.
        class_token: `forward` takes and gives a class token beside the grid.
        bias, local: leave out the agent biases, or the convolution of the values (the paper's ablations).
        joint_qkv: one matrix for q, k and v; otherwise one for q and one for k and v (as PVT has).
    """

    authors_keys = _KEYS

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        agent_size: int | Sequence[int] | None = None,
        input_size: Sequence[int] | None = None,
        axes: int = 2,
        class_token: bool = False,
        bias: bool = True,
        local: bool = True,
        qkv_bias: bool = True,
        joint_qkv: bool = True,
    ) -> None:
        axes = axes if input_size is None else len(input_size)
        checks.one_of("axes", str(axes), ("1", "2", "3"))
        agents = checks.tuple_of("agent_size", _side(axes) if agent_size is None else agent_size, axes)
        core = AgentCore(
            dim,
            num_heads,
            agent_size=agents,
            input_size=None if input_size is None else checks.tuple_of("input_size", input_size, axes),
            class_token=class_token,
            bias=bias,
            local=local,
        )
        super().__init__(
            dim, num_heads, core, axes=axes, class_token=class_token, qkv_bias=qkv_bias, joint_qkv=joint_qkv
        )

    @classmethod
    def in_stack(cls, index: int, input_size: tuple[int, ...], dim: int, num_heads: int, **options: Any) -> Mixer:
        """Biases for this grid; at most one agent for two tokens along each axis."""
        size = options.pop("agent_size", None)
        agents = checks.tuple_of("agent_size", _side(len(input_size)) if size is None else size, len(input_size))
        agents = tuple(min(side, -(-length // 2)) for side, length in zip(agents, input_size, strict=True))
        return cls(dim, num_heads, agent_size=agents, **{"input_size": input_size, **options})


def _side(axes: int) -> int:
    """Agents along each axis that make about 49 in all: 49, 7 or 4."""
    return round(49 ** (1 / axes))


class _AgentHost:
    """What the four hosted models share."""

    def no_weight_decay(self) -> set[str]:
        """Besides the host's: all position biases."""
        tables = {name for name, _ in self.named_parameters() if ".bias." in name}  # type: ignore[attr-defined]
        return super().no_weight_decay() | tables  # type: ignore[misc]


class AgentDeiT(_AgentHost, DeiT):
    """DeiT with agent attention in its first blocks, softmax attention in the rest.

    Args:
        agent_size: √n, agents along each axis. agent_blocks: how many blocks have agents, counted from the first.
    """

    authors_keys = KeyMap(rules=(*DeiT.host_rules, _CORE, _LOCAL), convert=_bias_tables)

    def __init__(self, agent_size: int = 7, agent_blocks: int = 12, **host: Any) -> None:
        def mixer(at: Place) -> nn.Module:
            if at.index >= agent_blocks:
                return SoftmaxAttention(at.dim, at.num_heads)
            return AgentAttention(at.dim, at.num_heads, agent_size=agent_size, input_size=at.grid, class_token=True)

        super().__init__(mixer=mixer, **host)

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Split q, k and v of the softmax blocks, which keep q apart."""
        own = self.state_dict()
        for key in [key for key in state if ".qkv." in key and key not in own]:
            q, kv = state.pop(key).tensor_split([self.num_features])
            state |= {key.replace(".qkv.", ".q."): q, key.replace(".qkv.", ".kv."): kv}
        return state


class AgentPVT(_AgentHost, PVT):
    """PVT with agent attention (without spatial reduction of the keys) in the first blocks of each stage.

    Args:
        agent_size: agents along each axis (√n) of each stage.
        agent_blocks: how many blocks of each stage have agents; the others have PVT's own attention, whose keys are
            reduced by `reductions`.
    """

    authors_keys = KeyMap(rules=(*PVT.host_rules, _CORE, _LOCAL), convert=_bias_tables)

    def __init__(
        self,
        agent_size: Sequence[int] = (3, 4, 7, 7),
        agent_blocks: Sequence[int] | None = None,
        reductions: Sequence[int] = (8, 4, 2, 1),
        **host: Any,
    ) -> None:
        def mixer(at: Place) -> nn.Module:
            if agent_blocks is not None and at.index >= agent_blocks[at.stage]:
                return SpatialReductionAttention(at.dim, at.num_heads, reduction=reductions[at.stage])
            size = agent_size[at.stage]
            return AgentAttention(at.dim, at.num_heads, agent_size=size, input_size=at.grid, joint_qkv=False)

        super().__init__(mixer=mixer, **host)


class AgentSwin(_AgentHost, SwinPyramid):
    """Swin with agent attention over the whole map in the first blocks of each stage, (shifted) windows in the others.

    Args:
        agent_size, agent_blocks: as in `AgentPVT`. window_size: of the blocks with windows.
    """

    authors_keys = KeyMap(
        rules=(*SwinPyramid.host_rules, _CORE, _LOCAL), drop=SwinPyramid.host_drop, convert=_bias_tables
    )

    def __init__(
        self,
        agent_size: Sequence[int] = (3, 4, 7, 7),
        agent_blocks: Sequence[int] = (2, 2, 6, 0),
        window_size: int = 7,
        **host: Any,
    ) -> None:
        def mixer(at: Place) -> nn.Module:
            if at.index >= agent_blocks[at.stage]:
                window = min(window_size, *at.grid)
                return WindowAttention(at.dim, at.num_heads, window_size=window, shift=at.index % 2 == 1)
            return AgentAttention(at.dim, at.num_heads, agent_size=agent_size[at.stage], input_size=at.grid)

        super().__init__(mixer=mixer, **host)


class AgentCSWin(_AgentHost, CSWinPyramid):
    """CSWin with agent attention over the whole map in the first blocks of each stage, cross-shaped windows in others.

    Args:
        agent_size, agent_blocks: as in `AgentPVT`. stripes: width of the stripes of each stage, None for the whole map.
    """

    authors_keys = KeyMap(rules=(*CSWinPyramid.host_rules, _LOCAL), convert=_bias_tables)

    def __init__(
        self,
        agent_size: Sequence[int] = (3, 4, 7, 7),
        agent_blocks: Sequence[int] = (2, 4, 0, 0),
        stripes: Sequence[int | None] = (1, 2, 7, None),
        **host: Any,
    ) -> None:
        def mixer(at: Place) -> nn.Module:
            if at.index >= agent_blocks[at.stage]:
                return CrossShaped(at.dim, at.num_heads, stripe=stripes[at.stage])
            return cross_shaped_agents(at.dim, at.num_heads, agent_size=agent_size[at.stage], input_size=at.grid)

        super().__init__(mixer=mixer, **host)


def cross_shaped_agents(
    dim: int, num_heads: int, *, agent_size: int, input_size: tuple[int, int], stripe: int | None = None
) -> CrossShaped:
    """Agent attention inside CSWin's stripes, each branch with biases of its stripes' shape; None is the whole map."""
    height, width = input_size
    shapes = iter([input_size] if stripe is None else [(height, stripe), (stripe, width)])

    def branch(channels: int, heads: int) -> nn.Module:
        return AgentCore(channels, heads, agent_size=(agent_size, agent_size), input_size=next(shapes))

    return CrossShaped(dim, num_heads, stripe=stripe, branch=branch)


_DEIT_S = {"dim": 384, "num_heads": 6}
_DEIT_B = {"dim": 768, "num_heads": 12, "agent_size": 9, "agent_blocks": 4}
_SWIN_S = {"depths": (2, 2, 18, 2), "agent_blocks": (2, 2, 0, 0)}
_SWIN_B = {"dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32), "agent_blocks": (2, 2, 2, 0)}
_CSWIN_S = {"depths": (3, 6, 29, 2), "agent_blocks": (3, 6, 0, 0)}
_CSWIN_B = {**_CSWIN_S, "dim": 96, "num_heads": (4, 8, 16, 32)}


SYSTEM = register_system(
    System(
        slug="agent_attention",
        title="Agent Attention: On the Integration of Softmax and Linear Attention",
        year=2023,
        arxiv="2312.08874",
        evidence="authors_code",
        repo="LeapLabTHU/Agent-Attention",
        idea="A few agents, pooled from the queries, gather from all keys; every query then reads from the agents.",
        mixers=("agent",),
        variants=(
            image_variant("agent_deit_tiny", AgentDeiT, 6_015_640, 1.176),
            image_variant("agent_deit_small", AgentDeiT, 22_647_112, 4.443, 0.1, **_DEIT_S),
            image_variant(
                "agent_deit_small_448", AgentDeiT, 23_070_472, 17.7, 0.0, 448, source=README_FLOPS, **_DEIT_S
            ),
            image_variant("agent_deit_base", AgentDeiT, 87_204_904, 17.552, 0.3, **_DEIT_B),
            image_variant("agent_pvt_tiny", AgentPVT, 11_570_352, 2.000, 0.1),
            image_variant("agent_pvt_small", AgentPVT, 20_635_066, 3.978, 0.1, depths=(3, 4, 6, 3)),
            image_variant("agent_pvt_medium", AgentPVT, 35_921_746, 7.035, 0.3, depths=(3, 4, 18, 3)),
            image_variant(
                "agent_pvt_medium_256", AgentPVT, 36_083_682, 9.2, 0.3, 256, source=README_FLOPS, depths=(3, 4, 18, 3)
            ),
            image_variant("agent_pvt_large", AgentPVT, 48_738_180, 10.390, 0.3, depths=(3, 8, 27, 3)),
            image_variant("agent_swin_tiny", AgentSwin, 28_902_964, 4.528, 0.2),
            image_variant("agent_swin_small", AgentSwin, 49_666_684, 8.733, 0.3, **_SWIN_S),
            image_variant(
                "agent_swin_small_288",
                AgentSwin,
                49_707_964,
                14.6,
                0.3,
                288,
                source=README_FLOPS,
                **_SWIN_S,
                window_size=9,
            ),
            image_variant("agent_swin_base", AgentSwin, 88_095_096, 15.444, 0.5, **_SWIN_B),
            image_variant(
                "agent_swin_base_384",
                AgentSwin,
                88_305_016,
                46.3,
                0.5,
                384,
                source=README_FLOPS,
                **_SWIN_B,
                window_size=12,
            ),
            image_variant("agent_cswin_tiny", AgentCSWin, 20_458_672, 4.315, 0.2),
            image_variant("agent_cswin_small", AgentCSWin, 32_814_100, 6.8, 0.4, 224, source=README_FLOPS, **_CSWIN_S),
            image_variant("agent_cswin_base", AgentCSWin, 73_249_696, 14.9, 0.5, 224, source=README_FLOPS, **_CSWIN_B),
            image_variant(
                "agent_cswin_base_384",
                AgentCSWin,
                73_328_416,
                46.3,
                0.7,
                384,
                source=README_FLOPS,
                **_CSWIN_B,
                stripes=(1, 2, 12, None),
            ),
        ),
        reports=(
            "ImageNet-1K top-1 against the host at about equal FLOPs: DeiT-T 72.2 -> 74.9, PVT-T 75.1 -> 78.4, "
            "PVT-S 79.8 -> 82.2, Swin-T 81.3 -> 82.6, CSWin-T 82.7 -> 83.1",
            "AgentSD on Stable Diffusion 1.5, 512 px, RTX 4090: FID 28.84, 2.62 s, 3.13 GB -> 28.15, 1.54 s, 1.55 GB "
            "with 40 % of the tokens merged (ToMeSD: 28.74, 1.71 s, 1.69 GB)",
        ),
    )
)
