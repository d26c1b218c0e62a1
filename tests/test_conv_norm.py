"""Folding BatchNorm into convolutions, for the shapes that no published model has."""

from __future__ import annotations

import pytest
import torch

from regard.layers import ConvNorm, GlobalFilter, RepConv, Residual, fuse
from regard.proofs.experiments import with_batch_statistics

CASES = {
    "pointwise": (2, lambda: ConvNorm(4, 6)),
    "series": (1, lambda: ConvNorm(4, 8, 5, stride=2, groups=4, axes=1)),
    "one_axis": (2, lambda: ConvNorm(4, 4, (1, 5), groups=4)),
    "volume": (3, lambda: RepConv(4, 8, kernel_size=5, small_size=1, stride=2, axes=3)),
    "equal_kernels": (2, lambda: RepConv(4, kernel_size=3, small_size=3)),
    "residual": (1, lambda: Residual(ConvNorm(4, 4, 3, groups=4, axes=1))),
    "residual_of_residual": (2, lambda: Residual(Residual(ConvNorm(4, 4, 3, groups=4)))),
    "residual_of_pointwise": (2, lambda: Residual(ConvNorm(4, 4))),
}


@pytest.mark.parametrize("name", CASES)
def test_folded_computes_the_same(name):
    axes, build = CASES[name]
    x = torch.randn(3, *(5, 4, 3)[:axes], 4)
    module = with_batch_statistics(build(), x).double()
    expected = module(x.double())
    once = fuse(module)
    torch.testing.assert_close(once(x.double()), expected)
    torch.testing.assert_close(fuse(once)(x.double()), expected)
    assert not any(isinstance(part, torch.nn.BatchNorm1d) for part in once.modules())
    torch.testing.assert_close(module(x.double()), expected)  # the original is untouched


def test_wrong_kernels_are_refused():
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        ConvNorm(4, 4, 2)
    with pytest.raises(ValueError, match="small_size"):
        RepConv(4, kernel_size=3, small_size=5)


@pytest.mark.parametrize("grid", [(6,), (4, 6), (5, 3), (2, 4, 6)])
def test_a_filter_of_ones_changes_nothing_on_any_map(grid):
    layer = GlobalFilter(3, grid)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, 0.0]).expand_as(layer.weight))
    for spatial in (grid, [side + 1 for side in grid], [2 * side for side in grid], [1] * len(grid)):
        x = torch.randn(2, *spatial, 3)
        torch.testing.assert_close(layer(x), x)
    with pytest.raises(ValueError, match="spatial axes"):
        layer(torch.randn(2, *grid, 4, 3))
