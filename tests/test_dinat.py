"""What the shared tests cannot know of NAT and DiNAT."""

from __future__ import annotations

import pytest
import torch

from regard.checkpoint import load_authors_weights
from regard.systems.backbones.dinat import DiNAT, IsotropicDiNAT, NeighborhoodAttention


def tiny(**options):
    torch.manual_seed(0)
    options = {"kernel_size": 3, "dilations": ((1, 2), (1,)), "drop_path_rate": 0.0, "num_classes": 3, **options}
    return DiNAT(dim=8, depths=(2, 1), num_heads=(1, 2), **options).eval()


def authors_names(model):
    return {
        key.replace("stem.", "patch_embed.")
        .replace("stages.0.", "levels.0.blocks.")
        .replace("stages.1.", "levels.1.blocks.")
        .replace("mixer", "attn")
        .replace("downs.1", "levels.0.downsample"): value
        for key, value in model.state_dict().items()
    }


def test_blocks_of_a_stack_alternate_and_fit():
    near, far = (NeighborhoodAttention.in_stack(index, (30, 5), 8, 2) for index in (0, 1))
    assert near.kernel_size == far.kernel_size == (7, 5)
    assert near.dilation == (1, 1)
    assert far.dilation == (4, 1)
    assert NeighborhoodAttention.in_stack(1, (4, 1), 8, 2).kernel_size == (3, 1)


def test_padding_is_seen_except_along_causal_axes():
    x = torch.randn(1, 4, 8)
    for causal in (False, True):
        mixer = NeighborhoodAttention(8, 2, kernel_size=7, causal=causal, axes=1)
        torch.nn.init.normal_(mixer.qkv.bias)
        changed = NeighborhoodAttention(8, 2, kernel_size=7, causal=causal, axes=1)
        changed.load_state_dict(mixer.state_dict())
        wider = NeighborhoodAttention(8, 2, kernel_size=4, causal=causal, axes=1, rel_pos_bias=False)
        mixer.rpb = None
        wider.load_state_dict(mixer.state_dict())
        assert torch.allclose(mixer(x), wider(x), atol=1e-6) is causal


def test_step_is_refused_where_it_would_differ():
    for options in ({"axes": 1}, {"axes": 2, "causal": True}, {"axes": 1, "causal": True, "stride": 2}):
        mixer = NeighborhoodAttention(8, 2, kernel_size=3, **options)
        assert mixer.state_size(10) is None
        with pytest.raises(ValueError, match="step needs"):
            mixer.step(torch.randn(1, 8))


def test_weights_of_another_kernel_size_are_resized():
    small, large = tiny(), tiny(kernel_size=5)
    load_authors_weights(large, authors_names(small))
    assert torch.equal(large.stages[0][0].mixer.qkv.weight, small.stages[0][0].mixer.qkv.weight)
    table = torch.nn.functional.interpolate(small.stages[1][0].mixer.rpb[None], (9, 9), mode="bicubic")[0]
    torch.testing.assert_close(large.stages[1][0].mixer.rpb, table)


@pytest.mark.parametrize("kernel_size", [3, None])
def test_isotropic_models_run_at_other_sizes(kernel_size):
    model = IsotropicDiNAT(16, 2, 2, kernel_size, patch_size=8, img_size=32, num_classes=3)
    assert model(torch.randn(1, 3, 40, 19)).shape == (1, 3)


def test_models_save_and_load(tmp_path):
    model = tiny(layer_scale=1e-5)
    model.save_pretrained(tmp_path)
    x = torch.randn(1, 3, 32, 40)
    assert torch.equal(DiNAT.from_pretrained(tmp_path).eval()(x), model(x))
    assert all(key.endswith("rpb") for key in model.no_weight_decay())
