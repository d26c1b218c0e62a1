"""Orders and groups of cells, and the overlap of rotated boxes, against slow forms."""

import math

import pytest
import torch

from regard.layers.boxes import bev_iou, corners, intersection_area, rotated_nms
from regard.layers.graphs import PerformerAttention
from regard.layouts.points import equal_groups, flattened_windows, grid_coordinates, hilbert_key, morton_key, voxelize


def _clip(polygon, start, stop):
    """The part of a polygon left of the line from start to stop (Sutherland and Hodgman)."""
    kept = []
    for p, q in zip(polygon, polygon[1:] + polygon[:1], strict=True):
        side = [(stop[0] - start[0]) * (r[1] - start[1]) - (stop[1] - start[1]) * (r[0] - start[0]) for r in (p, q)]
        if side[0] >= 0:
            kept.append(p)
        if side[0] * side[1] < 0:
            t = side[0] / (side[0] - side[1])
            kept.append((p[0] + t * (q[0] - p[0]), p[1] + t * (q[1] - p[1])))
    return kept


def _slow_area(a, b):
    polygon, other = corners(a[None])[0].tolist(), corners(b[None])[0].tolist()
    for start, stop in zip(other, other[1:] + other[:1], strict=True):
        polygon = _clip(polygon, start, stop)
    pairs = zip(polygon, polygon[1:] + polygon[:1], strict=True)
    return sum(p[0] * q[1] - p[1] * q[0] for p, q in pairs) / 2


def test_overlap_of_rotated_boxes():
    generator = torch.Generator().manual_seed(0)
    a, b = (
        torch.cat(
            [
                torch.randn(300, 3, generator=generator) * 1.5 + 50,
                torch.rand(300, 3, generator=generator) * 4 + 0.2,
                torch.rand(300, 1, generator=generator) * 7,
            ],
            1,
        ).double()
        for _ in range(2)
    )
    slow = torch.tensor([_slow_area(x, y) for x, y in zip(a, b, strict=True)], dtype=torch.float64)
    assert (slow > 0).any()
    assert torch.allclose(intersection_area(a, b), slow, atol=1e-9)


@pytest.mark.parametrize(
    ("other", "area"),
    [
        ((0, 0, 0, 4, 2, 1, 0), 8.0),  # the same box
        ((0, 0, 0, 4, 2, 1, math.pi), 8.0),
        ((4, 0, 0, 4, 2, 1, 0), 0.0),  # a common edge
        ((0, 0, 0, 2, 1, 1, 0), 2.0),  # inside
        ((0, 0, 0, 2, 4, 1, math.pi / 2), 8.0),
        ((9, 9, 0, 1, 1, 1, 0.3), 0.0),
    ],
)
def test_overlap_where_edges_coincide(other, area):
    box = torch.tensor([[0.0, 0, 0, 4, 2, 1, 0]])
    assert intersection_area(box, torch.tensor([other], dtype=torch.float32)).item() == pytest.approx(area, abs=1e-5)


def test_nms_keeps_the_best_of_overlapping_boxes():
    boxes = torch.tensor([[0.0, 0, 0, 4, 2, 1, 0], [0.5, 0, 0, 4, 2, 1, 0], [9.0, 0, 0, 4, 2, 1, 0]])
    assert bev_iou(boxes[:1], boxes[1:2]).item() > 0.5
    assert rotated_nms(boxes, torch.tensor([0.3, 0.9, 0.5]), 0.5).tolist() == [1, 2]
    assert rotated_nms(boxes[:0], torch.zeros(0), 0.5).tolist() == []


@pytest.mark.parametrize(("axes", "bits"), [(2, 1), (2, 4), (3, 3)])
def test_space_filling_orders_visit_every_cell_once(axes, bits):
    cells = grid_coordinates([2**bits] * axes)
    for key in (morton_key(cells, bits), hilbert_key(cells, bits)):
        assert sorted(key.tolist()) == list(range(len(cells)))
    steps = cells[hilbert_key(cells, bits).argsort()].diff(dim=0).abs().sum(1)
    assert bool((steps == 1).all())


@pytest.mark.parametrize("counts", [(5, 0, 1, 12), (4,), (3, 8), ()])
def test_equal_groups_stay_inside_their_sample(counts):
    total = sum(counts)
    sample = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts, dtype=torch.long))
    order = flattened_windows(torch.arange(total)[:, None].repeat(1, 2) % 7, counts, (3, 3), shift=True)
    groups = equal_groups(order, counts, 4)
    assert groups.rows.shape == (sum(-(-count // 4) for count in counts), 4)
    assert torch.equal(groups.scatter(groups.rows), torch.arange(total))
    assert all(len(sample[rows].unique()) == 1 for rows in groups.rows)


def test_voxels_leave_out_what_is_out_of_range():
    points = torch.tensor([[0.5, 0.5, 0], [1.5, 0.5, 0], [9, 0, 0], [0.6, 0.4, 0], [-1, 0, 0], [0.5, 1.5, 0]])
    cells = voxelize(points, torch.tensor([0, 3, 5, 6]), (1, 1, 2), (0, 0, -1, 2, 2, 1))
    assert cells.coordinates.tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert cells.counts == [2, 1, 1]
    assert cells.points.tolist() == [0, 1, 3, 5]
    assert cells.cell_of.tolist() == [0, 1, 2, 3]


def test_performer_of_a_graph_depends_on_its_batch_in_the_release_only():
    x = torch.randn(9, 16, generator=torch.Generator().manual_seed(0))
    for quirks in (False, True):
        mixer = PerformerAttention(16, 2, authors_quirks=quirks)
        together = mixer(x, torch.tensor([0, 2, 9]))[:2]
        alone = mixer(x[:2], torch.tensor([0, 2]))
        assert torch.allclose(together, alone, atol=1e-6) is not quirks
