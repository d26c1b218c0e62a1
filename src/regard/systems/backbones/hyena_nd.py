"""Hyena N-D: Multi-Dimensional Hyena for Spatial Inductive Bias (Zimerman and Wolf, 2023, arXiv 2309.13600).

Gates around a convolution as large as the map stand in for attention. A small network makes the kernel from coordinates, and
windows let it fade with distance. It looks into one quadrant; layers alternate the quadrant, or use all of them at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import checks, ops
from regard.checkpoint import KeyMap
from regard.layers import Block, Mixer, PatchEmbed, SoftmaxAttention, conv, split_qkv, vit_init
from regard.registry import CODE, System, Variant, image_variant, register_mixer, register_system
from regard.skeletons import Isotropic, Place, places
from regard.systems.backbones._hyena_kernels import DirectKernel, ImplicitKernel

DIRECTIONS = ("forward", "backward", "all", "all_projected", "parallel")


def _ours(name: str, value: Tensor) -> dict[str, Tensor]:
    """The authors' tensors in our layout."""
    if name.endswith("filter.positions"):
        value = value[0]
    elif name.endswith("filter.kernel"):
        value = value.permute(2, 3, 0, 1).flatten(2)
    elif name.endswith(("filter.freq", ".rates0", ".rates1", ".shift", "skip")):
        value = value.flatten()
    return split_qkv(name, value)


class HyenaState(NamedTuple):
    """What a stream remembers: the short convolution's last inputs `(B, 2, inner)`, all `(B, t, dim)` of each long one."""

    inputs: Tensor
    pasts: tuple[Tensor, ...] = ()


