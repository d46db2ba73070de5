"""A reader of pickles that can build data and nothing else.

Python's own unpickler imports and calls what the file names. This one is an interpreter of the few
instructions that `torch.save` writes, with a fixed table of the names it knows; nothing is imported, so that
a file cannot run code. Each instruction costs at most in proportion to its own bytes, so that a file of n
bytes cannot make it take more than a multiple of n in time or memory.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any

# Integers in a checkpoint are sizes and counts. torch's own magic number takes ten bytes.
LONGEST_INT = 16


class _Mark:
    """What the MARK instruction leaves on the stack."""


class PickleReader:
    """Reads pickles that lie one after the other in `data`.

    Args:
        data: the bytes; instructions past their end are an error.
        constructors: for each "module name" that a pickle may mention, the function that takes the arguments
            it would be called with, or a plain value when it is only mentioned.
        persistent: makes an object of the persistent id that stands for a storage.
        where: what to call the file in error messages.
    """

    def __init__(
        self,
        data: bytes,
        constructors: Mapping[str, Any],
        persistent: Callable[[Any], Any],
        where: str,
    ) -> None:
        """See the class."""
        self.data = data
        self.pos = 0
        self.constructors = constructors
        self.persistent = persistent
        self.where = where

    def load(self) -> Any:
        """The next pickle's object; `pos` is then the first byte behind it.

        Raises:
            ValueError: the pickle is cut off or malformed, or uses an instruction or a name that is not data.
        """
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        try:
            while True:
                start = self.pos
                op = self.take(1)[0]
                if op == 0x2E:  # STOP
                    result = self.stack.pop()
                    if self.stack:
                        raise ValueError(f"{len(self.stack)} objects left over at its end")
                    return result
                step = _STEPS.get(op)
                if step is None:
                    raise ValueError(f"instruction 0x{op:02x} at byte {start} has no place in a checkpoint")
                step(self)
        except IndexError:
            raise self.error(f"the instruction at byte {start} finds too few objects") from None
        except KeyError as error:
            raise self.error(f"the instruction at byte {start} refers to unknown object {error}") from None
        except (ValueError, TypeError) as error:
            raise self.error(str(error)) from None

    def error(self, what: str) -> ValueError:
        """A ValueError that names the file."""
        return ValueError(f"{self.where}: malformed or unsafe pickle: {what}")

    def take(self, n: int) -> bytes:
        """The next n bytes."""
        taken = self.data[self.pos : self.pos + n]
        if len(taken) != n:
            raise ValueError(
                f"it ends at byte {len(self.data)}, {n} more were expected from byte {self.pos} on"
            )
        self.pos += n
        return taken

    def number(self, layout: str) -> Any:
        """The next number, laid out as the struct module says."""
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def line(self) -> str:
        """Text up to the next newline."""
        end = self.data.find(b"\n", self.pos)
        if end < 0 or end - self.pos > 1000:
            raise ValueError(f"no end of the line that starts at byte {self.pos}")
        text = self.data[self.pos : end].decode()
        self.pos = end + 1
        return text

    def pop_mark(self) -> list[Any]:
        """Everything above the last mark."""
        items = []
        while (item := self.stack.pop()) is not _Mark:
            items.append(item)
        items.reverse()
        return items

    def pop_as(self, kind: type) -> Any:
        """The top object, which has to be of that type."""
        item = self.stack.pop()
        if type(item) is not kind:
            raise ValueError(f"a {type(item).__name__} where a {kind.__name__} was expected")
        return item

    def named(self) -> None:
        """GLOBAL: a name from the table, never an import."""
        name = f"{self.line()} {self.line()}"
        if name not in self.constructors:
            shown = ascii(name.replace(" ", "."))[:100]
            raise ValueError(
                f"it names {shown}, which is not a tensor or plain data; refused, nothing was run"
            )
        self.stack.append(_Named(self.constructors[name]))

    def reduce(self) -> None:
        """REDUCE: call a function of the table."""
        arguments = self.pop_as(tuple)
        function = self.pop_as(_Named).value
        if not callable(function):
            raise ValueError("it calls what is not a function")
        self.stack.append(function(*arguments))

    def build(self) -> None:
        """BUILD: drop the attributes of a dict (a state dict carries its format's version so)."""
        self.stack.pop()
        if not isinstance(self.stack[-1], dict):
            raise ValueError(f"it sets attributes of a {type(self.stack[-1]).__name__}")

    def set_items(self, items: list[Any]) -> None:
        """SETITEMS: keys are names or numbers, since hashing a deeply nested tuple overflows the C stack."""
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise ValueError("it sets items of what is not a dict, or a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, (str, int)):
                raise ValueError(f"a dict key of type {type(key).__name__}, expected a string or an integer")
            target[key] = value

    def append(self, items: list[Any]) -> None:
        """APPENDS."""
        target = self.stack[-1]
        if type(target) is not list:
            raise ValueError(f"it appends to a {type(target).__name__}")
        target.extend(items)

    def integer(self, n_bytes: int) -> None:
        """LONG1: a little-endian two's complement integer."""
        if n_bytes > LONGEST_INT:
            raise ValueError(f"an integer of {n_bytes} bytes")
        self.stack.append(int.from_bytes(self.take(n_bytes), "little", signed=True))

    def add_tuple(self, n: int) -> None:
        """TUPLE1, TUPLE2, TUPLE3."""
        items = [self.stack.pop() for _ in range(n)]
        if _Mark in items:
            raise ValueError("a tuple that reaches over a mark")
        self.stack.append(tuple(reversed(items)))

    def pair(self) -> list[Any]:
        """The key and the value on top of the stack."""
        value = self.stack.pop()
        return [self.stack.pop(), value]


class _Named:
    """A name of the table while it is on the stack; no pickle can make one otherwise."""

    def __init__(self, value: Any) -> None:
        self.value = value


# What each instruction does; the numbers and the names are those of Python's pickletools. Protocol 2 is what
# torch.save writes; the framed and shorter forms of protocol 4 come from users who ask for it.
_STEPS: dict[int, Callable[[PickleReader], object]] = {
    0x80: lambda r: r.take(1),  # PROTO
    0x95: lambda r: r.take(8),  # FRAME
    0x28: lambda r: r.stack.append(_Mark),  # MARK
    0x63: PickleReader.named,  # GLOBAL
    0x52: PickleReader.reduce,  # REDUCE
    0x62: PickleReader.build,  # BUILD
    0x51: lambda r: r.stack.append(r.persistent(r.stack.pop())),  # BINPERSID
    0x4E: lambda r: r.stack.append(None),  # NONE
    0x88: lambda r: r.stack.append(True),  # NEWTRUE
    0x89: lambda r: r.stack.append(False),  # NEWFALSE
    0x4A: lambda r: r.stack.append(r.number("<i")),  # BININT
    0x4B: lambda r: r.stack.append(r.number("<B")),  # BININT1
    0x4D: lambda r: r.stack.append(r.number("<H")),  # BININT2
    0x8A: lambda r: r.integer(r.number("<B")),  # LONG1
    0x47: lambda r: r.stack.append(r.number(">d")),  # BINFLOAT
    0x58: lambda r: r.stack.append(r.take(r.number("<I")).decode()),  # BINUNICODE
    0x8C: lambda r: r.stack.append(r.take(r.number("<B")).decode()),  # SHORT_BINUNICODE
    0x54: lambda r: r.stack.append(r.take(r.number("<I"))),  # BINSTRING
    0x55: lambda r: r.stack.append(r.take(r.number("<B"))),  # SHORT_BINSTRING
    0x42: lambda r: r.stack.append(r.take(r.number("<I"))),  # BINBYTES
    0x43: lambda r: r.stack.append(r.take(r.number("<B"))),  # SHORT_BINBYTES
    0x29: lambda r: r.stack.append(()),  # EMPTY_TUPLE
    0x85: lambda r: r.add_tuple(1),  # TUPLE1
    0x86: lambda r: r.add_tuple(2),  # TUPLE2
    0x87: lambda r: r.add_tuple(3),  # TUPLE3
    0x74: lambda r: r.stack.append(tuple(r.pop_mark())),  # TUPLE
    0x5D: lambda r: r.stack.append([]),  # EMPTY_LIST
    0x61: lambda r: r.append([r.stack.pop()]),  # APPEND
    0x65: lambda r: r.append(r.pop_mark()),  # APPENDS
    0x7D: lambda r: r.stack.append({}),  # EMPTY_DICT
    0x73: lambda r: r.set_items(r.pair()),  # SETITEM
    0x75: lambda r: r.set_items(r.pop_mark()),  # SETITEMS
    0x71: lambda r: r.memo.__setitem__(r.number("<B"), r.stack[-1]),  # BINPUT
    0x72: lambda r: r.memo.__setitem__(r.number("<I"), r.stack[-1]),  # LONG_BINPUT
    0x94: lambda r: r.memo.__setitem__(len(r.memo), r.stack[-1]),  # MEMOIZE
    0x68: lambda r: r.stack.append(r.memo[r.number("<B")]),  # BINGET
    0x6A: lambda r: r.stack.append(r.memo[r.number("<I")]),  # LONG_BINGET
}
