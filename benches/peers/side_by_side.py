"""All peers of one width, in turns: their texts checked, their work timed."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import machine
from check import Agreement, Reference, compare
from checkpoint import Shape
from environments import Environment
from peers import Peer
from processes import Worker, WorkerError, cold_start
from workloads import Workload


@dataclass
class Entry:
    """One form of one peer, and what it has shown.

    Lists have one value a repeat; `tokens_per_second` is by workload. `weight_bytes` are those that a decode
    step reads, `cache_bytes` those of a position.
    """

    peer: Peer
    variant: str
    environment: Environment
    model: Path
    weight_bytes: int = 0
    cache_bytes: float = 0.0
    agreement: Agreement | None = None
    tokens_per_second: dict[str, list[float]] = field(default_factory=dict)
    first_token_s: list[float] = field(default_factory=list)
    peak_memory_bytes: list[int] = field(default_factory=list)

    def afresh(self) -> "Entry":
        """The same form of the same peer, which has shown nothing yet."""
        return Entry(self.peer, self.variant, self.environment, self.model)

    @property
    def title(self) -> str:
        return f"{self.peer.title} {self.environment.version} {self.variant}"

    @property
    def multiplies(self) -> str:
        return self.peer.multiplies.get(self.variant, "float32")

    def bytes_per_token(self, workload: Workload) -> float:
        return workload.bytes_per_token(self.weight_bytes, self.cache_bytes)

    def figures(self, workloads: list[Workload]) -> dict[str, Any]:
        return {
            "peer": self.peer.name,
            "title": self.peer.title,
            "variant": self.variant,
            "version": self.environment.version,
            "multiplies": self.multiplies,
            "weight_bytes": self.weight_bytes,
            "cache_bytes": self.cache_bytes,
            "bytes_per_token": {w.name: self.bytes_per_token(w) for w in workloads if w.is_decode},
            "agreement": vars(self.agreement) if self.agreement else None,
            "tokens_per_second": self.tokens_per_second,
            "first_token_s": self.first_token_s,
            "peak_memory_bytes": self.peak_memory_bytes,
        }


@dataclass(frozen=True)
class Course:
    """What is run on every entry; `whole`: their texts are checked and they are started cold, too."""

    workloads: list[Workload]
    warm_up: list[Workload]
    repeat: int
    n_threads: int
    whole: bool
    shape: Shape
    gpt2rs_python: Path
    logs: Path


Probe = dict[str, float] | str


class SideBySide:
    """The entries of one width. An entry that fails leaves, its reason in `failed`; the others go on.

    `probes` has the machine's limits by workload, one a repeat, taken just before.
    """

    def __init__(self, entries: list[Entry], course: Course) -> None:
        self.entries = entries
        self.course = course
        self.failed: dict[str, str] = {}
        self.probes: dict[str, list[Probe]] = {workload.name: [] for workload in course.workloads}
        self.workers: dict[str, Worker] = {}

    def run(self, reference: Reference) -> None:
        def check(entry: Entry) -> None:
            self.check(entry, reference)

        try:
            self.step("loading", lambda: self.each(self.entries, self.start))
            if self.course.whole:
                self.step(
                    "texts", lambda: self.each(self.entries, lambda entry: self.check(entry, reference))
                )
            self.step("rounds", self.rounds)
        finally:
            for worker in self.workers.values():
                worker.close()
        if self.course.whole:
            self.step("cold starts", self.cold_starts)

    def step(self, name: str, act: Callable[[], None]) -> None:
        """Say how long it took, for those who wait."""
        start = time.monotonic()
        act()
        print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)

    def each(self, entries: list[Entry], act: Callable[[Entry], None]) -> None:
        """Do `act` with each entry in turn, and part with those that fail."""
        for entry in list(entries):
            try:
                act(entry)
            except WorkerError as why:
                self.failed[entry.title] = str(why)
                self.entries.remove(entry)

    def start(self, entry: Entry) -> None:
        worker = Worker(**self.process_of(entry))
        self.workers[entry.title] = worker
        sizes = worker.wait_until_ready()
        entry.weight_bytes, entry.cache_bytes = sizes["weight_bytes"], sizes["cache_bytes"]

    def process_of(self, entry: Entry) -> dict[str, Any]:
        return {
            "python": entry.environment.python,
            "module": entry.peer.name,
            "model": entry.model,
            "variant": entry.variant,
            "n_threads": self.course.n_threads,
            "log": self.course.logs / f"{entry.peer.name}-{entry.variant}-worker.log",
        }

    def check(self, entry: Entry, reference: Reference) -> None:
        entry.agreement = compare(self.workers[entry.title], reference, self.course.shape.n_vocab)

    def rounds(self) -> None:
        """A round that warms up and is not counted, then the repeats; who goes first changes with each."""
        for repeat in range(self.course.repeat + 1):
            for workload in self.course.workloads if repeat > 0 else self.course.warm_up:
                if repeat > 0:
                    limits = machine.READING if workload.is_decode else machine.ARITHMETIC
                    probe = machine.probe(self.course.gpt2rs_python, limits, self.course.n_threads)
                    self.probes[workload.name].append(probe)
                self.each(self.in_turn(repeat), lambda entry: self.time(entry, workload, repeat))  # noqa: B023

    def in_turn(self, repeat: int) -> list[Entry]:
        first = repeat % max(len(self.entries), 1)
        return self.entries[first:] + self.entries[:first]

    def time(self, entry: Entry, workload: Workload, repeat: int) -> None:
        answer = self.workers[entry.title].ask(workload.request(self.course.shape.n_vocab))
        if repeat > 0:
            speed = workload.tokens_per_second(answer["prefill_s"], answer["decode_s"])
            entry.tokens_per_second.setdefault(workload.name, []).append(speed)

    def cold_starts(self) -> None:
        """Also in turns; the workers have brought the files into the page cache."""
        for repeat in range(self.course.repeat):
            self.each(self.in_turn(repeat), self.cold_start)

    def cold_start(self, entry: Entry) -> None:
        seconds, peak = cold_start(**self.process_of(entry), n_vocab=self.course.shape.n_vocab)
        entry.first_token_s.append(seconds)
        entry.peak_memory_bytes.append(peak)
