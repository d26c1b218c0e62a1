"""Graph tasks that isolate one ability: telling regular graphs apart (`csl`), and carrying a fact far (`far_label`).

A batch is several graphs in one, as a dictionary of

* `x` (N,) int64 node types, below `num_node_types`; `batch` (N,) int64, the graph of each node, ascending;
  `offsets` (B + 1,) int64: graph b has the nodes `offsets[b]` to `offsets[b + 1] - 1`;
* `edge_index` (2, E) int64, source above target, every edge both ways; `edge_attr` (E,) int64 edge types, below
  `num_edge_types`;
* encodings of nodes: `rwse` (N, rwse_steps), probabilities that a random walk is back after 1, 2 ... steps;
  `lap_vectors` (N, lap_size), eigenvectors of the normalised Laplacian, and `lap_values` (N, lap_size), their
  eigenvalues, the same for all nodes of a graph;
* `label`: (B,) int64 for tasks with `level = "graph"`, (N,) int64 with -1 at nodes that are not asked for
  `level = "node"`.

`model(graph)`, given that dictionary without `label`, returns logits (B, num_classes) or (N, num_classes).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from regard.checks import one_of
from regard.layouts.graphs import laplacian_eigenpairs, random_walk_landing
from regard.tasks.base import EVAL, TRAIN, Generated, Task, whole, whole_range

UNASKED = -1
NODE_PAIRS = {"edge_index", "pairs"}
"""Parts of a graph that name nodes, (2, ...) each; all others have a row for each node, edge, pair or graph."""


def circulant_edges(nodes: int, jumps: tuple[int, ...]) -> np.ndarray:
    """`edge_index` (2, E) of the graph in which node i of `nodes` is joined to i + jump and i - jump for each jump."""
    source = np.arange(nodes)
    pairs = [np.stack([source, (source + jump) % nodes]) for jump in jumps]
    pairs += [pair[::-1] for pair in pairs]
    return np.unique(np.concatenate(pairs, axis=1), axis=1)


def path_edges(nodes: int) -> np.ndarray:
    """`edge_index` (2, E) of the path 0 - 1 - ... - (nodes - 1)."""
    pair = np.stack([np.arange(nodes - 1), np.arange(1, nodes)])
    return np.concatenate([pair, pair[::-1]], axis=1)


def collate_graphs(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Put graphs side by side in one: the batch described at the top of the module."""
    sizes = torch.tensor([len(item["x"]) for item in items])
    offsets = F.pad(sizes.cumsum(0), (1, 0))
    batch = {key: torch.cat([item[key] for item in items]) for key in items[0] if key not in NODE_PAIRS}
    for key in NODE_PAIRS & items[0].keys():
        batch[key] = torch.cat([item[key] + start for item, start in zip(items, offsets, strict=False)], 1)
    batch["batch"], batch["offsets"] = torch.arange(len(items)).repeat_interleave(sizes), offsets
    return batch


