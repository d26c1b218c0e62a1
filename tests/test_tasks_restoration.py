"""Super-resolution: aligned pairs, reproducible crops, PSNR and SSIM against other computations, errors."""

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import structural_similarity
from torch import nn

from regard.tasks import create_task
from regard.tasks.measures import measure
from regard.tasks.restoration import Bicubic, eight_bits, luma, reduced
from regard.tasks.sources import photographs


@pytest.fixture(scope="module")
def task():
    return create_task("super_resolution", train_items=64, patch=16, eval_patch=64)


@pytest.fixture
def folder(tmp_path):
    """Five noisy photographs of 40 x 52 pixels, each with a brightness of its own."""
    for i in range(5):
        noise = np.random.default_rng(i).integers(0, 40, (40, 52, 3))
        Image.fromarray((noise + 40 * i).astype(np.uint8)).save(tmp_path / f"{i}.png")
    return tmp_path


class Noisy(nn.Module):
    """Bicubic enlargement plus a fixed pattern."""

    def forward(self, low):
        high = Bicubic(2)(low)
        return high + 0.05 * torch.sin(torch.arange(high.numel()).view_as(high) * 0.7)


def test_photographs_are_colour_and_apart():
    train, held_out = photographs(False), photographs(True)
    assert not train.keys() & held_out.keys()
    assert len(train) >= 5
    assert len(held_out) >= 3
    assert all(image.dtype == np.uint8 and image.shape[2] == 3 for image in (train | held_out).values())


def test_luma_is_that_of_bt601():
    white, black, green = torch.ones(1, 3, 1, 1), torch.zeros(1, 3, 1, 1), torch.tensor([0.0, 1, 0]).view(1, 3, 1, 1)
    values = [255 * luma(x).item() for x in (white, black, green)]
    assert values == pytest.approx([235, 16, 16 + 128.553], abs=1e-3)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_low_is_the_reduced_high(scale):
    task = create_task("super_resolution", scale=scale, patch=24, train_items=8)
    for i in range(8):
        item = task.train_set[i]
        assert item["low"].shape == (3, 24, 24)
        assert item["high"].shape == (3, 24 * scale, 24 * scale)
        assert item["high"].min() >= 0
        assert item["high"].max() <= 1
        again = reduced((item["high"] * 255).round().byte(), scale).float() / 255
        inner = slice(3, -3)  # the border of the crop knew the pixels beyond it
        torch.testing.assert_close(again[:, inner, inner], item["low"][:, inner, inner], atol=1.01 / 255, rtol=0)


def test_items_depend_on_seed_and_index_alone(task):
    torch.manual_seed(7)
    longer = create_task("super_resolution", train_items=200, patch=16, eval_patch=64)
    other = create_task("super_resolution", train_items=64, patch=16, eval_patch=64, seed=1)
    before = torch.get_rng_state()
    for i in (0, 63):
        assert torch.equal(task.train_set[i]["high"], longer.train_set[i]["high"])
        assert not torch.equal(task.train_set[i]["high"], other.train_set[i]["high"])
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluation_tiles_cover_each_photograph_once(task):
    expected = sum((h // 128) * (w // 128) for h, w, _ in (image.shape for image in photographs(True).values()))
    assert len(task.eval_set) == expected
    first = next(iter(photographs(True).values()))[:128, 128:256]
    assert torch.equal((task.eval_set[1]["high"] * 255).round().byte(), torch.from_numpy(first.copy()).permute(2, 0, 1))


def test_psnr_and_ssim_against_a_computation_by_hand(task):
    got = measure(task, Noisy(), batch_size=1)
    psnr, ssim = [], []
    for i in range(len(task.eval_set)):
        item = task.eval_set[i]
        answer = eight_bits(Noisy()(item["low"][None]))
        a, b = (
            (16 + np.tensordot([65.481, 128.553, 24.966], x.numpy().astype(np.float64), 1))[2:-2, 2:-2]
            for x in (answer[0], item["high"])
        )
        psnr.append(10 * np.log10(255**2 / ((a - b) ** 2).mean()))
        window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        ssim.append(structural_similarity(a, b, data_range=255, **window))
    assert got["psnr"] == pytest.approx(np.mean(psnr), abs=1e-3)
    assert got["ssim"] == pytest.approx(np.mean(ssim), abs=1e-4)


def test_trivial_is_bicubic_and_far_from_perfect(task):
    trivial = task.trivial()
    assert trivial == measure(task, Bicubic(2))
    assert 20 < trivial["psnr"] < 45
    assert task.better(trivial["psnr"], measure(task, Noisy())["psnr"])


def test_loss_is_l1():
    task = create_task("super_resolution", train_items=2)
    batch = {"low": torch.zeros(1, 3, 4, 4), "high": torch.full((1, 3, 8, 8), 0.25)}
    assert task.loss(Bicubic(2), batch).item() == pytest.approx(0.25)


def test_own_photographs(folder):
    task = create_task("super_resolution", data=folder, patch=8, eval_patch=10, train_items=30)
    assert len(task.eval_set) == 4
    levels = {int(task.train_set[i]["high"].mean() * 255 // 40) for i in range(30)}
    held_out = {int(task.eval_set[i]["high"].mean() * 255 // 40) for i in range(4)}
    assert len(levels) == 4
    assert len(held_out) == 1
    assert not levels & held_out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scale": 5}, "scale must be 2, 3 or 4, got 5"),
        ({"patch": 0}, "patch must be an integer of at least 1, got 0"),
        ({"eval_patch": 4}, "eval_patch must be an integer of at least 8"),
        ({"patch": 400}, "needs photographs of at least 800 pixels a side; smaller: chelsea.png"),
        ({"train_items": 0}, "train_items"),
        ({"data": "no/such/folder"}, "is not there"),
    ],
)
def test_options_are_refused_at_the_door(options, said):
    with pytest.raises(ValueError, match=said):
        create_task("super_resolution", **options)


def test_folders_that_cannot_work_are_refused(folder, tmp_path_factory):
    with pytest.raises(ValueError, match="needs photographs of at least 48 pixels"):
        create_task("super_resolution", data=folder, patch=24)
    (folder / "0.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"1 of 5 images cannot be read \(4 can\)"):
        create_task("super_resolution", data=folder, patch=8, eval_patch=10)
    create_task("super_resolution", data=folder, patch=8, eval_patch=10, skip_corrupt=True)
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(ValueError, match="holds no images"):
        create_task("super_resolution", data=empty)
    Image.new("RGB", (64, 64)).save(empty / "one.png")
    with pytest.raises(ValueError, match="at least 2 photographs"):
        create_task("super_resolution", data=empty)


def test_a_wrong_shape_of_answer_is_named():
    task = create_task("super_resolution", train_items=2)
    batch = {"low": torch.zeros(1, 3, 4, 4), "high": torch.zeros(1, 3, 8, 8)}
    with pytest.raises(ValueError, match=r"\(1, 3, 4, 4\) where \(1, 3, 8, 8\)"):
        task.loss(nn.Identity(), batch)
