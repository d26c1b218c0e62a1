"""Image models outside of eager PyTorch: in one compiled graph, as an exported program, in ONNX under onnxruntime.

One model a system and class, with its stages cut short (`image_models.shallow`), on images that no window divides.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import regard
from image_models import shallow, smallest_image_models
from regard.registry import find_variant

SIDES = (64, 96)


def one_a_system() -> list[str]:
    """One class of each system: conversion takes longest, and its classes are made of the same parts."""
    chosen = {find_variant(name)[0].slug: name for name in reversed(smallest_image_models())}
    return sorted(chosen.values())


@pytest.fixture(scope="module", params=smallest_image_models())
def case(request) -> tuple[nn.Module, Tensor, Tensor]:
    """A model, two images, and its logits in eager mode."""
    torch.manual_seed(0)
    model = regard.create_model(request.param, num_classes=7, **shallow(request.param)).eval()
    for parameter in model.parameters():
        if parameter.dim() < 2 or not parameter.any():  # scales and tables that start small would hide what they scale
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    x = torch.randn(2, 3, *SIDES)
    with torch.no_grad():
        return model, x, model(x)


@pytest.fixture(scope="module")
def program(case) -> torch.export.ExportedProgram:
    model, x, _ = case
    with torch.no_grad():
        return torch.export.export(model, (x,))


def test_compiles_to_one_graph(case):
    model, x, logits = case
    torch.compiler.reset()
    with torch.no_grad():
        assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), logits, rtol=1e-5, atol=1e-5)


def test_exports(case, program):
    _, x, logits = case
    assert_close(program.module()(x), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", one_a_system(), indirect=True)
def test_runs_in_onnxruntime(case, program):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    _, x, logits = case
    onnx = torch.onnx.export(program, dynamo=True, optimize=False, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        onnx.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (result,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close(torch.from_numpy(result), logits, rtol=1e-4, atol=1e-4)
