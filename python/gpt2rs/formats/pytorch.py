"""What torch.save wrote (`.bin`, `.pt`, `.pth`), read without torch and without running anything from the
file.

Both forms are read: the zip archive of PyTorch 1.6 and later, with a pickle that says which tensor is which
part of which entry, and the older single file, in which the storages follow the pickles. GPT-2's own
`pytorch_model.bin` on the Hugging Face hub is of the older form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from . import ZIP_MAGIC, StoredTensor
from .archive import stored_entries
from .pickled import PickleReader

_LEGACY_PROTOCOL = 1001
# GPT-2 XL's is 100 KB; one instruction can take 80 times its own byte of memory.
PICKLE_LIMIT = 2 << 20
_MOST_DIMENSIONS = 8
_LONGEST_KEY = 100

_STORAGES = {
    "FloatStorage": ("float32", 4),
    "HalfStorage": ("float16", 2),
    "BFloat16Storage": ("bfloat16", 2),
    "DoubleStorage": ("float64", 8),
    "LongStorage": ("int64", 8),
    "IntStorage": ("int32", 4),
    "ShortStorage": ("int16", 2),
    "CharStorage": ("int8", 1),
    "ByteStorage": ("uint8", 1),
    "BoolStorage": ("bool", 1),
}


@dataclass(frozen=True)
class _StorageType:
    """The type of a storage, as the pickle names it."""

    dtype: str
    itemsize: int


@dataclass(frozen=True)
class _Storage:
    """One run of numbers in the file, which tensors are views of."""

    key: str
    type: _StorageType
    numel: int


@dataclass(frozen=True)
class SavedTensor:
    """A tensor as the pickle describes it: a view of a storage. Sizes and strides count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class PytorchFile:
    """The object that torch.save was given, with `SavedTensor`s in it, and where each storage's bytes are."""

    path: Path
    content: Any
    offsets: dict[str, int]

    def locate(self, name: str, tensor: SavedTensor) -> StoredTensor:
        """Where the tensor's elements are.

        Args:
            name: what to call it in error messages.
            tensor: one of this file's tensors.

        Raises:
            ValueError: it is neither contiguous nor the transpose of a contiguous matrix.
        """
        storage, shape = tensor.storage, tensor.shape
        flipped = False
        if 0 not in shape and not _is_contiguous(shape, tensor.strides):
            flipped = len(shape) == 2 and _is_contiguous(shape[::-1], tensor.strides[::-1])
            if not flipped:
                raise ValueError(
                    f"{self.path}: tensor {name} of shape {list(shape)} has strides {list(tensor.strides)}, "
                    "expected contiguous elements; call .contiguous() on it before saving"
                )
        offset = self.offsets[storage.key] + tensor.offset * storage.type.itemsize
        return StoredTensor(
            str(self.path), offset, storage.type.dtype, shape[::-1] if flipped else shape, flipped
        )


