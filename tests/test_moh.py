"""MoH: what the shared tests do not know."""

from __future__ import annotations

import pytest
import torch

from regard.systems.backbones._transnext import TransNeXt
from regard.systems.backbones.moh import MoHAttention, MoHDiT, MoHLlama, MoHTransNeXt

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
