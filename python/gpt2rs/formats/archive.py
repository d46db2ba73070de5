"""The zip archives that torch.save writes: where each entry's bytes lie in the file.

PyTorch stores its entries uncompressed, so that a tensor can be read straight from the archive. Only the
directory at the archive's end is read here, and no more than `DIRECTORY_LIMIT` bytes of it.
"""

from __future__ import annotations

import struct
from typing import BinaryIO

# A directory record is about 80 bytes; GPT-2 XL has 580 tensors, with an optimizer's state three times as
# many.
DIRECTORY_LIMIT = 4 << 20
_END, _END_64, _LOCATOR_64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_END_SIZE, _LOCATOR_SIZE, _END_64_SIZE = 22, 20, 56
_DIRECTORY_RECORD, _LOCAL_RECORD = b"PK\x01\x02", b"PK\x03\x04"
_LONGEST_COMMENT = 0xFFFF


def stored_entries(file: BinaryIO, size: int) -> dict[str, tuple[int, int]]:
    """The offset and the length in bytes of each entry of a zip archive, by name.

    Args:
        file: the open archive.
        size: its length in bytes.

    Raises:
        ValueError: it is cut off or malformed, or an entry is compressed or encrypted.
    """
    try:
        start, length = _directory(file, size)
        file.seek(start)
        directory = file.read(length)
        entries: dict[str, tuple[int, int]] = {}
        at = 0
        while at < length:
            name, local, n_bytes, at = _directory_record(directory, at)
            if name in entries:
                raise ValueError(f"two entries are called {name!r}")
            if local >= start or (offset := _data_offset(file, local)) + n_bytes > start:
                raise ValueError(
                    f"entry {name!r} reaches into the directory at byte {start}; is the file cut off?"
                )
            entries[name] = (offset, n_bytes)
        return entries
    except struct.error:
        raise ValueError("a record of the zip archive is cut off") from None


def _directory(file: BinaryIO, size: int) -> tuple[int, int]:
    """The offset and length of the central directory."""
    tail_start = max(0, size - _END_SIZE - _LONGEST_COMMENT)
    file.seek(tail_start)
    tail = file.read(size - tail_start)
    end = tail.rfind(_END)
    if end < 0:
        raise ValueError("the zip archive has no end record; the file is cut off")
    length, start, n_comment = struct.unpack_from("<IIH", tail, end + 12)
    if end + _END_SIZE + n_comment != len(tail):
        raise ValueError("the zip archive's end record is not at its end; the file is cut off")
    locator = end - _LOCATOR_SIZE
    if locator >= 0 and tail[locator : locator + 4] == _LOCATOR_64:
        (end_64,) = struct.unpack_from("<Q", tail, locator + 8)
        if end_64 + _END_64_SIZE > size:
            raise ValueError(f"the zip archive's end record is said to be at byte {end_64} of {size}")
        file.seek(end_64)
        record = file.read(_END_64_SIZE)
        if record[:4] != _END_64:
            raise ValueError(f"no zip64 end record at byte {end_64}")
        length, start = struct.unpack_from("<QQ", record, 40)
    if start + length > size or length > DIRECTORY_LIMIT:
        raise ValueError(
            f"the zip archive's directory is said to be {length} bytes at byte {start} of {size}, "
            f"expected at most {DIRECTORY_LIMIT} bytes within the file"
        )
    return start, length


def _directory_record(directory: bytes, at: int) -> tuple[str, int, int, int]:
    """The name, the local record's offset and the length of one entry, and where the next record starts."""
    if directory[at : at + 4] != _DIRECTORY_RECORD:
        raise ValueError("the zip archive's directory is malformed")
    flags, method = struct.unpack_from("<HH", directory, at + 8)
    packed, n_bytes, n_name, n_extra, n_comment = struct.unpack_from("<IIHHH", directory, at + 20)
    (local,) = struct.unpack_from("<I", directory, at + 42)
    name_at = at + 46
    extra_at = name_at + n_name
    name = directory[name_at:extra_at].decode("utf-8", "replace")
    if method != 0 or flags & 1:
        raise ValueError(
            f"entry {name!r} is compressed or encrypted; torch.save stores its entries as they are"
        )
    extra = directory[extra_at : extra_at + n_extra]
    # zip64 keeps the fields that did not fit in 32 bits, in this order, and only those.
    wide = _zip64_fields(extra)
    if n_bytes == 0xFFFFFFFF:
        n_bytes = wide.pop(0) if wide else n_bytes
    if packed == 0xFFFFFFFF:
        packed = wide.pop(0) if wide else packed
    if local == 0xFFFFFFFF:
        local = wide.pop(0) if wide else local
    if packed != n_bytes:
        raise ValueError(f"entry {name!r} has {packed} bytes stored for {n_bytes}")
    return name, local, n_bytes, extra_at + n_extra + n_comment


def _zip64_fields(extra: bytes) -> list[int]:
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            return list(struct.unpack_from(f"<{min(length, len(extra) - at - 4) // 8}Q", extra, at + 4))
        at += 4 + length
    return []


def _data_offset(file: BinaryIO, local: int) -> int:
    """Where an entry's bytes start: behind its local record, whose name and padding are of any length."""
    file.seek(local)
    record = file.read(30)
    if record[:4] != _LOCAL_RECORD:
        raise ValueError(f"no entry of the zip archive starts at byte {local}")
    n_name, n_extra = struct.unpack_from("<HH", record, 26)
    return local + 30 + int(n_name) + int(n_extra)
