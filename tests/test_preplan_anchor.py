"""Attention maps of models that show them or not, head sets, credit, models of transformers."""

import sys

import pytest
import torch

from regard import load_authors_weights
from regard.skeletons import host_lm
from regard.skeletons.attention_maps import attention_maps
from regard.skeletons.hugging_face import HuggingFaceLM
from regard.skeletons.sampling import sample_answers
from regard.systems.analysis.preplan_anchor import (
    SCHEMES,
    Credit,
    fai,
    head_sets,
    head_spans,
    middle_layers,
    peaks,
    perturbed_overlap,
    waad,
)

LLAMA = {
    "model_type": "llama",
    "vocab_size": 17,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def llama():
    pytest.importorskip("transformers")
    model = HuggingFaceLM({**LLAMA, "tie_word_embeddings": True}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    return model


def drawn(rows=3, length=20):
    tokens = torch.randint(1, 11, (rows, length), generator=torch.Generator().manual_seed(0))
    response = torch.zeros(rows, length, dtype=torch.bool)
    for row in range(rows):
        response[row, 3 : length - 2 * row] = True
    return tokens, response


def test_a_model_of_transformers_streams_saves_and_loads(llama, tmp_path):
    tokens, _ = drawn()
    with torch.no_grad():
        whole = llama(tokens)
        logits, state = llama.prefill(tokens[:, :7])
        parts = [logits]
        for token in tokens[:, 7:].unbind(1):
            logits, state = llama.step(token, state)
            parts.append(logits[:, None])
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-5)
        assert state.length == 20
        mask = torch.ones_like(tokens, dtype=torch.bool)
        mask[:, 15:] = False
        torch.testing.assert_close(llama(tokens, mask)[:, :15], whole[:, :15], rtol=0, atol=1e-5)
        llama.save_pretrained(tmp_path)
        again = HuggingFaceLM.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(again(tokens), whole)
        # a published checkpoint: names of transformers, the tied matrix once
        fresh = HuggingFaceLM({**LLAMA, "tie_word_embeddings": True}).eval()
        published = {name: value for name, value in llama.lm.state_dict().items() if name != "lm_head.weight"}
        load_authors_weights(fresh, published)
        torch.testing.assert_close(fresh(tokens), whole)
        around = HuggingFaceLM.of(llama.lm)
        assert around.lm is llama.lm
        torch.testing.assert_close(around(tokens), whole)


def test_language_models_are_named_or_refused(monkeypatch):
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="'llama'"):
        HuggingFaceLM({"model_type": "lama"})
    with pytest.raises(ValueError, match="model_type"):
        HuggingFaceLM({"vocab_size": 3})
    with pytest.raises(ValueError, match="lm must be"):
        HuggingFaceLM.of(torch.nn.Linear(2, 2))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"regard\[language\]"):
        HuggingFaceLM(LLAMA)


def test_maps_of_all_or_some_layers_leave_the_model_alone(llama):
    tokens, _ = drawn()
    llama.train()
    whole, logits = attention_maps(llama, tokens)
    assert llama.training
    llama.eval()
    assert whole.shape == (3, 3, 4, 20, 20)
    assert logits.shape == (3, 20, 17)
    assert not whole.requires_grad
    torch.testing.assert_close(whole.sum(-1), torch.ones(3, 3, 4, 20))
    assert not whole.triu(1).any()
    some, _ = attention_maps(llama.lm, tokens, layers=[2, 0])
    torch.testing.assert_close(some, whole[:, [2, 0]])
    middle, _ = attention_maps(llama, tokens, layers=middle_layers)
    torch.testing.assert_close(middle, whole[:, 1:])
    assert llama.lm.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="layers must lie"):
        attention_maps(llama, tokens, layers=[3])


