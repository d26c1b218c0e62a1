"""Sampling with and without a state, and training from verified answers."""

import copy

import pytest
import torch

from regard.skeletons import host_lm
from regard.skeletons.sampling import sample_answers
from regard.tasks import create_task
from regard.training import seeded
from regard.training.grpo import GrpoConfig, divergence, group_advantages, grpo, token_log_probs

END = 0


def lm(vocab=11, mixer="softmax", seed=0):
    model = seeded(lambda: host_lm(mixer, vocab, dim=16, depth=2, num_heads=2, length=40), seed)
    for parameter in model.parameters():  # fresh weights say nearly the same everywhere
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(seed + parameter.numel()))
    return model


class Stateless(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return self.model(tokens)


class SayThree:
    """Questions of two tokens; an answer is worth its share of threes."""

    end = END

    def prompt(self, index):
        return torch.tensor([1 + index % 5, 6])

    def reward(self, prompt, answer):
        return float((answer == 3).float().mean())


@pytest.mark.parametrize("temperature", [0, 1])
def test_state_or_whole_context_say_the_same(temperature):
    model = lm()
    prompts = [torch.tensor(p) for p in ([1, 2, 3], [4], [5, 6, 7], [8, 9])]
    options = {"end": END, "temperature": temperature}
    results = [
        sample_answers(m, prompts, 9, generator=torch.Generator().manual_seed(3), **options)
        for m in (model, Stateless(model))
    ]
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    tokens, said = results[0]
    assert model.training
    for prompt, row, part in zip(prompts, tokens, said, strict=True):
        assert torch.equal(row[: len(prompt)], prompt)
        answer = row[part].tolist()
        assert 1 <= len(answer) <= 9
        assert END not in answer[:-1]
        assert len(answer) == 9 or answer[-1] == END
        if temperature == 0:
            for stop in range(len(answer)):
                whole = torch.cat([prompt, torch.tensor(answer[:stop], dtype=torch.long)])
                assert answer[stop] == model(whole[None])[0, -1].argmax()


def test_sampling_refuses_what_it_cannot_continue():
    for prompts in ([], [torch.tensor([], dtype=torch.long)], [torch.tensor([[1]])], [torch.tensor([1.0])]):
        with pytest.raises(ValueError, match="prompts"):
            sample_answers(lm(), prompts, 3, end=END)
    with pytest.raises(ValueError, match="max_new_tokens"):
        sample_answers(lm(), [torch.tensor([1])], 0, end=END)


def test_rewards_rise():
    model = lm()
    result = grpo(model, SayThree(), GrpoConfig(steps=30, questions=4, max_new_tokens=6, lr=1e-2))
    assert result.finished
    assert sum(result.rewards[-5:]) / 5 > sum(result.rewards[:5]) / 5 + 0.3


def test_equal_answers_teach_nothing():
    model = lm()
    before = copy.deepcopy(model.state_dict())
    task = SayThree()
    task.reward = lambda prompt, answer: 1.0
    grpo(model, task, GrpoConfig(steps=1, questions=2, answers=3, max_new_tokens=4))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert group_advantages(torch.tensor([[1.0, 1.0], [0.0, 2.0]]))[0].tolist() == [0, 0]


def test_divergence_from_the_first_model_holds_training_back():
    gaps = []
    for weight in (0.0, 3.0):
        model = lm()
        first = copy.deepcopy(model)
        grpo(model, SayThree(), GrpoConfig(steps=8, questions=2, max_new_tokens=5, lr=3e-3, kl=weight))
        tokens = torch.randint(1, 11, (8, 7), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            log_p = [token_log_probs(m, tokens) for m in (model, first)]
        gaps.append(float(divergence(*log_p, torch.ones_like(tokens, dtype=torch.bool))))
    assert 0 <= gaps[1] < gaps[0]


@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_resumes_where_it_was_stopped(tmp_path, kl):
    task = create_task("modular_arithmetic", terms=2)
    config = GrpoConfig(steps=4, questions=2, answers=3, max_new_tokens=5, lr=1e-2, kl=kl, save_every=2)

    def credit(model, tokens, response, advantages, generator):
        return 1 + torch.rand(tokens.shape, generator=generator)

    whole, stopped, resumed = (lm(task.vocab_size) for _ in range(3))
    full = grpo(whole, task, config, credit=credit)

    def stop(step, reward):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        grpo(stopped, task, config, credit=credit, out=tmp_path, on_step=stop)
    again = grpo(resumed, task, config, credit=credit, out=tmp_path)
    assert (again.rewards, again.losses, again.steps) == (full.rewards, full.losses, 4)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    with pytest.raises(ValueError, match="lr was"):
        grpo(resumed, task, GrpoConfig(steps=4, questions=2, answers=3, max_new_tokens=5, lr=2e-2), out=tmp_path)


def test_recipes_that_cannot_be_are_refused():
    for options in ({"answers": 1}, {"minibatches": 100}, {"kl": -1.0}, {"lr": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            GrpoConfig(**options)
