"""Every system: equal to the recordings, whole at the published counts, and its experiments run."""

from __future__ import annotations

import math
from functools import cache

import pytest

from regard.proofs import check_recorded, get_proofs
from regard.registry import find_variant, get_system, list_mixers, list_models, list_systems
from regard.training import train
from regard.workbench.verify import check_variant

SYSTEMS = list_systems()


@cache
def proofs(slug):
    found = get_proofs(slug)
    assert found is not None, f"{slug} has no proofs"
    return found


@pytest.mark.parametrize(
    ("slug", "case"),
    [(slug, case) for slug in SYSTEMS for case in proofs(slug).recordings],
    ids=lambda value: getattr(value, "name", value),
)
def test_equals_the_authors_recording(slug, case):
    check = check_recorded(case)
    assert check.holds, check.figures
    assert check.figures["tensors_compared"] > 0


@pytest.mark.parametrize(
    ("slug", "check"),
    [(slug, check) for slug in SYSTEMS for check in proofs(slug).checks],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_exactness_checks(slug, check):
    result = check()
    assert result.holds, result.figures


@pytest.mark.parametrize("name", list_models())
def test_variant_has_the_published_counts(name):
    check = check_variant(find_variant(name)[1])
    assert check.holds, check.figures


@pytest.mark.parametrize(("slug", "task"), [(slug, task) for slug in SYSTEMS for task in (None, *proofs(slug).recipes)])
def test_trains(slug, task):
    recipe = proofs(slug).recipe_for(task)("smoke")
    result = train(recipe.model, recipe.task, recipe.config, cpu=True)
    assert result.steps == recipe.config.steps
    assert all(math.isfinite(loss) for loss in result.losses)
    assert recipe.task.metric in result.metrics


@pytest.mark.parametrize(
    ("slug", "claim"),
    [(slug, claim) for slug in SYSTEMS for claim in proofs(slug).claims],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_claim_runs(slug, claim):
    check = claim("smoke")
    assert check.name
    assert check.figures
    assert isinstance(check.holds, bool)


@pytest.mark.parametrize("slug", SYSTEMS)
def test_card_is_complete(slug):
    system = get_system(slug)
    assert system.slug == slug
    assert system.title
    assert system.idea
    assert system.year > 2010
    assert set(system.mixers) <= set(list_mixers())
    assert system.evidence in ("authors_code", "other_code", "paper_text", "abstract_only")
    for variant in system.variants:
        assert variant.params is None or variant.source, f"{variant.name} states a count without its source"


def test_a_wrong_weight_is_noticed():
    """The comparison can fail: one changed weight of a hundred thousand breaks the equality."""
    from dataclasses import replace

    case = proofs("swin").recordings[0]

    def nudged(recording):
        params = {key: value.clone() for key, value in recording.params.items()}
        params["qkv.weight"].view(-1)[7] += 0.01
        return params

    assert not check_recorded(replace(case, params=nudged)).holds


def test_recordings_name_their_source():
    from regard.proofs import Recording, golden_folder

    for path in golden_folder().glob("*.json"):
        about = Recording.read(path.stem).about if path.with_suffix(".safetensors").exists() else None
        assert about is None or about.get("repo") or about.get("source"), path.name
