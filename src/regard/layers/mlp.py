"""Feed-forward networks on the last axis."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from regard.layers.conv import depthwise


class Mlp(nn.Module):
    """fc2(act(fc1(x))): dim -> hidden -> dim."""

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
        return self.drop(self.out(self.drop(self.act(self.gate(x)) * self.value(x))))
