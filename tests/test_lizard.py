"""Converting language models by Lizard's way: what `regard verify lizard` does not run."""

from __future__ import annotations

import pytest
import torch

from regard.layers.rotary_attention import RotaryAttention
from regard.linearize import (
    Imitation,
    NextToken,
    add_low_rank,
    attention_layers,
    convert,
    converted_layers,
    load_converted,
    logits_of,
    merge_low_rank,
    save_converted,
)
from regard.skeletons.llama import Llama
from regard.systems.sequence._gated_linear import GATES
from regard.systems.sequence.lizard import LizardLM, keeps_softmax
from regard.tasks import create_task
from regard.training import TrainConfig, train

VOCAB = 40
CORE = {"window_size": 5, "feature_dim": 8}


def _llama(mixers):
    mixers = list(mixers)
    return Llama(mixer=mixers.__getitem__, vocab_size=VOCAB, dim=16, depth=len(mixers), glu_dim=24).eval()


def ours():
    torch.manual_seed(0)
    return _llama(RotaryAttention(16, 4, kv_heads=2) for _ in range(3))


def hugging_face(kind="Llama", **options):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=None,
        **options,
    )
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def drawn(batch=2, length=12):
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("build", [ours, hugging_face], ids=["ours", "transformers"])
def test_both_stages_learn_and_leave_the_teacher_alone(build, tmp_path):
    teacher = build()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    task = create_task("text", length=12)
    task.eval_set = torch.utils.data.Subset(task.eval_set, range(4))
    for tokens in (task.train_tokens, task.eval_set.dataset.tokens):
        tokens.remainder_(VOCAB)
    student = convert(teacher, softmax_share=1 / 3, **CORE)
    config = TrainConfig(steps=12, batch_size=4, lr=3e-2)
    imitation = Imitation(task, teacher)
    first = train(student, imitation, config, cpu=True)
    assert first.metrics["error"] < first.losses[0]
    core = {name for name, p in student.named_parameters() if p.requires_grad}
    assert core
    assert all(".core." in name for name in core)
    add_low_rank(student, rank=2, alpha=4)
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    assert {name for name in trained if ".lora_" not in name} == core
    second = train(NextToken(student), task, config, cpu=True)
    assert second.losses[-1] < second.losses[0]
    assert all(torch.equal(value, teacher.state_dict()[name]) for name, value in before.items())
    save_converted(student, tmp_path)
    again = load_converted(build(), tmp_path).eval()
    wanted = logits_of(student.eval(), drawn())
    assert torch.equal(logits_of(again, drawn()), wanted)
    torch.testing.assert_close(logits_of(merge_low_rank(again), drawn()), wanted, rtol=1e-4, atol=1e-5)
    assert not any("lora" in name for name in again.state_dict())
    with pytest.raises(ValueError, match="before merge_low_rank"):
        save_converted(again, tmp_path)
    with pytest.raises(ValueError, match="does not fit"):
        load_converted(_llama(RotaryAttention(16, 2) for _ in range(3)), tmp_path)


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_transformers_generates_from_states(kind, share):
    student = convert(hugging_face(kind), softmax_share=share, **CORE).eval()
    tokens = drawn()
    made = student.generate(tokens[:, :4], max_new_tokens=8, do_sample=False, pad_token_id=0)
    slow = tokens[:, :4]
    with torch.no_grad():
        for _ in range(8):
            slow = torch.cat([slow, logits_of(student, slow)[:, -1:].argmax(-1)], 1)
    assert torch.equal(made, slow)
    beams = student.generate(tokens[:, :4], max_new_tokens=5, num_beams=3, do_sample=False, pad_token_id=0)
    assert beams.shape == (2, 9)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_on_the_left_is_refused(attention):
    student = convert(hugging_face(attn_implementation=attention), softmax_share=0.5, **CORE)
    left, right = torch.ones(2, 12).long(), torch.ones(2, 12).long()
    left[0, :3], right[0, -3:] = 0, 0
    with pytest.raises(ValueError, match="pad on the right"):
        student(drawn(), attention_mask=left)
    padded = student(drawn(), attention_mask=right).logits
    torch.testing.assert_close(padded[0, :9], student(drawn()).logits[0, :9])


def test_our_converted_models_stream():
    student = convert(ours(), softmax_share=0.5, gate="head", **CORE).eval()
    assert len(converted_layers(student)) == 2
    assert len(attention_layers(student)) == 1
    tokens = drawn()
    whole, state = student(tokens), None
    for place in range(tokens.shape[1]):
        logits, state = student.step(tokens[:, place], state)
        torch.testing.assert_close(logits, whole[:, place], rtol=1e-4, atol=1e-5)


def test_stage_2_can_leave_what_is_new():
    student = add_low_rank(convert(ours(), **CORE), freeze_new=True)
    assert all(".lora_" in name for name, p in student.named_parameters() if p.requires_grad)


def test_heads_start_with_the_feature_map_of_their_keys():
    core = next(iter(converted_layers(convert(ours(), **CORE)).values())).core
    assert torch.equal(core.phi_q.weight[[0, 2]], core.phi_k.weight)
    assert torch.equal(core.phi_q.weight[[1, 3]], core.phi_k.weight)


def test_conversion_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="no attention to convert"):
        convert(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="softmax_share"):
        convert(ours(), softmax_share=[True])
    with pytest.raises(ValueError, match="gate"):
        convert(ours(), gate="scaler")


@pytest.mark.parametrize("gate", GATES)
def test_model_saves_and_loads(gate, tmp_path):
    model = LizardLM(VOCAB, 16, 2, 4, 2, glu_dim=24, softmax_share=0.5, gate=gate, gate_start=0.9, **CORE).eval()
    model.save_pretrained(tmp_path)
    assert torch.equal(LizardLM.from_pretrained(tmp_path).eval()(drawn()), model(drawn()))
    starts = [block.mixer.core.gate(torch.zeros(1, 1, 16), torch.zeros(1, 1, 2, 4)).exp() for block in model.blocks[:1]]
    wanted = {"none": 1.0, "pooled": 0.5 ** (1 / 16)}.get(gate, 0.9)
    torch.testing.assert_close(starts[0], torch.full_like(starts[0], wanted))


def test_hybrids_spread_their_softmax():
    assert keeps_softmax(6, 0.5) == [False, True] * 3
    assert sum(keeps_softmax(32, 0.25)) == 8
    assert keeps_softmax(3, 1) == [True] * 3
