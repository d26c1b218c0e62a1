"""Results that survive: each finished piece of work is a file, so a run can be killed and started again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Store:
    """Finished pieces under `folder/parts`, found by what was asked for.

    A piece is named by its kind and a hash of its settings: ask for the same again and it is there; change anything and
    it is a new piece.
    """

    def __init__(self, folder: Path) -> None:
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"out={folder} is a file: name a folder for the results.")
        self.folder = folder
        self.parts = folder / "parts"
        self.parts.mkdir(parents=True, exist_ok=True)

    def _path(self, kind: str, settings: Mapping[str, Any]) -> Path:
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        return self.parts / f"{kind}-{digest}.json"

    def get(self, kind: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """The finished piece, or None (also if its file was cut short)."""
        path = self._path(kind, settings)
        try:
            return json.loads(path.read_text())["result"]
        except (OSError, ValueError, KeyError):
            return None

    def put(self, kind: str, settings: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Keep a finished piece; the file appears whole or not at all."""
        write_json(self._path(kind, settings), {"kind": kind, "settings": settings, "result": result})


def why(error: BaseException) -> str:
    """An error in one line, for the row of what failed."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    scratch = path.with_suffix(path.suffix + ".part")
    scratch.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(scratch, path)
