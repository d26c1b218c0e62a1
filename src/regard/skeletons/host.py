"""Small models that differ in their mixer only: what comparisons train.

Each hosts any mixer, built through `Mixer.in_stack` where there is one, or as `mixer(dim, num_heads)` or `mixer(dim)`
where it is a user's own module.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regard import checks
from regard.layers import Block, Conv2d, PatchEmbed, linear_rates, sincos, vit_init
from regard.registry import mixer_class
from regard.skeletons.hierarchical import Hierarchical

MixerClass = Callable[..., nn.Module]


def build_in_stack(
    mixer: str | MixerClass,
    index: int,
    input_size: tuple[int, ...],
    dim: int,
    num_heads: int,
    *,
    cross: bool = False,
    **options: Any,
) -> nn.Module:
    """Mixer `index` of a stack on grids of `input_size`, from a registered name or a class.

    Args:
        cross: it will be called with a context. options: the mixer's, like `causal=True`.

    Raises:
        ValueError: for a name that is not known, or a mixer that does not take so many spatial axes, cannot be causal, or
            takes no context, though it is asked for.
    """
    made_by = mixer_class(mixer) if isinstance(mixer, str) else mixer
    name = mixer if isinstance(mixer, str) else getattr(mixer, "__name__", str(mixer))
    dims = getattr(made_by, "dims", (1, 2, 3))
    if len(input_size) not in dims:
        raise ValueError(f"mixer {name!r} takes {' or '.join(map(str, dims))} spatial axes, not {len(input_size)}.")
    if options.get("causal") and not getattr(made_by, "can_causal", False):
        raise ValueError(f"mixer {name!r} is not causal, so it cannot model sequences from left to right.")
    if cross and not getattr(made_by, "can_cross", False):
        raise ValueError(f"mixer {name!r} takes no context, so it cannot be cross attention.")
    in_stack = getattr(made_by, "in_stack", None)
    if in_stack is not None:
        return in_stack(index, input_size, dim, num_heads, **options)
    if "num_heads" in inspect.signature(made_by).parameters:
        options["num_heads"] = num_heads
    return made_by(dim, **options)


class MixerPyramid(Hierarchical):
    """Patches, two or more stages of `Block(mixer)` with a strided convolution between them, norm, mean, linear.

    Args:
        mixer: a registered name or a class. input_size: height and width in pixels.
        dims, depths, num_heads: of each stage. patch_size: pixels per token of the first stage.
    """

    def __init__(
        self,
        mixer: str | MixerClass,
        *,
        input_size: tuple[int, int] = (32, 32),
        dims: Sequence[int] = (32, 64),
        depths: Sequence[int] = (2, 2),
        num_heads: Sequence[int] = (2, 4),
        patch_size: int = 4,
        mlp_ratio: float = 2.0,
        drop_path_rate: float = 0.0,
        num_classes: int = 10,
        in_chans: int = 3,
        **options: Any,
    ) -> None:
        rates = iter(linear_rates(drop_path_rate, sum(depths)))
        stages, grid = [], tuple(-(-side // patch_size) for side in input_size)
        for width, depth, heads in zip(dims, depths, num_heads, strict=True):
            blocks = []
            for index in range(depth):
                made = build_in_stack(mixer, index, grid, width, heads, **options)
                blocks.append(Block(width, made, mlp_ratio=mlp_ratio, drop_path=next(rates)))
            stages.append(blocks)
            grid = tuple(-(-side // 2) for side in grid)
        super().__init__(
            stem=PatchEmbed(in_chans, dims[0], patch_size),
            downs=[
                nn.Identity(),
                *(Conv2d(a, b, 3, stride=2, padding=1) for a, b in zip(dims[:-1], dims[1:], strict=True)),
            ],
            stages=stages,
            dims=dims,
            strides=[patch_size * 2**stage for stage in range(len(dims))],
            norm=nn.LayerNorm(dims[-1]),
            num_classes=num_classes,
            in_chans=in_chans,
        )
        self.position = nn.Parameter(torch.zeros(1, *(-(-side // patch_size) for side in input_size), dims[0]))
        nn.init.trunc_normal_(self.position, std=0.02)
        self.input_size = tuple(input_size)
        self.apply(partial(vit_init, std=0.02))

    def stages_forward(self, x: Tensor) -> list[Tensor]:
        """As in `Hierarchical`, with a learned position map after the patches (images of the built size only)."""
        if tuple(x.shape[2:]) != self.input_size:
            raise ValueError(f"this model was built for images of {self.input_size}, got {tuple(x.shape[2:])}.")
        x = self.stem(x.movedim(1, -1)) + self.position
        maps = []
        for down, stage in zip(self.downs, self.stages, strict=True):
            x = stage(down(x))
            maps.append(x)
        return maps


class MixerVideo(nn.Module):
    """Frames in, as many frames out: linear patches, sine code of time and place, blocks on `(T, H, W)`, linear back.

    Args:
        mixer: a registered name or a class that takes three spatial axes.
        frames, size: past frames, and pixels of a side. channels: of a frame.
    """

    def __init__(
        self,
        mixer: str | MixerClass,
        *,
        frames: int = 10,
        size: int = 32,
        channels: int = 1,
        dim: int = 64,
        depth: int = 3,
        num_heads: int = 4,
        patch_size: int = 4,
        mlp_ratio: float = 2.0,
        **options: Any,
    ) -> None:
        super().__init__()
        checks.divisible("size", size, "patch_size", patch_size)
        side = size // patch_size
        self.patch_size, self.grid = patch_size, (frames, side, side)
        self.embed = nn.Linear(channels * patch_size**2, dim)
        places = torch.arange(frames * side * side, device="cpu")
        self.register_buffer("position", sincos(places, dim).view(*self.grid, dim), persistent=False)
        self.blocks = nn.Sequential(
            *(
                Block(dim, build_in_stack(mixer, index, self.grid, dim, num_heads, **options), mlp_ratio=mlp_ratio)
                for index in range(depth)
            )
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, channels * patch_size**2)
        self.apply(vit_init)

    def forward(self, past: Tensor) -> Tensor:
        """`(B, T, C, H, W)` -> the next T frames `(B, T, C, H, W)`."""
        p = self.patch_size
        tokens = past.unfold(3, p, p).unfold(4, p, p).permute(0, 1, 3, 4, 2, 5, 6).flatten(4)  # (B, T, h, w, C p p)
        tokens = self.head(self.norm(self.blocks(self.embed(tokens) + self.position)))
        frames = tokens.unflatten(-1, (past.shape[2], p, p)).permute(0, 1, 4, 2, 5, 3, 6)
        return frames.flatten(5, 6).flatten(3, 4)
