"""FlatFormer: Flattened Window Attention for Efficient Point Cloud Transformer (Liu et al., 2023, arXiv 2301.08739).

Pillars are sorted by window, and by position inside it, into one flat list that is cut in groups of equal count, not of
equal shape. Attention inside the groups is then one dense batch with next to no padding. Layers alternate the axis of
the sorting and shift the windows, which carries information from group to group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from regard import checks, ops
from regard.checkpoint import KeyMap
from regard.layers import Mixer, Mlp, heads_of
from regard.layers.detection import CenterHead, DynamicVFE, SecondBackbone, SecondFPN
from regard.layers.points import PointMixer, grid_sine_code
from regard.layouts.points import EqualGroups, equal_groups, flattened_windows
from regard.registry import System, Variant, register_mixer, register_system
from regard.skeletons.base import Model
from regard.skeletons.points import CellClassifier, CellDetector


@register_mixer("flattened_window")
class FlattenedWindowAttention(PointMixer):
    r"""Softmax attention inside groups of G cells that follow each other along a snake through windows (section 3.2).

    $$q_i = W_q (x_i + p_i),\quad k_i = W_k (x_i + p_i),\quad v_i = W_v x_i,\quad
      \mathrm{out}_i = W_o \sum_{j \in g(i)} \mathrm{softmax}_j(d^{-1/2} q_i^\top k_j)\, v_j$$

    p is a fixed sine code of the coordinates in the whole grid. The last group of a sample is filled up with the cells
    G places earlier, which count as further keys. The window only decides the order.

    Departures: a sample of fewer than G cells fills its one group with its own cells from the start (the authors' code
    fails there, or reads another sample); samples of a batch never mix in the sorting, however small the grid; one or
    three axes sort by the same rule.

    Args:
        dim: channels. num_heads: divides dim. window_size: one integer or one for each of `axes`.
        group_size: G. axis: along which windows follow each other in a row. shift: move windows by half.
        axes: number of spatial axes.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window_size: int | Sequence[int] = 9,
        group_size: int = 69,
        axis: int = -1,
        shift: bool = False,
        axes: int = 2,
    ) -> None:
        super().__init__()
        self.head_dim = heads_of(dim, num_heads)
        checks.positive("group_size", group_size)
        self.dim, self.num_heads, self.group_size = dim, num_heads, group_size
        self.window_size = checks.tuple_of("window_size", window_size, axes)
        self.axis, self.shift, self.axes = axis, shift, axes
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.qkv.weight)
        nn.init.xavier_uniform_(self.proj.weight)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.proj.bias)

    @classmethod
    def in_stack(cls, index: int, input_size: tuple[int, ...], dim: int, num_heads: int, **options: Any) -> Mixer:
        """Blocks take turns: x, x shifted, y, y shifted (and so on for other numbers of axes)."""
        axes = len(input_size)
        axis = axes - 1 - index // 2 % axes
        return cls(dim, num_heads, axis=axis, shift=index % 2 == 1, axes=axes, **options)

    def groups(self, coordinates: Tensor, counts: Sequence[int]) -> EqualGroups:
        """The groups of cells at these coordinates."""
        if coordinates.shape[1] != self.axes:
            raise ValueError(f"this mixer was built with axes={self.axes}, got {coordinates.shape[1]} spatial axes.")
        order = flattened_windows(coordinates, counts, self.window_size, axis=self.axis, shift=self.shift)
        return equal_groups(order, counts, self.group_size)

    def attend(self, x: Tensor, code: Tensor, groups: EqualGroups) -> Tensor:
        """Cells `(N, dim)` and their position codes `(N, dim)` -> `(N, dim)`."""
        weight, bias, split = self.qkv.weight, self.qkv.bias, 2 * self.dim
        # Cells are gathered before the projections: groups hold hardly more slots than there are cells.
        x, code = (part.index_select(0, groups.rows.flatten()).view(*groups.rows.shape, self.dim) for part in (x, code))
        q, k = F.linear(x + code, weight[:split], bias[:split]).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        v = F.linear(x, weight[split:], bias[split:]).unflatten(-1, (self.num_heads, -1))
        out = ops.attention(q, k, v)
        return self.proj(groups.scatter(out).flatten(1))  # type: ignore[arg-type]

    def mix(self, x: Tensor, coordinates: Tensor, counts: Sequence[int]) -> Tensor:
        """`(N, dim)` at `(N, axes)` -> `(N, dim)`."""
        code = grid_sine_code(coordinates, self.dim).to(x.dtype)
        return self.attend(x, code, self.groups(coordinates, counts))

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, window_size={self.window_size}, "
            f"group_size={self.group_size}, axis={self.axis}, shift={self.shift}"
        )


