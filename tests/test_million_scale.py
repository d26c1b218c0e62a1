"""Attention over several processes, and matrices found in mixers."""

from __future__ import annotations

from itertools import product

import pytest
import torch

import million_ranks
from regard import create_mixer, ops
from regard.layers import heads_of
from regard.ops.distributed import distributed_attention
from regard.ops.shards import shard_ranges, shard_sequence
from regard.processes import run_ranks
from regard.systems.sequence.million_scale import DiagonalSSM, MillionLM, mixing_matrix


def test_two_processes_agree_or_say_why_not():
    words = ("another batch, heads, widths, causal", "zigzag shards", "multiple of the 2 ranks", "at least one token")
    for found in run_ranks(million_ranks.everything, 2):
        assert max(found["uneven"]) < 1e-12
        for sentence, expected in zip(found["told"], (*words, "one length on each rank"), strict=True):
            assert expected in sentence
        exact, rough = found["grid_and_half"]
        assert exact < 1e-5
        assert rough < 0.05


def test_an_error_in_a_rank_is_passed_on():
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="num_heads=3"):
        run_ranks(heads_of, 1, 8, 3)


def test_shards_cover_the_sequence():
    for length, ranks, layout in product((8, 9, 17), (1, 2, 4), ("contiguous", "zigzag")):
        ranges = shard_ranges(length, ranks, layout)
        places = [place for own in ranges for start, stop in own for place in range(start, stop)]
        assert sorted(places) == list(range(length))
        assert all(len(own) == (1 if layout == "contiguous" else 2) for own in ranges)
    with pytest.raises(ValueError, match="cannot be spread"):
        shard_ranges(3, 2, "zigzag")


def test_without_processes_it_is_attention():
    q, k, v = torch.randn(3, 2, 7, 4, 8)
    assert torch.equal(distributed_attention(q, k, v, causal=True), ops.attention(q, k, v, causal=True))
    assert shard_sequence(q) is q
    with pytest.raises(ValueError, match="Did you mean 'ring'"):
        distributed_attention(q, k, v, method="rings")


def test_matrices_of_known_mixers():
    torch.manual_seed(0)
    x = torch.randn(10, 8)
    softmax = create_mixer("softmax", 8, num_heads=1).double()
    found = mixing_matrix(softmax, x)
    query, key = softmax.q(x.double()), softmax.kv(x.double())[:, :8]
    weights = torch.softmax(query @ key.t() / 8**0.5, -1)
    torch.testing.assert_close(found.matrices[0], weights)
    torch.testing.assert_close(found.maps[0], softmax.proj.weight @ softmax.kv.weight[8:])
    assert found.fits
    assert (found.terms, found.equal_row_sums, found.static) == (1, True, False)
    assert mixing_matrix(create_mixer("softmax", 8, num_heads=2), x).terms == 2
    assert mixing_matrix(create_mixer("linear", 8, num_heads=1), x).rank == 8
    assert mixing_matrix(create_mixer("linear", 4, num_heads=1), x[:, :4]).rank == 4
    ssm = mixing_matrix(create_mixer("diagonal_ssm", 8, causal=True), x)
    assert (ssm.static, ssm.toeplitz, ssm.causal) == (True, True, True)
    assert mixing_matrix(create_mixer("fnet", 8), x).terms == 2


def test_what_does_not_fit_says_so():
    class Squared(torch.nn.Module):
        def forward(self, x):
            return x.square().cumsum(1)

    class Beside(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mixer = create_mixer("softmax", 8, num_heads=1)

        def forward(self, x):
            return self.mixer(x) + x.square()

    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    assert not mixing_matrix(Squared(), x).fits
    beside = mixing_matrix(Beside(), x)
    assert not beside.fits
    assert beside.outside_moves > 0


def test_ssm_kernel_equals_the_sum():
    torch.manual_seed(0)
    mixer = DiagonalSSM(4, states=6).double()
    exponent, read = mixer._discrete()
    powers = torch.exp(exponent[..., None] * torch.arange(600))
    torch.testing.assert_close(mixer.kernel(600), torch.einsum("dnl,cdn->cld", powers, read).real)


def test_model_streams_and_saves(tmp_path):
    model = MillionLM(20, dim=16, depth=2, num_heads=2).eval()
    tokens = torch.randint(0, 20, (2, 9))
    state, outs = None, []
    for token in tokens.unbind(1):
        out, state = model.step(token, state)
        outs.append(out)
    torch.testing.assert_close(torch.stack(outs, 1), model(tokens), rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    assert torch.equal(MillionLM.from_pretrained(tmp_path).eval()(tokens), model(tokens))


def test_trains_as_the_trainer_does():
    from regard.tasks import create_task
    from regard.training import TrainConfig, seeded, train
    from regard.training.sequence_parallel import main, train_spread

    task, config = create_task("text", length=24), TrainConfig(steps=3, batch_size=4)
    one, two = (seeded(lambda: MillionLM(256, dim=16, depth=1, num_heads=2), 0) for _ in range(2))
    assert train_spread(one, task, config).losses == train(two, task, config, cpu=True).losses
    short = ["--length", "24", "--steps", "2", "--dim", "16", "--depth", "1", "--heads", "2"]
    assert main(short).steps == 2
