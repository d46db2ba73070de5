"""A run on standard output: a live panel on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import TYPE_CHECKING

from .events import Accumulated, Evaluated, Event, Finished, Sampled, Saved, Started, Step

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

# Rates and times left are means over this many steps.
_WINDOW = 20
# Without a terminal, a line for the first steps, then at most one every so many seconds.
_FIRST_STEPS = 3
_SECONDS_A_LINE = 10.0
_SAMPLE_LINES = 12


class Console:
    """A callback that shows a run; `progress` shows how far reading the data is."""

    def __init__(self, *, live: bool | None = None) -> None:
        """live: whether to draw a panel; None: where standard output is a terminal."""
        from rich.console import Console as RichConsole

        self._rich = RichConsole(highlight=False, markup=False, soft_wrap=True)
        self._is_live = self._rich.is_terminal if live is None else live
        self._live: Live | None = None
        self._started: Started | None = None
        self._steps: deque[Step] = deque(maxlen=_WINDOW)
        self._accumulated: Accumulated | None = None
        self._evaluated: Evaluated | None = None
        self._best: Evaluated | None = None
        self._sampled: Sampled | None = None
        self._saved: Saved | None = None
        self._last_line = 0.0
        self._first_step = 0

    def __call__(self, event: Event) -> None:
        """Show one event."""
        match event:
            case Started():
                self._started, self._first_step = event, event.step
                self._print(_heading(event))
                if self._is_live:
                    self._begin_live()
            case Accumulated():
                self._accumulated = event
            case Step():
                self._steps.append(event)
                self._accumulated = None
            case Evaluated():
                self._evaluated = event
                self._best = event if event.best else self._best
            case Sampled():
                self._sampled = event
            case Saved():
                self._saved = event
        if self._live is not None:
            self._live.update(self._panel(), refresh=not isinstance(event, Step | Accumulated))
        elif not isinstance(event, Started):
            self._line(event)
        if isinstance(event, Finished):
            self._finish(event)

    def progress(self, what: str, done: int, total: int) -> None:
        """Show on a terminal how far something is, in one line that is replaced."""
        if not self._is_live or not total:
            return
        width = 30
        filled = width * done // total
        text = f"{what} [{'#' * filled}{'.' * (width - filled)}] {done / 1e6:,.1f} of {total / 1e6:,.1f} MB"
        end = "\n" if done >= total else ""
        print(f"\r\x1b[K{text}", end=end, file=sys.stdout, flush=True)

    def tokens_per_second(self) -> float:
        """Over the last steps, without what comes between them."""
        seconds = sum(step.seconds for step in self._steps)
        return sum(step.tokens for step in self._steps) / seconds if seconds else 0.0

    def _print(self, text: str) -> None:
        self._rich.print(text)

    def _speed(self) -> str:
        rate = self.tokens_per_second()
        text = f"{rate:,.0f} tokens/s"
        if self._started and self._started.peak_gflops:
            share = rate * self._started.flops_per_token / 1e9 / self._started.peak_gflops
            text += f", {100 * share:.0f} % of the FMA peak"
        return text

    def _left(self) -> str:
        if not self._started or not self._steps:
            return ""
        mean = sum(step.seconds for step in self._steps) / len(self._steps)
        return _duration(mean * (self._started.steps - self._steps[-1].step))

    def _line(self, event: Event) -> None:
        match event:
            case Step():
                now = time.monotonic()
                early = event.step - self._first_step <= _FIRST_STEPS
                if not early and now - self._last_line < _SECONDS_A_LINE:
                    return
                self._last_line = now
                self._print(f"{_step_text(event)}  {self._speed()}, {self._left()} left")
            case Evaluated():
                self._print(f"step {event.step}  {_val_text(event)}{'  best' if event.best else ''}")
            case Sampled():
                self._print(f"step {event.step}  sample:\n{_indented(event)}")
            case Saved():
                self._print(f"step {event.step}  saved {event.folder}")
        sys.stdout.flush()

    def _begin_live(self) -> None:
        from rich.live import Live

        self._live = Live(self._panel(), console=self._rich, refresh_per_second=4)
        self._live.start()

    def _panel(self) -> RenderableType:
        from rich.console import Group
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.text import Text

        assert self._started is not None
        started = self._started
        step = self._steps[-1] if self._steps else None
        done = step.step if step else started.step
        rows = [Text(_step_text(step) if step else f"step {done}")]
        if step:
            rows.append(Text(f"{self._speed()}   {self._left()} left"))
        if (part := self._accumulated) is not None:
            rows.append(Text(f"step {part.step}: {part.done} of {part.sequences} sequences"))
        if self._evaluated:
            text = f"held out, after step {self._evaluated.step}: {_val_text(self._evaluated)}"
            if self._best:
                text += f"; best {self._best.val_loss:.4f} at {self._best.step}"
            rows.append(Text(text))
        if self._saved:
            rows.append(Text(f"saved {self._saved.folder}"))
        if self._sampled:
            rows += [
                Text(f"\nafter step {self._sampled.step} it writes:"),
                Text(_indented(self._sampled), "dim"),
            ]
        bar = ProgressBar(total=max(1, started.steps), completed=done)
        return Panel(Group(bar, *rows), title=f"step {done} of {started.steps}", title_align="left")

    def _finish(self, event: Finished) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        endings = {
            "done": f"done after step {event.step}",
            "stopped": f"stopped after step {event.step}",
            "interrupted": f"interrupted after step {event.step}, which is saved; go on with --resume",
            "failed": f"failed after step {event.step}",
        }
        self._print(endings[event.reason])


def _heading(event: Started) -> str:
    config = event.config
    total = sum(event.memory.values())
    parts = ", ".join(f"{what} {size / 2**20:,.0f}" for what, size in event.memory.items())
    epochs = event.tokens_per_step * event.steps / max(1, event.train_tokens)
    lines = [
        f"{event.n_parameters / 1e6:.1f} M parameters: {config['n_layer']} layers, "
        f"{config['n_embd']} channels, {config['n_head']} heads, {config['vocab_size']} tokens, "
        f"{config['n_positions']} positions",
        f"data: {event.train_tokens:,} tokens to learn from, {event.val_tokens:,} held out; "
        f"{event.tokens_per_step:,} a step, {epochs:.2f} epochs in {event.steps} steps",
        f"memory: {total / 2**20:,.0f} MiB ({parts}); {event.n_threads} "
        f"thread{'' if event.n_threads == 1 else 's'}, "
        f"FMA peak {event.peak_gflops:,.0f} GFLOP/s",
    ]
    if event.step:
        lines.append(f"going on after step {event.step}")
    return "\n".join(lines)


def _step_text(step: Step) -> str:
    return f"step {step.step}  loss {step.loss:.4f}  lr {step.lr:.2e}  gradient norm {step.grad_norm:.3f}"


def _val_text(event: Evaluated) -> str:
    text = f"held-out loss {event.val_loss:.4f}"
    if event.val_loss_per_char is not None:
        text += f" ({event.val_loss_per_char:.4f} a character)"
    return text


def _indented(event: Sampled) -> str:
    """The first lines of a sample, set off; control characters but newlines are shown as such."""
    text = "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in event.text)
    prompt = "" if event.prompt.startswith("<|") else event.prompt
    return "\n".join(f"    {line}" for line in (prompt + text).strip("\n").split("\n")[:_SAMPLE_LINES])


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 120:
        return f"{minutes} min"
    hours = round(minutes / 60)
    return f"{hours} h" if hours < 72 else f"{hours / 24:.0f} days"
