"""Proofs of Pointer Networks: a port's attention and model, exact tours; answers over inputs of any number."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from regard.proofs.base import Check, Preset, Proofs, Recipe
from regard.proofs.recordings import Outputs, Recorded, Recording
from regard.skeletons.encoder_decoder import START
from regard.systems.sequence.pointer_networks import (
    PointerAttention,
    PointerNetwork,
    PointerNetworkPort,
    PointingModel,
    Seq2Seq,
)
from regard.tasks import create_task
from regard.tasks.pointing import held_karp, tour_length
from regard.training import TrainConfig, evaluate, seeded, train

FEWEST, MOST, LARGER = 5, 12, 20
"""Points of the hulls trained on, and of larger ones that are only asked for."""

HULL_STEPS, TOUR_STEPS = 1000, 800
HIDDEN: dict[Preset, int] = {"smoke": 16, "small": 64, "paper": 512}
WIDE = 0.6
"""Range of the initial weights of every model trained briefly: from the paper's 0.08, a pointer network needs longer than
these budgets to point at one place rather than at all."""


def _run_attention(module: PointerAttention, inputs: dict[str, Tensor]) -> Outputs:
    alpha = module(inputs["input"], inputs["context"], ~inputs["mask"]).softmax(-1)
    return {"alpha": alpha, "hidden_state": (alpha[:, None] @ module.key(inputs["context"])).squeeze(1)}


def _port(config: dict[str, Any]) -> PointerNetworkPort:
    return PointerNetworkPort(
        embed_dim=config["embedding_dim"],
        hidden=config["hidden_dim"],
        num_layers=config["lstm_layers"],
        bidirectional=config["bidir"],
    )


def _run_port(model: PointerNetworkPort, inputs: dict[str, Tensor]) -> Outputs:
    """Following its own choices, as the port always does."""
    points = inputs["points"]
    memory, state = model.encode(points, None)
    symbols = torch.full((len(points),), START)
    probabilities, pointers = [], []
    for _ in range(points.shape[1]):
        logits, state = model.advance(symbols, memory, state)
        symbols = logits.argmax(-1)
        probabilities.append(logits[:, 1:].softmax(-1))
        pointers.append(symbols - 1)
    return {"probabilities": torch.stack(probabilities, 1), "pointers": torch.stack(pointers, 1)}


class _Tours(nn.Module):
    """The lengths of the exact tours that the task's labels come from."""

    def forward(self, points: Tensor) -> Tensor:
        return torch.tensor([tour_length(one, _tour(one)) for one in points.numpy()])


def _tour(points: np.ndarray) -> list[int]:
    exact = points.astype(np.float64)
    return held_karp(np.linalg.norm(exact[:, None] - exact, axis=-1))


def same_tours() -> Check:
    """Our exact tours and the recorded ones, up to their direction."""
    recording = Recording.read("pointer_networks.tsp")
    same = 0
    for points, theirs in zip(recording.inputs["points"].numpy(), recording.outputs["tour"].tolist(), strict=True):
        same += _tour(points) in (theirs, [theirs[0], *theirs[:0:-1]])
    return Check(
        "the task's exact tours are those of the port's solver, up to direction",
        holds=same == len(recording.outputs["tour"]),
        figures={"equal_tours": same, "tours": len(recording.outputs["tour"])},
    )


def as_written() -> Check:
    """Scores against a loop over eq. 3, in float64, with gradients; all steps at once against step by step."""
    generator = torch.Generator().manual_seed(0)
    attend = seeded(lambda: PointerAttention(6), 0).double()
    query, keys, weight = (
        torch.randn(2, n, width, dtype=torch.float64, generator=generator) for n, width in ((3, 6), (5, 6), (3, 5))
    )
    ours = attend(query, keys)
    rows = [
        [attend.score @ torch.tanh(attend.key.weight @ e + attend.query.weight @ d) for e in keys[b]]
        for b in range(2)
        for d in query[b]
    ]
    slow = torch.stack([torch.stack(row) for row in rows]).view(2, 3, 5)
    grads = [torch.autograd.grad((out * weight).sum(), list(attend.parameters())) for out in (ours, slow)]
    error = max(float((a - b).detach().abs().max()) for a, b in zip((ours, *grads[0]), (slow, *grads[1]), strict=True))
    model = seeded(lambda: PointerNetwork(8, num_layers=2), 0).double()
    points = torch.rand(3, 7, 2, dtype=torch.float64, generator=generator)
    lengths, targets = torch.tensor([7, 4, 5]), torch.tensor([[3, 1, 4, 0], [2, 0, -1, -1], [5, 1, 0, -1]])
    at_once, stepwise = model(points, lengths, targets), super(PointerNetwork, model).forward(points, lengths, targets)
    padded = torch.isinf(at_once)
    difference = float((at_once - stepwise).masked_fill(padded, 0).abs().max().detach())
    return Check(
        "attention = eq. 3 as written, and teacher forcing at once = step by step",
        holds=max(error, difference) <= 1e-12 and bool(torch.equal(padded, torch.isinf(stepwise))),
        figures={"largest_error_of_attention": error, "largest_error_of_the_model": difference},
        setting="float64, ragged lengths, limit 1e-12",
    )


