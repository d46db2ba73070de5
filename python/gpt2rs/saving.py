"""A model to a folder that transformers loads: all of it, or nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from . import _core

# What a tokenizer may be kept in; copied as it is.
_TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "encoder.json",
    "vocab.bpe",
    "added_tokens.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


def save_pretrained(model: _core.Model, folder: Path, *, tokenizer_folder: Path | None) -> None:
    """Write `model` and the tokenizer's files of `tokenizer_folder` into `folder`, made where it does not
    exist.

    Every file is complete under another name before the first takes its place.  OSError names the folder; no
    half file stays behind.
    """
    config = {**json.loads(model.config.to_json()), "torch_dtype": model.dtype}
    writers: dict[str, Callable[[Path], object]] = {
        "model.safetensors": lambda path: model.save_safetensors(str(path)),
        "config.json": lambda path: path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8"),
    }
    if tokenizer_folder is not None:
        sources = (tokenizer_folder / name for name in _TOKENIZER_FILES)
        writers |= {source.name: partial(shutil.copyfile, source) for source in sources if source.is_file()}
    # The process id keeps two processes that save at the same time apart.
    beside = {name: folder / f".{name}.{os.getpid()}.tmp" for name in writers}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, write in writers.items():
            write(beside[name])
        for name, path in beside.items():
            path.replace(folder / name)
    except OSError as error:
        raise type(error)(
            error.errno, f"cannot save the model: {error.strerror or error}", str(folder)
        ) from error
    finally:
        for path in beside.values():
            path.unlink(missing_ok=True)
