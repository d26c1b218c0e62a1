"""Moving digits: bouncing motion, reproducible clips, Moving MNIST's measures by hand, own arrays, errors."""

import numpy as np
import pytest
import torch
from torch import nn

from regard.tasks import create_task
from regard.tasks.measures import measure
from regard.tasks.video import LastFrame, moving

OWN = {"frames_in": 2, "frames_out": 2}


class Constant(nn.Module):
    """Every pixel of every future frame has one value."""

    def __init__(self, value, frames):
        super().__init__()
        self.value, self.frames = value, frames

    def forward(self, past):
        return past.new_full((past.shape[0], self.frames, *past.shape[2:]), self.value)


@pytest.fixture
def folder(tmp_path):
    """Two videos of 9 frames in one array, one of 5 frames as floats: 5 clips of 4 frames, every frame another grey."""
    levels = np.arange(18, dtype=np.uint8).reshape(2, 9, 1, 1)
    np.save(tmp_path / "a.npy", np.broadcast_to(levels, (2, 9, 12, 16)))
    np.save(tmp_path / "b.npy", np.broadcast_to((128 + np.arange(5).reshape(5, 1, 1)) / 255, (5, 12, 16)))
    return tmp_path


def test_clips_have_the_shapes_that_are_asked_for():
    task = create_task("moving_digits", size=40, frames_in=4, frames_out=3, train_items=5, eval_items=3)
    item = task.train_set[4]
    assert item["past"].shape == (4, 1, 40, 40)
    assert item["future"].shape == (3, 1, 40, 40)
    assert item["past"].dtype == torch.float32
    assert 0.9 < item["past"].max() <= 1
    assert len(task.train_set) == 5
    assert len(task.eval_set) == 3


def test_clips_depend_on_seed_and_index_alone():
    short = create_task("moving_digits", train_items=4, eval_items=4, seed=2)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    longer = create_task("moving_digits", train_items=9, eval_items=4, seed=2)
    other = create_task("moving_digits", train_items=4, eval_items=4, seed=3)
    assert torch.equal(short.train_set[3]["future"], longer.train_set[3]["future"])
    assert not torch.equal(short.train_set[3]["future"], other.train_set[3]["future"])
    assert not torch.equal(short.train_set[3]["future"], short.eval_set[3]["future"])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_digit_moves_straight_and_bounces():
    """The corner of a full square is followed through a clip: a step of a tenth of the free way, back at the wall."""
    direction = 0.0  # along the columns
    frames = moving(np.array([[[0, 0.5, 0.75, direction]]]), np.ones((1, 8, 8), np.float32), 32, 12)
    lefts = [int(np.flatnonzero(frame.any(0))[0]) for frame in frames[0]]
    tops = {int(np.flatnonzero(frame.any(1))[0]) for frame in frames[0]}
    assert tops == {9}
    assert lefts == [
        int(18 * x + 1e-9) for x in (0.75, 0.85, 0.95, 0.95, 0.85, 0.75, 0.65, 0.55, 0.45, 0.35, 0.25, 0.15)
    ]
    assert all(frame.sum() == 255 * 14 * 14 for frame in frames[0].astype(int))


def test_overlapping_digits_show_the_brighter_pixel():
    images = np.stack([np.full((8, 8), 0.4), np.full((8, 8), 0.8)]).astype(np.float32)
    both = moving(np.array([[[0, 0.5, 0.5, 0], [0.9, 0.5, 0.5, 0]]]), images, 32, 1)
    assert both.max() == 204
    assert set(np.unique(both)) == {0, 204}


def test_measures_by_hand():
    task = create_task("moving_digits", train_items=1, eval_items=5, frames_out=3)
    future = torch.stack([task.eval_set[i]["future"] for i in range(5)]).double()
    got = measure(task, Constant(0.25, 3), batch_size=2)
    assert got["mse"] == pytest.approx((future - 0.25).square().sum().item() / 15, rel=1e-4)
    assert got["mae"] == pytest.approx((future - 0.25).abs().sum().item() / 15, rel=1e-4)
    assert measure(task, Constant(1.5, 3)) == measure(task, Constant(1.0, 3))
    assert -0.1 < got["ssim"] < 0.9


def test_trivial_repeats_the_last_frame():
    task = create_task("moving_digits", train_items=1, eval_items=5)
    errors = [(task.eval_set[i]["future"] - task.eval_set[i]["past"][-1]).square().sum() / 10 for i in range(5)]
    before = torch.get_rng_state()
    trivial = task.trivial()
    assert torch.equal(torch.get_rng_state(), before)
    assert trivial["mse"] == pytest.approx(float(sum(errors) / 5), rel=1e-4)
    assert trivial.keys() == task.metrics().keys()
    assert task.better(1.0, 2.0)


