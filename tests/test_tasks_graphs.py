"""Graph tasks: regular graphs that colour refinement cannot tell apart, labels that lie far, molecules, and the encodings."""

from collections import Counter, deque
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader

from regard.layouts.graphs import (
    degrees,
    electrostatic_potentials,
    heat_kernel_diagonal,
    laplacian_eigenpairs,
    random_walk_landing,
    shortest_paths,
)
from regard.proofs import get_proofs
from regard.tasks import create_task, own_data
from regard.tasks.graphs import circulant_edges, collate_graphs, path_edges
from regard.tasks.molecules import ATOMS, VALENCES, WORTH
from regard.training import TrainConfig, evaluate, train

GOLDEN = Path(__file__).parent / "golden" / "graphgps.model_zinc.safetensors"
EDGES = torch.from_numpy(path_edges(4))


class Answers(nn.Module):
    """Answers with what `rule(graph)` says, as logits."""

    def __init__(self, rule, classes):
        super().__init__()
        self.rule, self.classes, self.scale = rule, classes, nn.Parameter(torch.ones(()))

    def forward(self, graph):
        assert "label" not in graph
        return self.scale * nn.functional.one_hot(self.rule(graph), self.classes).float()


def neighbours(item):
    found = {node: [] for node in range(len(item["x"]))}
    for source, target in item["edge_index"].T.tolist():
        found[source].append(target)
    return found


def hops(item, start):
    near, distance, queue = neighbours(item), {start: 0}, deque([start])
    while queue:
        node = queue.popleft()
        for other in near[node]:
            if other not in distance:
                distance[other] = distance[node] + 1
                queue.append(other)
    return distance


def refined_colours(item, rounds):
    """The colours that message passing can reach at best: each round joins a node's colour and its neighbours'."""
    near, colours = neighbours(item), item["x"].tolist()
    for _ in range(rounds):
        colours = [hash((colours[node], tuple(sorted(colours[o] for o in near[node])))) for node in near]
    return Counter(colours)


# ---------------------------------------------------------------------------------------------- encodings


def test_random_walks_return_as_counted_by_hand():
    landing = random_walk_landing(EDGES, 4, 4)  # the path 0 - 1 - 2 - 3
    assert torch.allclose(landing[:, 0], torch.zeros(4))
    assert torch.allclose(landing[:, 2], torch.zeros(4))
    assert torch.allclose(landing[:, 1], torch.tensor([0.5, 0.75, 0.75, 0.5]))
    assert torch.allclose(landing[:, 3], torch.tensor([0.375, 0.6875, 0.6875, 0.375]))
    directed = torch.tensor([[0, 1, 2], [1, 2, 0]])
    assert random_walk_landing(directed, 4, 3).tolist() == [[0, 0, 1]] * 3 + [[0, 0, 0]]  # node 3 is isolated


def test_random_walks_equal_a_recording_of_the_authors_code():
    if not GOLDEN.exists():
        pytest.skip("the recording is not in tests/golden")
    recorded = load_file(GOLDEN)
    landing = random_walk_landing(recorded["input/edge_index"], len(recorded["input/x"]), 8)
    assert torch.allclose(landing, recorded["input/pestat_RWSE"], atol=1e-6)


@pytest.mark.parametrize("normalization", ["none", "sym", "rw"])
def test_eigenpairs_solve_their_equation(normalization):
    edges = torch.tensor([[0, 1, 1, 2, 2, 3, 1, 3, 4, 5], [1, 0, 2, 1, 3, 2, 3, 1, 5, 4]])
    a = torch.zeros(6, 6)
    a[edges[0], edges[1]] = 1
    degree = a.sum(1)
    laplacian = {
        "none": degree.diag() - a,
        "sym": torch.eye(6) - a / (degree[:, None] * degree).sqrt(),
        "rw": torch.eye(6) - a / degree[:, None],
    }[normalization]
    vectors, values = laplacian_eigenpairs(edges, 6, 8, normalization)
    assert vectors.shape == (6, 8)
    assert values.shape == (8,)
    assert torch.allclose(laplacian @ vectors[:, :6], vectors[:, :6] * values[:6], atol=1e-5)
    assert torch.allclose(vectors[:, :6].norm(dim=0), torch.ones(6), atol=1e-5)
    assert (values[:6].diff() >= 0).all()
    assert (values[:2].abs() < 1e-6).all()
    assert values[2] > 0.1
    assert vectors[:, 6:].isnan().all()
    assert values[6:].isnan().all()


