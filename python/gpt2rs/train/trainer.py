"""Trainer: a model that learns, step by step or through a whole run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import _core
from ..gpt2 import GPT2
from .events import Callback, Step
from .ids import inputs_and_targets
from .interrupts import Interrupts
from .run import Diverged, Run
from .schedule import learning_rate
from .settings import TrainSettings
from .start import begin, go_on, resumed

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray


class Trainer:
    """A GPT-2 and its optimiser: gradients by backpropagation, AdamW, on the CPU.

        trainer = Trainer(TrainSettings(data="text.txt", out="run", preset="gpt2", steps=1000))
        trainer.fit()

    `fit` makes a whole run of it; `step` is one step on tokens of your own, for which neither `data` nor
    `out` is needed.  Weights are float32, and the same settings and tokens give the same bits on any number
    of threads and every instruction set.  Shapes: B sequences of T tokens.
    """

    def __init__(self, settings: TrainSettings, *, _go_on: bool = False) -> None:
        """A new model, or the one of `settings.init_from`; `resume` is the way back to a run.

        `core` is the compiled trainer, whose `tensor` gives weights, gradients and moments by name;
        `vocabulary` the tokenizer; `n_tokens` the length of the sequences of a run, `n_sequences` how many a
        step has; `n_steps` how many steps were made.

        Raises ValueError and FileNotFoundError for settings that don't go together, and for files that are
        malformed or missing, RuntimeError where the memory plan does not fit.
        """
        self.settings = settings
        start = go_on(settings) if _go_on else begin(settings)
        self.core = start.core
        self.vocabulary = start.vocabulary
        self.n_tokens = start.n_tokens
        self.position = start.position
        self.resumed = _go_on
        self.n_sequences, self.batch_size = settings.batching(start.n_tokens)
        self.n_steps = 0 if start.position is None else start.position.step
        self.interrupts = Interrupts()
        # Told how many of a step's sequences are done.
        self.on_accumulated: Callable[[int, int], None] = lambda done, sequences: None
        # Told of a step as soon as it is made, while signals are held.
        self.on_step: Callable[[Step], None] = lambda step: None
        self.stopping = False
        # To see whether the last update left a model that computes.
        self.last_batch: tuple[NDArray[np.uint32], NDArray[np.uint32]] | None = None

    @classmethod
    def resume(cls, out: str | Path, **changes: Any) -> Trainer:
        """The run in the folder `out`, at its last checkpoint, to go on to the same bits as without a stop.

        changes: settings to go on with, such as `steps`; the model and its tokenizer stay.  Raises
        FileNotFoundError where there is no run, ValueError for a change that can't be.
        """
        return cls(resumed(str(out), changes), _go_on=True)

    @property
    def config(self) -> _core.Config:
        """The model's shape and constants."""
        return self.core.config

    @property
    def memory_plan(self) -> list[tuple[str, int]]:
        """What the core holds, and how many bytes each takes; all of it is reserved when it is made."""
        return self.core.memory_plan

    def model(self, dtype: str = "float32") -> GPT2:
        """A model of the weights as they are now, which later steps don't change."""
        return GPT2(self.core.model(dtype), folder=self.vocabulary.folder, tokenizer=self.vocabulary.encoding)

    def step(self, inputs: ArrayLike, targets: ArrayLike) -> Step:
        """Learn from (B, T) token ids and the (B, T) ids that follow each; T is n_ctx at most.

        B may be any number: gradients are accumulated over batches of `settings.batch_size` sequences, each
        with its share of the mean.  The rate is that of the schedule for this step.

        Raises ValueError for other shapes, no sequences, and ids that the model does not have; Diverged for
        a loss or gradients that are no numbers.
        """
        began = time.perf_counter()
        x, y = inputs_and_targets(inputs, targets)
        settings, step = self.settings, self.n_steps
        loss = 0.0
        try:
            for micro_step, first in enumerate(range(0, len(x), self.batch_size)):
                rows = slice(first, first + self.batch_size)
                share = len(x[rows]) / len(x)
                loss += share * self.core.accumulate(
                    x[rows], y[rows], step=step, micro_step=micro_step, scale=share
                )
                self.on_accumulated(min(rows.stop, len(x)), len(x))
            if not math.isfinite(loss):
                raise Diverged(f"the loss of step {step + 1}", loss)
        except BaseException:
            self.core.zero_grad()
            raise
        lr = learning_rate(step, settings)
        with self.interrupts.held():
            grad_norm = self.core.update(
                lr=lr,
                step=step + 1,
                betas=settings.betas,
                eps=settings.eps,
                weight_decay=settings.weight_decay,
                max_norm=settings.max_norm or None,
            )
            self.n_steps += 1
            self.last_batch = x[: self.batch_size], y[: self.batch_size]
            if not math.isfinite(grad_norm):
                raise Diverged(f"the gradient norm of step {step + 1}", grad_norm)
            made = Step(self.n_steps, loss, grad_norm, lr, x.size, time.perf_counter() - began)
            self.on_step(made)
        return made

    def stop(self) -> None:
        """End `fit` after the present step, with a checkpoint; for callbacks."""
        self.stopping = True

    def fit(self, callbacks: Iterable[Callback] | None = None) -> None:
        """Train up to `settings.steps` on `settings.data`, with all that a run has in `settings.out`.

        callbacks: functions that are called with each event (see `gpt2rs.train.events`); None: the one that
        shows the run on standard output.  An exception from one ends the run.

        Ctrl-C, or SIGTERM, saves a checkpoint and then raises KeyboardInterrupt.  Raises ValueError for data
        that can't be read or is too short, or is not what a resumed run began with; FileExistsError where
        `out` has a run already; Diverged; OSError where a checkpoint or the log can't be written, a full
        disk for one.  In each case the last good checkpoint is as it was.
        """
        from .console import Console

        console = Console() if callbacks is None else None
        told = [console] if console else list(callbacks or ())
        Run(self, told, console.progress if console else lambda *_: None).run()
