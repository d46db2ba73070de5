"""A text handed out piece by piece while it is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from .engine import Engine
from .generation import Text, steps
from .results import Result
from .text import TextDecoder


class Stream:
    """Iterator over the pieces of one text, each a `str` that is not empty; what `GPT2.stream` returns.

    The pieces joined are the `text` that `generate` gives for the same settings.  A piece never holds a part
    of a UTF-8 character or of a stop string.  Closing it early, or leaving its `with` block, frees the
    sequence.
    """

    def __init__(
        self, model: Engine[Any], text: Text, decoder: TextDecoder, decode: Callable[[Sequence[int]], str]
    ) -> None:
        """Nothing is computed before the first piece is asked for."""
        self._text = text
        self._pieces = decoder.pieces
        self._given = 0
        self._decode = decode
        self._steps = steps(model, [text])

    def __iter__(self) -> Stream:
        """The stream itself."""
        return self

    def __next__(self) -> str:
        """The next piece of text."""
        while self._given == len(self._pieces):
            next(self._steps)  # at the end of the text its StopIteration is ours
        self._given += 1
        return self._pieces[self._given - 1]

    @property
    def tokens(self) -> list[int]:
        """The new tokens so far; text is held back while it may change, so they can be ahead of the
        pieces."""
        return list(self._text.tokens)

    @property
    def result(self) -> Result:
        """The finished text, as `generate` returns it; RuntimeError before the end, or when closed before
        it."""
        if self._text.finish_reason is None:
            raise RuntimeError("the stream has not come to its end yet; `tokens` has what there is so far")
        return self._text.result(self._decode)

    def close(self) -> None:
        """Stop here and free the sequence; no more pieces come."""
        self._given = len(self._pieces)
        self._steps.close()
        self._text.session = None

    def __enter__(self) -> Stream:
        """The stream itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the stream."""
        self.close()
