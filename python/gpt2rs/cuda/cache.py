"""Machine code on disk, so that a kernel is compiled once for each GPU architecture and compiler.

A file is the SHA-256 of the code, then the code; one that does not match, or can't be read, counts as absent.
Nothing here raises for a folder that can't be used: compiling again is slow, not wrong.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import tempfile
from pathlib import Path

_DIGEST = hashlib.sha256().digest_size


def folder() -> Path | None:
    """`GPT2RS_CACHE_DIR`, or `gpt2rs` in the user's cache folder; None where there is neither."""
    if chosen := os.environ.get("GPT2RS_CACHE_DIR"):
        return Path(chosen).expanduser() / "cubins"
    try:
        return _user_cache() / "gpt2rs" / "cubins"
    except RuntimeError:
        # A user without a home.
        return None


def load(key: str) -> bytes | None:
    """What was stored under a key, if it is there and whole."""
    place = folder()
    if place is None:
        return None
    try:
        data = (place / f"{key}.cubin").read_bytes()
    except OSError:
        return None
    code = data[_DIGEST:]
    return code if hashlib.sha256(code).digest() == data[:_DIGEST] else None


def store(key: str, code: bytes) -> None:
    """Keep code under a key; other processes see the whole file or none."""
    place = folder()
    if place is None:
        return
    try:
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, name = tempfile.mkstemp(dir=place)
    except OSError:
        return
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(code).digest() + code)
        Path(name).replace(place / f"{key}.cubin")
    except OSError:
        with contextlib.suppress(OSError):
            Path(name).unlink()


def _user_cache() -> Path:
    """By the XDG base directory specification, which has relative paths ignored; its like on Windows."""
    given = Path(os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME", ""))
    return given if given.is_absolute() else Path.home() / ".cache"
