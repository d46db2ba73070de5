"""Whole models through all but the hardware: `CudaModel` -> `Gpu` -> the fake driver -> the kernels' source.

The kernels run as C++ on the host (`tests/cuda`), in memory that the fake driver gave out, with the arguments
that came through its parameter lists.  Where NVRTC is installed, the sizes of these are those of the compiled
cubins.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import cubins
import fake_driver
import numpy as np
import pytest
from fake_driver import FakeDriver, FakeNvrtc, Kernel, KernelFault, Memory
from test_kernels_compile import has_nvrtc

import gpt2rs
from golden_cases import CASES
from gpt2rs.cuda import compiler
from gpt2rs.cuda.gpu import Gpu
from gpt2rs.cuda.machine import Launch

sys.path.insert(0, str(Path(__file__).parents[2] / "cuda"))
import shim_machine

pytestmark = pytest.mark.skipif(shim_machine.COMPILER is None, reason="there is no C++ compiler (g++)")

PROMPT = [5, 400, 17, 3, 256, 99, 8]


class ShimDriver(FakeDriver):
    """Kernels run on the host shim, in the shim's memory."""

    def __init__(self, shim: ctypes.CDLL, sizes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        self._shim = shim
        self._kinds: dict[str, bytes] = {}
        self._n_launched = 0
        self.kernels = {name: Kernel(size, self._runner(name)) for name, size in sizes.items()}

    def note(self, launch: Launch) -> None:
        """Remember what a kernel's arguments are: their bytes don't tell an int from a float."""
        kinds = [
            b"f" if isinstance(arg, float) else b"i" if isinstance(arg, int) else b"b" for arg in launch.args
        ]
        self._kinds[launch.kernel] = b"".join(kinds)

    def _runner(self, name: str) -> Any:
        def run(grid: tuple[int, ...], block: int, smem: int, *given: bytes) -> None:
            arguments = (shim_machine._Argument * len(given))()
            for argument, kind, value in zip(arguments, self._kinds[name], given, strict=True):
                argument.kind, argument.bits = bytes([kind]), int.from_bytes(value, "little")
            self._n_launched += 1
            place = (ctypes.c_uint32 * 3)(*grid)
            fault = self._shim.shim_launch(
                name.encode(), place, block, smem, arguments, len(given), self._n_launched
            )
            if fault is not None:
                print(fault.decode(), file=sys.stderr)
                raise KernelFault

        return run

    def _allocate(self, n_bytes: int, *, pinned: bool) -> tuple[Any, ...]:
        address = self._shim.shim_alloc(n_bytes)
        self.memory[address] = Memory(None, n_bytes, pinned)
        return fake_driver.OK, address

    def _give_back(self, address: int, *, pinned: bool) -> None:
        assert self.memory.pop(address).pinned == pinned, "freed as the wrong kind of memory"
        self._shim.shim_free(address)


def parameter_sizes() -> dict[str, tuple[int, ...]] | None:
    """Of the package's kernels as compiled; None without NVRTC."""
    if not has_nvrtc():
        return None
    sources = compiler.package_sources()
    return {
        name: sizes
        for code in (compiler.compile_source(source, "sm_90").cubin for source in sources)
        for name, sizes in cubins.parameters(code).items()
    }


SIZES = parameter_sizes() if shim_machine.COMPILER else None


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setenv("GPT2RS_CACHE_DIR", str(tmp_path))
    names = [name for source in compiler.package_sources() for name in shim_machine.kernel_names(source.text)]
    made = ShimDriver(shim_machine.package_kernels(), SIZES or dict.fromkeys(names, ()))
    monkeypatch.setattr(FakeNvrtc, "_cubin", lambda self, prog: fake_driver.cubin(*names))
    original = Gpu._launch

    def noted(self: Gpu, launch: Launch, stream: Any) -> None:
        made.note(launch)
        if SIZES is None:
            kinds = made._kinds[launch.kernel]
            made.kernels[launch.kernel].sizes = tuple(8 if kind == b"b"[0] else 4 for kind in kinds)
        original(self, launch, stream)

    monkeypatch.setattr(Gpu, "_launch", noted)
    with fake_driver.installed(monkeypatch, made):
        yield made


def models(case: str, dtype: str) -> tuple[gpt2rs.GPT2, gpt2rs.GPT2]:
    return tuple(  # type: ignore[return-value]
        gpt2rs.GPT2.from_pretrained(CASES[case], dtype=dtype, device=device) for device in ("cpu", "cuda")
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_texts_are_those_of_the_cpu(driver: ShimDriver, dtype: str) -> None:
    cpu, gpu = models("plain", dtype)
    assert (gpu.device, gpu.isa, gpu.dtype, gpu.n_threads) == ("cuda:0", "sm_90", dtype, 1)
    assert repr(gpu).endswith("device='cuda:0')")
    for settings in ({}, {"temperature": 0.8, "top_p": 0.9, "seed": 3}, {"logprobs": True}):
        expected = cpu.generate(PROMPT, max_new_tokens=8, eos_token_id=None, **settings)  # type: ignore[call-overload]
        found = gpu.generate(PROMPT, max_new_tokens=8, eos_token_id=None, **settings)  # type: ignore[call-overload]
        assert found.tokens == expected.tokens
        assert found.finish_reason == expected.finish_reason
    assert np.abs(gpu.logits(PROMPT) - cpu.logits(PROMPT)).max() < 1e-2
    assert driver.stack == []


def test_graphs_are_recorded_once_and_launched_for_each_token(driver: ShimDriver) -> None:
    _, gpu = models("plain", "bfloat16")
    gpu.generate(PROMPT, max_new_tokens=4, eos_token_id=None)
    driver.calls.clear()
    gpu.generate(PROMPT, max_new_tokens=12, eos_token_id=None)
    assert driver.calls.count("cuGraphInstantiate") == 0
    assert driver.calls.count("cuGraphLaunch") >= 12
    # Several steps at a time are not waited for one by one.
    assert driver.calls.count("cuStreamSynchronize") < 12


def test_all_but_the_first_kernel_of_a_step_may_begin_early(driver: ShimDriver) -> None:
    _, gpu = models("plain", "bfloat16")
    gpu.generate(PROMPT, max_new_tokens=2, eos_token_id=None)
    assert set(driver.overlapping) == set(driver.executed)


def test_sequences_share_and_part_as_on_the_cpu(driver: ShimDriver) -> None:
    cpu, gpu = models("plain", "bfloat16")
    found = []
    for model in (cpu, gpu):
        session = model.session()
        session.prefill(PROMPT)
        other = session.fork()
        first = session.decode(6, eos_token_id=None)
        other.truncate(5)
        other.prefill([1, 2])
        found.append((first, other.decode(6, eos_token_id=None), session.tokens, other.pos))
    assert found[0] == found[1]


def test_a_failing_kernel_is_an_error_and_stays_one(driver: ShimDriver) -> None:
    _, gpu = models("plain", "bfloat16")
    gpu.generate(PROMPT, max_new_tokens=2)

    def fail(*_: Any) -> None:
        raise KernelFault

    driver.kernels["sample"].run = fail
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"^a kernel failed on cuda:0 \(NVIDIA H200\)"):
            gpu.generate(PROMPT, max_new_tokens=2)


def test_models_go_back_to_files(driver: ShimDriver, tmp_path: Path) -> None:
    cpu, gpu = models("plain", "float32")
    gpu.save_pretrained(tmp_path / "saved")
    again = gpt2rs.GPT2.from_pretrained(tmp_path / "saved")
    assert (again.logits(PROMPT) == cpu.logits(PROMPT)).all()
