"""The host shim itself: that it computes what it should, and catches what it should, in small broken kernels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gpt2rs.cuda.machine import Launch
from shim_models import needs_shim, shim_machine

pytestmark = needs_shim

KERNELS = """
#include "rows.cuh"

// Reverses 64 values through shared memory, with what a kernel has to wait for, or without.
template <bool WAIT, bool BARRIER> DEVICE void reverse(Global<const float> from, Global<float> to) {
    u32 i = threadIdx.x;
    Shared<float> held = shared_at<float>(0);
    if (i < 16) copy16_async(held + 4 * i, from + 4 * i);
    copies_commit();
    if (WAIT) copies_wait<0>();
    if (BARRIER) barrier();
    to[i] = held[63 - i];
}
KERNEL(64, 1) whole(Global<const float> from, Global<float> to) { reverse<true, true>(from, to); }
KERNEL(64, 1) no_wait(Global<const float> from, Global<float> to) { reverse<false, true>(from, to); }
KERNEL(64, 1) no_barrier(Global<const float> from, Global<float> to) { reverse<true, false>(from, to); }

KERNEL(64, 1) written_twice(Global<const float> from, Global<float> to) {
    Shared<float> held = shared_at<float>(0);
    held[threadIdx.x % 32] = from[threadIdx.x];
    barrier();
    to[threadIdx.x] = held[threadIdx.x % 32];
}
KERNEL(64, 1) overwritten(Global<const float> from, Global<float> to) {
    Shared<float> held = shared_at<float>(0);
    held[threadIdx.x] = from[threadIdx.x];
    barrier();
    to[threadIdx.x] = held[63 - threadIdx.x];
    held[threadIdx.x] = 0.0f;
}
KERNEL(64, 1) unwritten(Global<const float> from, Global<float> to) {
    Shared<float> held = shared_at<float>(0);
    if (threadIdx.x < 63) held[threadIdx.x] = from[threadIdx.x];
    barrier();
    to[threadIdx.x] = held[threadIdx.x];
}
KERNEL(64, 1) beyond_shared(Global<const float> from, Global<float> to) {
    Shared<float> held = shared_at<float>(0);
    held[threadIdx.x + 1] = from[threadIdx.x];
}
KERNEL(64, 1) beyond_input(Global<const float> from, Global<float> to) { to[threadIdx.x] = from[threadIdx.x + 1]; }
KERNEL(64, 1) beyond_output(Global<const float> from, Global<float> to) { to[63 + threadIdx.x / 63] = from[threadIdx.x]; }
KERNEL(64, 1) before_input(Global<const float> from, Global<float> to) { to[threadIdx.x] = from[threadIdx.x - 1ull]; }
KERNEL(64, 1) not_aligned(Global<const float> from, Global<float> to) { to[0] = float_of(load16(from + 1).w[0]); }
KERNEL(64, 1) barrier_of_some(Global<const float> from, Global<float> to) {
    if (threadIdx.x < 32) barrier();
    to[threadIdx.x] = from[threadIdx.x];
}
KERNEL(64, 1) shuffle_of_some(Global<const float> from, Global<float> to) {
    to[threadIdx.x] = threadIdx.x == 5 ? 0.0f : shuffle_xor(from[threadIdx.x], 1);
}
KERNEL(64, 1) copy_left(Global<const float> from, Global<float> to) { copy16_async(shared_at<float>(threadIdx.x / 16 * 64), from); }

// d (16, 8) += a (16, 16) b (16, 8) of bfloat16 in rows.
KERNEL(32, 1) product(Global<const u32> a, Global<const u32> b, Global<float> d) {
    u32 g = threadIdx.x / 4, t = threadIdx.x % 4;
    float sums[4] = {0, 0, 0, 0};
    u32 words[4] = {a[g * 8 + t], a[(g + 8) * 8 + t], a[g * 8 + t + 4], a[(g + 8) * 8 + t + 4]};
    mma(sums, words, b[g * 8 + t], b[g * 8 + t + 4]);
    for (u32 i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}
"""


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> shim_machine.ShimMachine:
    folder: Path = tmp_path_factory.mktemp("broken")
    (folder / "broken.cu").write_text(KERNELS)
    return shim_machine.ShimMachine(shim_machine.build([folder / "broken.cu"], folder))


def run(machine: shim_machine.ShimMachine, kernel: str) -> np.ndarray:
    values = np.arange(64, dtype=np.float32)
    source, target = machine.alloc(values.nbytes), machine.alloc(values.nbytes)
    machine.upload(source, values)
    machine.launch(Launch(kernel, (2, 1, 1), 64, 256, (source, target)))
    machine.download(target, values)
    return values


def test_a_kernel_that_waits_for_all(machine: shim_machine.ShimMachine) -> None:
    for _ in range(20):
        np.testing.assert_array_equal(run(machine, "whole"), np.arange(64)[::-1])


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        ("no_wait", "a wait is missing"),
        ("no_barrier", "a barrier is missing|nobody wrote it|a wait is missing"),
        ("written_twice", "a barrier is missing"),
        ("overwritten", "a barrier is missing"),
        ("unwritten", "nobody wrote it"),
        ("beyond_shared", "at byte 256, and the block has 256"),
        ("beyond_input", "256 bytes from the start of a buffer of 256"),
        ("beyond_output", "256 bytes from the start of a buffer of 256"),
        ("before_input", "-4 bytes from the start"),
        ("not_aligned", "not a multiple of 16"),
        ("barrier_of_some", "never come to that barrier"),
        ("shuffle_of_some", "never come to that barrier"),
        ("copy_left", "a wait is missing"),
        ("absent", "no such kernel"),
    ],
)
def test_a_broken_kernel_is_caught_in_any_order_of_its_threads(
    machine: shim_machine.ShimMachine, kernel: str, said: str
) -> None:
    for _ in range(20):
        with pytest.raises(RuntimeError, match=said):
            run(machine, kernel)


def test_fresh_memory_is_poisoned(machine: shim_machine.ShimMachine) -> None:
    values = np.zeros(16, np.float32)
    machine.download(machine.alloc(64), values)
    assert np.isnan(values).all()


def test_a_wrong_number_or_kind_of_arguments(machine: shim_machine.ShimMachine) -> None:
    buffer = machine.alloc(256)
    for arguments in ((buffer,), (buffer, 3), (buffer, buffer, 1.0)):
        with pytest.raises(RuntimeError, match="whole: (a wrong number|argument 1 is of a wrong kind)"):
            machine.launch(Launch("whole", (1, 1, 1), 64, 256, arguments))


def test_fragments_of_mma(machine: shim_machine.ShimMachine) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(-8, 8, (16, 16)), rng.integers(-8, 8, (8, 16))

    def uploaded(values: np.ndarray) -> object:
        bits = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        buffer = machine.alloc(bits.nbytes)
        machine.upload(buffer, bits)
        return buffer

    d, out = machine.alloc(4 * 16 * 8), np.empty((16, 8), np.float32)
    machine.launch(Launch("product", (1, 1, 1), 32, 0, (uploaded(a), uploaded(b), d)))
    machine.download(d, out)
    np.testing.assert_array_equal(out, a @ b.T)
