"""GraphGPS: Recipe for a General, Powerful, Scalable Graph Transformer (Rampasek et al., 2022, arXiv 2205.12454).

Each layer passes messages over the real edges and attends over all nodes of the graph, side by side on the same input,
and adds the two. Edge features live in the message passing alone, so that the attention may be a linear one (Performer).
Encodings of where a node is (Laplacian eigenvectors, random walks) are joined to its features at the start.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import checks, ops
from regard.checkpoint import KeyMap
from regard.layers import BatchNorm, Mixer, heads_of
from regard.layers.graphs import (
    GCN,
    GINE,
    RWSE,
    FeatureEncoder,
    GatedGCN,
    GraphIndex,
    GraphLayerNorm,
    LapPE,
    MessagePassing,
    StableLapPE,
    needed,
)
from regard.layouts.graphs import grid_edges
from regard.layouts.ragged import buckets
from regard.registry import System, Variant, register_mixer, register_system
from regard.skeletons.graph import GraphHead, GraphModel, Pooling
from regard.systems.graphs._graphgps_variants import TABLE

Local = Literal["gine", "gated_gcn", "gcn"]
Attention = Literal["transformer", "performer"]
_ACTS = {"relu": nn.ReLU, "gelu": nn.GELU}


class NodeAttention(nn.Module):
    r"""Softmax attention among all nodes of each graph: $W_o\,\mathrm{softmax}(d^{-1/2} Q K^\top) V$.

    The authors pad graphs to one length and mask; here no graph is padded beyond the next power of two.

    Args:
        drop: rate at which attention weights are dropped in training.
    """

    def __init__(self, dim: int, num_heads: int, *, drop: float = 0.0) -> None:
        super().__init__()
        self.head_dim = heads_of(dim, num_heads)
        self.num_heads, self.drop = num_heads, drop
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.qkv.weight)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.proj.bias)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        return q, k, v

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """`(N, dim)`, graph by graph -> the same shape."""
        q, k, v = self._split(x)
        if not (self.training and self.drop):
            return self.proj(ops.grouped_attention(q, k, v, offsets).flatten(-2))
        out = torch.zeros_like(q)
        for bucket in buckets(offsets, offsets):
            qs, ks, vs = (part[bucket.rows].transpose(1, 2) for part in (q, k, v))
            mask = bucket.key_exists[:, None, None]
            mixed = F.scaled_dot_product_attention(qs, ks, vs, mask, dropout_p=self.drop).transpose(1, 2)
            out = out.index_put((bucket.rows[bucket.row_exists],), mixed[bucket.row_exists])
        return self.proj(out.flatten(-2))

    def dense(self, x: Tensor) -> Tensor:
        """`(B, N, dim)`, B graphs of one size -> the same shape."""
        return self.proj(ops.attention(*self._split(x)).flatten(-2))  # type: ignore[union-attr]


class PerformerAttention(nn.Module):
    r"""Linear attention with positive random features, FAVOR+ (Choromanski et al., 2021, arXiv 2009.14794).

    $$\phi(x) = m^{-1/2} (e^{s W x - s^2 |x|^2 / 2 - \max} + 10^{-4}),\quad s = d^{-1/4},\quad
      \mathrm{out} = \phi(q)\,\frac{\sum_j \phi(k_j) v_j^\top}{\phi(q)^\top \sum_j \phi(k_j)}$$

    W has m = d ln d rows, random and orthogonal in blocks of d, and is drawn once. Heads are `head_dim` wide whatever
    `dim` is. The maximum runs over the features of a query, and over features and nodes of a graph for its keys.

    Args:
        drop: rate of dropout on the output.
        authors_quirks: as the released code does, pad graphs to the largest one and let the padding (k = 0) take part in
            the maximum and in the normaliser, so that a graph's output depends on the others in its batch.
    """

    projection: Tensor

    def __init__(
        self, dim: int, num_heads: int, *, head_dim: int = 64, drop: float = 0.0, authors_quirks: bool = False
    ) -> None:
        super().__init__()
        checks.positive("num_heads", num_heads)
        self.num_heads, self.head_dim, self.authors_quirks = num_heads, head_dim, authors_quirks
        self.q, self.k, self.v = (nn.Linear(dim, num_heads * head_dim, bias=False) for _ in range(3))
        self.proj = nn.Linear(num_heads * head_dim, dim)
        self.drop = nn.Dropout(drop)
        self.register_buffer("projection", orthogonal_features(int(head_dim * math.log(head_dim)), head_dim))

    def _features(self, x: Tensor, axes: tuple[int, ...], exists: Tensor | None) -> Tensor:
        """`(B, N, heads, d)` -> `(B, N, heads, m)`, zero where a node does not exist."""
        x = x * self.head_dim**-0.25
        logits = x @ self.projection.t()
        known = logits if exists is None else logits.masked_fill(~exists, -math.inf)
        most = known.detach().amax(axes, keepdim=True)
        half = x.square().sum(-1, keepdim=True) / 2
        features = ((known - half - most).exp() + 1e-4) * self.projection.shape[0] ** -0.5
        return features if exists is None else features * exists

    def dense(self, x: Tensor, exists: Tensor | None = None) -> Tensor:
        """`(B, N, dim)`, B graphs of one size or padded (`exists` `(B, N)`) -> the same shape."""
        q, k, v = (part(x).unflatten(-1, (self.num_heads, self.head_dim)) for part in (self.q, self.k, self.v))
        real = None if exists is None else exists[..., None, None]
        if real is not None:
            v = v * real
        q = self._features(q, (-1,), None)
        k = self._features(k, (1, 3), None if self.authors_quirks else real)
        out = ops.linear_attention(q, k, v, eps=0.0)
        return self.drop(self.proj(out.flatten(-2)))  # type: ignore[union-attr]

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """`(N, dim)`, graph by graph -> the same shape."""
        out = torch.zeros_like(x)
        for rows, exists in _one_batch(offsets) if self.authors_quirks else _batches(offsets):
            batch = x[rows] * exists.unsqueeze(-1)
            out = out.index_put((rows[exists],), self.dense(batch, exists)[exists])
        return out


def _batches(offsets: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(bucket.rows, bucket.row_exists) for bucket in buckets(offsets, offsets)]


def _one_batch(offsets: Tensor) -> list[tuple[Tensor, Tensor]]:
    sizes = offsets.diff()
    slot = torch.arange(int(sizes.max()), device=offsets.device)
    exists = slot < sizes[:, None]
    return [(torch.where(exists, offsets[:-1, None] + slot, 0), exists)]


def orthogonal_features(count: int, dim: int) -> Tensor:
    """`(count, dim)`: random rows, orthogonal within blocks of `dim`, as long as rows of a normal matrix would be."""
    blocks = [torch.linalg.qr(torch.randn(dim, dim)).Q.t() for _ in range(-(-count // dim))]
    return torch.cat(blocks)[:count] * torch.randn(count, dim).norm(dim=1, keepdim=True)


def _local(kind: str | None, dim: int, act: str, stable: bool) -> MessagePassing | None:
    if kind is None:
        return None
    if checks.one_of("local", kind, ("gine", "gated_gcn", "gcn")) == "gcn":
        if stable:
            raise ValueError("local='gcn' takes no position codes (stable=True): use 'gine' or 'gated_gcn'.")
        return GCN(dim)
    return {"gine": GINE, "gated_gcn": GatedGCN}[kind](dim, act=_ACTS[act], stable=stable)


def _attention(
    kind: str | None, dim: int, num_heads: int, drop: float, quirks: bool
) -> NodeAttention | PerformerAttention | None:
    if kind is None:
        return None
    if checks.one_of("attention", kind, ("transformer", "performer")) == "transformer":
        return NodeAttention(dim, num_heads, drop=drop)
    return PerformerAttention(dim, num_heads, drop=drop, authors_quirks=quirks)


class GPSLayer(nn.Module):
    r"""Message passing beside attention, then a feed-forward network (section 3.3, eq. 1-3).

    $$h = n_1(x + \mathrm{MPNN}(x, e)) + n_2(x + \mathrm{Attn}(x)),\quad
      \mathrm{out} = n_3(h + W_2\,\mathrm{act}(W_1 h))$$

    Args:
        local: message passing, or None for none. attention: over all nodes, or None for none.
        norm: "batch" over all nodes of the batch, "layer" over each graph, or None.
        dropout: after each branch and in the feed-forward network. attn_dropout: in the attention.
        stable: message passing is scaled by the distance of position codes (EquivStable LapPE).
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
        authors_quirks: bool = False,
    ) -> None:
        super().__init__()
        if local is None and attention is None:
            raise ValueError("a layer needs local or attention, both are None.")
        checks.one_of("act", act, _ACTS)
        if norm is not None:
            checks.one_of("norm", norm, ("batch", "layer"))
        made = {"batch": BatchNorm, "layer": GraphLayerNorm, None: lambda _: nn.Identity()}[norm]
        self.local = _local(local, dim, act, stable)
        self.attention = _attention(attention, dim, num_heads, attn_dropout, authors_quirks)
        self.norm_local = None if local is None else made(dim)
        self.norm_attention = None if attention is None else made(dim)
        self.fc1, self.fc2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.act, self.drop, self.norm = _ACTS[act](), nn.Dropout(dropout), made(dim)

    def forward(self, x: Tensor, edges: Tensor | None, index: GraphIndex) -> tuple[Tensor, Tensor | None]:
        """x `(N, dim)`, edges `(E, dim)` -> both, of the same shapes; only GatedGCN changes the edges."""
        branches = []
        if self.local is not None:
            update, new_edges = self.local(x, edges, index.edge_index, index.position)
            branches.append(_normed(self.norm_local, x + self.drop(update), index))
            edges = edges if new_edges is None else edges + self.drop(new_edges)
        if self.attention is not None:
            branches.append(_normed(self.norm_attention, x + self.drop(self.attention(x, index.offsets)), index))
        x = torch.stack(branches).sum(0)
        x = x + self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))
        return _normed(self.norm, x, index), edges


