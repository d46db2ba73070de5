"""What a cubin says of its kernels: an ELF file with a section `.nv.info.NAME` for each.

The sections hold records of a format byte, an attribute byte and two bytes of value or length; the attribute
KPARAM_INFO describes a parameter (cuobjdump's `--dump-elf` prints it so): index, ordinal, offset, and a word
with the size in its upper 14 bits.
"""

from __future__ import annotations

import struct

_SIZED, _KPARAM_INFO = 0x04, 0x17
_INFO = ".nv.info."


def parameters(cubin: bytes) -> dict[str, tuple[int, ...]]:
    """Of each kernel the sizes of its parameters in bytes, in their order."""
    return {
        name.removeprefix(_INFO): _sizes(data) for name, data in _sections(cubin) if name.startswith(_INFO)
    }


def _sections(cubin: bytes) -> list[tuple[str, bytes]]:
    (table,) = struct.unpack_from("<Q", cubin, 40)
    entry, count, names_at = struct.unpack_from("<3H", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + i * entry) for i in range(count)]
    names = _data(cubin, headers[names_at])
    return [(names[header[0] :].partition(b"\0")[0].decode(), _data(cubin, header)) for header in headers]


def _data(cubin: bytes, header: tuple[int, ...]) -> bytes:
    *_, offset, size = header
    return cubin[offset : offset + size]


def _sizes(info: bytes) -> tuple[int, ...]:
    sizes: dict[int, int] = {}
    at = 0
    while at < len(info):
        kind, attribute, length = struct.unpack_from("<BBH", info, at)
        at += 4
        if kind != _SIZED:
            continue
        if attribute == _KPARAM_INFO:
            _, ordinal, _, word = struct.unpack_from("<IHHI", info, at)
            sizes[ordinal] = word >> 18
        at += length
    return tuple(sizes[i] for i in range(len(sizes)))