class GraphTask(Task):
    """Classification of graphs or of nodes; the class of item i is i modulo the number of classes.

    Args:
        train_items, eval_items: sizes of the two sets.
        rwse_steps, lap_size: widths of the two encodings.
        seed: of everything that is drawn.
    """

    metric = "accuracy"
    level: ClassVar[Literal["graph", "node"]]
    num_node_types: int
    num_edge_types = 1
    num_classes: int
    train_set: Generated
    eval_set: Generated

    def __init__(
        self, *, train_items: int, eval_items: int, rwse_steps: int, lap_size: int, seed: int, num_classes: int
    ) -> None:
        self.rwse_steps = whole("rwse_steps", rwse_steps)
        self.lap_size = whole("lap_size", lap_size)
        self.num_classes = num_classes
        whole("seed", seed, 0)
        self.train_set = Generated(self._make, whole("train_items", train_items), seed, TRAIN)
        self.eval_set = Generated(self._make, whole("eval_items", eval_items), seed, EVAL)
        self.collate = collate_graphs

    def _label(self, index: int) -> int:
        return index % self.num_classes

    @abstractmethod
    def _make(self, rng: np.random.Generator, index: int) -> dict[str, Tensor]: ...

    def _graph(
        self, rng: np.random.Generator, x: np.ndarray, edges: np.ndarray, label: np.ndarray
    ) -> dict[str, Tensor]:
        """One item, with its nodes (types `x`, and `label` if there is one for each) in a drawn order."""
        place = rng.permutation(len(x))  # node i goes to place[i]
        order = np.argsort(place)
        edge_index = torch.from_numpy(place[edges[:, rng.permutation(edges.shape[1])]])
        vectors, values = laplacian_eigenpairs(edge_index, len(x), self.lap_size)
        return {
            "x": torch.from_numpy(x[order]),
            "edge_index": edge_index,
            "edge_attr": torch.zeros(edge_index.shape[1], dtype=torch.int64),
            "rwse": random_walk_landing(edge_index, len(x), self.rwse_steps),
            "lap_vectors": vectors,
            "lap_values": values.expand(len(x), -1),
            "label": torch.from_numpy(label[order] if self.level == "node" else label),
        }

    def _logits(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = model({key: value for key, value in batch.items() if key != "label"})
        expected = (len(batch["label"]), self.num_classes)
        if logits.shape != expected:
            raise ValueError(
                f"for {self.name} (level {self.level!r}) the model must return logits ({self.level}s, classes) = "
                f"{expected}, got {tuple(logits.shape)}."
            )
        return logits

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Mean cross-entropy over the graphs, or over the nodes that are asked."""
        return F.cross_entropy(self._logits(model, batch), batch["label"], ignore_index=UNASKED)

    def metrics(self) -> dict[str, Metric]:
        return {"accuracy": MulticlassAccuracy(self.num_classes, average="micro", ignore_index=UNASKED)}

    def update(self, metrics: Mapping[str, Metric], model: nn.Module, batch: dict[str, Tensor]) -> None:
        metrics["accuracy"].update(self._logits(model, batch), batch["label"])

    def trivial(self) -> dict[str, float]:
        said = np.bincount([self._label(index) for index in range(len(self.train_set))]).argmax()
        return {"accuracy": float(np.mean([self._label(index) == said for index in range(len(self.eval_set))]))}

    @property
    def trivial_answer(self) -> str:
        return "most frequent class"


class CSLTask(GraphTask):
    """Which circular skip link graph is it? A ring of `nodes` nodes, each also joined to those `skip` places away.

    All classes have the same number of nodes, each with four neighbours, so that message passing over equal node
    features ends with the same features everywhere and stays at chance; encodings that count closed walks tell the
    classes apart. Metric: `accuracy`.

    Args:
        nodes: size of every graph.
        skips: one class for each.
        options: those of `GraphTask`.
    """

    name = "csl"
    level = "graph"
    num_node_types = 1

    def __init__(
        self,
        *,
        nodes: int = 41,
        skips: tuple[int, ...] = (2, 3, 4, 5, 6, 9, 11, 12, 13, 16),
        train_items: int = 1000,
        eval_items: int = 200,
        rwse_steps: int = 20,
        lap_size: int = 8,
        seed: int = 0,
    ) -> None:
        self.nodes, self.skips = whole("nodes", nodes, 5), tuple(skips)
        if len(self.skips) < 2:
            raise ValueError(f"skips must name at least two classes, got {skips!r}.")
        spectra: dict[tuple[float, ...], int] = {}
        for skip in self.skips:
            if not 2 <= whole("each of skips", skip) < nodes / 2:
                raise ValueError(f"skips must lie from 2 to below nodes / 2 = {nodes / 2}, got {skip}.")
            turns = 2 * np.pi * np.arange(nodes) / nodes
            spectrum = tuple(np.round(np.sort(np.cos(turns) + np.cos(skip * turns)), 9) + 0.0)
            if spectrum in spectra:
                raise ValueError(
                    f"skips {spectra[spectrum]} and {skip} give graphs of {nodes} nodes with the same spectrum, which "
                    "the encodings cannot tell apart: leave one of them out."
                )
            spectra[spectrum] = skip
        super().__init__(
            train_items=train_items,
            eval_items=eval_items,
            rwse_steps=rwse_steps,
            lap_size=lap_size,
            seed=seed,
            num_classes=len(self.skips),
        )

    def _make(self, rng: np.random.Generator, index: int) -> dict[str, Tensor]:
        label = self._label(index)
        edges = circulant_edges(self.nodes, (1, self.skips[label]))
        return self._graph(rng, np.zeros(self.nodes, np.int64), edges, np.array([label]))

    @property
    def description(self) -> str:
        return (
            f"Circular skip link graphs of {self.nodes} nodes, each with four neighbours, renumbered at random: "
            f"which of {self.num_classes} skip lengths?"
        )


class FarLabelTask(GraphTask):
    """Say at one node which label another one carries, `distance` edges away along a path or around a ring.

    One node has type 1 (it asks), one has type 2 + label (it knows), all others have type 0. Only the node that asks
    has a label to predict, so that message passing with fewer layers than `distance` stays at chance, while attention
    over the whole graph needs one layer. Metric: `accuracy`, at the nodes that ask.

    Args:
        shape: "path", with the two nodes at its ends, or "ring", with the two nodes opposite each other.
        distance: edges between the two nodes: one number, or (shortest, longest), drawn per item.
        num_classes: how many labels there are.
        options: those of `GraphTask`.
    """

    name = "far_label"
    level = "node"

    def __init__(
        self,
        *,
        shape: Literal["path", "ring"] = "path",
        distance: int | tuple[int, int] = (30, 40),
        num_classes: int = 8,
        train_items: int = 10_000,
        eval_items: int = 400,
        rwse_steps: int = 16,
        lap_size: int = 8,
        seed: int = 0,
    ) -> None:
        self.shape = one_of("shape", shape, ("path", "ring"))
        self.distance = whole_range("distance", distance, 2)
        self.num_node_types = 2 + whole("num_classes", num_classes, 2)
        super().__init__(
            train_items=train_items,
            eval_items=eval_items,
            rwse_steps=rwse_steps,
            lap_size=lap_size,
            seed=seed,
            num_classes=num_classes,
        )

    def _make(self, rng: np.random.Generator, index: int) -> dict[str, Tensor]:
        far = int(rng.integers(self.distance[0], self.distance[1] + 1))
        edges = path_edges(far + 1) if self.shape == "path" else circulant_edges(2 * far, (1,))
        x = np.zeros(far + 1 if self.shape == "path" else 2 * far, np.int64)
        label = np.full_like(x, UNASKED)
        label[0] = self._label(index)
        x[0], x[far] = 1, 2 + label[0]
        return self._graph(rng, x, edges, label)

    @property
    def description(self) -> str:
        low, high = self.distance
        count = str(low) if low == high else f"{low} to {high}"
        place = "at the other end of a path" if self.shape == "path" else "on the other side of a ring"
        return (
            f"One node asks for the label, one of {self.num_classes}, that a node {count} edges away carries {place}."
        )
