"""Reading checkpoints without running them, and mapping published key names to ours.

Only tensors are ever read: safetensors files, or pickles through `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from regard.checks import nearest

_WRAPPERS = ("state_dict", "model", "model_state", "params_ema", "params", "state_dict_ema", "module")


@dataclass(frozen=True)
class KeyMap:
    """How the authors' state dict becomes ours.

    Args:
        rules: (pattern, replacement) pairs; every pattern that matches somewhere in a key is applied, in order.
        drop: patterns of keys that hold no weights of ours (index buffers, masks).
        convert: rewrites `(our_key, tensor)` into one or more entries of our state dict, for tensors that are stored in
            another layout.
    """

    rules: Sequence[tuple[str, str | Callable[[re.Match[str]], str]]] = ()
    drop: Sequence[str] = ()
    convert: Callable[[str, Tensor], Mapping[str, Tensor]] | None = field(default=None)

    def rename(self, key: str) -> str | None:
        """Our name of an authors' key, or None if it holds no weight."""
        if any(re.search(pattern, key) for pattern in self.drop):
            return None
        for pattern, replacement in self.rules:
            key = re.sub(pattern, replacement, key)
        return key

    def apply(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The whole state dict under our names."""
        ours: dict[str, Tensor] = {}
        for key, value in state.items():
            name = self.rename(key)
            if name is not None:
                ours.update({name: value} if self.convert is None else self.convert(name, value))
        return ours


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint file by name. Nothing in the file is executed.

    Wrappers of training scripts ("model", "state_dict", "params_ema", ...) and the "module." prefix of data parallelism
    are taken off.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a truncated file, a pickle that holds code or objects, or a file that holds no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file at {path}.")
    content: Any
    if path.suffix == ".safetensors":
        try:
            content = safetensors.torch.load_file(str(path))
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file ({error}). Download it again.") from error
    else:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(
                f"{path} cannot be read as tensors ({type(error).__name__}). It is truncated, no PyTorch checkpoint, or a "
                "pickle with objects inside, which this library never executes. If you trust it, load it yourself, keep "
                "only its tensors and save them with safetensors.torch.save_file."
            ) from error
    return unwrap(content, str(path))


def unwrap(content: Any, source: str = "the checkpoint") -> dict[str, Tensor]:
    """The state dict inside what a training script saved."""
    while isinstance(content, Mapping) and not any(isinstance(value, Tensor) for value in content.values()):
        inner = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            raise ValueError(f"{source} holds no state dict; its keys are {[str(key) for key in content][:10]}.")
        content = inner
    if not isinstance(content, Mapping):
        raise ValueError(f"{source} holds {type(content).__name__}, not a state dict.")
    state = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if state and all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


def load_authors_weights(model: nn.Module, weights: Mapping[str, Tensor] | str | Path) -> None:
    """Load weights under the names of the authors' release into `model`, all of them.

    The model's class maps the names (`authors_keys`), and may adapt position tables to its own resolution.

    Args:
        model: a model or mixer of this library.
        weights: a state dict, or a path to .safetensors, .pth, .pt, .bin or .ckpt.

    Raises:
        ValueError: if a key is left over or missing, or a shape differs; the message names them. The model is then
            unchanged.
    """
    state = unwrap(weights) if isinstance(weights, Mapping) else read_state_dict(weights)
    key_map: KeyMap = getattr(model, "authors_keys", None) or KeyMap()
    ours = key_map.apply(state)
    adapt = getattr(model, "adapt_state_dict", None)
    if adapt is not None:
        ours = adapt(ours)
    load_exactly(model, ours)


def drop_tied_head(
    state: dict[str, Tensor], head: str = "head.weight", embed: str = "embed.weight"
) -> dict[str, Tensor]:
    """The weights of a model whose head is its embedding, from a checkpoint that holds the matrix under either name or both.

    Raises:
        ValueError: if the two differ.
    """
    ours = dict(state)
    matrix = ours.pop(head, None)
    if matrix is not None and not torch.equal(matrix, ours.setdefault(embed, matrix)):
        raise ValueError("the checkpoint's head is not its embedding: build the model with tied=False.")
    return ours


def load_exactly(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """`load_state_dict` that explains itself: every key must be there, none left over, every shape equal.

    Raises:
        ValueError: otherwise, before anything is changed.
    """
    own = model.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or extra:
        lines = [f"the weights do not fit {type(model).__name__}:"]
        if missing:
            lines.append(f"  {len(missing)} missing, first {missing[:5]}")
        if extra:
            lines.append(f"  {len(extra)} left over, first {extra[:5]}.{nearest(extra[0], missing) if missing else ''}")
        raise ValueError("\n".join(lines))
    wrong = [
        f"{key}: {tuple(state[key].shape)} for {tuple(own[key].shape)}"
        for key in own
        if state[key].shape != own[key].shape
    ]
    if wrong:
        raise ValueError(
            f"{len(wrong)} weights have another shape than {type(model).__name__} expects (is it another variant or "
            f"num_classes?): " + "; ".join(wrong[:5])
        )
    model.load_state_dict(dict(state))