_ENCODER_RULES = (
    (r"(?:^block|middle_encoder\.block)_list\.(\d+)\.block\.(\d+)\.", lambda m: f"layers.{4 * int(m[1]) + int(m[2])}."),
    (r"attn\.attn\.in_proj_", "mixer.qkv."),
    (r"attn\.attn\.out_proj\.", "mixer.proj."),
    (r"(layers\.\d+)\.(fc\d)\.", r"\1.mlp.\2."),
)


class FlatFormerLayer(nn.Module):
    """x = LN(x + attention(x)); x = LN(x + mlp(x)), mlp C -> 2C -> C with GELU (post-norm)."""

    def __init__(self, mixer: FlattenedWindowAttention) -> None:
        super().__init__()
        self.mixer = mixer
        self.norm1, self.norm2 = nn.LayerNorm(mixer.dim), nn.LayerNorm(mixer.dim)
        self.mlp = Mlp(mixer.dim, 2 * mixer.dim)
        nn.init.xavier_uniform_(self.mlp.fc1.weight)
        nn.init.xavier_uniform_(self.mlp.fc2.weight)

    def forward(self, x: Tensor, code: Tensor, groups: EqualGroups) -> Tensor:
        """`(N, dim)` -> `(N, dim)`."""
        x = self.norm1(x + self.mixer.attend(x, code, groups))
        return self.norm2(x + self.mlp(x))


class FlatFormerEncoder(Model):
    """`num_blocks` blocks of four layers that sort along x, along x in shifted windows, along y, along y shifted.

    Args:
        window_size, group_size: of every layer.
    """

    authors_keys = KeyMap(rules=_ENCODER_RULES)

    def __init__(
        self,
        dim: int = 128,
        num_heads: int = 8,
        num_blocks: int = 2,
        window_size: int | Sequence[int] = 9,
        group_size: int = 69,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            FlatFormerLayer(
                FlattenedWindowAttention.in_stack(  # type: ignore[arg-type]
                    index % 4, (1, 1), dim, num_heads, window_size=window_size, group_size=group_size
                )
            )
            for index in range(4 * num_blocks)
        )

    def forward(self, x: Tensor, coordinates: Tensor, counts: Sequence[int]) -> Tensor:
        """Pillars `(N, dim)` at `(N, 2 or more)` (..., y, x), sample b having `counts[b]` of them -> `(N, dim)`."""
        place = coordinates[:, -2:]
        code = grid_sine_code(place, x.shape[-1]).to(x.dtype)
        groups = [layer.mixer.groups(place, counts) for layer in self.layers[:4]]
        for index, layer in enumerate(self.layers):
            x = layer(x, code, groups[index % 4])
        return x


class FlatFormer(CellDetector):
    """The detector: pillars by `DynamicVFE`, the encoder, SECOND with a pyramid, and a centre head with an IoU branch.

    Args:
        dim, num_heads, num_blocks, window_size, group_size: of the encoder.
        vfe_dims: widths of the point encoder, the last one `dim`.
        stage_dims, stage_depths, stage_strides, neck_dim: of the 2-D backbone and its pyramid.
        head_dim: of the centre head. velocity: have its branch for the velocity.
        iou_power: of the predicted overlap in the score. score_threshold, max_boxes: peaks of the heat map that become boxes.
        nms_thresholds: overlap above which the lesser of two boxes goes, for each class. box_weight: of the L1 loss.
        voxel_size, point_range: metres; one pillar is as high as the range. post_range: boxes with centres outside are
            dropped.
    """

    authors_keys = KeyMap(
        rules=[
            *_ENCODER_RULES,
            (r"^layers\.", "encoder.layers."),
            (r"^voxel_encoder\.", "point_encoder."),
            (r"^bbox_head\.shared_conv\.conv\.", "head.shared_conv.0."),
            (r"^bbox_head\.shared_conv\.bn\.", "head.shared_conv.1."),
            (r"^bbox_head\.task_heads\.0\.(\w+)\.0\.conv\.", r"head.branches.\1.0.0."),
            (r"^bbox_head\.task_heads\.0\.(\w+)\.0\.bn\.", r"head.branches.\1.0.1."),
            (r"^bbox_head\.task_heads\.0\.", "head.branches."),
        ],
    )

    def __init__(
        self,
        dim: int = 128,
        num_heads: int = 8,
        num_blocks: int = 2,
        window_size: int = 13,
        group_size: int = 144,
        *,
        vfe_dims: Sequence[int] = (64, 128),
        stage_dims: Sequence[int] = (64, 128),
        stage_depths: Sequence[int] = (3, 3),
        stage_strides: Sequence[int] = (1, 2),
        neck_dim: int = 128,
        head_dim: int = 64,
        velocity: bool = True,
        iou_power: float = 2.0,
        score_threshold: float = 0.1,
        max_boxes: int = 4096,
        nms_thresholds: Sequence[float] = (0.8, 0.55, 0.55),
        box_weight: float = 2.0,
        voxel_size: Sequence[float] = (0.32, 0.32, 6.0),
        point_range: Sequence[float] = (-74.88, -74.88, -2.0, 74.88, 74.88, 4.0),
        post_range: Sequence[float] = (-80.0, -80.0, -10.0, 80.0, 80.0, 10.0),
        num_classes: int = 3,
        in_chans: int = 5,
    ) -> None:
        _check_widths(vfe_dims, dim)
        ups = [math.prod(stage_strides[1 : stage + 1]) for stage in range(len(stage_strides))]
        super().__init__(
            point_encoder=DynamicVFE(in_chans, vfe_dims, voxel_size, point_range),
            encoder=FlatFormerEncoder(dim, num_heads, num_blocks, window_size, group_size),
            backbone=SecondBackbone(dim, stage_dims, stage_depths, stage_strides),
            neck=SecondFPN(stage_dims, [neck_dim] * len(stage_dims), ups),
            head=CenterHead(
                neck_dim * len(stage_dims),
                num_classes,
                cell=(voxel_size[0] * stage_strides[0], voxel_size[1] * stage_strides[0]),
                low=(point_range[0], point_range[1]),
                post_range=post_range,
                dim=head_dim,
                head_dim=head_dim,
                velocity=velocity,
                iou_power=iou_power,
                score_threshold=score_threshold,
                max_boxes=max_boxes,
                nms_thresholds=nms_thresholds,
                box_weight=box_weight,
            ),
            voxel_size=voxel_size,
            point_range=point_range,
            point_chans=in_chans,
        )


