"""Pictures of a side-by-side run: `python benches/plots.py RUN.json FOLDER`.

Needs matplotlib. RUN.json is what `benches/peers/run.py --json` writes; the pictures are SVG, each for light
and for dark pages:

- `roofline-*.svg`: decode at batch 1, tokens/s over the bytes read for a token, under the line that the read
  bandwidth of the same run draws.
- `batch-*.svg`: tokens/s over the number of sequences decoded together, one panel a width.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

Record = dict[str, Any]

# After Okabe and Ito's palette for the colour-blind, darkened or lightened for contrast on each ground; every
# system has a marker of its own besides.
COLOURS = {
    "gpt2rs": ("#d55e00", "#ff8a3d"),
    "llama_cpp": ("#0072b2", "#4aa8e0"),
    "ctranslate2": ("#8a6d00", "#e6c229"),
    "onnxruntime": ("#a63d7d", "#dd8fbd"),
    "openvino": ("#007a5a", "#2fc596"),
    "transformers": ("#6e7781", "#9aa4ae"),
}
MARKERS = {
    "gpt2rs": "o",
    "llama_cpp": "s",
    "ctranslate2": "^",
    "onnxruntime": "D",
    "openvino": "v",
    "transformers": "P",
}
DTYPES = {"float32": "float32", "bfloat16": "16 bits", "int8": "8 bits", "int4": "4 bits"}
# A system's second form at a width is hollow and dashed.
SECOND_FORMS = {"bfloat16-fast": "fast", "F16": "float16", "int8-dynamic": "dynamic"}


@dataclass(frozen=True)
class Theme:
    name: str
    which: int
    ground: str
    ink: str
    muted: str
    grid: str

    def colour(self, peer: str) -> str:
        return COLOURS[peer][self.which]


THEMES = (
    Theme("light", 0, "#ffffff", "#1f2328", "#59636e", "#e3e8ed"),
    Theme("dark", 1, "#0d1117", "#e6edf3", "#9198a1", "#262c34"),
)


def plain(value: float, _: int | None = None) -> str:
    return f"{value:g}"


def threads_text(n: int) -> str:
    return f"{n} thread" if n == 1 else f"{n} threads"


def set_style(theme: Theme) -> None:
    mpl.rcParams.update(
        {
            "font.family": "sans-serif",
            "font.size": 9,
            "figure.facecolor": theme.ground,
            "savefig.facecolor": theme.ground,
            "axes.facecolor": theme.ground,
            "axes.edgecolor": theme.muted,
            "axes.labelcolor": theme.ink,
            "axes.titlecolor": theme.ink,
            "axes.titlesize": 10,
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": theme.grid,
            "grid.linewidth": 0.8,
            "text.color": theme.ink,
            "xtick.color": theme.muted,
            "ytick.color": theme.muted,
            "xtick.labelcolor": theme.ink,
            "ytick.labelcolor": theme.ink,
            "legend.frameon": False,
            # Text stays text, a third of the size of its outlines; the same figures give the same file.
            "svg.fonttype": "none",
            "svg.hashsalt": "gpt2rs",
        }
    )


def runs_of(record: Record, n_threads: int) -> list[Record]:
    """One a width, narrowest last."""
    runs = [run for run in record["runs"] if run["threads"] == n_threads]
    return sorted(runs, key=lambda run: list(DTYPES).index(run["dtype"]))


def rows_with(record: Record, n_threads: int, workload: str) -> Iterator[tuple[str, Record]]:
    """(dtype, peer's figures) of all who did the workload, gpt2rs last, so that it is drawn on top."""
    for run in runs_of(record, n_threads):
        for row in sorted(run["peers"], key=lambda row: row["peer"] == "gpt2rs"):
            if workload in row["tokens_per_second"]:
                yield run["dtype"], row


def bandwidths(record: Record, n_threads: int, workload: str) -> list[float]:
    """Read bandwidth in GB/s, just before each repeat of the workload."""
    probes = [probe for run in runs_of(record, n_threads) for probe in run["limits"].get(workload, [])]
    return [probe["read"] for probe in probes if isinstance(probe, dict)]


def legend(figure: Figure, record: Record, theme: Theme) -> None:
    rows = [row for run in record["runs"] for row in run["peers"]]
    titles = {row["peer"]: row["title"] for row in rows}
    handles = [
        Line2D(
            [],
            [],
            label=titles[peer],
            linewidth=line_width(peer),
            color=theme.colour(peer),
            marker=MARKERS[peer],
            markersize=marker_size(peer),
        )
        for peer in COLOURS
        if peer in titles
    ]
    second = {
        row["variant"]: f"{row['title']} {SECOND_FORMS[row['variant']]}" for row in rows if is_second(row)
    }
    if second:
        hollow = {"marker": "o", "markerfacecolor": theme.ground, "color": theme.muted, "linestyle": "none"}
        handles.append(Line2D([], [], label="hollow: " + ", ".join(second.values()), **hollow))
    columns = 4 if figure.get_figwidth() > 8 else 2
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=9)


