"""MoH: Multi-Head Attention as Mixture-of-Head Attention (Jin et al., 2024, arXiv 2410.11842).

Multi-head attention is a sum over heads. MoH weights the summands for each token: a few shared heads are always on, of
the others a router keeps those that matter to the token. It takes the place of attention in image classifiers
(TransNeXt), diffusion transformers (DiT) and language models (LLaMA), trained ones included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from regard import checks, ops
from regard.checkpoint import KeyMap
from regard.layers import Mixer, heads_of
from regard.layers.rotary import rotate, sequence_angles
from regard.registry import System, Variant, image_variant, register_mixer, register_system
from regard.skeletons import DiT, Llama, Place
from regard.systems.backbones._head_routing import HeadRouter, QueryNormRouter, attend_where_active, head_split
from regard.systems.backbones._moh_tuning import to_moh as to_moh
from regard.systems.backbones._transnext import TransNeXt

Router = Literal["learned", "query_norm"]
Cache = tuple[Tensor, Tensor]
"""Keys and values so far, each `(B, t, kv_heads, head_dim)`."""

ROUTER_NAMES = ((r"\bwg\.", "router.routed."), (r"\bwg_0\.", "router.between."), (r"\bwg_1\.", "router.shared."))
"""The authors' names of the routers' maps."""


def _split_qkv(name: str, value: Tensor) -> dict[str, Tensor]:
    if not name.endswith(("qkv.weight", "qkv.bias")):
        return {name: value}
    return {name.replace("qkv", part): tensor for part, tensor in zip("qkv", value.chunk(3), strict=True)}


@register_mixer("moh")
class MoHAttention(Mixer):
    r"""Multi-head attention as a sum over heads, weighted for each token by a router (section 3).

    $$\mathrm{out} = b + \sum_{i=1}^{h} g_i(x)\,\mathrm{softmax}(d^{-1/2} Q_i K_i^\top)\,V_i\,W_i$$

    with g_i = 0 for all but the shared heads and `routed_heads` of the others. With `context`, keys and values come from
    there; queries and gates from x. Any split of heads works; the released DiT fails with one shared head, and the released
    LLaMA masks rightly only for as many shared heads as routed ones.

    Args:
        dim: channels. num_heads: divides dim, unless `head_dim` is given.
        shared_heads: the first of the heads, always on; None is half of all.
        routed_heads: how many of the other heads a token keeps; None is a quarter of all heads.
        router: "learned" (`HeadRouter`), or "query_norm" (`QueryNormRouter`), without parameters, for trained models.
        kv_heads: fewer heads for keys and values, each serving several.
        rope_base: rotate queries and keys by their place in a sequence (in LLaMA's order of channels); None does not.
        balance: weight of the routers' load balance loss in training. It comes with the gradient of this layer; the
            authors take the mean over layers, so models divide it by their number.
        rescale: active gates have mean 1, as released; False is the paper's equations (see `HeadRouter`).
        sparse: compute routed heads for the tokens that keep them only (`attend_where_active`), not for compilation: its
            sizes depend on the data. The result is the same; in training with "query_norm", heads that a token leaves
            out then give its router no gradient. By default, as released, everything is computed and then weighted.
    """

    can_causal: ClassVar[bool] = True
    can_cross: ClassVar[bool] = True
    can_stream: ClassVar[bool] = True
    can_mask: ClassVar[bool] = True
    authors_keys = KeyMap(
        rules=(*ROUTER_NAMES, (r"\b([qkv])_proj\.", r"\1."), (r"\bo_proj\.", "proj.")), convert=_split_qkv
    )

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        shared_heads: int | None = None,
        routed_heads: int | None = None,
        router: Router = "learned",
        head_dim: int | None = None,
        kv_heads: int | None = None,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        rope_base: float | None = None,
        causal: bool = False,
        balance: float = 0.01,
        rescale: bool = True,
        sparse: bool = False,
    ) -> None:
        super().__init__()
        checks.positive("num_heads", num_heads)
        self.head_dim = heads_of(dim, num_heads) if head_dim is None else head_dim
        self.dim, self.num_heads, self.kv_heads = dim, num_heads, kv_heads or num_heads
        self.causal, self.sparse, self.rope_base = causal, sparse, rope_base
        checks.divisible("num_heads", num_heads, "kv_heads", self.kv_heads)
        if rope_base is not None:
            checks.divisible("head_dim", self.head_dim, "the size of a rotated pair", 2)
            self.axes = 1
        width, kv_width = num_heads * self.head_dim, self.kv_heads * self.head_dim
        self.q = nn.Linear(dim, width, bias=qkv_bias)
        self.k, self.v = (nn.Linear(dim, kv_width, bias=qkv_bias) for _ in range(2))
        self.proj = nn.Linear(width, dim, bias=proj_bias)
        shared, routed = head_split(num_heads, shared_heads, routed_heads)
        self.router: HeadRouter | QueryNormRouter
        if checks.one_of("router", router, ("learned", "query_norm")) == "learned":
            self.router = HeadRouter(dim, num_heads, shared, routed, balance=balance, rescale=rescale)
        else:
            self.router = QueryNormRouter(num_heads, shared, routed, balance=balance)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """`(B, *S, dim)` -> the same shape.

        Args:
            context: `(B, *S_c, dim)`. mask: boolean over the keys `(B, *S)` or `(B, *S_c)`, False at padding.
        """
        self.check(x)
        if context is not None and (self.causal or self.rope_base is not None):
            raise ValueError("a mixer that is causal or rotates places takes no context: build it without either.")
        return self._mix(x, x if context is None else context, mask)[0]

    def prefill(self, x: Tensor, state: Cache | None = None) -> tuple[Tensor, Cache]:
        """`forward` on tokens `(B, N, dim)` that follow `state`, and the state after the last of them."""
        self.check(x)
        return self._mix(x, x, None, state)

    def step(self, x: Tensor, state: Cache | None = None) -> tuple[Tensor, Cache]:
        """One token `(B, dim)`; the state is the keys and values so far."""
        out, state = self._mix(x[:, None], x[:, None], None, state)
        return out[:, 0], state

    def _mix(self, x: Tensor, source: Tensor, mask: Tensor | None, state: Cache | None = None) -> tuple[Tensor, Cache]:
        q = self.q(x).unflatten(-1, (self.num_heads, self.head_dim))
        k, v = (part(source).unflatten(-1, (self.kv_heads, self.head_dim)) for part in (self.k, self.v))
        gates = self.router(x if isinstance(self.router, HeadRouter) else q)
        if self.rope_base is not None:
            start = 0 if state is None else state[0].shape[1]
            places = torch.arange(start, start + x.shape[1], device=x.device)
            angles = sequence_angles(places, self.head_dim // 2, self.rope_base)[:, None]
            q, k = rotate(q, angles, interleaved=False), rotate(k, angles, interleaved=False)
        if state is not None:
            k, v = torch.cat([state[0], k], 1), torch.cat([state[1], v], 1)
        seen = None if mask is None else mask.flatten(1)[:, None, None]
        if self.sparse and self.router.routed_heads:
            heads = self._attend_sparsely(q, k, v, gates, seen)
        else:
            heads = ops.attention(q, k, v, causal=self.causal, mask=seen)  # type: ignore[assignment]
        return self.proj((heads * gates[..., None]).flatten(-2)), (k, v)

    def _attend_sparsely(self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, mask: Tensor | None) -> Tensor:
        """Shared heads for all tokens, routed heads where they are kept: `(B, *S, num_heads, head_dim)`."""
        spatial, first = q.shape[1:-2], self.router.shared_heads
        k, v = (x.flatten(1, -3).repeat_interleave(self.num_heads // self.kv_heads, -2) for x in (k, v))
        (q1, q2), (k1, k2), (v1, v2) = ((x[:, :, :first], x[:, :, first:]) for x in (q.flatten(1, -3), k, v))
        active = gates.flatten(1, -2)[..., first:] > 0
        outs = [attend_where_active(q2, k2, v2, active, causal=self.causal, mask=mask)]
        if first:
            outs.insert(0, ops.attention(q1, k1, v1, causal=self.causal, mask=mask))  # type: ignore[arg-type]
        return torch.cat(outs, -2).unflatten(1, spatial)

    def state_size(self, length: int) -> int:
        """All keys and values: grows with the stream."""
        return 2 * length * self.kv_heads * self.head_dim

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, causal={self.causal}, sparse={self.sparse}"


class MoHTransNeXt(TransNeXt):
    """MoH-ViT: TransNeXt whose heads are weighted by a `HeadRouter` in every block.

    Args:
        num_heads, shared_heads, routed_heads: of each stage. A stage without routed heads weights all of them.
        balance: weight of the mean of the routers' load balance losses. rescale: see `HeadRouter`.
        host: arguments of `TransNeXt`: dims, mlp_ratios, img_size, drop_path_rate, num_classes, ...
    """

    authors_keys = KeyMap(rules=(*TransNeXt.authors_keys.rules, *ROUTER_NAMES), convert=TransNeXt.authors_keys.convert)

    def __init__(
        self,
        *,
        depths: Sequence[int] = (5, 5, 22, 5),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        shared_heads: Sequence[int] = (3, 6, 3, 8),
        routed_heads: Sequence[int] = (0, 0, 6, 12),
        balance: float = 0.01,
        rescale: bool = True,
        **host: Any,
    ) -> None:
        shared = checks.tuple_of("shared_heads", shared_heads, len(depths), 0, each="stage")
        routed = checks.tuple_of("routed_heads", routed_heads, len(depths), 0, each="stage")
        share = balance / max(sum(depth for depth, kept in zip(depths, routed, strict=True) if kept), 1)

        def router(at: Place) -> nn.Module:
            split = shared[at.stage], routed[at.stage]
            return HeadRouter(at.dim, at.num_heads, *split, balance=share, rescale=rescale)

        super().__init__(router=router, depths=depths, num_heads=num_heads, **host)


class MoHDiT(DiT):
    """MoH-DiT: DiT with `MoHAttention`; heads of one width, in numbers that may differ from block to block.

    Args:
        num_heads, shared_heads, routed_heads: of all blocks, or one number for each.
        head_dim: channels of a head; None is dim / num_heads.
        balance: weight of the mean of the routers' load balance losses. rescale: see `HeadRouter`.
        sparse: see `MoHAttention`.
        host: arguments of `DiT`: mlp_ratio, patch_size, input_size, in_chans, num_classes, ...
    """

    authors_keys = KeyMap(
        rules=(*DiT.host_rules, *MoHAttention.authors_keys.rules), drop=DiT.host_drop, convert=_split_qkv
    )

    def __init__(
        self,
        *,
        dim: int = 384,
        depth: int = 12,
        num_heads: int | Sequence[int] = 6,
        head_dim: int | None = None,
        shared_heads: int | Sequence[int] = 3,
        routed_heads: int | Sequence[int] = 2,
        balance: float = 0.01,
        rescale: bool = True,
        sparse: bool = False,
        **host: Any,
    ) -> None:
        shared = checks.tuple_of("shared_heads", shared_heads, depth, 0, each="block")
        routed = checks.tuple_of("routed_heads", routed_heads, depth, 0, each="block")
        share = balance / max(sum(kept > 0 for kept in routed), 1)

        def mixer(at: Place) -> nn.Module:
            return MoHAttention(
                at.dim,
                at.num_heads,
                head_dim=head_dim,
                shared_heads=shared[at.index],
                routed_heads=routed[at.index],
                balance=share,
                rescale=rescale,
                sparse=sparse,
            )

        super().__init__(mixer=mixer, dim=dim, depth=depth, num_heads=num_heads, **host)


class MoHLlama(Llama):
    """MoH-LLaMA: LLaMA with `MoHAttention`, whose queries and keys are rotated by place.

    The default is LLaMA3-8B as MoH. It has the parameters of LLaMA3-8B and no others, so its checkpoint loads; with all heads
    shared it is LLaMA itself. A trained model becomes MoH by loading its weights into one with fewer shared heads, and
    training on ("continue-tuning"); `to_moh` does that with a model of `transformers`, in place.

    Args:
        num_heads, kv_heads: of every block. shared_heads, routed_heads: None is half and a quarter of all, as released.
        router: "query_norm" for continue-tuning, "learned" for training from scratch.
        balance: weight of the mean of the routers' load balance losses. sparse: see `MoHAttention`.
        host: arguments of `Llama`: vocab_size, glu_dim, norm_eps, tied, ...
    """

    authors_keys = KeyMap(rules=(*Llama.host_rules, *MoHAttention.authors_keys.rules), drop=Llama.host_drop)

    def __init__(
        self,
        *,
        dim: int = 4096,
        depth: int = 32,
        num_heads: int = 32,
        kv_heads: int = 8,
        shared_heads: int | None = None,
        routed_heads: int | None = None,
        router: Router = "query_norm",
        rope_base: float = 500_000.0,
        balance: float = 0.01,
        sparse: bool = False,
        **host: Any,
    ) -> None:
        def mixer(index: int) -> nn.Module:
            return MoHAttention(
                dim,
                num_heads,
                shared_heads=shared_heads,
                routed_heads=routed_heads,
                router=router,
                kv_heads=kv_heads,
                qkv_bias=False,
                proj_bias=False,
                rope_base=rope_base,
                causal=True,
                balance=balance / depth,
                sparse=sparse,
            )

        super().__init__(mixer=mixer, dim=dim, depth=depth, **host)


_COUNT = "parameters of the authors' code in the released configuration"
_BASE = {"dims": (96, 192, 384, 768), "depths": (5, 5, 23, 5), "num_heads": (4, 8, 16, 32)}


def _dit(name: str, params: int, size: dict[str, Any], shared: Sequence[int], routed: Sequence[int]) -> Variant:
    source = f"{_COUNT}, without its frozen position table, which is computed here"
    options = {**size, "shared_heads": shared, "routed_heads": routed}
    return Variant(f"moh_dit_{name}", MoHDiT, params, None, ((1, 4, 32, 32), (1,), (1,)), source, options)


def _language(name: str, params: int, size: dict[str, Any], shared: int, routed: int) -> Variant:
    source = (
        "counted from the sizes in the paper (table C, 186 M and 882 M); how many of the active heads are shared is not "
        "published: here a quarter of all heads is routed, as in MoH-LLaMA3"
    )
    options = {**size, "vocab_size": 65_536, "rope_base": 10_000.0, "router": "learned"}
    options |= {"shared_heads": shared, "routed_heads": routed}
    return Variant(f"moh_llm_{name}", MoHLlama, params, None, ((1, 2048),), source, options)


_LLM_S = {"dim": 768, "depth": 12, "num_heads": 12, "kv_heads": 12, "glu_dim": 2048}
_LLM_B = {"dim": 1536, "depth": 24, "num_heads": 16, "kv_heads": 16, "glu_dim": 4096}
_S: dict[str, Any] = {}
_B: dict[str, Any] = {"dim": 768, "num_heads": 12}
_L = {"dim": 1024, "depth": 24, "num_heads": [8] * 8 + [16] * 8 + [24] * 8, "head_dim": 64}
_XL = {"dim": 1152, "depth": 28, "num_heads": [8] * 9 + [16] * 10 + [24] * 9, "head_dim": 72}

SYSTEM = register_system(
    System(
        slug="moh",
        title="MoH: Multi-Head Attention as Mixture-of-Head Attention",
        year=2024,
        arxiv="2410.11842",
        evidence="authors_code",
        repo="SkyworkAI/MoH",
        idea="A router weights the heads for each token: a few are always on, of the others it keeps the best.",
        mixers=("moh",),
        variants=(
            image_variant("moh_transnext_small_80", MoHTransNeXt, 49_910_548, None, 0.45, source=_COUNT),
            image_variant(
                "moh_transnext_small_75",
                MoHTransNeXt,
                49_910_548,
                None,
                0.45,
                source=_COUNT,
                shared_heads=(3, 6, 3, 4),
            ),
            image_variant(
                "moh_transnext_base_75",
                MoHTransNeXt,
                90_020_632,
                None,
                0.6,
                source=_COUNT,
                **_BASE,
                shared_heads=(4, 8, 4, 5),
                routed_heads=(0, 0, 8, 16),
            ),
            image_variant(
                "moh_transnext_base_50",
                MoHTransNeXt,
                90_023_512,
                None,
                0.6,
                source=_COUNT,
                **_BASE,
                shared_heads=(2, 2, 2, 4),
                routed_heads=(2, 4, 6, 8),
            ),
            _dit("s_2_90", 32_898_848, _S, [3] * 8 + [6] * 4, [2] * 8 + [0] * 4),
            _dit("s_2_75", 32_900_384, _S, [2] * 2 + [3] * 8 + [6] * 2, [1] * 6 + [2] * 4 + [0] * 2),
            _dit("b_2_90", 130_441_760, _B, [6] * 5 + [7] * 5 + [12] * 2, [4] * 10 + [0] * 2),
            _dit("b_2_75", 130_441_760, _B, [4] * 2 + [6] * 8 + [12] * 2, [2] * 2 + [3] * 8 + [0] * 2),
            _dit("l_2_90", 458_250_272, _L, [8] * 8 + [16] * 16, [0] * 16 + [3] * 8),
            _dit("l_2_75", 458_266_656, _L, [8] * 16 + [12] * 8, [0] * 8 + [4] * 16),
            _dit("xl_2_90", 675_371_552, _XL, [8] * 9 + [16] * 19, [0] * 19 + [3] * 9),
            _dit("xl_2_75", 675_394_592, _XL, [8] * 9 + [10] * 10 + [14] * 9, [0] * 9 + [2] * 19),
            _language("s_75", 185_746_176, _LLM_S, 6, 3),
            _language("s_50", 185_746_176, _LLM_S, 3, 3),
            _language("b_75", 881_542_656, _LLM_B, 8, 4),
            _language("b_50", 881_542_656, _LLM_B, 4, 4),
            Variant(
                "moh_llama3_8b",
                MoHLlama,
                8_297_648_128,
                inputs=((1, 512),),
                source="counted from the released configuration, LLaMA3-8B with 160,896 tokens (appendix); no router",
                options={"vocab_size": 160_896},
            ),
        ),
        reports=(
            "ImageNet-1K top-1: B 84.9 with 75 % of the heads, 84.7 with 50 %, TransNeXt-B 84.8; S 84.7 with 80 %, 84.6 with "
            "75 %, TransNeXt-S 84.7",
            "ViT without shared heads 75.6, with them 78.3, with two-stage routing besides 78.6 (ablation)",
            "DiT-XL/2 at 7000K steps with 90 %: FID 8.56, DiT 9.62; guided (1.25) 2.94, DiT 3.22",
            "Language models from scratch: S, 100B tokens, 45.4 (mean accuracy) with 50 %, dense 43.9; B, 200B tokens, 48.5 "
            "with 75 %, dense 47.9",
            "LLaMA3-8B continue-tuned: 64.0 over 14 benchmarks with 75 %, 61.6 before; in the appendix 64.8 over another 14, "
            "and 64.7 dense after the same first stage of training",
        ),
    )
)
