"""Measuring that several tasks share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.functional.image import structural_similarity_index_measure

from regard.tasks.base import Task


def measure(task: Task, model: nn.Module, batch_size: int = 64) -> dict[str, float]:
    """The task's metrics of `model` (a trivial answer, say) on its evaluation set."""
    metrics = task.metrics()
    # A loader draws a seed when it starts; a generator of its own keeps the global one as it was.
    loader = DataLoader(
        task.eval_set, batch_size=batch_size, collate_fn=task.collate, generator=torch.Generator(device="cpu")
    )
    with torch.no_grad():
        for batch in loader:
            task.update(metrics, model, batch)
    return {name: float(metric.compute()) for name, metric in metrics.items()}


def ssim(answer: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity of each image with the 11-pixel Gaussian window (sigma 1.5) of the paper that defined it.

    As there, only places count where the whole window lies inside the image.

    Args:
        answer, truth: (B, C, H, W) in [0, 1], H and W at least 11.

    Returns:
        (B,), 1 for equal images.
    """
    similarity = structural_similarity_index_measure(
        answer, truth, data_range=1.0, reduction="none", return_full_image=True
    )[1]
    return similarity[..., 5:-5, 5:-5].mean((1, 2, 3))
