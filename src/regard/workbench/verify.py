"""`regard verify`: run a system's four proofs and write the evidence.

exact  equality with recordings of the authors' code (or with an independent slow form), outputs and gradients
whole  every published variant builds with the published parameter count, and multiply-adds within 2 %
trains the system's own task, end to end, ends better than the trivial answer
claim  what the paper is known for, as a controlled experiment; reported as it comes out
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from regard import checks
from regard.flops import count_macs, count_params
from regard.proofs import Check, Recipe, check_recorded, get_proofs
from regard.proofs.base import Preset
from regard.registry import Variant, get_system, list_systems, system_area
from regard.training import train
from regard.workbench import machine
from regard.workbench.store import write_json

PROOFS = ("exact", "whole", "trains", "claim")
MACS_TOLERANCE = 0.02


def evidence_folder() -> Path:
    """Where evidence lies: `evidence/` of the checkout, or of the current folder outside one."""
    checkout = Path(__file__).parents[3]
    return (checkout if (checkout / "pyproject.toml").exists() else Path.cwd()) / "evidence"


def check_variant(variant: Variant) -> Check:
    """Build a published variant on the meta device; compare its counts with the published ones."""
    with torch.device("meta"):
        model = variant.build(**variant.options)
    params = count_params(model)
    figures: dict[str, float | int | str] = {"params": params}
    holds = True
    if variant.params is not None:
        figures["params_published"] = variant.params
        holds = params == variant.params
    if variant.gmacs is not None:
        macs = count_macs(model, *(torch.empty(shape, device="meta") for shape in variant.inputs))
        figures |= {"gmacs": round(macs / 1e9, 4), "gmacs_published": variant.gmacs}
        holds = holds and abs(macs / 1e9 / variant.gmacs - 1) <= MACS_TOLERANCE
    return Check(variant.name, holds, figures, variant.source)


def run_proof(slug: str, proof: str, preset: Preset, note: Callable[[str], None] = lambda text: None) -> list[Check]:
    """All checks of one proof.

    Raises:
        ValueError: for an unknown system or proof, or a system without proofs.
    """
    checks.one_of("proof", proof, PROOFS)
    system, proofs = get_system(slug), get_proofs(slug)
    if proofs is None:
        raise ValueError(f"system {slug!r} has no proofs yet: write regard/proofs/{slug}.py.")
    results: list[Check] = []

    def add(check: Check) -> None:
        results.append(check)
        note(("holds  " if check.holds else "FAILS  ") + check.name)

    if proof == "exact":
        for case in proofs.recordings:
            add(check_recorded(case))
        for run in proofs.checks:
            add(run())
    elif proof == "whole":
        for variant in system.variants:
            add(check_variant(variant))
    elif proof == "trains":
        for task in (None, *proofs.recipes):
            command = f"regard train {slug}" + (f" --task {task}" if task else "") + f" --preset {preset}"
            add(_trains(proofs.recipe_for(task)(preset), command, note))
    else:
        for claim in proofs.claims:
            add(claim(preset))
    return results


def _trains(recipe: Recipe, command: str, note: Callable[[str], None]) -> Check:
    task, config = recipe.task, recipe.config
    every = max(1, config.steps // 10)

    def on_step(step: int, loss: float) -> None:
        if step % every == 0:
            note(f"step {step} of {config.steps}, loss {loss:.4f}")

    result = train(recipe.model, task, config, on_step=on_step)
    trivial, ours = task.trivial()[task.metric], result.metrics[task.metric]
    return Check(
        f"trains on {task.name}: {task.metric} better than {task.trivial_answer}",
        holds=task.better(ours, trivial),
        figures={
            **{name: round(value, 5) for name, value in result.metrics.items()},
            f"trivial_{task.metric}": round(trivial, 5),
            "steps": result.steps,
            "first_loss": round(fmean(result.losses[:5]), 4),
            "last_loss": round(fmean(result.losses[-5:]), 4),
            "params": count_params(recipe.model),
        },
        setting=f"{task.description} batch {config.batch_size}, lr {config.lr}, seed {config.seed}, "
        f"`{command}`" + (f". {recipe.note}" if recipe.note else ""),
    )


def verify(
    slug: str,
    *,
    proofs: Sequence[str] = PROOFS,
    preset: Preset = "small",
    folder: Path | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Run proofs of a system and write `folder/SLUG.json`; proofs that are not run keep their earlier evidence.

    Args:
        preset: the size of the trainings and claims; only "small" and "paper" leave evidence.
        note: is told what is going on, line by line.

    Returns:
        The whole evidence of the system.
    """
    folder = folder or evidence_folder()
    system = get_system(slug)
    path = folder / f"{slug}.json"
    evidence = read_evidence(folder).get(slug, {})
    evidence |= {"slug": slug, "title": system.title, "evidence": system.evidence, "arxiv": system.arxiv}
    done = dict(evidence.get("proofs", {}))
    for proof in proofs:
        note(f"{slug}: {proof}")
        started = time.perf_counter()
        results = run_proof(slug, proof, preset, note)
        done[proof] = {
            "holds": bool(results) and all(check.holds for check in results),
            "checks": [asdict(check) for check in results],
            "preset": preset,
            "command": f"regard verify {slug} --proof {proof} --preset {preset}",
            "date": datetime.now(timezone.utc).date().isoformat(),
            "minutes": round((time.perf_counter() - started) / 60, 2),
            "machine": machine.facts(),
        }
        evidence["proofs"] = {name: done[name] for name in PROOFS if name in done}
        if preset != "smoke":
            folder.mkdir(parents=True, exist_ok=True)
            write_json(path, evidence)
    return evidence


def read_evidence(folder: Path | None = None) -> dict[str, dict[str, Any]]:
    """All evidence on file, by slug; a file that cannot be read is left out."""
    found = {}
    for path in sorted((folder or evidence_folder()).glob("*.json")):
        try:
            content = json.loads(path.read_text())
        except ValueError:
            continue
        if isinstance(content, dict) and "slug" in content:
            found[content["slug"]] = content
    return found


def summary(folder: Path | None = None) -> list[dict[str, Any]]:
    """One row a system for `regard systems`, from the evidence files alone.

    A proof is "holds", "fails" (with how many of its checks did) or "missing".
    """
    evidence = read_evidence(folder)
    rows = []
    for slug in list_systems():
        proofs = evidence.get(slug, {}).get("proofs", {})
        row: dict[str, Any] = {
            "slug": slug,
            "area": system_area(slug),
            "title": evidence.get(slug, {}).get("title", ""),
        }
        for proof in PROOFS:
            entry = proofs.get(proof)
            if entry is None:
                row[proof] = "missing"
                continue
            good = sum(check["holds"] for check in entry["checks"])
            row[proof] = f"{good}/{len(entry['checks'])}"
        row["basis"] = evidence.get(slug, {}).get("evidence", "")
        rows.append(row)
    return rows
