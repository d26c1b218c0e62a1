"""What the shared tests cannot know of IA-RED²: its stages, what learns from the policy loss, and its video side."""

from __future__ import annotations

import pytest
import torch

from regard.checkpoint import load_authors_weights
from regard.proofs.ia_red2 import PROOFS
from regard.proofs.recordings import Recording
from regard.skeletons import TimeSformer
from regard.systems.backbones.ia_red2 import IARED2, IARED2TimeSformer, InterpretedAttention


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


CLIPS = {"dim": 24, "num_heads": 2, "patch_size": 4, "img_size": 16, "num_frames": 3, "num_classes": 3}


def test_video_model_stages_and_learns_as_the_image_model():
    torch.manual_seed(0)
    model, x, labels = IARED2TimeSformer(groups=(1, 2), **CLIPS), torch.randn(3, 3, 3, 16, 16), torch.tensor([0, 1, 2])
    model.stage(2, "interpreter").policy_loss(x, labels).backward()
    learning = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learning == {"interpreters.1.qk.weight", "interpreters.1.qk.bias"}
    first, second = model.stage(2).interpret(x).keeps
    assert first.shape == (3, 49)
    assert (second <= first).all()
    model(x).sum().backward()
    silent = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert silent == {f"interpreters.0.qk.{name}" for name in ("weight", "bias")}


@pytest.mark.parametrize("shape", [(1, 1, 5), (3, 16, 16), (5, 9, 21)])
def test_clips_of_any_length_and_size(shape):
    torch.manual_seed(0)
    x = torch.randn(2, shape[0], 3, *shape[1:])
    for model in (TimeSformer(depth=2, **CLIPS), IARED2TimeSformer(groups=(1, 1), **CLIPS)):
        model.eval()
        grid = (shape[0], -(-shape[1] // 4), -(-shape[2] // 4))
        assert model(x).shape == (2, 3)
        (last,) = model.forward_intermediates(x, [-1])
        assert last.shape == (2, grid[0], 24, *grid[1:])
        assert model(x[:0]).shape == (0, 3)
    torch.testing.assert_close(model.forward_gathered(x), model(x), rtol=1e-4, atol=1e-5)
    model.reset_classifier(0)
    assert model(x).shape == (2, 24)
    with pytest.raises(ValueError, match="frames"):
        model(x[:, :, :2])
    with pytest.raises(ValueError, match="indices"):
        model.forward_intermediates(x, [2])


def test_published_weights_of_the_host_are_a_start():
    case, recording = PROOFS.recordings[-1], Recording.read("ia_red2.timesformer")
    config, plain = recording.about["constructor"], case.build(recording.about["constructor"])
    same = {
        name: config[name] for name in ("num_heads", "mlp_ratio", "patch_size", "img_size", "num_frames", "num_classes")
    }
    model = IARED2TimeSformer(dim=config["embed_dim"], groups=(1, 1), **same).eval()
    for target in (plain, model):
        load_authors_weights(target, recording.params)
    x = recording.inputs["x"].transpose(1, 2)
    torch.testing.assert_close(model.stage(0)(x), plain.eval()(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="missing"):
        load_authors_weights(model, {name: value for name, value in recording.params.items() if "fc1" not in name})


def test_fresh_timesformer_treats_frames_as_images_and_is_exported():
    model = TimeSformer(depth=2, **CLIPS).eval()
    x = torch.randn(2, 3, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(model(x.flip(1)), model(x))
        torch.nn.init.normal_(model.time_embed)
        assert not torch.allclose(model(x.flip(1)), model(x))
        exported = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(exported(x), model(x))


def test_mixer_survives_that_nothing_is_left():
    mixer = InterpretedAttention(8, 2)
    torch.nn.init.zeros_(mixer.interpreter.qk.weight)
    torch.nn.init.zeros_(mixer.interpreter.qk.bias)  # every score is 0.5, which is not above 0.5
    x = torch.randn(2, 5, 8, requires_grad=True)
    out = mixer(x)
    torch.testing.assert_close(out, mixer.attention.proj.bias.expand_as(out))
    out.sum().backward()
    assert torch.isfinite(x.grad).all()
