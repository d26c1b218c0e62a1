"""GraphGPS: Recipe for a General, Powerful, Scalable Graph Transformer (Rampasek et al., 2022, arXiv 2205.12454).

Each layer passes messages over the real edges and attends over all nodes of the graph, side by side on the same input,
and adds the two. Edge features live in the message passing alone, so that the attention may be a linear one (Performer).
Encodings of where a node is (Laplacian eigenvectors, random walks) are joined to its features at the start.

The parts are in `regard.layers.graphs`: message passing, attention, encodings.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from regard import checks
from regard.layers import BatchNorm, Mixer, graphs
from regard.layouts.graphs import grid_edges
from regard.registry import System, Variant, register_mixer, register_system
from regard.skeletons.graph import EdgeEncoder, GraphHead, GraphModel, NodeEncoder, PairHead, Pooling, SequenceHead
from regard.systems.graphs._graphgps_keys import AUTHORS_KEYS
from regard.systems.graphs._graphgps_variants import TABLE

Local = Literal["gine", "gated_gcn", "gcn", "gin", "gen", "gat", "pna"]
Attention = Literal["transformer", "biased_transformer", "performer", "bigbird"]
Head = Literal["san", "mlp", "graphormer", "pairs", "sequence"]
Options = Mapping[str, Any]

LOCALS: dict[str, type[graphs.MessagePassing]] = {
    "gine": graphs.GINE,
    "gated_gcn": graphs.GatedGCN,
    "gcn": graphs.GCN,
    "gin": graphs.GIN,
    "gen": graphs.GEN,
    "gat": graphs.GAT,
    "pna": graphs.PNA,
}
ATTENTIONS = ("transformer", "biased_transformer", "performer", "bigbird")
ENCODINGS: dict[str, type[graphs.Encoding]] = {
    "lappe": graphs.LapPE,
    "stable_lappe": graphs.StableLapPE,
    "signnet": graphs.SignNet,
    "rwse": graphs.RandomWalkEncoding,
    "hkdiag": graphs.HeatKernelEncoding,
    "elstatic": graphs.ElectrostaticEncoding,
    "graphormer": graphs.GraphormerEncoding,
    "depth": graphs.DepthEncoding,
}
_ACTS = {"relu": nn.ReLU, "gelu": nn.GELU}
_STABLE = ("gine", "gated_gcn")


def edge_width(local: str | None, dim: int) -> int:
    """Channels of the edges in a model of `dim` channels; PNA's are cut at 128."""
    return min(128, dim) if local == "pna" else dim


def make_local(
    kind: Local, dim: int, num_heads: int, *, act: str, stable: bool, **options: Any
) -> graphs.MessagePassing:
    """Message passing by name; `options` are those of its class (`scalers=` and so on of "pna")."""
    checks.one_of("local", kind, LOCALS)
    if stable and kind not in _STABLE:
        raise ValueError(
            f"local={kind!r} takes no position codes (stable=True): use {' or '.join(map(repr, _STABLE))}."
        )
    if kind in _STABLE:
        options = {"act": _ACTS[act], "stable": stable, **options}
    elif kind == "gin":
        options = {"act": _ACTS[act], **options}
    elif kind == "gat":
        options = {"num_heads": num_heads, **options}
    elif kind == "pna":
        options = {"edge_dim": edge_width(kind, dim), **options}
    return LOCALS[kind](dim, **options)


def make_attention(
    kind: Attention, dim: int, num_heads: int, *, drop: float, attn_drop: float, quirks: bool, **options: Any
) -> graphs.NodeAttention | graphs.PerformerAttention | graphs.BigBirdLayer:
    """Attention by name; `options` are those of its class (`block_size=` and so on of "bigbird")."""
    if checks.one_of("attention", kind, ATTENTIONS) == "performer":
        return graphs.PerformerAttention(dim, num_heads, drop=attn_drop, authors_quirks=quirks, **options)
    if kind == "bigbird":
        return graphs.BigBirdLayer(dim, num_heads, drop=drop, **options)
    return graphs.NodeAttention(dim, num_heads, drop=attn_drop, **options)


