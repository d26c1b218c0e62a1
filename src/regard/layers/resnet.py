"""ResNet (He et al., 2016, arXiv 1512.03385) without its classifier: the convolutional trunk of hybrid systems.

With the stride in the 3 x 3 convolution of a bottleneck ("v1.5"), as in the weights that are usually loaded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from regard.layers.conv_norm import ConvNorm


class BasicBlock(nn.Module):
    """ReLU(shortcut(x) + conv2(ReLU(conv1(x)))), both 3 x 3 with BatchNorm; a side is divided by `stride`, rounded up."""

    expansion = 1

    def __init__(self, dim: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = ConvNorm(dim, width, 3, stride=stride)
        self.conv2 = ConvNorm(width, width, 3)
        self.shortcut = nn.Identity() if (dim, stride) == (width, 1) else ConvNorm(dim, width, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, W, dim)` -> `(B, H / stride, W / stride, width)`."""
        return F.relu(self.shortcut(x) + self.conv2(F.relu(self.conv1(x))))


class Bottleneck(nn.Module):
    """As `BasicBlock`, with 1 x 1, 3 x 3 and 1 x 1 convolutions, the last to `4 width` channels."""

    expansion = 4

    def __init__(self, dim: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = ConvNorm(dim, width)
        self.conv2 = ConvNorm(width, width, 3, stride=stride)
        self.conv3 = ConvNorm(width, 4 * width)
        self.shortcut = nn.Identity() if (dim, stride) == (4 * width, 1) else ConvNorm(dim, 4 * width, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, W, dim)` -> `(B, H / stride, W / stride, 4 width)`."""
        return F.relu(self.shortcut(x) + self.conv3(F.relu(self.conv2(F.relu(self.conv1(x))))))


class ResNet(nn.Module):
    """A 7 x 7 convolution and max pooling, each of stride 2, then stages of blocks that halve the map but in the first.

    The defaults are ResNet-50; `depths=(2, 2, 2, 2), bottleneck=False` is ResNet-18.

    Args:
        width: of the first stage's 3 x 3 convolutions; it doubles from stage to stage.

    Attributes:
        dims: channels of each stage's map. strides: pixels per position, from 4 on.
    """

    def __init__(
        self, in_chans: int = 3, *, width: int = 64, depths: Sequence[int] = (3, 4, 6, 3), bottleneck: bool = True
    ) -> None:
        super().__init__()
        block = Bottleneck if bottleneck else BasicBlock
        self.stem = ConvNorm(in_chans, width, 7, stride=2)
        self.stages = nn.ModuleList()
        self.strides = tuple(4 * 2**stage for stage in range(len(depths)))
        self.dims = tuple(width * 2**stage * block.expansion for stage in range(len(depths)))
        dim = width
        for stage, (depth, out) in enumerate(zip(depths, self.dims, strict=True)):
            strides = [1 if stage == 0 else 2] + [1] * (depth - 1)
            self.stages.append(
                nn.Sequential(*(block(out if i else dim, width * 2**stage, stride) for i, stride in enumerate(strides)))
            )
            dim = out
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> list[Tensor]:
        """`(B, H, W, in_chans)` -> the map of each stage, `(B, H / 4, W / 4, dims[0])` first."""
        x = F.max_pool2d(F.relu(self.stem(x)).movedim(-1, 1), 3, 2, 1).movedim(1, -1)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps
