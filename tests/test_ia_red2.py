"""What the shared tests cannot know of IA-RED²: its stages, and what learns from the policy loss."""

from __future__ import annotations

import pytest
import torch

from regard.systems.backbones.ia_red2 import IARED2, InterpretedAttention


def build() -> IARED2:
    torch.manual_seed(0)
    return IARED2(dim=24, num_heads=2, groups=(1, 2), patch_size=4, img_size=16, num_classes=3)


def test_stages_say_who_learns_and_who_drops():
    model, x, labels = build(), torch.randn(6, 3, 16, 16), torch.tensor([0, 1, 2, 0, 1, 2])
    for active, learns, expected in (
        (1, "interpreter", {"interpreters.0"}),
        (2, "interpreter", {"interpreters.1"}),
        (2, "blocks", {"blocks.1", "blocks.2", "norm", "head"}),
    ):
        model.stage(active, learns).zero_grad()
        loss = model.policy_loss(x, labels) if learns == "interpreter" else model(x).sum()
        loss.backward()
        learning = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert {".".join(name.split(".")[: 1 if name[0] in "nh" else 2]) for name in learning} == expected
        model.zero_grad()
    first, second = model.stage(2).interpret(x).keeps
    assert (second <= first).all(), "a dropped token came back"
    assert (second[:, 0] == 1).all(), "the class token was dropped"
    assert not model.stage(0).interpret(x).keeps
    with pytest.raises(ValueError, match="active"):
        model.stage(3)
    with pytest.raises(ValueError, match="active"):
        model.stage(0, "interpreter")
    with pytest.raises(ValueError, match="learns"):
        model.stage(1, "head")


def test_gathered_form_takes_any_batch():
    model = build().eval()
    x = torch.randn(3, 3, 21, 12)
    with torch.no_grad():
        torch.testing.assert_close(model.forward_gathered(x), model(x), rtol=1e-4, atol=1e-5)
        assert model.forward_gathered(x[:0]).shape == (0, 3)


def test_mixer_survives_that_nothing_is_left():
    mixer = InterpretedAttention(8, 2)
    torch.nn.init.zeros_(mixer.interpreter.qk.weight)
    torch.nn.init.zeros_(mixer.interpreter.qk.bias)  # every score is 0.5, which is not above 0.5
    x = torch.randn(2, 5, 8, requires_grad=True)
    out = mixer(x)
    torch.testing.assert_close(out, mixer.attention.proj.bias.expand_as(out))
    out.sum().backward()
    assert torch.isfinite(x.grad).all()