def test_encodings_take_isolated_nodes_and_refuse_wrong_graphs():
    nothing = torch.zeros(2, 0, dtype=torch.int64)
    assert not random_walk_landing(nothing, 3, 2).any()
    assert not laplacian_eigenpairs(nothing, 3, 2)[1].any()
    for edges, said in (
        (EDGES.float(), "int64"),
        (EDGES[:1], "\\(2, E\\)"),
        (EDGES + 1, "from 1 to 4"),
        (EDGES - 1, "-1"),
    ):
        with pytest.raises(ValueError, match=said):
            random_walk_landing(edges, 4, 2)
    with pytest.raises(ValueError, match="undirected"):
        laplacian_eigenpairs(EDGES[:, :3], 4, 2)
    with pytest.raises(ValueError, match="sym"):
        laplacian_eigenpairs(EDGES, 4, 2, "symm")
    with pytest.raises(ValueError, match="steps"):
        random_walk_landing(EDGES, 4, 0)
    with pytest.raises(ValueError, match="k must"):
        laplacian_eigenpairs(EDGES, 4, 0)


def test_heat_and_potentials_of_small_graphs():
    # The path 0 - 1 has L = [[1, -1], [-1, 1]] with the eigenvalues 0 and 2.
    two = torch.from_numpy(path_edges(2))
    assert torch.allclose(heat_kernel_diagonal(two, 2, (0.0, 1.0))[0], torch.tensor([0.5, 0.5 * 2.718281828**-2]))
    # Its pseudo-inverse is L / 4: the potential at a node of a charge at the other is -1/2, at its own 0.
    expected = [-0.5, 0, -0.25, 0.5**0.5 / 2, -0.5, 0, -0.25, 0.5**0.5 / 2, -0.5, -0.5]
    assert torch.allclose(electrostatic_potentials(two, 2)[1], torch.tensor(expected))
    nothing = torch.zeros(2, 0, dtype=torch.int64)
    assert not electrostatic_potentials(nothing, 1).any()
    assert not heat_kernel_diagonal(nothing, 3, (1,)).any()
    with pytest.raises(ValueError, match="times"):
        heat_kernel_diagonal(two, 2, ())


def test_shortest_paths_of_a_directed_path():
    edges = torch.tensor([[0, 1, 2, 2, 0], [1, 2, 3, 3, 0]])  # 2 - 3 twice, and a loop
    incoming, outgoing = degrees(edges, 5)
    assert incoming.tolist() == [1, 1, 1, 1, 0]
    assert outgoing.tolist() == [2, 1, 1, 0, 0]
    distance, types = shortest_paths(edges, 5, 3, torch.tensor([7, 8, 5, 9, 6]))
    assert distance.view(5, 5).tolist() == [
        [0, 1, 2, 2, 3],
        [3, 0, 1, 2, 3],
        [3, 3, 0, 1, 3],
        [3, 3, 3, 0, 3],
        [3] * 4 + [0],
    ]
    assert types[2].tolist() == [7, 8, 0]
    assert types[3].tolist() == [7, 8, 0]  # cut
    assert types[13].tolist() == [9, 0, 0]  # the last of the two
    with pytest.raises(ValueError, match="limit"):
        shortest_paths(edges, 5, 0)
    with pytest.raises(ValueError, match="edge_types"):
        shortest_paths(edges, 5, 3, torch.zeros(4, dtype=torch.int64))


def test_graph_edges_are_those_of_the_definition():
    assert sorted(map(tuple, circulant_edges(5, (1, 2)).T.tolist())) == [
        (a, b) for a in range(5) for b in range(5) if a != b
    ]
    assert circulant_edges(4, (1, 2)).shape == (2, 12)  # the opposite node once, not twice
    assert sorted(map(tuple, path_edges(3).T.tolist())) == [(0, 1), (1, 0), (1, 2), (2, 1)]


