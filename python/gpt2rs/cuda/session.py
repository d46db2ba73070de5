"""One sequence on a GPU: its tokens, and the cache of those that were computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .kv_cache import KvCache
    from .model import CudaModel


class CudaSession:
    """What `_core.Session` is on the CPU.

    Its last token is pending as a rule: taken in, and computed by the step that chooses the next.
    """

    def __init__(self, model: CudaModel, cache: KvCache) -> None:
        """An empty sequence; use `CudaModel.session()`."""
        self.model = model
        self.cache = cache
        self.all_tokens: list[int] = []
        self.computed = 0
        # Counts changes that the device does not know of.
        self.version = 0
        self._logits: NDArray[np.float32] | None = None

    @property
    def pos(self) -> int:
        """Number of tokens."""
        return len(self.all_tokens)

    @property
    def tokens(self) -> list[int]:
        """All tokens."""
        return list(self.all_tokens)

    @property
    def logits(self) -> NDArray[np.float32]:
        """(V,) float32, the scores of the token after the last one; ValueError for an empty sequence."""
        if self._logits is None:
            self._logits = self.model.last_logits([self])[0]
        return self._logits.copy()

    def prefill(self, tokens: Sequence[int]) -> None:
        """Append tokens and compute all but the last of them."""
        self.model.prefill([self], [tokens])

    def fork(self) -> CudaSession:
        """A second sequence that shares keys and values until one of the two writes."""
        with self.model.lock:
            other = CudaSession(self.model, self.cache.fork())
            other.all_tokens, other.computed, other._logits = self.tokens, self.computed, self._logits
            return other

    def truncate(self, n: int) -> None:
        """Forget all but the first `n` tokens."""
        if n >= len(self.all_tokens):
            return
        with self.model.lock:
            self.changed()
            del self.all_tokens[n:]
            self.computed = min(self.computed, n)
            self.cache.truncate(self.computed)

    def push(self, tokens: Sequence[int]) -> None:
        """Take tokens in as pending; ValueError for an id outside the vocabulary, or where they don't fit."""
        config = self.model.config
        for token in tokens:
            if not 0 <= token < config.n_vocab:
                raise ValueError(f"token id {token} is out of the vocabulary (0 to {config.n_vocab - 1})")
        wanted = len(self.all_tokens) + len(tokens)
        if wanted > config.n_ctx:
            raise ValueError(f"{wanted} tokens do not fit: the model has {config.n_ctx} positions (n_ctx)")
        if len(tokens):
            self.changed()
            self.all_tokens.extend(int(token) for token in tokens)

    def changed(self) -> None:
        """What was computed ahead for it no longer counts."""
        self.version += 1
        self._logits = None

    def advance(self, token: int) -> None:
        """Take in the token that followed from computing the last one, on the device."""
        self._logits = None
        self.all_tokens.append(token)
        self.computed = len(self.all_tokens) - 1
