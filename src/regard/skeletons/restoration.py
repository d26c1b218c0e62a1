"""The trunk of image restoration: shallow convolution, a deep body at one resolution, reconstruction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from regard import checks
from regard.layers import Conv2d, PixelShuffle
from regard.layouts import windows
from regard.skeletons.base import Model

RGB_MEAN = (0.4488, 0.4371, 0.4040)
"""Mean colour of the DIV2K photographs in [0, 1], which the family of EDSR subtracts."""


def body_conv(dim: int, kind: Literal["1conv", "3conv"] = "1conv") -> nn.Module:
    """What ends a group and the body: a 3 x 3 convolution, or three with a bottleneck of dim / 4 (SwinIR, section 3)."""
    checks.one_of("kind", kind, ("1conv", "3conv"))
    if kind == "1conv":
        return Conv2d(dim, dim, 3, padding=1)
    inner = dim // 4
    return nn.Sequential(
        Conv2d(dim, inner, 3, padding=1),
        nn.LeakyReLU(0.2),
        Conv2d(inner, inner, 1),
        nn.LeakyReLU(0.2),
        Conv2d(inner, dim, 3, padding=1),
    )


class ResidualGroup(nn.Module):
    """x + conv(body(x)) on `(B, H, W, dim)`: blocks of any kind inside one residual."""

    def __init__(self, dim: int, body: nn.Module, conv: Literal["1conv", "3conv"] = "1conv") -> None:
        super().__init__()
        self.body = body
        self.conv = body_conv(dim, conv)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, W, dim)` -> the same shape."""
        return x + self.conv(self.body(x))