def is_second(row: Record) -> bool:
    return row["variant"] in SECOND_FORMS


def line_width(peer: str) -> float:
    return 2.2 if peer == "gpt2rs" else 1.2


def marker_size(peer: str) -> float:
    return 8 if peer == "gpt2rs" else 6


def mark(peer: str, variant: str, theme: Theme) -> dict[str, Any]:
    """How a form's points look."""
    colour = theme.colour(peer)
    return {
        "color": colour,
        "marker": MARKERS[peer],
        "markersize": marker_size(peer),
        "markerfacecolor": theme.ground if variant in SECOND_FORMS else colour,
        "markeredgewidth": 1.5,
        "zorder": 4 if peer == "gpt2rs" else 3,
    }


def roofline(record: Record, theme: Theme) -> Figure | None:
    """One row of panels a number of threads, one column a context."""
    works = [work for work in record["workloads"].values() if work["batch"] == 1 and work["new"] > 1]
    threads = sorted({run["threads"] for run in record["runs"]})
    if not works or not threads:
        return None
    size = (4.3 * len(works) + 0.4, 3.5 * len(threads) + 0.6)
    figure, axes = plt.subplots(
        len(threads), len(works), figsize=size, squeeze=False, sharex=True, sharey=True, layout="constrained"
    )
    for line, n_threads in zip(axes, threads, strict=True):
        for ax, work in zip(line, works, strict=True):
            draw_roofline(ax, record, n_threads, work, theme)
        line[0].set_ylabel("tokens/s")
    # Below the lowest point there is a line for the widths.
    lowest, highest = axes[0][0].get_ylim()
    axes[0][0].set_ylim(0.75 * lowest, highest)
    for ax in axes[-1]:
        ax.set_xlabel("bytes read for a token, MB")
    legend(figure, record, theme)
    return figure


