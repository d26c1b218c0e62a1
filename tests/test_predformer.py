"""PredFormer beyond its recordings: recursion, sizes, the released defect, errors."""

from __future__ import annotations

import pytest
import torch

from regard.systems.video.predformer import FactorizedAttention, PredFormer


def tiny(order="tsst", layers=1, **options):
    torch.manual_seed(0)
    sizes = {"dim": 8, "num_heads": 2, "head_dim": 4, "patch_size": 4, **options}
    return PredFormer(order, layers, **sizes).eval()


def test_more_frames_feed_predictions_back():
    x = torch.rand(2, 3, 1, 8, 8)
    once = tiny()(x)
    twice = tiny()(once)
    assert torch.equal(tiny(frames_out=2)(x), once[:, :2])
    assert torch.equal(tiny(frames_out=5)(x), torch.cat([once, twice], 1)[:, :5])


@pytest.mark.parametrize("size", [(1, 1), (9, 6), (8, 12)])
@pytest.mark.parametrize("order", ["f", "t", "sst"])
def test_any_size_and_order_runs(size, order):
    model, x = tiny(order, 2, in_chans=2), torch.rand(1, 1, 2, *size)
    grid = (1, 1, -(-size[0] // 4), -(-size[1] // 4), 8)
    assert model(x).shape == x.shape
    assert model.forward_features(x).shape == grid
    assert [m.shape for m in model.forward_intermediates(x, [-1])] == [grid]


def test_only_the_factorised_st_model_has_the_released_defect():
    x = torch.rand(1, 3, 1, 8, 8)
    for order, factorized in (("ts", True), ("st", False)):
        right, released = (tiny(order, factorized=factorized, authors_quirks=q)(x) for q in (False, True))
        assert torch.equal(right, released)
    right, released = (tiny("st", factorized=True, authors_quirks=q)(x) for q in (False, True))
    assert not torch.allclose(right, released)
    # One block of each kind makes one binary layer: the same function once the tokens are in order.
    torch.testing.assert_close(right, tiny("st")(x))


def test_alone_along_time_or_space():
    x = torch.randn(2, 3, 2, 2, 8)
    temporal = FactorizedAttention(8, 2, along="temporal")
    spatial = FactorizedAttention(8, 2, along="spatial")
    torch.testing.assert_close(temporal(x)[:, :, 1:, :1], temporal(x[:, :, 1:, :1]))
    torch.testing.assert_close(spatial(x)[:, 1:2], spatial(x[:, 1:2]))


def test_saves_and_loads(tmp_path):
    model, x = tiny("tst", 2), torch.rand(1, 2, 1, 8, 8)
    model.save_pretrained(tmp_path)
    assert torch.equal(PredFormer.from_pretrained(tmp_path).eval()(x), model(x))


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="order"):
        tiny("tx")
    with pytest.raises(ValueError, match="frames_out"):
        tiny(frames_out=0)
    with pytest.raises(ValueError, match="x must be"):
        tiny()(torch.rand(1, 3, 2, 8, 8))
    with pytest.raises(ValueError, match="along"):
        FactorizedAttention(8, 2, along="time")
    with pytest.raises(ValueError, match="indices"):
        tiny().forward_intermediates(torch.rand(1, 2, 1, 8, 8), [1])