class GPSLayer(nn.Module):
    r"""Message passing beside attention, then a feed-forward network (section 3.3, eq. 1-3).

    $$h = n_1(x + \mathrm{MPNN}(x, e)) + n_2(x + \mathrm{Attn}(x)),\quad
      \mathrm{out} = n_3(h + W_2\,\mathrm{act}(W_1 h))$$

    Args:
        local: message passing, or None for none. attention: over all nodes, or None for none.
        norm: "batch" over all nodes of the batch, "layer" over each graph, or None.
        dropout: after each branch and in the feed-forward network. attn_dropout: in the attention.
        stable: message passing is scaled by the distance of position codes (EquivStable LapPE).
        local_options, attention_options: of the classes behind the names, in `regard.layers.graphs`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        local: Local | None = "gine",
        attention: Attention | None = "transformer",
        norm: Literal["batch", "layer"] | None = "batch",
        act: str = "relu",
        dropout: float = 0.0,
        attn_dropout: float = 0.0,
        stable: bool = False,
        local_options: Options | None = None,
        attention_options: Options | None = None,
        authors_quirks: bool = False,
    ) -> None:
        super().__init__()
        _some_branch(local, attention)
        checks.one_of("act", act, _ACTS)
        if norm is not None:
            checks.one_of("norm", norm, ("batch", "layer"))
        made = {"batch": BatchNorm, "layer": graphs.GraphLayerNorm, None: lambda _: nn.Identity()}[norm]
        self.local: graphs.MessagePassing | None = None
        self.attention: nn.Module | None = None
        self.norm_local: nn.Module | None = None
        self.norm_attention: nn.Module | None = None
        if local is not None:
            self.local = make_local(local, dim, num_heads, act=act, stable=stable, **(local_options or {}))
            self.norm_local = made(dim)
        if attention is not None:
            drops = {"drop": dropout, "attn_drop": attn_dropout, "quirks": authors_quirks}
            self.attention = make_attention(attention, dim, num_heads, **drops, **(attention_options or {}))
            self.norm_attention = made(dim)
        self.biased = attention == "biased_transformer"
        self.fc1, self.fc2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.act, self.drop, self.norm = _ACTS[act](), nn.Dropout(dropout), made(dim)

    def forward(self, x: Tensor, edges: Tensor | None, index: graphs.GraphIndex) -> tuple[Tensor, Tensor | None]:
        """x `(N, dim)`, edges `(E, dim)` -> both, of the same shapes; only GatedGCN changes the edges."""
        branches = []
        if self.local is not None:
            update, new_edges = self.local(x, edges, index.edge_index, index.position)
            branches.append(_normed(self.norm_local, x + self.drop(update), index))
            edges = edges if new_edges is None else edges + self.drop(new_edges)
        if self.attention is not None:
            if self.biased and index.bias is None:
                raise ValueError(
                    "attention='biased_transformer' needs a bias: give the model the encoding 'graphormer'."
                )
            update = self.attention(x, index.offsets, *([index.bias] if self.biased else []))
            branches.append(_normed(self.norm_attention, x + self.drop(update), index))
        x = torch.stack(branches).sum(0)
        x = x + self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))
        return _normed(self.norm, x, index), edges


def _some_branch(local: str | None, attention: str | None) -> None:
    if local is None and attention is None:
        raise ValueError("give local or attention, both are None.")


def _normed(norm: nn.Module | None, x: Tensor, index: graphs.GraphIndex) -> Tensor:
    return norm(x, index) if isinstance(norm, graphs.GraphLayerNorm) else norm(x)  # type: ignore[misc]


@register_mixer("gps")
class GPSMixer(Mixer):
    r"""The two branches of a GPS layer on a grid, whose graph joins every position to its neighbours along each axis.

    $$\mathrm{out} = \mathrm{MPNN}(x, e) + \mathrm{Attn}(x)$$

    e is a learned vector for each of the directions. Departure: residuals, norms and the feed-forward network, which
    the GPS layer has of its own (`GPSLayer`), belong to the block around the mixer.

    Args:
        dim: channels. num_heads: of the attention. local, attention: as in `GPSLayer`, but not "biased_transformer".
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        local: Local | None = "gine",
        attention: Literal["transformer", "performer", "bigbird"] | None = "transformer",
    ) -> None:
        super().__init__()
        _some_branch(local, attention)
        if attention == "biased_transformer":
            raise ValueError("attention='biased_transformer' has no bias on a grid: use 'transformer'.")
        self.dim, self.num_heads = dim, num_heads
        self.local: graphs.MessagePassing | None = None
        self.attention: nn.Module | None = None
        self.directions: nn.Embedding | None = None
        if local is not None:
            self.local = make_local(local, dim, num_heads, act="relu", stable=False)
            if self.local.reads_edges:
                self.directions = nn.Embedding(2 * max(self.dims), edge_width(local, dim))
        if attention is not None:
            self.attention = make_attention(attention, dim, num_heads, drop=0.0, attn_drop=0.0, quirks=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        spatial = self.check(x)
        nodes = x.flatten(1, -2)
        branches = []
        if self.local is not None:
            edge_index, kind = grid_edges(spatial, x.device)
            edges = None if self.directions is None else self.directions(kind).expand(x.shape[0], -1, -1)
            branches.append(self.local(nodes, edges, edge_index)[0])
        if self.attention is not None:
            branches.append(self.attention.dense(nodes))
        return torch.stack(branches).sum(0).unflatten(1, spatial)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}"


