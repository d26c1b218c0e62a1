"""Proofs of GraphGPS: recordings of the authors' layers and ZINC model; what the global branch and the encodings bring."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.checkpoint import KeyMap
from regard.layers.graphs import GraphIndex
from regard.layouts.graphs import random_walk_landing
from regard.layouts.ragged import offsets_from_ids
from regard.measure import growth, median_seconds
from regard.proofs.base import Check, Preset, Proofs, Recipe
from regard.proofs.experiments import headline, over_seeds
from regard.proofs.recordings import Recorded, Recording
from regard.systems.graphs.graphgps import GPS, GPSLayer
from regard.tasks import create_task
from regard.tasks.graphs import GraphTask
from regard.training import TrainConfig, seeded

_LOCALS = {"CustomGatedGCN": "gated_gcn", "GINE": "gine"}


def _layer(config: dict) -> GPSLayer:
    return GPSLayer(
        config["dim_h"],
        config["num_heads"],
        local=_LOCALS[config["local_gnn_type"]],
        attention=config["global_model_type"].lower(),
        act=config["act"],
        dropout=config["dropout"],
        attn_dropout=config["attn_dropout"],
        authors_quirks=True,
    )


def _run_layer(layer: GPSLayer, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    batch = inputs["batch"]
    index = GraphIndex(inputs["edge_index"], offsets_from_ids(batch, int(batch.max()) + 1), batch)
    x, edges = layer(inputs["x"], inputs["edge_attr"], index)
    changed = edges is not inputs["edge_attr"]
    return {"x": x, "edge_attr": edges} if changed else {"x": x}


def _model(config: dict) -> GPS:
    changes = config["overrides"]
    return GPS(
        dim=changes["gt.dim_hidden"],
        depth=changes["gt.layers"],
        num_heads=changes["gt.n_heads"],
        local="gine",
        node_types=changes["dataset.node_encoder_num_types"],
        edge_types=changes["dataset.edge_encoder_num_types"],
        rwse_steps=8,
        rwse_dim=changes["posenc_RWSE.dim_pe"],
        pooling="add",
        num_classes=config["dim_out"],
    )


def _run_model(model: GPS, inputs: dict[str, Tensor]) -> Tensor:
    names = {"pestat_RWSE": "rwse"}
    return model({names.get(name, name): value for name, value in inputs.items()})


def encoding_equals() -> Check:
    """Our random-walk encoding against the one that the authors' code put into the recording."""
    recording = Recording.read("graphgps.model_zinc")
    theirs = recording.inputs["pestat_RWSE"]
    ours = random_walk_landing(recording.inputs["edge_index"], len(theirs), theirs.shape[1])
    error = float((ours - theirs).abs().max())
    return Check(
        "random-walk encodings equal those of the authors' get_rw_landing_probs",
        holds=error < 1e-6,
        figures={"largest_error": error, "nodes": len(theirs), "steps": theirs.shape[1]},
        setting="graphs of the recording model_zinc, probabilities in float32",
    )


def _small_batch(seed: int, sizes: tuple[int, ...] = (7, 1, 12)) -> tuple[Tensor, Tensor, GraphIndex]:
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()])
    edges = [
        start + torch.randint(size, (2, 3 * size), generator=generator)
        for start, size in zip(offsets[:-1].tolist(), sizes, strict=True)
    ]
    edge_index = torch.cat(edges, 1)
    graph_of = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    x = torch.randn(len(graph_of), 16, dtype=torch.float64, generator=generator)
    e = torch.randn(edge_index.shape[1], 16, dtype=torch.float64, generator=generator)
    return x, e, GraphIndex(edge_index, offsets, graph_of)


def independent_form() -> Check:
    """Layers against loops over nodes and edges that follow the equations one by one, in float64."""
    errors = {}
    for local in ("gine", "gated_gcn"):
        for attention in ("transformer", "performer"):
            layer = seeded(lambda a=local, b=attention: GPSLayer(16, 2, local=a, attention=b), 0).double().eval()
            x, e, index = _small_batch(1)
            with torch.no_grad():
                ours, _ = layer(x, e, index)
                errors[f"{local}_{attention}"] = float((ours - _slow_layer(layer, x, e, index)).abs().max())
    return Check(
        "layers equal loops over nodes and edges; a graph does not depend on the others of its batch",
        holds=max(errors.values()) < 1e-10,
        figures=errors,
        setting="three graphs of 7, 1 and 12 nodes, float64, directed edges, loops and repeats among them",
    )


