"""How long work on a GPU takes, by the GPU's own clock, and how fast its memory is."""

from __future__ import annotations

from collections.abc import Callable

from .gpu import Gpu

# Several times the second-level cache of any GPU so far.
COPY_BYTES = 1 << 30


def elapsed(gpu: Gpu, work: Callable[[], None]) -> float:
    """Seconds from the start to the end of what `work` queues, between two events of the queue."""
    with gpu.timed() as seconds:
        work()
    return seconds()


def copy_bandwidth(gpu: Gpu, n_bytes: int = COPY_BYTES, repeats: int = 5) -> float:
    """GB/s of a copy within the GPU's memory, bytes read and written counted, the best of several; of less
    than n_bytes where that would take more than half of what is free."""
    n_bytes = min(n_bytes, gpu.memory()[0] // 4)
    source, target = gpu.alloc(n_bytes), gpu.alloc(n_bytes)
    try:
        times = [elapsed(gpu, lambda: gpu.copy(target, source)) for _ in range(1 + repeats)]
    finally:
        source.free()
        target.free()
    # The first one also pays for what is set up on first use.
    return 2 * n_bytes / min(times[1:]) / 1e9
