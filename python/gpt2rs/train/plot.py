"""The picture of learning: the losses of a run over its steps, and what it wrote at some of them."""

from __future__ import annotations

import os
import warnings
from importlib.util import find_spec
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np

from .log import read_log
from .run_folder import RunFolder

MISSING = "the plot needs matplotlib: pip install 'gpt2rs[train]'"
_SAMPLES = 5
_COLUMNS, _LINES = 62, 8
_SMOOTHED_OVER = 0.02


def available() -> bool:
    """Whether there is a matplotlib to draw with."""
    return find_spec("matplotlib") is not None


def draw(run: str | os.PathLike[str], path: str | os.PathLike[str] | None = None) -> Path:
    """Draw the log of the folder `run` into `path`, whose suffix chooses the format (svg, png, pdf).

    path: None: loss.svg in the folder.  Returns where it is.  Raises ImportError without matplotlib, which
    the extra `train` has, FileNotFoundError without a log.
    """
    if not available():
        raise ImportError(MISSING)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    folder = RunFolder(Path(run).expanduser())
    events = list(read_log(folder.log))
    steps = [event for event in events if event["event"] == "step"]
    held_out = [event for event in events if event["event"] == "evaluated"]
    samples = _some([event for event in events if event["event"] == "sampled"])
    figure = Figure(figsize=(13 if samples else 7, 6.5), layout="constrained")
    left, right = figure.subplots(1, 2) if samples else (figure.subplots(), None)
    if steps:
        x, y = [event["step"] for event in steps], np.array([event["loss"] for event in steps])
        left.plot(x, y, color="#b9c6d8", linewidth=0.6)
        left.plot(x, _smooth(y), color="#28527a", linewidth=1.4, label="training")
    if held_out:
        x = [event["step"] for event in held_out]
        left.plot(
            x, [event["val_loss"] for event in held_out], "o-", color="#c0392b", ms=3, lw=1, label="held out"
        )
        best = min(held_out, key=lambda event: float(event["val_loss"]))
        left.annotate(
            _value(best), (best["step"], best["val_loss"]), (0, -14), textcoords="offset points", ha="right"
        )
    left.set_xlabel("step")
    left.set_ylabel("loss, nats a token")
    left.grid(alpha=0.25)
    left.margins(y=0.08)
    if steps or held_out:
        left.legend(frameon=False)
    if right is not None:
        right.axis("off")
        for place, event in enumerate(samples):
            top = 1 - place / len(samples)
            right.text(0, top, f"after step {event['step']}", weight="bold", va="top", size=9)
            right.text(
                0, top - 0.03, _excerpt(event), va="top", family="monospace", size=7.5, parse_math=False
            )
    target = folder.plot if path is None else Path(path)
    # Text stays text, and the same run gives the same file.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "gpt2rs"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        figure.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None)
    return target


def _smooth(losses: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The mean over the steps around each, a fiftieth of all."""
    width = max(1, int(len(losses) * _SMOOTHED_OVER))
    sums = np.concatenate([[0.0], np.cumsum(losses)])
    at = np.arange(len(losses))
    low, high = np.maximum(at - width, 0), np.minimum(at + width + 1, len(losses))
    return np.asarray((sums[high] - sums[low]) / (high - low))


def _some(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first, the last, and some between: of a long run more of its beginning, where most happens."""
    if len(samples) <= _SAMPLES:
        return samples
    places = np.unique(np.round(np.geomspace(1, len(samples), _SAMPLES)).astype(int)) - 1
    return [samples[place] for place in places]


def _value(event: dict[str, Any]) -> str:
    per_char = event["val_loss_per_char"]
    return f"{event['val_loss']:.3f}" + (f" ({per_char:.3f} a character)" if per_char is not None else "")


def _excerpt(event: dict[str, Any]) -> str:
    """A sample's first lines, as far as a font has the characters."""
    prompt = "" if event["prompt"].startswith("<|") else event["prompt"]
    lines = [
        part
        for line in (prompt + event["text"]).strip("\n").split("\n")
        for part in wrap(line, _COLUMNS) or [""]
    ]
    text = "\n".join(lines[:_LINES])
    return "".join(c if c == "\n" or c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
