"""The learning rate of each step."""

from __future__ import annotations

import math

from .settings import TrainSettings


def learning_rate(step: int, settings: TrainSettings) -> float:
    """Linear up to `lr` over the warm-up, then half a cosine down to `min_lr` at the last step.

    step: counted from 0.  Loshchilov and Hutter 2017, "SGDR", arXiv:1608.03983, without restarts.
    """
    warmup = settings.warmup_steps
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, settings.steps - 1 - warmup))
    return settings.final_lr + (settings.lr - settings.final_lr) * (1 + math.cos(math.pi * done)) / 2