# ---------------------------------------------------------------------------------------------- csl


def test_csl_graphs_are_regular_and_equal_to_message_passing_but_not_to_each_other():
    task = create_task("csl")
    items = [task.eval_set[index] for index in range(10)]
    assert sorted(int(item["label"]) for item in items) == list(range(10))
    for item in items:
        assert item["edge_index"].shape == (2, 41 * 4)
        assert not item["x"].any()
        assert torch.equal(item["edge_index"][0].bincount(), torch.full((41,), 4))
        assert len(item["edge_index"].unique(dim=1).T) == 41 * 4
    assert len({frozenset(refined_colours(item, 10).items()) for item in items}) == 1
    # How many nodes lie within each number of steps is no help for some pairs; closed walks of up to 20 steps are.
    walks = torch.stack([item["rwse"].mean(0) for item in items])
    assert torch.pdist(walks / walks.std(0).clamp(min=1e-6)).min() > 0.1
    values = torch.stack([item["lap_values"][0] for item in items])
    assert torch.pdist(values).min() > 1e-3


def test_csl_graphs_of_one_class_differ_by_numbering_only():
    task = create_task("csl", nodes=11, skips=(2, 3), rwse_steps=6, lap_size=3)
    one, two = task.train_set[0], task.train_set[2]
    assert one["label"] == two["label"]
    assert not torch.equal(one["edge_index"], two["edge_index"])
    assert torch.allclose(one["rwse"].mean(0), two["rwse"].mean(0), atol=1e-6)
    assert one["rwse"].shape == (11, 6)
    assert one["lap_vectors"].shape == (11, 3) == one["lap_values"].shape


def test_closed_walks_solve_csl_and_types_do_not():
    task = create_task("csl", train_items=40, eval_items=50)
    reference = torch.stack([task.train_set[index]["rwse"].mean(0) for index in range(10)])

    def by_walks(graph):
        means = torch.stack([part.mean(0) for part in graph["rwse"].split(graph["offsets"].diff().tolist())])
        return torch.cdist(means, reference).argmin(1)

    assert evaluate(Answers(by_walks, 10), task)["accuracy"] == 1
    chance = evaluate(Answers(lambda graph: torch.zeros(len(graph["offsets"]) - 1, dtype=torch.int64), 10), task)
    assert chance == pytest.approx(task.trivial()) == {"accuracy": pytest.approx(0.1)}


# ---------------------------------------------------------------------------------------------- far_label


@pytest.mark.parametrize("shape", ["path", "ring"])
def test_far_labels_lie_as_far_as_stated(shape):
    task = create_task("far_label", shape=shape, distance=(30, 33))
    seen = set()
    for index in range(16):
        item = task.train_set[index]
        (asks,) = (item["x"] == 1).nonzero().flatten().tolist()
        (knows,) = (item["x"] > 1).nonzero().flatten().tolist()
        distance = hops(item, asks)
        seen.add(distance[knows])
        assert 30 <= distance[knows] <= 33
        assert distance[knows] == max(distance.values())
        assert len(distance) == len(item["x"]) == (distance[knows] + 1 if shape == "path" else 2 * distance[knows])
        assert item["label"][asks] == item["x"][knows] - 2 == index % 8
        assert (item["label"] >= 0).sum() == 1
    assert len(seen) > 1


def test_looking_anywhere_solves_far_label_and_looking_near_does_not():
    task = create_task("far_label", train_items=80, eval_items=80)

    def anywhere(graph):
        labels = [x.max() - 2 for x in graph["x"].split(graph["offsets"].diff().tolist())]
        return torch.stack(labels)[graph["batch"]]

    def near(graph):  # 20 rounds of the largest type among the neighbours
        x = graph["x"]
        for _ in range(20):
            source, target = graph["edge_index"]
            x = x.scatter_reduce(0, target, x[source], "amax")
        return (x - 2).clamp(min=0)

    assert evaluate(Answers(anywhere, 8), task)["accuracy"] == 1
    assert evaluate(Answers(near, 8), task)["accuracy"] == task.trivial()["accuracy"] == 0.125


