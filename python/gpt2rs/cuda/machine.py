"""What kernels run on: the narrow place between the model and a GPU, or its stand-in.

Everything above it (weights, plan, model, sessions) is tested by running it over the kernels' own source
compiled as C++; everything below it (context, memory, graphs, errors) against a fake driver.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Buffer(Protocol):
    """Device memory; freed with its last reference, or by `free`."""

    @property
    def address(self) -> int:
        """Where it lies on the device; aligned to 256 bytes."""

    @property
    def n_bytes(self) -> int:
        """Its size in bytes."""

    def free(self) -> None:
        """Free the memory ahead of the last reference; the buffer is not to be used afterwards."""


@dataclass(frozen=True)
class Launch:
    """One kernel over one grid.

    args: in the kernel's order; a `Buffer` is passed as a 64-bit address, an int as a 32-bit signed integer,
    a float as a float32.  grid and block count blocks and threads, smem the bytes of dynamic shared memory.
    overlap: it may begin before the launch ahead of it has ended, since it waits for that by itself
    (`previous_done` of prim.cuh), as all kernels of the package do.
    """

    kernel: str
    grid: tuple[int, int, int]
    block: int
    smem: int
    args: tuple[Buffer | int | float, ...]
    overlap: bool = True


class Graph(Protocol):
    """Launches recorded once and replayed as one."""

    def launch(self) -> None:
        """Queue all of them, in order, behind what was queued before."""


class Machine(Protocol):
    """A device with one queue: calls take effect in the order they are made in."""

    @property
    def name(self) -> str:
        """What the device calls itself."""

    @property
    def device(self) -> str:
        """Where it is: "cuda:N"."""

    @property
    def arch(self) -> str:
        """What kernels are compiled for, such as "sm_90"."""

    @property
    def n_sm(self) -> int:
        """Number of streaming multiprocessors."""

    def alloc(self, n_bytes: int) -> Buffer:
        """Device memory, all zero; RuntimeError, with what was asked for and what is free, where it lacks."""

    def upload(self, buffer: Buffer, data: NDArray[np.generic], offset: int = 0) -> None:
        """Copy a contiguous array to `offset` bytes into `buffer`; the array may be reused on return."""

    def download(self, buffer: Buffer, out: NDArray[np.generic], offset: int = 0) -> None:
        """Fill a contiguous array from `offset` bytes into `buffer`, once all queued before is done."""

    def launch(self, launch: Launch) -> None:
        """Queue one kernel."""

    def graph(self, launches: Sequence[Launch]) -> Graph:
        """Record launches; the graph keeps their buffers alive."""

    def mailbox(self, n_bytes: int) -> Mailbox:
        """Host memory that kernels write to."""

    def synchronize(self) -> None:
        """Wait for all that was queued; RuntimeError where a kernel failed."""


class Mailbox(Buffer, Protocol):
    """Pinned host memory, mapped into the device's address space."""

    @property
    def host(self) -> NDArray[np.uint8]:
        """The same bytes, as the host sees them; what kernels wrote is there after `Machine.synchronize`."""
