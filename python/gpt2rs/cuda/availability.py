"""Which GPUs a model can run on, and, for each way in which none can, the sentence that says so."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

from .driver import DriverError, api, call

# The tensor cores' bfloat16 and asynchronous copies into shared memory came with Ampere.
OLDEST = (8, 0)
# Sizes of a kernel's parameters can be asked for from here on.
OLDEST_DRIVER = (12, 4)

_INSTALL = "pip install 'gpt2rs[cuda]'"


class Unavailable(RuntimeError):
    """A GPU that can't be used, and why."""


@dataclass(frozen=True)
class Device:
    """A GPU that the driver lists.

    ordinal: N of "cuda:N", as `CUDA_VISIBLE_DEVICES` numbers them.  major, minor: its compute capability.
    n_bytes: of its memory in all.
    """

    ordinal: int
    name: str
    major: int
    minor: int
    n_bytes: int

    def __str__(self) -> str:
        """As errors name it: "cuda:0 (NVIDIA H200)"."""
        return f"cuda:{self.ordinal} ({self.name})"

    def check(self) -> None:
        """`Unavailable` for a GPU that is older than the kernels."""
        if (self.major, self.minor) < OLDEST:
            raise Unavailable(
                f"{self} has compute capability {self.major}.{self.minor}; the kernels need "
                f"{OLDEST[0]}.{OLDEST[1]} (NVIDIA Ampere) or newer"
            )


def devices() -> list[Device]:
    """The GPUs that the driver lists, at least one; `Unavailable` where anything on the way is missing."""
    try:
        cu = api()
        from . import compiler

        compiler_version = compiler.version()
    except ImportError as error:
        raise Unavailable(f"cuda-python is not installed: {_INSTALL}") from error
    except RuntimeError as error:
        raise Unavailable(f"NVRTC, which compiles the kernels, is not installed: {_INSTALL}") from error
    try:
        started, *_ = cu.cuInit(0)
    except RuntimeError as error:
        # How cuda-python says that there is no libcuda.
        raise Unavailable("this machine has no NVIDIA driver (libcuda): install one, 580 or newer") from error
    _check_started(cu, started)
    _check_driver(call(cu.cuDriverGetVersion), compiler_version)
    return [_device(cu, ordinal) for ordinal in range(call(cu.cuDeviceGetCount))]


def device(ordinal: int) -> Device:
    """The GPU "cuda:N"; `Unavailable` where there is none of that number, or none that will do."""
    found = devices()
    if ordinal >= len(found):
        raise Unavailable(f"there is no cuda:{ordinal}; this machine has {', '.join(map(str, found))}")
    found[ordinal].check()
    return found[ordinal]


def in_units(n_bytes: int) -> str:
    """Bytes for a reader, in powers of 1000."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n_bytes >= size:
            return f"{n_bytes / size:.1f} {unit}"
    return f"{n_bytes} bytes"


def _check_started(cu: Any, error: Any) -> None:
    if int(error) == 0:
        return
    if error == cu.CUresult.CUDA_ERROR_NO_DEVICE:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hidden = "" if visible is None else f"; CUDA_VISIBLE_DEVICES is {visible!r}"
        raise Unavailable(f"the NVIDIA driver finds no GPU{hidden}")
    raise Unavailable(f"the NVIDIA driver does not start: {DriverError.of(error)}")


def _check_driver(version: int, compiler_version: str) -> None:
    """A driver loads machine code of compilers of its own CUDA major version, and of older ones."""
    found = version // 1000, version % 1000 // 10
    major = int(re.match(r"\d+", compiler_version)[0])  # type: ignore[index]
    needed = max((major, 0), OLDEST_DRIVER)
    if found >= needed:
        return
    either = "" if found < OLDEST_DRIVER else ", or for this one pip install 'gpt2rs[cuda12]'"
    raise Unavailable(
        f"the NVIDIA driver is for CUDA {found[0]}.{found[1]} and the compiler needs one for "
        f"{needed[0]}.{needed[1]} or newer: update the driver{either}"
    )


def _device(cu: Any, ordinal: int) -> Device:
    handle = call(cu.cuDeviceGet, ordinal)
    attribute = cu.CUdevice_attribute
    return Device(
        ordinal=ordinal,
        name=call(cu.cuDeviceGetName, 256, handle).rstrip(b"\0").decode(errors="replace"),
        major=call(cu.cuDeviceGetAttribute, attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, handle),
        minor=call(cu.cuDeviceGetAttribute, attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, handle),
        n_bytes=int(call(cu.cuDeviceTotalMem, handle)),
    )
