"""Files as torch.save writes them, made without torch; tensors are NumPy arrays, or views of some."""

from __future__ import annotations

import itertools
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

STORAGE_TYPES = {
    "float16": "HalfStorage",
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
    "int64": "LongStorage",
}
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


@dataclass(frozen=True)
class View:
    """A tensor over the whole array `base`: element `offset` on, shape and strides in elements."""

    base: np.ndarray
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def view(array: np.ndarray) -> View:
    """The array as torch would hold it: a transposed one as a view of the untransposed storage."""
    base = array.T if array.ndim == 2 and array.flags.f_contiguous and not array.flags.c_contiguous else array
    strides = tuple(stride // array.itemsize for stride in array.strides)
    return View(np.ascontiguousarray(base).reshape(-1), 0, array.shape, strides)


@dataclass(frozen=True)
class Call:
    """A call of a named function, which is how pickles run code."""

    name: str
    arguments: tuple[Any, ...]


class Pickled:
    """The pickle of an object, and the storages that its tensors view, by key."""

    def __init__(self, content: Any, *, legacy: bool = False) -> None:
        self.legacy = legacy
        self.storages: dict[str, np.ndarray] = {}
        self._keys: dict[int, str] = {}
        self.bytes = pickled(content, self._tensor)

    def _tensor(self, tensor: Any) -> bytes:
        if isinstance(tensor, np.ndarray):
            tensor = view(tensor)
        # Arrays are of one storage when their memory is; storages are kept, so no address comes twice.
        key = self._keys.setdefault(tensor.base.ctypes.data, str(len(self._keys)))
        self.storages.setdefault(key, tensor.base)
        kind = global_name(f"torch {STORAGE_TYPES[tensor.base.dtype.name]}")
        end = b"N" if self.legacy else b""
        identity = (
            b"(" + plain("storage") + kind + plain(key) + plain("cpu") + plain(tensor.base.size) + end + b"tQ"
        )
        hooks = global_name("collections OrderedDict") + b")R"
        arguments = plain(tensor.offset) + plain(tensor.shape) + plain(tensor.strides) + plain(False) + hooks
        return global_name("torch._utils _rebuild_tensor_v2") + b"(" + identity + arguments + b"tR"


def global_name(name: str) -> bytes:
    """The GLOBAL instruction for "module name"."""
    module, attribute = name.split(" ")
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


def plain(value: Any) -> bytes:
    """The instructions that build plain data."""
    return instructions(value, lambda tensor: b"N")


def pickled(content: Any, tensor: Any = None) -> bytes:
    """A whole pickle of protocol 2."""
    return b"\x80\x02" + instructions(content, tensor or (lambda tensor: b"N")) + b"."


def instructions(value: Any, tensor: Any) -> bytes:
    """The instructions that build `value`; `tensor` makes those of an array or a view."""
    if value is None:
        return b"N"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        if -(1 << 31) <= value < 1 << 31:
            return b"J" + struct.pack("<i", value)
        length = value.bit_length() // 8 + 1
        return b"\x8a" + bytes([length]) + value.to_bytes(length, "little", signed=True)
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
    if isinstance(value, tuple):
        return b"(" + b"".join(instructions(item, tensor) for item in value) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(instructions(item, tensor) for item in value) + b"e"
    if isinstance(value, Mapping):
        pairs = itertools.chain.from_iterable(value.items())
        return b"}(" + b"".join(instructions(item, tensor) for item in pairs) + b"u"
    if isinstance(value, Call):
        return global_name(value.name) + instructions(value.arguments, tensor) + b"R"
    if isinstance(value, (np.ndarray, View)):
        return bytes(tensor(value))
    raise TypeError(f"cannot pickle a {type(value).__name__}")


def save(path: Path, content: Any, *, legacy: bool = False) -> Path:
    """Write `content` as torch.save does: the zip archive, or with `legacy` the form before PyTorch 1.6."""
    saved = Pickled(content, legacy=legacy)
    if legacy:
        system = {
            "protocol_version": 1001,
            "little_endian": True,
            "type_sizes": {"short": 2, "int": 4, "long": 4},
        }
        with path.open("wb") as file:
            for value in (LEGACY_MAGIC, 1001, system):
                file.write(pickled(value))
            file.write(saved.bytes)
            file.write(pickled(list(saved.storages)))
            for storage in saved.storages.values():
                file.write(struct.pack("<q", storage.size) + storage.tobytes())
    else:
        save_zip(path, {"data.pkl": saved.bytes, "byteorder": b"little"}, saved.storages)
    return path


def save_zip(
    path: Path,
    records: Mapping[str, bytes],
    storages: Mapping[str, np.ndarray],
    compression: int = zipfile.ZIP_STORED,
) -> None:
    """A zip archive of torch.save from its parts; each record is padded by a header field, as torch does."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in {
            **records,
            **{f"data/{key}": array.tobytes() for key, array in storages.items()},
            "version": b"3\n",
        }.items():
            record = zipfile.ZipInfo(f"archive/{name}")
            record.compress_type = compression
            record.extra = b"FB" + struct.pack("<H", 5) + b"Z" * 5
            archive.writestr(record, content)
