"""GraphGPS beyond its recordings: every option trains, graphs of a batch do not mix, wrong input is refused."""

import pytest
import torch

from regard.checkpoint import load_authors_weights
from regard.layers.graphs import PNA, FeatureEncoder, StableLapPE
from regard.systems.graphs.graphgps import ENCODINGS, GPS, LOCALS, GPSLayer, GPSMixer
from regard.tasks.graphs import collate_graphs, path_edges

TYPES = {"node_types": 5, "edge_types": 3}
ENCODED = {
    "lappe": {"dim": 4, "freqs": 3},
    "stable_lappe": {"freqs": 3},
    "signnet": {"dim": 4, "freqs": 3, "layers": 2, "hidden_dim": 6, "out_dim": 2},
    "rwse": {"dim": 4, "steps": 5},
    "hkdiag": {"dim": 4, "times": (1, 2)},
    "elstatic": {"dim": 4},
    "graphormer": {"distances": 3, "in_degrees": 4, "out_degrees": 4},
    "depth": {"most": 2},
}


def encoded(*names, **more):
    return [{"name": name, **ENCODED[name], **more} for name in names]


def model(**options):
    torch.manual_seed(0)
    return GPS(**{"dim": 16, "depth": 2, "num_heads": 2, "attn_dropout": 0.0, **TYPES, **options})


