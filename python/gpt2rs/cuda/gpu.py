"""A GPU as the machine that a model's kernels run on: memory, one queue, graphs, and what a failure means.

The device's primary context is used, so that other CUDA libraries in the process share it, and is current
only during a call.  Memory comes from a pool and is freed in the queue's order, so a buffer may be given up
while kernels that use it are still waiting.  Whatever fails but a request for memory ends the machine: each
later call raises the same sentence, since what the queue has done by then is unknown.
"""

from __future__ import annotations

import ctypes
import os
import struct
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import compiler
from .availability import Device, Unavailable, in_units
from .driver import DriverError
from .handles import STAGING, Handles
from .machine import Buffer, Launch

# What a kernel gets without asking, in bytes of dynamic shared memory.
_SMEM_UNASKED = 48 * 1024
_ALIGNMENT = 256


def open_gpu(device: Device, n_bytes: int = 0) -> Gpu:
    """A GPU with the package's kernels, compiled for it or taken from the cache.

    n_bytes: what must be free of its memory.  `Unavailable` where there is less, or it can't be used.
    """
    try:
        arch = compiler.architecture(device.major, device.minor)
        cubins = compiler.build(compiler.package_sources(), arch)
    except RuntimeError as error:
        raise Unavailable(str(error)) from error
    gpu = Gpu(device, arch, cubins)
    free, total = gpu.memory()
    if n_bytes > free:
        raise Unavailable(
            f"{device} has {in_units(free)} of {in_units(total)} of memory free; the weights and the keys "
            f"and values of one sequence take {in_units(n_bytes)}"
        )
    return gpu


