"""The pyramid: a stem, stages of blocks, a downsampling before each stage but the first."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from regard.skeletons.base import ImageModel, make_head


class Hierarchical(ImageModel):
    """stem -> stage 0 -> down 1 -> stage 1 -> ... -> norm -> mean -> head_norm -> head.

    The parts are modules on channels-last maps, so any mixer fits into any stage; the system brings them.

    Args:
        stem: image `(B, H, W, in_chans)` -> tokens. downs: one module per stage; the first is usually `nn.Identity()`.
        stages: the blocks of each stage.
        dims: channels after each stage. strides: pixels per token of each stage.
        num_features: channels after `norm`, if it changes their number.
        norm: applied to the last map. head_norm: applied to the pooled vector (it may hold more than a norm).
    """

    def __init__(
        self,
        *,
        stem: nn.Module,
        downs: Sequence[nn.Module],
        stages: Sequence[Sequence[nn.Module]],
        dims: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        in_chans: int,
        num_features: int | None = None,
        norm: nn.Module | None = None,
        head_norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.in_chans, self.num_classes = in_chans, num_classes
        self.feature_dims, self.feature_strides = tuple(dims), tuple(strides)
        self.num_features = dims[-1] if num_features is None else num_features
        self.stem = stem
        self.downs = nn.ModuleList(downs)
        self.stages = nn.ModuleList(nn.Sequential(*blocks) for blocks in stages)
        self.norm = nn.Identity() if norm is None else norm
        self.head_norm = nn.Identity() if head_norm is None else head_norm
        self.head = make_head(self.num_features, num_classes)

    def stages_forward(self, x: Tensor) -> list[Tensor]:
        """`(B, in_chans, H, W)` -> channels-last maps of all stages."""
        x = self.stem(x.movedim(1, -1))
        maps = []
        for down, stage in zip(self.downs, self.stages, strict=True):
            x = stage(down(x))
            maps.append(x)
        return maps
