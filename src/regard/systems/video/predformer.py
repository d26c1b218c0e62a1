"""PredFormer: Video Prediction Transformers without Recurrence or Convolution (Tang et al., 2024, arXiv 2410.04733).

A plain transformer encoder turns the frames shown into as many frames to come, in one pass. Its blocks attend either within
a frame, or along time at one place, or over everything; the study is about the order in which they do so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from regard import checks, ops
from regard.checkpoint import KeyMap
from regard.layers import Block, GatedMlp, Mixer, heads_of, sincos, vit_init
from regard.layouts import windows
from regard.registry import System, Variant, register_mixer, register_system
from regard.skeletons import Model

_LETTERS = {"t": "temporal", "s": "spatial", "f": "full"}


@register_mixer("factorized")
class FactorizedAttention(Mixer):
    r"""Softmax attention along one part of a space-time grid (section 3.2).

    $$\mathrm{out} = W_o\,[\mathrm{softmax}(d^{-1/2} Q K^\top) V]_{heads}\quad\text{among the tokens of one group}$$

    On `(T, H, W)` a group is all times at one place ("temporal"), all places at one time ("spatial"), or everything
    ("full"). On two axes "temporal" is the first axis and "spatial" the second: axial attention. In a stack the letters
    of `order` say which block does what, so `order="tsst"` repeats temporal, spatial, spatial, temporal.

    Args:
        along: the group. head_dim: width of a head; num_heads * head_dim need not be dim.
        drop: dropout of the output (the authors' "attention dropout"; the weights have none).
    """

    dims: ClassVar[tuple[int, ...]] = (2, 3)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        along: Literal["temporal", "spatial", "full"] = "temporal",
        head_dim: int | None = None,
        qkv_bias: bool = False,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.head_dim = heads_of(dim, num_heads) if head_dim is None else head_dim
        self.dim, self.num_heads = dim, num_heads
        self.along = checks.one_of("along", along, _LETTERS.values())
        inner = num_heads * self.head_dim
        self.qkv = nn.Linear(dim, 3 * inner, bias=qkv_bias)
        # As in the authors' code, a single head of full width has no output projection.
        self.proj = nn.Identity() if num_heads == 1 and inner == dim else nn.Linear(inner, dim)
        self.drop = nn.Dropout(drop)

    @classmethod
    def in_stack(
        cls, index: int, input_size: tuple[int, ...], dim: int, num_heads: int, *, order: str = "ts", **options: Any
    ) -> Mixer:
        """Block `index` does what letter `index` of `order`, repeated, says: t, s or f."""
        return cls(dim, num_heads, along=_LETTERS[check_order(order)[index % len(order)]], **options)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, T, *S, dim)` -> the same shape."""
        self.check(x)
        q, k, v = (self._group(y) for y in self.qkv(x).chunk(3, -1))
        out = ops.attention(q, k, v).flatten(-2)  # type: ignore[union-attr]
        if self.along == "temporal":
            out = out.unflatten(0, (x.shape[0], *x.shape[2:-1])).movedim(-2, 1)
        elif self.along == "spatial":
            out = out.unflatten(0, x.shape[:2])
        return self.drop(self.proj(out))

    def _group(self, x: Tensor) -> Tensor:
        """The groups become the batch: `(B, T, *S, inner)` -> `(groups, tokens.., heads, head_dim)`."""
        if self.along == "temporal":
            x = x.movedim(1, -2).flatten(0, -3)
        elif self.along == "spatial":
            x = x.flatten(0, 1)
        return x.unflatten(-1, (self.num_heads, self.head_dim))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, head_dim={self.head_dim}, along={self.along}"


def check_order(order: str) -> str:
    """Return `order` if it is made of the letters t, s and f; otherwise raise a ValueError."""
    if not isinstance(order, str) or not order or set(order) - _LETTERS.keys():
        raise ValueError(f"order must be letters among t (temporal), s (spatial) and f (full), got {order!r}.")
    return order


class GatedTransformer(nn.Sequential):
    """Gated transformer blocks, x + attention(norm x), then x + SwiGLU(norm x), and a LayerNorm after the last (eq. 1, 2)."""

    def __init__(
        self, dim: int, depth: int, hidden: int, *, dropout: float, drop_path: float, **attention: Any
    ) -> None:
        blocks = (
            Block(
                dim,
                FactorizedAttention(dim, **attention),
                mlp=GatedMlp(dim, hidden, drop=dropout),
                drop_path=drop_path,
            )
            for _ in range(depth)
        )
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(dim)


class PredFormer(Model):
    """Patches + fixed position code -> layers of gated transformers -> LayerNorm, linear -> frames.

    The nine models of the paper: `order="f"` (full), "ts" and "st" (binary), "tst" and "sts" (triplet), "tsst" and "stts"
    (quadruplet), each repeated `layers` times; "ts" and "st" with `factorized=True` put all blocks of one kind before all
    of the other. Other orders run too.

    Nothing depends on the number or size of frames, but the position code counts through all patches of all frames
    (index t N + n), so at another size or length than in training every patch gets another code.

    Args:
        order: letters t, s, f. layers: repetitions of the order; with `factorized`, blocks of each kind.
        patch_size: a frame that is no multiple is padded with zeros at its right and bottom, and its prediction cropped.
        frames_out: None gives as many frames as come in. Fewer are cut; for more, predictions are fed back in.
        dropout, attn_dropout, drop_path_rate: of the SwiGLU, after the attention, of both branches (the same in all blocks).
        layer_skip: add each layer's input to its output (the authors' triplets on Human3.6M).
        authors_quirks: reproduce the released factorised "st" model, which forgets to bring tokens back from (place, time)
            to (time, place) order before it reads frames off them. Its published weights need that.
    """

    def __init__(
        self,
        order: str = "tsst",
        layers: int = 6,
        factorized: bool = False,
        dim: int = 256,
        num_heads: int = 8,
        head_dim: int | None = 32,
        mlp_ratio: float = 4.0,
        patch_size: int = 8,
        in_chans: int = 1,
        frames_out: int | None = None,
        dropout: float = 0.0,
        attn_dropout: float = 0.0,
        drop_path_rate: float = 0.0,
        layer_skip: bool = False,
        authors_quirks: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("layers", layers), ("patch_size", patch_size), ("in_chans", in_chans)):
            checks.positive(name, value)
        if frames_out is not None:
            checks.positive("frames_out", frames_out)
        self.order, self.factorized = check_order(order), factorized
        self.dim, self.patch_size, self.in_chans = dim, patch_size, in_chans
        self.frames_out, self.layer_skip = frames_out, layer_skip
        self.place_major = authors_quirks and factorized and order == "st"
        self.embed = nn.Linear(in_chans * patch_size * patch_size, dim)
        self.layers = nn.ModuleList(
            predformer_layer(
                order,
                dim,
                depth=layers if factorized else 1,
                hidden=int(dim * mlp_ratio),
                num_heads=num_heads,
                head_dim=head_dim,
                dropout=dropout,
                drop=attn_dropout,
                drop_path=drop_path_rate,
            )
            for _ in range(1 if factorized else layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, in_chans * patch_size * patch_size)
        self.layers.apply(vit_init)

    def forward(self, x: Tensor) -> Tensor:
        """Frames `(B, T, C, H, W)` -> the next frames `(B, frames_out or T, C, H, W)`."""
        self.check_clip(x)
        wanted = x.shape[1] if self.frames_out is None else self.frames_out
        parts: list[Tensor] = []
        for _ in range(-(-wanted // x.shape[1])):
            parts.append(self._next(parts[-1] if parts else x))
        return torch.cat(parts, 1)[:, :wanted] if len(parts) > 1 else parts[0][:, :wanted]

    def forward_features(self, x: Tensor) -> Tensor:
        """`(B, T, C, H, W)` -> normalised tokens `(B, T, H / p, W / p, dim)`."""
        self.check_clip(x)
        return self.norm(self._encode(self._embed(x))[-1])

    def forward_intermediates(self, x: Tensor, indices: Sequence[int] | None = None) -> list[Tensor]:
        """The tokens `(B, T, H / p, W / p, dim)` after the layers (all, or those in `indices`).

        Raises:
            ValueError: for a layer that does not exist.
        """
        self.check_clip(x)
        maps = self._encode(self._embed(x))[1:]
        wanted = range(len(maps)) if indices is None else indices
        for index in wanted:
            if not -len(maps) <= index < len(maps):
                raise ValueError(f"indices must lie in 0..{len(maps) - 1}, got {index}.")
        return [maps[index] for index in wanted]

    def check_clip(self, x: Tensor) -> None:
        """Check the input at the door."""
        checks.clip(x, self.in_chans)
        checks.no_half_on_cpu(type(self).__name__, x)

    def _next(self, x: Tensor) -> Tensor:
        """As many frames as came in."""
        tokens = self._encode(self._embed(x))[-1]
        if self.place_major:
            tokens = tokens.movedim(1, 3).reshape(tokens.shape)
        out = self.head(self.norm(tokens))  # (B, T, H', W', C p p): channels come first here, and last in `_embed`
        out = out.unflatten(-1, (self.in_chans, self.patch_size, self.patch_size))
        out = out.permute(0, 1, 4, 2, 5, 3, 6).flatten(3, 4).flatten(4, 5)
        return out[..., : x.shape[3], : x.shape[4]]

    def _embed(self, x: Tensor) -> Tensor:
        """Frames -> tokens `(B, T, H', W', dim)` with their position code."""
        p = self.patch_size
        frames = windows.pad_to_multiple(x.movedim(2, -1).flatten(0, 1), (p, p)).unflatten(0, x.shape[:2])
        patches = frames.unflatten(3, (-1, p)).unflatten(2, (-1, p)).transpose(3, 4)  # (B, T, H', W', p, p, C)
        tokens = self.embed(patches.flatten(4))
        sizes = tokens.shape[1:4]
        position = sincos(torch.arange(sizes.numel(), device="cpu"), self.dim).unflatten(0, sizes)
        return tokens + position.to(tokens)

    def _encode(self, tokens: Tensor) -> list[Tensor]:
        """The tokens that enter, and those after each layer."""
        maps = [tokens]
        for layer in self.layers:
            out = layer(maps[-1])
            maps.append(out + maps[-1] if self.layer_skip else out)
        return maps

    @property
    def authors_keys(self) -> KeyMap:  # type: ignore[override]
        """The authors' names depend on the order."""
        start, home = (r"^", "layers.0.") if self.factorized else (r"^blocks\.(\d+)\.", r"layers.\1.")
        return KeyMap(
            rules=[
                (r"^to_patch_embedding\.1\.", "embed."),
                (r"^mlp_head\.0\.", "norm."),
                (r"^mlp_head\.1\.", "head."),
                *layer_keys(self.order, self.factorized, start, home),
            ]
        )


def predformer_layer(order: str, dim: int, **options: Any) -> nn.Sequential:
    """One gated transformer for each letter of `order`, on `(B, T, H', W', dim)`."""
    return nn.Sequential(*(GatedTransformer(dim, along=_LETTERS[letter], **options) for letter in check_order(order)))


_NAMES = {
    "ts": ("ts_temporal_transformer", "ts_space_transformer"),
    "st": ("st_space_transformer", "st_temporal_transformer"),
    "tst": ("temporal_transformer_first", "space_transformer", "temporal_transformer_second"),
    "sts": ("space_transformer_first", "temporal_transformer", "space_transformer_second"),
}
_NAMES["tsst"] = (*_NAMES["ts"], *_NAMES["st"])
_NAMES["stts"] = (*_NAMES["st"], *_NAMES["ts"])
_FACTORIZED_NAMES = {"t": "temporal_transformer", "s": "space_transformer", "f": "space_temporal_transformer"}


def layer_keys(order: str, factorized: bool, start: str, home: str) -> list[tuple[str, str]]:
    """The rules of one layer whose names begin with `start` in the authors' release and with `home` here."""
    names = [_FACTORIZED_NAMES[letter] for letter in order] if factorized else _NAMES.get(order, ())
    return [
        *((rf"{start}{name}\.", f"{home}{index}.") for index, name in enumerate(names)),
        (r"\.layers\.(\d+)\.0\.norm\.", r".blocks.\1.norm1."),
        (r"\.layers\.(\d+)\.1\.norm\.", r".blocks.\1.norm2."),
        (r"\.layers\.(\d+)\.0\.fn\.to_qkv\.", r".blocks.\1.mixer.qkv."),
        (r"\.layers\.(\d+)\.0\.fn\.to_out\.0\.", r".blocks.\1.mixer.proj."),
        (r"\.layers\.(\d+)\.1\.fn\.fc1_g\.", r".blocks.\1.mlp.gate."),
        (r"\.layers\.(\d+)\.1\.fn\.fc1_x\.", r".blocks.\1.mlp.value."),
        (r"\.layers\.(\d+)\.1\.fn\.fc2\.", r".blocks.\1.mlp.out."),
    ]


_REGULAR = {"dropout": 0.1, "attn_dropout": 0.1, "drop_path_rate": 0.1}
# Data set: shape of a clip, options, gated transformer blocks in all.
_DATA: dict[str, tuple[tuple[int, ...], dict[str, Any], int]] = {
    "mmnist": ((1, 10, 1, 64, 64), {}, 24),
    "human": ((1, 4, 3, 256, 256), {"in_chans": 3, **_REGULAR}, 12),
    "taxibj": ((1, 4, 2, 32, 32), {"in_chans": 2, "patch_size": 4, **_REGULAR}, 8),
    "weather": ((1, 12, 1, 32, 64), {"patch_size": 4, "mlp_ratio": 2.0, **_REGULAR, "drop_path_rate": 0.25}, 8),
}
_COUNTED = "counted on the authors' classes and configurations, multiply-adds computed from them"


def _variants() -> list[Variant]:
    # Data set: parameters of full, factorised, interleaved; multiply-adds of full, binary and quadruplet, "sts", "tst".
    figures = {
        "mmnist": ((25_285_952, 25_286_464, 25_297_728), (21.16, 16.42, 16.49, 16.35)),
        "human": ((12_725_696, 12_726_208, 12_731_328), (None, 64.88, 69.16, 60.60)),
        "taxibj": ((8_434_976, 8_435_488, 8_438_560), (2.42, 2.19, None, None)),
        "weather": ((5_272_848, 5_273_360, 5_276_432), (17.73, 8.51, None, None)),
    }
    variants = []

    def add(name: str, data: str, params: int, gmacs: float | None, **options: Any) -> None:
        shape, common, _ = _DATA[data]
        source, options = _COUNTED, {**common, **options}
        variants.append(Variant(f"predformer_{name}_{data}", PredFormer, params, gmacs, (shape,), source, options))

    for data, ((full, factorized, interleaved), (full_macs, macs, sts, tst)) in figures.items():
        blocks = _DATA[data][2]
        skip = {"layer_skip": True} if data == "human" else {}
        fac_macs = macs if data == "mmnist" else None
        add("full", data, full, full_macs, order="f", layers=blocks, factorized=True)
        for order in ("ts", "st"):
            add(f"factorized_{order}", data, factorized, fac_macs, order=order, layers=blocks // 2, factorized=True)
            add(f"binary_{order}", data, interleaved, macs, order=order, layers=blocks // 2)
        for order in ("tsst", "stts"):
            add(f"quadruplet_{order}", data, interleaved, macs, order=order, layers=blocks // 4)
        if blocks % 3 == 0:
            add("triplet_sts", data, interleaved, sts, order="sts", layers=blocks // 3, **skip)
            add("triplet_tst", data, interleaved, tst, order="tst", layers=blocks // 3, **skip)
    # Eight blocks are no multiple of three: the configuration files say three layers, the sizes in the paper fit two.
    for order in ("sts", "tst"):
        add(f"triplet_{order}", "taxibj", 9_491_232, None, order=order, layers=3)
        add(f"triplet_{order}", "weather", 5_934_864, None, order=order, layers=3)
        add(f"triplet_{order}_paper", "taxibj", 6_333_216, None, order=order, layers=2)
        add(f"triplet_{order}_paper", "weather", 3_959_568, None, order=order, layers=2)
    return variants


SYSTEM = register_system(
    System(
        slug="predformer",
        title="Video Prediction Transformers without Recurrence or Convolution",
        year=2024,
        arxiv="2410.04733",
        evidence="authors_code",
        repo="yyyujintang/PredFormer",
        idea="Gated transformer blocks that attend within a frame, along time or over everything; interleaving the first "
        "two predicts video best.",
        mixers=("factorized",),
        variants=tuple(_variants()),
        reports=(
            "Moving MNIST MSE/MAE/SSIM: quadruplet TSST 12.4/44.6/.973, full 17.3/56.0/.962; MSE of STTS 12.4, binary TS "
            "12.8, STS 13.1, binary ST and TST 13.4, FacTS 16.9, FacST 20.6, SimVP 23.8 (paper)",
            "TaxiBJ MSE: binary ST and STS .277, SimVP .414 (paper)",
        ),
    )
)
