"""Text to learn from, the same on every machine."""

from __future__ import annotations

import random

WORDS = (
    "the",
    "king",
    "and",
    "queen",
    "of",
    "night",
    "shall",
    "speak",
    "no",
    "more",
    "but",
    "thou",
    "my",
    "lord",
)


def prose(seed: int, n_words: int) -> str:
    """Words in sentences: something to be learned, and the same on every machine."""
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) + (".\n" if draw.random() < 0.1 else "") for _ in range(n_words))
