"""A CUDA driver in Python, at the border of `cuda.bindings.driver`: the functions that gpt2rs calls, strict
where a real driver is lenient.

Device memory is host memory.  Nothing that is queued happens before somebody waits for it, copies from pinned
memory included, so that a missing wait shows; what was freed is gone for whoever still has its address.
Kernels are Python functions that get the bytes of their parameters as the driver reads them.
"""

from __future__ import annotations

import ctypes
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np


class CUresult(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NOT_INITIALIZED = 3
    CUDA_ERROR_DEVICE_UNAVAILABLE = 46
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_INVALID_DEVICE = 101
    CUDA_ERROR_INVALID_IMAGE = 200
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_NOT_FOUND = 500
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES = 701
    CUDA_ERROR_LAUNCH_FAILED = 719
    CUDA_ERROR_SYSTEM_DRIVER_MISMATCH = 803
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901


OK = CUresult.CUDA_SUCCESS


class CUdevice_attribute(IntEnum):
    CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76
    CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED = 115


class CUfunction_attribute(IntEnum):
    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8


class CUstream_flags(IntEnum):
    CU_STREAM_NON_BLOCKING = 1


class CUevent_flags(IntEnum):
    CU_EVENT_DEFAULT = 0


class CUstreamCaptureMode(IntEnum):
    CU_STREAM_CAPTURE_MODE_RELAXED = 2


class CUmemAllocationType(IntEnum):
    CU_MEM_ALLOCATION_TYPE_PINNED = 1


class CUmemLocationType(IntEnum):
    CU_MEM_LOCATION_TYPE_DEVICE = 1


class CUmemPool_attribute(IntEnum):
    CU_MEMPOOL_ATTR_RELEASE_THRESHOLD = 4


class CUmemPoolProps:
    def __init__(self) -> None:
        self.allocType: Any = None
        self.location = types.SimpleNamespace(type=None, id=None)


class KernelFault(Exception):
    """What a kernel of a test raises to fail as on a GPU."""

    def __init__(self, error: CUresult = CUresult.CUDA_ERROR_ILLEGAL_ADDRESS) -> None:
        self.error = error


@dataclass
class Kernel:
    """sizes: of its parameters in bytes.  run: called with (grid, block, smem, *parameters as bytes)."""

    sizes: tuple[int, ...]
    run: Callable[..., None]
    smem: int = 48 * 1024


@dataclass
class Gpu:
    name: str = "NVIDIA H200"
    capability: tuple[int, int] = (9, 0)
    n_bytes: int = 140 * 10**9
    n_sm: int = 132
    pools: bool = True
    smem: int = 227 * 1024


class CUlaunchAttributeID(IntEnum):
    CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 6


class CUlaunchAttribute:
    def __init__(self) -> None:
        self.id: Any = None
        self.value = types.SimpleNamespace(programmaticStreamSerializationAllowed=0)


class CUlaunchConfig:
    __slots__ = (
        *("gridDimX", "gridDimY", "gridDimZ", "blockDimX", "blockDimY", "blockDimZ"),
        *("sharedMemBytes", "hStream", "attrs", "numAttrs"),
    )


@dataclass
class Stream:
    queue: list[Callable[[], None]] = field(default_factory=list)
    capture: list[Callable[[], None]] | None = None


@dataclass
class Memory:
    array: Any
    n_bytes: int
    pinned: bool


def cubin(*kernels: str) -> bytes:
    """What this driver takes for a module."""
    return b"FAKE " + " ".join(kernels).encode()


class FakeDriver(types.ModuleType):
    """The module itself; `gpus`, `version`, `kernels` may be set, and `errors`, what calls are to return."""

    CUresult = CUresult
    CUdevice_attribute = CUdevice_attribute
    CUfunction_attribute = CUfunction_attribute
    CUstream_flags = CUstream_flags
    CUevent_flags = CUevent_flags
    CUstreamCaptureMode = CUstreamCaptureMode
    CUmemAllocationType = CUmemAllocationType
    CUmemLocationType = CUmemLocationType
    CUmemPool_attribute = CUmemPool_attribute
    CUmemPoolProps = CUmemPoolProps
    CUlaunchAttributeID = CUlaunchAttributeID
    CUlaunchAttribute = CUlaunchAttribute
    CUlaunchConfig = CUlaunchConfig
    cuuint64_t = int
    CU_MEMHOSTALLOC_PORTABLE = 1
    CU_MEMHOSTALLOC_DEVICEMAP = 2

    def __init__(self) -> None:
        super().__init__("cuda.bindings.driver")
        self.gpus = [Gpu()]
        self.version = 13000
        self.library = True
        self.kernels: dict[str, Kernel] = {}
        self.errors: dict[str, CUresult] = {}
        self.calls: list[str] = []
        self.memory: dict[int, Memory] = {}
        self.handles: dict[int, Any] = {}
        self.executed: list[str] = []
        self.clock = 0
        self.overlapping: list[str] = []
        self._sticky = OK
        self._initialized = False
        self._contexts = threading.local()
        self._next = 1

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        return (
            self._guarded(name, value)
            if name.startswith("cu") and callable(value) and name != "cuuint64_t"
            else value
        )

    def _guarded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """As every call of a driver: no library, an injected error, the error that a kernel left behind."""

        def guarded(*args: Any) -> Any:
            self.calls.append(name)
            if not self.library:
                raise RuntimeError("Failed to dlopen libcuda.so.1")
            if name == "cuGetErrorString":
                return function(*args)
            if (error := self.errors.pop(name, OK)) != OK:
                return (error, None)
            if self._sticky != OK:
                if name == "cuCtxPopCurrent":
                    function(*args)
                return (self._sticky, None)
            if not self._initialized and name not in ("cuInit", "cuDriverGetVersion"):
                return (CUresult.CUDA_ERROR_NOT_INITIALIZED, None)
            return function(*args)

        return guarded

    @property
    def stack(self) -> list[Any]:
        """The calling thread's contexts."""
        if not hasattr(self._contexts, "stack"):
            self._contexts.stack = []
        return self._contexts.stack  # type: ignore[no-any-return]

    def _handle(self, thing: Any) -> int:
        self._next += 1
        self.handles[self._next] = thing
        return self._next

    # Devices.

    def cuInit(self, Flags: int) -> tuple[Any, ...]:
        if not self.gpus:
            return (CUresult.CUDA_ERROR_NO_DEVICE,)
        self._initialized = True
        return (OK,)

    def cuGetErrorString(self, error: CUresult) -> tuple[Any, ...]:
        return OK, error.name.removeprefix("CUDA_ERROR_").replace("_", " ").lower().encode()

    def cuDriverGetVersion(self) -> tuple[Any, ...]:
        return OK, self.version

    def cuDeviceGetCount(self) -> tuple[Any, ...]:
        return OK, len(self.gpus)

    def cuDeviceGet(self, ordinal: int) -> tuple[Any, ...]:
        return (OK, ordinal) if ordinal < len(self.gpus) else (CUresult.CUDA_ERROR_INVALID_DEVICE, None)

    def cuDeviceGetName(self, length: int, dev: int) -> tuple[Any, ...]:
        return OK, self.gpus[dev].name.encode().ljust(length, b"\0")

    def cuDeviceTotalMem(self, dev: int) -> tuple[Any, ...]:
        return OK, self.gpus[dev].n_bytes

    def cuDeviceGetAttribute(self, attrib: CUdevice_attribute, dev: int) -> tuple[Any, ...]:
        gpu = self.gpus[dev]
        return OK, {16: gpu.n_sm, 75: gpu.capability[0], 76: gpu.capability[1], 115: int(gpu.pools)}[attrib]

    # Contexts.

    def cuDevicePrimaryCtxRetain(self, dev: int) -> tuple[Any, ...]:
        return OK, self._handle(self.gpus[dev])

    def cuDevicePrimaryCtxRelease(self, dev: int) -> tuple[Any, ...]:
        return (OK,)

    def cuCtxPushCurrent(self, ctx: int) -> tuple[Any, ...]:
        self.stack.append(self.handles[ctx])
        return (OK,)

    def cuCtxPopCurrent(self) -> tuple[Any, ...]:
        self.stack.pop()
        return OK, 0

    def cuCtxSynchronize(self) -> tuple[Any, ...]:
        for thing in list(self.handles.values()):
            if isinstance(thing, Stream):
                self._run(thing)
        return (self._sticky,)

    # Memory.

    def _allocate(self, n_bytes: int, *, pinned: bool) -> tuple[Any, ...]:
        if not self.stack:
            return (CUresult.CUDA_ERROR_INVALID_CONTEXT, None)
        if not pinned and n_bytes > self._free():
            return (CUresult.CUDA_ERROR_OUT_OF_MEMORY, None)
        array = (ctypes.c_uint8 * (n_bytes + 256))()
        address = -(-ctypes.addressof(array) // 256) * 256
        # What a driver gives is not zero.
        ctypes.memset(address, 0xA5, n_bytes)
        self.memory[address] = Memory(array, n_bytes, pinned)
        return OK, address

    def _free(self) -> int:
        used = sum(memory.n_bytes for memory in self.memory.values() if not memory.pinned)
        return self.stack[-1].n_bytes - used  # type: ignore[no-any-return]

    def _give_back(self, address: int, *, pinned: bool) -> None:
        memory = self.memory.pop(address)
        assert memory.pinned == pinned, "freed as the wrong kind of memory"
        ctypes.memset(address, 0x5A, memory.n_bytes)

    def _check(self, address: int, n_bytes: int) -> None:
        """Fail as a GPU that accesses what was not allocated."""
        inside = any(
            start <= address and address + n_bytes <= start + memory.n_bytes
            for start, memory in self.memory.items()
        )
        if not inside:
            raise KernelFault

    def _is_pinned(self, address: int) -> bool:
        return any(
            memory.pinned and start <= address < start + memory.n_bytes
            for start, memory in self.memory.items()
        )

    def view(self, address: int, n: int, dtype: Any = np.float32) -> Any:
        """Memory as a kernel sees it: n values at an address."""
        n_bytes = n * np.dtype(dtype).itemsize
        self._check(address, n_bytes)
        return np.frombuffer((ctypes.c_uint8 * n_bytes).from_address(address), dtype)

    def cuMemGetInfo(self) -> tuple[Any, ...]:
        return OK, self._free(), self.stack[-1].n_bytes

    def cuMemPoolCreate(self, poolProps: CUmemPoolProps) -> tuple[Any, ...]:
        assert poolProps.allocType == CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        assert poolProps.location.type == CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        return OK, self._handle(poolProps)

    def cuMemPoolSetAttribute(self, pool: int, attr: Any, value: Any) -> tuple[Any, ...]:
        assert isinstance(self.handles[pool], CUmemPoolProps)
        return (OK,)

    def cuMemPoolDestroy(self, pool: int) -> tuple[Any, ...]:
        del self.handles[pool]
        return (OK,)

    def cuMemAlloc(self, bytesize: int) -> tuple[Any, ...]:
        return self._allocate(bytesize, pinned=False)

    def cuMemFree(self, dptr: int) -> tuple[Any, ...]:
        self.cuCtxSynchronize()
        self._give_back(dptr, pinned=False)
        return (OK,)

    def cuMemAllocFromPoolAsync(self, bytesize: int, pool: int, hStream: int) -> tuple[Any, ...]:
        # What is on its way back is taken into account, as a pool does.
        self._run(self.handles[hStream])
        return self._allocate(bytesize, pinned=False)

    def cuMemFreeAsync(self, dptr: int, hStream: int) -> tuple[Any, ...]:
        return self._queue(hStream, lambda: self._give_back(dptr, pinned=False))

    def cuMemHostAlloc(self, bytesize: int, Flags: int) -> tuple[Any, ...]:
        return self._allocate(bytesize, pinned=True)

    def cuMemHostGetDevicePointer(self, p: int, Flags: int) -> tuple[Any, ...]:
        return OK, p

    def cuMemFreeHost(self, p: int) -> tuple[Any, ...]:
        self._give_back(p, pinned=True)
        return (OK,)

    def cuMemsetD8Async(self, dstDevice: int, uc: int, N: int, hStream: int) -> tuple[Any, ...]:
        return self._queue(hStream, lambda: self.view(dstDevice, N, np.uint8).fill(uc))

    def cuMemcpyHtoDAsync(
        self, dstDevice: int, srcHost: int, ByteCount: int, hStream: int
    ) -> tuple[Any, ...]:
        pinned = self._is_pinned(srcHost)

        def copy() -> None:
            assert self._is_pinned(srcHost) == pinned, "pinned memory was freed under a copy"
            self._check(dstDevice, ByteCount)
            ctypes.memmove(dstDevice, srcHost, ByteCount)

        return self._queue(hStream, copy)

    def cuMemcpyDtoHAsync(
        self, dstHost: int, srcDevice: int, ByteCount: int, hStream: int
    ) -> tuple[Any, ...]:
        def copy() -> None:
            self._check(srcDevice, ByteCount)
            ctypes.memmove(dstHost, srcDevice, ByteCount)

        return self._queue(hStream, copy)

    def cuMemcpyDtoDAsync(
        self, dstDevice: int, srcDevice: int, ByteCount: int, hStream: int
    ) -> tuple[Any, ...]:
        def copy() -> None:
            self._check(srcDevice, ByteCount)
            self._check(dstDevice, ByteCount)
            ctypes.memmove(dstDevice, srcDevice, ByteCount)
            self.clock += 1

        return self._queue(hStream, copy)

    # Modules and kernels.

    def cuModuleLoadData(self, image: bytes) -> tuple[Any, ...]:
        if not image.startswith(b"FAKE "):
            return (CUresult.CUDA_ERROR_INVALID_IMAGE, None)
        return OK, self._handle(image.decode().split()[1:])

    def cuModuleUnload(self, hmod: int) -> tuple[Any, ...]:
        del self.handles[hmod]
        return (OK,)

    def cuModuleGetFunction(self, hmod: int, name: bytes) -> tuple[Any, ...]:
        if name.decode() not in self.handles[hmod]:
            return (CUresult.CUDA_ERROR_NOT_FOUND, None)
        return OK, name.decode()

    def cuFuncGetParamInfo(self, func: str, paramIndex: int) -> tuple[Any, ...]:
        sizes = self.kernels[func].sizes
        if paramIndex >= len(sizes):
            return (CUresult.CUDA_ERROR_INVALID_VALUE, None, None)
        return OK, sum(sizes[:paramIndex]), sizes[paramIndex]

    def cuFuncSetAttribute(self, hfunc: str, attrib: Any, value: int) -> tuple[Any, ...]:
        if value > self.stack[-1].smem:
            return (CUresult.CUDA_ERROR_INVALID_VALUE,)
        self.kernels[hfunc].smem = value
        return (OK,)

    def cuLaunchKernel(
        self,
        f: str,
        gridDimX: int,
        gridDimY: int,
        gridDimZ: int,
        blockDimX: int,
        blockDimY: int,
        blockDimZ: int,
        sharedMemBytes: int,
        hStream: int,
        kernelParams: int,
        extra: int,
    ) -> tuple[Any, ...]:
        kernel = self.kernels[f]
        if not self.stack:
            return (CUresult.CUDA_ERROR_INVALID_CONTEXT,)
        if sharedMemBytes > kernel.smem or not 0 < blockDimX * blockDimY * blockDimZ <= 1024:
            return (CUresult.CUDA_ERROR_INVALID_VALUE,)
        places = (ctypes.c_uint64 * len(kernel.sizes)).from_address(kernelParams)
        # The driver copies them now.
        given = [ctypes.string_at(place, size) for place, size in zip(places, kernel.sizes, strict=True)]
        grid, block = (gridDimX, gridDimY, gridDimZ), blockDimX

        def run() -> None:
            self.executed.append(f)
            self.clock += 1
            kernel.run(grid, block, sharedMemBytes, *given)

        return self._queue(hStream, run)

    def cuLaunchKernelEx(
        self, config: CUlaunchConfig, f: str, kernelParams: int, extra: int
    ) -> tuple[Any, ...]:
        [attribute] = config.attrs
        assert config.numAttrs == 1
        assert attribute.id == CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        assert attribute.value.programmaticStreamSerializationAllowed == 1
        self.overlapping.append(f)
        grid = config.gridDimX, config.gridDimY, config.gridDimZ
        block = config.blockDimX, config.blockDimY, config.blockDimZ
        return self.cuLaunchKernel(
            f, *grid, *block, config.sharedMemBytes, config.hStream, kernelParams, extra
        )

    # Streams, graphs, events.

    def cuStreamCreate(self, Flags: int) -> tuple[Any, ...]:
        return OK, self._handle(Stream())

    def cuStreamDestroy(self, hStream: int) -> tuple[Any, ...]:
        self._run(self.handles.pop(hStream))
        return (OK,)

    def cuStreamSynchronize(self, hStream: int) -> tuple[Any, ...]:
        self._run(self.handles[hStream])
        return (self._sticky,)

    def cuStreamBeginCapture(self, hStream: int, mode: CUstreamCaptureMode) -> tuple[Any, ...]:
        assert self.handles[hStream].capture is None
        self.handles[hStream].capture = []
        return (OK,)

    def cuStreamEndCapture(self, hStream: int) -> tuple[Any, ...]:
        stream = self.handles[hStream]
        recorded, stream.capture = stream.capture, None
        return OK, self._handle(("graph", recorded))

    def cuGraphInstantiate(self, hGraph: int, flags: int) -> tuple[Any, ...]:
        kind, recorded = self.handles[hGraph]
        assert kind == "graph"
        return OK, self._handle(("exec", list(recorded)))

    def cuGraphDestroy(self, hGraph: int) -> tuple[Any, ...]:
        del self.handles[hGraph]
        return (OK,)

    def cuGraphExecDestroy(self, hGraphExec: int) -> tuple[Any, ...]:
        del self.handles[hGraphExec]
        return (OK,)

    def cuGraphLaunch(self, hGraphExec: int, hStream: int) -> tuple[Any, ...]:
        kind, recorded = self.handles[hGraphExec]
        assert kind == "exec"
        for work in recorded:
            self._queue(hStream, work)
        return (OK,)

    def cuEventCreate(self, Flags: int) -> tuple[Any, ...]:
        return OK, self._handle([0.0])

    def cuEventDestroy(self, hEvent: int) -> tuple[Any, ...]:
        del self.handles[hEvent]
        return (OK,)

    def cuEventRecord(self, hEvent: int, hStream: int) -> tuple[Any, ...]:
        """Every kernel takes a millisecond, and so does a copy within the device."""
        event = self.handles[hEvent]

        def record() -> None:
            event[0] = float(self.clock)

        return self._queue(hStream, record)

    def cuEventElapsedTime(self, hStart: int, hEnd: int) -> tuple[Any, ...]:
        return OK, self.handles[hEnd][0] - self.handles[hStart][0]

    def _queue(self, handle: int, work: Callable[[], None]) -> tuple[Any, ...]:
        if not self.stack:
            return (CUresult.CUDA_ERROR_INVALID_CONTEXT,)
        stream = self.handles[handle]
        (stream.queue if stream.capture is None else stream.capture).append(work)
        return (OK,)

    def _run(self, stream: Stream) -> None:
        queue, stream.queue = stream.queue, []
        for work in queue:
            if self._sticky != OK:
                return
            try:
                work()
            except KernelFault as fault:
                self._sticky = fault.error