# ---------------------------------------------------------------------------------------------- both


@pytest.mark.parametrize("name", ["csl", "far_label"])
def test_batches_keep_graphs_apart(name):
    task = create_task(name, train_items=20, eval_items=5)
    items = [task.train_set[index] for index in range(3)]
    batch = collate_graphs(items)
    nodes = len(batch["x"])
    assert batch["offsets"].tolist()[-1] == nodes
    assert torch.equal(batch["batch"].bincount(), batch["offsets"].diff())
    assert batch["rwse"].shape == (nodes, task.rwse_steps)
    assert batch["lap_values"].shape == (nodes, task.lap_size)
    assert batch["label"].shape == ((3,) if task.level == "graph" else (nodes,))
    assert (batch["batch"][batch["edge_index"][0]] == batch["batch"][batch["edge_index"][1]]).all()
    start = batch["offsets"][1]
    mine = batch["edge_index"][:, batch["batch"][batch["edge_index"][0]] == 1] - start
    assert torch.equal(mine, items[1]["edge_index"])
    assert batch["x"].max() < task.num_node_types
    assert batch["edge_attr"].max() < task.num_edge_types
    loader = DataLoader(task.train_set, 4, collate_fn=task.collate)
    assert len(next(iter(loader))["offsets"]) == 5


@pytest.mark.parametrize("name", ["csl", "far_label"])
def test_items_are_functions_of_seed_and_index(name):
    first, again, other = (create_task(name, seed=seed) for seed in (3, 3, 4))
    expected = [first.train_set[index] for index in range(4)]
    torch.manual_seed(5)
    for index in reversed(range(4)):
        item = again.train_set[index]
        assert all(torch.equal(item[key], expected[index][key]) for key in item)
        for others in (other.train_set, first.eval_set):
            assert not torch.equal(item["edge_index"], others[index]["edge_index"])


def test_the_trainer_takes_both_levels():
    for name, size in (("csl", "offsets"), ("far_label", "x")):
        task = create_task(name, train_items=16, eval_items=8)

        def first(graph, size=size):
            return torch.zeros(len(graph[size]) - (size == "offsets"), dtype=torch.int64)

        result = train(Answers(first, task.num_classes), task, TrainConfig(steps=2, batch_size=4), cpu=True)
        assert len(result.losses) == 2
        assert 0 <= result.metrics["accuracy"] <= 1
        with pytest.raises(ValueError, match=task.level):
            task.loss(lambda graph: torch.zeros(1, 1), task.collate([task.train_set[0], task.train_set[1]]))


def test_wrong_options_are_refused():
    for name, options, said in (
        ("csl", {"skips": (2,)}, "two classes"),
        ("csl", {"skips": (2, 21)}, "20.5"),
        ("csl", {"skips": (2, 20)}, "skips 2 and 20"),  # 2 * 20 = -1 modulo 41: the same graph, numbered otherwise
        ("csl", {"skips": (3, 3)}, "same spectrum"),
        ("csl", {"nodes": 4}, "nodes"),
        ("csl", {"rwse_steps": 0}, "rwse_steps"),
        ("far_label", {"shape": "tree"}, "ring"),
        ("far_label", {"distance": (40, 30)}, "swap"),
        ("far_label", {"num_classes": 1}, "num_classes"),
        ("far_label", {"eval_items": 0}, "eval_items"),
        ("far_label", {"seed": "a"}, "seed"),
    ):
        with pytest.raises(ValueError, match=said):
            create_task(name, **options)


# ---------------------------------------------------------------------------------------------- molecules


def test_molecules_are_joined_and_keep_their_valences():
    task = create_task("molecules", train_items=60, eval_items=20)
    for index in range(30):
        item = task.train_set[index]
        assert 9 <= len(item["x"]) <= 37
        assert len(hops(item, 0)) == len(item["x"])
        assert item["edge_attr"].min() >= 1
        bonds = torch.zeros(len(item["x"])).index_add(0, item["edge_index"][1], item["edge_attr"].float())
        assert (bonds <= torch.tensor(VALENCES)[item["x"]]).all()
        longest = max(max(hops(item, start).values()) for start in range(len(item["x"])))
        worth = torch.tensor(WORTH)[item["x"]] * torch.where(item["edge_index"][1].bincount() > 1, 0.5, 1.0)
        rings = worth.sum() - longest / 20 - item["label"].item()
        assert rings.round().item() == pytest.approx(rings.item(), abs=1e-4)
        assert rings > -1e-4
    assert task.features == {"node_types": len(ATOMS), "edge_types": 3}
    assert task.trivial()["mae"] > 0.5


