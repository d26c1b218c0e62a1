"""Pointer networks: searches against all answers, ragged inputs, the published port's names."""

from itertools import permutations

import pytest
import torch

from regard.systems.sequence.pointer_networks import PointerAttention, PointerNetwork, PointerNetworkPort, Seq2Seq

BUILDS = {
    "pointer": lambda: PointerNetwork(8, init_range=1.0),
    "state": lambda: PointerNetwork(8, num_layers=2, feed="state", init_range=1.0),
    "lstm": lambda: Seq2Seq(6, 8, init_range=1.0),
    "attention": lambda: Seq2Seq(6, 8, attention=True, init_range=1.0),
    "port": lambda: PointerNetworkPort(4, 8, 2),
}


def built(name):
    torch.manual_seed(0)
    return BUILDS[name]().double(), torch.rand(3, 4, 2).double()


def log_probability(model, points, answer):
    target = torch.tensor([answer])
    return model(points, None, target).log_softmax(-1).gather(-1, target[..., None]).sum().item()


@pytest.mark.parametrize("name", BUILDS)
def test_a_wide_beam_finds_the_best_tour_and_its_probability(name):
    model, points = built(name)
    best = model.decode(points, tour=True, beam=200)
    for row in range(3):
        scores = {p: log_probability(model, points[row : row + 1], [*p, 0]) for p in permutations(range(1, 5))}
        assert tuple(best[row, :4].tolist()) == max(scores, key=scores.get)
    answers, score = model.search(points, None, max_length=5, beam=3)
    said = answers[0, 0].tolist()
    said = said[: said.index(0) + 1] if 0 in said else said
    assert log_probability(model, points[:1], said) == pytest.approx(score[0, 0].item(), abs=1e-5)
    assert (score.diff(dim=1) <= 0).all()


@pytest.mark.parametrize("name", BUILDS)
def test_greedy_follows_the_argmax(name):
    model, points = built(name)
    said = model.decode(points[:1])[0].tolist()
    for step, symbol in enumerate(said[: said.index(0) + 1 if 0 in said else None]):
        assert model(points[:1], None, torch.tensor([[*said[:step], 0]]))[0, step].argmax() == symbol


@pytest.mark.parametrize("name", BUILDS)
def test_padding_changes_nothing_and_is_never_said(name):
    model, points = built(name)
    lengths, targets = torch.tensor([4, 2, 1]), torch.tensor([[3, 1, 0], [2, 0, -1], [1, 0, -1]])
    together = model(points, lengths, targets)
    for row, length in enumerate(lengths.tolist()):
        alone = model(points[row : row + 1, :length], None, targets[row : row + 1])
        torch.testing.assert_close(together[row : row + 1, :, : length + 1], alone, rtol=0, atol=1e-12)
        assert torch.isinf(together[row, :, length + 1 :]).all()
    tours = model.decode(points, lengths, tour=True, beam=2)
    assert [sorted(t for t in tour if t) for tour in tours.tolist()] == [[1, 2, 3, 4], [1, 2], [1]]


def test_batch_may_be_permuted():
    model, points = built("pointer")
    order = torch.tensor([2, 0, 1])
    assert torch.equal(model.decode(points, beam=3, tour=True)[order], model.decode(points[order], beam=3, tour=True))


def test_more_points_than_the_dictionary_has_are_refused_by_the_baseline_only():
    points = torch.rand(1, 9, 2)
    assert PointerNetwork(8).decode(points, tour=True).shape == (1, 10)
    with pytest.raises(ValueError, match="dictionary ends at 6"):
        Seq2Seq(6, 8).decode(points)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: PointerNetwork(8).decode(torch.rand(1, 3, 3)), "points must be"),
        (lambda: PointerNetwork(8).decode(torch.rand(1, 3, 2), torch.tensor([3, 3])), "lengths must be"),
        (lambda: PointerNetwork(8).decode(torch.rand(1, 3, 2), max_length=3, tour=True), "max_length=4"),
        (lambda: PointerNetwork(8)(torch.rand(1, 3, 2), None, torch.rand(1, 2)), "targets must be"),
        (lambda: PointerNetwork(8, feed="points"), "Did you mean 'point'"),
        (lambda: PointerAttention(8)(torch.rand(8), torch.rand(1, 3, 8)), "query must be"),
    ],
)
def test_wrong_input_is_explained(call, match):
    with pytest.raises(ValueError, match=match):
        call()
