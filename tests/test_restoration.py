"""The restoration trunk, and HAT on it: sizes, tiles, starts, errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regard.layouts.windows import reflect_to_multiple
from regard.skeletons import ResidualGroup, Restoration, body_conv
from regard.systems.restoration.hat import HAT, OverlappingCrossAttention

KINDS = ("pixelshuffle", "direct")


def trunk(scale=2, kind="pixelshuffle", **options):
    return Restoration(groups=[], dim=8, width=8, scale=scale, reconstruction=kind, **options)


def tiny(**options):
    return HAT(dim=8, depths=(2, 1), num_heads=2, window_size=4, width=8, **options).eval()


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 9])
def test_reflection_is_numpys(length):
    x = torch.randn(2, length, 4, 3)
    padded = reflect_to_multiple(x, (8, 2))
    expected = np.pad(x.numpy(), ((0, 0), (0, -length % 8), (0, 0), (0, 0)), mode="reflect")
    assert np.array_equal(padded.numpy(), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_start_as_enlargement_repeats_pixels(scale, kind):
    model = Restoration(
        groups=[ResidualGroup(8, nn.Identity(), "3conv")], dim=8, width=8, scale=scale, reconstruction=kind, multiple=4
    )
    model.start_as_enlargement()
    x = torch.rand(2, 3, 5, 7)
    torch.testing.assert_close(model(x), F.interpolate(x, scale_factor=scale))


def test_start_as_enlargement_says_what_it_needs():
    with pytest.raises(ValueError, match="width must be at least 6"):
        Restoration(groups=[], dim=8, width=5, scale=2).start_as_enlargement()
    with pytest.raises(ValueError, match="plain convolutions"):
        trunk(fuse=body_conv(8, "3conv")).start_as_enlargement()


@pytest.mark.parametrize("scale", [1, 2, 3])
def test_tiles_join_without_a_seam(scale):
    model, x = trunk(scale), torch.rand(1, 3, 21, 17)
    with torch.no_grad():
        torch.testing.assert_close(model.forward_tiled(x, tile=8, overlap=6), model(x))
        assert not torch.allclose(model.forward_tiled(x, tile=8, overlap=0), model(x))


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (5, 3), (9, 16)])
@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_any_size_runs(size, scale):
    model = tiny(scale=scale, in_chans=1)
    x = torch.rand(2, 1, *size)
    with torch.no_grad():
        assert model(x).shape == (2, 1, scale * size[0], scale * size[1])
        assert model.forward_features(x).shape == (2, 8, *size)
        assert [m.shape for m in model.forward_intermediates(x)] == [(2, 8, *size)] * 2


def test_padding_mirrors_the_image():
    model, x = tiny(scale=2), torch.rand(1, 3, 6, 7)
    with torch.no_grad():
        whole = model(F.pad(x, (0, 1, 0, 2), mode="reflect"))
        torch.testing.assert_close(model(x), whole[..., :12, :14])


def test_hat_round_trips(tmp_path):
    model, x = tiny(scale=2), torch.rand(1, 3, 8, 8)
    model.save_pretrained(tmp_path)
    assert torch.equal(HAT.from_pretrained(tmp_path).eval()(x), model(x))


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="Images are channels first"):
        tiny()(torch.rand(1, 8, 8, 3))
    with pytest.raises(ValueError, match="floating-point"):
        tiny()(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="scale must be 1, 2, 4"):
        tiny(scale=6)
    with pytest.raises(ValueError, match="indices"):
        tiny().forward_intermediates(torch.rand(1, 3, 8, 8), [2])
    with pytest.raises(ValueError, match="overlap_ratio"):
        OverlappingCrossAttention(8, 2, overlap_ratio=-0.5)
    with pytest.raises(ValueError, match="axes=2"):
        OverlappingCrossAttention(8, 2, window_size=2)(torch.rand(1, 4, 8))


def test_no_overlap_is_window_attention():
    from regard import ops

    mixer, x = OverlappingCrossAttention(8, 2, window_size=3, overlap_ratio=0.0), torch.randn(1, 6, 9, 8)
    nn.init.normal_(mixer.table)
    q, k, v = mixer.qkv(x).unflatten(-1, (3, 2, 4)).unbind(-3)
    bias = mixer.table[mixer.index].permute(2, 0, 1)
    expected = mixer.proj(ops.window_attention(q, k, v, window_size=3, bias=bias).flatten(-2))
    torch.testing.assert_close(mixer(x), expected)
