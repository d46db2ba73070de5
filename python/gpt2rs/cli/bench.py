"""`gpt2rs bench`: the figures of `gpt2rs.bench`, as a table or as JSON."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .options import flag

if TYPE_CHECKING:
    from gpt2rs import GPT2
    from gpt2rs.bench import Report

_PRESETS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
_DTYPES = ("float32", "bfloat16")


def bench(
    model: Annotated[
        str,
        flag(
            f"{', '.join(_PRESETS)}: that size, random weights; else a folder, file or hub name.",
            "--model",
            "-m",
        ),
    ] = "gpt2",
    dtype: Annotated[list[str] | None, flag("May be repeated. Default: float32 and bfloat16.")] = None,
    kv_dtype: options.KvDtype = None,
    precision: options.Precision = "exact",
    device: options.Device = "cpu",
    threads: Annotated[
        Any,
        flag(
            "Numbers of threads, such as 1,2. Default: the model's choice.",
            parser=_thread_counts,
            metavar="N,...",
        ),
    ] = None,
    config: options.Config = None,
    revision: options.Revision = None,
    offline: options.Offline = False,
    quick: Annotated[bool, flag("Fewer rounds and tokens.", "--quick")] = False,
    as_json: options.Json = False,
) -> None:
    """Measure decode and prefill, beside the read bandwidth and arithmetic peak measured in the same run.

    On a GPU decode is measured beside the bandwidth of its copies, prefill by itself.
    """
    from gpt2rs import GPT2
    from gpt2rs.bench import measure

    def load(dtype: str, n_threads: int | None) -> GPT2:
        if model in _PRESETS:
            return GPT2.from_config(
                model,
                dtype=dtype,
                kv_dtype=kv_dtype,
                precision=precision,
                device=device,
                n_threads=n_threads,
            )
        return options.open_model(
            model,
            dtype=dtype,
            kv_dtype=kv_dtype,
            precision=precision,
            device=device,
            n_threads=n_threads,
            config=config,
            revision=revision,
            offline=offline,
        )

    report = measure(load, dtype or _DTYPES, threads or [None], quick=quick, progress=_progress)
    _progress("")
    about = {
        "model": f"{model}, random weights" if model in _PRESETS else model,
        "machine": _processor() if report.device == "cpu" else report.machine,
        "device": report.device,
        "isa": report.isa,
        "date": time.strftime("%Y-%m-%d"),
    }
    print(json.dumps(_facts(report, about), indent=2) if as_json else _table(report, about))


def _thread_counts(text: str) -> list[int]:
    counts = options.token_ids(text)
    if not counts or min(counts) < 1:
        raise typer.BadParameter(f"{text!r} is not a list of numbers of threads, each 1 or more")
    return counts


def _progress(what: str) -> None:
    """Show on a terminal what is going on, in one line that the next one replaces."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{what}", end="", file=sys.stderr, flush=True)


def _processor() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _facts(report: Report, about: dict[str, str]) -> dict[str, Any]:
    from gpt2rs.bench import COUNTING, Spread

    def spread(values: Sequence[float]) -> dict[str, float]:
        return Spread.of(values)._asdict()

    return {
        **about,
        "counting": COUNTING,
        "figures": [
            {
                "dtype": figure.dtype,
                "n_threads": figure.n_threads,
                "work": figure.work,
                "tokens_per_second": spread(figure.tokens_per_second),
                "unit": figure.unit,
                "rate": spread(figure.rates),
                "share_of_limit": spread(figure.shares) if figure.shares else None,
            }
            for figure in report.figures
        ],
        "limits": [
            {
                "name": probe.name,
                "n_threads": probe.n_threads,
                "unit": probe.unit,
                "rate": spread(probe.rates),
            }
            for probe in report.probes
        ],
    }


def _table(report: Report, about: dict[str, str]) -> str:
    from gpt2rs.bench import COUNTING, Spread

    def cell(values: Sequence[float], digits: int = 1, unit: str = "") -> str:
        if not values:
            return ""
        median, low, high = Spread.of(values)
        return f"{median:.{digits}f}{unit} ({low:.{digits}f}, {high:.{digits}f})"

    rows = [("dtype", "threads", "work", "tokens/s", "rate", "of the limit")]
    for figure in report.figures:
        rows.append(
            (
                figure.dtype,
                str(figure.n_threads),
                figure.work,
                cell(figure.tokens_per_second),
                f"{cell(figure.rates)} {figure.unit}",
                cell([100 * share for share in figure.shares], 0, " %"),
            )
        )
    for probe in report.probes:
        rows.append(("limit", str(probe.n_threads), probe.name, "", f"{cell(probe.rates)} {probe.unit}", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    title = (
        f"{about['model']}; {about['machine']}, {about['isa']}; {about['date']}; median (minimum, maximum)"
    )
    return "\n".join([title, "", *lines, "", *COUNTING.split("; ")])
