"""Agent and InLine attention in their hosts: names of the authors' checkpoints, other sizes; AgentSD on and off."""

from __future__ import annotations

import re

import pytest
import torch

from regard import create_mixer, load_authors_weights, ops
from regard.layers import CrossShaped
from regard.systems.backbones._agent_sd import AgentSD, DiffusionBlock, apply_agent_sd, match_tokens
from regard.systems.backbones.agent_attention import AgentAttention, AgentCSWin, AgentDeiT, AgentSwin
from regard.systems.backbones.inline_attention import InLineCSWin, InLineDeiT

SMALL = {"num_classes": 5, "in_chans": 1}
CSWIN = {
    "dim": 8,
    "depths": (1, 2, 1, 1),
    "num_heads": (2, 2, 4, 4),
    "img_size": 64,
    "stripes": (1, 2, 2, None),
    **SMALL,
}
DEIT = {"dim": 24, "depth": 3, "num_heads": 3, "patch_size": 4, "img_size": 16, **SMALL}
MODELS = {
    "agent_deit": lambda: AgentDeiT(agent_blocks=2, agent_size=2, **DEIT),
    "inline_deit": lambda: InLineDeiT(**DEIT),
    "agent_cswin": lambda: AgentCSWin(agent_blocks=(1, 1, 0, 0), agent_size=(2, 2, 2, 2), **CSWIN),
    "inline_cswin": lambda: InLineCSWin(inline_blocks=(1, 1, 0, 0), **CSWIN),
}

TABLES = {
    "gather_map": ("an_bias", lambda t: t),
    "read_map": ("na_bias", lambda t: t),
    "gather_lines.0": ("ah_bias", lambda t: t[None, ..., None]),
    "gather_lines.1": ("aw_bias", lambda t: t[None, :, :, None]),
    "read_lines.0": ("ha_bias", lambda t: t.transpose(1, 2)[None, :, :, None]),
    "read_lines.1": ("wa_bias", lambda t: t.transpose(1, 2)[None, :, None]),
    "gather_class": ("ac_bias", lambda t: t[None, ..., None]),
    "read_class": ("ca_bias", lambda t: t[None, :, None]),
}


def as_released(model):
    """The state dict under the authors' names and in their layouts."""
    names = [
        (r"^stem\.", "stage1_conv_embed." if isinstance(model, (AgentCSWin, InLineCSWin)) else "patch_embed."),
        (r"^stage1_conv_embed\.proj", "stage1_conv_embed.0"),
        (r"^stage1_conv_embed\.norm", "stage1_conv_embed.2"),
        (r"^downs\.(\d)\.proj", r"merge\1.conv"),
        (r"^downs\.(\d)\.norm", r"merge\1.norm"),
        (r"^stages\.(\d)\.", lambda m: f"stage{int(m[1]) + 1}."),
        (r"mixer\.branches\.(\d)\.", r"attns.\1."),
        (r"(stage.*)mixer\.(qkv|proj)", r"\1\2"),
        (r"(attns.*)\.local\.", r"\1.get_v."),
        (r"(blocks.*)\.local\.", r"\1.dwc."),
        (r"mixer\.", "attn."),
        (r"core\.", ""),
        (r"residual\.kernels\.", "residual."),
    ]
    state = {}
    for key, value in model.state_dict().items():
        for pattern, replacement in names:
            key = re.sub(pattern, replacement, key)
        home, found, table = key.partition("bias.")
        if found and table in TABLES:
            key, value = home + TABLES[table][0], TABLES[table][1](value)
        state[key] = value
    for key in [key for key in state if ".q." in key]:  # softmax blocks of DeiT: one matrix in the release
        other = key.replace(".q.", ".kv.")
        state[key.replace(".q.", ".qkv.")] = torch.cat([state.pop(key), state.pop(other)])
    return state


@pytest.mark.parametrize("name", MODELS)
def test_authors_names_load_where_no_recording_has_them(name):
    first, second = MODELS[name]().eval(), MODELS[name]().eval()
    released = as_released(first)
    assert any(key.endswith(("attn.qkv.weight", "stage1.0.qkv.weight")) for key in released)
    load_authors_weights(second, released)
    x = torch.randn(1, 1, 64, 64)
    assert torch.equal(first(x), second(x))
    missing = released.popitem()[0]
    with pytest.raises(ValueError, match="missing"):
        load_authors_weights(second, released)
    assert missing


