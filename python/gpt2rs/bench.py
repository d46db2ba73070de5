"""How fast a whole model runs, beside what limits it on this machine.

Decoding streams every weight from memory once for each step, so it is held against the read bandwidth;
prefill is arithmetic, held against the fused multiply-adds a second of this machine. Both limits are probed
between the measurements, since those of a shared machine change from one second to the next: a share is a
figure over the mean of the probes just before and just after it; medians are taken over the rounds.  On a GPU
the limit of decoding is the bandwidth of a copy, and that of prefill is not probed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from . import _core
from .engine import Sequenced
from .gpt2 import GPT2
from .settings import Settings

if TYPE_CHECKING:
    from .cuda.gpu import Gpu

BATCH = 8
COUNTING = (
    "bytes of a decode step: all parameters but position embeddings (and token embeddings, if untied) "
    "in the weights' type, once, and keys and values of the positions so far in theirs, for each sequence; "
    "flops of a prefill: 2 for each multiply-add of the blocks' matrices, of causal attention (q k and p v "
    "over the positions up to each), and of the LM head for one row"
)

# Of a weight, its share of the scales included; and of a key or value, without.
_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 8.5 / 8, "int4": 4.5 / 8}
_KV_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
_SCALE_BYTES = 4


class Work(NamedTuple):
    """Sizes of what is measured, in tokens; cut down where a model's context is short."""

    short: int
    long: int
    n_short: int
    n_long: int
    n_batch: int
    prefill: int

    @staticmethod
    def of(n_ctx: int, *, quick: bool) -> Work:
        """Prompts of 32, 512 and 896 tokens for GPT-2's 1024 positions, and in proportion for fewer."""
        if n_ctx < 16:
            raise ValueError(f"the model has {n_ctx} positions (n_ctx); a bench needs at least 16")
        short = min(32, n_ctx // 4)
        long = min(896, n_ctx * 7 // 8)
        # One token of room: the first one chosen belongs to the prompt's computation.
        new = 32 if quick else 128
        return Work(
            short=short,
            long=long,
            n_short=min(new, n_ctx - short - 1),
            n_long=min(new // 2, n_ctx - long - 1),
            n_batch=min(new // 2, n_ctx - short - 1),
            prefill=min(512, n_ctx),
        )


@dataclass
class Figure:
    """One kind of work measured over the rounds.

    unit: what `rates` count, "GB/s" or "GFLOP/s".  shares: rates over the probes beside them, 1 at the limit;
    empty where there are none.
    """

    dtype: str
    n_threads: int
    work: str
    unit: str
    tokens_per_second: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)


@dataclass
class Probe:
    """One limit of the machine, probed over the rounds."""

    name: str
    n_threads: int
    unit: str
    rates: list[float] = field(default_factory=list)


@dataclass
class Report:
    """All that one bench gave; machine is a GPU's name, and empty for the CPU."""

    isa: str
    device: str = "cpu"
    machine: str = ""
    figures: list[Figure] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)


class Spread(NamedTuple):
    """A median with its minimum and maximum."""

    median: float
    min: float
    max: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """The spread of one value or more."""
        return Spread(statistics.median(values), min(values), max(values))


def decode_bytes(
    config: _core.Config, dtype: str, kv_dtype: str, context: float, n_sequences: int = 1
) -> float:
    """Bytes that one decode step has to read, as `COUNTING` says; context: positions attended to."""
    embeddings = config.n_ctx * config.n_embd
    if not config.tie_word_embeddings:
        embeddings += config.n_vocab * config.n_embd
    weights = (config.num_parameters() - embeddings) * _BYTES[dtype]
    vector = config.head_size * _KV_BYTES[kv_dtype] + (_SCALE_BYTES if kv_dtype == "int8" else 0)
    cache = 2 * config.n_layer * config.n_head * context * vector
    return weights + n_sequences * cache


def prefill_flops(config: _core.Config, n_tokens: int) -> int:
    """Floating-point operations of a prompt's forward pass, as `COUNTING` says."""
    matrices = 4 * config.n_embd**2 + 2 * config.n_embd * config.n_inner
    attention = config.n_embd * n_tokens * (n_tokens + 1)
    blocks = config.n_layer * (n_tokens * matrices + attention)
    return 2 * (blocks + config.n_vocab * config.n_embd)


def measure(
    load: Callable[[str, int | None], GPT2],
    dtypes: Sequence[str],
    threads: Sequence[int | None],
    *,
    quick: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """Measure every dtype with every number of threads.

    load: (dtype, n_threads) -> the model; its weights may be random, since no time depends on them.  The
        dtypes of one number of threads are loaded together and measured in turn.
    threads: None for the model's own choice.
    """
    report = Report(isa="")
    for n_threads in threads:
        benches = []
        for dtype in dtypes:
            progress(f"loading in {dtype}")
            benches.append(_Bench(load(dtype, n_threads), quick=quick))
        model = benches[0].model
        report.isa, report.device = model.isa, model.device
        limits = _CpuLimits(model) if model.device == "cpu" else _GpuLimits(model)
        report.machine = limits.machine
        rounds = 3 if quick else 7
        for i in range(rounds):
            for bench in benches:
                progress(f"{bench.model.dtype}, {bench.model.n_threads} threads, round {i + 1} of {rounds}")
                bench.round(limits)
        report.figures += [figure for bench in benches for figure in bench.figures]
        report.probes += limits.probes
    return report


class _CpuLimits:
    """What the processor can do with so many threads."""

    machine = ""

    def __init__(self, model: GPT2) -> None:
        self._bandwidth = Probe("read bandwidth", model.n_threads, "GB/s")
        self._arithmetic = Probe("fused multiply-adds", model.n_threads, "GFLOP/s")
        self.probes = [self._bandwidth, self._arithmetic]

    def bandwidth(self) -> float:
        """GB/s, probed now."""
        self._bandwidth.rates.append(_core.probe_bandwidth(self._bandwidth.n_threads))
        return self._bandwidth.rates[-1]

    def arithmetic(self) -> float:
        """GFLOP/s, probed now."""
        self._arithmetic.rates.append(_core.probe_fma(self._arithmetic.n_threads))
        return self._arithmetic.rates[-1]


class _GpuLimits:
    """What the GPU that a model is on can do."""

    def __init__(self, model: GPT2) -> None:
        self._gpu: Gpu = model._core.machine  # type: ignore[attr-defined]
        self.machine = self._gpu.name
        self._bandwidth = Probe("copy bandwidth", model.n_threads, "GB/s")
        self.probes = [self._bandwidth]

    def bandwidth(self) -> float:
        """GB/s, probed now."""
        from .cuda.timing import copy_bandwidth

        self._bandwidth.rates.append(copy_bandwidth(self._gpu))
        return self._bandwidth.rates[-1]

    def arithmetic(self) -> None:
        """Unknown."""


class _Bench:
    """One model, and its figures so far."""

    def __init__(self, model: GPT2, *, quick: bool) -> None:
        self.model = model
        self.work = work = Work.of(model.config.n_ctx, quick=quick)
        self._core = model._core
        self._long = self._prefilled(work.long)
        self._decode_short = self._figure(f"decode {work.n_short} after {work.short}", "GB/s")
        self._decode_long = self._figure(f"decode {work.n_long} after {work.long}", "GB/s")
        self._decode_batch = self._figure(f"{BATCH} together, {work.n_batch} after {work.short}", "GB/s")
        self._prefill = self._figure(f"prefill {work.prefill}", "GFLOP/s")
        self.figures = [self._decode_short, self._decode_long, self._decode_batch, self._prefill]

    def round(self, limits: _CpuLimits | _GpuLimits) -> None:
        """Measure everything once, with probes between."""
        work, config = self.work, self.model.config
        before = limits.bandwidth()
        for figure, sessions, n_new, context in (
            (self._decode_short, [self._prefilled(work.short)], work.n_short, work.short),
            (self._decode_long, [self._long.fork()], work.n_long, work.long),
            (self._decode_batch, self._batch(), work.n_batch, work.short),
        ):
            seconds = self._time_decode(sessions, n_new)
            after = limits.bandwidth()
            n_bytes = decode_bytes(
                config, self.model.dtype, self.model.kv_dtype, context + (n_new + 1) / 2, len(sessions)
            )
            _add(
                figure, len(sessions) * n_new / seconds, n_new * n_bytes / seconds / 1e9, (before + after) / 2
            )
            before = after
        first = limits.arithmetic()
        seconds = self._time_prefill()
        last = limits.arithmetic()
        flops = prefill_flops(config, work.prefill)
        limit = None if first is None or last is None else (first + last) / 2
        _add(self._prefill, work.prefill / seconds, flops / seconds / 1e9, limit)

    def _figure(self, work: str, unit: str) -> Figure:
        return Figure(self.model.dtype, self.model.n_threads, work, unit)

    def _tokens(self, n: int, start: int = 0) -> list[int]:
        # Any ids do; the step is odd and not small, so that they are spread over the vocabulary.
        return [(start + 7919 * i) % self.model.config.n_vocab for i in range(n)]

    def _prefilled(self, n: int) -> Sequenced:
        session: Sequenced = self._core.session()
        session.prefill(self._tokens(n))
        return session

    def _batch(self) -> list[Sequenced]:
        sessions = [self._core.session() for _ in range(BATCH)]
        self._core.prefill(sessions, [self._tokens(self.work.short, start=i) for i in range(BATCH)])
        return sessions

    def _time_decode(self, sessions: list[Sequenced], n: int) -> float:
        settings = Settings(eos_token_id=None)
        samplers = [
            settings.sampler(self.model.config, prompt_len=session.pos, seed=0, index=0)
            for session in sessions
        ]
        # The first token comes from the prompt's logits; each one after it takes a step.
        self._core.decode(sessions, samplers)
        start = time.perf_counter()
        for _ in range(n):
            self._core.decode(sessions, samplers)
        return time.perf_counter() - start

    def _time_prefill(self) -> float:
        tokens = self._tokens(self.work.prefill)
        session = self._core.session()
        start = time.perf_counter()
        session.prefill(tokens)
        _ = session.logits
        return time.perf_counter() - start


def _add(figure: Figure, tokens_per_second: float, rate: float, limit: float | None) -> None:
    figure.tokens_per_second.append(tokens_per_second)
    figure.rates.append(rate)
    if limit is not None:
        figure.shares.append(rate / limit)