def test_own_arrays_become_clips_without_common_frames(folder):
    task = create_task("moving_digits", data=folder, **OWN)
    assert task.size == (12, 16)
    assert len(task.train_set) == 4
    assert len(task.eval_set) == 1
    clips = [
        torch.cat([item["past"], item["future"]])[:, 0, 0, 0] * 255 for item in (task.train_set[i] for i in range(4))
    ]
    assert torch.cat(clips).round().int().tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16]
    assert (255 * task.eval_set[0]["past"][:, 0, 0, 0]).round().tolist() == [128, 129]
    assert task.trivial()["mse"] == pytest.approx(12 * 16 * (1 + 4) / 2 / 255**2, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"size": 8}, "size must be an integer of at least 16, got 8"),
        ({"frames_in": 0}, "frames_in must be an integer of at least 1"),
        ({"frames_out": 2.5}, "frames_out must be an integer"),
        ({"digits": 0}, "digits"),
        ({"seed": -1}, "seed"),
        ({"data": "no/such/folder"}, "is not there"),
    ],
)
def test_options_are_refused_at_the_door(options, said):
    with pytest.raises(ValueError, match=said):
        create_task("moving_digits", **options)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((8, 12)), r"must be \(T, H, W\) or \(N, T, H, W\), got shape \(8, 12\)"),
        (np.full((8, 12, 12), 2.0), "floats from 0 to 1"),
        (np.full((8, 12, 12), np.nan), "floats from 0 to 1"),
        (np.zeros((8, 12, 12), np.int64), "must hold uint8"),
        (np.zeros((5, 12, 12)), "holds 1 clips of 4 frames"),
        (np.zeros((8, 6, 12)), "at least 11 pixels"),
    ],
)
def test_arrays_that_cannot_work_are_refused(tmp_path, array, said):
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(ValueError, match=said):
        create_task("moving_digits", data=tmp_path, **OWN)


def test_folders_that_cannot_work_are_refused(tmp_path, folder):
    np.save(folder / "c.npy", np.zeros((4, 12, 12)))
    with pytest.raises(ValueError, match="must have one size"):
        create_task("moving_digits", data=folder, **OWN)
    (folder / "c.npy").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"c\.npy cannot be read"):
        create_task("moving_digits", data=folder, **OWN)
    with pytest.raises(ValueError, match="size and data exclude each other"):
        create_task("moving_digits", data=folder, size=32)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no \.npy files"):
        create_task("moving_digits", data=tmp_path / "empty")


def test_a_wrong_shape_of_answer_is_named():
    task = create_task("moving_digits", train_items=1, eval_items=1)
    batch = {name: part[None] for name, part in task.train_set[0].items()}
    assert task.loss(LastFrame(10), batch) > 0
    with pytest.raises(ValueError, match=r"\(1, 9, 1, 32, 32\) where \(1, 10, 1, 32, 32\)"):
        task.loss(LastFrame(9), batch)


def test_a_digit_crosses_in_its_direction():
    """Its middle moves as the label says and passes that of the canvas half way; the digit stays whole."""
    task = create_task("moving_direction", size=24, frames=5, train_items=40, eval_items=30)
    ways = [(0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1)]
    for clip, label in zip(task.train_set.images[:, :, 0].double(), task.train_set.labels, strict=True):
        ink = clip.sum((1, 2))
        assert torch.equal(ink, ink[:1].expand(5))
        place = torch.arange(24.0).double()
        middles = torch.stack([clip.sum(2) @ place, clip.sum(1) @ place], 1) / ink[:, None]
        way = torch.tensor(ways[label], dtype=torch.float64)
        assert ((middles[1:] - middles[:-1]) * way >= (way != 0) * 1.0).all()
        assert torch.equal(middles[0] == middles[-1], way == 0)
        assert ((middles[2] - 11.5).abs() < 5).all()
    assert len(set(task.train_set.labels.tolist())) == 8
    assert task.train_set[0]["image"].shape == (5, 1, 24, 24)
    assert 0 < task.trivial()["accuracy"] < 0.5
    again = create_task("moving_direction", size=24, frames=5, train_items=5, eval_items=5)
    assert torch.equal(again.train_set[4]["image"], task.train_set[4]["image"])