def draw_roofline(ax: Axes, record: Record, n_threads: int, work: Record, theme: Theme) -> None:
    rows = list(rows_with(record, n_threads, work["name"]))
    if not rows:
        ax.set_visible(False)
        return
    ax.set(xscale="log", yscale="log")
    ax.set_title(f"{threads_text(n_threads)}, after {work['prompt']} tokens")
    for axis, ticks in ((ax.xaxis, (50, 100, 200, 400, 800)), (ax.yaxis, (25, 50, 100, 200, 400, 800, 1600))):
        axis.set_ticks(ticks)
        axis.set_major_formatter(FuncFormatter(plain))
        axis.set_minor_locator(NullLocator())
        axis.set_minor_formatter(NullFormatter())
    across = (60, 700)
    rates = bandwidths(record, n_threads, work["name"])
    if rates:
        limit = [1000 * median(rates) / megabytes for megabytes in across]
        ax.fill_between(
            across,
            [1000 * min(rates) / megabytes for megabytes in across],
            [1000 * max(rates) / megabytes for megabytes in across],
            color=theme.muted,
            alpha=0.15,
            linewidth=0,
        )
        ax.plot(across, limit, color=theme.muted, linewidth=1.2)
        ax.text(
            0.97,
            0.95,
            f"line: read bandwidth, {median(rates):.0f} GB/s",
            transform=ax.transAxes,
            ha="right",
            va="top",
            color=theme.muted,
            fontsize=8,
        )
    for _, row in rows:
        speeds = row["tokens_per_second"][work["name"]]
        megabytes = row["bytes_per_token"][work["name"]] / 1e6
        ax.plot(
            [megabytes] * 2,
            [min(speeds), max(speeds)],
            color=theme.colour(row["peer"]),
            linewidth=1,
            zorder=2,
        )
        ax.plot(megabytes, median(speeds), linestyle="none", **mark(row["peer"], row["variant"], theme))
    for dtype, title in DTYPES.items():
        at = [row["bytes_per_token"][work["name"]] / 1e6 for width, row in rows if width == dtype]
        if at:
            ax.text(
                median(at),
                0.02,
                title,
                transform=ax.get_xaxis_transform(),
                ha="center",
                color=theme.muted,
                fontsize=8,
            )


def batches(record: Record, theme: Theme) -> Figure | None:
    """One panel a width, at the largest number of threads."""
    works = [work for work in record["workloads"].values() if work["prompt"] == 32 and work["new"] > 1]
    works.sort(key=lambda work: work["batch"])
    n_threads = max((run["threads"] for run in record["runs"]), default=0)
    runs = runs_of(record, n_threads)
    if len(works) < 2 or not runs:
        return None
    size = (2.7 * len(runs) + 0.3, 3.6)
    figure, axes = plt.subplots(1, len(runs), figsize=size, squeeze=False, layout="constrained")
    for ax, run in zip(axes[0], runs, strict=True):
        draw_batches(ax, run, works, theme)
    axes[0][0].set_ylabel(f"tokens/s of all, {threads_text(n_threads)}")
    for ax in axes[0]:
        ax.set_xlabel("sequences together")
    legend(figure, record, theme)
    return figure


def draw_batches(ax: Axes, run: Record, works: list[Record], theme: Theme) -> None:
    ax.set_title(DTYPES[run["dtype"]])
    ax.set_xscale("log", base=2)
    sizes = [work["batch"] for work in works]
    ax.xaxis.set_ticks(sizes)
    ax.xaxis.set_major_formatter(FuncFormatter(plain))
    ax.xaxis.set_minor_locator(NullLocator())
    for row in run["peers"]:
        speeds = [row["tokens_per_second"].get(work["name"]) for work in works]
        done = [(size, found) for size, found in zip(sizes, speeds, strict=True) if found]
        at, values = [size for size, _ in done], [median(found) for _, found in done]
        ax.plot(
            at,
            values,
            linestyle="--" if is_second(row) else "-",
            linewidth=line_width(row["peer"]),
            **mark(row["peer"], row["variant"], theme),
        )
        for size, found in done:
            ax.plot([size] * 2, [min(found), max(found)], color=theme.colour(row["peer"]), linewidth=1)
    ax.set_ylim(bottom=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("record", metavar="RUN.json", type=Path)
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    parser.add_argument("--format", choices=("svg", "png"), default="svg")
    arguments = parser.parse_args()
    record = json.loads(arguments.record.read_text())
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for theme in THEMES:
        set_style(theme)
        for name, figure in (("roofline", roofline(record, theme)), ("batch", batches(record, theme))):
            if figure is not None:
                # A date would make each file another one.
                metadata = {"Date": None} if arguments.format == "svg" else None
                figure.savefig(
                    arguments.folder / f"{name}-{theme.name}.{arguments.format}", metadata=metadata, dpi=110
                )
                plt.close(figure)


if __name__ == "__main__":
    main()