@register_mixer("hyena")
class HyenaND(Mixer):
    r"""Gates around long convolutions (section 3; Hyena, arXiv 2302.10866, definition 3.1, has one axis).

    $$[x_0, \dots, x_{n-1}, v] = \mathrm{DW}_3(W_{in}\,u),\quad v \leftarrow k_i * (v \odot x_i) + D_i (v \odot x_i)
      \text{ for } i = n-1 \dots 1,\quad \mathrm{out} = W_{out}(v \odot x_0)$$

    * is a convolution with zeros outside of the map, through `ops.fft_conv`: N log N products a channel. Its kernel reaches
    over the whole map, but only into the quadrant towards the first corner; see `directions`.

    Departures: maps may have 1 to 3 axes and any sides; the authors' must be the square that the operator was built for.
    The authors' code scales its spectra such that the kernels come out divided by twice the side of the map; here they do so
    with `authors_quirks` only. With more than one convolution, "backward" turns all of them, theirs the first only.

    Args:
        dim: channels. num_heads: taken so that every mixer is built alike; there are none.
        size: tokens along the longest side of the map, the unit in which the kernel fades.
        order: n, the number of gates; there are n - 1 long convolutions.
        kernel: "joint" or "product", see `ImplicitKernel`, with `hidden` channels; "direct" are free numbers.
        window: how the kernel fades, see `Window`.
        directions: "forward" looks towards the first corner, "backward" to the last. "all" looks into every quadrant with
            the same kernel and mixes them by one weight each, "all_projected" by a linear layer. "parallel" has as many
            groups of channels as there are quadrants, all of which look forward.
        dropout: of gated values. causal: nothing sees later positions along any axis.
        authors_quirks: as above; with direct kernels also one more, which nothing reads.
        axes: number of spatial axes.
    """

    can_causal: ClassVar[bool] = True
    can_stream: ClassVar[bool] = True
    has_heads: ClassVar[bool] = False
    authors_keys = KeyMap(
        rules=[
            (r"\bfilter_fn\.pos_emb\.z$", "filter.positions"),
            (r"\bfilter_fn\.bias$", "skip"),
            (r"\bfilter_fn\.X?implicit_filter\.1\.freq$", "filter.freq"),
            (r"\bfilter_fn\.X?implicit_filter\.", "filter.nets.0."),
            (r"\bfilter_fn\.Yimplicit_filter\.", "filter.nets.1."),
            (r"(\bnets\.\d)\.([0246])\.", lambda m: f"{m[1]}.{int(m[2]) // 2}."),
            (r"\bfilter_fn\.X?modulation\.", "filter.windows.0."),
            (r"\bfilter_fn\.Ymodulation\.", "filter.windows.1."),
            (r"\.X?deltas$", ".rates0"),
            (r"\.Ydeltas$", ".rates1"),
            (r"\bin_proj\.", "proj_in."),
            (r"\bout_proj\.", "proj_out."),
            (r"\bshort_filter\.", "short."),
            (r"\blinear_mix\.", "mix."),
            (r"(^|mixer\.)filter$", r"\1filter.kernel"),
            (r"(^|mixer\.)bias$", r"\1skip"),
        ],
        # One module of sines stands at several places of the authors' networks, and in their checkpoints under each name.
        drop=[r"\bpos_emb\.t$", r"_filter\.[35]\.freq$", r"Yimplicit_filter\.1\.freq$"],
        convert=_ours,
    )

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        size: int = 14,
        order: int = 2,
        kernel: str = "joint",
        hidden: int = 64,
        window: str = "standard",
        directions: str = "forward",
        dropout: float = 0.0,
        causal: bool = False,
        authors_quirks: bool = False,
        axes: int = 2,
    ) -> None:
        super().__init__()
        for name, number in (("dim", dim), ("size", size), ("hidden", hidden)):
            checks.positive(name, number)
        if order < 2:
            raise ValueError(f"order must be at least 2, so that there is a long convolution, got {order}.")
        checks.one_of("kernel", kernel, ("joint", "product", "direct"))
        self.directions = checks.one_of("directions", directions, DIRECTIONS)
        if causal and directions != "forward":
            raise ValueError(f"a causal mixer looks back only: directions must be 'forward', got {directions!r}.")
        self.dim, self.num_heads, self.axes, self.order, self.causal = dim, num_heads, axes, order, causal
        self.groups = 2**axes if directions == "parallel" else 1
        self.authors_quirks = authors_quirks
        inner, kernels = (order + 1) * dim, order if kernel == "direct" and authors_quirks else order - 1
        self.proj_in = nn.Linear(dim, inner)
        self.short = conv(axes)(inner, inner * self.groups, 3, padding=0 if causal else 1, groups=inner)
        self.filter: nn.Module
        if kernel == "direct":
            self.filter = DirectKernel(kernels * dim, size, axes)
        else:
            self.filter = ImplicitKernel(
                kernels * dim, size, axes, joint=kernel == "joint", hidden=hidden, window=window
            )
        self.skip = nn.Parameter(torch.randn(kernels * dim))
        self.dropout = nn.Dropout(dropout)
        self.turns = self._turns()
        if directions == "all":
            self.mix: nn.Module = nn.Linear(len(self.turns), 1)
        elif directions == "all_projected":
            self.mix = nn.Linear(len(self.turns) * dim, dim)
        self.proj_out = nn.Linear(dim * self.groups, dim)

    def _turns(self) -> list[tuple[int, ...]]:
        """The axes (of a batched grid) that are reversed around the convolution, for each quadrant that is looked into."""
        everything = tuple(range(1, 1 + self.axes))
        if self.directions == "backward":
            return [everything]
        if not self.directions.startswith("all"):
            return [()]
        between = [turn for n in range(1, self.axes) for turn in itertools.combinations(everything[::-1], n)]
        return [(), everything, *between]

    @classmethod
    def in_stack(cls, index: int, input_size: tuple[int, ...], dim: int, num_heads: int, **options: Any) -> Mixer:
        """Even blocks look backward and odd ones forward (the authors' "seq"), causal ones forward always."""
        options.setdefault("size", max(input_size))
        if not options.get("causal"):
            options.setdefault("directions", "forward" if index % 2 else "backward")
        return cls(dim, num_heads, axes=len(input_size), **options)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        spatial = self.check(x)
        u = self.proj_in(x)
        u = self.short(F.pad(u, (0, 0) + (2, 0) * self.axes) if self.causal else u)
        parts = u.unflatten(-1, (self.groups, self.order + 1, self.dim)).unbind(-2)
        *gates, v = (part.flatten(-2) for part in parts)  # (B, *S, groups dim)
        kernel = self.filter(spatial)
        if self.authors_quirks:
            kernel = kernel / (2 * spatial[-1])
        kernels, skips = (t.unflatten(-1, (-1, self.dim)).unbind(-2) for t in (kernel, self.skip))
        outs = [self._gated(gates, v, kernels, skips, turn) for turn in self.turns]
        if self.directions == "all":
            y = self.mix(torch.stack(outs, -1)).squeeze(-1)
        elif self.directions == "all_projected":
            y = self.mix(torch.stack(outs, -1).flatten(-2))
        else:
            (y,) = outs
        return self.proj_out(y)

    def _gated(
        self,
        gates: Sequence[Tensor],
        v: Tensor,
        kernels: Sequence[Tensor],
        skips: Sequence[Tensor],
        turn: tuple[int, ...],
    ) -> Tensor:
        """All gates, with long convolutions of a map that is reversed along the axes in `turn`."""
        for gate, kernel, skip in zip(gates[:0:-1], kernels, skips, strict=False):
            v = self.dropout(v * gate)
            v = v.flip(turn) if turn else v
            v = ops.fft_conv(v, torch.cat([kernel] * self.groups, -1), causal=True, skip=skip.repeat(self.groups))
            v = v.flip(turn) if turn else v
        return v * gates[0]

    def step(self, x: Tensor, state: HyenaState | None = None) -> tuple[Tensor, HyenaState]:
        """One token `(B, dim)` of a causal sequence: each long convolution is one sum over all that it has seen.

        Raises:
            ValueError: unless the mixer is causal and has one axis; with `authors_quirks`, whose kernels depend on the length.
        """
        if not self.causal or self.axes != 1 or self.authors_quirks:
            raise ValueError(
                "a stream needs a causal mixer on sequences, without the authors' scale by the length: build it with "
                f"causal=True, axes=1, authors_quirks=False; got {self.causal}, {self.axes}, {self.authors_quirks}."
            )
        u = self.proj_in(x)[:, None]
        state = HyenaState(u.new_zeros(len(u), 2, u.shape[-1])) if state is None else state
        seen = torch.cat([state.inputs, u], 1)
        *gates, v = self.short(seen).squeeze(1).chunk(self.order + 1, -1)
        pasts = list(state.pasts) or [v.new_zeros(len(v), 0, self.dim)] * (self.order - 1)
        kernels = self.filter((pasts[0].shape[1] + 1,)).unflatten(-1, (-1, self.dim)).unbind(-2)
        for index, (gate, kernel, skip) in enumerate(
            zip(gates[:0:-1], kernels, self.skip.split(self.dim), strict=True)
        ):
            v = self.dropout(v * gate)
            pasts[index] = torch.cat([pasts[index], v[:, None]], 1)
            reached = pasts[index][:, -len(kernel) :]  # free numbers may be fewer than tokens
            v = (reached.flip(1) * kernel).sum(1) + skip * v
        return self.proj_out(v * gates[0]), HyenaState(seen[:, 1:], tuple(pasts))

    def state_size(self, length: int) -> int:
        """Every token's input of every long convolution, and the last two of the short one."""
        return (self.order - 1) * self.dim * length + 2 * (self.order + 1) * self.dim

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, order={self.order}, directions={self.directions}, causal={self.causal}, axes={self.axes}"
        )


