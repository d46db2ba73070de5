"""Log-probabilities of texts of any length, in windows of at most `n_ctx` tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from .engine import Engine
from .settings import check_count

if TYPE_CHECKING:
    from numpy.typing import NDArray


def windows(n_tokens: int, n_ctx: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, first, end) of each window: it holds tokens begin..end and scores those of first..end."""
    first, begin = 1, 0
    while first < n_tokens:
        end = min(begin + n_ctx, n_tokens)
        yield begin, first, end
        first, begin = end, begin + stride


def checked_windows(n_tokens: int, n_ctx: int, stride: int | None) -> Iterator[tuple[int, int, int]]:
    """`windows`, with half of n_ctx for a stride of None; ValueError, before the first, for what can't be."""
    if n_tokens < 2:
        raise ValueError(
            "the text has 1 token; scoring needs 2 at least, since nothing stands before the first"
        )
    if n_ctx < 2:
        raise ValueError("n_ctx is 1; scoring needs 2 positions at least")
    stride = n_ctx // 2 if stride is None else check_count("stride", stride)
    if not 1 <= stride < n_ctx:
        raise ValueError(f"stride is {stride}; it must be at least 1 and below n_ctx = {n_ctx}")
    return windows(n_tokens, n_ctx, stride)


def logprobs(model: Engine[Any], tokens: list[int], stride: int | None) -> NDArray[np.float32]:
    """(T - 1,) float32: ln p of each token but the first, given those before it in its window."""
    # score() gives ln p of tokens begin + 1 and on.
    parts = [
        model.score(tokens[begin:end])[first - begin - 1 :]
        for begin, first, end in checked_windows(len(tokens), model.config.n_ctx, stride)
    ]
    return np.concatenate(parts)