class FlatFormerClassifier(CellClassifier):
    """The encoder as a classifier of whole clouds. The paper has detection only; this is for clouds in folders.

    Args:
        num_classes: of clouds. in_chans: features of a point beside its place.
        dim, num_heads, num_blocks, window_size, group_size, vfe_dims: as in `FlatFormer`.
        voxel_size, point_range: of the pillars; by default 16 x 16 over the cube around the unit ball.
    """

    def __init__(
        self,
        num_classes: int,
        dim: int = 128,
        num_heads: int = 8,
        num_blocks: int = 2,
        window_size: int = 9,
        group_size: int = 69,
        *,
        vfe_dims: Sequence[int] = (64, 128),
        voxel_size: Sequence[float] = (0.125, 0.125, 2.0),
        point_range: Sequence[float] = (-1.0, -1.0, -1.0, 1.0, 1.0, 1.0),
        in_chans: int = 3,
    ) -> None:
        _check_widths(vfe_dims, dim)
        super().__init__(
            dim,
            num_classes,
            point_encoder=DynamicVFE(3 + in_chans, vfe_dims, voxel_size, point_range),
            encoder=FlatFormerEncoder(dim, num_heads, num_blocks, window_size, group_size),
            voxel_size=voxel_size,
            point_range=point_range,
            point_chans=3 + in_chans,
        )


def _check_widths(vfe_dims: Sequence[int], dim: int) -> None:
    if vfe_dims[-1] != dim:
        raise ValueError(f"the last of vfe_dims must be dim={dim}, got {tuple(vfe_dims)}.")


_CODE = "counted from the authors' classes"

SYSTEM = register_system(
    System(
        slug="flatformer",
        title="FlatFormer: Flattened Window Attention for Efficient Point Cloud Transformer",
        year=2023,
        arxiv="2301.08739",
        evidence="authors_code",
        repo="mit-han-lab/flatformer",
        idea="Sort pillars by window and position, cut the list in groups of equal count, attend inside the groups.",
        mixers=("flattened_window",),
        variants=(
            Variant("flatformer_waymo", FlatFormer, 2_268_110, inputs=(), source=f"{_CODE}, all five Waymo configs"),
            Variant(
                "flatformer_encoder_waymo",
                FlatFormerEncoder,
                1_059_840,
                inputs=(),
                source=f"{_CODE}, encoder of all Waymo configs",
                options={"window_size": 13, "group_size": 144},
            ),
            Variant(
                "flatformer_encoder", FlatFormerEncoder, 1_059_840, inputs=(), source=f"{_CODE}, encoder's own defaults"
            ),
        ),
        reports=(
            "Waymo validation mAPH L2: 67.2 with one sweep, 71.2 with two, 72.0 with three",
            "4.6 times faster than SST, 1.4 times faster than CenterPoint (abstract)",
        ),
    )
)
