"""Tasks: data, loss, metrics and the trivial baseline for each kind of problem.

`create_task("scenes", size=32)` builds one by name; `list_tasks()` names them all. Modules load when a task is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from regard.checks import one_of
from regard.tasks.base import Task

_MODULES = {
    "scenes": "images",
    "digits": "images",
    "imagefolder": "images",
    "super_resolution": "restoration",
    "moving_digits": "video",
    "text": "language",
    "convex_hull": "pointing",
    "tour": "pointing",
    "shapes": "points",
    "detection": "points",
    "csl": "graphs",
    "far_label": "graphs",
}


def list_tasks() -> list[str]:
    """Names of all built-in tasks."""
    return sorted(_MODULES)


def create_task(name: str, **options: Any) -> Task:
    """Build the task `name`; `options` are its constructor's (all tasks take `seed`; many take `data=FOLDER_OR_FILE`).

    Raises:
        ValueError: for an unknown name (the nearest is suggested) or an option that the task refuses.
    """
    one_of("task", name, _MODULES)
    module = import_module(f"regard.tasks.{_MODULES[name]}")
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, Task) and value.__dict__.get("name") == name:
            return value(**options)
    raise AssertionError(f"regard.tasks.{_MODULES[name]} defines no task named {name!r}")


__all__ = ["Task", "create_task", "list_tasks"]
