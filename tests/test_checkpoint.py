"""Loading: names are mapped strictly, nothing in a file is executed, and errors say what to do."""

from __future__ import annotations

import pickle

import pytest
import safetensors.torch
import torch

import regard
from regard.checkpoint import KeyMap, read_state_dict
from regard.proofs import Recording
from regard.systems.backbones.swin import SwinTransformer


@pytest.fixture
def authors():
    """The recorded weights of a small Swin under the authors' names, and our model in that configuration."""
    recording = Recording.read("swin.model")
    model = SwinTransformer(
        dim=8, depths=(2, 2, 1, 1), num_heads=(2, 2, 4, 4), window_size=4, mlp_ratio=2.0, patch_size=2, img_size=32,
        num_classes=10,
    )  # fmt: skip
    return model.eval(), recording


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("wrap", [False, True])
def test_loads_files(tmp_path, authors, suffix, wrap):
    model, recording = authors
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(recording.params, str(path))
    else:
        state = {f"module.{key}": value for key, value in recording.params.items()} if wrap else recording.params
        torch.save({"model": state, "epoch": 3} if wrap else state, path)
    regard.load_authors_weights(model, path)
    torch.testing.assert_close(model(recording.inputs["x"]), recording.outputs["logits"])


def test_missing_extra_and_wrong_shapes_are_named(authors):
    model, recording = authors
    before = {key: value.clone() for key, value in model.state_dict().items()}
    lacking = {key: value for key, value in recording.params.items() if key != "head.bias"}
    with pytest.raises(ValueError, match=r"1 missing, first \['head.bias'\]"):
        regard.load_authors_weights(model, lacking)
    with pytest.raises(ValueError, match=r"1 left over, first \['surplus'\]"):
        regard.load_authors_weights(model, recording.params | {"surplus": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"head.weight: \(3, 64\) for \(10, 64\)"):
        regard.load_authors_weights(model, recording.params | {"head.weight": torch.zeros(3, 64)})
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), "a refused checkpoint changed the model"


def test_no_code_is_executed(tmp_path):
    marker = tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    path = tmp_path / "evil.pth"
    torch.save({"model": {"weight": torch.zeros(2)}, "args": Evil()}, path)
    with pytest.raises(ValueError, match="never executes"):
        read_state_dict(path)
    raw = tmp_path / "evil.pkl"
    raw.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="never executes"):
        read_state_dict(raw)
    assert not marker.exists()


def test_truncated_and_foreign_files(tmp_path):
    whole = tmp_path / "whole.safetensors"
    safetensors.torch.save_file({"weight": torch.zeros(64)}, str(whole))
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        read_state_dict(cut)
    torch.save({"weight": torch.zeros(64)}, tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:200])
    with pytest.raises(ValueError, match="truncated"):
        read_state_dict(tmp_path / "cut.pth")
    (tmp_path / "text.bin").write_text("hello")
    with pytest.raises(ValueError, match="cannot be read as tensors"):
        read_state_dict(tmp_path / "text.bin")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="not a state dict"):
        read_state_dict(tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match="holds no state dict"):
        read_state_dict(tmp_path / "empty.pth")
    with pytest.raises(FileNotFoundError, match="no checkpoint file"):
        read_state_dict(tmp_path / "nowhere.pth")


def test_tables_of_another_window_are_resized(authors):
    _, recording = authors
    larger = SwinTransformer(
        dim=8, depths=(2, 2, 1, 1), num_heads=(2, 2, 4, 4), window_size=6, mlp_ratio=2.0, patch_size=2, img_size=96,
        num_classes=10,
    ).eval()  # fmt: skip
    regard.load_authors_weights(larger, recording.params)
    assert larger.stages[0][0].mixer.bias.table.shape == (121, 2)
    assert larger(torch.randn(1, 3, 96, 96)).shape == (1, 10)


def test_key_map_converts():
    keys = KeyMap(
        rules=[(r"^old\.", "new.")],
        drop=["index$"],
        convert=lambda key, value: {key: value.t()} if "w" in key else {key: value},
    )
    ours = keys.apply({"old.w": torch.zeros(2, 3), "old.index": torch.zeros(1), "b": torch.zeros(1)})
    assert {key: tuple(value.shape) for key, value in ours.items()} == {"new.w": (3, 2), "b": (1,)}
