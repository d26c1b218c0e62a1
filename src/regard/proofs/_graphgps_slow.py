"""GraphGPS said a second time and slowly: loops over nodes and edges that follow the equations one by one, in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from regard.layers.graphs import BigBirdLayer, GraphIndex, NodeAttention, PerformerAttention
from regard.layers.graphs.bigbird import seen_blocks
from regard.systems.graphs.graphgps import GPSLayer

Edges = list[list[tuple[int, int]]]
"""For each node the edges that arrive there: their numbers and sources."""


def small_batch(seed: int, sizes: tuple[int, ...] = (7, 1, 12), dim: int = 16) -> tuple[Tensor, Tensor, GraphIndex]:
    """Three directed graphs with loops and repeated edges; nodes, edges, and an index with positions and biases."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()])
    edges = [
        start + torch.randint(size, (2, 3 * size), generator=generator)
        for start, size in zip(offsets[:-1].tolist(), sizes, strict=True)
    ]
    edge_index = torch.cat(edges, 1)
    graph_of = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    pairs = int(offsets.diff().square().sum())
    x, e, position, bias = (
        torch.randn(rows, columns, dtype=torch.float64, generator=generator)
        for rows, columns in ((len(graph_of), dim), (edge_index.shape[1], dim), (len(graph_of), 3), (pairs, 2))
    )
    return x, e, GraphIndex(edge_index, offsets, graph_of, position, bias)


def arriving(index: GraphIndex) -> Edges:
    """The edges that arrive at each node."""
    found: Edges = [[] for _ in index.graph_of]
    for number, (source, target) in enumerate(index.edge_index.t().tolist()):
        found[target].append((number, source))
    return found


def slow_layer(layer: GPSLayer, kind: str, x: Tensor, e: Tensor, index: GraphIndex) -> Tensor:
    """What `layer(x, e, index)` gives for the nodes, in evaluation mode."""
    near = arriving(index)
    rows = [LOCAL[kind](layer.local, x, e, i, near, index.position) for i in range(len(x))]
    attended, seen = [], 0
    for start, stop in index.offsets.unfold(0, 2, 1).tolist():
        bias = index.bias[seen : seen + (stop - start) ** 2].view(stop - start, stop - start, -1)
        attended.append(slow_attention(layer.attention, x[start:stop], bias if layer.biased else None))
        seen += (stop - start) ** 2
    h = layer.norm_local(x + torch.stack(rows)) + layer.norm_attention(x + torch.cat(attended))
    return layer.norm(h + layer.fc2(layer.fc1(h).relu()))


Slow = Callable[[torch.nn.Module, Tensor, Tensor, int, Edges, "Tensor | None"], Tensor]


def _gate(local: torch.nn.Module, i: int, j: int, position: Tensor | None) -> Tensor | float:
    gate = dict(local.named_children()).get("gate")
    if gate is None:
        return 1.0
    distance = sum((a - b) ** 2 for a, b in zip(position[i], position[j], strict=True))
    return gate.fc2(gate.fc1(distance.view(1)).relu()).sigmoid()


def _gin(local: torch.nn.Module, x: Tensor, e: Tensor, i: int, near: Edges, position: Tensor | None) -> Tensor:
    return local.mlp(x[i] + sum(x[j] for _, j in near[i]))


def _gine(local: torch.nn.Module, x: Tensor, e: Tensor, i: int, near: Edges, position: Tensor | None) -> Tensor:
    return local.mlp(x[i] + sum((x[j] + e[n]).relu() * _gate(local, i, j, position) for n, j in near[i]))


def _gated_gcn(local: torch.nn.Module, x: Tensor, e: Tensor, i: int, near: Edges, position: Tensor | None) -> Tensor:
    weights = [
        (local.D(x[i]) + local.E(x[j]) + local.C(e[n])).sigmoid() * _gate(local, i, j, position) for n, j in near[i]
    ]
    total = sum(weights) + 1e-6
    mean = sum(w * local.B(x[j]) for w, (_, j) in zip(weights, near[i], strict=True)) / total
    return local.act(local.norm_nodes((local.A(x[i]) + mean)[None])[0])


def _gcn(local: torch.nn.Module, x: Tensor, e: Tensor, i: int, near: Edges, position: Tensor | None) -> Tensor:
    degree = [1 + sum(j != k for _, j in edges) for k, edges in enumerate(near)]
    parts = [local.lin(x[j]) / (degree[i] * degree[j]) ** 0.5 for _, j in near[i] if j != i]
    return sum(parts, local.lin(x[i]) / degree[i]) + local.bias


def _gen(local: torch.nn.Module, x: Tensor, e: Tensor, i: int, near: Edges, position: Tensor | None) -> Tensor:
    messages = [(x[j] + e[n]).relu() + 1e-7 for n, j in near[i]]
    total = sum(m.exp() for m in messages)
    h = x[i] + sum(m.exp() / total * m for m in messages)
    return local.fc2(local.norm(local.fc1(h)[None])[0].relu())


