"""How fast it is: steps of decoding, prompts, launches, and the start of a process."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from correctness import tokens

import gpt2rs
from gpt2rs.bench import decode_bytes, prefill_flops
from gpt2rs.cuda.gpu import Gpu
from gpt2rs.cuda.machine import Launch
from gpt2rs.cuda.timing import elapsed
from gpt2rs.settings import Settings


@dataclass(frozen=True)
class Figure:
    """One kind of work: seconds a unit of it, round by round; n_bytes, n_flops: what it needs at least."""

    model: str
    work: str
    context: int
    batch: int
    seconds: tuple[float, ...]
    n_bytes: float = 0.0
    n_flops: float = 0.0

    @property
    def microseconds(self) -> float:
        """The median, in microseconds."""
        return 1e6 * median(self.seconds)

    def share(self, bandwidth: float) -> float:
        """Of a bandwidth in GB/s, at the median."""
        return self.n_bytes / median(self.seconds) / 1e9 / bandwidth

    def facts(self) -> dict[str, object]:
        """For the JSON."""
        return asdict(self)


def gpu_of(model: gpt2rs.GPT2) -> Gpu:
    """What it runs on."""
    gpu: Gpu = model._core.machine  # type: ignore[attr-defined]
    return gpu


class Decoding:
    """Sequences of one length, decoded step by step; `round` may be called again and again."""

    def __init__(self, model: gpt2rs.GPT2, name: str, context: int, batch: int, n_steps: int) -> None:
        """Compute the prompts."""
        self._model, self._name, self._context, self._batch = model, name, context, batch
        self._n_steps = min(n_steps, model.config.n_ctx - context - 1)
        # Each has keys and values of its own: those of forks would come from memory once, and then from L2.
        self._prompts = [model._core.session() for _ in range(batch)]
        model._core.prefill(self._prompts, [tokens(model, context, seed=i) for i in range(batch)])
        self._settings = Settings(eos_token_id=None)
        self.seconds: list[float] = []

    def round(self) -> None:
        """Seconds a step over `n_steps` of them, after some that are not counted."""
        model = self._model
        sessions = [prompt.fork() for prompt in self._prompts]
        samplers = [self._settings.sampler(model.config, prompt_len=self._context, seed=0) for _ in sessions]
        # Steps are queued up to eight at a time: from here on one is replayed for each that is asked for.
        n_first = 8 if self._n_steps >= 16 else self._n_steps // 4
        for _ in range(n_first):
            model._core.decode(sessions, samplers)
        n_steps = self._n_steps - n_first

        def work() -> None:
            for _ in range(n_steps):
                model._core.decode(sessions, samplers)

        self.seconds.append(elapsed(gpu_of(model), work) / n_steps)

    def figure(self) -> Figure:
        """What was measured so far."""
        model = self._model
        attended = self._context + (self._n_steps + 1) / 2
        n_bytes = decode_bytes(model.config, model.dtype, model._core.kv_dtype, attended, self._batch)
        return Figure(self._name, "decode", self._context, self._batch, tuple(self.seconds), n_bytes=n_bytes)


def prefill(model: gpt2rs.GPT2, name: str, n_tokens: int, rounds: int) -> Figure:
    """A prompt, and the logits after it."""
    n_tokens = min(n_tokens, model.config.n_ctx)
    seconds = []
    for _ in range(1 + rounds):
        session = model.session()

        def work(session: gpt2rs.Session = session) -> None:
            session.prefill(tokens(model, n_tokens))
            _ = session.logits

        seconds.append(elapsed(gpu_of(model), work))
    flops = prefill_flops(model.config, n_tokens)
    return Figure(name, "prefill", n_tokens, 1, tuple(seconds[1:]), n_flops=flops)


def graph_launch(gpu: Gpu, rounds: int) -> dict[str, list[float]]:
    """Seconds to launch a graph of one kernel that does nothing, on the host and on the GPU."""
    pairs = gpu.alloc(16)
    graph = gpu.graph([Launch("copy_blocks", (1, 1, 1), 256, 0, (pairs, 0))])
    n, host, device = 100, [], []
    for _ in range(1 + rounds):

        def work() -> None:
            start = time.perf_counter()
            for _ in range(n):
                graph.launch()
            host.append((time.perf_counter() - start) / n)

        device.append(elapsed(gpu, work) / n)
    return {"host": host[1:], "gpu": device[1:]}


_START = """
import time
start = time.perf_counter()
import gpt2rs
imported = time.perf_counter()
model = gpt2rs.GPT2.from_pretrained({folder!r}, device={device!r})
loaded = time.perf_counter()
model.generate([464, 3290], max_new_tokens=1, eos_token_id=None)
end = time.perf_counter()
import json
print(json.dumps({{"import": imported - start, "load": loaded - imported, "first token": end - loaded}}))
"""


def cold_start(device: str, rounds: int, config: object = "gpt2") -> list[dict[str, float]]:
    """Of new processes: seconds to the first token of a bfloat16 model on disk, kernels in the cache."""
    with TemporaryDirectory() as folder:
        model = gpt2rs.GPT2.from_config(config, dtype="bfloat16")  # type: ignore[arg-type]
        model.save_pretrained(folder)
        del model
        code = _START.format(folder=folder, device=device)
        starts = []
        for _ in range(1 + rounds):
            start = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd()
            )
            starts.append({**json.loads(done.stdout), "process": time.perf_counter() - start})
    # The first one fills the caches, that of the disk too.
    return starts[1:]


def in_turns(work: list[Callable[[], None]], rounds: int) -> None:
    """Each of these once a round, so that a clock that changes changes all of them."""
    for _ in range(rounds):
        for each in work:
            each()
