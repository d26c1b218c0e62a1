"""What the shared tests cannot know of TiC: the two kinds of border, and what its layer refuses."""

from __future__ import annotations

import pytest
import torch

from regard import ops
from regard.systems.backbones.tic import MSAConv, convolutional_attention


def test_border_inside_is_neighborhood_attention():
    q, k, v = torch.randn(3, 1, 6, 6, 2, 4)
    inside = convolutional_attention(q, k, v, kernel_size=3, border="inside")
    zeros = convolutional_attention(q, k, v, kernel_size=3)
    assert torch.equal(inside, ops.neighborhood_attention(q, k, v, kernel_size=3))
    torch.testing.assert_close(inside[:, 1:-1, 1:-1], zeros[:, 1:-1, 1:-1])
    assert not torch.allclose(inside[:, 0], zeros[:, 0])


def test_wrong_arguments():
    with pytest.raises(ValueError, match="kernel_size"):
        convolutional_attention(*torch.randn(3, 1, 6, 6, 2, 4), kernel_size=4)
    with pytest.raises(ValueError, match="shift"):
        MSAConv(8, shift=(0.5, 0.0), stride=2)
