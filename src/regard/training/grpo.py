"""Reinforcement learning of language models from verified answers, with a weight for every token.

Group relative policy optimisation (GRPO; Shao et al., 2024, arXiv 2402.03300): no value model, the answers to one question
are each other's baseline.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from regard.checks import positive
from regard.skeletons.sampling import sample_answers
from regard.tasks.base import whole
from regard.training.trainer import refuse_other_recipe


class Verifiable(Protocol):
    """What a task has to offer: questions, a verifier, and the token that closes an answer."""

    end: int

    def prompt(self, index: int) -> Tensor:
        """The tokens `(N,)` of question `index`."""

    def reward(self, prompt: Tensor, answer: Tensor) -> float:
        """What the tokens of an answer are worth."""


CreditFunction = Callable[[nn.Module, Tensor, Tensor, Tensor, torch.Generator], Tensor]
"""(model, tokens (B, N), response (B, N) boolean, advantages (B,), generator) -> weights (B, N) of token advantages."""


@dataclass(frozen=True)
class GrpoConfig:
    """A recipe.

    Args:
        steps: batches of questions. questions: of a batch. answers: sampled for each question, at least 2.
        minibatches: optimiser steps on each batch (those after the first are off policy, where clipping acts).
        temperature: of sampling, and of the probabilities that are trained.
        lr: constant; Adam without weight decay. clip_norm: as in `TrainConfig`.
        clip: epsilon, how far from 1 a probability ratio counts. kl: weight of the divergence from the first model, 0 for none.
        seed: of questions, answers and order. save_every: steps between two checkpoints.
    """

    steps: int = 50
    questions: int = 8
    answers: int = 8
    minibatches: int = 2
    max_new_tokens: int = 64
    temperature: float = 1.0
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float | None = 1.0
    clip: float = 0.2
    kl: float = 0.0
    seed: int = 0
    save_every: int | None = None

    def __post_init__(self) -> None:
        for argument in ("steps", "questions", "answers", "minibatches", "max_new_tokens", "temperature", "lr", "clip"):
            positive(argument, getattr(self, argument))
        whole("answers", self.answers, 2)
        if self.minibatches > self.questions * self.answers:
            raise ValueError(f"minibatches must be at most questions x answers, got {self.minibatches}.")
        if self.kl < 0:
            raise ValueError(f"kl must be 0 or more, got {self.kl}.")


@dataclass
class GrpoResult:
    """What came out of every step: the mean reward of its answers before it learned from them, the loss, their tokens."""

    rewards: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    lengths: list[float] = field(default_factory=list)
    seconds: float = 0.0
    steps: int = 0
    finished: bool = False


def group_advantages(rewards: Tensor, eps: float = 1e-6) -> Tensor:
    r"""$(r_i - \mathrm{mean}\,r) / \mathrm{std}\,r$ within each question: `(questions, answers)` -> the same shape.

    Where all answers are worth the same there is nothing to learn, and advantages are 0.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, keepdim=True) + eps)


def clipped_objective(
    log_p: Tensor, old_log_p: Tensor, advantages: Tensor, response: Tensor, clip: float = 0.2
) -> Tensor:
    r"""The loss $-\mathrm{mean}_i \mathrm{mean}_t \min(\rho A, \mathrm{clip}(\rho, 1 \pm \epsilon) A)$, $\rho = p / p_{old}$.

    Args:
        log_p, old_log_p: `(B, N)` of each token, given those before it. advantages: `(B, N)`, weights included.
        response: `(B, N)`, True for the tokens that count; they are averaged within each answer.
    """
    ratio = (log_p - old_log_p).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -_mean_of_answers(gain, response)


def divergence(log_p: Tensor, reference_log_p: Tensor, response: Tensor) -> Tensor:
    r"""The estimate $\rho - \log\rho - 1$ of the KL divergence from a reference, $\rho = p_{ref} / p$; never negative."""
    gap = reference_log_p - log_p
    return _mean_of_answers(gap.exp() - gap - 1, response)