@pytest.mark.parametrize("size", [(64, 64), (37, 50), (3, 5)])
@pytest.mark.parametrize("name", MODELS)
def test_other_images_run(name, size):
    model = MODELS[name]().eval()
    assert model(torch.randn(2, 1, *size)).shape == (2, 5)


def test_without_input_size_nothing_depends_on_the_grid():
    shapes = [{key: p.shape for key, p in AgentAttention(16, 2, axes=axes).named_parameters()} for axes in (1, 2)]
    assert not any("lines" in key for key in shapes[0] | shapes[1])
    mixer = create_mixer("agent", 16, num_heads=2)
    for size in ((1, 1), (3, 9), (20, 4)):
        assert mixer(torch.randn(1, *size, 16)).shape == (1, *size, 16)


def test_agents_see_the_whole_map_and_windows_do_not():
    model = AgentSwin(dim=8, depths=(1,), num_heads=(2,), agent_size=(2,), agent_blocks=(1,), img_size=32, **SMALL)
    x = torch.randn(1, 1, 32, 32, requires_grad=True)
    model.forward_intermediates(x)[0][0, :, 0, 0].sum().backward()
    assert x.grad[0, 0, -1, -1].abs() > 0


def test_class_token_is_given_and_taken():
    mixer = AgentAttention(16, 2, input_size=(4, 4), class_token=True)
    grid, first = mixer(torch.randn(2, 4, 4, 16), torch.randn(2, 1, 16))
    assert grid.shape == (2, 4, 4, 16)
    assert first.shape == (2, 1, 16)
    with pytest.raises(ValueError, match="class_token=True"):
        mixer(torch.randn(2, 4, 4, 16))


def test_agent_sd_goes_on_and_off():
    torch.manual_seed(0)
    model = torch.nn.Sequential(DiffusionBlock(16, 2, 8)).eval()
    x = torch.randn(2, 8, 12, 16)
    with torch.no_grad():
        plain = model(x)
        apply_agent_sd(model, AgentSD(random_targets=False))
        merged = model(x)
        assert not torch.equal(plain, merged)
        assert torch.equal(merged, model(x))
        apply_agent_sd(model, AgentSD.at_step(20))
        block = model[0]
        first, second = (block(x, generator=torch.Generator().manual_seed(1)) for _ in range(2))
        assert torch.equal(first, second)
        apply_agent_sd(model, AgentSD(min_tokens=97))
        assert torch.equal(plain, model(x))
        apply_agent_sd(model, None)
        assert torch.equal(plain, model(x))
        assert torch.equal(model(x[:0]), plain[:0])
    with pytest.raises(ValueError, match="DiffusionBlock"):
        apply_agent_sd(torch.nn.Linear(2, 2), None)


def test_merging_nothing_changes_nothing():
    x = torch.randn(1, 5, 6, 4)
    matching = match_tokens(x, 2)
    tokens = x.flatten(1, 2)
    assert torch.equal(matching.unmerge(matching.merge(tokens, 0), 0), tokens)


def test_stripes_at_the_end_of_a_map_are_narrower():
    torch.manual_seed(0)
    mixer, x = CrossShaped(8, 2, stripe=3).double(), torch.randn(1, 7, 5, 8, dtype=torch.float64)
    for branch in mixer.branches:
        torch.nn.init.zeros_(branch.local.weight)
        torch.nn.init.zeros_(branch.local.bias)
    q, k, v = (t.unflatten(-1, (2, 4)) for t in mixer.qkv(x).chunk(3, -1))
    halves = [
        ops.window_attention(*(t[..., head : head + 1, :] for t in (q, k, v)), window_size=size)
        for head, size in enumerate(((7, 3), (3, 5)))
    ]
    torch.testing.assert_close(mixer(x), mixer.proj(torch.cat(halves, -2).flatten(-2)))