def test_models_without_maps_are_refused():
    tokens, _ = drawn()
    with pytest.raises(ValueError, match="LinearAttention, shows no attention weights"):
        attention_maps(host_lm("linear", 11, dim=16, num_heads=2), tokens)
    with pytest.raises(ValueError, match="model must be"):
        attention_maps(torch.nn.Linear(2, 2), tokens)
    pytest.importorskip("transformers")
    mamba = HuggingFaceLM(
        {"model_type": "mamba", "vocab_size": 17, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    )
    with pytest.raises(ValueError, match="eager"):
        attention_maps(mamba, tokens)
    assert not mamba.can_stream
    assert sample_answers(mamba, [tokens[0]], 2, end=0)[0].shape[1] > 20


def test_a_fused_attention_of_ones_own_is_refused_and_put_back(llama):
    transformers = pytest.importorskip("transformers")
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    transformers.AttentionInterface.register("own_fused", sdpa_attention_forward)
    tokens, _ = drawn()
    expected, _ = attention_maps(llama, tokens)
    llama.lm.set_attn_implementation("own_fused")
    try:
        torch.testing.assert_close(attention_maps(llama, tokens)[0], expected)
        assert llama.lm.config._attn_implementation == "own_fused"
    finally:
        llama.lm.set_attn_implementation("sdpa")


def test_a_mixer_may_show_its_own_weights():
    model = host_lm("linear", 11, dim=16, depth=2, num_heads=2)
    tokens, _ = drawn()
    for block in model.blocks:
        block.mixer.attention_maps = lambda x: torch.eye(x.shape[1]).expand(x.shape[0], 2, -1, -1)
    maps, _ = attention_maps(model, tokens)
    assert torch.equal(maps, torch.eye(20).expand(3, 2, 2, 20, 20))


def test_layers_and_heads_that_are_chosen():
    assert middle_layers(36) == [12, 15, 18, 21, 24]
    assert middle_layers(3) == [1, 2]
    assert middle_layers(1) == [0]
    sets = head_sets(torch.tensor([[3.0, 1, 2, 5], [4, 0, 9, 8]]), 0.3)
    assert sets.local_heads.nonzero().tolist() == [[0, 1], [1, 1]]
    assert sets.global_heads.nonzero().tolist() == [[1, 2], [1, 3]]
    for share in (0.0, 0.6):
        with pytest.raises(ValueError, match="share"):
            head_sets(torch.rand(2, 4), share)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_credit_of_every_scheme(llama, scheme):
    tokens, response = drawn()
    advantages = torch.tensor([1.0, -1.0, 0.5])
    options = {"horizon": (2, 8)}
    gamma = Credit(scheme, **options)(llama, tokens, response, advantages, torch.Generator().manual_seed(0))
    assert (gamma[~response] == 1).all()
    assert (gamma >= 1).all()
    lengths = response.sum(1)
    if scheme not in ("uniform", "coupled"):
        assert ((gamma == 1.5).sum(1) == (0.4 * lengths).long()).all()
    same = Credit(scheme, same_weight=True, **options)(
        llama, tokens, response, advantages, torch.Generator().manual_seed(0)
    )
    torch.testing.assert_close((same * response).sum(1) / lengths, torch.ones(3))
    positive = Credit(scheme, only_positive=True, **options)(
        llama, tokens, response, advantages, torch.Generator().manual_seed(0)
    )
    assert (positive[1] == 1).all()
    assert torch.equal(positive[[0, 2]], gamma[[0, 2]])


def test_padding_after_a_response_changes_nothing(llama):
    tokens, response = drawn(rows=1)
    longer = torch.cat([tokens, torch.full((1, 6), 3)], 1)
    padded = torch.cat([response, torch.zeros(1, 6, dtype=torch.bool)], 1)
    credit = Credit(horizon=(2, 8))
    advantages = torch.ones(1)
    ours = credit(llama, longer, padded, advantages)
    torch.testing.assert_close(ours[:, :20], credit(llama, tokens, response, advantages))


def test_half_precision_counts_far_distances():
    maps = torch.eye(400, dtype=torch.bfloat16)[None, None, None].clone()
    maps[..., 399, 399], maps[..., 399, 0] = 0, 1
    response = torch.zeros(1, 400, dtype=torch.bool)
    response[0, 399] = True
    assert head_spans(maps, response).item() == 399
    assert waad(maps[:, 0, 0])[0, 399] == 10


def test_the_lowest_may_be_taken_instead():
    signal = torch.tensor([[5.0, 1, 4, 2, 3, 9]])
    response = torch.tensor([[True] * 5 + [False]])
    assert peaks(signal, response, 0.4).nonzero()[:, 1].tolist() == [0, 2]
    assert peaks(signal, response, 0.4, largest=False).nonzero()[:, 1].tolist() == [1, 3]
    assert not peaks(signal, torch.zeros_like(response), 0.4).any()


def test_forced_tokens_and_what_they_change(llama):
    tokens, said = sample_answers(llama, [torch.tensor([4, 5, 6])], 12, end=0, temperature=0)
    line = tokens[0][: 3 + int(said.sum())].tolist()
    overlaps = perturbed_overlap(llama, line, 4, end=0, top_k=3, max_new_tokens=len(line) - 5)
    assert len(overlaps) == 3
    assert overlaps[0] == 1, "the most probable token is the one that stood there"
    assert all(0 <= overlap <= 1 for overlap in overlaps)
    with pytest.raises(ValueError, match="position"):
        perturbed_overlap(llama, line, 0, end=0)


def test_wrong_input_is_refused():
    maps, response = torch.rand(1, 2, 2, 4, 4), torch.ones(1, 4, dtype=torch.bool)
    for wrong in (lambda: waad(maps), lambda: head_spans(maps[0], response), lambda: waad(torch.rand(1, 4, 5))):
        with pytest.raises(ValueError, match="maps must be"):
            wrong()
    with pytest.raises(ValueError, match="response must be boolean"):
        fai(maps[:, 0, 0], response.float())
    with pytest.raises(ValueError, match="horizon"):
        fai(maps[:, 0, 0], response, (5, 2))
    with pytest.raises(ValueError, match="coupled"):
        Credit("couple")
    with pytest.raises(ValueError, match="alpha"):
        Credit(alpha=2.0)
