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
from .events import Accumulated, Callback, Evaluated, Event, Finished, Sampled, Saved, Started, Step
from .log import Log
from .run_folder import Position, RunFolder, read_position
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
        self._check_folder()
        train, held = open_corpus(settings, trainer.vocabulary, trainer.config.n_vocab, progress)
        self._train_tokens, self._val_tokens = len(train), len(held)
        self._batches = Batches(train, trainer.n_tokens, trainer.n_sequences, settings.seed)
        self._held_out = HeldOut(held, trainer.n_tokens, settings.eval_tokens, trainer.batch_size)
        self._data = train.digest()
        self._prompt = self._checked_prompt()
        before = trainer.position
        if before is not None and before.data != self._data:
            raise ValueError(
                "the data is not what the run began with: it was changed, or val_fraction was; to learn from "
                "other data, start another run, with init_from to take the weights over"
            )
        self._best_step = before.best_step if before else None
        self._best = before.best_val_loss if before else None
        self._seconds = before.seconds if before else 0.0
        self._evaluated = before.evaluated if before else False
        self._sampled = before.sampled if before else False

    def run(self) -> None:
        """All of it, with the folder to itself, and with Ctrl-C taken over."""
        trainer = self._trainer
        self._folder.path.mkdir(parents=True, exist_ok=True)
        with only_one(self._folder.lock):
            # Once more: another process may have had the folder while the data was read.
            self._check_folder()
            self._open_folder()
            trainer.stopping = False
            trainer.on_accumulated = self._accumulated
            trainer.on_step = self._made
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

    def _check_folder(self) -> None:
        """Errors where the folder's run is not the trainer's, at the place where the trainer is."""
        folder, trainer = self._folder, self._trainer
        if folder.path.exists() and not folder.path.is_dir():
            raise NotADirectoryError(
                f"out is {folder.path}, which is a file; it must be a folder, or a new name"
            )
        if not trainer.resumed:
            if folder.settings.exists() or folder.checkpoints():
                raise FileExistsError(
                    f"{folder.path} has a run already; go on with it (--resume), or take another folder"
                )
            return
        last = folder.last()
        if (read_position(last) if last else None) != trainer.position:
            raise RuntimeError(f"the run in {folder.path} went on elsewhere in the meantime; resume it again")

    def _open_folder(self) -> None:
        sweep(self._folder.path)
        write_text(self._folder.settings, toml(self._settings))
        n_steps, position = self._trainer.n_steps, self._trainer.position
        self._log = Log(self._folder.log, step=n_steps if n_steps or position else None)
        if position is not None:
            self._folder.tidy(position)
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
        # At the beginning, or where an interruption came before it.
        self._look()
        while trainer.n_steps < settings.steps and not trainer.stopping:
            self._heed()
            inputs, targets = self._batches.batch(trainer.n_steps)
            self._call(trainer.step(inputs, targets))
            self._heed()
            self._look()
        self._save()
        return "done" if trainer.n_steps >= settings.steps else "stopped"

    def _is_due(self, every: int) -> bool:
        return every > 0 and self._trainer.n_steps % every == 0

    def _heed(self) -> None:
        """Act on a signal that came while signals were held."""
        if self._trainer.interrupts.pending:
            raise KeyboardInterrupt

    def _made(self, step: Step) -> None:
        """A step was made; signals are held."""
        self._seconds += step.seconds
        self._evaluated = self._sampled = False
        self._log(step)

    def _look(self) -> None:
        """Measure, sample and save, each where it is time and was not done after this step."""
        settings, n_steps = self._settings, self._trainer.n_steps
        is_end = n_steps == settings.steps
        if not self._evaluated:
            if self._held_out and settings.eval_every and (is_end or self._is_due(settings.eval_every)):
                self._evaluate()
            self._evaluated = True
        if not self._sampled:
            if self._prompt and (is_end or self._is_due(settings.sample_every)):
                self._sample(self._prompt)
            self._sampled = True
        is_best = self._best_step == n_steps
        if n_steps and (is_best or is_end or self._is_due(settings.save_every)):
            self._save()

    def _evaluate(self) -> None:
        trainer = self._trainer
        began = time.perf_counter()
        found = self._held_out.loss(trainer.core, trainer.vocabulary)
        if not math.isfinite(found.loss):
            raise Diverged(f"the held-out loss after step {trainer.n_steps}", found.loss)
        # Of a model that has learned nothing there is no best.
        is_best = trainer.n_steps > 0 and (self._best is None or found.loss < self._best)
        seconds = time.perf_counter() - began
        event = Evaluated(trainer.n_steps, found.loss, found.per_character, found.tokens, seconds, is_best)
        with trainer.interrupts.held():
            if is_best:
                self._best, self._best_step = found.loss, trainer.n_steps
            self._evaluated = True
            self._log(event)
        self._call(event)

    def _sample(self, prompt: str) -> None:
        settings, model = self._settings, self._trainer.model()
        n_prompt = len(model.tokenizer.encode(prompt, allowed_special="all")) if model.tokenizer else 0
        result = model.generate(
            prompt,
            max_new_tokens=min(settings.sample_tokens, model.config.n_ctx - n_prompt),
            temperature=settings.sample_temperature,
            seed=settings.seed,
        )
        event = Sampled(self._trainer.n_steps, prompt, result.text)
        with self._trainer.interrupts.held():
            self._sampled = True
            self._log(event)
        self._call(event)

    def _save(self) -> None:
        """Write a checkpoint of where the run is, unless there is one.

        Diverged, and nothing written, where the last update left a model whose loss is no number.
        """
        trainer = self._trainer
        position = Position(
            trainer.n_steps,
            self._best_step,
            self._best,
            self._data,
            self._seconds,
            self._evaluated,
            self._sampled,
        )
        if position == trainer.position:
            return
        if trainer.last_batch is not None:
            loss = trainer.core.loss(*trainer.last_batch)
            if not math.isfinite(loss):
                raise Diverged(f"the loss after step {trainer.n_steps}", loss)
        if trainer.position is not None and position.step == trainer.position.step:
            self._folder.move(position)
            trainer.position = position
            return
        folder = self._folder.save(trainer.core, trainer.vocabulary, position, self._settings.dropout)
        event = Saved(trainer.n_steps, folder)
        with trainer.interrupts.held():
            trainer.position = position
            self._folder.tidy(position)
            self._log(event)
        self._call(event)

    def _finish(self, reason: str) -> None:
        """Tell that it is over; where it failed, what the callbacks and the log then fail with is no news."""
        with suppress(*([Exception] if reason == "failed" else [])):
            self._tell(Finished(self._trainer.n_steps, reason))

    def _accumulated(self, done: int, sequences: int) -> None:
        for callback in self._callbacks:
            callback(Accumulated(self._trainer.n_steps + 1, done, sequences))

    def _tell(self, event: Event) -> None:
        self._log(event)
        self._call(event)

    def _call(self, event: Event) -> None:
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
