"""Digits, scenes and image folders: reproducible items, held-out handwriting, answers that can be read off, errors."""

import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from regard.tasks import create_task
from regard.tasks.measures import measure
from regard.tasks.sources import handwritten_digits, has_images
from regard.training import TrainConfig, train

KINDS = ("cued", "local", "same")


class Small(nn.Module):
    """One convolution, dropout and a linear layer: enough for resuming to be wrong about."""

    def __init__(self, task):
        super().__init__()
        self.conv = nn.Conv2d(task.sample_shape[0], 8, 4, 4)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(8, task.num_classes)

    def forward(self, image):
        return self.head(self.dropout(self.conv(image).relu()).mean((2, 3)))


class Knows(nn.Module):
    """Answers with the class that it is told for each image."""

    def __init__(self, task, labels):
        super().__init__()
        self.answers = {task.eval_set[i]["image"].numpy().tobytes(): int(label) for i, label in enumerate(labels)}
        self.num_classes = task.num_classes

    def forward(self, image):
        answers = torch.tensor([self.answers[one.numpy().tobytes()] for one in image])
        return nn.functional.one_hot(answers, self.num_classes).float()


@pytest.fixture
def folder(tmp_path):
    """Three classes of 5, 6 and 7 images of their own brightness, of several sizes."""
    for label, name in enumerate(("ash", "birch", "cedar")):
        (tmp_path / name).mkdir()
        for i in range(5 + label):
            pixels = np.full((20 + i, 30, 3), 80 * label + i, np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    return tmp_path


def test_held_out_handwriting_is_never_trained_on():
    train_images, _ = handwritten_digits(held_out=False)
    eval_images, eval_classes = handwritten_digits(held_out=True)
    assert len(train_images) + len(eval_images) == 1797
    seen = {image.tobytes() for image in train_images}
    assert not any(image.tobytes() in seen for image in eval_images)
    assert np.bincount(eval_classes).min() >= 30


@pytest.mark.parametrize("held_out", [False, True])
def test_typical_handwriting_is_nearest_to_the_mean(held_out):
    images, classes = handwritten_digits(held_out)
    typical, typical_classes = handwritten_digits(held_out, typical=0.25)
    reference, labels = handwritten_digits(held_out=False)
    for label in range(10):
        distance = np.square(images[classes == label] - reference[labels == label].mean(0)).sum((1, 2))
        nearest = images[classes == label][np.sort(distance.argsort()[: round(0.25 * len(distance))])]
        assert np.array_equal(typical[typical_classes == label], nearest)


def test_digits_are_normalised_and_enlarged():
    task = create_task("digits", size=24, channels=1)
    assert task.sample_shape == (1, 24, 24)
    assert task.num_classes == 10
    images = torch.stack([task.train_set[i]["image"] for i in range(len(task.train_set))])
    assert images.shape == (1437, 1, 24, 24)
    assert images.mean().item() == pytest.approx(0, abs=1e-3)
    assert images.std().item() == pytest.approx(1, abs=1e-3)
    colour = create_task("digits", size=24)
    assert torch.equal(colour.train_set[5]["image"], task.train_set[5]["image"].expand(3, -1, -1))
    original, classes = handwritten_digits(held_out=False)
    back = nn.functional.adaptive_avg_pool2d(images[:50], 8)[:, 0].flatten(1)
    for i in range(50):
        assert np.corrcoef(back[i], original[i].ravel())[0, 1] > 0.95
        assert task.train_set[i]["label"] == classes[i]


def test_digits_trivial_is_the_majority_class():
    task = create_task("digits", size=8)
    majority = np.bincount(handwritten_digits(held_out=False)[1]).argmax()
    expected = (handwritten_digits(held_out=True)[1] == majority).mean()
    assert task.trivial() == {"accuracy": pytest.approx(expected)}


def test_accuracy_counts_right_answers():
    task = create_task("scenes", eval_items=40)
    labels = task.eval_set.labels.clone()
    labels[:10] = (labels[:10] + 1) % 10
    assert measure(task, Knows(task, labels))["accuracy"] == pytest.approx(0.75)


def test_loss_is_cross_entropy_with_smoothing():
    task = create_task("digits", size=8, label_smoothing=0.1)
    logits = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    batch = {"image": logits, "label": torch.tensor([1, 2, 3])}
    target = 0.9 * nn.functional.one_hot(batch["label"], 10) + 0.01
    expected = -(target * logits.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(task.loss(nn.Identity(), batch), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_scenes_depend_on_seed_and_index_alone(kind):
    short = create_task("scenes", kind=kind, train_items=20, eval_items=10, seed=3)
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    before = torch.get_rng_state()
    longer = create_task("scenes", kind=kind, train_items=50, eval_items=30, seed=3)
    other = create_task("scenes", kind=kind, train_items=50, eval_items=30, seed=4)
    for i in (0, 7, 19):
        a, b = short.train_set[i], longer.train_set[i]
        assert torch.equal(a["image"], b["image"])
        assert a["label"] == b["label"]
        assert not torch.equal(a["image"], other.train_set[i]["image"])
    assert torch.equal(short.eval_set[9]["image"], longer.eval_set[9]["image"])
    assert not torch.equal(short.eval_set[9]["image"], short.train_set[9]["image"])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_balanced(kind):
    task = create_task("scenes", kind=kind, train_items=2000, eval_items=500)
    share = torch.bincount(task.train_set.labels, minlength=task.num_classes) / 2000
    assert (share - 1 / task.num_classes).abs().max() < 0.04
    assert task.trivial()["accuracy"] == pytest.approx(1 / task.num_classes, abs=0.05)


@pytest.mark.parametrize(("size", "channels"), [(32, 3), (48, 1), (64, 3)])
def test_scene_shapes(size, channels):
    task = create_task("scenes", size=size, channels=channels, train_items=4, eval_items=4)
    assert task.sample_shape == (channels, size, size) == tuple(task.train_set[0]["image"].shape)
    assert task.train_set[0]["image"].dtype == torch.float32


def test_cued_scenes_can_be_answered_by_looking():
    """The only pure colour is the square; on the ground of that colour stands the digit of the label."""
    task = create_task("scenes", eval_items=200)
    digits, classes = handwritten_digits(held_out=False)
    means = torch.from_numpy(np.stack([digits[classes == label].mean(0) for label in range(10)])).flatten(1)
    right = 0
    for scene, label in zip(task.eval_set.images, task.eval_set.labels, strict=True):
        pure = (scene.amax(0) == 255) & (scene.float().sum(0) == 255)
        assert pure.sum() == 64
        rows, columns = pure.nonzero().T
        asked = scene[:, rows[0], columns[0]].argmax()
        ground = (scene[asked] >= 110) & (scene[(asked + 1) % 3] == 0) & ~pure
        quarters = [(r, c) for r in (0, 16) for c in (0, 16)]
        r, c = max(quarters, key=lambda rc: ground[rc[0] : rc[0] + 16, rc[1] : rc[1] + 16].sum())
        top, left = (int(x.min()) for x in (scene[asked, r : r + 16, c : c + 16] > 0).nonzero().T)
        digit = scene[(asked + 1) % 3, r + top : r + top + 14, c + left : c + left + 14]
        small = nn.functional.interpolate(digit[None, None].float(), size=(8, 8), mode="bilinear", antialias=True)
        correlations = [np.corrcoef(small.flatten(), mean)[0, 1] for mean in means]
        right += int(np.argmax(correlations)) == label
        others = (scene.amax(0) > 0) & ~pure
        distance = (others.nonzero()[:, None] - pure.nonzero()[None]).abs().amax(-1).min()
        assert distance > 6
    assert right > 190


def test_half_of_the_cued_training_scenes_show_one_digit():
    task = create_task("scenes", train_items=400, eval_items=100)

    def quarters_in_use(images):
        return (images.amax(1).float().view(-1, 2, 16, 2, 16).amax((2, 4)) > 0).sum((1, 2))

    assert 150 < (quarters_in_use(task.train_set.images) == 2).sum() < 250
    assert (quarters_in_use(task.eval_set.images) == 4).all()


def test_scenes_too_many_to_keep_are_the_same(monkeypatch):
    kept = create_task("scenes", train_items=10)
    monkeypatch.setattr("regard.tasks.scenes.MAX_KEPT", 0)
    drawn = create_task("scenes", train_items=10)
    assert all(torch.equal(kept.train_set[i]["image"], drawn.train_set[i]["image"]) for i in range(10))
    assert "images" not in vars(drawn.train_set)
    assert torch.equal(pickle.loads(pickle.dumps(drawn.train_set))[3]["image"], kept.train_set[3]["image"])


def test_same_scenes_hold_one_digit_in_each_of_two_opposite_corners():
    task = create_task("scenes", kind="same", train_items=64, channels=1)
    ink = task.train_set.images[:, 0]
    quarter = torch.stack([ink[:, r : r + 16, c : c + 16].flatten(1).amax(1) > 0 for r in (0, 16) for c in (0, 16)], 1)
    diagonal, other = quarter[:, [0, 3]].all(1), quarter[:, [1, 2]].all(1)
    assert (diagonal ^ other).all()
    assert 0 < diagonal.sum() < 64


def test_resumed_training_has_the_losses_of_an_uninterrupted_run(tmp_path):
    def fresh():
        torch.manual_seed(5)
        task = create_task("scenes", train_items=40, eval_items=8)
        return Small(task), task

    config = TrainConfig(steps=12, batch_size=8, save_every=5, seed=1)
    whole = train(*fresh(), config, cpu=True)

    class Stop(Exception):
        pass

    def stop(step, loss):
        if step == 8:
            raise Stop

    with pytest.raises(Stop):
        train(*fresh(), config, out=tmp_path, on_step=stop, cpu=True)
    resumed = train(*fresh(), config, out=tmp_path, cpu=True)
    assert resumed.losses == whole.losses
    assert resumed.metrics == whole.metrics


def test_image_folder_splits_each_class_once_and_for_all(folder):
    task = create_task("imagefolder", data=folder, size=16)
    assert task.classes == ["ash", "birch", "cedar"]
    assert task.num_classes == 3
    assert torch.bincount(task.train_set.labels).tolist() == [4, 5, 6]
    assert torch.bincount(task.eval_set.labels).tolist() == [1, 1, 1]
    again = create_task("imagefolder", data=folder, size=16)
    assert torch.equal(task.train_set.images, again.train_set.images)
    for part in (task.train_set, task.eval_set):
        for image, label in zip(part.images, part.labels, strict=True):
            assert 80 * label <= image.float().mean() <= 80 * label + 6
    train_levels = set(task.train_set.images.flatten(1).amax(1).tolist())
    assert not train_levels & set(task.eval_set.images.flatten(1).amax(1).tolist())
    assert set(task.trivial()) == {"accuracy"}
    assert has_images(folder)


def test_image_folder_uses_train_and_val_where_they_are(folder, tmp_path_factory):
    home = tmp_path_factory.mktemp("split")
    (folder / "cedar" / "6.png").unlink()
    shutil.copytree(folder, home / "train")
    (home / "val" / "birch").mkdir(parents=True)
    Image.new("L", (9, 9), 200).save(home / "val" / "birch" / "x.png")
    task = create_task("imagefolder", data=home, size=8, channels=1)
    assert len(task.train_set) == 17
    assert task.eval_set.labels.tolist() == [1]
    assert task.eval_set.images.unique().tolist() == [200]
    (home / "val" / "birch").rename(home / "val" / "beech")
    with pytest.raises(ValueError, match="beech"):
        create_task("imagefolder", data=home)


def test_corrupt_images_are_named_or_skipped(folder):
    (folder / "ash" / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    whole = (folder / "birch" / "2.png").read_bytes()
    (folder / "birch" / "2.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot be read") as error:
        create_task("imagefolder", data=folder)
    assert "broken.jpg" in str(error.value) or "2.png" in str(error.value)
    task = create_task("imagefolder", data=folder, skip_corrupt=True)
    assert len(task.train_set) + len(task.eval_set) == 17


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("digits", {"size": 4}, "size must be an integer of at least 8, got 4"),
        ("digits", {"channels": 2}, r"channels must be 1 \(grey\) or 3 \(colour\), got 2"),
        ("digits", {"label_smoothing": 1.0}, "label_smoothing must be at least 0 and below 1"),
        ("digits", {"data": "x"}, "use the task 'imagefolder'"),
        ("scenes", {"data": "x"}, "use the task 'imagefolder'"),
        ("scenes", {"kind": "queued"}, "Did you mean 'cued'"),
        ("scenes", {"size": 40}, "multiple of 16"),
        ("scenes", {"size": 16}, "from 32 on, got 16"),
        ("scenes", {"train_items": 0}, "train_items"),
        ("scenes", {"seed": -1}, "seed"),
        ("imagefolder", {}, "needs data=FOLDER"),
        ("imagefolder", {"data": "no/such/folder"}, "is not there"),
        ("imagefolder", {"data": __file__}, "a file, not a folder"),
    ],
)
def test_options_are_refused_at_the_door(name, options, said):
    with pytest.raises(ValueError, match=said):
        create_task(name, **options)


def test_folders_that_cannot_work_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no subfolders with images"):
        create_task("imagefolder", data=tmp_path)
    assert not has_images(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "loose.png")
    with pytest.raises(ValueError, match="not in subfolders"):
        create_task("imagefolder", data=tmp_path)
    (tmp_path / "one").mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / "one" / f"{i}.png")
    with pytest.raises(ValueError, match="one class only"):
        create_task("imagefolder", data=tmp_path)
    (tmp_path / "two").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "two" / "0.png")
    with pytest.raises(ValueError, match="more than 4 GiB"):
        create_task("imagefolder", data=tmp_path, size=30_000)
    assert create_task("imagefolder", data=tmp_path, size=8).num_classes == 2
