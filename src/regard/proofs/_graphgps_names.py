"""The names and shapes in the authors' checkpoints of those parts of GraphGPS of which there is no recording."""

from __future__ import annotations

from torch import Tensor, nn, zeros

from regard.proofs.base import Check
from regard.systems.graphs.graphgps import GPS, GPSLayer

Names = dict[str, Tensor]
DIM = 8


def _linear(name: str, out: int, into: int, bias: bool = True) -> Names:
    return {f"{name}.weight": zeros(out, into), **({f"{name}.bias": zeros(out)} if bias else {})}


def _table(name: str, rows: int, width: int) -> Names:
    return _linear(name, rows, width, bias=False)


def _norm(name: str, width: int, batch: bool = True) -> Names:
    found = {f"{name}.{part}": zeros(width) for part in ("weight", "bias")}
    if batch:
        found |= {f"{name}.running_{part}": zeros(width) for part in ("mean", "var")}
        found[f"{name}.num_batches_tracked"] = zeros(())
    return found


def _local() -> dict[str, Names]:
    one = "local_model"
    attention = {f"{one}.att_{part}": zeros(1, 2, DIM // 2) for part in ("src", "dst", "edge")}
    return {
        "gin": {f"{one}.eps": zeros(1), **_linear(f"{one}.nn.0", DIM, DIM), **_linear(f"{one}.nn.2", DIM, DIM)},
        "gen": {
            **_linear(f"{one}.mlp.0", 2 * DIM, DIM, bias=False),
            **_norm(f"{one}.mlp.1", 2 * DIM),
            **_linear(f"{one}.mlp.4", DIM, 2 * DIM, bias=False),
        },
        "gat": {
            **attention,
            f"{one}.bias": zeros(DIM),
            **_linear(f"{one}.lin_src", DIM, DIM, bias=False),
            **_linear(f"{one}.lin_dst", DIM, DIM, bias=False),
            **_linear(f"{one}.lin_edge", DIM, DIM, bias=False),
        },
        "pna": {
            f"{one}.aggr_module.avg_deg_lin": zeros(1),
            f"{one}.aggr_module.avg_deg_log": zeros(1),
            **_linear(f"{one}.edge_encoder", DIM, DIM),
            **_linear(f"{one}.pre_nns.0.0", DIM, 3 * DIM),
            **_linear(f"{one}.post_nns.0.0", DIM, 4 * DIM),
            **_linear(f"{one}.lin", DIM, DIM),
        },
    }


def _stable() -> dict[str, Names]:
    one = "local_model"
    gate = {**_linear(f"{one}.mlp_r_ij.0", DIM, 1), **_linear(f"{one}.mlp_r_ij.2", 1, DIM)}
    gated = {key: value for part in "ABCDE" for key, value in _linear(f"{one}.{part}", DIM, DIM).items()}
    return {
        "gine": {
            f"{one}.eps": zeros(1),
            **_linear(f"{one}.nn.0", DIM, DIM),
            **_linear(f"{one}.nn.2", DIM, DIM),
            **gate,
        },
        "gated_gcn": {**gated, **gate, **_norm(f"{one}.bn_node_x", DIM), **_norm(f"{one}.bn_edge_e", DIM)},
    }


def _bigbird() -> Names:
    one = "self_attn.encoder.layers.0"
    found: Names = {}
    for part in ("query", "key", "value"):
        found |= _linear(f"{one}.attention.self.{part}", DIM, DIM, bias=False)
    for part in ("attention.output", "intermediate", "output"):
        found |= _linear(f"{one}.{part}.dense", DIM, DIM)
    for part in ("attention.output", "output"):
        found |= _norm(f"{one}.{part}.LayerNorm", DIM, batch=False)
    return found


def _signnet(name: str) -> Names:
    """3 layers of φ, 2 of ρ, 6 channels inside, 2 out of φ, 5 eigenvectors, a code of 3."""
    found: Names = {}
    for i, (into, out) in enumerate(((1, 6), (6, 6), (6, 2))):
        one = f"{name}.sign_inv_net.enc.layers.{i}"
        found |= {f"{one}.eps": zeros(1), **_linear(f"{one}.nn.lins.0", 6, into), **_linear(f"{one}.nn.lins.1", out, 6)}
        found |= _norm(f"{one}.nn.bns.0", 6)
    for i in range(2):
        found |= _norm(f"{name}.sign_inv_net.enc.bns.{i}", 6)
    one = f"{name}.sign_inv_net.rho"
    return found | {**_linear(f"{one}.lins.0", 6, 10), **_linear(f"{one}.lins.1", 3, 6), **_norm(f"{one}.bns.0", 6)}


def _graphormer(name: str) -> Names:
    """2 heads, 4 distances, 3 edge types, 5 and 7 degrees, with a token."""
    return {
        f"{name}.0.graph_token": zeros(1, 2, 1),
        **_table(f"{name}.0.spatial_encoder", 5, 2),
        **_table(f"{name}.0.edge_dis_encoder", 16, 1),
        **_table(f"{name}.0.edge_encoder", 3, 2),
        f"{name}.1.graph_token": zeros(1, DIM),
        **_table(f"{name}.1.in_degree_encoder", 5, DIM),
        **_table(f"{name}.1.out_degree_encoder", 7, DIM),
    }


def _encoders_and_heads() -> list[tuple[str, dict, Names]]:
    """What it is, how GPS is built with it, and the authors' names outside of the layers."""
    node, edge = "encoder.node_encoder", "encoder.edge_encoder"
    types = {"node_types": 9, "edge_types": 3}
    type_names = _table(f"{edge}.encoder", 3, DIM)
    nodes = lambda width: _table(f"{node}.encoder1.encoder", 9, width)  # noqa: E731
    san = {
        **_linear("post_mp.FC_layers.0", 4, DIM),
        **_linear("post_mp.FC_layers.1", 2, 4),
        **_linear("post_mp.FC_layers.2", 1, 2),
    }
    sign = {"dim": 3, "freqs": 5, "model": "mlp", "layers": 3, "hidden_dim": 6, "out_dim": 2, "post_layers": 2}
    kernel = {"dim": 3, "times": (1, 2), "model": "mlp", "layers": 2}
    graphormer = {"distances": 4, "in_degrees": 5, "out_degrees": 7, "token": True}
    charge = {**_norm(f"{node}.encoder2.raw_norm", 10), **_linear(f"{node}.encoder2.pe_encoder", 3, 10)}
    heat = {
        **_norm(f"{node}.encoder2.raw_norm", 2),
        **_linear(f"{node}.encoder2.pe_encoder.0", 6, 2),
        **_linear(f"{node}.encoder2.pe_encoder.2", 3, 6),
    }
    laplacian = {**_linear(f"{node}.encoder2.linear_A", 6, 2), **_linear(f"{node}.encoder2.pe_encoder.1", 3, 6)}
    stable = {**_norm(f"{node}.encoder2.raw_norm", 4), **_linear(f"{node}.encoder2.linear_encoder_eigenvec", DIM, 4)}
    code = {
        **_table(f"{node}.type_encoder", 5, DIM),
        **_table(f"{node}.attribute_encoder", 7, DIM),
        **_table(f"{node}.depth_encoder", 21, DIM),
        **_table(f"{edge}.embedding_type", 2, DIM),
        **_table(f"{edge}.embedding_direction", 2, DIM),
    }
    places = [_linear(f"post_mp.graph_pred_linear_list.{i}", 11, DIM) for i in range(2)]
    pair = {
        **_linear("post_mp.layer_post_mp.model.0.Layer_0.layer.model", DIM, DIM),
        **_linear("post_mp.layer_post_mp.model.1.model", DIM, DIM),
    }
    token_head = {**_norm("post_mp.ln", DIM, batch=False), **_linear("post_mp.layers.0", 1, DIM)}
    alone = {**_linear(f"{node}.linear_x", DIM - 3, 4), **_signnet(node), **type_names, **san}
    return [
        (
            "signnet",
            {**types, "encodings": [{"name": "signnet", **sign}]},
            {**nodes(5), **_signnet(f"{node}.encoder2"), **type_names, **san},
        ),
        ("signnet_alone", {"in_chans": 4, "edge_types": 3, "encodings": [{"name": "signnet", **sign}]}, alone),
        (
            "lappe",
            {**types, "encodings": [{"name": "lappe", "dim": 3}]},
            {**nodes(5), **laplacian, **type_names, **san},
        ),
        ("hkdiag", {**types, "encodings": [{"name": "hkdiag", **kernel}]}, {**nodes(5), **heat, **type_names, **san}),
        (
            "elstatic",
            {**types, "encodings": [{"name": "elstatic", "dim": 3}]},
            {**nodes(5), **charge, **type_names, **san},
        ),
        (
            "stable_lappe",
            {**types, "encodings": [{"name": "stable_lappe", "freqs": 4, "raw_norm": True}]},
            {**nodes(DIM), **stable, **type_names, **san},
        ),
        (
            "graphormer",
            {**types, "encodings": [{"name": "graphormer", **graphormer}], "pooling": "token", "head": "graphormer"},
            {**nodes(DIM), **_graphormer(f"{node}.encoder2"), **type_names, **token_head},
        ),
        (
            "code",
            {
                "node_types": (5, 7),
                "edge_types": (2, 2),
                "encodings": [{"name": "depth", "most": 20}],
                "head": "sequence",
                "head_options": {"length": 2},
                "num_classes": 11,
            },
            {**code, **places[0], **places[1]},
        ),
        (
            "pairs",
            {**types, "head": "pairs", "head_layers": 2, "pooling": None},
            {**_table(f"{node}.encoder", 9, DIM), **type_names, **pair},
        ),
    ]


def authors_names() -> Check:
    """Every authors' name of these parts becomes one of ours with the same shape, and none of ours is left without."""
    wrong, tensors, parts = [], 0, 0

    def compare(part: str, module: nn.Module, outside: tuple[str, ...], names: Names) -> None:
        nonlocal tensors, parts
        theirs = {key: tuple(value.shape) for key, value in GPS.authors_keys.apply(names).items()}
        ours = {key: tuple(value.shape) for key, value in module.state_dict().items() if key.startswith(outside)}
        tensors, parts = tensors + len(names), parts + 1
        if theirs != ours:
            wrong.append(part)

    for kind, names in _local().items():
        compare(kind, GPSLayer(DIM, 2, local=kind), ("local.",), names)
    for kind, names in _stable().items():
        compare(f"stable {kind}", GPSLayer(DIM, 2, local=kind, stable=True), ("local.",), names)
    compare("bigbird", GPSLayer(DIM, 2, attention="bigbird"), ("attention.",), _bigbird())
    for part, options, names in _encoders_and_heads():
        model = GPS(DIM, 1, 2, **options)
        compare(part, model, ("node_encoder.", "edge_encoder.", "head."), {f"model.{k}": v for k, v in names.items()})
    return Check(
        "the names in the authors' checkpoints map to ours, shape by shape, with none left over or missing",
        holds=not wrong,
        figures={
            "tensors": tensors,
            "parts": parts,
            "wrong": ", ".join(wrong),
        },
        setting="parts without a recording: local networks, BigBird, encodings, heads for pairs and sequences",
    )
