"""Cascades of Einsums and accelerator models, beyond what every system is held to."""

from __future__ import annotations

import doctest

import pytest
import torch

from regard.systems.hardware import _accelerators, _einsums
from regard.systems.hardware.fusemax import CASCADES, Cascade, cascade_attention, speedup, workload


@pytest.mark.parametrize("module", [_einsums, _accelerators])
def test_examples_in_the_docstrings(module):
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize(
    "line",
    ["Y = sum[k](A[k]", "Y[k] = log(A[k])", "Y[k] = A[k] ** B[k]", "Y[k] = A[k + 2]", "A[k] + B[k]", "Y[k] = A[k : 2]"],
)
def test_lines_that_cannot_be_read(line):
    with pytest.raises(ValueError, match="cannot be read"):
        Cascade(line).passes("k")


def test_inputs_must_fit():
    cascade = Cascade("Y = sum[k](A[k] * B[k])")
    with pytest.raises(ValueError, match="inputs"):
        cascade.run("Y", A=torch.ones(3))
    with pytest.raises(ValueError, match="rank k"):
        cascade.run("Y", A=torch.ones(3), B=torch.ones(4))
    with pytest.raises(ValueError, match="results"):
        cascade.run("Z", A=torch.ones(3), B=torch.ones(3))
    with pytest.raises(ValueError, match="fiber"):
        cascade.passes("m")


def test_steps_are_read_where_they_are():
    late = Cascade("S[0] = 0\nS[k + 1] = S[k] + A[k]\nT = S[-1]\nU[k] = S[k] * A[k]")
    with pytest.raises(ValueError, match="no such value of S"):
        late.run("U", A=torch.ones(3))
    beside = Cascade("S[0] = 0\nS[k + 1] = S[k] + A[k]\nU[k] = S[k + 1] * A[k]\nT = S[-1]")
    sums, total = beside.run("U", "T", A=torch.arange(1.0, 4.0))
    assert sums.tolist() == [1, 6, 18]
    assert total == 6


def test_normalising_early_costs_a_pass():
    early = (
        repr(CASCADES[2]).replace("SLD[p, i] * PLM[p, i]", "SLN[p, i, j] * PLM[p, i]").replace("sum[i](", "sum[i, j](")
    )
    assert Cascade(early).passes("i", "j") == 3


def test_wrong_arguments_are_named():
    q = torch.randn(1, 4, 2, 8)
    with pytest.raises(ValueError, match="passes"):
        cascade_attention(q, q, q, passes=4)
    with pytest.raises(ValueError, match="length"):
        workload("BERT", 1000)
    with pytest.raises(ValueError, match="Did you mean 'BERT'"):
        workload("BART", 1024)
    with pytest.raises(ValueError, match="accelerator"):
        speedup("BERT", 1024, over="gpu")
