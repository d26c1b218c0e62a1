"""Equality with the authors' code: recorded inputs, weights, outputs and gradients of small configurations.

A recording is `SLUG.CASE.safetensors` (param/KEY, input/NAME, output/NAME, cot/NAME, grad/input/NAME, grad/param/KEY)
with `SLUG.CASE.json`, which names repository, commit, class and configuration, and the error that float32 itself allows.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor, nn

from regard.checkpoint import KeyMap, load_exactly

if TYPE_CHECKING:
    from regard.proofs.base import Check

Outputs = Mapping[str, Tensor]


def written_settings(text: str) -> dict[str, Any]:
    """The dictionary inside a constructor that is recorded as text, "SomeConfig({...})".

    Raises:
        ValueError: if there is none.
    """
    found = re.search(r"\{.*\}", text)
    if found is None:
        raise ValueError(f"no {{...}} in the recorded constructor {text!r}.")
    return ast.literal_eval(found[0])


def golden_folder() -> Path:
    """Where the recordings lie: `tests/golden` of the checkout.

    Raises:
        FileNotFoundError: if the package runs outside a checkout.
    """
    folder = Path(__file__).parents[3] / "tests" / "golden"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"the recordings of the authors' code are part of the source tree, and {folder} is not there: "
            "clone the repository and install it with `pip install -e .`."
        )
    return folder


@dataclass
class Recording:
    """One recording, read into memory."""

    name: str
    about: dict[str, Any]
    params: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    cotangents: dict[str, Tensor] = field(default_factory=dict)
    input_grads: dict[str, Tensor] = field(default_factory=dict)
    param_grads: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def read(cls, name: str, folder: Path | None = None) -> Recording:
        """Read `name` ("swin.attention") from `folder` (the checkout's recordings by default)."""
        folder = folder or golden_folder()
        recording = cls(name, json.loads((folder / f"{name}.json").read_text()))
        homes = {
            "param": recording.params,
            "input": recording.inputs,
            "output": recording.outputs,
            "cot": recording.cotangents,
            "grad/input": recording.input_grads,
            "grad/param": recording.param_grads,
        }
        for key, value in safetensors.torch.load_file(str(folder / f"{name}.safetensors")).items():
            kind = "/".join(key.split("/")[:2]) if key.startswith("grad/") else key.split("/")[0]
            if kind in homes:
                value = value.float() if value.dtype == torch.float16 else value
                homes[kind][key[len(kind) + 1 :]] = value
        return recording

    def tolerance(self, kind: str, name: str) -> float:
        """Largest absolute difference that float32 arithmetic allows for this tensor, as recorded."""
        per_tensor = self.about.get("tolerance_per_tensor") or self.about.get("tolerance_detail") or {}
        key = f"{kind}/{name}"
        if isinstance(per_tensor, Mapping) and key in per_tensor:
            return float(per_tensor[key])
        whole = self.about.get("tolerance_grad") if kind.startswith("grad") else None
        return float(whole if whole is not None else self.about["tolerance"])


def _only_output(module: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return module(*inputs.values())


def run_with_transitions(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Runs a `Hierarchical` model on `x`: what its stem gives, each stage with the step down after it, and the logits.

    In many releases that step ends a stage ("layers.S"), where ours begins the next. Maps are channels last.
    """
    x = model.stem(inputs["x"].movedim(1, -1))
    outputs = {"patch_embed": x}
    for index, stage in enumerate(model.stages):
        x = stage(x)
        if index + 1 < len(model.stages):
            x = model.downs[index + 1](x)
        outputs[f"layers.{index}"] = x
    return {**outputs, "logits": model(inputs["x"])}


@dataclass(frozen=True)
class Recorded:
    """How to hold one of our modules to a recording.

    Args:
        name: the recording, "swin.attention".
        build: its `constructor` entry -> our module, in the recorded configuration.
        run: our module and the recorded inputs -> output, or outputs by their recorded names. By default the module is
            called with the inputs in their order and gives the only output.
        keys: names of the authors' parameters -> ours; by default the module's `authors_keys`.
        params: replaces the recorded parameters, for recordings that give a rule in place of tensors.
        no_gradients: why the recorded gradients are not compared, for the rare recording whose gradients are wrong.
    """

    name: str
    build: Callable[[dict[str, Any]], nn.Module]
    run: Callable[[nn.Module, dict[str, Tensor]], Tensor | Outputs] = _only_output
    keys: KeyMap | None = None
    params: Callable[[Recording], dict[str, Tensor]] | None = None
    no_gradients: str = ""


def check_recorded(case: Recorded, folder: Path | None = None) -> Check:
    """Build, load, run and differentiate our module; compare every recorded output and gradient.

    The figures are the largest errors as a share of the recorded tolerance (1 is the limit).

    Raises:
        ValueError: if parameters are left over or missing.
    """
    from regard.proofs.base import Check

    recording = Recording.read(case.name, folder)
    module = case.build(recording.about.get("constructor", {})).eval()
    keys = case.keys or getattr(module, "authors_keys", None) or KeyMap()
    params = recording.params if case.params is None else case.params(recording)
    load_exactly(module, keys.apply(params))
    inputs = {
        name: value.clone().requires_grad_(name in recording.input_grads) for name, value in recording.inputs.items()
    }
    result = case.run(module, inputs)
    outputs = result if isinstance(result, Mapping) else {next(iter(recording.outputs)): result}
    ratios: dict[str, float] = {}

    def compare(kind: str, name: str, ours: Tensor | None, theirs: Tensor) -> None:
        if ours is None or ours.shape != theirs.shape:
            came = "no gradient" if ours is None else f"shape {tuple(ours.shape)}"
            raise ValueError(f"{case.name}: {kind}/{name} should have shape {tuple(theirs.shape)}, got {came}.")
        error = (ours.detach().double() - theirs.double()).abs().max().item() if theirs.numel() else 0.0
        limit = recording.tolerance(kind, name)  # 0 for masks and indices: equal or not
        share = error / limit if limit else float("inf") * error if error else 0.0
        ratios[f"{kind}/{name}"] = share if error == error else float("inf")

    for name, value in outputs.items():
        compare("output", name, value, recording.outputs[name])
    scalar = sum((outputs[name] * cot).sum() for name, cot in recording.cotangents.items() if name in outputs)
    if isinstance(scalar, Tensor) and scalar.requires_grad:
        scalar.backward()
    if case.no_gradients:
        recording.input_grads, recording.param_grads = {}, {}
    for name, theirs in recording.input_grads.items():
        compare("grad/input", name, inputs[name].grad, theirs)
    own = dict(module.named_parameters())
    for key, theirs in recording.param_grads.items():
        for name, part in keys.apply({key: theirs}).items():
            compare("grad/param", name, own[name].grad, part)
    worst = max(ratios, key=lambda name: ratios[name])
    about = recording.about
    origin = about.get("repo") or about.get("source", "the authors")
    return Check(
        name=f"equals the recording {case.name} of {origin} ({about.get('class', '')})",
        holds=all(ratio <= 1 for ratio in ratios.values()),
        figures={
            "tensors_compared": len(ratios),
            "largest_error_over_tolerance": ratios[worst],
            "where": worst,
        },
        setting=f"commit {about.get('commit') or 'unknown'}, float32, tolerances recorded per tensor"
        + (f"; gradients left out: {case.no_gradients}" if case.no_gradients else ""),
    )
