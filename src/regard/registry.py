"""Names: which systems there are, and how a mixer or a model is built from its name.

A system is a module `regard/systems/<area>/<slug>.py`. It registers its mixers with `@register_mixer("name")` and itself
with `register_system(System(...))`. Listing systems reads the folder; modules load when something in them is asked for.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch import nn

from regard.checks import nearest

Evidence = Literal["authors_code", "other_code", "paper_text", "abstract_only"]


@dataclass(frozen=True)
class Variant:
    """One published model.

    Args:
        name: as in `create_model(name)`.
        build: makes it; keyword arguments override its configuration (`num_classes=`, `in_chans=`, ...).
        params: the published count of trainable parameters, to the unit where the authors' code gives it, else None.
        gmacs: published multiply-adds in 10^9 (papers often call them FLOPs), or None.
        inputs: shapes of the forward arguments at which `gmacs` holds, batch of 1 included.
        source: where the two figures come from.
        options: arguments of `build` that the published figures need besides the defaults.
    """

    name: str
    build: Callable[..., nn.Module]
    params: int | None = None
    gmacs: float | None = None
    inputs: tuple[tuple[int, ...], ...] = ((1, 3, 224, 224),)
    source: str = ""
    options: dict[str, Any] = field(default_factory=dict)


CODE = "parameters and multiply-adds of the authors' code in the released configuration"
README_FLOPS = "parameters of the authors' code in the released configuration; FLOPs of its README, one decimal"


def image_variant(
    name: str,
    build: Callable[..., nn.Module],
    params: int,
    gmacs: float | None,
    drop: float = 0.0,
    side: int = 224,
    *,
    source: str = CODE,
    **options: Any,
) -> Variant:
    """A classifier of square images of `side` pixels, with stochastic depth `drop`; `options` are those of `build`."""
    options |= {"drop_path_rate": drop} if drop else {}
    options |= {"img_size": side} if side != 224 else {}
    return Variant(name, build, params, gmacs, ((1, 3, side, side),), source, options)


@dataclass(frozen=True)
class System:
    """The card of a published system."""

    slug: str
    title: str
    year: int
    arxiv: str
    evidence: Evidence
    idea: str
    """What the mechanism does, in one or two sentences."""
    repo: str | None = None
    """Public repository (owner/name) whose behaviour this module follows."""
    mixers: tuple[str, ...] = ()
    variants: tuple[Variant, ...] = ()
    reports: tuple[str, ...] = ()
    """What the paper reports, with the setting; not measured here."""


_SYSTEMS: dict[str, System] = {}
_MIXERS: dict[str, Callable[..., nn.Module]] = {}
_FOLDER = Path(__file__).parent / "systems"
_GENERIC = ("regard.layers.attention",)

M = TypeVar("M", bound=type[nn.Module])


def register_system(system: System) -> System:
    """Make the models of `system` available by name; two models of one name are an error."""
    taken = {variant.name for other in _SYSTEMS.values() if other.slug != system.slug for variant in other.variants}
    clash = taken & {variant.name for variant in system.variants}
    if clash:
        raise ValueError(f"model names {sorted(clash)} of {system.slug!r} are taken by another system.")
    _SYSTEMS[system.slug] = system
    return system


def register_mixer(name: str) -> Callable[[M], M]:
    """Class decorator: make a mixer available as `create_mixer(name, dim, ...)`."""

    def add(mixer: M) -> M:
        known = _MIXERS.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (mixer.__module__, mixer.__qualname__):
            raise ValueError(f"mixer name {name!r} is taken by {known.__module__}.{known.__qualname__}.")
        _MIXERS[name] = mixer
        return mixer

    return add


def _areas() -> dict[str, str]:
    return {path.stem: path.parent.name for path in sorted(_FOLDER.glob("*/*.py")) if not path.stem.startswith("_")}


def _load(slugs: Sequence[str] | None = None) -> None:
    areas = _areas()
    for slug in areas if slugs is None else slugs:
        import_module(f"regard.systems.{areas[slug]}.{slug}")
    if slugs is None:
        for module in _GENERIC:
            import_module(module)


def list_systems(area: str | None = None) -> list[str]:
    """Slugs of all systems, or of one area ("backbones", "sequence", "restoration", ...)."""
    areas = _areas()
    if area is not None and area not in areas.values():
        raise ValueError(f"area={area!r} is not known.{nearest(area, set(areas.values()))}")
    return [slug for slug, home in areas.items() if area in (None, home)]


def system_area(slug: str) -> str:
    """The area whose folder holds the system `slug`."""
    return _areas()[slug]


def get_system(slug: str) -> System:
    """The card of a system.

    Raises:
        ValueError: for an unknown slug; the nearest is suggested.
    """
    if slug not in _areas():
        raise ValueError(f"system={slug!r} is not known.{nearest(slug, _areas())}")
    _load([slug])
    return _SYSTEMS[slug]


def list_models(pattern: str = "*") -> list[str]:
    """Names for `create_model`, by shell pattern: `list_models("*nat*")`."""
    _load()
    return sorted(
        variant.name
        for system in _SYSTEMS.values()
        for variant in system.variants
        if fnmatch.fnmatch(variant.name, pattern)
    )


def list_mixers() -> list[str]:
    """Names for `create_mixer`."""
    _load()
    return sorted(_MIXERS)


def mixer_class(name: str) -> Callable[..., nn.Module]:
    """The class behind a mixer name.

    Raises:
        ValueError: for an unknown name; the nearest is suggested.
    """
    if name not in _MIXERS:
        _load()
    if name not in _MIXERS:
        raise ValueError(f"mixer={name!r} is not known.{nearest(name, _MIXERS)}")
    return _MIXERS[name]


def create_mixer(name: str, dim: int, **options: Any) -> nn.Module:
    """Build a mixer: a module that maps `(batch, *spatial, dim)` to the same shape.

    Args:
        name: see `list_mixers()`.
        dim: channels. options: those of the mixer (`num_heads=`, `kernel_size=`, ...); see its class.

    Raises:
        ValueError: for an unknown name or option.
    """
    mixer = mixer_class(name)
    try:
        return mixer(dim, **options)
    except TypeError as error:
        raise ValueError(f"mixer {name!r} cannot be built from dim={dim}, {options}: {error}.") from error


def find_variant(name: str) -> tuple[System, Variant]:
    """The system and variant of a model name.

    Raises:
        ValueError: for an unknown name; the nearest is suggested.
    """
    # The slug is the usual prefix of its models, so that one module has to load and not all.
    likely = [slug for slug in _areas() if name.startswith(slug.split("_")[0])]
    for slugs in (likely, None):
        _load(slugs)
        for system in _SYSTEMS.values():
            for variant in system.variants:
                if variant.name == name:
                    return system, variant
    raise ValueError(f"model={name!r} is not known.{nearest(name, list_models())}")


def create_model(name: str, **overrides: Any) -> nn.Module:
    """Build a published model by name, with fresh weights.

    Args:
        name: see `list_models("*pattern*")`.
        overrides: arguments of the model that replace the published ones, such as `num_classes=10, in_chans=1,
            drop_path_rate=0.1`.

    Raises:
        ValueError: for an unknown name or argument.
    """
    _, variant = find_variant(name)
    try:
        return variant.build(**{**variant.options, **overrides})
    except TypeError as error:
        raise ValueError(f"model {name!r} cannot be built with {overrides}: {error}.") from error