def read_pytorch(path: Path) -> PytorchFile:
    """What is in a file of torch.save, of either form.

    Raises:
        ValueError: the file is cut off or malformed, big-endian, or holds anything but tensors and plain
            data.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(len(ZIP_MAGIC)) == ZIP_MAGIC:
            try:
                return _read_zip(path, file, size)
            except ValueError as error:
                raise _naming(path, error) from None
        return _read_legacy(path, file, size)


def _naming(path: Path, error: ValueError) -> ValueError:
    return error if str(error).startswith(str(path)) else ValueError(f"{path}: {error}")


def _read_zip(path: Path, file: BinaryIO, size: int) -> PytorchFile:
    entries = stored_entries(file, size)
    pickles = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(
            f"a zip archive with {len(pickles)} entries data.pkl, expected the one that torch.save writes"
        )
    root = pickles[0][: -len("data.pkl")]

    def content(name: str, limit: int) -> bytes:
        offset, length = entries[name]
        if length > limit:
            raise ValueError(f"entry {name!r} has {length} bytes, expected at most {limit}")
        file.seek(offset)
        return file.read(length)

    if root + "byteorder" in entries and (order := content(root + "byteorder", 16)) != b"little":
        raise ValueError(f"its byte order is {order.decode('latin-1')!a}, expected 'little'")
    reader = _reader(content(pickles[0], PICKLE_LIMIT), path)
    loaded = reader.load()
    offsets: dict[str, int] = {}
    for storage in reader.storages.values():
        name = f"{root}data/{storage.key}"
        if name not in entries:
            raise ValueError(f"storage {name!r} is missing")
        offset, length = entries[name]
        if length != storage.numel * storage.type.itemsize:
            raise ValueError(
                f"storage {name!r} has {length} bytes, "
                f"expected {storage.numel} elements of {storage.type.dtype}"
            )
        offsets[storage.key] = offset
    return PytorchFile(path, loaded, offsets)


def _read_legacy(path: Path, file: BinaryIO, size: int) -> PytorchFile:
    """Five pickles (magic number, protocol, system, the object, the storages' keys), then the storages.

    Each storage is its number of elements as an int64, and the elements.
    """
    file.seek(0)
    reader = _reader(file.read(PICKLE_LIMIT), path)
    magic, protocol, system, content, keys = (reader.load() for _ in range(5))
    if magic != 0x1950A86A20F9469CFC6C or protocol != _LEGACY_PROTOCOL:
        raise ValueError(f"{path}: a pickle, but not one that torch.save wrote")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError(f"{path}: its byte order is not little-endian")
    listed = keys if isinstance(keys, list) and all(isinstance(key, str) for key in keys) else []
    if sorted(listed) != sorted(reader.storages):
        raise ValueError(f"{path}: its list of storages is not that of its tensors")
    at = reader.pos
    offsets: dict[str, int] = {}
    for key in listed:
        storage = reader.storages[key]
        file.seek(at)
        count = int.from_bytes(file.read(8), "little", signed=True)
        offsets[key] = at + 8
        at += 8 + storage.numel * storage.type.itemsize
        if count != storage.numel or at > size:
            raise ValueError(
                f"{path}: storage {key!r} has {count} elements and ends at byte {at} of {size}, "
                f"expected {storage.numel} elements within the file"
            )
    return PytorchFile(path, content, offsets)


class _TensorReader(PickleReader):
    """A pickle reader that knows tensors and keeps account of the storages that the tensors view."""

    storages: dict[str, _Storage]


def _reader(data: bytes, path: Path) -> _TensorReader:
    storages: dict[str, _Storage] = {}

    def storage(identity: Any) -> _Storage:
        # ("storage", type, key, device, number of elements), and in the older form a view of another storage,
        # or None
        if not (isinstance(identity, tuple) and len(identity) in (5, 6) and identity[0] == "storage"):
            raise ValueError("a persistent id that is not a storage's")
        kind, key, numel = getattr(identity[1], "value", None), identity[2], identity[4]
        if not isinstance(kind, _StorageType) or not isinstance(key, str) or not _is_size(numel):
            raise ValueError("a storage whose type, key or length is not one")
        if len(key) > _LONGEST_KEY:
            raise ValueError(f"a storage whose key has {len(key)} characters")
        if identity[5:] not in ((), (None,)):
            raise ValueError(f"storage {key!r} is a view of another one")
        made = _Storage(key, kind, numel)
        if storages.setdefault(key, made) != made:
            raise ValueError(f"storage {key!r} is described in two ways")
        return made

    constructors: dict[str, Any] = {
        "collections OrderedDict": _ordered_dict,
        "torch._utils _rebuild_tensor_v2": _tensor,
        "torch._utils _rebuild_parameter": _parameter,
        "torch Size": _size,
        "torch device": lambda *_: None,
    }
    for name, (dtype, itemsize) in _STORAGES.items():
        constructors[f"torch {name}"] = _StorageType(dtype, itemsize)
    reader = _TensorReader(data, constructors, storage, str(path))
    reader.storages = storages
    return reader


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _ordered_dict(*items: Any) -> dict[Any, Any]:
    if items:
        raise ValueError("an OrderedDict made from a list")
    return {}


def _size(sizes: Any) -> Any:
    return sizes


def _parameter(data: Any, *_: Any) -> SavedTensor:
    if not isinstance(data, SavedTensor):
        raise ValueError("a parameter that is not a tensor")
    return data


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> SavedTensor:
    """What torch's function of that name rebuilds: a view, held against its storage's length."""
    if not isinstance(storage, _Storage) or not _is_size(offset):
        raise ValueError("a tensor without a storage or an offset")
    for what in (shape, strides):
        if not isinstance(what, tuple) or len(what) > _MOST_DIMENSIONS or not all(map(_is_size, what)):
            raise ValueError(f"a tensor whose shape or strides are not up to {_MOST_DIMENSIONS} sizes")
    if len(shape) != len(strides):
        raise ValueError(f"a tensor with {len(shape)} dimensions and {len(strides)} strides")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if math.prod(shape) > 0 and last >= storage.numel:
        raise ValueError(
            f"a tensor of shape {list(shape)} at element {offset} reaches past the {storage.numel} "
            f"elements of storage {storage.key!r}"
        )
    return SavedTensor(storage, offset, shape, strides)
