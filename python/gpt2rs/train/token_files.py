"""Files of token ids: llm.c's with a header, nanoGPT's without, mapped rather than read.

llm.c's start with 256 int32: a magic, a version, the number of tokens.  20240520 version 1 is uint16;
20240801 version 7, which llm.c has for Llama 3, is uint32, and holds vocabularies of more than 65,536 here.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from .durable import writing

HEADER_BYTES = 256 * 4
# A header has 31 bits for the number of tokens; llm.c's own shards have as many as this.
SHARD_TOKENS = 100_000_000
_DTYPES: dict[int, tuple[int, np.dtype[Any]]] = {
    20240520: (1, np.dtype("<u2")),
    20240801: (7, np.dtype("<u4")),
}
_MAGIC = {dtype.itemsize: magic for magic, (_, dtype) in _DTYPES.items()}
_OTHERS = {
    20240326: "a model of llm.c",
    20240522: "an evaluation set of llm.c",
    20240527: "a state of llm.c's optimiser",
    int.from_bytes(b"PK\x03\x04", "little"): "a zip archive, such as PyTorch writes",
}

Ids = NDArray[np.uint16] | NDArray[np.uint32]


def open_tokens(path: Path) -> Ids:
    """The token ids of a file, mapped: llm.c's where it has that header, else nanoGPT's, bare uint16.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, of a known other kind, or not as long as its header says.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file of tokens: {path}")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(12)
    magic, version, count = (int.from_bytes(start[i : i + 4], "little") for i in (0, 4, 8))
    if magic in _OTHERS:
        raise ValueError(f"{path}: {_OTHERS[magic]}, expected token ids")
    offset = 0
    dtype: np.dtype[Any] = np.dtype("<u2")
    if magic in _DTYPES:
        expected_version, dtype = _DTYPES[magic]
        if version != expected_version:
            raise ValueError(f"{path}: magic {magic} version {version}, expected version {expected_version}")
        offset = HEADER_BYTES
        if size != offset + count * dtype.itemsize:
            raise ValueError(
                f"{path}: {size} bytes, expected {offset + count * dtype.itemsize} for the {count} tokens "
                "that its header counts"
            )
    elif size % 2:
        raise ValueError(
            f"{path}: {size} bytes; neither llm.c's header (magic {min(_DTYPES)}) nor nanoGPT's uint16 "
            "tokens, which are an even number of bytes"
        )
    if size == offset:
        raise ValueError(f"{path}: no tokens")
    return np.memmap(path, dtype=dtype, mode="r", offset=offset)


def check_ids(path: Path, ids: Ids, n_vocab: int) -> None:
    """ValueError, with the first place, where an id is not below `n_vocab`; reads all of it."""
    if n_vocab > np.iinfo(ids.dtype).max:
        return
    piece = 1 << 24
    for start in range(0, len(ids), piece):
        part = ids[start : start + piece]
        if int(part.max()) >= n_vocab:
            at = int(np.argmax(part >= n_vocab))
            raise ValueError(
                f"{path}: token {start + at} is {part[at]}, expected below {n_vocab}, the size of the "
                "vocabulary: made with another tokenizer, or no file of tokens"
            )


class ShardWriter:
    """Writes tokens into llm.c's files `tokens_000000.bin` and on, in a folder."""

    def __init__(self, folder: Path, n_vocab: int, shard_tokens: int = SHARD_TOKENS) -> None:
        """n_vocab: decides between uint16 and uint32."""
        self.dtype = np.dtype("<u2") if n_vocab <= 1 << 16 else np.dtype("<u4")
        self.paths: list[Path] = []
        self.n_tokens = 0
        self._folder = folder
        self._shard_tokens = shard_tokens
        self._file: BinaryIO | None = None
        self._in_shard = 0

    def write(self, ids: NDArray[np.integer]) -> None:
        """Append ids, which go on in a new file where one is full; OSError, of a full disk for one."""
        ids = ids.astype(self.dtype, copy=False)
        while len(ids):
            if self._file is None:
                self._begin_shard()
            part = ids[: self._shard_tokens - self._in_shard]
            assert self._file is not None
            with writing(f"tokens into {self._folder}"):
                self._file.write(part.tobytes())
            self._in_shard += len(part)
            self.n_tokens += len(part)
            ids = ids[len(part) :]
            if self._in_shard == self._shard_tokens:
                self._end_shard()

    def _begin_shard(self) -> None:
        path = self._folder / f"tokens_{len(self.paths):06d}.bin"
        self._file = path.open("wb")
        self._file.write(bytes(HEADER_BYTES))
        self._in_shard = 0
        self.paths.append(path)

    def _end_shard(self) -> None:
        if self._file is None:
            return
        magic = _MAGIC[self.dtype.itemsize]
        header = np.array([magic, _DTYPES[magic][0], self._in_shard], "<i4")
        with writing(f"tokens into {self._folder}"), self._file as file:
            self._file = None
            file.seek(0)
            file.write(header.tobytes())

    def __enter__(self) -> ShardWriter:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish the last file."""
        self._end_shard()
