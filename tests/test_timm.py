"""The models in timm's registry (skipped where timm is not installed)."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import regard
from image_models import smallest_image_models
from regard.registry import find_variant


@pytest.fixture(scope="module")
def timm():
    timm = pytest.importorskip("timm")
    import regard.timm  # noqa: F401  what it does is register

    return timm


def test_every_image_model_is_registered(timm):
    registered = timm.list_models("regard_*")
    assert {f"regard_{name}" for name in smallest_image_models()} <= set(registered)
    assert "regard_hat_x2" not in registered  # restores images
    for name in ("regard_cswin_tiny", "regard_swin_base_384", "regard_dhvt_tiny_cifar_patch2"):
        _, variant = find_variant(name.removeprefix("regard_"))
        cfg = timm.get_pretrained_cfg(name)
        assert cfg.input_size == variant.inputs[0][1:]
        assert cfg.num_classes == variant.options.get("num_classes", 1000)
        assert not timm.is_model_pretrained(name)


def test_created_as_timm_creates(timm):
    from timm.data import resolve_data_config

    options = {"num_classes": 5, "in_chans": 1, "drop_path_rate": 0.3, "drop_rate": 0.0, "global_pool": None}
    model = timm.create_model("regard_cswin_tiny", depths=(1, 1, 2, 1), **options).eval()
    assert model.num_classes == 5
    assert max(getattr(m, "rate", 0) for m in model.modules()) == pytest.approx(0.3)
    assert model(torch.randn(2, 1, 64, 96)).shape == (2, 5)
    assert model.get_classifier() is model.head
    assert resolve_data_config({}, model=model)["input_size"] == (3, 224, 224)
    with pytest.raises(ValueError, match="drop_path_rate"):
        timm.create_model("regard_cswin_tiny", drop_rate=0.1)
    with pytest.raises(ValueError, match="colour"):
        timm.create_model("regard_cswin_tiny", colour="red")


def test_features_only(timm):
    make = {"model_name": "regard_efficientvit_m0", "features_only": True}
    model = timm.create_model(**make, out_indices=(0, -1)).eval()
    maps = model(torch.randn(1, 3, 128, 192))
    assert [m.shape[1] for m in maps] == model.feature_info.channels() == [64, 192]
    assert model.feature_info.reduction() == [16, 64]
    assert [tuple(m.shape[2:]) for m in maps] == [(8, 12), (2, 3)]
    assert len(timm.create_model(**make, out_indices=2).out_indices) == 2
    with pytest.raises(ValueError, match="out_indices"):
        timm.create_model(**make, out_indices=(0, 3))


def test_own_checkpoint(timm, tmp_path):
    trained = regard.create_model("shvit_s1", num_classes=4).eval()
    torch.save({"state_dict": trained.state_dict()}, tmp_path / "last.pth")
    model = timm.create_model("regard_shvit_s1", num_classes=4, checkpoint_path=str(tmp_path / "last.pth")).eval()
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(model(x), trained(x))


def test_authors_weights(timm, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="pretrained_cfg_overlay"):
        timm.create_model("regard_shvit_s1", pretrained=True)
    given = []
    monkeypatch.setattr("regard.timm.load_authors_weights", lambda model, weights: given.append((model, weights)))
    model = timm.create_model(
        "regard_shvit_s1", pretrained=True, num_classes=3, pretrained_cfg_overlay={"file": "authors.pth"}
    )
    assert given == [(model, "authors.pth")]
    assert model.head.out_features == 3


def test_says_what_is_missing():
    hidden = "import sys; sys.modules['timm'] = None; import regard.timm"
    done = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True, check=False)
    assert "pip install 'regard[timm]'" in done.stderr
