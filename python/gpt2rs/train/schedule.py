"""The learning rate of each step, to the same bits on every machine: no system's library has a part in it."""

from __future__ import annotations

import math

from .settings import TrainSettings

_PI_SQUARED = math.pi * math.pi


def learning_rate(step: int, settings: TrainSettings) -> float:
    """Linear up to `lr` over the warm-up, then half a cosine down to `min_lr` at the last step.

    step: counted from 0.  The last of the warm-up and the next have `lr` exactly, the last of all `min_lr`
    (if it is not the first after the warm-up).
    Loshchilov and Hutter 2017, "SGDR", arXiv:1608.03983, without restarts.
    """
    warmup, highest, lowest = settings.warmup_steps, settings.lr, settings.final_lr
    if step < warmup:
        return highest * ((step + 1) / warmup)
    done = min(1.0, (step - warmup) / max(1, settings.steps - 1 - warmup))
    # From the end that is nearer, which makes both ends exact.
    if done <= 0.5:
        return highest - (highest - lowest) * _half_wave(done)
    return lowest + (highest - lowest) * _half_wave(1 - done)


def _half_wave(x: float) -> float:
    """(1 - cos(pi x)) / 2 for x from 0 to 0.5, off by 4 units in the last place at most.

    Its Taylor series, up to (pi x)**22, in the four operations that IEEE 754 defines to the bit; a system's
    cosine is its own.
    """
    z = x * x * _PI_SQUARED
    series = 1.0
    for n in range(21, 1, -2):
        series = 1 - z / (n * (n + 1)) * series
    return z / 4 * series
