"""The log of a run: JSON, a line for each event."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import durable
from .events import Event


class Log:
    """A callback that appends each event to a file, as {"event": its type, ...its fields}."""

    def __init__(self, path: Path, *, step: int | None) -> None:
        """Go on after `step` steps: what the file has of later ones, made again now, is dropped.

        None: begin, and drop all.
        """
        self._path = path
        if path.exists():
            kept = [entry for entry in read_log(path) if step is not None and entry["step"] <= step]
            durable.write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))

    def __call__(self, event: Event) -> None:
        """Append one event; OSError where the disk is full."""
        line = json.dumps({"event": type(event).__name__.lower(), **asdict(event)}, default=str)
        with (
            durable.writing(f"the log {self._path}", "; the checkpoints are as they were"),
            self._path.open("a", encoding="utf-8") as file,
        ):
            file.write(line + "\n")


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a file; a last line that was cut short is passed over."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                yield entry