def own_graphs(kind, count=10):
    """Paths of 3 to 12 nodes; types say what is asked for."""
    found = []
    for index in range(count):
        nodes = 3 + index
        x = torch.randint(4, (nodes,), generator=torch.Generator().manual_seed(index))
        y = {"numbers": x.float().mean().expand(2), "class": x[:1] % 3, "node_classes": x % 2}[kind]
        found.append({"x": x, "edge_index": torch.from_numpy(path_edges(nodes)), "y": y.clone()})
    return found


@pytest.mark.parametrize(("kind", "metric"), [("numbers", "mae"), ("class", "accuracy"), ("node_classes", "accuracy")])
def test_own_graphs_train_with_the_recipe(tmp_path, kind, metric):
    torch.save(own_graphs(kind), tmp_path / "mine.pt")
    with own_data(str(tmp_path / "mine.pt")):
        recipe = get_proofs("graphgps").recipe_for("molecules")("smoke")
    assert (len(recipe.task.train_set), len(recipe.task.eval_set)) == (8, 2)
    assert recipe.task.features == {"node_types": 4, "edge_types": 1}
    assert "mine.pt" in recipe.task.description
    result = train(recipe.model, recipe.task, recipe.config, cpu=True)
    assert result.metrics.keys() == recipe.task.trivial().keys() == {metric}


def test_own_graphs_with_floats_and_a_split_of_their_own(tmp_path):
    graphs = [one | {"x": torch.randn(len(one["x"]), 3)} for one in own_graphs("class", 4)]
    for one in graphs:
        one["edge_attr"] = torch.randn(one["edge_index"].shape[1], 2)
        one["rwse"] = torch.zeros(len(one["x"]), 20)
    torch.save({"train": graphs[:3], "val": graphs[3:]}, tmp_path / "mine.pt")
    task = create_task("molecules", data=tmp_path / "mine.pt")
    assert task.features == {"in_chans": 3, "edge_chans": 2}
    assert (len(task.train_set), len(task.eval_set)) == (3, 1)
    assert not task.train_set[0]["rwse"].any()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda graphs: graphs[:1], "to evaluate"),
        (lambda graphs: {"train": graphs}, "list of graphs"),
        (lambda graphs: [{"x": graphs[0]["x"]}, *graphs[1:]], "edge_index and y"),
        (lambda graphs: [graphs[0] | {"edge_index": graphs[0]["edge_index"] + 9}, *graphs[1:]], "graph .*edge_index"),
        (lambda graphs: [graphs[0] | {"edge_attr": torch.zeros(1)}, *graphs[1:]], "rows"),
        (lambda graphs: [graphs[0] | {"edge_attr": torch.zeros(4)}, *graphs[1:]], "in 1 of 10"),
        (lambda graphs: [graphs[0] | {"y": torch.zeros(2)}, *graphs[1:]], "floats in all"),
        (lambda graphs: [graphs[0] | {"y": torch.zeros(2, dtype=torch.long)}, *graphs[1:]], "one for each node"),
        (lambda graphs: [graphs[0] | {"x": torch.zeros(3, 2)}, *graphs[1:]], "columns"),
        (lambda graphs: [graphs[0] | {"more": object()}, *graphs[1:]], "torch.save"),
    ],
)
def test_own_graphs_that_do_not_fit_are_named(tmp_path, change, said):
    torch.save(change(own_graphs("class")), tmp_path / "mine.pt")
    with pytest.raises(ValueError, match=said):
        create_task("molecules", data=tmp_path / "mine.pt")
    with pytest.raises(ValueError, match="not there"):
        create_task("molecules", data=tmp_path / "other.pt")
