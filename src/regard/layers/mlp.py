"""Feed-forward networks on the last axis."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from regard.layers.conv import depthwise

_PART, _LARGE = 1 << 20, 1 << 22  # numbers: 4 MiB in float32 stay in a cache, more than 16 MiB do not


def by_positions(run: Callable[[Tensor], Tensor], x: Tensor, hidden: int) -> Tensor:
    """`run(x)` for a `run` that treats every position by itself, in inference on a CPU a few positions at a time.

    The `hidden` numbers a position that arise on the way then stay in cache, and are never all in memory. With gradients,
    on other devices and while a graph is traced `run` gets all of `x`.

    Args:
        x: `(..., dim)`.
    """
    positions = x.numel() // max(1, x.shape[-1])
    whole = torch.is_grad_enabled() or x.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing()
    if whole or positions * hidden <= _LARGE:
        return run(x)
    parts = x.reshape(positions, -1).split(max(1, _PART // hidden))
    return torch.cat([run(part) for part in parts]).unflatten(0, x.shape[:-1])


class Mlp(nn.Module):
    """fc2(act(fc1(x))): dim -> hidden -> dim. In inference `fc1` may see a map a few positions at a time (`by_positions`)."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        act: Callable[[], nn.Module] = nn.GELU,
        bias: bool = True,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, bias=bias)
        self.act = act()
        self.fc2 = nn.Linear(hidden, dim, bias=bias)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., dim)` -> the same shape."""
        return by_positions(self._run, x, self.fc1.out_features)

    def _run(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class ConvMlp(nn.Module):
    """fc2(u + DWConv(u)) with u = act(fc1(x)): a 3 x 3 depthwise convolution between the linear layers.

    Args:
        axes: number of spatial axes.
    """

    def __init__(self, dim: int, hidden: int, *, act: Callable[[], nn.Module] = nn.GELU, axes: int = 2) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = act()
        self.local = depthwise(hidden, 3, dims=axes)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *S, dim)` -> the same shape."""
        x = self.act(self.fc1(x))
        return self.fc2(x + self.local(x))


class GatedMlp(nn.Module):
    """out(act(gate(x)) * value(x)): SwiGLU with the default SiLU (Shazeer, 2020); with nn.Identity a plain GLU."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        act: Callable[[], nn.Module] = nn.SiLU,
        bias: bool = True,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias=bias)
        self.value = nn.Linear(dim, hidden, bias=bias)
        self.act = act()
        self.out = nn.Linear(hidden, dim, bias=bias)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., dim)` -> the same shape."""
        return by_positions(self._run, x, 2 * self.gate.out_features)

    def _run(self, x: Tensor) -> Tensor:
        return self.drop(self.out(self.drop(self.act(self.gate(x)) * self.value(x))))