def graph(nodes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    edge_index = torch.from_numpy(path_edges(nodes))
    kinds = torch.randint(3, (edge_index.shape[1] // 2,), generator=generator)
    return {
        "x": torch.randint(5, (nodes,), generator=generator),
        "depth": torch.randint(5, (nodes,), generator=generator),
        "edge_index": edge_index,
        "edge_attr": kinds.repeat(2),
        "pairs": torch.randint(nodes, (2, 3), generator=generator),
    }


def batch(net, sizes=(6, 1, 20)):
    return collate_graphs([net.prepare(graph(size, seed)) for seed, size in enumerate(sizes)])


def same_alone(net, sizes=(6, 1, 20)):
    """Each graph alone gives what it gives in the batch."""
    net.eval()
    together = net.forward_features(batch(net, sizes))
    alone = [net.forward_features(net.prepare(graph(size, seed))) for seed, size in enumerate(sizes)]
    return torch.allclose(together, torch.cat(alone), atol=1e-5)


VARIANTS = [
    *({"local": local} for local in ("gine", "gated_gcn", "gen", "gat", "pna")),
    *({"local": local, "edge_types": None} for local in ("gcn", "gin")),
    *({"local": local, "encodings": encoded("stable_lappe")} for local in ("gine", "gated_gcn")),
    *({"encodings": encoded(name)} for name in ENCODED if name not in ("stable_lappe", "graphormer")),
    {"encodings": encoded("graphormer", "rwse"), "attention": "biased_transformer"},
    {
        "encodings": encoded("lappe") + encoded("graphormer", token=True),
        "attention": "biased_transformer",
        "pooling": "token",
        "head": "graphormer",
    },
    {"encodings": encoded("lappe", model="transformer", post_layers=2, raw_norm=True)},
    {"encodings": encoded("signnet", model="mlp")},
    {"encodings": encoded("rwse", model="mlp", raw_norm=False)},
    {"attention": "performer", "norm": "layer", "head": "mlp", "pooling": None},
    {"attention": "bigbird", "attention_options": {"random_blocks": 1, "block_size": 2}, "norm": None},
    {"local": None, "edge_types": None, "head": "mlp"},
    {"attention": None},
    {"head": "pairs", "pooling": None},
    {"head": "pairs", "pooling": None, "head_layers": 2, "head_options": {"decode": "concat"}, "num_classes": 3},
    {"head": "sequence", "head_options": {"length": 4}, "num_classes": 7},
]


def test_every_encoding_is_tried():
    assert ENCODED.keys() == ENCODINGS.keys()


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_every_parameter_learns(options):
    net = model(**options)
    out = net(batch(net))
    rows = {"pairs": (9,), "sequence": (3, 4)}.get(options.get("head"), (27,) if "pooling" in options else (3,))
    assert out.shape == (*((3,) if options.get("pooling") == "token" else rows), net.num_classes)
    (out * torch.randn(out.shape)).sum().backward()
    silent = [name for name, parameter in net.named_parameters() if parameter.grad is None]
    # Nobody reads the edges that the last GatedGCN makes.
    assert all("norm_edges" in name for name in silent), silent


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_graphs_of_a_batch_do_not_mix(options):
    assert same_alone(model(**options))


def test_messages_are_scaled_by_positions():
    net = model(local="gine", encodings=encoded("stable_lappe")).eval()
    given = batch(net)
    moved = given | {"lap_vectors": given["lap_vectors"] * 3}
    assert not torch.allclose(net(given), net(moved), atol=1e-4)


def test_released_token_leaves_the_edges_behind():
    options = {
        "encodings": encoded("graphormer", token=True),
        "attention": "biased_transformer",
        "pooling": "token",
    }
    ours, theirs = model(**options).eval(), model(**options, authors_quirks=True).eval()
    theirs.load_state_dict(ours.state_dict())
    assert not torch.allclose(ours(batch(ours)), theirs(batch(theirs)), atol=1e-4)


def test_norms_of_a_branch_that_is_not_there_are_passed_over():
    net = model(attention=None)
    state = {**net.state_dict(), "layers.0.norm_attention.weight": torch.ones(16)}
    assert net.adapt_state_dict(state).keys() == net.state_dict().keys()
    with pytest.raises(ValueError, match="nothing"):
        load_authors_weights(net, {"head.nothing": torch.ones(1)})


def test_saves_and_loads(tmp_path):
    net = model(encodings=encoded("rwse", "lappe")).eval()
    net.save_pretrained(tmp_path)
    again = GPS.from_pretrained(tmp_path).eval()
    given = batch(net)
    assert torch.equal(net(given), again(given))
    again.reset_classifier(4)
    assert again(given).shape == (3, 4)
    assert [one.shape for one in net.forward_intermediates(given, [-1])] == [(27, 16)]


@pytest.mark.parametrize("attention", ["performer", "bigbird"])
def test_mixers_of_every_kind_run_on_grids(attention):
    for local in LOCALS:
        mixer = GPSMixer(16, 2, local=local, attention=attention)
        out = mixer(torch.randn(2, 5, 9, 16))
        assert out.shape == (2, 5, 9, 16)
        out.sum().backward()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: model(local="pna", local_options={"scalers": ("amplification",)}), "degrees"),
        (lambda: model(local="gat", num_heads=3, attention="performer"), "num_heads"),
        (lambda: model(local="gcn", encodings=encoded("stable_lappe")), "stable"),
        (lambda: model(edge_types=None), "edge_types"),
        (lambda: model(encodings=[{"name": "rwes", "dim": 3}]), "rwse"),
        (lambda: model(encodings=[{"name": "rwse"}]), "dim"),
        (lambda: model(encodings=encoded("rwse", dim=16)), "room"),
        (lambda: model(encodings=encoded("graphormer"), edge_types=(2, 2)), "edge_types"),
        (lambda: model(encodings=encoded("lappe", "stable_lappe")), "eigenvectors"),
        (lambda: model(pooling="token"), "token"),
        (lambda: model(head="pairs", num_classes=2), "concat"),
        (lambda: model(head="sequence", head_options={"length": 2}, pooling=None), "pooling"),
        (lambda: model(attention="biased_transformer")(batch(model())), "graphormer"),
        (lambda: model(head="pairs", pooling=None)({"x": graph(3)["x"], "edge_index": graph(3)["edge_index"][:, :0],
                                                    "edge_attr": graph(3)["edge_attr"][:0]}), "pairs"),
        (lambda: model(encodings=encoded("rwse"))(graph(3)), "rwse"),
        (lambda: model(encodings=encoded("rwse", steps=4))(graph(3) | {"rwse": torch.zeros(3, 5)}), "4 columns"),
        (lambda: model().prepare(batch(model())), "one graph"),
        (lambda: GPSLayer(8, 2, local=None, attention=None), "both"),
        (lambda: GPSMixer(8, 2, attention="biased_transformer"), "grid"),
        (lambda: GPSLayer(8, 2, attention="bigbird", attention_options={"block_size": 0}), "block_size"),
        (lambda: FeatureEncoder(4), "types"),
        (lambda: PNA(4, aggregators=("median",)), "aggregators"),
        (lambda: StableLapPE(4, 3)({"lap_vectors": torch.zeros(2, 5)}, torch.zeros(2, 1), None), "3 columns"),
    ],
)  # fmt: skip
def test_wrong_input_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_degrees_beyond_the_table_are_named():
    net = model(encodings=encoded("graphormer", in_degrees=2), attention="biased_transformer")
    with pytest.raises(ValueError, match="in_degrees=3"):
        net(batch(net))