class Gpu:
    """One GPU; see `machine.Machine`.  Calls from several threads take turns."""

    def __init__(self, device: Device, arch: str, cubins: Sequence[bytes]) -> None:
        """Take the device's primary context and load the kernels; RuntimeError where either fails."""
        self._device = device
        self.device = f"cuda:{device.ordinal}"
        self.arch = arch
        # Whether launches may begin early where they say so; PTX has it from Hopper on.
        self.overlap = device.major >= 9
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._failure: str | None = None
        self._kernels: dict[str, _Kernel] = {}
        self._handles = handles = Handles(device.ordinal)
        self._cu = handles.cu
        weakref.finalize(self, handles.close).atexit = False
        try:
            handles.open(cubins)
        except DriverError as error:
            handles.close()
            raise Unavailable(f"{device} can't be used: {error}") from error
        self._staged = 0

    @property
    def name(self) -> str:
        """What the driver calls it, such as "NVIDIA H200"."""
        return self._device.name

    @property
    def n_sm(self) -> int:
        """Number of streaming multiprocessors."""
        return self._handles.n_sm

    @property
    def usable(self) -> bool:
        """Whether it has not failed, and is this process's own."""
        return self._failure is None and os.getpid() == self._pid

    def memory(self) -> tuple[int, int]:
        """Bytes of memory that are free, and in all."""
        with self._turn():
            free, total = self._done(self._cu.cuMemGetInfo())
            return int(free), int(total)

    def alloc(self, n_bytes: int) -> DeviceBuffer:
        """Device memory, all zero; RuntimeError, with what was asked for and what is free, where it lacks."""
        with self._turn():
            size = max(n_bytes, 1)
            if self._handles.pool is None:
                found = self._cu.cuMemAlloc(size)
            else:
                found = self._cu.cuMemAllocFromPoolAsync(size, self._handles.pool, self._handles.stream)
            address = int(self._taken(found, n_bytes))
            memory = _Allocation(self, address, self._handles.free)
            self._done(self._cu.cuMemsetD8Async(address, 0, size, self._handles.stream))
            return DeviceBuffer(memory, n_bytes)

    def mailbox(self, n_bytes: int) -> PinnedMailbox:
        """Host memory, all zero, that kernels write to; RuntimeError where it lacks."""
        with self._turn():
            cu = self._cu
            flags = cu.CU_MEMHOSTALLOC_PORTABLE | cu.CU_MEMHOSTALLOC_DEVICEMAP
            host = int(self._taken(cu.cuMemHostAlloc(max(n_bytes, 1), flags), n_bytes))
            memory = _Allocation(self, host, self._handles.free_host)
            ctypes.memset(host, 0, n_bytes)
            return PinnedMailbox(memory, int(self._done(cu.cuMemHostGetDevicePointer(host, 0))), n_bytes)

    def upload(self, buffer: Buffer, data: NDArray[np.generic], offset: int = 0) -> None:
        """Copy a contiguous array to `offset` bytes into `buffer`; the array may be reused on return."""
        _check_range(buffer, data, offset)
        if data.nbytes == 0:
            return
        with self._turn():
            target, source = buffer.address + offset, data.ctypes.data
            stream = self._handles.stream
            if data.nbytes <= STAGING // 4:
                staged = self._staging(data.nbytes)
                ctypes.memmove(staged, source, data.nbytes)
                self._done(self._cu.cuMemcpyHtoDAsync(target, staged, data.nbytes, stream))
            else:
                self._done(self._cu.cuMemcpyHtoDAsync(target, source, data.nbytes, stream))
                self._wait()

    def download(self, buffer: Buffer, out: NDArray[np.generic], offset: int = 0) -> None:
        """Fill a contiguous array from `offset` bytes into `buffer`, once all queued before is done."""
        _check_range(buffer, out, offset)
        if not out.flags.writeable:
            raise ValueError("the array to download into is read-only")
        with self._turn():
            if out.nbytes:
                source, stream = buffer.address + offset, self._handles.stream
                self._done(self._cu.cuMemcpyDtoHAsync(out.ctypes.data, source, out.nbytes, stream))
            self._wait()

    def launch(self, launch: Launch) -> None:
        """Queue one kernel."""
        with self._turn():
            self._launch(launch, self._handles.stream)

    def graph(self, launches: Sequence[Launch]) -> CapturedGraph:
        """Record launches; the graph keeps their buffers alive, also past their `free`."""
        with self._turn():
            cu, stream = self._cu, self._handles.capture_stream
            memory = [
                arg.memory
                for launch in launches
                for arg in launch.args
                if isinstance(arg, DeviceBuffer | PinnedMailbox)
            ]
            # Relaxed: another thread, or the end of some buffer, may call the driver meanwhile.
            self._done(cu.cuStreamBeginCapture(stream, cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED))
            try:
                for launch in launches:
                    self._launch(launch, stream)
            except BaseException:
                _, recorded = cu.cuStreamEndCapture(stream)
                if int(recorded or 0):
                    cu.cuGraphDestroy(recorded)
                raise
            recorded = self._done(cu.cuStreamEndCapture(stream))
            try:
                runnable = self._done(cu.cuGraphInstantiate(recorded, 0))
            finally:
                cu.cuGraphDestroy(recorded)
            return CapturedGraph(self, runnable, memory)

    def synchronize(self) -> None:
        """Wait for all that was queued; RuntimeError where a kernel failed."""
        with self._turn():
            self._wait()

    def replay(self, graph: CapturedGraph) -> None:
        """Queue a graph; what `CapturedGraph.launch` does."""
        with self._turn():
            self._done(self._cu.cuGraphLaunch(graph.runnable, self._handles.stream))

    def copy(self, target: Buffer, source: Buffer) -> None:
        """Queue a copy of one buffer into another of the same size."""
        if target.n_bytes != source.n_bytes:
            raise ValueError(f"a buffer of {source.n_bytes} bytes is not copied into one of {target.n_bytes}")
        with self._turn():
            self._done(
                self._cu.cuMemcpyDtoDAsync(
                    target.address, source.address, source.n_bytes, self._handles.stream
                )
            )

    @contextmanager
    def timed(self) -> Iterator[Callable[[], float]]:
        """Times what is queued inside: gives a function that waits for it and returns the seconds."""
        cu, stream = self._cu, self._handles.stream
        with self._turn():
            events = [self._done(cu.cuEventCreate(cu.CUevent_flags.CU_EVENT_DEFAULT)) for _ in range(2)]
            self._done(cu.cuEventRecord(events[0], stream))

        def seconds() -> float:
            with self._turn():
                self._wait()
                milliseconds = self._done(cu.cuEventElapsedTime(*events))
                for event in events:
                    cu.cuEventDestroy(event)
                return float(milliseconds) / 1e3

        yield seconds
        with self._turn():
            self._done(cu.cuEventRecord(events[1], stream))

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One thread's turn at the queue, with the context current; refuses a machine that has failed."""
        if os.getpid() != self._pid:
            raise RuntimeError(
                f"{self._device} was opened before this process was forked off: load the model in it"
            )
        with self._lock:
            if self._failure is not None:
                raise RuntimeError(self._failure)
            self._done(self._cu.cuCtxPushCurrent(self._handles.context))
            try:
                yield
            finally:
                self._cu.cuCtxPopCurrent()

    def _launch(self, launch: Launch, stream: Any) -> None:
        kernel = self._kernel(launch.kernel)
        kernel.check(launch)
        if launch.smem > kernel.smem:
            limit = self._cu.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            what = f'kernel "{kernel.name}" does not get {launch.smem} bytes of shared memory'
            self._done(self._cu.cuFuncSetAttribute(kernel.function, limit, launch.smem), what)
            kernel.smem = launch.smem
        # Each argument in a place of 8 bytes, and a list of the places.
        values = bytearray(8 * max(len(launch.args), 1))
        for i, arg in enumerate(launch.args):
            struct.pack_into(
                _layout(arg), values, 8 * i, arg if isinstance(arg, int | float) else arg.address
            )
        held = (ctypes.c_char * len(values)).from_buffer(values)
        start = ctypes.addressof(held)
        places = (ctypes.c_uint64 * max(len(launch.args), 1))(*range(start, start + 8 * len(launch.args), 8))
        self._done(
            self._queued(kernel, launch, stream, ctypes.addressof(places)),
            f'kernel "{kernel.name}" was not launched',
        )

    def _queued(self, kernel: _Kernel, launch: Launch, stream: Any, places: int) -> Any:
        cu = self._cu
        if not (launch.overlap and self.overlap):
            return cu.cuLaunchKernel(
                kernel.function, *launch.grid, launch.block, 1, 1, launch.smem, stream, places, 0
            )
        config, attribute = cu.CUlaunchConfig(), cu.CUlaunchAttribute()
        attribute.id = cu.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config.gridDimX, config.gridDimY, config.gridDimZ = launch.grid
        config.blockDimX, config.blockDimY, config.blockDimZ = launch.block, 1, 1
        config.sharedMemBytes, config.hStream = launch.smem, stream
        config.attrs, config.numAttrs = [attribute], 1
        return cu.cuLaunchKernelEx(config, kernel.function, places, 0)

    def _kernel(self, name: str) -> _Kernel:
        if name not in self._kernels:
            self._kernels[name] = _Kernel(name, *self._handles.find(name))
        return self._kernels[name]

    def _staging(self, n_bytes: int) -> int:
        """Pinned memory to upload from, free of what is still on its way."""
        if self._staged + n_bytes > STAGING:
            self._wait()
            self._staged = 0
        place = self._handles.staging + self._staged
        self._staged += -(-n_bytes // _ALIGNMENT) * _ALIGNMENT
        return place

    def _wait(self) -> None:
        self._done(self._cu.cuStreamSynchronize(self._handles.stream), "a kernel failed")

    def _done(self, outcome: tuple[Any, ...], what: str = "a driver call failed") -> Any:
        """The value of a driver call that went well; else the end of this machine."""
        error, *values = outcome
        if int(error) != 0:
            # A context that a kernel has broken says so to every call, in this process for good.
            broken = self._cu.cuCtxSynchronize()[0] == error
            remedy = "start a new process to use this GPU again" if broken else "load the model again"
            self._failure = f"{what} on {self._device}: {DriverError.of(error)}; {remedy}"
            raise RuntimeError(self._failure)
        return values[0] if len(values) == 1 else tuple(values)

    def _taken(self, outcome: tuple[Any, ...], n_bytes: int) -> Any:
        """The value of a request for memory, which may be refused without any harm."""
        if outcome[0] != self._cu.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            return self._done(outcome)
        free, total = self._done(self._cu.cuMemGetInfo())
        raise Unavailable(
            f"out of memory on {self._device}: {in_units(n_bytes)} were asked for, "
            f"{in_units(int(free))} of {in_units(int(total))} are free"
        )


class DeviceBuffer:
    """Device memory; see `machine.Buffer`."""

    def __init__(self, memory: _Allocation, n_bytes: int) -> None:
        """Made by `Gpu.alloc`."""
        self._memory: _Allocation | None = memory
        self._n_bytes = n_bytes

    @property
    def memory(self) -> _Allocation:
        """What is freed with the last that holds it; ValueError after `free`."""
        if self._memory is None:
            raise ValueError("the buffer was freed")
        return self._memory

    @property
    def address(self) -> int:
        """Where it lies on the device; ValueError after `free`."""
        return self.memory.address

    @property
    def n_bytes(self) -> int:
        """Its size in bytes."""
        return self._n_bytes

    def free(self) -> None:
        """Free the memory once all that is queued has run and no graph uses it."""
        self._memory = None


class PinnedMailbox(DeviceBuffer):
    """Pinned host memory, mapped into the device's address space; see `machine.Mailbox`."""

    def __init__(self, memory: _Allocation, address: int, n_bytes: int) -> None:
        """Made by `Gpu.mailbox`; memory is the host's side of it, address the device's."""
        super().__init__(memory, n_bytes)
        self._address = address

    @property
    def address(self) -> int:
        """Where kernels find it; ValueError after `free`."""
        _ = self.memory
        return self._address

    @property
    def host(self) -> NDArray[np.uint8]:
        """(n_bytes,) uint8, the same bytes as the host sees them."""
        held = (ctypes.c_uint8 * self.n_bytes).from_address(self.memory.address)
        # The view keeps the memory, not only its address.
        held._memory = self.memory  # type: ignore[attr-defined]
        return np.frombuffer(memoryview(held), np.uint8)


class CapturedGraph:
    """Launches recorded once and replayed as one; see `machine.Graph`."""

    def __init__(self, gpu: Gpu, runnable: Any, memory: list[_Allocation]) -> None:
        """Made by `Gpu.graph`."""
        self.runnable = runnable
        self._gpu = gpu
        self._memory = memory
        # The finalizer holds the memory, too: it is freed behind the graph.
        weakref.finalize(self, _end_graph, gpu, runnable, memory).atexit = False

    def launch(self) -> None:
        """Queue all launches, in order, behind what was queued before."""
        self._gpu.replay(self)


class _Allocation:
    """Memory that goes back when nothing refers to it any more, or with the process."""

    def __init__(self, gpu: Gpu, address: int, free: Any) -> None:
        self.address = address
        weakref.finalize(self, _end_memory, gpu, free, address).atexit = False


def _end_memory(gpu: Gpu, free: Any, address: int) -> None:
    if gpu.usable:
        free(address)


def _end_graph(gpu: Gpu, runnable: Any, memory: list[_Allocation]) -> None:
    if gpu.usable:
        gpu._handles.end_graph(runnable)
    memory.clear()


class _Kernel:
    """A kernel that was found, and the sizes of its parameters."""

    def __init__(self, name: str, function: Any, sizes: list[int]) -> None:
        self.name = name
        self.function = function
        self.sizes = sizes
        self.smem = _SMEM_UNASKED

    def check(self, launch: Launch) -> None:
        """Hold the arguments to the parameters: the driver reads as many bytes as these have."""
        sizes = [struct.calcsize(_layout(arg)) for arg in launch.args]
        if sizes != self.sizes:
            raise ValueError(
                f'kernel "{self.name}" has parameters of {self.sizes} bytes; its arguments have {sizes}'
            )


def _layout(arg: Buffer | int | float) -> str:
    """How an argument lies in memory, as `struct` spells it."""
    if isinstance(arg, float):
        return "<f"
    return "<i" if isinstance(arg, int) else "<Q"


def _check_range(buffer: Buffer, data: NDArray[np.generic], offset: int) -> None:
    if not data.flags.c_contiguous:
        raise ValueError("the array to copy is not contiguous")
    if not 0 <= offset <= buffer.n_bytes - data.nbytes:
        raise ValueError(
            f"{data.nbytes} bytes at offset {offset} don't lie in a buffer of {buffer.n_bytes} bytes"
        )
