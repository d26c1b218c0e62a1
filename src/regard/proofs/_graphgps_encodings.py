"""The encodings of GraphGPS against slow forms: what is computed of a graph, and what is made of it."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from regard.layers.graphs import GraphIndex, GraphormerEncoding, LapPE, SignNet, StableLapPE
from regard.layers.graphs.index import with_token
from regard.layouts import graphs as layouts
from regard.proofs.base import Check
from regard.proofs.recordings import Recording
from regard.skeletons.graph import index_graph
from regard.training import seeded


def _graph(seed: int, nodes: int = 9, extra: int = 4) -> dict[str, Tensor]:
    """A connected undirected graph, and two nodes more that are joined to each other alone."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {(i, int(torch.randint(i, (1,), generator=generator))) for i in range(1, nodes)}
    while len(pairs) < nodes - 1 + extra:
        a, b = sorted(torch.randint(nodes, (2,), generator=generator).tolist())
        pairs |= {(b, a)} if a != b else set()
    half = torch.tensor([*sorted(pairs), (nodes, nodes + 1)]).t()
    edge_index = torch.cat([half, half.flip(0)], 1)
    kinds = torch.randint(1, 4, (half.shape[1],), generator=generator).repeat(2)
    return {"x": torch.zeros(nodes + 2, dtype=torch.long), "edge_index": edge_index, "edge_attr": kinds}


def random_walks_equal() -> Check:
    """Our random-walk encoding against the one that the authors' code put into the recording."""
    recording = Recording.read("graphgps.model_zinc")
    theirs = recording.inputs["pestat_RWSE"]
    ours = layouts.random_walk_landing(recording.inputs["edge_index"], len(theirs), theirs.shape[1])
    error = float((ours - theirs).abs().max())
    return Check(
        "random-walk encodings equal those of the authors' get_rw_landing_probs",
        holds=error < 1e-6,
        figures={"largest_error": error, "nodes": len(theirs), "steps": theirs.shape[1]},
        setting="graphs of the recording model_zinc, probabilities in float32",
    )


def kernels_equal() -> Check:
    """Heat kernels against matrix exponentials, electrostatics against a pseudo-inverse and loops."""
    graph, times = _graph(0), (0.5, 1.0, 7.0)
    edge_index, nodes = graph["edge_index"], len(graph["x"])
    a = torch.zeros(nodes, nodes, dtype=torch.float64)
    for i, j in edge_index.t().tolist():
        a[i, j] = 1
    laplacian = a.sum(1).diag() - a
    share = torch.tensor([1 / 9] * 9 + [1 / 2] * 2, dtype=torch.float64)  # what is left in the end, in each part
    heat = torch.stack([torch.matrix_exp(-time * laplacian).diagonal() - share for time in times], 1)
    inverse = torch.linalg.pinv(laplacian, rtol=1e-10)
    rows = []
    for v in range(nodes):
        to_me = [float(inverse[i, v] - inverse[v, v]) for i in range(nodes)]
        from_me = [float(inverse[v, j] - inverse[j, j]) for j in range(nodes)]
        arrives = sum(to_me[i] * float(a[i, v] / a[i].sum()) for i in range(nodes))
        leaves = sum(from_me[j] * float(a[v, j] / a[v].sum()) for j in range(nodes))
        row = []
        for values in (to_me, from_me):
            mean = sum(values) / nodes
            spread = (sum((value - mean) ** 2 for value in values) / (nodes - 1)) ** 0.5
            row += [min(values), max(values), mean, spread]
        rows.append([*row, arrives, leaves])
    errors = {
        "heat": float((layouts.heat_kernel_diagonal(edge_index, nodes, times) - heat).abs().max()),
        "electrostatic": float((layouts.electrostatic_potentials(edge_index, nodes) - torch.tensor(rows)).abs().max()),
    }
    return Check(
        "heat kernels equal matrix exponentials, electrostatic statistics equal loops over a pseudo-inverse",
        holds=max(errors.values()) < 1e-6,
        figures=errors,
        setting="a graph of 11 nodes in two parts, results in float32",
    )


