"""One run from its first step, or from where it was, to its last: what `Trainer.fit` does."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from .. import _core
from .batches import Batches
from .corpus import open_corpus
from .cost import flops_per_token
from .documents import SEPARATOR
from .durable import only_one, sweep, write_text
from .evaluation import HeldOut
from .events import Accumulated, Callback, Evaluated, Event, Finished, Sampled, Saved, Started
from .log import Log
from .run_folder import Position, RunFolder
from .settings_file import toml
from .sharding import Progress

if TYPE_CHECKING:
    from .trainer import Trainer


class Diverged(RuntimeError):
    """A loss or gradients are no numbers any more; what was saved before is as it was."""

    def __init__(self, what: str, value: float) -> None:
        """What is no number, and what it is."""
        super().__init__(
            f"{what} is {value}: the run diverged; a lower lr or a longer warmup may help, and what was "
            "saved before is as it was"
        )


class Run:
    """The data, the folder and the callbacks of a run, around its trainer."""

    def __init__(self, trainer: Trainer, callbacks: Sequence[Callback], progress: Progress) -> None:
        """Open the data and the folder; errors as of `Trainer.fit`."""
        self._trainer = trainer
        settings = self._settings = trainer.settings
        self._callbacks = callbacks
        if settings.out is None:
            raise ValueError("out is None; a run needs a folder to write into")
        self._folder = RunFolder(Path(settings.out).expanduser())
        if not trainer.resumed and (self._folder.settings.exists() or self._folder.checkpoints()):
            raise FileExistsError(
                f"{self._folder.path} has a run already; go on with it (--resume), or take another folder"
            )
        train, held = open_corpus(settings, trainer.vocabulary, trainer.config.n_vocab, progress)
        self._train_tokens, self._val_tokens = len(train), len(held)
        self._batches = Batches(train, trainer.n_tokens, trainer.n_sequences, settings.seed)
        self._held_out = HeldOut(held, trainer.n_tokens, settings.eval_tokens, trainer.batch_size)
        self._data = train.digest()
        self._prompt = self._checked_prompt()
        before = trainer.position
        if before is not None and before.data != self._data:
            raise ValueError("the data is not what the run began with; start another run (--init-from)")
        self._best_step = before.best_step if before else None
        self._best = before.best_val_loss if before else None
        self._seconds = before.seconds if before else 0.0
        self._saved = before.step if before else None

    def run(self) -> None:
        """All of it, with the folder to itself, and with Ctrl-C taken over."""
        trainer = self._trainer
        self._folder.path.mkdir(parents=True, exist_ok=True)
        with only_one(self._folder.lock):
            self._open_folder()
            trainer.stopping = False
            trainer.on_accumulated = self._accumulated
            trainer.interrupts.listen()
            reason = "failed"
            try:
                reason = self._to_the_end()
            except KeyboardInterrupt:
                # A second Ctrl-C ends what follows, too.
                trainer.interrupts.leave()
                trainer.core.zero_grad()
                self._save()
                reason = "interrupted"
                raise
            finally:
                trainer.interrupts.leave()
                self._finish(reason)

    def _open_folder(self) -> None:
        sweep(self._folder.path)
        write_text(self._folder.settings, toml(self._settings))
        self._log = Log(self._folder.log, step=self._trainer.n_steps)
        self._trainer.resumed = True

    def _checked_prompt(self) -> str | None:
        """What samples begin with, if there are any; ValueError where no room is left behind it."""
        vocabulary, n_ctx = self._trainer.vocabulary, self._trainer.config.n_ctx
        if vocabulary.encoding is None or not self._settings.sample_every:
            return None
        prompt = self._settings.sample_prompt
        if prompt is None:
            prompt = "\n" if vocabulary.end_of_text is None else SEPARATOR
        n_tokens = len(vocabulary.encoding.encode(prompt, allowed_special="all"))
        if not 0 < n_tokens < n_ctx:
            raise ValueError(
                f"sample_prompt has {n_tokens} tokens; it must have at least 1 and fewer than n_ctx, {n_ctx}"
            )
        return prompt

    def _to_the_end(self) -> str:
        """Make the steps that are left; returns why it ended."""
        trainer, settings = self._trainer, self._settings
        self._tell(self._started())
        if trainer.n_steps == 0:
            self._look(is_end=False)
        while trainer.n_steps < settings.steps and not trainer.stopping:
            if trainer.interrupts.pending:
                raise KeyboardInterrupt
            inputs, targets = self._batches.batch(trainer.n_steps)
            step = trainer.step(inputs, targets)
            self._seconds += step.seconds
            self._tell(step)
            is_end = trainer.n_steps == settings.steps
            is_best = self._look(is_end)
            if is_best or is_end or self._is_due(settings.save_every):
                self._save()
        self._save()
        return "done" if trainer.n_steps >= settings.steps else "stopped"

    def _is_due(self, every: int) -> bool:
        return every > 0 and self._trainer.n_steps % every == 0

    def _look(self, is_end: bool) -> bool:
        """Measure and sample where it is time; returns whether the held-out loss is the best so far."""
        settings = self._settings
        is_best = False
        if self._held_out and settings.eval_every and (is_end or self._is_due(settings.eval_every)):
            is_best = self._evaluate()
        if self._prompt and (is_end or self._is_due(settings.sample_every)):
            self._sample(self._prompt)
        return is_best

    def _evaluate(self) -> bool:
        trainer = self._trainer
        began = time.perf_counter()
        found = self._held_out.loss(trainer.core, trainer.vocabulary)
        if not math.isfinite(found.loss):
            raise Diverged(f"the held-out loss after step {trainer.n_steps}", found.loss)
        # Of a model that has learned nothing there is no best.
        is_best = trainer.n_steps > 0 and (self._best is None or found.loss < self._best)
        if is_best:
            self._best, self._best_step = found.loss, trainer.n_steps
        self._tell(
            Evaluated(
                trainer.n_steps,
                found.loss,
                found.per_character,
                found.tokens,
                time.perf_counter() - began,
                is_best,
            )
        )
        return is_best

    def _sample(self, prompt: str) -> None:
        settings, model = self._settings, self._trainer.model()
        n_prompt = len(model.tokenizer.encode(prompt, allowed_special="all")) if model.tokenizer else 0
        result = model.generate(
            prompt,
            max_new_tokens=min(settings.sample_tokens, model.config.n_ctx - n_prompt),
            temperature=settings.sample_temperature,
            seed=settings.seed,
        )
        self._tell(Sampled(self._trainer.n_steps, prompt, result.text))

    def _save(self) -> None:
        """Write a checkpoint of the present step, unless there is one.

        Diverged, and nothing written, where the last update left a model whose loss is no number.
        """
        trainer = self._trainer
        if self._saved == trainer.n_steps:
            return
        if trainer.last_batch is not None:
            loss = trainer.core.loss(*trainer.last_batch)
            if not math.isfinite(loss):
                raise Diverged(f"the loss after step {trainer.n_steps}", loss)
        position = Position(trainer.n_steps, self._best_step, self._best, self._data, self._seconds)
        folder = self._folder.save(trainer.core, trainer.vocabulary, position, self._settings.dropout)
        trainer.position = position
        self._saved = trainer.n_steps
        self._tell(Saved(trainer.n_steps, folder))

    def _finish(self, reason: str) -> None:
        """Tell that it is over; where it failed, what the callbacks and the log then fail with is no news."""
        with suppress(*([Exception] if reason == "failed" else [])):
            self._tell(Finished(self._trainer.n_steps, reason))

    def _accumulated(self, done: int, sequences: int) -> None:
        for callback in self._callbacks:
            callback(Accumulated(self._trainer.n_steps + 1, done, sequences))

    def _tell(self, event: Event) -> None:
        self._log(event)
        for callback in self._callbacks:
            callback(event)

    def _started(self) -> Started:
        trainer, settings = self._trainer, self._settings
        config = trainer.config
        return Started(
            step=trainer.n_steps,
            steps=settings.steps,
            settings=settings.changed(),
            config=json.loads(config.to_json()),
            n_parameters=config.num_parameters(),
            train_tokens=self._train_tokens,
            val_tokens=self._val_tokens,
            tokens_per_step=trainer.n_sequences * trainer.n_tokens,
            n_threads=trainer.core.n_threads,
            memory=dict(trainer.memory_plan),
            flops_per_token=flops_per_token(config, trainer.n_tokens),
            peak_gflops=_core.probe_fma(trainer.core.n_threads),
        )
