"""Proofs of MoH in language models: trained from scratch, and trained ones that go on with fewer heads."""

from __future__ import annotations

import statistics
from dataclasses import replace
from functools import partial
from typing import Any

from regard.proofs.base import Check, Preset, Recipe
from regard.registry import create_model
from regard.skeletons.hugging_face import HuggingFaceLM
from regard.systems.backbones.moh import MoHLlama, to_moh
from regard.tasks import create_task
from regard.training import TrainConfig, evaluate, seeded, train

CONTEXT = 128


def _small_llama(task: Any, **options: Any) -> MoHLlama:
    size = {"dim": 64, "depth": 2, "num_heads": 8, "kv_heads": 4, "glu_dim": 160, "rope_base": 10_000.0}
    return MoHLlama(vocab_size=task.vocab_size, **{**size, **options})


def language(preset: Preset) -> Recipe:
    """A small MoH-LLaMA with learned routers on characters; "paper" is MoH-LLM-S at 75 % with the paper's rates and tokens."""
    task = create_task("text", unit="character", length=2048 if preset == "paper" else CONTEXT)
    if preset == "paper":
        model = seeded(lambda: create_model("moh_llm_s_75", vocab_size=task.vocab_size), 0)  # type: ignore[attr-defined]
        config = TrainConfig(steps=24_000, batch_size=2048, lr=3e-4, weight_decay=0.1, warmup=2000 / 24_000)
        return Recipe(model, task, config)
    config = TrainConfig(
        steps=2 if preset == "smoke" else 250, batch_size=16, lr=3e-3, weight_decay=0.1, betas=(0.9, 0.99)
    )
    build = partial(_small_llama, task, router="learned", shared_heads=4, routed_heads=2)
    return Recipe(seeded(build, 0), task, config)


def trained_models_become_moh(preset: Preset) -> Check:
    """A trained small LLaMA, its heads then cut to three quarters a token by the router without parameters, trained on."""
    smoke = preset == "smoke"
    task = create_task("text", unit="character", length=CONTEXT)
    config = TrainConfig(steps=2 if smoke else 200, batch_size=8, lr=3e-3, weight_decay=0.1)
    tune = replace(config, steps=2 if smoke else 80, lr=1e-3)
    seeds = (0,) if smoke else (0, 1)
    bits: dict[str, list[float]] = {name: [] for name in ("dense", "dense_trained_on", "moh_converted", "moh_tuned")}
    for seed in seeds:
        dense = seeded(partial(_small_llama, task, shared_heads=8, routed_heads=0), seed)
        moh = _small_llama(task, shared_heads=4, routed_heads=2)
        bits["dense"].append(train(dense, task, replace(config, seed=seed), cpu=True).metrics["bits_per_byte"])
        moh.load_state_dict(dense.state_dict())
        bits["moh_converted"].append(evaluate(moh, task)["bits_per_byte"])
        for name, model in (("dense_trained_on", dense), ("moh_tuned", moh)):
            bits[name].append(train(model, task, replace(tune, seed=seed + 100), cpu=True).metrics["bits_per_byte"])
    mean = {name: statistics.fmean(values) for name, values in bits.items()}
    return Check(
        "A trained language model continues as MoH with three quarters of its heads, and recovers what that costs at first",
        holds=mean["moh_tuned"] <= mean["dense"] and mean["moh_tuned"] <= 1.05 * mean["dense_trained_on"],
        figures={
            **{name: [round(value, 4) for value in values] for name, values in bits.items()},
            "converted_over_dense": round(mean["moh_converted"] / mean["dense"], 4),
            "tuned_over_dense": round(mean["moh_tuned"] / mean["dense"], 4),
            "tuned_over_dense_trained_on": round(mean["moh_tuned"] / mean["dense_trained_on"], 4),
            "trivial_bits_per_byte": round(task.trivial()["bits_per_byte"], 4),
        },
        setting=f"characters of {task.corpus}, LLaMA of 2 blocks, dim 64, 8 heads, {config.steps} steps of 8, then "
        f"{tune.steps} at a third of the rate, dense and as MoH (4 heads shared, 2 of 4 by query norm), seeds {list(seeds)}, "
        "bits per byte (lower is better); holds if the tuned MoH is not above the dense model it came from, and at most 5 % "
        "above the same model trained on dense (the paper: more than 95 % recovered, then better)",
    )


def models_of_transformers_become_moh(preset: Preset) -> Check:
    """A LLaMA of `transformers`, trained, then routed by `to_moh` and trained on: at once, as in the paper, and gradually."""
    smoke = preset == "smoke"
    task: Any = create_task("text", unit="character", length=CONTEXT)
    config = TrainConfig(steps=2 if smoke else 200, batch_size=8, lr=3e-3, weight_decay=0.1)
    tune = replace(config, steps=2 if smoke else 80, lr=1e-3)
    seeds = (0,) if smoke else (0, 1)
    llama = {
        "model_type": "llama",
        "vocab_size": task.vocab_size,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 160,
    }
    names = ("dense", "dense_trained_on", "moh_converted", "moh_tuned", "moh_tuned_gradually")
    bits: dict[str, list[float]] = {name: [] for name in names}
    for seed in seeds:
        dense = seeded(partial(HuggingFaceLM, llama), seed)
        moh, gradual = HuggingFaceLM(llama), HuggingFaceLM(llama)
        bits["dense"].append(train(dense, task, replace(config, seed=seed), cpu=True).metrics["bits_per_byte"])
        for model, routed in ((moh, 2), (gradual, 3)):
            model.load_state_dict(dense.state_dict())
            to_moh(model, shared_heads=4, routed_heads=routed)
        bits["moh_converted"].append(evaluate(moh, task)["bits_per_byte"])

        def fewer(step: int, loss: float, model: HuggingFaceLM = gradual) -> None:
            if step == tune.steps // 2:
                to_moh(model, shared_heads=4, routed_heads=2)

        for name, model in (("dense_trained_on", dense), ("moh_tuned", moh), ("moh_tuned_gradually", gradual)):
            on_step = fewer if model is gradual else None
            result = train(model, task, replace(tune, seed=seed + 100), on_step=on_step, cpu=True)
            bits[name].append(result.metrics["bits_per_byte"])
    mean = {name: statistics.fmean(values) for name, values in bits.items()}
    return Check(
        "A trained LLaMA of transformers goes on with three quarters of its heads, and recovers what that costs at first",
        holds=mean["moh_tuned"] <= mean["dense"] and mean["moh_tuned"] <= 1.05 * mean["dense_trained_on"],
        figures={
            **{name: [round(value, 4) for value in values] for name, values in bits.items()},
            "converted_over_dense": round(mean["moh_converted"] / mean["dense"], 4),
            "tuned_over_dense": round(mean["moh_tuned"] / mean["dense"], 4),
            "tuned_over_dense_trained_on": round(mean["moh_tuned"] / mean["dense_trained_on"], 4),
            "gradually_over_at_once": round(mean["moh_tuned_gradually"] / mean["moh_tuned"], 4),
        },
        setting=f"LlamaForCausalLM of 2 layers, 64 channels, 8 heads, characters of {task.corpus}, {config.steps} steps of 8, "
        f"then {tune.steps} at a third of the rate: dense, with 4 heads shared and 2 of 4 routed at once, and with 3 of 4 for "
        f"the first half of that; seeds {list(seeds)}, bits per byte (lower is better); holds if the model routed at once is "
        "not above the dense one it came from, and at most 5 % above that one trained on (as for this library's LLaMA)",
    )
