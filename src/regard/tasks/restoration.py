"""Super-resolution of photographs, measured as the field measures it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics import MeanMetric, Metric
from torchmetrics.image import PeakSignalNoiseRatio

from regard.tasks.base import SPLIT, TRAIN, Generated, Task, whole
from regard.tasks.measures import measure, ssim
from regard.tasks.sources import existing_folder, image_files, photographs, read_images

SMALLEST_MEASURED = 11
"""Pixels of a side that structural similarity needs after the border is cut off."""


class SuperResolution(Task):
    """From photographs reduced by bicubic interpolation back to the originals.

    As in the literature, whole photographs are reduced (antialiased, rounded to 8 bits) and crops taken afterwards, so
    a crop's border knows the pixels beyond it; PSNR and SSIM are taken on the luma of 8-bit answers without a border of
    `scale` pixels, and averaged over crops. Figures compare models here; published tables use other photographs.

    Training crops are drawn, flipped and turned by `(seed, index)`. Evaluation takes other photographs, cut into all
    the whole `eval_patch` squares that they hold.

    Args:
        scale: 2, 3 or 4.
        patch: side of a training crop in low-resolution pixels.
        eval_patch: side of an evaluation crop in low-resolution pixels; twice `patch` unless given.
        train_items: crops that count as one pass over the photographs.
        data: folder of your own photographs, a fifth of them held out; by default those that come with scikit-image
            and scikit-learn.
        skip_corrupt: leave out files that cannot be read instead of refusing the folder.
    """

    name = "super_resolution"
    metric = "psnr"
    train_set: Generated
    eval_set: Tiles

    def __init__(
        self,
        scale: int = 2,
        patch: int = 24,
        eval_patch: int | None = None,
        train_items: int = 4096,
        seed: int = 0,
        data: str | Path | None = None,
        skip_corrupt: bool = False,
    ) -> None:
        if scale not in (2, 3, 4):
            raise ValueError(f"scale must be 2, 3 or 4, got {scale!r}.")
        self.scale, self.patch, self.seed = scale, whole("patch", patch), whole("seed", seed, 0)
        smallest = -(-(SMALLEST_MEASURED + 2 * scale) // scale)
        self.eval_patch = whole("eval_patch", max(2 * patch, smallest) if eval_patch is None else eval_patch, smallest)
        if data is None:
            self.source, train, held_out = "scikit-image and scikit-learn", photographs(False), photographs(True)
        else:
            folder = existing_folder("data", data)
            self.source = folder.name
            train, held_out = _own_photographs(folder, self.seed, skip_corrupt)
        self._train = _pairs(train, scale, self.patch, "patch")
        self.train_set = Generated(self._crop, whole("train_items", train_items), self.seed, TRAIN)
        self.eval_set = Tiles(_pairs(held_out, scale, self.eval_patch, "eval_patch"), self.eval_patch, scale)

    @property
    def description(self) -> str:
        return (
            f"{self.scale}x super-resolution of colour photographs ({self.source}): {len(self._train)} to train and "
            f"{len(self.eval_set)} crops of {len(self.eval_set.pairs)} others to evaluate."
        )

    @property
    def trivial_answer(self) -> str:
        return "bicubic enlargement"

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.l1_loss(_same_shape(model(batch["low"]), batch["high"]), batch["high"])

    def metrics(self) -> dict[str, Metric]:
        psnr = PeakSignalNoiseRatio(data_range=1.0, dim=(1, 2, 3), reduction="elementwise_mean")
        return {"psnr": psnr, "ssim": MeanMetric()}

    def update(self, metrics: Mapping[str, Metric], model: nn.Module, batch: dict[str, Tensor]) -> None:
        answer = eight_bits(_same_shape(model(batch["low"]), batch["high"]).float())
        inner = slice(self.scale, -self.scale)
        answer, truth = luma(answer)[..., inner, inner], luma(batch["high"])[..., inner, inner]
        metrics["psnr"].update(answer, truth)
        metrics["ssim"].update(ssim(answer, truth))

    def trivial(self) -> dict[str, float]:
        return measure(self, Bicubic(self.scale))

    def _crop(self, rng: np.random.Generator, index: int) -> dict[str, Tensor]:
        low, high = self._train[rng.integers(len(self._train))]
        top, left = (int(rng.integers(side - self.patch + 1)) for side in low.shape[1:])
        low, high = _cut(low, high, top, left, self.patch, self.scale)
        mirrored, turns = rng.integers(2), int(rng.integers(4))
        if mirrored:
            low, high = low.flip(-1), high.flip(-1)
        return {"low": low.rot90(turns, (1, 2)).float() / 255, "high": high.rot90(turns, (1, 2)).float() / 255}


class Tiles(Dataset[dict[str, Tensor]]):
    """The whole squares of `patch` low-resolution pixels that photographs hold, without overlap."""

    def __init__(self, pairs: list[tuple[Tensor, Tensor]], patch: int, scale: int) -> None:
        self.pairs, self.patch, self.scale = pairs, patch, scale
        self.places = [
            (i, top, left)
            for i, (low, _) in enumerate(pairs)
            for top in range(0, low.shape[1] - patch + 1, patch)
            for left in range(0, low.shape[2] - patch + 1, patch)
        ]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        i, top, left = self.places[index]
        low, high = _cut(*self.pairs[i], top, left, self.patch, self.scale)
        return {"low": low.float() / 255, "high": high.float() / 255}


class Bicubic(nn.Module):
    """Bicubic enlargement: what a model must beat."""

    def __init__(self, scale: int) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, low: Tensor) -> Tensor:
        return F.interpolate(low, scale_factor=self.scale, mode="bicubic")


def luma(image: Tensor) -> Tensor:
    """(B, 3, H, W) RGB in [0, 1] to its BT.601 luma (B, 1, H, W), which runs from 16/255 to 235/255."""
    weights = image.new_tensor([65.481, 128.553, 24.966])
    return (16 + (image * weights[:, None, None]).sum(1, keepdim=True)) / 255


def eight_bits(image: Tensor) -> Tensor:
    """Values in [0, 1] as an image file would keep them."""
    return (image.clamp(0, 1) * 255).round() / 255


def reduced(high: Tensor, scale: int) -> Tensor:
    """(3, H, W) uint8 to (3, H / scale, W / scale) uint8 by antialiased bicubic interpolation."""
    size = (high.shape[1] // scale, high.shape[2] // scale)
    low = F.interpolate(high[None].float(), size=size, mode="bicubic", antialias=True)[0]
    return low.clamp(0, 255).round().byte()


def _pairs(images: dict[str, np.ndarray], scale: int, patch: int, argument: str) -> list[tuple[Tensor, Tensor]]:
    small = [name for name, image in images.items() if min(image.shape[:2]) < patch * scale]
    if small:
        raise ValueError(
            f"{argument}={patch} at scale={scale} needs photographs of at least {patch * scale} pixels a side; "
            f"smaller: {', '.join(small[:5])}. Choose a smaller {argument} or leave them out."
        )
    pairs = []
    for image in images.values():
        height, width = (side - side % scale for side in image.shape[:2])
        high = torch.from_numpy(image[:height, :width].transpose(2, 0, 1).copy())
        pairs.append((reduced(high, scale), high))
    return pairs


def _own_photographs(
    folder: Path, seed: int, skip_corrupt: bool
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    paths = image_files(folder)
    if not paths:
        raise ValueError(f"{folder} holds no images.")
    read = zip(paths, read_images(paths, skip_corrupt=skip_corrupt), strict=True)
    images = {str(path.relative_to(folder)): np.asarray(image) for path, image in read if image is not None}
    if len(images) < 2:
        raise ValueError(f"{folder} must hold at least 2 photographs that can be read, one of them to evaluate on.")
    order = np.random.default_rng((seed, SPLIT)).permutation(len(images))
    held_out = {sorted(images)[i] for i in order[: max(1, len(images) // 5)]}
    return {n: x for n, x in images.items() if n not in held_out}, {n: images[n] for n in sorted(held_out)}


def _cut(low: Tensor, high: Tensor, top: int, left: int, patch: int, scale: int) -> tuple[Tensor, Tensor]:
    rows, columns = slice(scale * top, scale * (top + patch)), slice(scale * left, scale * (left + patch))
    return low[:, top : top + patch, left : left + patch], high[:, rows, columns]


def _same_shape(answer: Tensor, truth: Tensor) -> Tensor:
    if answer.shape != truth.shape:
        raise ValueError(
            f"the model answered with shape {tuple(answer.shape)} where {tuple(truth.shape)} was asked for."
        )
    return answer
