"""The fake driver with kernels that compute: the package's own source, compiled for the host (`tests/cuda`).

They run in memory that the fake driver gave out, with the arguments that came through its parameter lists.
Where NVRTC is installed, the sizes of these are those of the compiled cubins.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cubins
import fake_driver
import fakes
import pytest
from fake_driver import FakeDriver, Kernel, KernelFault, Memory
from fakes import FakeNvrtc
from shim_models import shim_machine
from test_kernels_compile import has_nvrtc

from gpt2rs.cuda import compiler
from gpt2rs.cuda.gpu import Gpu
from gpt2rs.cuda.machine import Launch

PLACES = Path(__file__).parents[3] / "benches" / "gpu" / "places.cu"


class ShimDriver(FakeDriver):
    """Kernels run on the host shim, in the shim's memory."""

    def __init__(self, shim: ctypes.CDLL, sizes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        self._shim = shim
        self.kinds: dict[str, bytes] = {}
        # How tensor cores add: one of `TENSOR_CORES`, or another.
        self.adds = shim_machine.TENSOR_CORES["host"]
        self._n_launched = 0
        self.kernels = {name: Kernel(size, self._runner(name)) for name, size in sizes.items()}

    def note(self, launch: Launch) -> None:
        """Remember what a kernel's arguments are: their bytes don't tell an int from a float."""
        kinds = [
            b"f" if isinstance(arg, float) else b"i" if isinstance(arg, int) else b"b" for arg in launch.args
        ]
        self.kinds[launch.kernel] = b"".join(kinds)

    def _runner(self, name: str) -> Any:
        def run(grid: tuple[int, ...], block: int, smem: int, *given: bytes) -> None:
            arguments = (shim_machine._Argument * len(given))()
            for argument, kind, value in zip(arguments, self.kinds[name], given, strict=True):
                argument.kind, argument.bits = bytes([kind]), int.from_bytes(value, "little")
            self._n_launched += 1
            place = (ctypes.c_uint32 * 3)(*grid)
            self._shim.shim_tensor_core(*self.adds)
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


def sources() -> list[compiler.Source]:
    """The package's kernels, and those that the benches add."""
    found = compiler.package_sources()
    return [*found, compiler.Source(PLACES.name, PLACES.read_text(), found[0].headers)]


@functools.cache
def library() -> ctypes.CDLL:
    """All of them, compiled once for all tests."""
    kernels = sorted((Path(compiler.__file__).parent / "kernels").glob("*.cu"))
    with tempfile.TemporaryDirectory() as temporary:
        return shim_machine.build([*kernels, PLACES], Path(temporary))


@functools.cache
def compiled_sizes() -> dict[str, tuple[int, ...]] | None:
    """Of each kernel's parameters, as compiled for a GPU; None without NVRTC."""
    if not has_nvrtc():
        return None
    codes = [compiler.compile_source(source, "sm_90").cubin for source in sources()]
    return {name: sizes for code in codes for name, sizes in cubins.parameters(code).items()}


@contextmanager
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[ShimDriver]:
    """`fakes.installed` with such a driver."""
    sizes = compiled_sizes()
    names = {source.text: tuple(shim_machine.kernel_threads(source.text)) for source in sources()}
    driver = ShimDriver(library(), sizes or {name: () for group in names.values() for name in group})
    original = Gpu._launch

    def noted(self: Gpu, launch: Launch, stream: Any) -> None:
        driver.note(launch)
        if sizes is None:
            kinds = driver.kinds[launch.kernel]
            driver.kernels[launch.kernel].sizes = tuple(8 if kind == b"b"[0] else 4 for kind in kinds)
        original(self, launch, stream)

    def cubin(self: FakeNvrtc, prog: int) -> bytes:
        return fake_driver.cubin(*names[self.source(prog)])

    with monkeypatch.context() as patched:
        patched.setattr(Gpu, "_launch", noted)
        patched.setattr(FakeNvrtc, "_cubin", cubin)
        with fakes.installed(monkeypatch, driver):
            yield driver
