"""A user's own scenes for `detection`: clouds and boxes in the plain form of OpenPCDet's custom data sets.

    FOLDER/points/NAME.npy        (n, 3 or more) numbers, x y z first; or NAME.bin (KITTI: float32 x y z intensity), NAME.ply
    FOLDER/labels/NAME.txt        one object a line: x y z length width height yaw class
    FOLDER/ImageSets/train.txt    optional, with val.txt: names of the scenes for training and for evaluation

x y z is the centre of the box, in metres and in the frame of the points; yaw turns from x to y, in radians; a class is one
word. Clouds and labels may also lie side by side in FOLDER.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from regard.tasks.points import CLOUD_ENDINGS, cloud_files, divide


class LabelledCloud(NamedTuple):
    """A cloud on disk, and what is in it: boxes (K, 7) and the name of each one's class."""

    cloud: Path
    boxes: np.ndarray
    names: list[str]


def find_labelled_clouds(folder: Path, seed: int) -> tuple[list[LabelledCloud], list[LabelledCloud]]:
    """Scenes for training and for evaluation: as `ImageSets` says, or a fifth, drawn by the seed, for evaluation.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: for a folder of another form, a cloud without labels, a name without a cloud, or a wrong line.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"data: there is no folder {folder}.")
    points, labels = folder / "points", folder / "labels"
    clouds = cloud_files(points if points.is_dir() else folder)
    if len(clouds) < 2:
        classes = [sub.name for sub in sorted(folder.iterdir()) if sub.is_dir() and sub != points and cloud_files(sub)]
        hint = (
            f" The clouds in {', '.join(classes[:3])} look like classes: for those the task is shapes."
            if classes
            else ""
        )
        raise ValueError(
            f"{folder} must hold at least two scenes, points/NAME{'|'.join(CLOUD_ENDINGS)} with labels/NAME.txt (lines of "
            f"x y z length width height yaw class), found {len(clouds)}.{hint}"
        )
    label_folder = labels if labels.is_dir() else clouds[0].parent
    scenes = {cloud.stem: _scene(cloud, label_folder / f"{cloud.stem}.txt") for cloud in clouds}
    lists = [folder / "ImageSets" / f"{part}.txt" for part in ("train", "val")]
    if not all(path.is_file() for path in lists):
        train, held = divide(clouds, seed)
        return [scenes[cloud.stem] for cloud in train], [scenes[cloud.stem] for cloud in held]
    parts = []
    for path in lists:
        names = path.read_text().split()
        missing = [name for name in names if name not in scenes]
        if missing or not names:
            raise ValueError(
                f"{path} " + (f"names {missing[0]}, which has no cloud." if missing else "names no scene.")
            )
        parts.append([scenes[name] for name in names])
    return parts[0], parts[1]


def _scene(cloud: Path, labels: Path) -> LabelledCloud:
    if not labels.is_file():
        raise ValueError(
            f"{cloud} has no labels: {labels} is missing. For a scene without objects make it an empty file."
        )
    boxes, names = [], []
    try:
        lines = labels.read_text().splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{labels} cannot be read as text: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        *values, name = line.split()
        try:
            box = [float(value) for value in values]
        except ValueError:
            box = []
        if len(box) != 7 or not np.isfinite(box).all() or min(box[3:6]) <= 0:
            raise ValueError(
                f"{labels}, line {number}: expected x y z length width height yaw class (seven numbers, sizes above 0, and "
                f"one word), got {line.strip()!r}."
            )
        boxes.append(box)
        names.append(name)
    return LabelledCloud(cloud, np.array(boxes).reshape(-1, 7), names)
