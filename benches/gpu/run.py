"""gpt2rs on a GPU: whether it is right, then how fast it is, beside what the GPU can do and beside PyTorch.

One run does everything: correctness first (exit status 1 where a check fails, with nothing timed), then
times by the GPU's events, medians over rounds that take turns.  Tables in Markdown on standard output,
everything as JSON with --json.  Weights are random: no time depends on them.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import correctness
import report
import timing
from timing import Figure

import gpt2rs
from gpt2rs.cuda import compiler
from gpt2rs.cuda.driver import api, call
from gpt2rs.cuda.timing import copy_bandwidth

SIZES = {"124M": "gpt2", "355M": "gpt2-medium", "774M": "gpt2-large", "1558M": "gpt2-xl"}
TORCH_SIZES = ("124M", "1558M")
PARTS = ("correctness", "decode", "prefill", "launch", "start", "torch")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benches/gpu/run.py", description=__doc__)
    add = parser.add_argument
    add("--device", default="cuda", help="cuda or cuda:N (default: cuda)")
    add(
        "--sizes", type=some_of(tuple(SIZES)), default=tuple(SIZES), metavar="SIZE,...", help=", ".join(SIZES)
    )
    add("--batches", type=counts, default=(1, 8, 64), metavar="N,...", help="default: 1,8,64")
    add("--contexts", type=counts, default=(32, 896), metavar="N,...", help="default: 32,896")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    add("--precision", choices=("exact", "fast"), default="exact", help="of the activations (default: exact)")
    add(
        "--steps",
        type=count,
        default=64,
        metavar="N",
        help="of decoding in a round, a multiple of 8 (default: 64)",
    )
    add("--rounds", type=count, default=7, metavar="N", help="default: 7")
    add("--parts", type=some_of(PARTS), default=PARTS, metavar="PART,...", help=", ".join(PARTS))
    add("--json", type=Path, metavar="FILE", help="write all figures there")
    return parser.parse_args(arguments)


def some_of(known: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    """A parser of a list of names."""

    def parse_names(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(text.split(",")))
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return names

    return parse_names


def count(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def counts(text: str) -> tuple[int, ...]:
    """A list of them."""
    return tuple(dict.fromkeys(count(part) for part in text.split(",")))


_HELD = {True: "yes", False: "NO", None: "not run"}


class Run:
    """What was asked for, and what was found so far."""

    def __init__(self, options: argparse.Namespace, configs: dict[str, Any] | None = None) -> None:
        """configs: a model's config by the name of its size; the presets where it is not given."""
        self.options = options
        self.configs = configs or SIZES
        self.facts: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "options": _plain(options)}
        self.figures: list[Figure] = []
        self._bandwidths: list[float] = []

    def go(self) -> int:
        """All parts that were asked for; 1 where a check failed."""
        parts, first = self.options.parts, self.options.sizes[0]
        model = self.model(first)
        self._machine(timing.gpu_of(model))
        if "correctness" in parts and not self._correct(model):
            return self._end(1)
        if "launch" in parts:
            self._launch(timing.gpu_of(model))
        self._size(model, first)
        del model
        for size in self.options.sizes[1:]:
            self._size(self.model(size), size)
        self._print_figures()
        if "start" in parts:
            self._start()
        return self._end(0)

    def model(self, size: str) -> gpt2rs.GPT2:
        """Random weights of a size, on the GPU."""
        options = self.options
        return gpt2rs.GPT2.from_config(
            self.configs[size], dtype=options.dtype, precision=options.precision, device=options.device
        )

    def _size(self, model: gpt2rs.GPT2, size: str) -> None:
        """All times of one size."""
        gc.collect()
        parts = self.options.parts
        self._bandwidths.append(copy_bandwidth(timing.gpu_of(model)))
        if "decode" in parts:
            self._decode(model, size)
        if "prefill" in parts:
            self.figures.append(timing.prefill(model, size, 1024, self.options.rounds))
        if "torch" in parts and size in TORCH_SIZES:
            self._torch(model, size)
        self._write()

    def _machine(self, gpu: Any) -> None:
        driver = call(api().cuDriverGetVersion)
        self.facts["machine"] = {
            "gpu": gpu.name,
            "multiprocessors": gpu.n_sm,
            "architecture": gpu.arch,
            "driver": f"CUDA {driver // 1000}.{driver % 1000 // 10}",
            "compiler": f"NVRTC {compiler.version()}",
            "versions": {name: _version(name) for name in ("gpt2rs", "cuda-python", "torch", "transformers")},
        }
        print("# " + ", ".join(str(value) for value in list(self.facts["machine"].values())[:-1]))
        print(f"\n{self.facts['date']}; {self.options.dtype} weights, precision {self.options.precision}")

    def _correct(self, model: gpt2rs.GPT2) -> bool:
        device = model.device
        rows = correctness.checked(
            {
                "places in an MMA": partial(correctness.mma_invariance, device),
                "errors of an MMA": partial(correctness.mma_errors, device),
                "golden cases": partial(correctness.golden, device),
                "one answer": partial(correctness.batch_invariance, model, max(self.options.batches)),
                "memcheck": partial(correctness.sanitizer, "memcheck", device),
                "racecheck": partial(correctness.sanitizer, "racecheck", device),
            }
        )
        self.facts["correctness"] = [{"check": name, "held": held, "says": says} for name, held, says in rows]
        print("\n## Correctness\n")
        print(report.table(("check", "", ""), [(name, _HELD[held], says) for name, held, says in rows]))
        return all(held is not False for _, held, _ in rows)

    def _launch(self, gpu: Any) -> None:
        times = timing.graph_launch(gpu, self.options.rounds)
        self.facts["graph_launch"] = times
        rows = [(where, report.spread(seconds, 2, 1e-6)) for where, seconds in times.items()]
        print("\n## A graph of one empty kernel\n")
        print(report.table(("time per launch", "us"), rows))

    def _decode(self, model: gpt2rs.GPT2, size: str) -> None:
        gpu, options = timing.gpu_of(model), self.options
        runs = [
            timing.Decoding(model, size, context, batch, options.steps)
            for context in options.contexts
            for batch in options.batches
        ]
        timing.in_turns([run.round for run in runs], options.rounds)
        self.figures += [run.figure() for run in runs]
        # What it brings that a kernel may begin before the one ahead of it has ended.
        gpu.overlap, before = False, gpu.overlap
        try:
            # Graphs that were recorded with it are recorded anew.
            model._core._steps.clear()  # type: ignore[attr-defined]
            apart = timing.Decoding(model, f"{size}, launches apart", options.contexts[0], 1, options.steps)
            timing.in_turns([apart.round], options.rounds)
            self.figures.append(apart.figure())
        finally:
            gpu.overlap = before
            model._core._steps.clear()  # type: ignore[attr-defined]

    def _torch(self, model: gpt2rs.GPT2, size: str) -> None:
        try:
            self._beside_torch(model, size)
        except Exception as error:
            # Whatever fails over there, what was measured here is kept.
            said = f"{type(error).__name__}: {error}"
            self.facts.setdefault("torch_failed", {})[size] = said
            print(f"\nPyTorch, {size}: not run, or not to its end: {said}")

    def _beside_torch(self, model: gpt2rs.GPT2, size: str) -> None:
        import pytorch
        import torch

        options, config = self.options, model.config
        dtype = getattr(torch, options.dtype)
        shape = {name: getattr(config, name) for name in ("n_vocab", "n_ctx", "n_embd", "n_layer", "n_head")}
        device = options.device if torch.cuda.is_available() else "cpu"
        theirs = pytorch.transformers_model(shape, device, dtype)
        static = pytorch.from_transformers(theirs)
        rows = []
        for context in options.contexts:
            for batch in options.batches:
                ours = timing.Decoding(model, size, context, batch, options.steps)
                row = [f"{size}, context {context}, batch {batch}"]
                cells = []
                for engine in (pytorch.Eager(theirs), pytorch.Compiled(static, batch)):
                    ours.seconds.clear()
                    torch.compiler.reset()
                    peer = pytorch.Decoding(engine, config.n_vocab, context, batch, options.steps)
                    timing.in_turns([ours.round, peer.round], options.rounds)
                    self.facts.setdefault("torch", []).append(
                        {
                            "model": size,
                            "context": context,
                            "batch": batch,
                            "peer": engine.name,
                            "ours": list(ours.seconds),
                            "theirs": list(peer.seconds),
                        }
                    )
                    cells += [report.spread(peer.seconds, 0, 1e-6), report.ratio(peer.seconds, ours.seconds)]
                rows.append([*row, report.spread(ours.seconds, 0, 1e-6), *cells])
        del theirs, static
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        head = ("us a step", "gpt2rs", "transformers", "ratio", "torch.compile", "ratio")
        print(f"\n## Beside PyTorch {torch.__version__}, {size}\n")
        print(report.table(head, rows))

    def _print_figures(self) -> None:
        bandwidth = max(self._bandwidths)
        self.facts["copy_bandwidth"] = self._bandwidths
        print(
            f"\nCopies within the GPU's memory: {report.spread(self._bandwidths, 0)} GB/s, read and written."
        )
        decode = [figure for figure in self.figures if figure.work == "decode"]
        if decode:
            print("\n## Decoding\n")
            head = ("model", "context", "batch", "us a step", "us a token", "of the copy bandwidth")
            print(
                report.table(
                    head,
                    [
                        (
                            figure.model,
                            str(figure.context),
                            str(figure.batch),
                            report.spread(figure.seconds, 1, 1e-6),
                            f"{figure.microseconds / figure.batch:.1f}",
                            f"{100 * figure.share(bandwidth):.0f} %",
                        )
                        for figure in decode
                    ],
                )
            )
        prompts = [figure for figure in self.figures if figure.work == "prefill"]
        if prompts:
            print("\n## Prompts\n")
            rows = [
                (
                    figure.model,
                    str(figure.context),
                    report.spread(figure.seconds, 2, 1e-3),
                    f"{figure.context / figure.microseconds * 1e6:.0f}",
                    f"{figure.n_flops / figure.microseconds / 1e6:.1f}",
                )
                for figure in prompts
            ]
            print(report.table(("model", "tokens", "ms", "tokens/s", "TFLOP/s"), rows))

    def _start(self) -> None:
        first = self.configs[self.options.sizes[0]]
        starts = timing.cold_start(self.options.device, min(5, self.options.rounds), first)
        self.facts["start"] = starts
        rows = [(name, report.spread([start[name] for start in starts], 2)) for name in starts[0]]
        print(f"\n## A new process, to the first token ({self.options.sizes[0]}, kernels in the cache)\n")
        print(report.table(("part", "s"), rows))

    def _end(self, status: int) -> int:
        self._write()
        return status

    def _write(self) -> None:
        self.facts["figures"] = [figure.facts() for figure in self.figures]
        if self.options.json is not None:
            self.options.json.write_text(json.dumps(self.facts, indent=2) + "\n", encoding="utf-8")


def _plain(options: argparse.Namespace) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(Run(parse()).go())
