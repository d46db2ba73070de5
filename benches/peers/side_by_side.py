"""All peers of one width, in turns: their texts checked, their work timed."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import machine
from check import Agreement, Reference, compare
from environments import Environment
from peers import Peer
from processes import Worker, WorkerError, cold_start
from workloads import Workload


@dataclass
class Entry:
    """One form of one peer, and what it has shown.

    Lists have one value a repeat; `tokens_per_second` is by workload.
    """

    peer: Peer
    variant: str
    environment: Environment
    model: Path
    agreement: Agreement | None = None
    tokens_per_second: dict[str, list[float]] = field(default_factory=dict)
    first_token_s: list[float] = field(default_factory=list)
    peak_memory_bytes: list[int] = field(default_factory=list)

    @property
    def title(self) -> str:
        return f"{self.peer.title} {self.environment.version} {self.variant}"

    def figures(self) -> dict[str, Any]:
        return {
            "peer": self.peer.name,
            "variant": self.variant,
            "version": self.environment.version,
            "agreement": vars(self.agreement) if self.agreement else None,
            "tokens_per_second": self.tokens_per_second,
            "first_token_s": self.first_token_s,
            "peak_memory_bytes": self.peak_memory_bytes,
        }


@dataclass(frozen=True)
class Course:
    """What is run on every entry."""

    workloads: list[Workload]
    repeat: int
    n_threads: int
    n_vocab: int
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
        try:
            self.each(self.entries, self.start)
            self.each(self.entries, lambda entry: self.check(entry, reference))
            self.rounds()
        finally:
            for worker in self.workers.values():
                worker.close()
        self.cold_starts()

    def each(self, entries: list[Entry], act: Any) -> None:
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
        worker.wait_until_ready()

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
        entry.agreement = compare(self.workers[entry.title], reference, self.course.n_vocab)

    def rounds(self) -> None:
        """A round that warms up and is not counted, then the repeats; who goes first changes with each."""
        for repeat in range(self.course.repeat + 1):
            for workload in self.course.workloads:
                if repeat > 0:
                    probe = machine.probe(self.course.gpt2rs_python, self.course.n_threads)
                    self.probes[workload.name].append(probe)
                self.each(self.in_turn(repeat), lambda entry: self.time(entry, workload, repeat))  # noqa: B023

    def in_turn(self, repeat: int) -> list[Entry]:
        first = repeat % max(len(self.entries), 1)
        return self.entries[first:] + self.entries[:first]

    def time(self, entry: Entry, workload: Workload, repeat: int) -> None:
        answer = self.workers[entry.title].ask(workload.prompts(self.course.n_vocab), workload.new)
        if repeat > 0:
            speed = workload.tokens_per_second(answer["prefill_s"], answer["decode_s"])
            entry.tokens_per_second.setdefault(workload.name, []).append(speed)

    def cold_starts(self) -> None:
        """Also in turns; the first of each only brings its files into the page cache."""
        for repeat in range(self.course.repeat + 1):
            self.each(self.in_turn(repeat), lambda entry: self.cold_start(entry, repeat))  # noqa: B023

    def cold_start(self, entry: Entry, repeat: int) -> None:
        seconds, peak = cold_start(**self.process_of(entry), n_vocab=self.course.n_vocab)
        if repeat > 0:
            entry.first_token_s.append(seconds)
            entry.peak_memory_bytes.append(peak)
