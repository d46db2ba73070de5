"""The host shim itself: that it computes what it should, and catches what it should."""

from __future__ import annotations

import math
from fractions import Fraction

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


def mma(machine: shim_machine.ShimMachine, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """c (16, 8) + a (16, 16) b (8, 16).T, of values that bfloat16 holds."""

    def uploaded(values: np.ndarray) -> object:
        bits = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        buffer = machine.alloc(bits.nbytes)
        machine.upload(buffer, bits)
        return buffer

    out = c.astype(np.float32)
    d = machine.alloc(out.nbytes)
    machine.upload(d, out)
    machine.launch(Launch("product", (1, 1, 1), 32, 0, (uploaded(a), uploaded(b), d)))
    machine.download(d, out)
    return out


@pytest.mark.parametrize("arch", ["host", "sm_80", "sm_90"])
def test_fragments_of_mma(
    machine: shim_machine.ShimMachine, monkeypatch: pytest.MonkeyPatch, arch: str
) -> None:
    monkeypatch.setattr(machine, "arch", arch)
    rng = np.random.default_rng(0)
    a, b, c = rng.integers(-8, 8, (16, 16)), rng.integers(-8, 8, (8, 16)), rng.integers(-8, 8, (16, 8))
    np.testing.assert_array_equal(mma(machine, a, b, c), c + a @ b.T)


class TestTensorCores:
    """Sums cut off as hardware cuts them off, on numbers that can be added by hand, and on any."""

    # 1 and so many products of a power of two: the units, 2^-23, that are added.
    @pytest.mark.parametrize(
        ("count", "power", "units"),
        [
            (2, -24, {"host": 0, "sm_80": 1, "sm_90": 1}),
            (3, -24, {"host": 0, "sm_80": 1, "sm_90": 1}),
            (4, -25, {"host": 0, "sm_80": 0, "sm_90": 1}),
            (16, -25, {"host": 0, "sm_80": 0, "sm_90": 4}),
            (16, -26, {"host": 0, "sm_80": 0, "sm_90": 0}),
            # Eight make half a step's unit each: two steps, each cut off by itself.
            (12, -24, {"host": 0, "sm_80": 4 + 2, "sm_90": 6}),
            (9, -24, {"host": 0, "sm_80": 4, "sm_90": 4}),
        ],
    )
    @pytest.mark.parametrize("sign", [1, -1])
    def test_by_hand(
        self,
        machine: shim_machine.ShimMachine,
        monkeypatch: pytest.MonkeyPatch,
        count: int,
        power: int,
        units: dict[str, int],
        sign: int,
    ) -> None:
        a, b, c = np.zeros((16, 16)), np.zeros((8, 16)), np.full((16, 8), sign)
        a[:, :count], b[:, :count] = sign * 2.0 ** (power // 2), 2.0 ** (power - power // 2)
        for arch, n in units.items():
            monkeypatch.setattr(machine, "arch", arch)
            np.testing.assert_array_equal(mma(machine, a, b, c), np.float32(sign * (1 + n * 2.0**-23)))

    @pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
    def test_by_fractions(
        self, machine: shim_machine.ShimMachine, monkeypatch: pytest.MonkeyPatch, arch: str
    ) -> None:
        monkeypatch.setattr(machine, "arch", arch)
        rng = np.random.default_rng(1)
        step, fraction = shim_machine.TENSOR_CORES[arch]
        for spread in (0, 4, 12):
            a, b, c = (
                (rng.standard_normal(shape) * np.exp2(rng.integers(-spread, spread + 1, shape))).astype(
                    np.float32
                )
                for shape in ((16, 16), (8, 16), (16, 8))
            )
            a, b = ((values.view(np.uint32) & 0xFFFF0000).view(np.float32) for values in (a, b))
            a[rng.random(a.shape) < 0.2] = 0
            found = mma(machine, a, b, c)
            for m in range(16):
                for n in range(8):
                    want = float(c[m, n])
                    for first in range(0, 16, step):
                        part = slice(first, first + step)
                        want = added(want, a[m, part], b[n, part], fraction)
                    assert found[m, n] == want


def added(c: float, a: np.ndarray, b: np.ndarray, fraction: int) -> float:
    """One step of a tensor core, in exact arithmetic."""

    def exponent(value: float) -> int:
        return math.frexp(value)[1] - 1

    factors = [(float(x), float(y)) for x, y in zip(a, b, strict=True) if x and y]
    terms = [(Fraction(c), exponent(c))] if c else []
    terms += [(Fraction(x) * Fraction(y), exponent(x) + exponent(y)) for x, y in factors]
    if not terms:
        return 0.0
    unit = Fraction(2) ** (max(exponent for _, exponent in terms) - fraction)
    whole = sum(math.trunc(term / unit) for term, _ in terms) * unit
    kept = Fraction(2) ** (exponent(float(whole)) - 23)
    return float(math.trunc(whole / kept) * kept)


def test_what_is_not_finite_stays_so(
    machine: shim_machine.ShimMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "arch", "sm_90")
    a, b, c = np.ones((16, 16)), np.ones((8, 16)), np.ones((16, 8))
    a[3, 5], b[2, 1], c[9, 4] = np.inf, np.nan, -np.inf
    want = np.full((16, 8), 17.0)
    want[3], want[9, 4], want[:, 2] = np.inf, -np.inf, np.nan
    np.testing.assert_array_equal(mma(machine, a, b, c), want)