def _slow_layer(layer: GPSLayer, x: Tensor, e: Tensor, index: GraphIndex) -> Tensor:
    arriving: list[list[tuple[int, int]]] = [[] for _ in x]
    for number, (source, target) in enumerate(index.edge_index.t().tolist()):
        arriving[target].append((number, source))
    local = layer.local
    rows = []
    for i, edges in enumerate(arriving):
        if hasattr(local, "mlp"):
            rows.append(local.mlp(x[i] + sum((x[j] + e[n]).relu() for n, j in edges)))
        else:
            weights = [(local.D(x[i]) + local.E(x[j]) + local.C(e[n])).sigmoid() for n, j in edges]
            total = sum(weights) + 1e-6
            near = sum(w * local.B(x[j]) for w, (_, j) in zip(weights, edges, strict=True)) / total
            rows.append(local.act(local.norm_nodes((local.A(x[i]) + near)[None])[0]))
    attended = []
    for start, stop in index.offsets.unfold(0, 2, 1).tolist():
        attended.append(_slow_attention(layer.attention, x[start:stop]))
    h = layer.norm_local(x + torch.stack(rows)) + layer.norm_attention(x + torch.cat(attended))
    return layer.norm(h + layer.fc2(layer.fc1(h).relu()))


def _slow_attention(attention: torch.nn.Module, x: Tensor) -> Tensor:
    width, outs = attention.head_dim, []
    if hasattr(attention, "projection"):
        q, k, v = attention.q(x), attention.k(x), attention.v(x)
    else:
        q, k, v = attention.qkv(x).chunk(3, -1)
    for head in range(attention.num_heads):
        part = slice(head * width, (head + 1) * width)
        if hasattr(attention, "projection"):
            w = attention.projection * width**-0.25
            most = (k[:, part] @ w.t()).max()
            phi = [
                (z @ w.t() - z.square().sum(-1, keepdim=True) / 2 / width**0.5, peak)
                for z, peak in ((q[:, part], (q[:, part] @ w.t()).amax(-1, keepdim=True)), (k[:, part], most))
            ]
            features = [(logits - peak).exp() + 1e-4 for logits, peak in phi]
            weights = features[0] @ features[1].t()
            outs.append(weights @ v[:, part] / weights.sum(-1, keepdim=True))
        else:
            outs.append((q[:, part] @ k[:, part].t() / width**0.5).softmax(-1) @ v[:, part])
    return attention.proj(torch.cat(outs, -1))


def renumbering() -> Check:
    """Renumbering the nodes of each graph renumbers the outputs and changes nothing else."""
    layer = seeded(lambda: GPSLayer(16, 2, local="gated_gcn"), 0).double().eval()
    x, e, index = _small_batch(2)
    generator = torch.Generator().manual_seed(3)
    place = torch.cat(
        [
            start + torch.randperm(stop - start, generator=generator)
            for start, stop in index.offsets.unfold(0, 2, 1).tolist()
        ]
    )
    with torch.no_grad():
        before, _ = layer(x, e, index)
        moved, _ = layer(
            torch.empty_like(x).index_copy(0, place, x), e, index._replace(edge_index=place[index.edge_index])
        )
    error = float((moved[place] - before).abs().max())
    return Check("layers commute with renumbering the nodes", error < 1e-10, {"largest_error": error}, "float64")


def recipe(preset: Preset) -> Recipe:
    """Which circular skip link graph is it? With random-walk encodings; "paper" has the ZINC model's dimensions."""
    task = create_task("csl")
    steps = {"smoke": 2, "small": 150, "paper": 2000}[preset]
    size = {"dim": 64, "depth": 10, "rwse_dim": 28} if preset == "paper" else {"dim": 32, "depth": 2, "rwse_dim": 12}
    model = seeded(lambda: _for_task(task, **size), 0)
    return Recipe(model, task, TrainConfig(steps=steps, batch_size=16, lr=5e-3, weight_decay=1e-5))


def _made_once(name: str, train_items: int, eval_items: int, **options: int) -> GraphTask:
    """A task whose graphs are made once and not again in every run: their encodings cost more than a training step."""
    task = create_task(name, train_items=train_items, eval_items=eval_items, **options)
    task.train_set, task.eval_set = ([part[i] for i in range(len(part))] for part in (task.train_set, task.eval_set))
    return task


def _for_task(task: GraphTask, *, dim: int = 32, depth: int = 2, **options) -> GPS:
    defaults = {"local": "gine", "rwse_steps": task.rwse_steps, "attn_dropout": 0.0, "head": "mlp", "head_layers": 1}
    return GPS(
        dim,
        depth,
        num_classes=task.num_classes,
        node_types=task.num_node_types,
        edge_types=1,
        pooling="mean" if task.level == "graph" else None,
        **{**defaults, **options},
    )


