"""Mamba against another implementation of it, log-mels by their definition, and what the recognisers promise."""

import itertools

import numpy as np
import pytest
import torch
from scipy.io import wavfile
from torch import nn

from regard.layers import Mamba, vit_init
from regard.proofs import get_proofs
from regard.systems.sequence.samba_asr import LogMel, SambaASR, SpeechTransformer, align_right, mel_bands
from regard.tasks import own_data
from regard.training import train

BUILDS = {
    "concat": lambda: SambaASR(5, 16, 1, 2, d_state=4, mels=20),
    "state": lambda: SambaASR(5, 16, 1, 2, cross="state", d_state=4, mels=20),
    "transformer": lambda: SpeechTransformer(5, 16, 1, 2, num_heads=2, mels=20),
}


def built(name):
    torch.manual_seed(0)
    model = BUILDS[name]().double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def sounds():
    return torch.randn(3, 4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_mamba_is_that_of_transformers_under_its_names():
    published = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    config = pytest.importorskip("transformers").MambaConfig(
        hidden_size=20, state_size=5, conv_kernel=3, expand=3, time_step_rank=4, num_hidden_layers=1
    )
    torch.manual_seed(0)
    ours = Mamba(20, causal=True, d_state=5, d_conv=3, expand=3, dt_rank=4)
    theirs = published.MambaMixer(config, layer_idx=0)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 45, 20)
    outs = ours(x), theirs(x)
    torch.testing.assert_close(*outs)
    grads = []
    for mixer, out in ((ours, outs[0]), (theirs, outs[1])):
        names, parameters = zip(*mixer.named_parameters(), strict=True)
        grads.append(dict(zip(names, torch.autograd.grad(out.square().sum(), parameters), strict=True)))
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-5)


def test_mamba_begins_with_its_time_scales_and_keeps_them_in_hosts():
    mixer = Mamba(32, dt_min=0.01, dt_max=0.2).apply(vit_init)
    for step in (mixer.dt_proj, mixer.dt_proj_b):
        dt = nn.functional.softplus(step.bias)
        assert dt.min() > 0.0099
        assert dt.max() < 0.201
        assert dt.std() > 0.02
    assert torch.equal(mixer.A_b_log.exp().round(), torch.arange(1, 17.0).expand(64, 16))


def test_mamba_on_a_grid_goes_through_its_rows():
    mixer, x = Mamba(8, causal=True).double(), torch.randn(2, 3, 4, 8, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), mixer(x.flatten(1, 2)).unflatten(1, (3, 4)))


@pytest.mark.parametrize("causal", [True, False])
def test_padding_at_either_end_is_as_if_not_there(causal):
    mixer, x = Mamba(8, causal=causal).double(), torch.randn(2, 9, 8, dtype=torch.float64)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[:, 3:12] = True
    padded = torch.randn(2, 16, 8, dtype=torch.float64).masked_scatter(mask[..., None], x)
    torch.testing.assert_close(mixer(padded, mask)[:, 3:12], mixer(x))


def test_mamba_says_what_is_wrong():
    with pytest.raises(ValueError, match="causal=True"):
        Mamba(8).step(torch.zeros(1, 8))
    with pytest.raises(ValueError, match="mask"):
        Mamba(8)(torch.zeros(1, 5, 8), torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="d_state"):
        Mamba(8, d_state=0)
    with pytest.raises(ValueError, match="dt_max"):
        Mamba(8, dt_min=0.1, dt_max=0.01)