def recipe(preset: Preset) -> Recipe:
    """Convex hulls; "paper" has the paper's model, batch, data and plain SGD (its number of steps is not published)."""
    if preset == "paper":
        task = create_task("convex_hull", points=(5, 50), train_items=1_000_000)
        config = TrainConfig(
            steps=100_000, batch_size=128, lr=1.0, optimizer="sgd", schedule="constant", weight_decay=0.0, clip_norm=2.0
        )
        return Recipe(seeded(lambda: PointerNetwork(512), 0), task, config)
    task = create_task("convex_hull", points=(FEWEST, 8), eval_items=32 if preset == "smoke" else 500)
    return Recipe(seeded(lambda: PointerNetwork(64, init_range=WIDE), 0), task, _config(preset, 700))


def _config(preset: Preset, steps: int) -> TrainConfig:
    return TrainConfig(
        steps=2 if preset == "smoke" else steps,
        batch_size=4 if preset == "smoke" else 32,
        lr=5e-3,
        optimizer="adam",
        weight_decay=0.0,
        clip_norm=2.0,
    )


def _budget(config: TrainConfig) -> str:
    return f"{config.steps} steps of {config.batch_size}"


def variable_dictionary(preset: Preset) -> Check:
    """One set of parameters over inputs of 1 to 200 points; what permuting the keys does."""
    model = seeded(lambda: PointerNetwork(32), 0).double().eval()
    generator = torch.Generator().manual_seed(0)
    whole, permuted, valid = [], 0.0, 0
    counts = (1, 2, 3, 12, 50) if preset == "smoke" else (1, 2, 3, 12, 50, 200)
    for count in counts:
        points = torch.rand(2, count + 2, 2, dtype=torch.float64, generator=generator)  # two rows are padding
        lengths = torch.full((2,), count)
        with torch.no_grad():
            memory, state = model.encode(points, lengths)
            logits, _ = model.advance(torch.full((2,), START), memory, state)
            order = torch.randperm(count + 3, generator=generator)
            moved = memory._replace(projected=memory.projected[:, order], valid=memory.valid[:, order])
            again, _ = model.advance(torch.full((2,), START), moved, state)
            error = (again - logits[:, order]).masked_fill(torch.isinf(again), 0).abs().max()
        whole.append(int((logits.softmax(-1) > 0).sum(-1).unique().item()) == count + 1)
        permuted = max(permuted, float(error))
        tours = model.decode(points, lengths, tour=True)
        valid += sorted(tours[0].tolist())[-count:] == list(range(1, count + 1))
    return Check(
        "The answer's vocabulary is the input, of any number, and follows it when it is permuted (section 2.3)",
        holds=all(whole) and permuted <= 1e-12 and valid == len(counts),
        figures={
            "counts_with_exactly_n_points_and_the_end": sum(whole),
            "counts_with_valid_tours": valid,
            "counts_tried": len(counts),
            "largest_error_under_permutation": permuted,
        },
        setting=f"untrained, {', '.join(map(str, counts))} points and two of padding, float64",
    )


@cache
def _hull_models(preset: Preset) -> tuple[dict[str, PointingModel], dict[str, dict[str, float]]]:
    task = create_task("convex_hull", points=(FEWEST, MOST), eval_items=32 if preset == "smoke" else 1000)
    hidden = HIDDEN[preset]
    builds: dict[str, Callable[[], PointingModel]] = {
        "pointer": lambda: PointerNetwork(hidden, init_range=WIDE),
        "lstm": lambda: Seq2Seq(MOST, hidden, init_range=WIDE),
        "lstm_with_attention": lambda: Seq2Seq(MOST, hidden, attention=True, init_range=WIDE),
    }
    models, metrics = {}, {}
    for name, build in builds.items():
        models[name] = seeded(build, 0)
        metrics[name] = train(models[name], task, _config(preset, HULL_STEPS), cpu=True).metrics
    metrics["trivial"] = task.trivial()
    return models, metrics  # type: ignore[return-value]


