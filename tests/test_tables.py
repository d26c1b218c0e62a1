"""Index tables are constants to compilers, and stay real tensors whatever is switched on when they are first asked for."""

from __future__ import annotations

import pytest
import torch

from regard import ops
from regard.layouts.neighborhoods import axis_tiles
from regard.layouts.windows import shift_regions

OPS = {
    "neighborhood": lambda x: ops.neighborhood_attention(x, x, x, kernel_size=3, dilation=2),
    "window": lambda x: ops.window_attention(x, x, x, window_size=4, shift=2),
}
SIZES = ((9, 8), (11, 13))


class Module(torch.nn.Module):
    def __init__(self, name):
        super().__init__()
        self.op = OPS[name]

    def forward(self, x):
        return self.op(x)


@pytest.mark.parametrize("name", OPS)
def test_compiles_into_one_graph_at_every_size(name):
    torch.compiler.reset()
    compiled = torch.compile(OPS[name], fullgraph=True, backend="aot_eager")
    for size in SIZES:
        x = torch.randn(2, *size, 2, 4, requires_grad=True)
        ours, plain = compiled(x), OPS[name](x)
        torch.testing.assert_close(ours, plain)
        gradients = (torch.autograd.grad(out.square().sum(), x)[0] for out in (ours, plain))
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", OPS)
def test_exports(name, strict):
    x = torch.randn(2, 10, 7, 2, 4)
    program = torch.export.export(Module(name), (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), OPS[name](x))


def test_first_use_under_a_mode_leaves_nothing_behind():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("meta"):
        axis_tiles(19, 3, 1, 5, False, 4)
        shift_regions((5, 6), (8, 8), (4, 4), (1, 2))
    tables = [*axis_tiles(19, 3, 1, 5, False, 4), shift_regions((5, 6), (8, 8), (4, 4), (1, 2))]
    assert all(type(item) is torch.Tensor and item.device.type == "cpu" for item in tables)
