"""Proofs of FlatFormer: recordings of the authors' block and detector; what groups of equal size save."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from regard import ops
from regard.checkpoint import KeyMap
from regard.layers import BatchNorm
from regard.layers.points import grid_sine_code
from regard.layouts.points import equal_groups, flattened_windows, grid_coordinates
from regard.measure import growth, median_seconds
from regard.proofs.base import Check, Preset, Proofs, Recipe
from regard.proofs.recordings import Recorded
from regard.systems.points.flatformer import FlatFormer, FlatFormerEncoder, FlattenedWindowAttention
from regard.tasks import create_task
from regard.training import TrainConfig, seeded


def _block(config: dict) -> FlatFormerEncoder:
    block, mapping = config["BasicBlock"], config["FlattenedWindowMapping"]
    return FlatFormerEncoder(
        block["in_channels"],
        block["num_heads"],
        num_blocks=1,
        window_size=mapping["window_shape"][:2],
        group_size=block["group_size"],
    )


def _run_block(encoder: FlatFormerEncoder, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    coordinates, counts = inputs["coords"][:, 1:].long(), torch.bincount(inputs["coords"][:, 0]).tolist()
    place, size = coordinates[:, 1:], encoder.layers[0].mixer.group_size
    outputs = {"pe": grid_sine_code(place, inputs["x"].shape[1])}
    for name, axis, shift in (("x", 1, False), ("x_shift", 1, True), ("y", 0, False), ("y_shift", 0, True)):
        outputs[f"map_{name}"] = flattened_windows(place, counts, (4, 4), axis=axis, shift=shift)
    # The authors' two index tables refer to the sorted list, which is what groups of an unsorted list are.
    groups = equal_groups(torch.arange(len(place)), counts, size)
    outputs |= {"map_flat2win": groups.rows.flatten(), "map_win2flat": groups.home}
    return {**outputs, "out": encoder(inputs["x"], coordinates, counts)}


def _detector(config: dict) -> FlatFormer:
    vfe, encoder, backbone, neck = (config[name] for name in ("voxel_encoder", "middle_encoder", "backbone", "neck"))
    return FlatFormer(
        encoder["in_channels"],
        encoder["num_heads"],
        encoder["num_blocks"],
        encoder["window_shape"][0],
        encoder["group_size"],
        vfe_dims=vfe["feat_channels"],
        stage_dims=backbone["out_channels"],
        stage_depths=backbone["layer_nums"],
        stage_strides=backbone["layer_strides"],
        neck_dim=neck["out_channels"][0],
        head_dim=config["bbox_head"]["share_conv_channel"],
        voxel_size=vfe["voxel_size"],
        point_range=vfe["point_cloud_range"],
        in_chans=vfe["in_channels"],
    )


def _run_detector(model: FlatFormer, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    points, samples = inputs["points"], inputs["coors"][:, 0]
    offsets = torch.tensor([0, *torch.bincount(samples).cumsum(0).tolist()])
    cells = model.voxelize(points, offsets)
    sample = torch.arange(len(cells.counts)).repeat_interleave(torch.tensor(cells.counts))
    outputs = {name: value.movedim(-1, 1) for name, value in model(points, offsets).items()}
    return {
        **outputs,
        # The authors' encoder overwrites its input, so what was recorded as pillar features is the encoder's output.
        "pillar_features": model.encoder(model.point_encoder(points, cells), cells.coordinates, cells.counts),
        "pillar_coords": torch.cat([sample[:, None], cells.coordinates], 1),
    }


def masked_dense_form() -> Check:
    """Groups against dense attention over the list with its repeats and a mask of equal groups, in float64."""
    errors = {}
    generator = torch.Generator().manual_seed(0)
    for name, counts in (("ragged", (50, 7, 24, 1)), ("multiples", (24, 36))):
        mixer = seeded(lambda: FlattenedWindowAttention(16, 2, window_size=5, group_size=12, shift=True), 1).double()
        cells = [grid_coordinates((9, 11))[torch.randperm(99, generator=generator)[:count]] for count in counts]
        x = torch.randn(sum(counts), 16, dtype=torch.float64, generator=generator)
        offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()])
        with torch.no_grad():
            ours = mixer(x, coordinates=torch.cat(cells), offsets=offsets)
            slow = torch.cat([_slow(mixer, part, place) for part, place in zip(x.split(counts), cells, strict=True)])
        errors[name] = float((ours - slow).abs().max())
    return Check(
        "group attention equals dense attention with a block mask over the padded list, samples with few pillars included",
        holds=max(errors.values()) < 1e-10,
        figures=errors,
        setting="samples of 50, 7, 24 and 1 pillars, and of multiples of the group size 12; float64",
    )


def _slow(mixer: FlattenedWindowAttention, x: Tensor, place: Tensor) -> Tensor:
    """One sample, by the definition: sort with signed keys, repeat the tail, mask everything outside the group."""
    window, size = mixer.window_size[0], mixer.group_size
    keys = []
    for row, column in (place + window // 2).tolist():
        y1, x1, y2, x2 = row // window, column // window, row % window, column % window
        keys.append((y1, (-1) ** y1 * x1, (-1) ** y1 * x2, (-1) ** (y1 + x2) * y2))
    order = sorted(range(len(keys)), key=lambda n: keys[n])
    slots = list(order) if len(order) >= size else [order[n % len(order)] for n in range(size)]
    while len(slots) % size:
        slots.append(slots[len(slots) - size])
    code = grid_sine_code(place, mixer.dim).double()
    q, k = mixer.qkv(x + code)[slots][:, : 2 * mixer.dim].chunk(2, -1)
    v = mixer.qkv(x)[slots][:, 2 * mixer.dim :]
    group = torch.arange(len(slots)) // size
    heads = [part.unflatten(-1, (mixer.num_heads, -1))[None] for part in (q, k, v)]
    out = ops.attention(*heads, mask=group[:, None] == group, backend="reference")[0].flatten(-2)
    result = torch.zeros_like(x)
    for slot, row in reversed(list(enumerate(slots))):  # the first slot of a row is its own
        result[row] = out[slot]
    return mixer.proj(result)


def _tiny(task) -> FlatFormer:
    low, high = list(task.point_range[:3]), list(task.point_range[3:])
    model = FlatFormer(
        32,
        4,
        1,
        window_size=9,
        group_size=48,
        vfe_dims=(16, 32),
        stage_dims=(16, 24),
        stage_depths=(1, 1),
        neck_dim=16,
        head_dim=16,
        velocity=False,
        box_weight=0.5,
        iou_power=0.5,  # overlaps are small after so short a training: the square would hide every box
        score_threshold=0.01,
        max_boxes=150,
        voxel_size=(0.5, 0.5, high[2] - low[2]),
        point_range=(*low, *high),
        in_chans=task.in_channels,
        num_classes=task.num_classes,
    )
    for branch in model.head.branches.values():
        nn.init.normal_(branch[1].weight, std=0.01)  # boxes start near zero offsets, not metres away
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.momentum = 0.1  # running statistics that follow a training of hundreds of steps, not of epochs
    return model


def recipe(preset: Preset) -> Recipe:
    """A small detector on simulated lidar scenes; "paper" has the Waymo model's widths and pillars."""
    if preset == "paper":
        task = create_task("detection")
        low, high = task.point_range[:3], task.point_range[3:]
        pillar = (0.32, 0.32, high[2] - low[2])
        build = lambda: FlatFormer(  # noqa: E731
            voxel_size=pillar,
            point_range=task.point_range,
            in_chans=task.in_channels,
            num_classes=task.num_classes,
            velocity=False,
        )
        return Recipe(seeded(build, 0), task, TrainConfig(steps=20_000, batch_size=4, lr=1e-3, weight_decay=0.05))
    near = {"extent": 10, "beams": 20, "azimuths": 200, "objects": 6, "clutter": 3}
    task = create_task("detection", eval_items=20 if preset == "smoke" else 60, **near)
    steps = 2 if preset == "smoke" else 1000
    config = TrainConfig(steps=steps, batch_size=8, lr=6e-3, weight_decay=0.01, clip_norm=10.0)
    return Recipe(seeded(lambda: _tiny(task), 0), task, config)


