"""One contract for every mixer and every image model."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import Float

import regard
from image_models import smallest_image_models
from regard.flops import count_params
from regard.registry import list_mixers, mixer_class
from regard.skeletons.host import build_in_stack

GRIDS = {1: (12,), 2: (8, 10), 3: (4, 6, 5)}
DIM, HEADS = 32, 4
MIXERS = [(name, axes) for name in list_mixers() for axes in getattr(mixer_class(name), "dims", (2,))]
CAUSAL = [name for name in list_mixers() if getattr(mixer_class(name), "can_causal", False)]


def build(name, axes, index=0, **options):
    torch.manual_seed(index)
    return build_in_stack(name, index, GRIDS[axes], DIM, HEADS, **options)


@pytest.mark.parametrize(("name", "axes"), MIXERS)
def test_mixer_keeps_shape_and_reaches_every_parameter(name, axes):
    for index in (0, 1):
        mixer = build(name, axes, index)
        x = torch.randn(2, *GRIDS[axes], DIM, requires_grad=True)
        out = mixer(x)
        assert isinstance(out, Float[torch.Tensor, f"2 {' '.join(map(str, GRIDS[axes]))} {DIM}"])
        assert out.dtype == x.dtype
        (out * torch.randn_like(out)).sum().backward()
        assert x.grad is not None
        assert torch.isfinite(x.grad).all()
        silent = [key for key, parameter in mixer.named_parameters() if parameter.grad is None]
        assert not silent, f"no gradient reaches {silent}"


@pytest.mark.parametrize(("name", "axes"), MIXERS)
def test_mixer_is_a_function_of_each_sample(name, axes):
    mixer = build(name, axes).eval()
    x = torch.randn(3, *GRIDS[axes], DIM)
    with torch.no_grad():
        whole = mixer(x)
        assert torch.equal(whole, mixer(x)), "two runs differ"
        torch.testing.assert_close(mixer(x[1:2]), whole[1:2], rtol=1e-4, atol=1e-5)
        assert mixer(x[:0]).shape == (0, *x.shape[1:])
        view = x.transpose(0, 1).contiguous().transpose(0, 1)
        torch.testing.assert_close(mixer(view), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "axes"), MIXERS)
def test_mixer_saves_and_loads(name, axes):
    first, second = build(name, axes).eval(), build(name, axes, index=0).eval()
    for parameter in second.parameters():
        torch.nn.init.normal_(parameter)
    second.load_state_dict(first.state_dict())
    x = torch.randn(1, *GRIDS[axes], DIM)
    assert torch.equal(first(x), second(x))


@pytest.mark.parametrize(("name", "axes"), MIXERS)
def test_mixer_refuses_what_it_cannot_take(name, axes):
    mixer = build(name, axes)
    for x in (torch.randn(2, DIM), torch.randn(2, *GRIDS[axes], DIM + 1), torch.zeros(2, *GRIDS[axes], DIM).long()):
        with pytest.raises(ValueError, match=r"\bx\b"):
            mixer(x)


@pytest.mark.parametrize("name", list_mixers())
def test_heads_must_divide(name):
    if not getattr(mixer_class(name), "has_heads", True):
        pytest.skip("has no heads")
    with pytest.raises(ValueError, match=r"num_heads|dim"):
        build_in_stack(name, 0, GRIDS[2 if 2 in mixer_class(name).dims else 1], DIM, 5)


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_mixers_see_no_future(name):
    mixer = build(name, 1, causal=True).double().eval()
    x = torch.randn(1, *GRIDS[1], DIM, dtype=torch.float64)
    for t in range(1, x.shape[1]):
        other = x.clone()
        other[:, t:] += 1
        torch.testing.assert_close(mixer(x)[:, :t], mixer(other)[:, :t])


@pytest.mark.parametrize("name", CAUSAL)
def test_streaming_equals_all_at_once(name):
    mixer = build(name, 1, causal=True).eval()
    x = torch.randn(2, 40, DIM)
    state, outs = None, []
    for token in x.unbind(1):
        out, state = mixer.step(token, state)
        outs.append(out)
    torch.testing.assert_close(torch.stack(outs, 1), mixer(x), rtol=1e-4, atol=1e-5)
    assert mixer.state_size(40) >= 0


@pytest.mark.parametrize("name", [name for name in list_mixers() if getattr(mixer_class(name), "can_cross", False)])
def test_cross_mixers_read_the_context(name):
    mixer = build(name, 1).eval()
    x, context = torch.randn(2, 5, DIM), torch.randn(2, 9, DIM, requires_grad=True)
    out = mixer(x, context)
    assert out.shape == x.shape
    assert torch.autograd.grad(out.sum(), context)[0].abs().sum() > 0


@pytest.mark.parametrize("name", list_mixers())
def test_mixer_states_its_cost(name):
    axes = 2 if 2 in mixer_class(name).dims else 1
    mixer = build(name, axes)
    if not hasattr(mixer, "cost"):
        pytest.skip("not a grid mixer")
    cost = mixer.cost(GRIDS[axes])
    assert cost.params == count_params(mixer)
    assert cost.macs >= 0


@pytest.mark.parametrize("name", list_mixers())
def test_mixer_in_bfloat16(name):
    axes = 2 if 2 in mixer_class(name).dims else 1
    mixer = build(name, axes).bfloat16().eval()
    out = mixer(torch.randn(2, *GRIDS[axes], DIM).bfloat16())
    assert out.dtype == torch.bfloat16
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("name", smallest_image_models())
def test_image_model_keeps_the_interface(name):
    model = regard.create_model(name, num_classes=7).eval()
    x = torch.randn(1, 3, 96, 128)
    features = model.forward_features(x)
    with torch.no_grad():
        logits = model.forward_head(features)
        assert logits.shape == (1, 7)
        assert torch.equal(model(x), model(x))
        pooled = model.forward_head(features, pre_logits=True)
        assert pooled.shape[0] == 1
        maps = model.forward_intermediates(x)
        assert [m.shape[1] for m in maps] == list(model.feature_dims)
        assert all(m.dim() == 4 for m in maps)
        model.reset_classifier(3)
        assert model(x).shape == (1, 3)
        model.reset_classifier(0)
        assert torch.equal(model(x), model.forward_head(model.forward_features(x), pre_logits=True))
    with pytest.raises(ValueError, match="Images are channels first"):
        model(torch.randn(1, 64, 64, 3))
    with pytest.raises(ValueError, match="indices"):
        model.forward_intermediates(x, [99])


def test_hub_round_trip(tmp_path):
    from regard.systems.backbones.swin import SwinTransformer

    model = SwinTransformer(dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4, img_size=32, num_classes=5).eval()
    model.save_pretrained(tmp_path)
    again = SwinTransformer.from_pretrained(tmp_path).eval()
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(model(x), again(x))
