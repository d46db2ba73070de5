"""Weight files other than safetensors, read without the programs that wrote them.

Each module turns one kind of file into `Placement`s: under which of Hugging Face's names a tensor goes, and
where in which file its bytes lie. None of them reads the weights; the core does, in pieces, while it packs
them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# How the files begin, by which they are told apart without importing their readers.
ZIP_MAGIC = b"PK\x03\x04"
# A pickle of protocol 2 that holds the integer 0x1950a86a20f9469cfc6c: torch.save before PyTorch 1.6.
TORCH_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
LLMC_MAGIC = 20240326

# Configs and indexes are kilobytes, GPT-2's vocabulary is a megabyte; more than this is no such file.
TEXT_LIMIT = 16 << 20


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's elements are: C-contiguous, little-endian, from byte `offset` of the file `path`.

    `dtype` is a NumPy-style name ("float32", "bfloat16", "int64", ...). With `flipped`, the file holds the
    transpose of the tensor that was saved, and `shape` is the shape in the file.
    """

    path: str
    offset: int
    dtype: str
    shape: tuple[int, ...]
    flipped: bool = False


@dataclass(frozen=True)
class Placement:
    """One tensor under the checkpoint name it is to have.

    `transposed` says that the file holds a linear weight as (out, in) where GPT-2 computes with (in, out).
    Placements of one name are parts of one tensor, joined along dimension 0 of what is stored, in their
    order.
    """

    name: str
    tensor: StoredTensor
    transposed: bool = False


def place(name: str, tensor: StoredTensor, *, transposed: bool = False) -> Placement:
    """The placement of a tensor whose file may hold it flipped: transposing twice is not transposing."""
    return Placement(name, tensor, transposed != tensor.flipped)


def read_text(path: Path) -> str:
    """The content of a UTF-8 file.

    Raises:
        ValueError: it is not UTF-8, or larger than any config or vocabulary.
    """
    size = path.stat().st_size
    if size > TEXT_LIMIT:
        raise ValueError(f"{path}: {size} bytes, expected at most {TEXT_LIMIT} for a text file")
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, {error.reason} at byte {error.start}") from None


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: it is not UTF-8, not JSON, nested beyond reason, or too large (see `read_text`).
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from None
    except RecursionError:
        raise ValueError(f"{path}: JSON nested too deeply") from None
    except ValueError as error:  # a number with more digits than Python converts
        raise ValueError(f"{path}: not JSON: {error}") from None
