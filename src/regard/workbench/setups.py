"""How mixers are compared on each task: in which place of attention, inside which small model, fed with what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from regard.skeletons.decoder_lm import host_lm
from regard.skeletons.host import MixerClass, MixerPyramid, MixerVideo
from regard.skeletons.sequence import MixerEncoder, MixerReader, MixerTranslator
from regard.systems.sequence._cab_scores import Pattern

Mixer = MixerClass | str
"""A registered name, or a class."""


@dataclass(frozen=True)
class Setup:
    """What a comparison needs to know about a task.

    Args:
        axes: spatial axes that the mixers see. pattern: the place of attention that they take.
        build: the task and a mixer -> the small model; everything but the mixer is equal for all.
        inputs: an item of the task -> what the model is called with, without the batch; None for no argument.
    """

    axes: int
    pattern: Pattern
    build: Callable[[Any, Mixer], nn.Module]
    inputs: Callable[[dict[str, Tensor]], tuple[Tensor | None, ...]]

    @property
    def options(self) -> dict[str, bool]:
        """What `build_in_stack` is told for this place."""
        if self.pattern == "causal self":
            return {"causal": True}
        return {"cross": True} if self.crosses else {}

    @property
    def crosses(self) -> bool:
        """Whether mixers read a context."""
        return self.pattern.endswith("cross")

    def fits(self, mixer: MixerClass) -> bool:
        """Whether a class says of itself that it takes this place."""
        needed = {"noncausal self": "dims", "causal self": "can_causal"}.get(self.pattern, "can_cross")
        return self.axes in getattr(mixer, "dims", ()) and bool(getattr(mixer, needed, False))


def _pyramid(task: Any, mixer: Mixer) -> nn.Module:
    channels, height, width = task.sample_shape
    patch = max(4, height // 16)
    return MixerPyramid(
        mixer, input_size=(height, width), patch_size=patch, num_classes=task.num_classes, in_chans=channels
    )


def _video(task: Any, mixer: Mixer) -> nn.Module:
    sample = task.train_set[0]["past"]
    return MixerVideo(mixer, frames=sample.shape[0], size=sample.shape[-1], channels=sample.shape[1])


def _language(task: Any, mixer: Mixer) -> nn.Module:
    return host_lm(mixer, task.vocab_size, dim=96, depth=2, num_heads=4, length=task.length)


def _masked(task: Any, mixer: Mixer) -> nn.Module:
    return MixerEncoder(mixer, task.vocab_size, task.num_classes, length=task.length)


def _denoiser(task: Any, mixer: Mixer) -> nn.Module:
    return MixerEncoder(mixer, 1, 1, features=True, residual=True, length=task.length, dim=64)


def _forecaster(task: Any, mixer: Mixer) -> nn.Module:
    return MixerReader(mixer, task.columns, task.horizon, task.columns)


def _completer(task: Any, mixer: Mixer) -> nn.Module:
    return MixerReader(mixer, 3, task.points, 3, position=False)


def _translator(task: Any, mixer: Mixer) -> nn.Module:
    return MixerTranslator(mixer, task.words, task.num_classes, length=task.length + 1)


_IMAGES = Setup(2, "noncausal self", _pyramid, lambda item: (item["image"],))

SETUPS: dict[str, Setup] = {
    "scenes": _IMAGES,
    "digits": _IMAGES,
    "imagefolder": _IMAGES,
    "text": Setup(1, "causal self", _language, lambda item: (item["tokens"][:-1],)),
    "moving_digits": Setup(3, "noncausal self", _video, lambda item: (item["past"],)),
    "masked_text": Setup(1, "noncausal self", _masked, lambda item: (item["inputs"],)),
    "denoising": Setup(1, "noncausal self", _denoiser, lambda item: (item["inputs"],)),
    "forecast": Setup(1, "noncausal cross", _forecaster, lambda item: (item["past"],)),
    "completion": Setup(1, "noncausal cross", _completer, lambda item: (item["partial"],)),
    "translation": Setup(1, "causal cross", _translator, lambda item: (item["inputs"], None, item["targets"])),
}
"""Tasks that can be compared on."""

DEFAULT_MIXERS = {
    (2, "noncausal self"): ("softmax", "window", "neighborhood", "linear", "agent", "pooling"),
    (3, "noncausal self"): ("softmax", "neighborhood", "window", "linear", "identity"),
    (1, "noncausal self"): ("softmax", "linear", "agent", "neighborhood", "pooling", "identity"),
    (1, "causal self"): ("softmax", "linear", "lightning", "neighborhood", "identity"),
    (1, "noncausal cross"): ("softmax", "linear", "moh", "lla", "kron_attention"),
    (1, "causal cross"): ("softmax", "linear", "moh", "lla", "kron_attention"),
}
"""Mixers by the number of axes and the pattern."""

DEFAULT_SHAPES = {
    2: ((16, 16), (24, 24), (32, 32), (48, 48), (64, 64)),
    1: ((256,), (512,), (1024,), (2048,), (4096,)),
    3: ((4, 8, 8), (4, 12, 12), (8, 12, 12), (8, 16, 16)),
}
"""Grid sizes, by the number of axes."""
