"""The interface that all models keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from regard import checks
from regard.checkpoint import KeyMap


class Model(nn.Module, PyTorchModelHubMixin, library_name="regard"):
    """A whole published architecture.

    `save_pretrained`, `from_pretrained` and `push_to_hub` come from the Hugging Face mixin (safetensors and a JSON of the
    constructor's arguments, so keep those plain values).
    """

    authors_keys: ClassVar[KeyMap] = KeyMap()
    """Maps the names in the authors' checkpoints; see `load_authors_weights`."""

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that the paper's recipe does not decay (besides norms and biases)."""
        return set()


class ImageModel(Model):
    """An image backbone with a classifier, used as timm's models are.

    Subclasses define `stages_forward` (feature map of each stage) and the head's parts.

    Attributes:
        num_features: channels of the last feature map. feature_strides: pixels per token, for each stage.
    """

    num_classes: int
    num_features: int
    in_chans: int
    feature_dims: tuple[int, ...]
    feature_strides: tuple[int, ...]
    norm: nn.Module
    head_norm: nn.Module
    head: nn.Module

    def stages_forward(self, x: Tensor) -> list[Tensor]:
        """`(B, in_chans, H, W)` -> one channels-last map `(B, H_s, W_s, C_s)` for each stage, before the final norm."""
        raise NotImplementedError

    def forward_features(self, x: Tensor) -> Tensor:
        """`(B, in_chans, H, W)` -> the last map, normalised, channels last `(B, H', W', num_features)`."""
        self.check_image(x)
        return self.norm(self.stages_forward(x)[-1])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map -> logits `(B, num_classes)`, or `(B, num_features)` before the classifier."""
        x = self.head_norm(x.mean((1, 2)))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, in_chans, H, W)` -> logits `(B, num_classes)`."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(self, x: Tensor, indices: Sequence[int] | None = None) -> list[Tensor]:
        """Feature maps `(B, C_s, H_s, W_s)` of the stages (all, or those in `indices`), before the final norm.

        Raises:
            ValueError: for a stage that does not exist.
        """
        self.check_image(x)
        maps = self.stages_forward(x)
        wanted = range(len(maps)) if indices is None else indices
        for index in wanted:
            if not -len(maps) <= index < len(maps):
                raise ValueError(f"indices must lie in 0..{len(maps) - 1}, got {index}.")
        return [maps[index].movedim(-1, 1) for index in wanted]

    def get_classifier(self) -> nn.Module:
        """The classifier, such as one freezes the rest for."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a fresh one; 0 classes leave the pooled features."""
        self.num_classes = num_classes
        self.head = make_head(self.num_features, num_classes, like=next(self.parameters()))

    def check_image(self, x: Tensor) -> None:
        """Check the input at the door."""
        checks.image(x, self.in_chans)
        checks.no_half_on_cpu(type(self).__name__, x)


def make_head(features: int, num_classes: int, like: Tensor | None = None) -> nn.Module:
    """A linear classifier with zero bias, or Identity for 0 classes."""
    if num_classes < 0:
        raise ValueError(f"num_classes must be 0 or more, got {num_classes}.")
    if num_classes == 0:
        return nn.Identity()
    kwargs: dict[str, Any] = {} if like is None else {"device": like.device, "dtype": like.dtype}
    head = nn.Linear(features, num_classes, **kwargs)
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head
