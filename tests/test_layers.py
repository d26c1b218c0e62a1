"""Layers that compute the same in another way than they are written: maps in parts, images that come channels first."""

from __future__ import annotations

import pytest
import torch

from regard.layers import Conv2d, GatedMlp, Mlp
from regard.measure import peak_bytes


@pytest.mark.parametrize("layer", [Mlp(64, 256), GatedMlp(64, 128)], ids=["mlp", "gated"])
@pytest.mark.parametrize("shape", [(2, 97, 101), (20_000,), (3, 8)])
def test_inference_in_parts_is_the_whole_and_takes_less_memory(layer, shape):
    x = torch.randn(*shape, 64)
    whole = layer(x)
    with torch.no_grad():
        parts = layer(x)
        torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-6)
        if x.numel() > 1 << 20:
            hidden = x.numel() // 64 * 256 * x.element_size()
            assert peak_bytes(lambda: layer(x)) < hidden
            assert peak_bytes(lambda: layer._run(x)) >= hidden


def test_an_image_channels_first_gives_a_map_channels_last():
    conv = Conv2d(3, 8, 4, stride=4)
    image = torch.randn(2, 3, 16, 16)
    out = conv(image.movedim(1, -1))
    assert out.is_contiguous()
    torch.testing.assert_close(out.movedim(-1, 1), torch.nn.functional.conv2d(image, conv.weight, conv.bias, stride=4))
