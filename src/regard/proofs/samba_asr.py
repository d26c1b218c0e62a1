"""Proofs of the Samba-ASR reconstruction: its scan and block as written, streams, growth, and a Transformer beside it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from regard import ops
from regard.flops import count_macs, count_params
from regard.layers import Mamba
from regard.measure import growth, peak_bytes
from regard.proofs.base import Check, Preset, Proofs, Recipe
from regard.proofs.experiments import least_seconds
from regard.skeletons.encoder_decoder import START, EncoderDecoder
from regard.systems.sequence.samba_asr import Recognizer, SambaASR, SpeechTransformer
from regard.tasks import create_task
from regard.training import TrainConfig, evaluate, seeded, train

BAND = 0.02
"""Two symbol error rates closer than this count as equal."""


def scan_is_the_recurrence() -> Check:
    """Every path of the scan in float32, whole and in two parts, against a loop over tokens in float64."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    worst = 0.0
    for length in (1, 31, 32, 33, 100):
        x, dt, a = draw(2, length, 5), draw(2, length, 5).exp() / 4, -draw(5, 4).exp()
        b, c, skip = draw(2, length, 4), draw(2, length, 4), draw(5)
        h, rows = torch.zeros(2, 5, 4, dtype=torch.float64), []
        for t in range(length):
            at = dt[:, t, :, None].double()
            h = (at * a).exp() * h + at * x[:, t, :, None] * b[:, t, None]
            rows.append((h * c[:, t, None]).sum(-1) + skip * x[:, t])
        expected = torch.stack(rows, 1)
        for backend in ("auto", "torch"):
            state, parts = None, []
            for part in (slice(None, length // 2), slice(length // 2, None)):
                out = ops.selective_scan(
                    x[:, part],
                    dt[:, part],
                    a,
                    b[:, part],
                    c[:, part],
                    skip=skip,
                    state=state,
                    return_state=True,
                    backend=backend,
                )
                parts, state = [*parts, out[0]], out[1]
            whole = ops.selective_scan(x, dt, a, b, c, skip=skip, backend=backend)
            for ours, theirs in ((whole, expected), (torch.cat(parts, 1), expected), (state, h)):
                worst = max(worst, float((ours - theirs).abs().max() / theirs.abs().max()))
    return Check(
        "the scan in chunks and in the kernel = the recurrence token by token, whole and carried on",
        holds=worst <= 1e-6,
        figures={"largest_relative_error": worst},
        setting="float32 against float64, lengths 1, 31, 32, 33 and 100, limit 1e-6 of the largest value",
    )


def _slow_scan(mixer: Mamba, u: Tensor, end: str) -> Tensor:
    """y of one direction before the gate, for tokens u `(N, dim)` of one sample, number by number."""
    conv, project, step = (getattr(mixer, name + end) for name in ("conv1d", "x_proj", "dt_proj"))
    a = -getattr(mixer, f"A{end}_log").exp()
    h: Any = 0
    x = u @ mixer.in_proj.weight[: mixer.d_inner].T
    rows = []
    for t in range(len(u)):
        taps = [conv.weight[:, 0, -1 - back] * x[t - back] for back in range(min(mixer.d_conv, t + 1))]
        heard = torch.stack(taps).sum(0) + conv.bias
        heard = heard / (1 + (-heard).exp())
        rank, b, c = (project.weight @ heard).split([mixer.dt_rank, mixer.d_state, mixer.d_state])
        dt = (1 + (step.weight @ rank + step.bias).exp()).log()
        h = (dt[:, None] * a).exp() * h + (dt * heard)[:, None] * b
        rows.append(h @ c + getattr(mixer, f"D{end}") * heard)
    return torch.stack(rows)


def block_as_written() -> Check:
    """The mixer, one way and both ways, against its equations token by token, outputs and gradients."""
    worst = 0.0
    for causal in (True, False):
        mixer = seeded(partial(Mamba, 6, causal=causal, d_state=3, d_conv=3), 0).double()
        generator = torch.Generator().manual_seed(1)
        x, weight = (torch.randn(2, 37, 6, dtype=torch.float64, generator=generator) for _ in range(2))
        slow = []
        for u in x:
            y = _slow_scan(mixer, u, "")
            if not causal:
                y = y + _slow_scan(mixer, u.flip(0), "_b").flip(0)
            z = u @ mixer.in_proj.weight[mixer.d_inner :].T
            slow.append((y * z / (1 + (-z).exp())) @ mixer.out_proj.weight.T)
        outs = mixer(x), torch.stack(slow)
        grads = [torch.autograd.grad((out * weight).sum(), list(mixer.parameters())) for out in outs]
        pairs = zip((outs[0], *grads[0]), (outs[1], *grads[1]), strict=True)
        worst = max(worst, *(float(((a - b).abs().max() / b.abs().max()).detach()) for a, b in pairs))
    return Check(
        "the Mamba mixer, one way and both ways, = its equations token by token, with the gradients of all parameters",
        holds=worst <= 1e-11,
        figures={"largest_relative_error": worst},
        setting="float64, 37 tokens, limit 1e-11",
    )


def stream_is_the_whole() -> Check:
    """Token by token in float32, from a state that does not grow; padding in front is as if not there."""
    mixer = seeded(partial(Mamba, 32, causal=True), 0)
    x = torch.randn(2, 200, 32, generator=torch.Generator().manual_seed(0))
    state, outs, sizes = None, [], set()
    with torch.no_grad():
        for token in x.unbind(1):
            out, state = mixer.step(token, state)
            outs.append(out)
            sizes.add(sum(part[0].numel() for part in state))
        expected = mixer(x)
        mask = torch.arange(200) >= torch.tensor([[0], [60]])
        padded, alone = mixer(x, mask)[1, 60:], mixer(x[1:, 60:])[0]
    error = float((torch.stack(outs, 1) - expected).abs().max())
    padding = float((padded - alone).abs().max())
    return Check(
        "streaming = all at once, from a state of constant size; padding in front changes nothing",
        holds=error <= 1e-5 and padding <= 1e-5 and sizes == {mixer.state_size(1)},
        figures={"largest_error": error, "largest_error_behind_padding": padding, "state_numbers": mixer.state_size(1)},
        setting="float32, 200 tokens, limit 1e-5; every state counted",
    )


def _models(dim: int, depth: int, vocab_size: int) -> dict[str, Callable[[], Recognizer]]:
    """Both readings of the cross-connection, and a Transformer, with about as many parameters."""
    return {
        "concat": partial(SambaASR, vocab_size, dim, depth, depth),
        "state": partial(SambaASR, vocab_size, dim, depth, max(1, depth // 2), cross="state"),
        "transformer": partial(SpeechTransformer, vocab_size, dim, depth, depth, mlp_ratio=1.5),
    }


def decoding_is_the_forward_pass() -> Check:
    """Greedy answers, step by step, against teacher forcing at once; ragged sounds in one batch against each alone."""
    generator = torch.Generator().manual_seed(0)
    sounds = torch.randn(3, 5000, dtype=torch.float64, generator=generator)
    lengths, worst, same = torch.tensor([5000, 300, 3100]), 0.0, True
    with torch.no_grad():
        for build in _models(16, 2, 7).values():
            model = seeded(build, 0).double().eval()
            memory, state = model.encode(sounds, lengths)
            last, said, logits = torch.full((3,), START), [], []
            for _ in range(6):
                out, state = model.advance(last, memory, state)
                last = out[:, 1:].argmax(-1) + 1  # an answer that does not end
                said.append(last)
                logits.append(out)
            answers = torch.stack(said, 1)
            at_once = model(sounds, lengths, answers)
            same &= bool((at_once[..., 1:].argmax(-1) + 1 == answers).all())
            alone = [model(sounds[row : row + 1, :n], None, answers[row : row + 1]) for row, n in enumerate(lengths)]
            slow = EncoderDecoder.forward(model, sounds, lengths, answers)
            for other in (torch.stack(logits, 1), slow, torch.cat(alone)):
                worst = max(worst, float((at_once - other).abs().max()))
    return Check(
        "saying symbols one by one = all at once, and a sound in a padded batch = the sound alone, for both "
        "cross-connections and the Transformer",
        holds=same and worst <= 1e-12,
        figures={"largest_error": worst, "same_greedy_answers": int(same)},
        setting="float64, sounds of 5000, 300 (less than a frame) and 3100 samples, limit 1e-12",
    )


def _config(preset: Preset, steps: int) -> TrainConfig:
    smoke = preset == "smoke"
    return TrainConfig(steps=2 if smoke else steps, batch_size=4 if smoke else 16, lr=3e-3, weight_decay=0.01)


def _drawn(preset: Preset, **options: Any) -> Any:
    """One to three digits by the formant synthesiser, so that figures do not depend on what else is installed."""
    sizes = {"train_items": 8, "eval_items": 8} if preset == "smoke" else {"train_items": 2000, "eval_items": 200}
    return create_task("speech", source="formants", **{**sizes, **options})


def recipe(preset: Preset) -> Recipe:
    """Strings of spoken digits; "paper" has the paper's optimiser and batch with our base size (the paper's is unknown)."""
    if preset == "paper":
        task: Any = create_task("speech", words="letters", symbols=(1, 8), snr=(0, 30), train_items=100_000)
        model = seeded(partial(SambaASR, task.vocab_size, 384, 16, 12, sample_rate=task.sample_rate), 0)
        return Recipe(model, task, TrainConfig(steps=30_000, batch_size=256, lr=1e-4, weight_decay=0.01))
    smoke = preset == "smoke"
    task = create_task("speech", **({"train_items": 8, "eval_items": 8} if smoke else {}))
    model = seeded(partial(SambaASR, task.vocab_size, 16 if smoke else 64, 2, 2, sample_rate=task.sample_rate), 0)
    return Recipe(model, task, _config(preset, 600))


class _Listener(nn.Module):
    """What a recogniser does with a sound before the first symbol."""

    def __init__(self, model: Recognizer) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: Tensor) -> Tensor:
        return self.model.listen(features)[0]


def time_grows_with_the_length(preset: Preset) -> Check:
    """Encoders over features of growing length: multiply-adds, time and memory."""
    smoke = preset == "smoke"
    frames = [100, 200, 400] if smoke else [500, 1000, 2000, 4000, 8000]
    encoders = {
        "mamba": _Listener(seeded(partial(SambaASR, 11, 64, 2, 1), 0)),
        "attention": _Listener(seeded(partial(SpeechTransformer, 11, 64, 2, 1, mlp_ratio=1.5), 0)),
    }
    figures: dict[str, float | int | str | list[float]] = {"frames": [float(length) for length in frames]}
    inputs = [
        torch.randn(1 if smoke else 8, length, 80, generator=torch.Generator().manual_seed(0)) for length in frames
    ]
    slopes: dict[str, float] = {}
    for name, encoder in encoders.items():

        def training(x: Tensor, encoder: nn.Module = encoder) -> Tensor:
            out = encoder(x)
            out.sum().backward()
            return out

        macs = [count_macs(encoder, x) for x in inputs]
        times = least_seconds([partial(encoder, x) for x in inputs], 2 if smoke else 5)
        bytes_held = [peak_bytes(partial(training, x)) for x in inputs[-2:]]
        for what, values in (("macs", macs), ("time", times)):
            slopes[f"{name}_{what}"] = growth(frames, values)
            slopes[f"{name}_{what}_last"] = math.log2(values[-1] / values[-2])
        slopes[f"{name}_training_memory_last"] = math.log2(bytes_held[1] / bytes_held[0])
        figures[f"{name}_training_megabytes_at_the_longest"] = round(bytes_held[1] / 2**20, 2)
        figures[f"{name}_times_over_the_first"] = [round(seconds / times[0], 2) for seconds in times]
    figures |= {f"{name}_growth": round(value, 3) for name, value in slopes.items()}
    model = encoders["mamba"].model
    figures["numbers_kept_to_say_the_text"] = model.state_size()
    figures["numbers_the_transformer_keeps_at_the_longest"] = 64 * (frames[-1] // 4)
    return Check(
        "The cost of the encoder grows linearly with the length of the sound, that of attention towards the square (abstract)",
        holds=abs(slopes["mamba_macs"] - 1) <= 0.02
        and abs(slopes["mamba_time"] - 1) <= 0.15
        and slopes["attention_macs_last"] > 1.5
        and slopes["attention_time_last"] > slopes["mamba_time_last"] + 0.3,
        figures=figures,
        setting=f"{', '.join(map(str, frames))} frames of 10 ms, four of them a token, {len(inputs[0])} sounds at once (the "
        "fixed cost of a call would weigh most on one), 64 channels, two blocks; fitted exponents, and those of the last "
        "doubling; least processor time of the forward pass with fused attention; holds if Mamba's multiply-adds grow by "
        "1 +- 0.02 and its time by 1 +- 0.15, and at the last doubling attention's multiply-adds by more than 1.5 and its time "
        "by 0.3 more than Mamba's. Memory of a training step is reported, not judged",
    )


@cache
def _trained(preset: Preset) -> tuple[dict[str, list[Recognizer]], str]:
    """Each recogniser trained on the same digits with the same budget, by name, one for each seed; and the setting."""
    smoke = preset == "smoke"
    task, config = _drawn(preset), _config(preset, 500)
    seeds = (0,) if smoke else (0, 1)
    models: dict[str, list[Recognizer]] = {}
    for name, build in _models(*((16, 1) if smoke else (64, 2)), task.vocab_size).items():
        models[name] = []
        for seed in seeds if name != "state" else seeds[:1]:
            model: Any = seeded(build, seed)
            train(model, task, TrainConfig(**{**vars(config), "seed": seed}), cpu=True)
            models[name].append(model)
    sizes = ", ".join(f"{name} {count_params(of[0]):,}" for name, of in models.items())
    setting = (
        f"one to three digits by the formant synthesiser at 10 to 30 dB, {config.steps} steps of {config.batch_size}, the same "
        f"rate for all, seeds {list(seeds)} (state: the first); parameters: {sizes}"
    )
    return models, setting


def _errors(models: dict[str, list[Recognizer]], task: Any) -> dict[str, list[float]]:
    return {
        name: [round(evaluate(model, task, batch_size=50)[task.metric], 4) for model in of]
        for name, of in models.items()
    }


def as_good_as_a_transformer(preset: Preset) -> Check:
    """Symbol error rates of equally large recognisers after the same training, and on longer strings than trained."""
    models, setting = _trained(preset)
    task = _drawn(preset)
    errors = _errors(models, task)
    longer = _errors(models, _drawn(preset, symbols=5, eval_items=8 if preset == "smoke" else 100))
    mean = {name: statistics.fmean(values) for name, values in errors.items()}
    trivial = task.trivial()
    return Check(
        "Mamba in attention's place recognises speech as well as a Transformer of its size (abstract)",
        holds=mean["concat"] < 0.05 and mean["concat"] <= mean["transformer"] + BAND,
        figures={
            **{f"{name}_error": values for name, values in errors.items()},
            **{f"{name}_error_at_5_digits": values for name, values in longer.items()},
            "trivial_error": round(trivial[task.metric], 4),
        },
        setting=f"symbol error rate on new strings; {setting}. Holds if concat's mean is below 0.05 and at most {BAND} "
        "above the Transformer's. 200 strings, and 100 of five digits, which are longer than any heard in training",
    )


def noise(preset: Preset) -> Check:
    """The same recognisers on the same strings in more and more noise."""
    models, setting = _trained(preset)
    levels = (20, 0) if preset == "smoke" else (20, 15, 10, 5, 0)
    strings = 8 if preset == "smoke" else 100
    rows = [_errors(models, _drawn(preset, snr=level, eval_items=strings)) for level in levels]
    curves = {name: [round(statistics.fmean(row[name]), 4) for row in rows] for name in models}
    lost = {name: curve[-1] - curve[0] for name, curve in curves.items()}
    trivial = _drawn(preset).trivial()["symbol_error_rate"]
    return Check(
        "Samba-ASR loses no more to noise than a Transformer of its size (the paper claims robustness, without figures)",
        holds=lost["concat"] <= lost["transformer"] + BAND and curves["concat"][0] < trivial / 2,
        figures={
            "decibels": [float(level) for level in levels],
            **{f"{name}_error": curve for name, curve in curves.items()},
            **{f"{name}_lost": round(value, 4) for name, value in lost.items()},
        },
        setting=f"mean symbol error rate over seeds of {strings} strings at {', '.join(map(str, levels))} dB (below 10 dB "
        f"unheard in training); {setting}. Holds if concat's error rises by at most {BAND} more than the Transformer's from "
        "first to last, and begins below half of the trivial answer's",
    )


PROOFS = Proofs(
    checks=(scan_is_the_recurrence, block_as_written, stream_is_the_whole, decoding_is_the_forward_pass),
    recipe=recipe,
    claims=(time_grows_with_the_length, as_good_as_a_transformer, noise),
)