class GPS(GraphModel):
    """Encoders, `depth` GPS layers and a head (section 3); GraphGym's options under plain names.

    Args:
        dim, depth, num_heads: width, layers and heads.
        local, attention, norm, act, dropout, attn_dropout, local_options, attention_options: see `GPSLayer`.
        node_types: number of node types, or a list of such numbers, one for each column of `graph["x"]`;
            in_chans instead: width of float features. edge_types, edge_chans: the same for `graph["edge_attr"]`; one
            type means that edges carry nothing, none of the two that message passing reads no edges.
        encodings: one dictionary for each, in their order: its `name` ("lappe", "stable_lappe", "signnet", "rwse", "hkdiag",
            "elstatic", "graphormer", "depth") and options of its class in `regard.layers.graphs`.
            `[{"name": "rwse", "dim": 28, "steps": 20}]` joins 28 channels to the features. `prepare(graph)` computes what
            they read.
        head: "san" (widths dim, dim/2, dim/4), "mlp" (`head_layers` of width dim, hidden vectors of length 1),
            "graphormer" (LayerNorm and one layer), "pairs" (answers for `graph["pairs"]`), "sequence" (one layer for each of
            some places). head_options: of "pairs" (`decode`) and "sequence" (`length`).
        pooling: for answers about graphs; None answers for every node, "token" takes Graphormer's token.
        pre_layer: one linear layer with BatchNorm before the message passing in place of an encoder.
        authors_quirks: what the released code does where it does not do what the paper means; see
            `PerformerAttention` and `GraphormerEncoding`.
    """

    authors_keys = AUTHORS_KEYS

    def __init__(
        self,
        dim: int = 64,
        depth: int = 10,
        num_heads: int = 4,
        *,
        local: Local | None = "gated_gcn",
        attention: Attention | None = "transformer",
        norm: Literal["batch", "layer"] | None = "batch",
        act: str = "relu",
        dropout: float = 0.0,
        attn_dropout: float = 0.5,
        local_options: Options | None = None,
        attention_options: Options | None = None,
        node_types: int | Sequence[int] | None = None,
        in_chans: int | None = None,
        edge_types: int | Sequence[int] | None = None,
        edge_chans: int | None = None,
        encodings: Sequence[Options] = (),
        head: Head = "san",
        head_layers: int = 3,
        head_options: Options | None = None,
        pooling: Pooling | None = "mean",
        pre_layer: bool = False,
        num_classes: int = 1,
        authors_quirks: bool = False,
    ) -> None:
        shared = {"num_heads": num_heads, "edge_types": edge_types, "authors_quirks": authors_quirks}
        made = _encodings(dim, encodings, for_graphormer=shared)
        rest = dim - sum(encoding.dim for encoding in made)
        features = graphs.FeatureEncoder(rest, types=node_types, chans=in_chans)
        if pre_layer:
            features.encoder = nn.Linear(in_chans or 1, rest, bias=False)
        edges, width = None, edge_width(local, dim)
        if edge_types is not None or edge_chans is not None:
            edges = EdgeEncoder(
                graphs.FeatureEncoder(width, types=edge_types, chans=edge_chans), single=edge_types == 1
            )
        elif local is not None and LOCALS[checks.one_of("local", local, LOCALS)].reads_edges:
            raise ValueError(f"local={local!r} reads edges: give edge_types (1 if edges carry nothing) or edge_chans.")
        token = any(one.get("token", False) for one in encodings)
        if (pooling == "token") > token or (token and pooling is None):
            raise ValueError(f"pooling={pooling!r} does not go with token={token} of the encoding 'graphormer'.")
        layer_options = {
            "local": local,
            "attention": attention,
            "norm": norm,
            "act": act,
            "dropout": dropout,
            "attn_dropout": attn_dropout,
            "stable": any(one["name"] == "stable_lappe" for one in encodings),
            "local_options": local_options,
            "attention_options": attention_options,
            "authors_quirks": authors_quirks,
        }
        super().__init__(
            node_encoder=NodeEncoder(features, made, rest if pre_layer else None),
            edge_encoder=edges,
            layers=[GPSLayer(dim, num_heads, **layer_options) for _ in range(depth)],
            head=_head(head, dim, num_classes, head_layers, pooling, act, head_options or {}),
        )

    def adapt_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The authors' layers have norms for both branches, used or not: without those of a branch that is not here."""
        own = self.state_dict().keys()
        return {
            key: value
            for key, value in state.items()
            if key in own or not re.search(r"\.norm_(local|attention)\.", key)
        }


