"""Image models without published counts, and one that the shared contract passes over, on small and odd images."""

from __future__ import annotations

import pytest
import torch

import regard


@pytest.mark.parametrize(
    "name",
    [
        "hyena_deit_tiny",  # of its class the contract takes the smallest, which is the baseline with attention
        "maformer_reconstructed",
        "s2aformer_mini_reconstructed",
        "tic_reconstructed",
        "ulsam_mobilenet_v1",
        "ulsam_mobilenet_v2",
    ],
)
def test_model_keeps_the_interface(name):
    model = regard.create_model(name, num_classes=7).eval()
    with torch.no_grad():
        for size in ((64, 96), (33, 50), (32, 32)):
            x = torch.randn(1, 3, *size)
            assert model(x).shape == (1, 7)
            assert [m.shape[1] for m in model.forward_intermediates(x)] == list(model.feature_dims)
        model.reset_classifier(0)
        assert model(x).shape == (1, model.num_features)
