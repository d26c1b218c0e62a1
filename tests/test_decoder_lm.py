"""The decoder language model: streaming equals recomputing, generation, hosts, published names."""

import pytest
import torch

from regard import load_authors_weights
from regard.skeletons import DecoderLM, host_lm
from regard.systems.sequence.lightning_attention import LightningAttention, TransNormerLLM

TINY = {"vocab_size": 11, "dim": 16, "depth": 2, "num_heads": 2, "glu_dim": 8}


class Wall(torch.nn.Module):
    """A causal mixer that cannot stream: the mean of all tokens so far."""

    can_causal = True

    def __init__(self, dim, num_heads=1, *, causal=True):
        super().__init__()

    def forward(self, x):
        return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]


@pytest.mark.parametrize("mixer", ["softmax", "linear", "identity", "lightning"])
@pytest.mark.parametrize("position", ["none", "learned", "sine"])
def test_prefill_and_steps_equal_forward(mixer, position):
    lm = host_lm(mixer, 11, dim=16, num_heads=2, length=12, position=position).double().eval()
    tokens = torch.randint(0, 11, (2, 12), generator=torch.Generator().manual_seed(0))
    whole = lm(tokens)
    logits, state = lm.prefill(tokens[:, :5])
    parts = [logits]
    for token in tokens[:, 5:].unbind(1):
        logits, state = lm.step(token, state)
        parts.append(logits[:, None])
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mixer", ["softmax", "lightning", Wall])
def test_greedy_generation_is_the_argmax_of_forward_also_past_a_learned_table(mixer):
    lm = host_lm(mixer, 11, dim=16, num_heads=2, length=8)
    for parameter in lm.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
    for steps in (0, 1, 5, 9):
        out = lm.generate(torch.tensor([[3, 1, 4]]), steps, temperature=0)
        assert out.shape == (1, 3 + steps)
        for stop in range(3, 3 + steps):
            assert out[0, stop] == lm(out[:, max(0, stop - 8) : stop])[0, -1].argmax()
    assert lm.training


def test_sampling_follows_its_generator_and_top_k():
    lm = TransNormerLLM(**TINY)
    start = torch.zeros(4, 1, dtype=torch.long)
    first, again = (lm.generate(start, 6, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(lm.generate(start, 6, top_k=1), lm.generate(start, 6, temperature=0))


def test_state_is_constant_for_lightning_and_grows_for_softmax():
    assert TransNormerLLM(**TINY).state_size(10) == TransNormerLLM(**TINY).state_size(1000)
    assert host_lm("softmax", 11, num_heads=2).state_size(1000) == 100 * host_lm("softmax", 11).state_size(10)
    assert host_lm(Wall, 11).state_size(10) is None


def test_padding_at_the_start_is_invisible():
    lm = TransNormerLLM(**TINY, lrpe="all_but_first").double()
    tokens = torch.randint(0, 11, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 9).bool()
    mask[:, :3] = False
    torch.testing.assert_close(lm(tokens, mask)[:, 3:], lm(tokens[:, 3:]), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="take no mask"):
        host_lm("softmax", 11)(tokens, mask)


def test_one_block_and_one_token_have_finite_rates():
    lm = TransNormerLLM(**{**TINY, "depth": 1})
    assert torch.isfinite(lm(torch.zeros(1, 1, dtype=torch.long))).all()


def test_both_published_namings_load_and_a_head_of_its_own_is_refused_by_a_tied_model():
    model = TransNormerLLM(**TINY)
    for stem, blocks in (("model.embed_tokens", "model.layers"), ("transnormer.wte", "transnormer.h")):
        state = {f"{stem}.weight": torch.randn(11, 16)}
        state["lm_head.weight"] = state[f"{stem}.weight"].clone()
        for i in range(2):
            state[f"{blocks}.{i}.token_mixer.qkvu_proj.weight"] = torch.randn(64, 16)
            state[f"{blocks}.{i}.token_mixer.out_proj.weight"] = torch.randn(16, 16)
            for name, shape in (("l1", (8, 16)), ("l2", (8, 16)), ("l3", (16, 8))):
                state[f"{blocks}.{i}.channel_mixer.{name}.weight"] = torch.randn(shape)
        state[f"{blocks}.0.token_mixer.lrpe.theta"] = torch.randn(2, 1, 8)
        load_authors_weights(model, state)
        assert torch.equal(model.embed.weight, state["lm_head.weight"])
        state["lm_head.weight"] += 1
        with pytest.raises(ValueError, match="tied=False"):
            load_authors_weights(model, state)
        load_authors_weights(TransNormerLLM(**TINY, tied=False), state)


def test_saving_and_loading(tmp_path):
    model = TransNormerLLM(**TINY, lrpe=[False, True], tied=False)
    model.save_pretrained(tmp_path)
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(TransNormerLLM.from_pretrained(tmp_path)(tokens), model(tokens))


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: host_lm("window", 11), "spatial axes|not causal"),
        (lambda: host_lm("lightning", 11, dim=15), "multiple"),
        (lambda: LightningAttention(8, 2, causal=False), "causal by its idea"),
        (lambda: LightningAttention(8, 2, layer=3, depth=3), "layer must lie"),
        (lambda: TransNormerLLM(**TINY, lrpe=[True]), "one boolean"),
        (lambda: DecoderLM(11, 8, [], depth=1), "contradicts"),
        (lambda: DecoderLM(11, 8, [torch.nn.Identity()], position="learned"), "length"),
        (lambda: host_lm("softmax", 11, length=4)(torch.zeros(1, 5, dtype=torch.long)), "position table"),
        (lambda: host_lm("softmax", 11)(torch.zeros(1, 0, dtype=torch.long)), "at least one token"),
        (lambda: host_lm("softmax", 11).generate(torch.zeros(1, 1, dtype=torch.long), 1, top_k=0), "top_k"),
        (lambda: host_lm(Wall, 11).prefill(torch.zeros(1, 1, dtype=torch.long)), "Wall cannot go on"),
    ],
)
def test_wrong_input_is_explained(build, match):
    with pytest.raises(ValueError, match=match):
        build()
