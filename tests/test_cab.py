"""CAB: backbones in padded batches, what the attentions refuse, pieces of a stream, mistakes that masks invite."""

from __future__ import annotations

import pytest
import torch

from regard.systems.sequence._cab_landmarks import Segments
from regard.systems.sequence.cab import ATTENTIONS, ABCAttention, CABDecoder, CABEncoder

SIZES = {"vocab_size": 11, "dim": 16, "depth": 2, "num_heads": 2, "hidden": 24}


@pytest.mark.parametrize("name", [name for name in ATTENTIONS if name != "causal_transformer_ls"])
def test_encoder_ignores_padding(name):
    torch.manual_seed(0)
    model = CABEncoder(**SIZES, attention=name, num_classes=3).eval()
    tokens = torch.randint(1, 11, (2, 20))
    tokens[1, 13:] = 0
    with torch.no_grad():
        alone = model(tokens[1:, :13])
        torch.testing.assert_close(model(tokens)[1:, :13], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cross", ["vanilla", "abc", "performer"])
def test_decoder_sees_no_future_and_no_padding(cross):
    torch.manual_seed(0)
    model = CABDecoder(**SIZES, attention="abc", cross=cross).eval()
    tokens, memory = torch.randint(1, 11, (2, 9)), torch.randn(2, 12, 16)
    mask = torch.arange(12) < torch.tensor([12, 7])[:, None]
    with torch.no_grad():
        logits = model(tokens, memory, mask)
        assert logits.shape == (2, 9, 11)
        torch.testing.assert_close(model(tokens[:, :4], memory, mask), logits[:, :4], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(tokens[1:], memory[1:, :7]), logits[1:], rtol=1e-4, atol=1e-5)


def test_model_saves_its_choice_of_attention(tmp_path):
    model = CABEncoder(**SIZES, attention="local", options={"window_size": 3}).eval()
    model.save_pretrained(tmp_path)
    tokens = torch.randint(1, 11, (1, 9))
    assert torch.equal(model(tokens), CABEncoder.from_pretrained(tmp_path).eval()(tokens))


def test_pieces_of_a_stream_equal_all_at_once():
    mixer, x = ABCAttention(16, 2, slots=3, causal=True).eval(), torch.randn(2, 200, 16)
    outs, state = [], None
    for piece in x.split([1, 70, 129], 1):
        out, state = mixer.prefill(piece, state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), mixer(x), rtol=1e-4, atol=1e-5)


def test_extreme_logits_of_slots_stay_finite():
    mixer = ABCAttention(16, 2, slots=3, causal=True)
    x = torch.randn(1, 100, 16)
    x[:, 40] *= 1e4
    x.requires_grad_()
    mixer(x).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_segments_share_out_tokens():
    x = torch.arange(7.0)[None, :, None, None].expand(2, -1, -1, -1)
    mask = torch.arange(7) < torch.tensor([7, 2])[:, None]
    segments = Segments.of(x, 3, mask)
    assert segments.means(x)[0].flatten().tolist() == [0.5, 2.5, 5.0]  # 2, 2 and 3 tokens
    assert segments.used.tolist() == [[True] * 3, [False, True, True]]
    assert segments.means(x)[1].flatten().tolist() == [0.0, 0.0, 1.0]


def test_wrong_calls_say_what_to_do():
    x = torch.randn(2, 9, 16)
    with pytest.raises(ValueError, match="causal=False for cross"):
        ATTENTIONS["abc"](16, 2, causal=True)(x, x)
    with pytest.raises(ValueError, match="takes no context"):
        ATTENTIONS["local"](16, 2)(x, x)
    with pytest.raises(ValueError, match="mask must be"):
        ATTENTIONS["nystrom"](16, 2)(x, mask=torch.ones(2, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask must be boolean"):
        ATTENTIONS["s4d"](16, 2)(x, mask=torch.ones(2, 9))
    with pytest.raises(ValueError, match="is not causal"):
        ATTENTIONS["lara"](16, 2, causal=True)
    with pytest.raises(ValueError, match="causal=True"):
        ATTENTIONS["abc"](16, 2).step(x[:, 0])
    with pytest.raises(ValueError, match="both directions"):
        ATTENTIONS["causal_transformer_ls"](16, 2, causal=False)
    with pytest.raises(ValueError, match="attention"):
        CABEncoder(**SIZES, attention="vanila")
