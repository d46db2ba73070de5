"""Text in files: found, cut in two, and read as a stream of pieces that tokenise as the whole does."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

SEPARATOR = "<|endoftext|>"
PIECE_CHARACTERS = 1 << 20
READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Span:
    """Bytes `begin` to `end` of a file."""

    path: Path
    begin: int
    end: int


class Piece(NamedTuple):
    """Some text of one document; `opens`: it is the document's beginning."""

    text: str
    opens: bool


def whole(paths: Iterable[Path]) -> list[Span]:
    """All of each file."""
    return [Span(path, 0, path.stat().st_size) for path in paths]


def hold_out(spans: Sequence[Span], fraction: float) -> tuple[list[Span], list[Span]]:
    """The files cut in two: the second part is the last `fraction` of the bytes, from a character's start."""
    total = sum(span.end - span.begin for span in spans)
    left = int(total * (1 - fraction))
    first: list[Span] = []
    second: list[Span] = []
    for span in spans:
        cut = min(span.end, _character_start(span.path, span.begin + left)) if left > 0 else span.begin
        left -= span.end - span.begin
        if cut > span.begin:
            first.append(Span(span.path, span.begin, cut))
        if cut < span.end:
            second.append(Span(span.path, cut, span.end))
    return first, second


def _character_start(path: Path, at: int) -> int:
    """The next place from `at` where no byte continues a UTF-8 character."""
    with path.open("rb") as file:
        file.seek(at)
        following = file.read(4)
    return at + next((i for i, byte in enumerate(following) if byte & 0xC0 != 0x80), 0)


def pieces(span: Span, characters: int = PIECE_CHARACTERS) -> Iterator[Piece]:
    """The documents of a file, each in pieces of about `characters`.

    A separator stands between documents and belongs to none; one without anything but white space is none.
    Pieces end where a space or newline stands between two other characters, ahead of it: GPT-2's pattern
    always cuts there, so that the pieces give the tokens of the whole.  Text without any such place is cut
    after `characters`.

    Raises:
        ValueError: the file is not UTF-8; the message has the place.
    """
    pending, opens = "", True
    for text in _decoded(span):
        pending += text
        *ended, pending = pending.split(SEPARATOR)
        for document in ended:
            if not _is_blank(document, opens):
                yield Piece(document, opens)
            opens = True
        while len(pending) > characters + len(SEPARATOR):
            at = _last_cut(pending, characters)
            yield Piece(pending[:at], opens)
            pending, opens = pending[at:], False
    if not _is_blank(pending, opens):
        yield Piece(pending, opens)


def _is_blank(text: str, opens: bool) -> bool:
    """Whether nothing is left to tell: no text, or a document of white space."""
    return not text or (opens and text.isspace())


def _last_cut(text: str, limit: int) -> int:
    for at in range(limit, 0, -1):
        if text[at] in " \n" and not text[at - 1].isspace() and not text[at + 1].isspace():
            return at
    return limit


def _decoded(span: Span) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    at = span.begin
    with span.path.open("rb") as file:
        file.seek(at)
        while at < span.end:
            data = file.read(min(READ_BYTES, span.end - at))
            if not data:
                raise ValueError(f"{span.path}: it became shorter while it was read")
            held = len(decoder.getstate()[0])
            try:
                text = decoder.decode(data, final=at + len(data) == span.end)
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{span.path}: not UTF-8: {error.reason} at byte {at - held + error.start}"
                ) from None
            yield text.removeprefix("\N{BYTE ORDER MARK}") if at == 0 else text
            at += len(data)
