"""Settings as a TOML file: read, and written beside the run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ..formats import read_text
from .settings import TrainSettings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that a file gives, by name, checked.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not TOML, or a setting is unknown or out of its range; the message names the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such settings file: {path}")
    text = read_text(path)  # which names the file itself
    try:
        values = tomllib.loads(text)
        # All of them together may still be refused, once others are added.
        TrainSettings.of(values)
    except ValueError as error:  # tomllib's own is one
        raise ValueError(f"{path}: {error}") from None
    return values


def toml(settings: TrainSettings) -> str:
    """All settings that have a value, a line each; reading it gives the same settings."""
    lines = ["# How this run was started; `gpt2rs train --settings FILE` repeats it."]
    for name in type(settings).__dataclass_fields__:
        value = getattr(settings, name)
        if value is not None:
            lines.append(f"{name} = {_toml_value(value)}")
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    """A TOML value: booleans, numbers, strings and lists of these are JSON's, but for one character."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml_value, value))}]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
