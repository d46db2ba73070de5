"""What a run tells its callbacks, in the order in which it happens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Started:
    """A run begins, or goes on at `step`.

    settings: those that are not at their default.  train_tokens, val_tokens: of the data.  n_threads,
    memory: threads, and bytes by what they are for, of the core.  flops_per_token, peak_gflops: the work
    of a token and the machine's peak, of which a step's rate is a share.
    """

    step: int
    steps: int
    settings: dict[str, Any]
    config: dict[str, Any]
    n_parameters: int
    train_tokens: int
    val_tokens: int
    tokens_per_step: int
    n_threads: int
    memory: dict[str, int]
    flops_per_token: int
    peak_gflops: float


@dataclass(frozen=True)
class Accumulated:
    """The `step`-th step is being made: the gradients of `done` of its `sequences` are there.  Not logged."""

    step: int
    done: int
    sequences: int


@dataclass(frozen=True)
class Step:
    """One step was made, the `step`-th.

    loss: mean cross-entropy of its tokens, in nats, before the step.  grad_norm: of all gradients, before
    they were clipped.  lr: the learning rate.  tokens, seconds: what it read, and took.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Evaluated:
    """The held-out loss after `step` steps, in nats a token, and a character where there is a tokenizer."""

    step: int
    val_loss: float
    val_loss_per_char: float | None
    tokens: int
    seconds: float
    best: bool


@dataclass(frozen=True)
class Sampled:
    """What the model writes after `step` steps."""

    step: int
    prompt: str
    text: str


@dataclass(frozen=True)
class Saved:
    """A checkpoint is complete."""

    step: int
    folder: Path


@dataclass(frozen=True)
class Finished:
    """The run ends: `reason` is "done", "stopped" (a callback, `Trainer.stop`), "interrupted" or "failed"."""

    step: int
    reason: str


Event = Started | Accumulated | Step | Evaluated | Sampled | Saved | Finished
Callback = Callable[[Event], object]
