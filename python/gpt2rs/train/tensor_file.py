"""Float32 tensors in a safetensors file, written and read one at a time, so that none is held twice.

The format: the length of a header (8 bytes, little-endian), the header (JSON: name -> dtype, shape, where
in the data), the data.  https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def write_tensors(
    path: Path, shapes: Mapping[str, Sequence[int]], tensor: Callable[[str], NDArray[np.float32]]
) -> None:
    """Write the tensors that `shapes` names, in its order; `tensor` gives each when it is due."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        end = at + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            file.write(np.ascontiguousarray(tensor(name), "<f4").data)


def read_tensors(path: Path, shapes: Mapping[str, Sequence[int]]) -> dict[str, NDArray[np.float32]]:
    """The tensors that `shapes` names, mapped; ValueError where one is missing or has another shape."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if length <= size else b""
    try:
        header = json.loads(text)
        found = {}
        for name in shapes.keys() & header.keys():
            entry = header[name]
            begin, end = entry["data_offsets"]
            found[name] = entry["dtype"], entry["shape"], int(begin), int(end)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"{path}: no safetensors file, or not all of it") from None
    tensors: dict[str, NDArray[np.float32]] = {}
    for name, shape in shapes.items():
        dtype, own, begin, end = found.get(name, (None, None, 0, 0))
        is_whole = begin >= 0 and end - begin == 4 * math.prod(shape) and 8 + length + end <= size
        if dtype != "F32" or own != list(shape) or not is_whole:
            raise ValueError(
                f"{path}: tensor {name} is {dtype} {own}, expected F32 {list(shape)}, all of it in the file"
            )
        tensors[name] = np.memmap(path, "<f4", "r", 8 + length + begin, tuple(shape))
    return tensors
