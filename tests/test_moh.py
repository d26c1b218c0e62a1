"""MoH: what the shared tests do not know."""

from __future__ import annotations

import copy

import pytest
import torch

from regard.checkpoint import load_authors_weights
from regard.systems.backbones._transnext import TransNeXt
from regard.systems.backbones.moh import MoHAttention, MoHDiT, MoHLlama, MoHTransNeXt, to_moh

LLAMA = {"vocab_size": 23, "dim": 32, "depth": 2, "num_heads": 8, "kv_heads": 4, "glu_dim": 40}


def test_transnext_runs_at_other_sizes_and_without_routers():
    size = {"dims": (8, 16), "depths": (1, 1), "num_heads": (2, 4), "mlp_ratios": (2, 2), "reductions": (2, 1)}
    moh = MoHTransNeXt(**size, shared_heads=(1, 2), routed_heads=(1, 1), img_size=32, num_classes=5)
    for model in (moh, TransNeXt(**size, img_size=32, num_classes=5)):
        for shape in ((32, 32), (33, 50), (4, 4)):
            assert model(torch.randn(2, 3, *shape)).shape == (2, 5)
    assert (
        len(moh.state_dict()) == len(TransNeXt(**size).state_dict()) + 5
    )  # one shared head alone has no map of its own


def test_dit_trains_guides_and_takes_other_sizes():
    model = MoHDiT(
        dim=24,
        depth=2,
        num_heads=(2, 4),
        head_dim=6,
        shared_heads=(2, 2),
        routed_heads=(0, 1),
        input_size=8,
        num_classes=5,
    )
    for block in model.blocks:
        torch.nn.init.normal_(block.modulation[1].weight, std=0.1)
    torch.nn.init.normal_(model.head.weight)
    x, t, y = torch.randn(2, 4, 7, 10), torch.tensor([3.5, 900.0]), torch.tensor([1, 4])
    model(x, t, y).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.eval()
    torch.testing.assert_close(model.guided(x, t, y, 1.0), model(x, t, y))
    free = model(x, t, torch.full_like(y, 5))
    torch.testing.assert_close(model.guided(x, t, y, 0.0)[:, :4], free[:, :4])
    with pytest.raises(ValueError, match="one for each sample"):
        model(x, t[:1], y)


@pytest.mark.parametrize("router", ["learned", "query_norm"])
def test_llama_streams(router):
    model = MoHLlama(**LLAMA, router=router).eval()
    tokens = torch.randint(23, (2, 12))
    with torch.no_grad():
        whole = model(tokens)
        logits, state = model.prefill(tokens[:, :5])
        steps = [logits]
        for token in tokens[:, 5:].unbind(1):
            out, state = model.step(token, state)
            steps.append(out[:, None])
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-5)
    assert state.blocks[0][0].numel() + state.blocks[0][1].numel() == 2 * model.blocks[0].mixer.state_size(12)


def test_llama_with_all_heads_shared_takes_the_weights_of_moh():
    dense, moh = MoHLlama(**LLAMA, shared_heads=8, routed_heads=0).eval(), MoHLlama(**LLAMA).eval()
    moh.load_state_dict(dense.state_dict())
    tokens = torch.randint(23, (1, 6))
    assert not torch.equal(dense(tokens), moh(tokens))


def test_gradient_passes_straight_through_to_the_query_norms():
    mixer = MoHAttention(16, 8, router="query_norm", balance=0.0).double()
    x = torch.randn(1, 5, 16, dtype=torch.float64)
    trained = torch.autograd.grad(mixer(x).square().sum(), mixer.q.weight)[0]
    plain = torch.autograd.grad(mixer.eval()(x).square().sum(), mixer.q.weight)[0]
    torch.testing.assert_close(trained[:8], plain[:8])  # queries of the shared heads
    assert not torch.allclose(trained[8:], plain[8:])
    torch.testing.assert_close(mixer.train()(x), mixer.eval()(x))


