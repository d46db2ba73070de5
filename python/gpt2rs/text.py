"""Tokens to text as they come: no character split, no part of a stop string let through.

A token of byte-level BPE is a piece of bytes, which may end in the middle of a UTF-8 character.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tiktoken

# Stands for a token that the tokenizer does not know: models pad their vocabulary past the tokenizer's.
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}".encode()


def token_bytes(tokenizer: tiktoken.Encoding, token: int) -> bytes:
    """The bytes of one token; those of U+FFFD for an id that the tokenizer does not have."""
    try:
        return tokenizer.decode_single_token_bytes(token)
    except KeyError:
        return _REPLACEMENT


def decode_text(tokenizer: tiktoken.Encoding, tokens: Sequence[int]) -> str:
    """The text of all `tokens`, special ones included; bytes that are no UTF-8 become U+FFFD."""
    return b"".join(token_bytes(tokenizer, token) for token in tokens).decode("utf-8", errors="replace")


class TextDecoder:
    """Text of a growing list of tokens, cut before the first stop string.

    `pieces` holds the text that is certain, that is, which no further token can change or turn into a part of
    a stop string.  Which stop string ends the text does not depend on where tokens end: it is the one
    complete first, and of those complete with the same character the longest.
    """

    def __init__(self, tokenizer: tiktoken.Encoding, stop: Sequence[str]) -> None:
        """Start with no text; `stop` may be empty."""
        self.pieces: list[str] = []
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = stop
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def push(self, token: int) -> bool:
        """Take in one token; returns True when its text completes a stop string."""
        return self._push_text(self._utf8.decode(token_bytes(self._tokenizer, token)))

    def finish(self) -> None:
        """No token will follow: let go of what was held back, an unfinished character as U+FFFD."""
        if not self.stopped:
            self._push_text(self._utf8.decode(b"", final=True))
        if not self.stopped:
            self._release(len(self._held))

    def _push_text(self, text: str) -> bool:
        # What was held back is the longest ending that a stop string may begin with, so that a stop string
        # which is complete now lies within `_held` as a whole.
        self._held += text
        found = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self._release(min(found)[1])
            self._held = ""
            self.stopped = True
        else:
            self._release(len(self._held) - self._possible_stop())
        return self.stopped

    def _possible_stop(self) -> int:
        """Length of the longest ending of `_held` that some stop string begins with."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:length]):
                    longest = length
                    break
        return longest

    def _release(self, length: int) -> None:
        if length > 0:
            self.pieces.append(self._held[:length])
            self._held = self._held[length:]
