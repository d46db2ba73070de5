"""All of cuda-python that gpt2rs uses, made up: the fake driver, a compiler for it, and both installed."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from fake_driver import OK, CUresult, FakeDriver, cubin


class FakeNvrtc(types.ModuleType):
    """`cuda.bindings.nvrtc` for that driver: its machine code is a list of the source's kernels."""

    def __init__(self, version: tuple[int, int] = (13, 0)) -> None:
        super().__init__("cuda.bindings.nvrtc")
        self.version = version
        self.installed = True
        self.archs = [80, 89, 90, 100, 120]
        self.compiled: list[tuple[str, str]] = []
        self._programs: dict[int, tuple[bytes, bytes]] = {}

    def nvrtcVersion(self) -> tuple[Any, ...]:
        if not self.installed:
            raise RuntimeError("libnvrtc.so.13 was not found")
        return OK, *self.version

    def nvrtcGetSupportedArchs(self) -> tuple[Any, ...]:
        return OK, self.archs

    def nvrtcCreateProgram(
        self, src: bytes, name: bytes, numHeaders: int, headers: list[bytes], includeNames: list[bytes]
    ) -> tuple[Any, ...]:
        assert numHeaders == len(headers) == len(includeNames)
        key = len(self._programs) + 1
        self._programs[key] = name, src
        return OK, key

    def nvrtcCompileProgram(self, prog: int, numOptions: int, options: list[bytes]) -> tuple[Any, ...]:
        assert numOptions == len(options)
        arch = next(option for option in options if option.startswith(b"--gpu-architecture="))
        name, source = self._programs[prog]
        self.compiled.append((name.decode(), arch.decode().partition("=")[2]))
        return (CUresult.CUDA_ERROR_INVALID_VALUE if b"#error" in source else OK,)

    def nvrtcGetProgramLogSize(self, prog: int) -> tuple[Any, ...]:
        return OK, len(self._log(prog)) + 1

    def nvrtcGetProgramLog(self, prog: int, log: bytearray) -> tuple[Any, ...]:
        log[:] = self._log(prog) + b"\0"
        return (OK,)

    def nvrtcGetCUBINSize(self, prog: int) -> tuple[Any, ...]:
        return OK, len(self._cubin(prog))

    def nvrtcGetCUBIN(self, prog: int, cubin: bytearray) -> tuple[Any, ...]:
        cubin[:] = self._cubin(prog)
        return (OK,)

    def nvrtcDestroyProgram(self, prog: int) -> tuple[Any, ...]:
        return (OK,)

    def source(self, prog: int) -> str:
        """A program's text."""
        return self._programs[prog][1].decode()

    def _log(self, prog: int) -> bytes:
        name, source = self._programs[prog]
        return name + b"(1): catastrophic error: #error directive" if b"#error" in source else b""

    def _cubin(self, prog: int) -> bytes:
        return cubin(*re.findall(r"KERNEL\([^)]*\)\s*(\w+)", self._programs[prog][1].decode()))


@contextmanager
def installed(
    monkeypatch: pytest.MonkeyPatch, driver: FakeDriver | None = None
) -> Iterator[tuple[FakeDriver, FakeNvrtc]]:
    """`from cuda.bindings import driver, nvrtc` gives these, whether cuda-python is installed or not."""
    driver, nvrtc = driver or FakeDriver(), FakeNvrtc()
    bindings, package = types.ModuleType("cuda.bindings"), types.ModuleType("cuda")
    pathfinder = types.ModuleType("cuda.pathfinder")
    pathfinder.load_nvidia_dynamic_lib = lambda name: types.SimpleNamespace(abs_path=None)  # type: ignore[attr-defined]
    bindings.driver, bindings.nvrtc = driver, nvrtc  # type: ignore[attr-defined]
    package.bindings, package.pathfinder = bindings, pathfinder  # type: ignore[attr-defined]
    modules = {
        "cuda": package,
        "cuda.bindings": bindings,
        "cuda.bindings.driver": driver,
        "cuda.bindings.nvrtc": nvrtc,
        "cuda.pathfinder": pathfinder,
    }
    with monkeypatch.context() as patched:
        for name, module in modules.items():
            patched.setitem(sys.modules, name, module)
        yield driver, nvrtc
