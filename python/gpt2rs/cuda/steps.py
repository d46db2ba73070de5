"""Decoding: one CUDA graph a token, run several times without the host.

Tokens, positions and settings of a batch are in device memory; the last kernel of a step puts the chosen
tokens in for the next one, and into a mailbox in the host's memory.  Several steps are queued at a time,
and what they gave is handed out call by call; it is dropped when a sequence is changed meanwhile.  Steps
beyond what is asked for write only to positions that nobody has read.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .. import _core
from .kv_cache import Pool
from .machine import Buffer, Graph, Machine
from .plan import Plan, Room, Sampling
from .sampling import SETTINGS, penalises, settings
from .session import CudaSession
from .weights import Shape, Weights

# Sequences of one graph at most.
MAX_BATCH = 64
# Steps that are queued at a time at most: they double from one on, since a text may end at any token.
MAX_STEPS = 8


class Ahead:
    """Tokens that were computed and not yet asked for, of one batch."""

    def __init__(self, sessions: Sequence[CudaSession], samplers: Sequence[_core.Sampler]) -> None:
        """Nothing yet."""
        # Sequences that nobody else holds are not to be kept for this.
        self._sessions = [weakref.ref(session) for session in sessions]
        self._samplers = list(samplers)
        self._versions = [session.version for session in sessions]
        self._lengths = [session.pos for session in sessions]
        self.rows: deque[list[int]] = deque()
        self.n_steps = 1

    def is_of(self, sessions: Sequence[CudaSession], samplers: Sequence[_core.Sampler]) -> bool:
        """Whether it goes on where these sessions, with these samplers, are."""
        return (
            len(sessions) == len(self._sessions)
            and all(a is b() for a, b in zip(sessions, self._sessions, strict=True))
            and all(a is b for a, b in zip(samplers, self._samplers, strict=True))
            and [session.version for session in sessions] == self._versions
            and [session.pos for session in sessions] == self._lengths
        )

    def next(self) -> list[int]:
        """The next token of each session."""
        self._lengths = [length + 1 for length in self._lengths]
        return self.rows.popleft()


class Steps:
    """The rows of up to `bucket` sequences on the device, and the graph that takes them one token further."""

    def __init__(self, machine: Machine, shape: Shape, weights: Weights, pool: Pool, bucket: int) -> None:
        """Take the memory; graphs are recorded on first use."""
        config = shape.config
        self._machine, self._pool, self._bucket = machine, pool, bucket
        self._n_ctx, self._n_vocab, self._stride = config.n_ctx, config.n_vocab, shape.vocab
        self._room = room = Room(machine, shape, bucket, n_sequences=bucket, n_logits=bucket)
        self._plan = Plan(shape, weights, room)
        self._mailbox = machine.mailbox(4 * MAX_STEPS * bucket)
        self._sampling = Sampling(
            settings=machine.alloc(SETTINGS.itemsize * bucket),
            history=machine.alloc(4 * bucket * config.n_ctx),
            steps=machine.alloc(4 * bucket),
            mailbox=self._mailbox,
            n_slots=MAX_STEPS,
        )
        self._upload(room.sequences, range(bucket))
        self._upload(room.first_rows, range(bucket))
        self._upload(room.counts, [1] * bucket)
        self._tables = np.zeros((bucket, room.n_blocks), np.uint64)
        self._done = 0
        self._graphs: dict[str, Graph] = {}

    def logits(self, sessions: Sequence[CudaSession]) -> NDArray[np.float32]:
        """(sessions, V): compute each session's last token."""
        self._reserve(sessions, 1)
        self._set(sessions)
        self._graph("logits").launch()
        rows = np.empty((len(sessions), self._stride), np.float32)
        self._machine.download(self._room.logits, rows)
        for session in sessions:
            session.computed = session.pos
        return rows[:, : self._n_vocab]

    def advance(
        self, sessions: Sequence[CudaSession], samplers: Sequence[_core.Sampler], ahead: Ahead | None
    ) -> Ahead:
        """The next tokens of these sessions, of which all but the last are computed: those left in `ahead`,
        or of further steps.  ahead: None where the device's rows are not theirs."""
        if ahead is not None and ahead.rows:
            return ahead
        n_steps = 1 if ahead is None else min(2 * ahead.n_steps, MAX_STEPS)
        n_steps = min(n_steps, self._n_ctx - max(session.pos for session in sessions))
        self._reserve(sessions, n_steps, keep_tables=ahead is not None)
        if ahead is None:
            ahead = Ahead(sessions, samplers)
            self._set(sessions)
            self._machine.upload(self._sampling.settings, settings(list(samplers), self._bucket))
            self._upload(self._sampling.steps, [0] * self._bucket)
            self._done = 0
            for row, (session, sampler) in enumerate(zip(sessions, samplers, strict=True)):
                if penalises(sampler):
                    self._upload(self._sampling.history, session.all_tokens, 4 * row * self._n_ctx)
        ahead.n_steps = n_steps
        graph = self._graph("tokens")
        for _ in range(n_steps):
            graph.launch()
        self._machine.synchronize()
        slots = self._mailbox.host.view(np.int32).reshape(MAX_STEPS, self._bucket)
        for step in range(self._done, self._done + n_steps):
            ahead.rows.append(slots[step % MAX_STEPS, : len(sessions)].tolist())
        self._done += n_steps
        return ahead

    def _set(self, sessions: Sequence[CudaSession]) -> None:
        """Put each session's last token into its row; rows beyond are idle."""
        idle = self._bucket - len(sessions)
        self._upload(self._room.tokens, [session.all_tokens[-1] for session in sessions] + [0] * idle)
        self._upload(self._room.positions, [session.pos - 1 for session in sessions] + [-1] * idle)

    def _reserve(self, sessions: Sequence[CudaSession], n_steps: int, *, keep_tables: bool = False) -> None:
        """Room in the caches for so many positions more, from each session's last on."""
        self._pool.reserve(
            (session.cache, session.pos - 1, session.pos - 1 + n_steps) for session in sessions
        )
        before = self._tables.copy()
        for row, session in enumerate(sessions):
            addresses = session.cache.addresses
            self._tables[row, : len(addresses)] = addresses
        if not keep_tables or not np.array_equal(before, self._tables):
            self._machine.upload(self._room.tables, self._tables)

    def _graph(self, what: str) -> Graph:
        if what not in self._graphs:
            launches = self._plan.step(self._bucket)
            if what == "tokens":
                launches.append(self._plan.sample(self._bucket, self._sampling))
            self._graphs[what] = self._machine.graph(launches)
        return self._graphs[what]

    def _upload(self, buffer: Buffer, values: Sequence[int], offset: int = 0) -> None:
        self._machine.upload(buffer, np.array(values, np.int32), offset)
