"""A model to a folder, for transformers or packed: all of it, or nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .checkpoints import PACKED, weights_beside_packed
from .engine import Engine

# What a tokenizer may be kept in; copied as it is.
TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "encoder.json",
    "vocab.bpe",
    "added_tokens.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


def save_pretrained(model: Engine[Any], folder: Path, *, tokenizer_folder: Path | None) -> None:
    """Write `model` and the tokenizer's files of `tokenizer_folder` into `folder`, which is made if need be.

    OSError names the folder; no half file stays behind.
    """
    config = {**json.loads(model.config.to_json()), "torch_dtype": model.dtype}
    _save(
        folder,
        {
            "model.safetensors": lambda path: model.save_safetensors(str(path)),
            "config.json": lambda path: path.write_text(
                json.dumps(config, indent=2) + "\n", encoding="utf-8"
            ),
        },
        tokenizer_folder,
    )


def save_packed(model: Engine[Any], folder: Path, *, tokenizer_folder: Path | None) -> None:
    """The same with a packed file; ValueError for a folder that has other weights."""
    check_packed_folder(folder)
    _save(
        folder,
        {
            PACKED: lambda path: model.save_packed(str(path)),
            "config.json": lambda path: path.write_text(model.config.to_json(), encoding="utf-8"),
        },
        tokenizer_folder,
    )


def check_packed_folder(folder: Path) -> None:
    """OSError for a file, ValueError for a folder that would load as something else than packed weights."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"cannot save the model in {folder}: it is not a folder")
    other = weights_beside_packed(folder)
    if other is not None:
        raise ValueError(
            f"cannot save packed weights in {folder}: it has weights already ({other.name}); "
            "take another folder"
        )


def _save(folder: Path, writers: dict[str, Callable[[Path], object]], tokenizer_folder: Path | None) -> None:
    """Every file is complete elsewhere before the first takes its place."""
    if tokenizer_folder is not None:
        sources = (tokenizer_folder / name for name in TOKENIZER_FILES)
        writers = writers | {
            source.name: partial(shutil.copyfile, source) for source in sources if source.is_file()
        }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Within the folder, so that moving a file out of it is one step, and nothing is left on another disk.
        with TemporaryDirectory(prefix=".saving-", dir=folder, ignore_cleanup_errors=True) as unfinished:
            for name, write in writers.items():
                write(Path(unfinished) / name)
            # safetensors makes files that nobody but their owner may read.
            for name in writers:
                shutil.copymode(Path(unfinished, "config.json"), Path(unfinished, name))
            for name in writers:
                Path(unfinished, name).replace(folder / name)
    except OSError as error:
        raise type(error)(f"cannot save the model in {folder}: {error}") from error
