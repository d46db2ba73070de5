"""A machine without a GPU: the kernels' own source compiled as C++ over shim.h."""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import numpy as np

from gpt2rs.cuda.machine import Buffer, Launch

HERE = Path(__file__).parent
COMPILER = shutil.which("g++")
_KERNEL = re.compile(r"^KERNEL\((\d+), \d+\)\s*(\w+)\(", re.MULTILINE)
# How tensor cores add (tensor_core.h): products of a step, bits below the leading one; "host" adds floats.
TENSOR_CORES = {
    "host": (0, 0),
    "sm_80": (8, 24),
    "sm_86": (8, 24),
    "sm_89": (8, 24),
    "sm_90": (16, 25),
    "sm_100": (16, 25),
    "sm_120": (16, 25),
}
_KERNEL_OF_PARTS = re.compile(r"KERNEL\((\d+), \d+\)[\s\\]*(\w+_)##parts_\(")


def kernel_threads(source: str) -> dict[str, int]:
    """Names of the kernels that a file defines, those of macros for 1 and 3 parts too; threads of a block."""
    found = {name: int(threads) for threads, name in _KERNEL.findall(source)}
    for threads, stem in _KERNEL_OF_PARTS.findall(source):
        found |= {f"{stem}{parts}": int(threads) for parts in (1, 3)}
    return found


class _Argument(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_char), ("bits", ctypes.c_uint64)]


def build(sources: Sequence[Path], folder: Path) -> ctypes.CDLL:
    """Compile kernel files, each in a namespace of its own, into one library."""
    files = [str(source) for source in sources]
    kernels_of = [kernel_threads(source.read_text()) for source in sources]
    kernels = Path(str(resources.files("gpt2rs.cuda") / "kernels"))
    # Headers first, so that only what a file has of its own is in its namespace.
    text = ['#include "shim.h"', *(f'#include "{header.name}"' for header in sorted(kernels.glob("*.cuh")))]
    text += [f'namespace file{i} {{\n#include "{file}"\n}}' for i, file in enumerate(files)]
    known = [
        f'    known<file{i}::{name}>("{name}", {threads}),'
        for i, group in enumerate(kernels_of)
        for name, threads in group.items()
    ]
    text += ["const std::vector<shim::Known> shim::kernels = {", *known, "};"]
    unit, library = folder / "kernels.cpp", folder / "kernels.so"
    unit.write_text("\n".join(text))
    flags = [
        "-std=c++17",
        "-O2",
        "-ftree-vectorize",
        "-fPIC",
        "-shared",
        "-ffp-contract=off",
        "-fno-strict-aliasing",
        "-w",
    ]
    if "fma" in Path("/proc/cpuinfo").read_text().split():
        flags += ["-mfma", "-mavx2"]
    assert COMPILER is not None
    done = subprocess.run(
        [COMPILER, *flags, f"-I{HERE}", f"-I{kernels}", str(unit), "-o", str(library)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[:4000])
    shim = ctypes.CDLL(str(library))
    shim.shim_alloc.restype = ctypes.c_void_p
    shim.shim_alloc.argtypes = [ctypes.c_uint64]
    shim.shim_free.argtypes = [ctypes.c_void_p]
    shim.shim_tensor_core.restype = None
    shim.shim_tensor_core.argtypes = [ctypes.c_int, ctypes.c_int]
    shim.shim_launch.restype = ctypes.c_char_p
    shim.shim_launch.argtypes = [
        ctypes.c_char_p,
        ctypes.POINTER(ctypes.c_uint32),
        ctypes.c_uint32,
        ctypes.c_uint32,
        ctypes.POINTER(_Argument),
        ctypes.c_uint64,
        ctypes.c_uint64,
    ]
    return shim


@functools.cache
def package_kernels() -> ctypes.CDLL:
    """The kernels of the package, compiled once for all tests."""
    sources = sorted(Path(str(resources.files("gpt2rs.cuda") / "kernels")).glob("*.cu"))
    with tempfile.TemporaryDirectory() as temporary:
        return build(sources, Path(temporary))


class ShimBuffer:
    """Memory that kernels may use; poisoned, whatever a device would do."""

    def __init__(self, shim: ctypes.CDLL, n_bytes: int) -> None:
        self._shim = shim
        self.n_bytes = n_bytes
        self.address = shim.shim_alloc(n_bytes)
        self.freed = False

    def __del__(self) -> None:
        self.free()

    def free(self) -> None:
        if not self.freed:
            self.freed = True
            self._shim.shim_free(self.address)

    @property
    def host(self) -> np.ndarray:
        return np.ctypeslib.as_array((ctypes.c_uint8 * self.n_bytes).from_address(self.address))


class ShimGraph:
    """Launches to be run again."""

    def __init__(self, machine: ShimMachine, launches: Sequence[Launch]) -> None:
        self._machine, self._launches = machine, tuple(launches)

    def launch(self) -> None:
        for launch in self._launches:
            self._machine.launch(launch)


class ShimMachine:
    """Runs kernels at once, one thread after the other, in an order that `seed` shuffles.

    Tensor cores add as those of `arch` do, one of `TENSOR_CORES`.
    """

    def __init__(self, shim: ctypes.CDLL | None = None, seed: int = 0, arch: str = "host") -> None:
        self._shim = shim or package_kernels()
        self._seed = seed
        self.arch = arch
        self.n_launched = 0
        self.kernels: set[str] = set()

    name = "host shim"
    device = "cuda:0"
    n_sm = 4

    def alloc(self, n_bytes: int) -> ShimBuffer:
        return ShimBuffer(self._shim, n_bytes)

    def mailbox(self, n_bytes: int) -> ShimBuffer:
        return ShimBuffer(self._shim, n_bytes)

    def upload(self, buffer: Buffer, data: np.ndarray, offset: int = 0) -> None:
        assert data.flags.c_contiguous
        assert offset >= 0 and offset + data.nbytes <= buffer.n_bytes
        ctypes.memmove(buffer.address + offset, data.ctypes.data, data.nbytes)

    def download(self, buffer: Buffer, out: np.ndarray, offset: int = 0) -> None:
        assert out.flags.c_contiguous
        assert offset >= 0 and offset + out.nbytes <= buffer.n_bytes
        ctypes.memmove(out.ctypes.data, buffer.address + offset, out.nbytes)

    def launch(self, launch: Launch) -> None:
        arguments = (_Argument * len(launch.args))()
        for argument, value in zip(arguments, launch.args, strict=True):
            if isinstance(value, int):
                argument.kind, argument.bits = b"i", value & 0xFFFFFFFF
            elif isinstance(value, float):
                argument.kind = b"f"
                argument.bits = int(np.float32(value).view(np.uint32))
            else:
                assert not value.freed, f"{launch.kernel} is given a buffer that was freed"
                argument.kind, argument.bits = b"b", value.address
        self.n_launched += 1
        self.kernels.add(launch.kernel)
        self._shim.shim_tensor_core(*TENSOR_CORES[self.arch])
        fault = self._shim.shim_launch(
            launch.kernel.encode(),
            (ctypes.c_uint32 * 3)(*launch.grid),
            launch.block,
            launch.smem,
            arguments,
            len(launch.args),
            self._seed + self.n_launched,
        )
        if fault is not None:
            raise RuntimeError(fault.decode())

    def graph(self, launches: Sequence[Launch]) -> ShimGraph:
        return ShimGraph(self, launches)

    def synchronize(self) -> None:
        pass