def token_log_probs(model: nn.Module, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each token given those before it: `(B, N)` -> `(B, N)`, 0 for the first."""
    logits = model(tokens[:, :-1]).float() / temperature
    chosen = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    return nn.functional.pad(chosen, (1, 0))


def _mean_of_answers(values: Tensor, response: Tensor) -> Tensor:
    """The mean over the tokens of each answer, then over answers."""
    return ((values * response).sum(1) / response.sum(1).clamp(min=1)).mean()


def grpo(
    model: nn.Module,
    task: Verifiable,
    config: GrpoConfig,
    *,
    credit: CreditFunction | None = None,
    out: Path | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> GrpoResult:
    """Train `model` in place on the verified answers that it samples itself (one process, on the device of the model).

    Every step draws from a generator of its own, seeded by the recipe and the step. With `out`, the state is kept in
    `out/grpo.pt` every `config.save_every` steps and at the end; a later call with the same `out` goes on there as an
    uninterrupted run would have. The state of another recipe is refused.

    Args:
        model: tokens `(B, N)` -> logits `(B, N, V)`; it is trained as it is evaluated, without dropout, so that ratios
            start at 1.
        credit: weights of token advantages; None weighs all alike. Its weights are never differentiated.
        on_step: called after each step with the number of steps done and the mean reward.

    Raises:
        ValueError: if the loss is not finite, or `out` holds the state of another recipe.
    """
    learner = _Learner(model, task, config, credit)
    result = GrpoResult()
    path = None if out is None else out / "grpo.pt"
    if path is not None and path.exists():
        learner.restore(path, result)
    was_training = model.training
    model.eval()
    started = time.perf_counter()
    try:
        while result.steps < config.steps:
            reward, loss, length = learner.step(result.steps)
            result.rewards.append(reward)
            result.losses.append(loss)
            result.lengths.append(length)
            result.steps += 1
            result.seconds, started = result.seconds + time.perf_counter() - started, time.perf_counter()
            if on_step is not None:
                on_step(result.steps, reward)
            done = result.steps == config.steps
            if path is not None and (done or (config.save_every and result.steps % config.save_every == 0)):
                learner.save(path, result)
    finally:
        model.train(was_training)
    result.finished = True
    return result


class _Learner:
    """Everything that changes in training, and one step of it."""

    def __init__(self, model: nn.Module, task: Verifiable, config: GrpoConfig, credit: CreditFunction | None) -> None:
        self.model, self.task, self.config, self.credit = model, task, config, credit
        self.device = next(model.parameters()).device
        self.optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, betas=config.betas)
        self.reference = copy.deepcopy(model).eval().requires_grad_(False) if config.kl else None

    def step(self, index: int) -> tuple[float, float, float]:
        """Step `index` of training: mean reward, mean loss, mean tokens of an answer."""
        config, model = self.config, self.model
        generator = torch.Generator(self.device).manual_seed(config.seed * 1_000_003 + index)
        first = (config.seed * config.steps + index) * config.questions
        asked = [self.task.prompt(first + number).to(self.device) for number in range(config.questions)]
        prompts = [prompt for prompt in asked for _ in range(config.answers)]
        tokens, response = sample_answers(
            model,
            prompts,
            config.max_new_tokens,
            end=self.task.end,
            temperature=config.temperature,
            generator=generator,
        )
        worth = [self.task.reward(p, row[said]) for p, row, said in zip(prompts, tokens, response, strict=True)]
        rewards = torch.tensor(worth, device=self.device)
        advantages = group_advantages(rewards.view(config.questions, config.answers)).flatten()
        with torch.no_grad():
            weighted = advantages[:, None].expand(tokens.shape)
            if self.credit is not None:
                weighted = weighted * self.credit(model, tokens, response, advantages, generator)
            before = token_log_probs(model, tokens, config.temperature)
            anchor = None
            if self.reference is not None:
                anchor = token_log_probs(self.reference, tokens, config.temperature)
        losses = []
        order = torch.randperm(len(tokens), generator=generator, device=self.device)
        for rows in order.chunk(config.minibatches):
            now = token_log_probs(model, tokens[rows], config.temperature)
            loss = clipped_objective(now, before[rows], weighted[rows], response[rows], config.clip)
            if anchor is not None:
                loss = loss + config.kl * divergence(now, anchor[rows], response[rows])
            if not math.isfinite(loss.item()):
                raise ValueError(f"the loss is {loss.item()} at step {index + 1}: lower lr (now {config.lr}).")
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if config.clip_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            self.optimizer.step()
            losses.append(loss.item())
        return rewards.mean().item(), sum(losses) / len(losses), response.sum(1).float().mean().item()

    def save(self, path: Path, result: GrpoResult) -> None:
        """Write the state; a reader finds the old one or the new one, never half of it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "config": asdict(self.config),
            "result": asdict(result),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "reference": None if self.reference is None else self.reference.state_dict(),
        }
        part = path.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, path)

    def restore(self, path: Path, result: GrpoResult) -> None:
        """Read the state of the same recipe into the model, the optimiser and `result`."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        refuse_other_recipe(path, state["config"], asdict(self.config))
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.reference is not None:
            self.reference.load_state_dict(state["reference"])
        for name, value in state["result"].items():
            setattr(result, name, value)