class Reconstruction(nn.Module):
    """Deep features `(B, H, W, dim)` -> image `(B, scale H, scale W, out_chans)`.

    Args:
        scale: 1, 2, 4, 8 ... (doublings) or 3.
        kind: "pixelshuffle" convolves to `width` channels, enlarges step by step, convolves again; "direct" is one
            convolution and one pixel shuffle.
    """

    def __init__(
        self,
        dim: int,
        out_chans: int,
        scale: int,
        kind: Literal["pixelshuffle", "direct"] = "pixelshuffle",
        width: int = 64,
    ) -> None:
        super().__init__()
        checks.one_of("kind", kind, ("pixelshuffle", "direct"))
        if kind == "direct":
            self.before: nn.Module = nn.Identity()
            self.up: nn.Module = nn.Identity()
            self.last: nn.Module = nn.Sequential(
                Conv2d(dim, out_chans * scale * scale, 3, padding=1), PixelShuffle(scale)
            )
            return
        steps = [3] if scale == 3 else [2] * (scale.bit_length() - 1)
        if scale != 3 and scale != 2 ** len(steps):
            raise ValueError(f"scale must be 1, 2, 4, 8, ... or 3, got {scale!r}; kind='direct' takes any scale.")
        self.before = nn.Sequential(Conv2d(dim, width, 3, padding=1), nn.LeakyReLU())
        self.up = nn.Sequential(
            *(m for step in steps for m in (Conv2d(width, width * step * step, 3, padding=1), PixelShuffle(step)))
        )
        self.last = Conv2d(width, out_chans, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, W, dim)` -> `(B, scale H, scale W, out_chans)`."""
        return self.last(self.up(self.before(x)))


def _set_row(convolution: nn.Module, row: int, taps: Mapping[int, float]) -> None:
    """Make one output channel a weighted sum of input channels at the same pixel."""
    assert isinstance(convolution, Conv2d)
    convolution.weight[row] = 0
    for channel, value in taps.items():
        convolution.weight[row, channel, convolution.kernel_size[0] // 2, convolution.kernel_size[1] // 2] = value
    if convolution.bias is not None:
        convolution.bias[row] = 0


class Restoration(Model):
    """head -> embed_norm -> groups -> norm -> fuse, + head's features -> reconstruction.

    The image has its mean subtracted and is multiplied by `img_range` on the way in, and back on the way out. It is
    mirrored at its right and bottom up to a multiple of `multiple` before, and cropped after, so any size runs. At
    scale 1 (denoising, deblurring ...) the network predicts what to add to the image.

    Args:
        groups: the body; modules on `(B, H, W, dim)` that keep the shape, each a `ResidualGroup` or any other.
        scale: enlargement. reconstruction, width: kind and channels of the `Reconstruction`.
        multiple: what the body needs height and width to be a multiple of.
        embed_norm, norm: before and after the body. head, fuse: replace the 3 x 3 convolutions before and after it.
        mean: of each channel; by default `RGB_MEAN` for three channels, otherwise zeros.
    """

    mean: Tensor

    def __init__(
        self,
        *,
        groups: Iterable[nn.Module],
        dim: int,
        scale: int,
        in_chans: int = 3,
        multiple: int = 1,
        embed_norm: nn.Module | None = None,
        norm: nn.Module | None = None,
        head: nn.Module | None = None,
        fuse: nn.Module | None = None,
        reconstruction: Literal["pixelshuffle", "direct"] = "pixelshuffle",
        width: int = 64,
        mean: Sequence[float] | None = None,
        img_range: float = 1.0,
    ) -> None:
        super().__init__()
        checks.positive("scale", scale)
        checks.positive("multiple", multiple)
        checks.positive("img_range", img_range)
        self.in_chans, self.num_features, self.scale = in_chans, dim, scale
        self.multiple, self.img_range = multiple, img_range
        if mean is None:
            mean = RGB_MEAN if in_chans == 3 else (0.0,) * in_chans
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.head = Conv2d(in_chans, dim, 3, padding=1) if head is None else head
        self.embed_norm = nn.Identity() if embed_norm is None else embed_norm
        self.groups = nn.ModuleList(groups)
        self.norm = nn.Identity() if norm is None else norm
        self.fuse = body_conv(dim) if fuse is None else fuse
        self.reconstruction = Reconstruction(dim, in_chans, scale, reconstruction, width)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, in_chans, H, W)` in [0, 1] -> `(B, in_chans, scale H, scale W)`; the values are not clamped."""
        image = self._enter(x)
        out = self.reconstruction(self._features(image))
        if self.scale == 1:
            out = out + image
        out = out / self.img_range + self.mean
        return windows.crop(out, [self.scale * side for side in x.shape[-2:]]).movedim(-1, 1)

    def forward_features(self, x: Tensor) -> Tensor:
        """`(B, in_chans, H, W)` -> what the reconstruction sees: `(B, dim, H, W)`."""
        return windows.crop(self._features(self._enter(x)), x.shape[-2:]).movedim(-1, 1)

    def forward_intermediates(self, x: Tensor, indices: Sequence[int] | None = None) -> list[Tensor]:
        """The maps `(B, dim, H, W)` after the groups (all, or those in `indices`).

        Raises:
            ValueError: for a group that does not exist.
        """
        maps = [self.embed_norm(self.head(self._enter(x)))]
        for group in self.groups:
            maps.append(group(maps[-1]))
        maps = maps[1:]
        wanted = range(len(maps)) if indices is None else indices
        for index in wanted:
            if not -len(maps) <= index < len(maps):
                raise ValueError(f"indices must lie in 0..{len(maps) - 1}, got {index}.")
        return [windows.crop(maps[index], x.shape[-2:]).movedim(-1, 1) for index in wanted]

    def forward_tiled(self, x: Tensor, tile: int = 256, overlap: int = 32) -> Tensor:
        """`forward` piece by piece, for images that do not fit into memory at once.

        Each tile of `tile` x `tile` pixels is restored together with `overlap` pixels around it (fewer at the borders of
        the image), which are then cut off. The result equals `forward` where nothing farther than `overlap` mattered.
        """
        checks.image(x, self.in_chans)
        checks.positive("tile", tile)
        checks.tuple_of("overlap", overlap, 1, minimum=0)
        height, width = x.shape[-2:]
        rows = []
        for top in range(0, height, tile):
            row = []
            for left in range(0, width, tile):
                first = (max(top - overlap, 0), max(left - overlap, 0))
                out = self(x[..., first[0] : top + tile + overlap, first[1] : left + tile + overlap])
                begin = [self.scale * (start - edge) for start, edge in zip((top, left), first, strict=True)]
                sides = [self.scale * min(tile, end - start) for start, end in ((top, height), (left, width))]
                row.append(out.narrow(-2, begin[0], sides[0]).narrow(-1, begin[1], sides[1]))
            rows.append(torch.cat(row, -1))
        return torch.cat(rows, -2)

    @torch.no_grad()
    def start_as_enlargement(self) -> None:
        """Set weights such that the untrained network repeats pixels (nearest neighbour); at scale 1 it gives the image.

        From its usual start such a network spends its first thousand steps on learning to copy the image. Short
        trainings can begin here instead. The body keeps its weights; the channels that carry the image are taken from
        the convolutions around it, whose other channels stay as they are, with no weight in the answer yet.

        Raises:
            ValueError: if the reconstruction is too narrow (two channels for each of the image), or `head`, `fuse` or the
                last convolution are not plain convolutions.
        """
        tail = self.reconstruction
        last = tail.last if isinstance(tail.last, Conv2d) else tail.last[0]  # type: ignore[index]
        direct = not isinstance(tail.last, Conv2d)
        if not all(isinstance(module, Conv2d) for module in (self.head, self.fuse, last)):
            raise ValueError("start_as_enlargement needs plain convolutions as head, fuse and last convolution.")
        if not direct and last.in_channels < 2 * self.in_chans:
            raise ValueError(f"width must be at least {2 * self.in_chans} to start so, got {last.in_channels}.")
        nn.init.zeros_(last.weight)
        if last.bias is not None:
            nn.init.zeros_(last.bias)
        if self.scale == 1:  # the image is added at the end
            return
        for channel in range(self.in_chans):
            _set_row(self.head, channel, {channel: 1.0})
            _set_row(self.fuse, channel, {})
            if direct:
                for place in range(self.scale**2):
                    _set_row(last, channel * self.scale**2 + place, {channel: 1.0})
                continue
            # Both signs go through the leaky ReLU (slope a): leaky(x) - leaky(-x) = (1 + a) x.
            convolution, leaky = list(tail.before.children())
            for sign, row in ((1.0, 2 * channel), (-1.0, 2 * channel + 1)):
                _set_row(convolution, row, {channel: sign})
                for up in tail.up.children():
                    if isinstance(up, Conv2d):
                        places = up.out_channels // up.in_channels
                        for place in range(places):
                            _set_row(up, row * places + place, {row: 1.0})
            slope: float = leaky.negative_slope  # type: ignore[assignment]
            share = 1 / (1 + slope)
            _set_row(last, channel, {2 * channel: share, 2 * channel + 1: -share})

    def _enter(self, x: Tensor) -> Tensor:
        """Checked, mirrored and normalised: `(B, H', W', in_chans)`."""
        checks.image(x, self.in_chans)
        checks.no_half_on_cpu(type(self).__name__, x)
        image = windows.reflect_to_multiple(x.movedim(1, -1), (self.multiple, self.multiple))
        return (image - self.mean) * self.img_range

    def _features(self, image: Tensor) -> Tensor:
        shallow = self.head(image)
        deep = self.embed_norm(shallow)
        for group in self.groups:
            deep = group(deep)
        return self.fuse(self.norm(deep)) + shallow
