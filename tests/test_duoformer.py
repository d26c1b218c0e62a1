"""What the shared tests cannot know of DuoFormer: the authors' names of the whole model, its options, its refusals."""

from __future__ import annotations

import pytest
import torch

import regard
from regard.systems.backbones.duoformer import DuoFormer, ScalePatchFormer

TINY = {"dim": 8, "depths": (2, 2), "num_heads": 2, "img_size": 64, "num_classes": 3}
SMALL_TRUNK = {"width": 4, "trunk_depths": (2, 1, 1, 1), "bottleneck": False}


def authors_names(model):
    """The state dict as the released code names it."""
    theirs = {}
    for name, value in model.state_dict().items():
        if name.endswith((".kv.weight", ".kv.bias")):
            continue
        if ".q." in name:
            value = torch.cat([value, model.state_dict()[name.replace(".q.", ".kv.")]])
        parts = name.replace(".q.", ".qkv.").split(".")
        if parts[:2] == ["trunk", "stem"]:
            key = f"resnet_projector.{0 if parts[2] == 'conv' else 1}.{parts[-1]}"
        elif parts[0] == "trunk":
            stage, block, layer, kind = parts[2:6]
            unit = f"{'conv' if kind == 'conv' else 'bn'}{layer[-1]}"
            if layer == "shortcut":
                unit = f"downsample.{0 if kind == 'conv' else 1}"
            key = f"resnet_projector.{int(stage) + 4}.{block}.{unit}.{parts[-1]}"
        elif parts[0] == "projections":
            key = f"projection.proj_heads{3 - int(parts[1])}.{parts[2]}"
        elif parts[:2] == ["token", "reduce"]:
            key = f"chann_proj{int(parts[2]) + 1}.conv{int(parts[3]) + 1}.{parts[4]}"
        elif parts[0] == "token":
            key = f"chann_proj_all.nConvs.{parts[2]}.{'conv' if parts[3] == '0' else 'norm'}.{parts[4]}"
        else:
            tables = {"scale_position": "pos_embed_for_scale", "patch_position": "pos_embed", "norm": "fc_norm"}
            rest = ".".join(tables.get(part, part) for part in parts if part != "former")
            rest = rest.replace("scale_blocks", "scaleBlocks").replace(".mixer.", ".attn.")
            if rest.startswith("patch_layers"):
                rest = "blocks." + parts[2] + ".attn." + ".".join(parts[3:])
            key = f"vision_transformer.{rest}"
        pointwise = value.dim() == 2 and key.startswith(("resnet", "projection"))
        theirs[key] = value[:, :, None, None] if pointwise else value
    return theirs


@pytest.mark.parametrize("bottleneck", [False, True])
def test_the_whole_model_loads_under_the_authors_names(bottleneck):
    first, second = (DuoFormer(**TINY, **{**SMALL_TRUNK, "bottleneck": bottleneck}, scales=3).eval() for _ in range(2))
    regard.load_authors_weights(second, authors_names(first))
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(first(x), second(x))


@pytest.mark.parametrize("options", [{"scales": 1}, {"scale_token": "learned"}, {"patch_residual": True}])
def test_options_change_the_model_and_run_on_any_size(options):
    model = DuoFormer(**TINY, **SMALL_TRUNK, **options).eval()
    for size in ((64, 64), (33, 70), (1, 1)):
        assert model(torch.randn(1, 3, *size)).shape == (1, 3)
    model.train()(torch.randn(2, 3, 64, 64)).sum().backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


def test_quirks_leave_the_norm_out():
    torch.manual_seed(0)
    model = DuoFormer(**TINY, **SMALL_TRUNK, authors_quirks=True).eval()
    x = torch.randn(1, 3, 64, 64)
    whole = model(x)
    model.norm.weight.data.zero_()
    assert torch.equal(model(x), whole)
    model.authors_quirks = False
    assert not torch.equal(model(x), whole)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="scales"):
        DuoFormer(**TINY, **SMALL_TRUNK, scales=5)
    with pytest.raises(ValueError, match="scale_token"):
        DuoFormer(**TINY, **SMALL_TRUNK, scale_token="random")
    with pytest.raises(ValueError, match="6 tokens of each patch"):
        ScalePatchFormer(8, 2, tokens=6, depths=(1, 1)).mix_scales(torch.randn(1, 49, 22, 8))