@pytest.mark.parametrize(
    ("shared", "routed", "message"),
    [(3, 2, "together at most"), (2, 0, "no token would ever use"), (-1, 2, "at least 0")],
)
def test_heads_have_to_add_up(shared, routed, message):
    with pytest.raises(ValueError, match=message):
        MoHAttention(16, 4, shared_heads=shared, routed_heads=routed)


def test_one_head_is_attention():
    assert MoHAttention(8, 1)(torch.randn(1, 3, 8)).shape == (1, 3, 8)
    with pytest.raises(ValueError, match="takes no context"):
        MoHAttention(8, 2, causal=True)(torch.randn(1, 3, 8), torch.randn(1, 3, 8))


@pytest.fixture
def llama():
    """A small LLaMA of transformers with queries that tell its heads apart."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=23,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=40,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


TOKENS = torch.randint(23, (2, 12), generator=torch.Generator().manual_seed(1))


def test_models_of_transformers_stay_the_same_with_all_heads(llama):
    with torch.no_grad():
        before = llama(TOKENS).logits
        for shared, routed in ((8, 0), (5, 3)):
            assert torch.equal(to_moh(llama, shared, routed)(TOKENS).logits, before)
        assert not torch.allclose(to_moh(llama, 4, 2)(TOKENS).logits, before)
        assert torch.equal(to_moh(llama, 8, 0)(TOKENS).logits, before), "calling again takes the gates of before away"


def test_models_of_transformers_route_as_ours(llama):
    ours = MoHLlama(**LLAMA, rope_base=10_000.0, norm_eps=1e-6)
    load_authors_weights(ours, llama.state_dict())
    moh = to_moh(copy.deepcopy(llama))
    for mode in (False, True):
        torch.testing.assert_close(moh.train(mode)(TOKENS).logits, ours.train(mode)(TOKENS), rtol=1e-4, atol=1e-4)
    layer, block = moh.model.layers[0].self_attn, ours.blocks[0].mixer
    moh(TOKENS).logits.square().mean().backward()
    ours(TOKENS).square().mean().backward()
    torch.testing.assert_close(layer.q_proj.weight.grad, block.q.weight.grad, rtol=1e-3, atol=1e-5)
    plain = copy.deepcopy(llama).train()
    plain(TOKENS).logits.square().mean().backward()
    assert not torch.allclose(plain.model.layers[0].self_attn.q_proj.weight.grad, layer.q_proj.weight.grad)


def test_routed_models_of_transformers_are_copied_saved_and_streamed(llama, tmp_path):
    names = set(llama.state_dict())
    moh = to_moh(llama, 3, 2)
    assert set(moh.state_dict()) == names
    with torch.no_grad():
        whole = moh(TOKENS).logits
        twin = copy.deepcopy(moh)
        assert torch.equal(twin(TOKENS).logits, whole)
        to_moh(twin, 8, 0)
        assert torch.equal(moh(TOKENS).logits, whole), "the copy routes by itself"
        moh.save_pretrained(tmp_path)
        assert torch.equal(to_moh(type(moh).from_pretrained(tmp_path))(TOKENS).logits, whole)
        out = moh(TOKENS[:, :5], use_cache=True)
        steps = [out.logits]
        for token in TOKENS[:, 5:].unbind(1):
            out = moh(token[:, None], past_key_values=out.past_key_values, use_cache=True)
            steps.append(out.logits)
        torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_routed_says_why(llama):
    transformers = pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="q_proj and o_proj"):
        to_moh(torch.nn.Linear(4, 4))
    with pytest.raises(ValueError, match="together at most"):
        to_moh(llama, 6, 3)
    small = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": 1,
        "head_dim": 8,
    }
    with pytest.raises(ValueError, match="normalises its queries"):
        to_moh(transformers.Qwen3ForCausalLM(transformers.Qwen3Config(vocab_size=9, intermediate_size=8, **small)))