def test_log_mels_by_their_definition():
    mel, x = LogMel(20, 8000).double(), torch.randn(2, 1000, dtype=torch.float64)
    features, counts = mel(x, torch.tensor([1000, 450]))
    assert counts.tolist() == [11, 4]
    assert features.shape == (2, 11, 20)
    # One frame, its Fourier transform as a sum; bands as rows of triangles.
    taper = 0.5 - 0.5 * torch.cos(2 * torch.pi * torch.arange(200.0) / 200).double()
    angles = 2 * torch.pi * torch.arange(129.0)[:, None] * torch.arange(200.0) / 256
    spectra = [(torch.exp(-1j * angles.double()) * (x[0, 80 * t : 80 * t + 200] * taper)).sum(1) for t in range(11)]
    energies = torch.stack(spectra).abs().square() @ torch.from_numpy(mel_bands(20, 129, 8000)).double()
    expected = (energies + 1e-6).log()
    expected = (expected - expected.mean(0)) / (expected.var(0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(features[0], expected, rtol=1e-4, atol=1e-4)
    assert not features[1, 4:].any()


def test_mel_bands_cover_the_spectrum_and_none_is_empty():
    bands = mel_bands(80, 257, 16000)
    assert bands.shape == (257, 80)
    assert (abs(bands.sum(1)[3:-15] - 1) < 1e-4).all()  # between the middles of the first band and of the last
    with pytest.raises(ValueError, match="mels"):
        mel_bands(80, 65, 16000)


@pytest.mark.parametrize("name", BUILDS)
def test_a_wide_beam_finds_the_best_answer(name, sounds):
    model = built(name)
    scores = {}
    for length in range(3):
        for answer in itertools.product(range(1, 5), repeat=length):
            targets = torch.tensor([[*answer, 0]])
            logits = model(sounds[:1], None, targets).log_softmax(-1)
            scores[answer] = logits.gather(-1, targets[..., None]).sum().item()
    answers, found = model.search(sounds[:1], None, max_length=3, beam=125)
    ended = [row for row in range(125) if 0 in answers[0, row].tolist()]
    said = answers[0, ended[0]].tolist()
    best = max(scores, key=scores.get)
    assert tuple(said[: said.index(0)]) == best
    assert found[0, ended[0]].item() == pytest.approx(scores[best], abs=1e-5)


@pytest.mark.parametrize("name", BUILDS)
def test_gradients_reach_every_parameter(name, sounds):
    model = built(name)
    out = model(sounds, torch.tensor([4000, 1200, 100]), torch.tensor([[1, 2, 0], [3, 0, -1], [0, -1, -1]]))
    assert out.shape == (3, 3, 5)
    out.square().sum().backward()
    assert not [key for key, parameter in model.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("name", ["concat", "state"])
def test_what_is_kept_of_a_sound_does_not_grow(name):
    model = built(name)
    for samples in (1, 399, 16001):
        kept = model.encode(torch.randn(1, samples, dtype=torch.float64), None)
        assert sum(t.numel() for part in kept for t in torch.utils._pytree.tree_leaves(part)) == model.state_size()


def test_features_are_taken_in_place_of_waveforms(sounds, tmp_path):
    model = built("concat").float()
    sounds, lengths, targets = sounds.float(), torch.tensor([4000, 4000, 900]), torch.tensor([[1, 0]] * 3)
    features, counts = model.log_mel(sounds, lengths)
    expected = model(sounds, lengths, targets)
    torch.testing.assert_close(model(features, counts, targets), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(SambaASR.from_pretrained(tmp_path)(sounds, lengths, targets), expected)


def test_recognisers_say_what_is_wrong(sounds):
    model = built("concat")
    for wrong in (sounds[0], sounds[:, :0], sounds.long(), sounds[:, :, None].expand(-1, -1, 21)):
        with pytest.raises(ValueError, match="inputs"):
            model.listen(wrong)
    with pytest.raises(ValueError, match="lengths"):
        model.listen(sounds, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="cross"):
        SambaASR(cross="sum")


def test_align_right():
    x, mask = align_right(torch.arange(1.0, 7).view(2, 3, 1), torch.tensor([[True, True, False], [True, True, True]]))
    assert x[0, 1:, 0].tolist() == [1, 2]
    assert x[1, :, 0].tolist() == [4, 5, 6]
    assert mask.tolist() == [[False, True, True], [True, True, True]]


def test_the_recipe_trains_on_own_recordings(tmp_path):
    for index, text in enumerate(["yes", "no", "no yes"]):
        (tmp_path / f"{index}.txt").write_text(text)
        wavfile.write(tmp_path / f"{index}.wav", 8000, np.random.default_rng(index).normal(0, 0.1, 3000))
    with own_data(str(tmp_path)):
        recipe = get_proofs("samba_asr").recipe("smoke")
    assert recipe.task.alphabet == sorted(set("yes no"))
    assert "symbol_error_rate" in train(recipe.model, recipe.task, recipe.config, cpu=True).metrics
