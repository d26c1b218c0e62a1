"""Tasks: data, loss, metrics and the trivial baseline for each kind of problem.

`create_task("scenes", size=32)` builds one by name; `list_tasks()` names them all. Modules load when a task is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from inspect import signature
from typing import Any

from regard.checks import nearest, one_of
from regard.tasks.base import Task

_MODULES = {
    "scenes": "images",
    "digits": "images",
    "imagefolder": "images",
    "super_resolution": "restoration",
    "moving_digits": "video",
    "moving_direction": "video",
    "text": "language",
    "masked_text": "masked",
    "convex_hull": "pointing",
    "tour": "pointing",
    "shapes": "shapes",
    "completion": "completion",
    "detection": "detection",
    "csl": "graphs",
    "far_label": "graphs",
    "molecules": "molecules",
    "position": "sequences",
    "even_tokens": "sequences",
    "match3": "sequences",
    "copy": "sequences",
    "recall": "sequences",
    "speech": "speech",
    "modular_arithmetic": "reasoning",
    "countdown": "reasoning",
    "forecast": "series",
    "denoising": "series",
    "translation": "translation",
}


def list_tasks() -> list[str]:
    """Names of all built-in tasks."""
    return sorted(_MODULES)


_OWN: ContextVar[str | None] = ContextVar("own data", default=None)
_IMAGE_OPTIONS = ("size", "channels", "seed", "label_smoothing")


@contextmanager
def own_data(data: str | None) -> Iterator[None]:
    """Inside, every task that is created reads the user's `data` (folder or file) in place of its built-in data.

    The built-in image tasks become the task "imagefolder". None changes nothing.
    """
    token = _OWN.set(data)
    try:
        yield
    finally:
        _OWN.reset(token)


def create_task(name: str, **options: Any) -> Task:
    """Build the task `name`; `options` are its constructor's (all tasks take `seed`; many take `data=FOLDER_OR_FILE`).

    Raises:
        ValueError: for an unknown name (the nearest is suggested) or an option that the task does not take.
    """
    one_of("task", name, _MODULES)
    data = _OWN.get()
    if data is not None:
        if name in ("scenes", "digits"):
            name, options = "imagefolder", {key: options[key] for key in _IMAGE_OPTIONS if key in options}
        options["data"] = data
    module = import_module(f"regard.tasks.{_MODULES[name]}")
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, Task) and value.__dict__.get("name") == name:
            known = _options_of(value)
            for option in options:
                if option not in known:
                    raise ValueError(f"the task {name!r} takes no {option}.{nearest(option, known)}")
            return value(**options)
    raise AssertionError(f"regard.tasks.{_MODULES[name]} defines no task named {name!r}")


def _options_of(task: type[Task]) -> set[str]:
    """Arguments of a task's constructor, and of its parents' as far as options are passed on to them."""
    known: set[str] = set()
    for owner in task.__mro__:
        if "__init__" in vars(owner):
            parameters = list(signature(vars(owner)["__init__"]).parameters.values())[1:]
            known |= {item.name for item in parameters if item.kind is not item.VAR_KEYWORD}
            if all(item.kind is not item.VAR_KEYWORD for item in parameters):
                break
    return known


__all__ = ["Task", "create_task", "list_tasks", "own_data"]
