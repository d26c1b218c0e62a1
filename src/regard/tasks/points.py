"""What tasks on point clouds share: ragged batches, clouds read from files, and what is held out of a user's folder.

In a batch the points of all items stand one after the other, and `offsets` (B + 1,) int64 says that item b has the points
`offsets[b]` to `offsets[b + 1] - 1`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from plyfile import PlyData, PlyParseError
from torch import Tensor
from torch.nn import functional as F

from regard.tasks.base import SPLIT

CLOUD_ENDINGS = (".npy", ".ply", ".bin")


def offsets_of(clouds: Sequence[Tensor]) -> Tensor:
    """Where each of the clouds (n_b, ...) begins in their concatenation: (B + 1,) int64."""
    return F.pad(torch.tensor([len(cloud) for cloud in clouds]).cumsum(0), (1, 0))


def read_cloud(file: Path) -> np.ndarray:
    """A cloud (n, 3 or more) float64: .npy (x y z first), .ply (vertex x y z) or .bin (KITTI: float32 x y z intensity).

    Raises:
        ValueError: naming the file, if it is damaged, holds something else, no point, or values that are not finite.
    """
    try:
        if file.suffix.lower() == ".ply":
            vertex = PlyData.read(str(file))["vertex"]
            points = np.stack([vertex[axis] for axis in "xyz"], 1)
        elif file.suffix.lower() == ".bin":
            points = np.fromfile(file, np.float32).reshape(-1, 4)
        else:
            points = np.load(file, allow_pickle=False)
    except (PlyParseError, ValueError, OSError, EOFError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read as a point cloud: {error}") from error
    if not isinstance(points, np.ndarray) or points.dtype.kind not in "fiu" or points.ndim != 2 or points.shape[1] < 3:
        raise ValueError(f"{file} must hold numbers of shape (n, 3 or more), got {getattr(points, 'shape', None)}.")
    if not len(points) or not np.isfinite(points).all():
        raise ValueError(f"{file} " + ("holds values that are not finite." if len(points) else "holds no point."))
    return points.astype(np.float64)


def cloud_files(folder: Path) -> list[Path]:
    """The files of a folder that are clouds by their ending, in order."""
    return sorted(path for path in folder.iterdir() if path.is_file() and path.suffix.lower() in CLOUD_ENDINGS)


def divide(files: Sequence[Path], seed: int, group: int = 0) -> tuple[list[Path], list[Path]]:
    """Files for training, and a fifth, at least one, for evaluation: drawn by the seed and the number of the group."""
    order = np.random.default_rng((seed, SPLIT, group)).permutation(len(files))
    held = max(1, len(files) // 5)
    return [files[index] for index in order[held:]], [files[index] for index in order[:held]]
