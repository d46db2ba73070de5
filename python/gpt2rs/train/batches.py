"""Which tokens a step learns from: a function of (seed, step) and nothing else."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .corpus import Tokens

_64_BITS = (1 << 64) - 1
_ROUNDS = 4


class Order:
    """Where sequence number 0, 1, ... of a run begins: all windows of a corpus, shuffled, epoch after epoch.

    An epoch lays windows of `length` tokens end to end, from an offset of its own, so that they don't
    always meet at the same places, and goes through each once.  Nothing is remembered or drawn in turn: any
    place of any epoch is computed alone, so a resumed run needs its step only.
    """

    def __init__(self, n_tokens: int, length: int, seed: int) -> None:
        """n_tokens: of the corpus, more than `length`, since a window's last token has a target, too."""
        if n_tokens <= length:
            raise ValueError(
                f"the data to train on has {n_tokens} tokens, less what is held out; sequences of {length} "
                f"tokens (n_ctx) need {length + 1} at least"
            )
        self.windows = max(1, (n_tokens - length) // length)
        self._offsets = min(length, n_tokens - self.windows * length)
        self._length = length
        self._seed = seed

    def start(self, sequence: int) -> int:
        """The first token of a sequence."""
        epoch, place = divmod(sequence, self.windows)
        key = _mix(self._seed ^ _mix(epoch))
        return _mix(key) % self._offsets + self._length * _permuted(place, self.windows, key)


def _permuted(place: int, size: int, key: int) -> int:
    """The `place`-th number of a permutation of range(size) that `key` chooses.

    A Feistel network over the next even number of bits, again and again until it is in range: Black and
    Rogaway 2002, "Ciphers with Arbitrary Finite Domains".
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = place >> half, place & mask
        for number in range(_ROUNDS):
            left, right = right, left ^ (_mix(key + number * (mask + 1) + right) & mask)
        place = left << half | right
        if place < size:
            return place


def _mix(x: int) -> int:
    """64 bits that depend on all of x: SplitMix64 (Steele, Lea and Flood 2014), x being its counter."""
    x = (x + 0x9E3779B97F4A7C15) & _64_BITS
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & _64_BITS
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & _64_BITS
    return x ^ x >> 31


class Batches:
    """The batch of every step."""

    def __init__(self, tokens: Tokens, length: int, sequences: int, seed: int) -> None:
        """A step has `sequences` sequences of `length` tokens; ValueError for a corpus too short for one."""
        self._tokens = tokens
        self._length = length
        self._sequences = sequences
        self._order = Order(len(tokens), length, seed)

    def batch(self, step: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        """Inputs and targets of a step, counted from 0: two times (sequences, length)."""
        first = step * self._sequences
        both = np.stack(
            [
                self._tokens.read(self._order.start(number), self._length + 1)
                for number in range(first, first + self._sequences)
            ]
        )
        return both[:, :-1], both[:, 1:]
