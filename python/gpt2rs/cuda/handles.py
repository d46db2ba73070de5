"""What a GPU holds of the driver's: context, queues, pool, modules; taken and given back together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from .driver import api, call

# Bytes of pinned memory through which small arrays go, so that an upload need not wait for the queue.
STAGING = 1 << 20


class Handles:
    """What a GPU holds of the driver's for as long as it is used; apart, so that its end needs no `Gpu`."""

    def __init__(self, ordinal: int) -> None:
        """Nothing is taken yet."""
        self.cu = api()
        self.n_sm = 0
        self.context: Any = None
        self.pool: Any = None
        self.staging = 0
        self._ordinal = ordinal
        self._pid = os.getpid()
        self._modules: list[Any] = []
        self._undo: list[tuple[Any, ...]] = []

    def open(self, cubins: Sequence[bytes]) -> None:
        """Take everything; `DriverError` where something is refused, which `close` then leaves out."""
        cu = self.cu
        device = call(cu.cuDeviceGet, self._ordinal)
        attribute = cu.CUdevice_attribute
        self.n_sm = call(cu.cuDeviceGetAttribute, attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, device)
        pools = call(cu.cuDeviceGetAttribute, attribute.CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED, device)
        self.context = call(cu.cuDevicePrimaryCtxRetain, device)
        self._device = device
        call(cu.cuCtxPushCurrent, self.context)
        try:
            # Not ordered with the legacy default stream, which other libraries may use.
            self.stream = self._stream()
            self.capture_stream = self._stream()
            if pools:
                self.pool = self._pool()
            self.staging = int(call(cu.cuMemHostAlloc, STAGING, cu.CU_MEMHOSTALLOC_PORTABLE))
            self._undo.append((cu.cuMemFreeHost, self.staging))
            for cubin in cubins:
                self._modules.append(call(cu.cuModuleLoadData, cubin))
                self._undo.append((cu.cuModuleUnload, self._modules[-1]))
            # Before anything goes back: what is queued may still use it.
            self._undo.append((cu.cuStreamSynchronize, self.stream))
        finally:
            cu.cuCtxPopCurrent()

    def close(self) -> None:
        """Give everything back, last first; what a broken context refuses goes with the process."""
        if os.getpid() == self._pid and self.context is not None:
            self._quietly(*reversed(self._undo))
            self.cu.cuDevicePrimaryCtxRelease(self._device)
        self.context = None

    def find(self, name: str) -> tuple[Any, list[int]]:
        """A kernel, and the sizes of its parameters in bytes; ValueError where no module has it."""
        cu = self.cu
        for module in self._modules:
            error, function = cu.cuModuleGetFunction(module, name.encode())
            if int(error) == 0:
                break
        else:
            raise ValueError(f"there is no kernel {name!r}")
        sizes: list[int] = []
        while True:
            error, _, size = cu.cuFuncGetParamInfo(function, len(sizes))
            if int(error) != 0:
                return function, sizes
            sizes.append(int(size))

    def free(self, address: int) -> None:
        """Give device memory back, behind what is queued."""
        if self.pool is None:
            self._quietly((self.cu.cuMemFree, address))
        else:
            self._quietly((self.cu.cuMemFreeAsync, address, self.stream))

    def free_host(self, address: int) -> None:
        """Give pinned memory back; kernels may still be writing to it."""
        self._quietly((self.cu.cuStreamSynchronize, self.stream), (self.cu.cuMemFreeHost, address))

    def end_graph(self, runnable: Any) -> None:
        """Give a graph back."""
        self._quietly((self.cu.cuGraphExecDestroy, runnable))

    def _quietly(self, *calls: tuple[Any, ...]) -> None:
        """Make calls that give something back; what a broken context refuses goes with the process."""
        if int(self.cu.cuCtxPushCurrent(self.context)[0]) == 0:
            for function, *args in calls:
                function(*args)
            self.cu.cuCtxPopCurrent()

    def _stream(self) -> Any:
        stream = call(self.cu.cuStreamCreate, self.cu.CUstream_flags.CU_STREAM_NON_BLOCKING)
        self._undo.append((self.cu.cuStreamDestroy, stream))
        return stream

    def _pool(self) -> Any:
        """A pool of its own, which keeps what is freed for the next request."""
        cu = self.cu
        properties = cu.CUmemPoolProps()
        properties.allocType = cu.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.location.type = cu.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        properties.location.id = self._ordinal
        pool = call(cu.cuMemPoolCreate, properties)
        self._undo.append((cu.cuMemPoolDestroy, pool))
        threshold = cu.CUmemPool_attribute.CU_MEMPOOL_ATTR_RELEASE_THRESHOLD
        call(cu.cuMemPoolSetAttribute, pool, threshold, cu.cuuint64_t(2**64 - 1))
        return pool