def eigenvector_codes() -> Check:
    """LapPE against a loop over nodes and frequencies, StableLapPE against one over eigenvectors."""
    graph, freqs = _graph(4), 14  # of 11 nodes: three are missing
    given = {key: value.double() for key, value in LapPE(1, freqs).prepare(graph).items()}
    index = index_graph(graph)
    errors = {}
    for layers in (1, 2, 3):
        net = seeded(lambda n=layers: LapPE(4, freqs, layers=n, post_layers=2), 0).double().eval()
        with torch.no_grad():
            rows = []
            for vector, value in zip(given["lap_vectors"], given["lap_values"], strict=True):
                pairs = torch.stack([vector, value], -1)
                codes = [net.pe_encoder(net.linear_A(pair)) for pair in pairs if not pair.isnan().any()]
                rows.append(net.post_mlp(sum(codes)))
            errors[f"layers_{layers}"] = float((net.codes(given, index) - torch.stack(rows)).abs().max())
    stable = seeded(lambda: StableLapPE(4, freqs), 0).double()
    with torch.no_grad():
        weight, bias = stable.linear_encoder_eigenvec.weight, stable.linear_encoder_eigenvec.bias
        slow = bias + sum(
            column[:, None] * w for column, w in zip(given["lap_vectors"].t()[:11], weight.t(), strict=False)
        )
        position = stable(given, torch.zeros(11, 1), index)[1].position
        errors["stable"] = float((position - slow).abs().max())
    return Check(
        "Laplacian codes equal loops over nodes and frequencies; a frequency that a graph lacks adds nothing",
        holds=max(errors.values()) < 1e-12,
        figures=errors,
        setting="a graph of 11 nodes, 14 eigenvectors, evaluation mode, float64",
    )


def sign_invariance() -> Check:
    """SignNet against a loop over eigenvectors, nodes and edges; turning signs changes nothing."""
    graph = _graph(1)
    edges, nodes = graph["edge_index"].t().tolist(), len(graph["x"])
    errors = {}
    for model, freqs in (("mlp", 5), ("deepset", 14)):  # 14 eigenvectors of 11 nodes: three are missing
        net = seeded(lambda m=model, k=freqs: SignNet(3, k, model=m, layers=3, hidden_dim=8, out_dim=4), 0)
        net = _drawn_norms(net.double()).eval()
        given = {key: value.double() for key, value in net.prepare(graph).items()} | {"edge_index": graph["edge_index"]}
        turned = given | {"lap_vectors": given["lap_vectors"] * (torch.arange(freqs) % 2 * 2.0 - 1)}
        given |= {"x": graph["x"]}
        index = index_graph(given)
        with torch.no_grad():
            ours, other = net.codes(given, index), net.codes(turned, index)
            slow = _slow_signnet(net, given["lap_vectors"], edges, nodes)
        errors |= {
            f"{model}_error": float((ours - slow).abs().max()),
            f"{model}_sign": float((ours - other).abs().max()),
        }
    return Check(
        "SignNet equals loops over eigenvectors, nodes and edges, and does not see their signs",
        holds=max(errors.values()) < 1e-10,
        figures=errors,
        setting="a graph of 11 nodes, 5 and 14 eigenvectors, float64",
    )


def _slow_signnet(net: SignNet, vectors: Tensor, edges: list[list[int]], nodes: int) -> Tensor:
    def mlp(part: torch.nn.Module, x: Tensor) -> Tensor:
        x = part.lins[0](x)
        for norm, linear in zip(part.bns, list(part.lins)[1:], strict=True):
            x = linear(norm(x.relu()[None])[0])
        return x

    def phi(column: list[float]) -> list[Tensor]:
        x = [torch.tensor([value], dtype=torch.float64) for value in column]
        for number, layer in enumerate(net.phi.layers):
            if number:
                x = [net.phi.bns[number - 1](node[None])[0] for node in x]
            x = [mlp(layer, x[i] + sum(x[j] for j, target in edges if target == i)) for i in range(nodes)]
        return x

    found = []  # for each eigenvector a list of nodes
    for column in vectors.t():
        missing = bool(column.isnan().all())
        values = [0.0] * nodes if missing else column.tolist()
        both = [a + b for a, b in zip(phi(values), phi([-value for value in values]), strict=True)]
        found.append([torch.zeros_like(b) for b in both] if missing and net.model == "deepset" else both)
    rows = zip(*found, strict=True)
    return torch.stack([mlp(net.rho, torch.cat(row) if net.model == "mlp" else sum(row)) for row in rows])


def _drawn_norms(module: torch.nn.Module) -> torch.nn.Module:
    """Fresh BatchNorms leave everything as it is; draw their statistics so that a mistake shows."""
    generator = torch.Generator().manual_seed(0)
    for name, buffer in module.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5, generator=generator)
    return module