class HyenaDeiT(Isotropic):
    """A vision transformer without class token whose blocks mix by `HyenaND`, all or some of them.

    Patches, learned positions, blocks at one resolution, LayerNorm, and a linear layer on the first token.

    Args:
        attention_blocks: blocks (0, 1, ...) that attend instead, with `num_heads` heads. The paper's hybrid has Hyena first.
        directions: as in `HyenaND`, or "alternate": even blocks look backward and odd ones forward.
        order, kernel, hidden, window, authors_quirks: as in `HyenaND`.
        pool: the classifier reads the "first" token, as released, or the "mean".
        patch_size: pixels per token. img_size: fixes positions and kernels; other sizes run too.
    """

    authors_keys = KeyMap(
        rules=[(r"^patch_embed\.", "stem."), (r"\.attn\.", ".mixer."), *HyenaND.authors_keys.rules],
        drop=HyenaND.authors_keys.drop,
        convert=_ours,
    )

    def __init__(
        self,
        dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        attention_blocks: Sequence[int] = (),
        directions: str = "alternate",
        order: int = 2,
        kernel: str = "joint",
        hidden: int = 64,
        window: str = "standard",
        authors_quirks: bool = False,
        pool: str = "first",
        mlp_ratio: float = 4.0,
        patch_size: int = 16,
        img_size: int = 224,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        checks.one_of("pool", pool, ("first", "mean"))
        if any(not 0 <= block < depth for block in attention_blocks):
            raise ValueError(f"attention_blocks must lie in 0..{depth - 1}, got {tuple(attention_blocks)}.")
        hyena: dict[str, Any] = {"order": order, "kernel": kernel, "hidden": hidden, "window": window}
        hyena |= {"authors_quirks": authors_quirks}
        hyena |= {"directions": directions} if directions != "alternate" else {}

        def mixer(at: Place) -> Mixer:
            if at.index in attention_blocks:
                return SoftmaxAttention(dim, num_heads)
            return HyenaND.in_stack(at.index, at.grid, dim, num_heads, **hyena)

        norm = partial(nn.LayerNorm, eps=1e-6)
        (stage,) = places([dim], [depth], [num_heads], [patch_size], img_size, drop_path_rate)
        super().__init__(
            stem=PatchEmbed(in_chans, dim, patch_size, norm=False),
            blocks=[Block(dim, mixer(at), mlp_ratio=mlp_ratio, norm=norm, drop_path=at.drop_path) for at in stage],
            dim=dim,
            grid=stage[0].grid,
            stride=patch_size,
            num_classes=num_classes,
            in_chans=in_chans,
            norm=norm(dim),
            position=True,
        )
        self.pool = pool
        self.apply(vit_init)

    def no_weight_decay(self) -> set[str]:
        """The position table, and the codes of positions that kernels are made from."""
        return {"pos_embed", *(name for name, _ in self.named_parameters() if name.endswith("filter.positions"))}

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Normalised tokens `(B, H, W, dim)` -> logits `(B, num_classes)`, or `(B, dim)` before the classifier."""
        x = self.head_norm(x[:, 0, 0] if self.pool == "first" else x.mean((1, 2)))
        return x if pre_logits else self.head(x)


def _operator(name: str, params: int, **options: Any) -> Variant:
    """The operator alone, of 192 channels on maps of 14 x 14."""
    return Variant(f"hyena_nd_{name}", HyenaND, params, None, ((1, 14, 14, 192),), CODE, {"dim": 192, **options})


def _deit(size: str, dim: int, num_heads: int, counts: Sequence[int]) -> list[Variant]:
    """A DeiT of one size with Hyena of both kinds, with Hyena in blocks 0 to 6 and attention after, and with attention."""
    kinds: dict[str, dict[str, Any]] = {
        "": {},
        "_product": {"kernel": "product"},
        "_hybrid": {"attention_blocks": tuple(range(7, 12))},
        "_attention": {"attention_blocks": tuple(range(12))},
    }
    return [
        image_variant(
            f"hyena_deit_{size}{kind}", HyenaDeiT, count, None, source=CODE, dim=dim, num_heads=num_heads, **o
        )
        for (kind, o), count in zip(kinds.items(), counts, strict=True)
    ]


SYSTEM = register_system(
    System(
        slug="hyena_nd",
        title="Multi-Dimensional Hyena for Spatial Inductive Bias",
        year=2023,
        arxiv="2309.13600",
        evidence="authors_code",
        repo="Itamarzimm/HyenaND",
        idea="Gates around a convolution as large as the map, whose kernel is a function of coordinates that fades.",
        mixers=("hyena",),
        variants=(
            _operator("product", 196_010, kernel="product"),
            _operator("joint", 175_338),
            _operator("all_directions", 175_343, directions="all"),
            _operator("all_directions_projected", 322_986, directions="all_projected"),
            _operator("parallel", 303_210, directions="parallel"),
            _operator("direct", 229_632, kernel="direct", authors_quirks=True),  # the count has a kernel without use
            *_deit("tiny", 192, 3, (6_042_400, 6_290_464, 5_906_830, 5_717_032)),
            *_deit("small", 384, 6, (22_594_144, 22_989_664, 22_367_374, 22_049_896)),
            *_deit("base", 768, 12, (87_548_128, 88_238_560, 87_138_958, 86_566_120)),
        ),
        reports=(
            "better than attention in ViT, DeiT and Swin on CIFAR-100, Tiny ImageNet, CelebA, ImageNet-100 and ImageNet-1K "
            "(abstract and paper; figures not restated here)",
            "Hyena in the first half of the layers and attention in the second is better than either alone (abstract)",
        ),
    )
)
