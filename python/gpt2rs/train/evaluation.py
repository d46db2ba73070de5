"""The loss on held-out tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .corpus import Tokens
from .vocabulary import Vocabulary

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .. import _core


class HeldOutLoss(NamedTuple):
    """In nats a token, and a character (None without a tokenizer), over `tokens` tokens."""

    loss: float
    per_character: float | None
    tokens: int


class HeldOut:
    """Windows of held-out tokens: the same ones each time, all of equal length but the last."""

    def __init__(self, tokens: Tokens, length: int, limit: int, batch_size: int) -> None:
        """At most `limit` tokens, in windows spread evenly; 0: all of them."""
        self._tokens = tokens
        self._length = length
        self._batch_size = batch_size
        whole, self._rest = divmod(max(0, len(tokens) - 1), length)
        wanted = whole if limit == 0 else min(whole, max(1, limit // length))
        if wanted < whole:
            self._rest = 0
        self._starts = [i * whole // wanted * length for i in range(wanted)]
        self._end = whole * length

    def __bool__(self) -> bool:
        """Whether there is a token to predict."""
        return bool(self._starts or self._rest)

    def loss(self, core: _core.Trainer, vocabulary: Vocabulary) -> HeldOutLoss:
        """The mean over all tokens of the windows."""
        nats, n_tokens, n_characters = 0.0, 0, 0
        counts = vocabulary.characters
        for inputs, targets in self._batches():
            nats += core.loss(inputs, targets) * targets.size
            n_tokens += targets.size
            n_characters += int(counts[targets[targets < len(counts)]].sum())
        return HeldOutLoss(nats / n_tokens, nats / n_characters if n_characters else None, n_tokens)

    def _batches(self) -> Iterator[tuple[NDArray[np.uint32], NDArray[np.uint32]]]:
        for first in range(0, len(self._starts), self._batch_size):
            starts = self._starts[first : first + self._batch_size]
            yield _cut(np.stack([self._tokens.read(start, self._length + 1) for start in starts]))
        if self._rest:
            yield _cut(self._tokens.read(self._end, self._rest + 1)[np.newaxis])


def _cut(both: NDArray[np.uint32]) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Inputs, and the targets one further."""
    return np.ascontiguousarray(both[:, :-1]), np.ascontiguousarray(both[:, 1:])
