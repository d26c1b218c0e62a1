"""Lean attention's schedules and caches, beyond what every system is held to."""

from __future__ import annotations

import doctest

import pytest
import torch

from regard import ops
from regard.systems.hardware import _stream_k
from regard.systems.hardware._stream_k import StreamK, fixed_split_makespan, lean_plan
from regard.systems.hardware.lean_attention import LeanAttention, LeanDecoder, lean_attention


def test_examples_in_the_docstrings():
    assert doctest.testmod(_stream_k).failed == 0


@pytest.mark.parametrize("tiles", [(), (0,), (0, 3, 0), (1,), (5, 1, 2), (7, 7, 7)])
@pytest.mark.parametrize("workers", [1, 2, 5, 40])
def test_every_tile_belongs_to_one_worker(tiles, workers):
    schedule = StreamK(tiles, max(1, min(workers, sum(tiles))))
    done = [(piece.output, piece.first + tile) for piece in schedule.pieces for tile in range(piece.tiles)]
    assert done == [(output, tile) for output, count in enumerate(tiles) for tile in range(count)]
    assert [piece.worker for piece in schedule.pieces] == sorted(piece.worker for piece in schedule.pieces)


def test_splits_of_flash_decoding_cost_what_the_formula_says():
    assert fixed_split_makespan(outputs=3, tiles=8, splits=1, slots=2) == 16
    assert StreamK((8, 8, 8), 2).makespan == 12


def test_sequences_of_a_ragged_cache_may_be_empty():
    q, k, v = torch.randn(3, 1, 4, 8), torch.randn(3, 20, 2, 8), torch.randn(3, 20, 2, 5)
    out, lse = lean_attention(q, k, v, lengths=[0, 20, 7], block=(1, 4), workers=3, return_lse=True)
    assert out[0].abs().max() == 0
    assert (lse[0] == -torch.inf).all()
    torch.testing.assert_close(out[2:], ops.attention(q[2:], k[2:, :7], v[2:, :7]))


def test_wrong_arguments_are_named():
    q, k = torch.randn(2, 1, 4, 8), torch.randn(2, 9, 2, 8)
    with pytest.raises(ValueError, match="lengths"):
        lean_attention(q, k, k, lengths=[9, 10])
    with pytest.raises(ValueError, match="keys"):
        lean_plan(2, 1, (5,), 4)
    with pytest.raises(ValueError, match="workers"):
        lean_plan(2, 1, 5, 4, workers=0)


def test_prefill_and_decoding_with_shared_keys():
    mixer = LeanAttention(32, 4, kv_heads=2, causal=True, block=(3, 4)).eval()
    x = torch.randn(2, 11, 32)
    first, state = mixer.prefill(x[:, :5])
    more, state = mixer.prefill(x[:, 5:10], state)
    last, _ = mixer.step(x[:, 10], state)
    torch.testing.assert_close(torch.cat([first, more, last[:, None]], 1), mixer(x), rtol=1e-4, atol=1e-5)


def test_decoder_generates():
    model = LeanDecoder(vocab_size=11, dim=16, depth=1, num_heads=2, kv_heads=1, length=12)
    tokens = model.generate(torch.zeros(2, 3, dtype=torch.long), 5, temperature=0)
    assert tokens.shape == (2, 8)
