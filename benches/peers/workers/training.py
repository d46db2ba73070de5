"""How train.py and a trainer talk: {} asks for a step, {"seconds": ..., "loss": ...} is the answer."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from workers.protocol import Answer, parser, talk

LR, BETAS, EPS, WEIGHT_DECAY, MAX_NORM = 1e-4, (0.9, 0.95), 1e-8, 0.1, 1.0


@dataclass(frozen=True)
class Task:
    """A checkpoint to train on, and how: `batch` sequences of `tokens`, matrix products in `precision`."""

    model: str
    precision: str
    n_threads: int
    batch: int
    tokens: int
    recompute: bool

    def ids(self, n_vocab: int) -> tuple[list[list[int]], list[list[int]]]:
        """Inputs and targets, (batch, tokens) each; the same for all who are asked."""
        source = random.Random(self.batch * self.tokens)
        rows = [[source.randrange(n_vocab) for _ in range(self.tokens + 1)] for _ in range(self.batch)]
        return [row[:-1] for row in rows], [row[1:] for row in rows]


def serve(load: Callable[[Task], Callable[[], float]]) -> None:
    """Make steps (forward, backward, clipping, AdamW) by the function of `load`, which gives the loss."""
    arguments = parser()
    arguments.add_argument("--batch", type=int, required=True)
    arguments.add_argument("--tokens", type=int, required=True)
    arguments.add_argument("--recompute", action="store_true")
    told = arguments.parse_args()

    def start() -> tuple[Answer, Callable[[Answer], Answer]]:
        step = load(Task(told.model, told.variant, told.threads, told.batch, told.tokens, told.recompute))

        def timed(_: Answer) -> dict[str, Any]:
            begun = time.perf_counter()
            loss = step()
            return {"seconds": time.perf_counter() - begun, "loss": loss}

        return {}, timed

    talk(start)