def hulls_against_fixed_dictionaries(preset: Preset) -> Check:
    """Same hidden size, data and budget: pointing against the paper's two baselines."""
    _, metrics = _hull_models(preset)
    accuracy = {name: values["accuracy"] for name, values in metrics.items()}
    return Check(
        "Pointing learns convex hulls better than a fixed dictionary, with and without attention (table 1)",
        holds=accuracy["pointer"] >= 0.05 + max(accuracy["lstm"], accuracy["lstm_with_attention"]),
        figures={f"{name}_{key}": round(value, 4) for name, row in metrics.items() for key, value in row.items()},
        setting=f"{FEWEST} to {MOST} points, hidden {HIDDEN[preset]}, {_budget(_config(preset, HULL_STEPS))}, seed 0; "
        "holds if the pointer network's accuracy is at least 0.05 above both",
    )


def larger_hulls(preset: Preset) -> Check:
    """The same pointer network on more points than it ever saw; the baselines have no words for them."""
    models, metrics = _hull_models(preset)
    task = create_task("convex_hull", points=LARGER, eval_items=32 if preset == "smoke" else 500)
    measured = evaluate(models["pointer"], task)
    points = torch.zeros(1, LARGER, 2)
    refused = 0
    for name in ("lstm", "lstm_with_attention"):
        try:
            models[name].decode(points)
        except ValueError:
            refused += 1
    return Check(
        "A trained pointer network answers for more points than it was trained on (section 4.2)",
        holds=measured["accuracy"] > 0 and refused == 2,
        figures={
            **{f"{key}_at_{LARGER}_points": round(value, 4) for key, value in measured.items()},
            f"accuracy_at_{FEWEST}_to_{MOST}_points": round(metrics["pointer"]["accuracy"], 4),
            "baselines_that_cannot_answer": refused,
        },
        setting=f"trained on {FEWEST} to {MOST} points, asked for {LARGER}; holds if accuracy there is above 0",
    )


def tours(preset: Preset) -> Check:
    """Small exact tours, decoded with a beam of 5, free and among valid tours only."""
    small = 16 if preset == "smoke" else 500
    task = create_task("tour", points=(5, 8), eval_items=small, beam=5, constrained=True)
    model = seeded(lambda: PointerNetwork(HIDDEN[preset], init_range=WIDE), 0)
    constrained = train(model, task, _config(preset, TOUR_STEPS), cpu=True).metrics
    free = evaluate(model, create_task("tour", points=(5, 8), eval_items=small, beam=5))
    return Check(
        "A pointer network learns tours close to the shortest from exact ones (table 2)",
        holds=constrained["valid"] == 1 and constrained["length_ratio"] < 1.05,
        figures={
            "length_over_optimum": round(constrained["length_ratio"], 4),
            "valid_tours_when_constrained": round(constrained["valid"], 4),
            "valid_tours_when_free": round(free["valid"], 4),
            "nearest_neighbour_length_over_optimum": round(task.trivial()["length_ratio"], 4),
        },
        setting=f"5 to 8 points, hidden {HIDDEN[preset]}, {_budget(_config(preset, TOUR_STEPS))}, seed 0, beam 5; holds if "
        "every constrained answer is a tour and they are below 1.05 of the optimum",
    )


PROOFS = Proofs(
    recordings=(
        Recorded(
            "pointer_networks.attention",
            build=lambda config: PointerAttention(config["hidden_dim"], bias=True),
            run=_run_attention,
            keys=PointerNetworkPort.authors_keys,
        ),
        Recorded("pointer_networks.model", build=_port, run=_run_port),
        Recorded(
            "pointer_networks.tsp",
            build=lambda config: _Tours(),
            run=lambda module, inputs: {"length": module(**inputs)},
        ),
    ),
    checks=(same_tours, as_written),
    recipe=recipe,
    claims=(variable_dictionary, hulls_against_fixed_dictionaries, larger_hulls, tours),
)