def ring_pillars(count: int, seed: int = 0) -> Tensor:
    """Pillars (y, x) of a scan whose density falls with the square of the distance: `(count, 2)`, in random order.

    Occupancy of windows then follows a power law, as under a spinning lidar; the grid is as fine as Waymo's (468 x 468)
    for 20,000 pillars and grows with `count`.
    """
    side = round(468 * math.sqrt(count / 20_000))
    place = grid_coordinates((side, side))
    distance = (place - (side - 1) / 2).norm(dim=1).clamp(min=2)
    generator = torch.Generator().manual_seed(seed)
    weight = distance**-1.5
    return place[torch.multinomial(weight, count, generator=generator)]


def _by_window(place: Tensor, window: int) -> Tensor:
    """Number of pillars in each occupied window."""
    key = place[:, 0] // window * 100_000 + place[:, 1] // window
    return key.unique(return_counts=True)[1]


def equal_size_wastes_nothing(preset: Preset) -> Check:
    """Padding and time of one attention over pillars of a scan: equal groups, padded windows, windows in buckets."""
    count, window, size, dim, heads = (2000 if preset == "smoke" else 20_000), 13, 144, 128, 8
    place = ring_pillars(count)
    mixer = seeded(lambda: FlattenedWindowAttention(dim, heads, window_size=window, group_size=size), 0).eval()
    sizes = _by_window(place, window)
    largest = int(sizes.max())
    buckets = [30, 60, 100, window * window]
    in_bucket = [sizes[(sizes > low) & (sizes <= high)] for low, high in zip([0, *buckets], buckets, strict=False)]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, dim, generator=generator)
    code = grid_sine_code(place, dim)
    groups = mixer.groups(place, [count])
    with torch.no_grad():
        flat = median_seconds(lambda: mixer.attend(x, code, groups), 3)
        padded = median_seconds(lambda: _padded(mixer, x, [(len(sizes), largest)]), 3)
        bucketed = [(len(part), width) for part, width in zip(in_bucket, buckets, strict=True) if len(part)]
        sst = median_seconds(lambda: _padded(mixer, x, bucketed), 3)
    figures = {
        "pillars": count,
        "windows": len(sizes),
        "largest_window": largest,
        "slots_per_pillar_equal_groups": round(groups.rows.numel() / count, 4),
        "slots_per_pillar_padded_windows": round(len(sizes) * largest / count, 2),
        "slots_per_pillar_buckets": round(sum(n * width for n, width in bucketed) / count, 2),
        "time_padded_windows_over_equal_groups": round(padded / flat, 2),
        "time_buckets_over_equal_groups": round(sst / flat, 2),
    }
    return Check(
        "Groups of equal size leave almost no padding, and are faster than padded or bucketed windows (section 3.1)",
        holds=figures["slots_per_pillar_equal_groups"] < 1.02
        and min(figures["time_padded_windows_over_equal_groups"], figures["time_buckets_over_equal_groups"]) >= 2,
        figures=figures,
        setting=f"one attention, dim {dim}, {heads} heads, windows 13 x 13, groups of 144, "
        f"buckets of {buckets} slots in the manner of SST; "
        "projections included, sorting not; holds if padding is below 2 % and both time ratios are at least 2",
    )