def global_branch_reaches_far(preset: Preset) -> Check:
    """A label 30 to 40 edges away: message passing alone against message passing with attention."""
    sizes = (16, 8) if preset == "smoke" else (1200, 200)
    task = _made_once("far_label", *sizes, rwse_steps=1, lap_size=1)
    config = TrainConfig(steps=2 if preset == "smoke" else 150, batch_size=16, lr=5e-3, weight_decay=1e-5)
    seeds = (0,) if preset == "smoke" else (0, 1, 2)
    # Without attention a layer has two thirds of the parameters, so that three layers stand against two.
    models = {"gps": {"depth": 2}, "message_passing_only": {"depth": 3, "attention": None}}
    figures: dict[str, float | list[float]] = {"chance": 1 / task.num_classes}
    for name, options in models.items():
        build = lambda o=options: _for_task(task, **o)  # noqa: E731
        figures[name] = headline(task, over_seeds(build, task, config, seeds))
        figures[f"{name}_params"] = sum(p.numel() for p in build().parameters())
    return Check(
        "Attention over all nodes carries what message passing cannot (section 3.2: over-squashing and reach)",
        holds=min(figures["gps"]) > 0.9 and max(figures["message_passing_only"]) < 0.25,
        figures=figures,
        setting=f"far_label on paths, 8 labels, {config.steps} steps, seeds {list(seeds)}, accuracy; holds if every "
        "GPS run is above 0.9 and every other below 0.25",
    )


def encodings_tell_graphs_apart(preset: Preset) -> Check:
    """Circular skip link graphs with no encoding, with random walks and with Laplacian eigenvectors."""
    task = _made_once("csl", *((20, 10) if preset == "smoke" else (320, 100)))
    config = TrainConfig(steps=2 if preset == "smoke" else 200, batch_size=16, lr=5e-3, weight_decay=1e-5)
    seeds = (0,) if preset == "smoke" else (0, 1, 2)
    figures: dict[str, float | list[float]] = {"chance": 1 / task.num_classes}
    for name, options in (("none", {}), ("rwse", {"rwse_dim": 12}), ("lappe", {"lap_dim": 12})):
        figures[name] = headline(task, over_seeds(lambda o=options: _for_task(task, **o), task, config, seeds))
    return Check(
        "Without encodings the layer cannot tell regular graphs apart, with either encoding it can (section 3.1)",
        holds=max(figures["none"]) <= 0.2 and min(figures["rwse"]) > 0.95 and min(figures["lappe"]) > 0.95,
        figures=figures,
        setting=f"csl, 10 classes, {config.steps} steps, seeds {list(seeds)}, accuracy; holds if every run without "
        "encodings is at most 0.2 and every other above 0.95",
    )


def linear_cost(preset: Preset) -> Check:
    """Time of one layer over growing sparse graphs, with softmax attention and with the Performer."""
    sizes = [256, 512] if preset == "smoke" else [1024, 2048, 4096, 8192]
    figures: dict[str, float] = {}
    for attention in ("transformer", "performer"):
        layer = seeded(lambda a=attention: GPSLayer(64, 4, local="gine", attention=a), 0).eval()
        times = []
        for nodes in sizes:
            generator = torch.Generator().manual_seed(nodes)
            edge_index = torch.randint(nodes, (2, 4 * nodes), generator=generator)
            x, e = (torch.randn(n, 64, generator=generator) for n in (nodes, 4 * nodes))
            index = GraphIndex(edge_index, torch.tensor([0, nodes]), torch.zeros(nodes, dtype=torch.long))
            with torch.no_grad():
                times.append(median_seconds(lambda: layer(x, e, index), repeats=3))  # noqa: B023
        figures[f"{attention}_time_growth"] = round(growth(sizes, times), 2)
        figures[f"{attention}_seconds_at_largest"] = round(times[-1], 3)
    return Check(
        "With a linear attention the layer costs O(N + E), with softmax attention O(N²) (section 3.3)",
        holds=figures["performer_time_growth"] < 1.3 and figures["transformer_time_growth"] > 1.5,
        figures=figures,
        setting=f"one graph of {sizes} nodes with 4 edges a node, dim 64, 4 heads; exponent of nodes fitted to seconds; "
        "holds if below 1.3 and above 1.5",
    )


_LAYER_KEYS = KeyMap(rules=GPS.authors_keys.rules, drop=GPS.authors_keys.drop)

PROOFS = Proofs(
    recordings=(
        Recorded("graphgps.layer_gatedgcn_transformer", build=_layer, run=_run_layer, keys=_LAYER_KEYS),
        Recorded("graphgps.layer_gine_performer", build=_layer, run=_run_layer, keys=_LAYER_KEYS),
        Recorded("graphgps.model_zinc", build=_model, run=_run_model),
    ),
    checks=(encoding_equals, independent_form, renumbering),
    recipe=recipe,
    claims=(global_branch_reaches_far, encodings_tell_graphs_apart, linear_cost),
)