def _encodings(dim: int, encodings: Sequence[Options], for_graphormer: Options) -> list[graphs.Encoding]:
    """Encodings in their order, for features that are `dim` wide with all that is joined to them."""
    parts = []
    for given in encodings:
        name, options = given.get("name", ""), {key: value for key, value in given.items() if key != "name"}
        kind = ENCODINGS[checks.one_of("the name of an encoding", name, ENCODINGS)]
        if kind.joins and "dim" not in options:
            raise ValueError(f"the encoding {name!r} must give dim, the channels that it joins; got {dict(given)}.")
        parts.append((kind, {**for_graphormer, **options} if name == "graphormer" else options))
    width = dim - sum(options["dim"] for kind, options in parts if kind.joins)
    if width < 1:
        raise ValueError(f"encodings must leave room for the features: they join {dim - width} of dim={dim} channels.")
    made = []
    for kind, options in parts:
        made.append(kind(**options) if kind.joins else kind(width, **options))
        width += made[-1].dim
    shared = {(one.freqs, one.normalization) for one in made if isinstance(one, graphs.LaplacianEncoding)}
    if len(shared) > 1:
        raise ValueError(
            f"encodings read the same eigenvectors: give them equal freqs and normalization, got {shared}."
        )
    return made


def _head(
    kind: Head, dim: int, num_classes: int, layers: int, pooling: Pooling | None, act: str, options: Options
) -> GraphHead | SequenceHead:
    if checks.one_of("head", kind, ("san", "mlp", "graphormer", "pairs", "sequence")) == "pairs":
        return PairHead(dim, num_classes, layers=layers, **options)
    if kind == "sequence":
        if pooling is None:
            raise ValueError("head='sequence' answers for graphs: give a pooling.")
        return SequenceHead(dim, num_classes, pooling=pooling, **options)
    if kind == "san":
        return GraphHead([dim, dim // 2, dim // 4], num_classes, pooling=pooling, act=_ACTS[act], **options)
    if kind == "graphormer":
        return GraphHead([dim], num_classes, pooling=pooling, norm=True, **options)
    return GraphHead([dim] * layers, num_classes, pooling=pooling, unit_length=True, **options)


_CODE = "parameters counted from the authors' GPSModel and configs/GPS/{}.yaml"

SYSTEM = register_system(
    System(
        slug="graphgps",
        title="Recipe for a General, Powerful, Scalable Graph Transformer",
        year=2022,
        arxiv="2205.12454",
        evidence="authors_code",
        repo="rampasek/GraphGPS",
        idea="Message passing over the edges and attention over all nodes, side by side in each layer and added.",
        mixers=("gps",),
        variants=tuple(
            Variant(f"graphgps_{name}", GPS, params, inputs=(), source=_CODE.format(config), options=options)
            for name, config, params, options in TABLE
        ),
        reports=(
            "ZINC MAE 0.070 with 423,717 parameters; accuracy on MNIST 98.05, CIFAR10 72.30, PATTERN 86.69, CLUSTER 78.02",
            "PCQM4Mv2 validation MAE: small 0.0937, medium 0.0858, deep 0.0852 (README)",
            "Long-range benchmark: Peptides-func AP 0.6535, Peptides-struct MAE 0.2500",
        ),
    )
)
