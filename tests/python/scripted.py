"""Models whose next token, or its distribution, is known beforehand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

import gpt2rs


class Pieces:
    """A tokenizer in which token i is the i-th piece of bytes; like tiktoken's as far as decoding goes."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.pieces = pieces

    def decode_single_token_bytes(self, token: int) -> bytes:
        if not 0 <= token < len(self.pieces):
            raise KeyError(token)
        return self.pieces[token]


def writes(pieces: Sequence[bytes]) -> gpt2rs.GPT2:
    """A model that writes the given pieces one after the other: token i, whatever came before it, leads to i
    + 1.

    Its prompt is [0]; piece 0 is the prompt's own.
    """
    n = len(pieces)
    follows = np.eye(n + 2, dtype=np.float32)
    model = gpt2rs.GPT2.from_params(
        {
            "wte": follows,
            "wpe": np.zeros((256, n + 2), np.float32),
            "blocks": [],
            "ln_f": {"g": np.ones(n + 2, np.float32), "b": np.zeros(n + 2, np.float32)},
            "lm_head": np.roll(follows, 1, axis=0),  # row i + 1 is what the state of token i looks like
        },
        n_head=1,
    )
    model.tokenizer = Pieces(pieces)  # type: ignore[assignment]
    return model


def constant_logits(logits: Sequence[float], *, n_ctx: int = 256) -> gpt2rs.GPT2:
    """A model that gives these logits after any text.

    ln_f's gain is 0 and its bias the first unit vector, so that a logit is the first entry of the head's row.
    """
    head = np.zeros((len(logits), 2), np.float32)
    head[:, 0] = logits
    return gpt2rs.GPT2.from_params(
        {
            "wte": np.ones((len(logits), 2), np.float32),
            "wpe": np.zeros((n_ctx, 2), np.float32),
            "blocks": [],
            "ln_f": {"g": np.zeros(2, np.float32), "b": np.array([1, 0], np.float32)},
            "lm_head": head,
        },
        n_head=1,
    )
