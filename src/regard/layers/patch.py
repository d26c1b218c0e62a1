"""From pixels to tokens, and from tokens to fewer tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from regard.layers.conv import Conv2d
from regard.layers.norm import BatchNorm
from regard.layouts.windows import pad_to_multiple


class PatchEmbed(nn.Module):
    """Non-overlapping patches, projected and normalised: `(B, H, W, C)` -> `(B, H/p, W/p, dim)`.

    A side that is no multiple of the patch is zero-padded at its end.
    """

    def __init__(self, in_chans: int, dim: int, patch_size: int, *, norm: bool = True) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = Conv2d(in_chans, dim, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Channels-last image in, channels-last tokens out."""
        return self.norm(self.proj(pad_to_multiple(x, (self.patch_size, self.patch_size))))


class ConvEmbed(nn.Module):
    """Overlapping patches by a strided convolution, then LayerNorm: `(B, H, W, C)` -> `(B, H/stride, W/stride, dim)`.

    A side that is no multiple of the stride is zero-padded at its end first.
    """

    def __init__(self, in_chans: int, dim: int, kernel_size: int, stride: int, padding: int) -> None:
        super().__init__()
        self.proj = Conv2d(in_chans, dim, kernel_size, stride=stride, padding=padding)
        self.norm = nn.LayerNorm(dim)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Channels-last image or tokens in, channels-last tokens out."""
        return self.norm(self.proj(pad_to_multiple(x, (self.stride, self.stride))))


class ConvStem(nn.Sequential):
    """3 x 3 convolutions, each with BatchNorm, an activation between them: `(B, H, W, C)` -> `(B, H', W', dims[-1])`.

    With one convolution it is the usual step down between two stages. A stride of 2 halves a side, rounded up.

    Args:
        dims, strides: of each convolution.
        act: the activation. act_first: it stands before each BatchNorm (as in STViT), the last included.
    """

    def __init__(
        self,
        in_chans: int,
        dims: Sequence[int],
        strides: Sequence[int],
        *,
        act: Callable[[], nn.Module] = nn.GELU,
        act_first: bool = False,
    ) -> None:
        layers: list[nn.Module] = []
        for width, wider, stride in zip([in_chans, *dims[:-1]], dims, strides, strict=True):
            conv, norm = Conv2d(width, wider, 3, stride=stride, padding=1), BatchNorm(wider)
            layers += [conv, act(), norm] if act_first else [conv, norm, act()]
        super().__init__(*(layers if act_first else layers[:-1]))


class PatchMerging(nn.Module):
    """2 x 2 neighbours concatenated, normalised and reduced: `(B, H, W, C)` -> `(B, H/2, W/2, 2C)` (Swin, section 3.1).

    Channel order of the concatenation: (row, column) = (0,0), (1,0), (0,1), (1,1). An odd side is zero-padded.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Channels-last tokens in and out."""
        x = pad_to_multiple(x, (2, 2))
        parts = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(parts, -1)))
