"""Raw material of the tasks: the real data that comes with Python and regard's dependencies, and users' own folders."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

IMAGE_ENDINGS = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})

HELD_OUT_DIGITS = 360

# Photographs in colour. Of the stereo pair `motorcycle` only the left view: the other is nearly the same picture.
TRAIN_PHOTOGRAPHS = (
    "chelsea.png",
    "motorcycle_left.png",
    "rocket.jpg",
    "retina.jpg",
    "hubble_deep_field.jpg",
    "flower.jpg",
)
EVAL_PHOTOGRAPHS = ("astronaut.png", "coffee.png", "china.jpg")


@lru_cache(maxsize=4)
def handwritten_digits(held_out: bool, typical: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Scikit-learn's scans of handwritten digits: the first 1,437, or the 360 that are held out.

    The held-out digits are the end of the file, not a random draw: neighbours in the file tend to be by one writer, so
    a random draw would ask mostly about hands already seen. The classes are balanced to within four images.

    Args:
        typical: the share of each class to give, those nearest to the mean of the class's first 1,437 scans.

    Returns:
        images (N, 8, 8) float32 in [0, 1], ink bright; classes (N,) int64.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images, classes = (bunch.images / 16).astype(np.float32), bunch.target.astype(np.int64)
    first, last = slice(None, -HELD_OUT_DIGITS), slice(-HELD_OUT_DIGITS, None)
    means = np.stack([images[first][classes[first] == label].mean(0) for label in range(10)])
    images, classes = (images[last], classes[last]) if held_out else (images[first], classes[first])
    distance = np.square(images - means[classes]).sum((1, 2))
    kept = np.zeros(len(images), bool)
    for label in range(10):
        members = np.flatnonzero(classes == label)
        kept[members[distance[members].argsort(kind="stable")[: round(typical * len(members))]]] = True
    return images[kept], classes[kept]


@lru_cache(maxsize=2)
def photographs(held_out: bool) -> dict[str, np.ndarray]:
    """Colour photographs that scikit-image and scikit-learn carry in their wheels: {name: (H, W, 3) uint8}."""
    import skimage
    import sklearn

    homes = (Path(skimage.__file__).parent / "data", Path(sklearn.__file__).parent / "datasets" / "images")
    names = EVAL_PHOTOGRAPHS if held_out else TRAIN_PHOTOGRAPHS
    paths = [next((home / name for home in homes if (home / name).is_file()), Path(name)) for name in names]
    return {path.name: np.asarray(image) for path, image in zip(paths, read_images(paths), strict=True)}


def python_documentation() -> bytes:
    """The English text behind Python's `help("...")`: the language reference, several hundred kilobytes."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ValueError(
            "this Python comes without pydoc_data, the text that the task uses by default: give your own by data=FILE."
        ) from error
    return "\n\n".join(topics[name].strip() for name in sorted(topics)).encode()


def corpus_name() -> str:
    """What `python_documentation` is called in reports; the text differs between versions of Python."""
    return f"the documentation of Python {sys.version_info.major}.{sys.version_info.minor}"


def existing_folder(argument: str, folder: str | Path) -> Path:
    """`folder` as a Path; a ValueError if it is missing or a file."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ValueError(f"{argument}={str(folder)!r} is {'a file, not a folder' if path.exists() else 'not there'}.")
    return path


def image_files(folder: Path) -> list[Path]:
    """Image files anywhere below `folder`, sorted by path; hidden files and folders are passed over."""
    return sorted(_image_files(folder))


def has_images(folder: str | Path) -> bool:
    """Whether a folder holds image files, at any depth."""
    return next(_image_files(Path(folder).expanduser()), None) is not None


def _image_files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in IMAGE_ENDINGS and not hidden and path.is_file():
            yield path


def read_images(
    paths: Sequence[Path], *, size: int | None = None, mode: str = "RGB", skip_corrupt: bool = False
) -> list[Image.Image | None]:
    """Decode images, upright as their camera meant them.

    Args:
        size: resize the shorter side to `size` pixels and keep the square in the middle; None keeps images as they are.
        mode: "RGB" or "L" (one channel).
        skip_corrupt: give None for files that cannot be decoded; otherwise a ValueError names the first of them.
    """
    images: list[Image.Image | None] = []
    corrupt: list[str] = []
    for path in paths:
        try:
            with Image.open(path) as opened:
                if size is not None:
                    opened.draft(None, (2 * size, 2 * size))  # lets JPEG decode at a fraction of its size; else nothing
                image = ImageOps.exif_transpose(opened).convert(mode)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            corrupt.append(f"{path} ({error})")
            images.append(None)
            continue
        images.append(image if size is None else ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC))
    if corrupt and not skip_corrupt:
        shown = "; ".join(corrupt[:3]) + ("; ..." if len(corrupt) > 3 else "")
        raise ValueError(
            f"{len(corrupt)} of {len(paths)} images cannot be read ({len(paths) - len(corrupt)} can): {shown}. "
            "Repair or remove them, or pass skip_corrupt=True."
        )
    return images