def graphormer_bias() -> Check:
    """Shortest paths against Floyd's, the bias against a loop over pairs, the token against a graph with one more node."""
    limit, heads = 4, 2
    graphs = [_graph(2, nodes=8, extra=1), _graph(3, nodes=4, extra=0)]
    encoding = GraphormerEncoding(6, heads, 4, distances=limit, in_degrees=9, out_degrees=9, token=True).double()
    for parameter in encoding.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
    prepared = [encoding.prepare(graph) for graph in graphs]
    batch = {key: torch.cat([one[key] for one in prepared]) for key in prepared[0]}
    sizes = torch.tensor([len(graph["x"]) for graph in graphs])
    offsets = torch.tensor([0, *sizes.cumsum(0).tolist()])
    edge_index = torch.cat([graph["edge_index"] + start for graph, start in zip(graphs, offsets, strict=False)], 1)
    x = torch.randn(int(sizes.sum()), 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    index = GraphIndex(edge_index, offsets, torch.arange(2).repeat_interleave(sizes))
    with torch.no_grad():
        nodes, larger = encoding(batch, x, index)
        slow_bias = torch.cat([_slow_bias(encoding, graph, limit) for graph in graphs])
        degree = torch.stack([(edge_index == i).sum(1) for i in range(len(x))])  # (N, 2): out, in
        moved = x + encoding.in_degree_encoder(degree[:, 1]) + encoding.out_degree_encoder(degree[:, 0])
        plain, _ = with_token(moved, index, encoding.token.flatten(), encoding.token_bias.flatten())
        errors = {
            "nodes": float((nodes - plain).abs().max()),
            "bias_and_token": float((larger.bias - slow_bias).abs().max()),
            "edges_moved": int((larger.edge_index - edge_index != index.graph_of[edge_index] + 1).sum()),
        }
    wrong = sum(_wrong_paths(graph, one, limit) for graph, one in zip(graphs, prepared, strict=True))
    return Check(
        "Graphormer's bias equals a loop over pairs; shortest paths have the lengths that Floyd's algorithm finds",
        holds=max(errors.values()) < 1e-12 and wrong == 0,
        figures={**errors, "wrong_paths": wrong},
        setting="graphs of 10 and 6 nodes, each in two parts, paths cut at 3 edges, a token before each, float64",
    )


def _floyd(graph: dict[str, Tensor]) -> Tensor:
    nodes = len(graph["x"])
    far = torch.full((nodes, nodes), torch.inf)
    far.fill_diagonal_(0)
    far[tuple(graph["edge_index"])] = 1
    for middle in range(nodes):
        far = torch.minimum(far, far[:, middle, None] + far[None, middle])
    return far


def _wrong_paths(graph: dict[str, Tensor], prepared: dict[str, Tensor], limit: int) -> int:
    """Pairs whose distance is wrong, or whose edge types lead nowhere that is on the way."""
    far, nodes, wrong = _floyd(graph), len(graph["x"]), 0
    kinds = list(zip(*graph["edge_index"].tolist(), graph["edge_attr"].tolist(), strict=True))
    for i, j in itertools.product(range(nodes), range(nodes)):
        steps = int(prepared["distance"][i * nodes + j])
        expected = limit if far[i, j].isinf() else min(int(far[i, j]), limit - 1)
        here = {i}
        for kind in prepared["path_types"][i * nodes + j, : 0 if far[i, j].isinf() else steps].tolist():
            here = {target for source, target, other in kinds if source in here and other == kind}
        on_way = far[i, j].isinf() or any(far[node, j] == far[i, j] - steps for node in here)
        wrong += steps != expected or not on_way
    return wrong


def _slow_bias(encoding: GraphormerEncoding, graph: dict[str, Tensor], limit: int) -> Tensor:
    """The bias of one graph with its token, pair after pair."""
    nodes, heads = len(graph["x"]), encoding.num_heads
    prepared = encoding.prepare(graph)
    matrices = encoding.edge_dis_encoder.weight.view(limit, heads, heads)
    rows = []
    for i, j in itertools.product(range(nodes + 1), range(nodes + 1)):
        if i == 0 or j == 0:
            rows.append(encoding.token_bias.flatten())
            continue
        pair = (i - 1) * nodes + j - 1
        steps = int(prepared["distance"][pair])
        value = encoding.spatial_encoder.weight[steps]
        if 0 < steps < limit:
            types = prepared["path_types"][pair, :steps].tolist()
            value = value + sum(encoding.edge_encoder.weight[t] @ matrices[n] for n, t in enumerate(types)) / steps
        rows.append(value)
    return torch.stack(rows)
