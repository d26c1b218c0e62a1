"""What the shared tests cannot know of Sparsifiner: its stages, and the loss that a layer brings along."""

from __future__ import annotations

import torch

from regard.layers import attach_loss
from regard.systems.backbones.sparsifiner import Sparsifiner


def test_attached_loss_adds_its_gradient_and_nothing_else():
    x, weight = torch.randn(3, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    out = attach_loss(x, weight**2)
    assert torch.equal(out, x)
    (5 * out.sum()).backward()
    torch.testing.assert_close(x.grad, torch.full((3,), 5.0))
    torch.testing.assert_close(weight.grad, torch.tensor(4.0))


def test_stages_train_predictors_or_the_rest():
    torch.manual_seed(0)
    model = Sparsifiner(dim=16, depth=2, num_heads=2, patch_size=4, img_size=16, num_classes=3).train()
    x = torch.randn(2, 3, 16, 16)
    for stage, predictors, rest in (("reconstruct", True, False), ("distill", False, True), ("joint", True, True)):
        model.stage(stage).zero_grad()
        model(x).sum().backward()
        learning = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert any(".predictor." in name for name in learning) == predictors
        assert any(".predictor." not in name for name in learning) == rest
    # While predictors learn, attention is dense: the masks do not matter.
    model.stage("reconstruct").eval()
    dense = model(x)
    model.blocks[0].mixer.core.predictor.proj_back_n.data.normal_()
    torch.testing.assert_close(model(x), dense)
    model.stage("distill")
    assert not torch.allclose(model(x), dense)