def _normed(norm: nn.Module | None, x: Tensor, index: GraphIndex) -> Tensor:
    return norm(x, index) if isinstance(norm, GraphLayerNorm) else norm(x)  # type: ignore[misc]


@register_mixer("gps")
class GPSMixer(Mixer):
    r"""The two branches of a GPS layer on a grid, whose graph joins every position to its neighbours along each axis.

    $$\mathrm{out} = \mathrm{MPNN}(x, e) + \mathrm{Attn}(x)$$

    e is a learned vector for each of the directions. Departure: residuals, norms and the feed-forward network, which
    the GPS layer has of its own (`GPSLayer`), belong to the block around the mixer.

    Args:
        dim: channels. num_heads: of the attention. local, attention: as in `GPSLayer`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        local: Local | None = "gine",
        attention: Attention | None = "transformer",
    ) -> None:
        super().__init__()
        if local is None and attention is None:
            raise ValueError("the mixer needs local or attention, both are None.")
        self.dim, self.num_heads = dim, num_heads
        self.local = _local(local, dim, "relu", stable=False)
        self.attention = _attention(attention, dim, num_heads, 0.0, quirks=False)
        self.directions = nn.Embedding(2 * max(self.dims), dim) if local not in (None, "gcn") else None

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


class NodeEncoder(nn.Module):
    """Features of a node, joined with codes of where it is: `(N, dim)`.

    Args:
        features: `FeatureEncoder` of `graph["x"]`. encodings: modules on the graph that give `(N, width)` each.
        pre: normalise, rectify and scale the features to length 1 (GraphGym's layer before the message passing).
    """

    def __init__(self, features: FeatureEncoder, encodings: Sequence[nn.Module], pre: int | None = None) -> None:
        super().__init__()
        self.features = features
        self.pre = None if pre is None else BatchNorm(pre)
        self.encodings = nn.ModuleList(encodings)

    def forward(self, graph: Mapping[str, Tensor]) -> Tensor:
        """Graph -> `(N, dim)`."""
        x = self.features(graph["x"])
        if self.pre is not None:
            x = F.normalize(F.relu(self.pre(x)), dim=-1)
        return torch.cat([x, *(encoding(graph) for encoding in self.encodings)], -1)


class EdgeEncoder(nn.Module):
    """`graph["edge_attr"]` -> `(E, dim)`; with a single edge type it need not be there."""

    def __init__(self, features: FeatureEncoder, single: bool) -> None:
        super().__init__()
        self.features, self.single = features, single

    def forward(self, graph: dict[str, Tensor]) -> Tensor:
        """Graph -> `(E, dim)`."""
        if self.single:
            return self.features(torch.zeros_like(graph["edge_index"][0]))
        return self.features(needed(graph, "edge_attr", "your data: the types or features of the edges"))


class GPS(GraphModel):
    """Encoders, `depth` GPS layers and a head (section 3); GraphGym's options under plain names.

    Args:
        dim, depth, num_heads: width, layers and heads.
        local, attention, norm, act, dropout, attn_dropout, authors_quirks: see `GPSLayer`.
        node_types: number of node types, or a list of such numbers, one for each column of `graph["x"]`;
            in_chans instead: width of float features. edge_types, edge_chans: the same for `graph["edge_attr"]`; one
            type means that edges carry nothing, none of the two that message passing reads no edges ("gcn").
        rwse_steps, rwse_dim: steps and code width of the random-walk encoding, None for none. lap_dim: code width of
            the Laplacian encoding. stable_freqs: eigenvectors of the EquivStable encoding.
        head: "san" (widths dim, dim/2, dim/4) or "mlp" (`head_layers` of width dim, hidden vectors of length 1).
        pooling: for answers about graphs; None answers for every node.
        pre_layer: one linear layer with BatchNorm before the message passing in place of an encoder.
    """

    authors_keys = KeyMap(
        rules=[
            (r"^model\.", ""),
            (r"^encoder\.node_encoder\.(encoder1\.encoder|encoder|linear_x)\.", "node_encoder.features.encoder."),
            (r"^encoder\.node_encoder\.encoder1\.atom_embedding_list\.", "node_encoder.features.tables."),
            (r"^encoder\.node_encoder\.encoder2\.linear_enc", "position_encoder.linear_enc"),
            (r"^encoder\.node_encoder\.encoder(\d)\.", lambda m: f"node_encoder.encodings.{int(m[1]) - 2}."),
            (r"^encoder\.node_encoder\.", "node_encoder.encodings.0."),
            (r"(node_encoder\.encodings\.\d)\.pe_encoder\.1\.", r"\1.pe_encoder."),
            (r"^encoder\.edge_encoder\.bond_embedding_list\.", "edge_encoder.features.tables."),
            (r"^encoder\.edge_encoder\.", "edge_encoder.features."),
            (r"^pre_mp\.Layer_0\.layer\.model\.", "node_encoder.features.encoder."),
            (r"^pre_mp\.Layer_0\.post_layer\.0\.", "node_encoder.pre."),
            (r"(^|\.)local_model\.nn\.0\.", r"\1local.mlp.fc1."),
            (r"(^|\.)local_model\.nn\.2\.", r"\1local.mlp.fc2."),
            (r"(^|\.)local_model\.mlp_r_ij\.0\.", r"\1local.gate.fc1."),
            (r"(^|\.)local_model\.mlp_r_ij\.2\.", r"\1local.gate.fc2."),
            (r"(^|\.)local_model\.bn_node_x\.", r"\1local.norm_nodes."),
            (r"(^|\.)local_model\.bn_edge_e\.", r"\1local.norm_edges."),
            (r"(^|\.)local_model\.", r"\1local."),
            (r"self_attn\.in_proj_", "attention.qkv."),
            (r"self_attn\.(out_proj|to_out)\.", "attention.proj."),
            (r"self_attn\.to_", "attention."),
            (r"self_attn\.fast_attention\.projection_matrix", "attention.projection"),
            (r"self_attn\.", "attention."),
            (r"norm1_local\.", "norm_local."),
            (r"norm1_attn\.", "norm_attention."),
            (r"norm2\.", "norm."),
            (r"ff_linear(\d)\.", r"fc\1."),
            (r"^post_mp\.FC_layers\.2\.", "head.out."),
            (r"^post_mp\.FC_layers\.", "head.hidden."),
            (r"^post_mp\.layer_post_mp\.model\.0\.Layer_(\d+)\.layer\.model\.", r"head.hidden.\1."),
            (r"^post_mp\.layer_post_mp\.model\.[01]\.model\.", "head.out."),
        ],
        drop=[r"local_model\.eps$"],
    )

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
        node_types: int | Sequence[int] | None = None,
        in_chans: int | None = None,
        edge_types: int | Sequence[int] | None = None,
        edge_chans: int | None = None,
        rwse_steps: int = 16,
        rwse_dim: int | None = None,
        lap_dim: int | None = None,
        stable_freqs: int | None = None,
        head: Literal["san", "mlp"] = "san",
        head_layers: int = 3,
        pooling: Pooling | None = "mean",
        pre_layer: bool = False,
        num_classes: int = 1,
        authors_quirks: bool = False,
    ) -> None:
        checks.one_of("head", head, ("san", "mlp"))
        rest = dim - (rwse_dim or 0) - (lap_dim or 0)
        if rest < 1:
            raise ValueError(f"rwse_dim and lap_dim must leave room for the features in dim={dim}, {rest} are left.")
        features = FeatureEncoder(rest, types=node_types, chans=in_chans)
        if pre_layer:
            features.encoder = nn.Linear(in_chans or 1, rest, bias=False)
        encodings: list[nn.Module] = [] if lap_dim is None else [LapPE(lap_dim)]
        if rwse_dim is not None:
            encodings.append(RWSE(rwse_dim, rwse_steps))
        edges = None
        if edge_types is not None or edge_chans is not None:
            edges = EdgeEncoder(FeatureEncoder(dim, types=edge_types, chans=edge_chans), single=edge_types == 1)
        widths = [dim, dim // 2, dim // 4] if head == "san" else [dim] * head_layers
        super().__init__(
            node_encoder=NodeEncoder(features, encodings, rest if pre_layer else None),
            edge_encoder=edges,
            position_encoder=None if stable_freqs is None else StableLapPE(dim, stable_freqs),
            layers=[
                GPSLayer(
                    dim,
                    num_heads,
                    local=local,
                    attention=attention,
                    norm=norm,
                    act=act,
                    dropout=dropout,
                    attn_dropout=attn_dropout,
                    stable=stable_freqs is not None,
                    authors_quirks=authors_quirks,
                )
                for _ in range(depth)
            ],
            head=GraphHead(
                widths,
                num_classes,
                pooling=pooling,
                act=_ACTS[checks.one_of("act", act, _ACTS)] if head == "san" else nn.ReLU,
                unit_length=head == "mlp",
            ),
        )
        if edges is None and local in ("gine", "gated_gcn"):
            raise ValueError(f"local={local!r} reads edges: give edge_types (1 if edges carry nothing) or edge_chans.")


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