def _padded(mixer: FlattenedWindowAttention, x: Tensor, batches: list[tuple[int, int]]) -> Tensor:
    """The same projections, and attention over batches of (windows, slots) with a key mask: the cost of padding."""
    q, k, v = mixer.qkv(x).unflatten(-1, (3, mixer.num_heads, mixer.head_dim)).unbind(1)
    for windows, slots in batches:
        rows = torch.arange(windows * slots).view(windows, slots) % len(x)
        mask = (rows[:, None, None] >= 0).expand(windows, 1, 1, slots)
        ops.attention(q[rows], k[rows], v[rows], mask=mask)
    return mixer.proj(x)


def linear_in_pillars(preset: Preset) -> Check:
    """Time of one layer, sorting included, over growing scans at a fixed group size."""
    counts = [1000, 2000] if preset == "smoke" else [5000, 10_000, 20_000, 40_000]
    mixer = seeded(lambda: FlattenedWindowAttention(64, 4, window_size=13, group_size=144), 0).eval()
    times = []
    for count in counts:
        place, x = ring_pillars(count), torch.randn(count, 64, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            times.append(median_seconds(lambda: mixer(x, coordinates=place), 5))  # noqa: B023
    exponent = growth(counts, times)
    return Check(
        "The cost grows linearly with the number of pillars (section 3.2)",
        holds=0.9 <= exponent <= 1.1,
        figures={"time_growth": round(exponent, 3), "seconds_at_largest": round(times[-1], 3)},
        setting=f"one attention with its sorting, dim 64, groups of 144, {counts} pillars; exponent fitted to seconds; "
        "holds from 0.9 to 1.1",
    )


PROOFS = Proofs(
    recordings=(
        Recorded(
            "flatformer.block",
            build=_block,
            run=_run_block,
            keys=KeyMap(rules=[(r"^block\.", "block_list.0.block."), *FlatFormerEncoder.authors_keys.rules]),
        ),
        Recorded("flatformer.detector", build=_detector, run=_run_detector),
    ),
    checks=(masked_dense_form,),
    recipe=recipe,
    claims=(equal_size_wastes_nothing, linear_in_pillars),
)
