"""FFNet for forecasting series of several variables (MetaMixer, arXiv 2406.02021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regard import checks
from regard.checkpoint import KeyMap
from regard.layers import BatchNorm, Conv1d, RepConv, depthwise
from regard.skeletons import Model


class GroupedLinear(nn.Linear):
    """A linear layer of its own for each group: `(..., groups, dim)` -> `(..., groups, out_dim)`.

    `weight` is `(groups out_dim, dim)`, group by group.
    """

    def __init__(self, groups: int, dim: int, out_dim: int) -> None:
        super().__init__(dim, groups * out_dim)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """The last two axes are group and channel."""
        weight, bias = self.weight.unflatten(0, (self.groups, -1)), self.bias.unflatten(0, (self.groups, -1))
        return torch.einsum("...gi,goi->...go", x, weight) + bias


class SeriesTokenMixer(nn.Module):
    """x + DW(GELU(DW(BN(q)))) along time, with q from two linear layers, across variables and across channels.

    The first makes two new variables of each in every channel, the second one of each pair in every variable.
    """

    def __init__(self, variables: int, dim: int, kernel_size: int) -> None:
        super().__init__()
        self.across = GroupedLinear(dim, variables, 2 * variables)
        self.drop1 = nn.Dropout(0.3)
        self.act = nn.GELU()
        self.within = GroupedLinear(variables, 2 * dim, dim)
        self.drop2 = nn.Dropout(0.15)
        self.norm = BatchNorm(dim)
        self.key = depthwise(variables * dim, kernel_size, dims=1)
        self.value = depthwise(variables * dim, kernel_size, dims=1)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, N, variables, dim)` -> the same shape, N patches of time."""
        y = self.act(self.drop1(self.across(x.mT))).mT  # (B, N, 2 variables, dim)
        y = self.drop2(self.within(y.reshape(*x.shape[:-1], 2 * x.shape[-1])))
        y = self.value(self.act(self.key(self.norm(y).flatten(-2))))
        return x + y.view(x.shape)


class SeriesChannelMixer(nn.Module):
    """x + MLP(BN(RepConv(x))): along time, then up within each variable and down across variables."""

    def __init__(self, variables: int, dim: int, kernel_size: int, small_size: int, ratio: int, drop: float) -> None:
        super().__init__()
        self.ratio = ratio
        self.local = RepConv(variables * dim, kernel_size=kernel_size, small_size=small_size, axes=1)
        self.norm = BatchNorm(dim)
        self.within = GroupedLinear(variables, dim, ratio * dim)
        self.drop1 = nn.Dropout(drop)
        self.act = nn.GELU()
        self.across = GroupedLinear(dim, ratio * variables, variables)
        self.drop2 = nn.Dropout(0.15)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, N, variables, dim)` -> the same shape."""
        y = self.norm(self.local(x.flatten(-2)).view(x.shape))
        y = self.act(self.drop1(self.within(y))).mT  # (B, N, ratio dim, variables)
        y = self.drop2(self.across(y.reshape(*x.shape[:2], x.shape[-1], self.ratio * x.shape[-2])))
        return x + y.mT


def _ours(name: str, value: Tensor) -> dict[str, Tensor]:
    """The authors' tensors in our layout: pointwise convolutions along time are linear layers."""
    return {name: value.flatten(1) if value.shape[2:] == (1,) else value}


class FFNetSeries(Model):
    """Series `(B, length, variables)` -> the next `horizon` values `(B, horizon, variables)`.

    Each series is normalised by its own mean and deviation and the answer put back (RevIN, without learned factors); patches
    of time become tokens by one convolution; blocks; one linear layer from all tokens of a variable to its future.

    Args:
        variables, length, horizon: of the series. dim, depth: channels and blocks.
        kernel_size, small_size: of the convolutions along time. mlp_ratio: of the channel mixers, whole.
        patch_size, patch_stride: of the tokens; the end of a series is repeated so that length / stride tokens come out.
    """

    authors_keys = KeyMap(
        rules=[
            (r"^model\.", ""),
            (r"^downsample_layers\.0\.0\.", "embed."),
            (r"^downsample_layers\.0\.1\.", "embed_norm."),
            (r"^stages\.0\.blocks\.(\d+)\.token_mixer\.", r"blocks.\1.0."),
            (r"^stages\.0\.blocks\.(\d+)\.channel_mixer\.", r"blocks.\1.1."),
            (r"\.0\.ffnpw1\.", ".0.across."),
            (r"\.0\.ffnpw2\.", ".0.within."),
            (r"\.1\.ffnpw1\.", ".1.within."),
            (r"\.1\.ffnpw2\.", ".1.across."),
            (r"\.dw1\.", ".key."),
            (r"\.dw2\.", ".value."),
            (r"\.dw\.lkb_origin\.", ".local.large."),
            (r"\.dw\.small_conv\.", ".local.small."),
            (r"(large|small)\.bn\.", r"\1.norm."),
            (r"^head\.linear\.", "head."),
        ],
        # Layers that the authors' class makes for several stages, time stamps and scales, and does not use with one stage.
        drop=[r"downsample_layers\.[1-9]", r"te_patch\.", r"lat_layer\.", r"smooth_layer\.", r"up_sample_conv\."],
        convert=_ours,
    )

    def __init__(
        self,
        variables: int = 7,
        length: int = 96,
        horizon: int = 96,
        dim: int = 64,
        depth: int = 1,
        kernel_size: int = 51,
        small_size: int = 5,
        mlp_ratio: int = 2,
        patch_size: int = 4,
        patch_stride: int = 2,
        drop: float = 0.1,
    ) -> None:
        super().__init__()
        checks.divisible("length", length, "patch_stride", patch_stride)
        if patch_size < patch_stride:
            raise ValueError(f"patch_size must be at least patch_stride={patch_stride}, got {patch_size}.")
        self.variables, self.length, self.overlap = variables, length, patch_size - patch_stride
        self.embed = Conv1d(1, dim, patch_size, stride=patch_stride)
        self.embed_norm = BatchNorm(dim)
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(
                    SeriesTokenMixer(variables, dim, kernel_size),
                    SeriesChannelMixer(variables, dim, kernel_size, small_size, mlp_ratio, drop),
                )
                for _ in range(depth)
            )
        )
        self.head = nn.Linear(length // patch_stride * dim, horizon)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, length, variables)` -> `(B, horizon, variables)`."""
        if x.dim() != 3 or x.shape[1:] != (self.length, self.variables):
            raise ValueError(f"x must be (batch, {self.length}, {self.variables}), got {tuple(x.shape)}.")
        mean = x.mean(1, keepdim=True).detach()
        deviation = (x.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt().detach()
        series = ((x - mean) / deviation).mT.flatten(0, 1)  # (B variables, length)
        series = torch.cat([series, series[:, -1:].expand(-1, self.overlap)], 1)
        tokens = self.embed_norm(self.embed(series[..., None])).unflatten(0, (-1, self.variables)).transpose(1, 2)
        tokens = self.blocks(tokens)  # (B, N, variables, dim)
        return self.head(tokens.permute(0, 2, 3, 1).flatten(2)).mT * deviation + mean
