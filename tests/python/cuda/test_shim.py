"""The host shim itself: that it computes what it should, and catches what it should."""

from __future__ import annotations

import numpy as np
import pytest
from shim_models import needs_shim, shim_machine

from gpt2rs.cuda.machine import Launch

pytestmark = needs_shim


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> shim_machine.ShimMachine:
    folder = tmp_path_factory.mktemp("broken")
    return shim_machine.ShimMachine(shim_machine.build([shim_machine.HERE / "broken.cu"], folder))


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
        ("too_early", "before previous_done"),
        ("never_waits", "without a call of previous_done"),
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
        with pytest.raises(RuntimeError, match=r"whole: (a wrong number|argument 1 is of a wrong kind)"):
            machine.launch(Launch("whole", (1, 1, 1), 64, 256, arguments))


def test_a_wrong_number_of_threads(machine: shim_machine.ShimMachine) -> None:
    buffer = machine.alloc(256)
    with pytest.raises(RuntimeError, match="whole: a block of 32 threads, and it is written for 64"):
        machine.launch(Launch("whole", (1, 1, 1), 32, 256, (buffer, buffer)))


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
