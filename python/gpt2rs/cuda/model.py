"""GPT-2 on a GPU: what `_core.Model` is on the CPU, over a machine that runs the kernels.

The logits of a token sequence are the same bits alone and in any batch, whole or in pieces: every kernel
computes a row by one plan, which depends on the matrices and the row's position alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .. import _core
from .kv_cache import KvCache, Pool
from .machine import Machine
from .plan import LOGIT_ROWS, MAX_ROWS, Plan, Room, Stream
from .sampling import on_device
from .session import CudaSession
from .sizes import Attention
from .steps import MAX_BATCH, Ahead, Steps
from .weights import Shape, Tensors, load, padded

_EMPTY = "the sequence is empty: there is nothing to continue (a text can start with the end-of-text token)"


class CudaModel:
    """Weights in a GPU's memory, and the launches that compute with them.

    Several threads may use it; they take turns.
    """

    def __init__(
        self,
        machine: Machine,
        config: _core.Config,
        tensors: Tensors,
        on_cpu: Callable[[], _core.Model],
        *,
        dtype: str,
        kv_dtype: str | None = None,
        precision: str = "exact",
    ) -> None:
        """Upload the weights; ValueError for types that a GPU does not hold, and for missing tensors.

        dtype: "float32" or "bfloat16".  kv_dtype: the same; None: that of the weights.  precision: "exact":
        activations meet bfloat16 weights as float32, in three parts; "fast": rounded to bfloat16.  on_cpu:
        makes the same model on the CPU, for saving.
        """
        for name, value in (("dtype", dtype), ("kv_dtype", kv_dtype or dtype)):
            if value not in ("float32", "bfloat16"):
                raise ValueError(f'{name} is {value!r}; on a GPU it must be "float32" or "bfloat16"')
        if precision not in ("exact", "fast"):
            raise ValueError(f'precision is {precision!r}; it must be "exact" or "fast"')
        if precision == "fast" and dtype != "bfloat16":
            raise ValueError(f'precision "fast" is for bfloat16 weights; dtype is {dtype!r}')
        self.lock = threading.RLock()
        self._machine, self._config, self._on_cpu = machine, config, on_cpu
        self._dtype, self._kv_dtype, self._precision = dtype, kv_dtype or dtype, precision
        parts = 0 if dtype == "float32" else 3 if precision == "exact" else 1
        self._shape = Shape(config, parts, self._kv_dtype == "float32")
        self._weights = load(machine, self._shape, tensors)
        self._pool = Pool(machine, self._shape)
        self._prompts: tuple[Room, Plan] | None = None
        self._steps: dict[int, Steps] = {}
        self._ahead: Ahead | None = None

    @classmethod
    def load(
        cls,
        machine: Machine,
        config: _core.Config,
        checkpoint: _core.Checkpoint,
        *,
        dtype: str,
        kv_dtype: str | None = None,
        precision: str = "exact",
    ) -> CudaModel:
        """A model with a checkpoint's weights."""
        if checkpoint.packed() is not None:
            raise ValueError(
                "a packed file holds weights as the CPU's kernels take them; a GPU needs the checkpoint "
                "that it was made from"
            )

        def on_cpu() -> _core.Model:
            return _core.Model.load(config, checkpoint, dtype=dtype)

        tensors = _core.Tensors.of(config, checkpoint)
        return cls(machine, config, tensors, on_cpu, dtype=dtype, kv_dtype=kv_dtype, precision=precision)

    @classmethod
    def random(
        cls,
        machine: Machine,
        config: _core.Config,
        *,
        seed: int,
        dtype: str,
        kv_dtype: str | None = None,
        precision: str = "exact",
    ) -> CudaModel:
        """A model with random weights, those of the CPU's model for the same seed."""

        def on_cpu() -> _core.Model:
            return _core.Model.random(config, seed=seed, dtype=dtype)

        tensors = _core.Tensors.random(config, seed)
        return cls(machine, config, tensors, on_cpu, dtype=dtype, kv_dtype=kv_dtype, precision=precision)

    @property
    def config(self) -> _core.Config:
        """The model's shape."""
        return self._config

    @property
    def dtype(self) -> str:
        """How weights are held."""
        return self._dtype

    @property
    def kv_dtype(self) -> str:
        """How keys and values are held."""
        return self._kv_dtype

    @property
    def precision(self) -> str:
        """How exactly activations enter products."""
        return self._precision

    @property
    def device(self) -> str:
        """Where it runs: "cuda:N"."""
        return self._machine.device

    @property
    def max_batch(self) -> int:
        """Sequences that are worth decoding together: those of one graph."""
        return MAX_BATCH

    @property
    def isa(self) -> str:
        """The GPU's architecture, such as "sm_90"."""
        return self._machine.arch

    @property
    def n_threads(self) -> int:
        """Threads of the CPU that compute: the one that calls, which launches."""
        return 1

    @property
    def machine(self) -> Machine:
        """What it runs on."""
        return self._machine

    def memory_footprint(self) -> int:
        """Bytes of the weights as held, padding included."""
        return self._weights.n_bytes

    def session(self) -> CudaSession:
        """An empty sequence."""
        return CudaSession(self, KvCache(self._pool))

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """(T, V) float32 of every token of a sequence."""
        return np.concatenate(list(self._logit_rows(tokens)))

    def hidden_states(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """(T, C) float32 after ln_f."""
        k, c = self._shape.k, self._config.n_embd
        parts = []
        with self.lock:
            for room, plan, stream, first, count in self._slices(tokens):
                rows = np.empty((count, k), np.float32)
                self._machine.launch(plan.hidden(stream, first, count))
                self._machine.download(room.hidden, rows)
                parts.append(rows[:, :c])
        return np.concatenate(parts)

    def score(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """(T - 1,) float32: ln p of each token but the first."""
        scores: list[float] = []
        for rows in self._logit_rows(tokens):
            targets = tokens[len(scores) + 1 : len(scores) + 1 + len(rows)]
            scores += [_core.log_softmax_at(row, token) for row, token in zip(rows, targets, strict=False)]
        return np.array(scores, np.float32)

    def prefill(self, sessions: Sequence[CudaSession], prompts: Sequence[Sequence[int]]) -> None:
        """Append to each session its prompt; after an error the sessions are as before."""
        self._check(sessions, len(prompts))
        with self.lock:
            before = [session.pos for session in sessions]
            try:
                for session, prompt in zip(sessions, prompts, strict=True):
                    session.push(prompt)
                self._compute(sessions)
            except BaseException:
                for session, n in zip(sessions, before, strict=True):
                    session.truncate(n)
                raise

    def decode(
        self, sessions: Sequence[CudaSession], samplers: Sequence[_core.Sampler]
    ) -> list[_core.Sample]:
        """Choose the next token of each session, and append it."""
        self._check(sessions, len(samplers))
        n_ctx = self._config.n_ctx
        for session in sessions:
            if session.pos >= n_ctx:
                raise ValueError(
                    f"{session.pos + 1} tokens do not fit: the model has {n_ctx} positions (n_ctx)"
                )
        with self.lock:
            samples: list[_core.Sample] = []
            on_gpu: list[bool] = []
            for first in range(0, len(sessions), MAX_BATCH):
                part = slice(first, first + MAX_BATCH)
                chosen, where = self._choose(sessions[part], samplers[part])
                samples += chosen
                on_gpu += [where] * len(chosen)
            # Only now, so that an error leaves all sessions as they were.
            for session, sample, where in zip(sessions, samples, on_gpu, strict=True):
                if where:
                    session.advance(sample.token)
                else:
                    session.push([sample.token])
            return samples

    def decode_several(
        self,
        sessions: Sequence[CudaSession],
        samplers: Sequence[_core.Sampler],
        speculators: Sequence[object],
        rooms: Sequence[int],
    ) -> list[tuple[list[_core.Sample], int, int]]:
        """One token for each session, as `decode`: on a GPU nothing is proposed, which changes no token."""
        for count in (len(speculators), len(rooms)):
            self._check(sessions, count)
        return [([sample], 0, 0) for sample in self.decode(sessions, samplers)]

    def last_logits(self, sessions: Sequence[CudaSession]) -> NDArray[np.float32]:
        """(sessions, V) float32: of each session's last token."""
        with self.lock:
            self._ahead = None
            self._compute(sessions)
            rows = [
                self._steps_for(len(part)).logits(part)
                for part in (sessions[i : i + MAX_BATCH] for i in range(0, len(sessions), MAX_BATCH))
            ]
            return np.concatenate(rows)

    def save_safetensors(self, path: str | Path) -> None:
        """Write the weights as they are held, under the checkpoint's names."""
        self._on_cpu().save_safetensors(str(path))

    def save_packed(self, path: str | Path) -> None:
        """Write the weights as the CPU's kernels take them."""
        self._on_cpu().save_packed(str(path))

    def _choose(
        self, sessions: Sequence[CudaSession], samplers: Sequence[_core.Sampler]
    ) -> tuple[list[_core.Sample], bool]:
        """The next tokens of at most `MAX_BATCH` sessions, and whether the GPU chose them."""
        if all(on_device(sampler, s.pos) for s, sampler in zip(sessions, samplers, strict=True)):
            ahead = self._ahead
            if ahead is None or not ahead.is_of(sessions, samplers):
                ahead = self._ahead = None
                self._compute(sessions)
            # Whatever ends it halfway, the device may be further than this says.
            self._ahead = None
            self._ahead = ahead = self._steps_for(len(sessions)).advance(sessions, samplers, ahead)
            tokens = ahead.next()
            if min(tokens) >= 0:
                return [_core.Sample(token) for token in tokens], True
            # A row without a finite score: the CPU's sampler says so in its own words.
        rows = self.last_logits(sessions)
        return [
            sampler.choose(row, session.tokens)
            for session, sampler, row in zip(sessions, samplers, rows, strict=True)
        ], False

    def _steps_for(self, n: int) -> Steps:
        """The steps of a batch of n, by the next power of two."""
        bucket = 1 << (n - 1).bit_length()
        if bucket not in self._steps:
            self._steps[bucket] = Steps(self._machine, self._shape, self._weights, self._pool, bucket)
        return self._steps[bucket]

    def _compute(self, sessions: Sequence[CudaSession]) -> None:
        """Compute all tokens but the last of each session, in passes of at most `MAX_ROWS`."""
        room, plan = self._prompt_room()
        runs: list[tuple[CudaSession, int]] = []
        left = room.n_rows
        for session in sessions:
            if not session.all_tokens:
                raise ValueError(_EMPTY)
            session.computed = min(session.computed, session.pos - 1)
            start = session.computed
            while start < session.pos - 1:
                count = min(session.pos - 1 - start, left)
                runs.append((session, count))
                start += count
                left -= count
                if left == 0 or len(runs) == MAX_BATCH:
                    self._pass(room, plan, runs)
                    runs, left = [], room.n_rows
        if runs:
            self._pass(room, plan, runs)

    def _pass(self, room: Room, plan: Plan, runs: Sequence[tuple[CudaSession, int]]) -> Stream:
        """Compute the next `count` tokens of each session; each comes once."""
        rows: list[tuple[int, int, int]] = []
        tiles: list[tuple[int, int]] = []
        self._pool.reserve(
            (session.cache, session.computed, session.computed + count) for session, count in runs
        )
        tables = np.zeros((len(runs), room.n_blocks), np.uint64)
        for i, (session, count) in enumerate(runs):
            start = session.computed
            addresses = session.cache.addresses
            tables[i, : len(addresses)] = addresses
            tiles += [
                (len(rows) + at, min(Attention.QUERIES, count - at))
                for at in range(0, count, Attention.QUERIES)
            ]
            rows += [(session.all_tokens[at], at, i) for at in range(start, start + count)]
        columns = zip(*rows, strict=True), zip(*tiles, strict=True)
        buffers = (room.tokens, room.positions, room.sequences), (room.first_rows, room.counts)
        for group, arrays in zip(buffers, columns, strict=True):
            for buffer, values in zip(group, arrays, strict=True):
                self._machine.upload(buffer, np.array(values, np.int32))
        self._machine.upload(room.tables, tables)
        launches, stream = plan.layers(len(rows), len(tiles), prompt=True)
        for launch in launches:
            self._machine.launch(launch)
        for session, count in runs:
            session.computed += count
        return stream

    def _slices(self, tokens: Sequence[int]) -> Iterator[tuple[Room, Plan, Stream, int, int]]:
        """Run a fresh sequence in passes; of each, slices of at most `LOGIT_ROWS` rows, as (first, count)."""
        session = self.session()
        session.push(tokens)
        if not tokens:
            raise ValueError(_EMPTY)
        room, plan = self._prompt_room()
        for start in range(0, len(tokens), room.n_rows):
            count = min(len(tokens) - start, room.n_rows)
            stream = self._pass(room, plan, [(session, count)])
            for first in range(0, count, LOGIT_ROWS):
                yield room, plan, stream, first, min(LOGIT_ROWS, count - first)

    def _logit_rows(self, tokens: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        with self.lock:
            for room, plan, stream, first, count in self._slices(tokens):
                rows = np.empty((count, self._shape.vocab), np.float32)
                for launch in plan.logits(stream, first, count):
                    self._machine.launch(launch)
                self._machine.download(room.logits, rows)
                yield rows[:, : self._config.n_vocab]

    def _prompt_room(self) -> tuple[Room, Plan]:
        if self._prompts is None:
            room = Room(
                self._machine,
                self._shape,
                min(MAX_ROWS, padded(self._config.n_ctx, LOGIT_ROWS)),
                n_sequences=MAX_BATCH,
                n_logits=LOGIT_ROWS,
            )
            self._prompts = room, Plan(self._shape, self._weights, room)
        return self._prompts

    def _check(self, sessions: Sequence[CudaSession], others: int) -> None:
        if len(sessions) != others:
            raise ValueError(f"{len(sessions)} sessions do not go with {others} others")
        if any(session.model is not self for session in sessions):
            raise ValueError("the sessions of a batch must belong to one model")
        if len({id(session) for session in sessions}) < len(sessions):
            raise ValueError("a session comes twice in one batch")