def _gat(local: torch.nn.Module, x: Tensor, e: Tensor, i: int, near: Edges, position: Tensor | None) -> Tensor:
    heads, width = local.att_src.shape[1:]
    edges = [(e[n], j) for n, j in near[i] if j != i]
    usual = torch.stack([feature for feature, _ in edges]).mean(0) if edges else torch.zeros_like(x[i])
    edges.append((usual, i))
    out = []
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        logits = []
        for feature, j in edges:
            logit = local.att_src[0, h] @ local.lin(x[j])[part] + local.att_dst[0, h] @ local.lin(x[i])[part]
            logit = logit + local.att_edge[0, h] @ local.lin_edge(feature)[part]
            logits.append(logit if logit > 0 else 0.2 * logit)
        alpha = torch.stack(logits).softmax(0)
        out.append(sum(a * local.lin(x[j])[part] for a, (_, j) in zip(alpha, edges, strict=True)))
    return torch.cat(out) + local.bias


def _pna(local: torch.nn.Module, x: Tensor, e: Tensor, i: int, near: Edges, position: Tensor | None) -> Tensor:
    messages = [local.pre(torch.cat([x[i], x[j], local.edge_encoder(e[n])])) for n, j in near[i]]
    nothing = torch.zeros_like(x[i])
    together = torch.stack(messages) if messages else nothing[None]
    mean = together.mean(0)
    deviation = ((together - mean) ** 2).mean(0).clamp(min=1e-5).sqrt()
    found = {
        "mean": mean,
        "min": together.amin(0),
        "max": together.amax(0),
        "sum": together.sum(0) if messages else nothing,
        "std": deviation,
    }
    degree = torch.tensor(float(max(1, len(messages))), dtype=torch.float64)
    log, linear = (degree + 1).log() / local.avg_deg_log, degree / local.avg_deg_lin
    scale = {
        "identity": 1.0,
        "amplification": log,
        "attenuation": 1 / log,
        "linear": linear,
        "inverse_linear": 1 / linear,
    }
    parts = [found[a] * scale[s] for s in local.scalers for a in local.aggregators]
    return local.lin(local.post(torch.cat([x[i], *parts])))


LOCAL: dict[str, Slow] = {
    "gin": _gin,
    "gine": _gine,
    "gated_gcn": _gated_gcn,
    "gcn": _gcn,
    "gen": _gen,
    "gat": _gat,
    "pna": _pna,
}


def slow_attention(attention: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention within one graph `(N, dim)`, a head and, for BigBird, a pair of nodes at a time."""
    if isinstance(attention, BigBirdLayer):
        return _slow_bigbird(attention, x)
    if isinstance(attention, NodeAttention):
        q, k, v = attention.qkv(x).chunk(3, -1)
    else:
        q, k, v = attention.q(x), attention.k(x), attention.v(x)
    width, outs = attention.head_dim, []
    for head in range(attention.num_heads):
        part = slice(head * width, (head + 1) * width)
        if isinstance(attention, PerformerAttention):
            weights = _slow_features(attention, q[:, part], True) @ _slow_features(attention, k[:, part], False).t()
        else:
            logits = q[:, part] @ k[:, part].t() / width**0.5
            weights = (logits if bias is None else logits + bias[..., head]).exp()
        outs.append(weights @ v[:, part] / weights.sum(-1, keepdim=True))
    return attention.proj(torch.cat(outs, -1))


def _slow_features(attention: PerformerAttention, z: Tensor, query: bool) -> Tensor:
    w = attention.projection * attention.head_dim**-0.25
    logits = z @ w.t()
    peak = logits.amax(-1, keepdim=True) if query else logits.max()
    return (logits - z.square().sum(-1, keepdim=True) / 2 / attention.head_dim**0.5 - peak).exp() + 1e-4


def _slow_bigbird(layer: BigBirdLayer, x: Tensor) -> Tensor:
    count = -(-len(x) // layer.block_size)
    q, k, v = layer.q(x), layer.k(x), layer.v(x)
    outs = torch.zeros_like(q)
    for head, i in itertools.product(range(layer.num_heads), range(len(x))):
        part = slice(head * layer.head_dim, (head + 1) * layer.head_dim)
        seen = visible_blocks(layer, count)[head][i // layer.block_size]
        keys = [j for j in range(len(x)) if j // layer.block_size in seen]
        alpha = (k[keys, part] @ q[i, part] / layer.head_dim**0.5).softmax(0)
        outs[i, part] = alpha @ v[keys, part]
    h = layer.norm1(x + layer.proj(outs))
    return layer.norm2(h + layer.fc2(layer.fc1(h).relu()))


def visible_blocks(layer: BigBirdLayer, count: int) -> list[list[set[int]]]:
    """For each head and block the blocks that it sees, in a graph of `count` blocks."""
    every = set(range(count))
    if count - 4 <= layer.random_blocks:
        return [[every] * count for _ in range(layer.num_heads)]
    drawn = seen_blocks(count, layer.random_blocks, layer.num_heads, layer.seed)[0][..., 5:].tolist()
    found = []
    for head in range(layer.num_heads):
        middle = [{0, i - 1, i, i + 1, count - 1, *drawn[head][i - 1]} for i in range(1, count - 1)]
        found.append([every, *middle, every])
    return found
