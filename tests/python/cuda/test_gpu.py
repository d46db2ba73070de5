"""What a GPU does for the model above it, over the fake driver: memory, order, graphs, failures, the end."""

from __future__ import annotations

import dataclasses
import gc
import os
import struct
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fake_driver import CUresult, FakeDriver, Kernel, KernelFault, cubin

from gpt2rs.cuda.availability import Device
from gpt2rs.cuda.gpu import Gpu
from gpt2rs.cuda.machine import Launch

DEVICE = Device(0, "NVIDIA H200", 9, 0, 140 * 10**9)
F32, U8 = np.float32, np.uint8


@pytest.fixture
def gpu(driver: FakeDriver) -> Gpu:
    """With kernels to add a multiple of one vector to another, to count, and to fail."""

    def axpy(grid: tuple[int, ...], block: int, smem: int, y: bytes, x: bytes, a: bytes, n: bytes) -> None:
        (count,), (factor,) = struct.unpack("<i", n), struct.unpack("<f", a)
        assert (grid, block) == ((-(-count // 128), 1, 1), 128)
        driver.view(int.from_bytes(y, "little"), count)[:] += F32(factor) * driver.view(
            int.from_bytes(x, "little"), count
        )

    def fail(grid: tuple[int, ...], block: int, smem: int) -> None:
        raise KernelFault

    driver.kernels = {
        "axpy": Kernel((8, 8, 4, 4), axpy),
        "count": Kernel((8,), counting(driver)),
        "fail": Kernel((), fail),
    }
    driver.cuInit(0)
    return Gpu(DEVICE, "sm_90", [cubin("count"), cubin("axpy", "fail")])


def counting(driver: FakeDriver) -> Callable[..., None]:
    """A kernel that adds 1 to an int32."""

    def count(grid: tuple[int, ...], block: int, smem: int, where: bytes) -> None:
        driver.view(int.from_bytes(where, "little"), 1, np.int32)[0] += 1

    return count


def launch_axpy(y: object, x: object, a: float, n: int) -> Launch:
    return Launch("axpy", (-(-n // 128), 1, 1), 128, 0, (y, x, a, n))  # type: ignore[arg-type]


def launch_count(where: object) -> Launch:
    return Launch("count", (1, 1, 1), 32, 0, (where,))  # type: ignore[arg-type]


FAIL = Launch("fail", (1, 1, 1), 32, 0, ())


def put(gpu: Gpu, values: np.ndarray) -> object:
    buffer = gpu.alloc(values.nbytes)
    gpu.upload(buffer, values)
    return buffer


def got(gpu: Gpu, buffer: object, n: int, dtype: type = F32) -> np.ndarray:
    out = np.empty(n, dtype)
    gpu.download(buffer, out)  # type: ignore[arg-type]
    return out


class TestMemory:
    def test_is_zero_and_aligned(self, gpu: Gpu) -> None:
        for n_bytes in (1, 100, 5000):
            buffer = gpu.alloc(n_bytes)
            assert buffer.n_bytes == n_bytes
            assert buffer.address % 256 == 0
            assert not got(gpu, buffer, n_bytes, U8).any()

    def test_may_be_empty(self, gpu: Gpu) -> None:
        empty = gpu.alloc(0)
        gpu.upload(empty, np.empty(0, F32))
        assert got(gpu, empty, 0).size == 0

    def test_goes_there_and_back_at_an_offset(self, gpu: Gpu) -> None:
        buffer = gpu.alloc(40)
        gpu.upload(buffer, np.arange(4, dtype=F32), offset=8)
        assert got(gpu, buffer, 10).tolist() == [0, 0, 0, 1, 2, 3, 0, 0, 0, 0]
        out = np.empty(2, F32)
        gpu.download(buffer, out, offset=16)
        assert out.tolist() == [2, 3]

    def test_an_array_may_be_reused_after_its_upload_small_or_large(self, gpu: Gpu) -> None:
        """The fake copies when somebody waits, so an upload that only queues the copy shows."""
        for n in (10, 1 << 20):
            values = np.ones(n, F32)
            buffer = put(gpu, values)
            values[:] = 2
            assert (got(gpu, buffer, n) == 1).all()

    def test_many_small_uploads_don_t_overwrite_each_other_on_the_way(self, gpu: Gpu) -> None:
        """More than the staging memory holds, with nothing that waits in between."""
        buffers = [gpu.alloc(200_000) for _ in range(12)]
        gpu.synchronize()
        for i, buffer in enumerate(buffers):
            gpu.upload(buffer, np.full(200_000, i, U8))
        for i, buffer in enumerate(buffers):
            assert (got(gpu, buffer, 200_000, U8) == i).all()

    def test_small_uploads_don_t_wait(self, gpu: Gpu, driver: FakeDriver) -> None:
        buffer = gpu.alloc(16)
        driver.calls.clear()
        gpu.upload(buffer, np.ones(4, F32))
        assert "cuStreamSynchronize" not in driver.calls

    @pytest.mark.parametrize(("n", "offset"), [(11, 0), (10, 4), (1, -4), (1, 40)])
    def test_refuses_a_copy_beyond_its_end(self, gpu: Gpu, n: int, offset: int) -> None:
        buffer = gpu.alloc(40)
        message = f"{4 * n} bytes at offset {offset} don't lie in a buffer of 40 bytes"
        with pytest.raises(ValueError, match=message):
            gpu.upload(buffer, np.zeros(n, F32), offset)
        with pytest.raises(ValueError, match=message):
            gpu.download(buffer, np.zeros(n, F32), offset)

    def test_refuses_arrays_that_can_t_be_copied_to(self, gpu: Gpu) -> None:
        buffer = gpu.alloc(64)
        with pytest.raises(ValueError, match="not contiguous"):
            gpu.upload(buffer, np.zeros((4, 4), F32)[:, ::2])
        constant = np.zeros(4, F32)
        constant.flags.writeable = False
        gpu.upload(buffer, constant)
        with pytest.raises(ValueError, match="read-only"):
            gpu.download(buffer, constant)

    @pytest.mark.parametrize("pools", [True, False])
    def test_goes_back_with_its_last_reference_or_when_freed(self, driver: FakeDriver, pools: bool) -> None:
        driver.gpus[0].pools = pools
        driver.cuInit(0)
        gpu = Gpu(DEVICE, "sm_90", [])
        before = gpu.memory()[0]
        first, second = gpu.alloc(1000), gpu.alloc(2000)
        assert gpu.memory()[0] == before - 3000
        second.free()
        gpu.synchronize()
        assert gpu.memory()[0] == before - 1000
        del first
        gc.collect()
        gpu.synchronize()
        assert gpu.memory()[0] == before
        with pytest.raises(ValueError, match="the buffer was freed"):
            _ = second.address
        second.free()

    def test_that_lacks_is_an_error_with_the_numbers_and_does_no_harm(self, driver: FakeDriver) -> None:
        driver.gpus[0].n_bytes = 10_000_000
        driver.cuInit(0)
        gpu = Gpu(DEVICE, "sm_90", [])
        held = gpu.alloc(8_000_000)
        message = (
            r"out of memory on cuda:0 \(NVIDIA H200\): 3.0 MB were asked for, 2.0 MB of 10.0 MB are free"
        )
        with pytest.raises(RuntimeError, match=message):
            gpu.alloc(3_000_000)
        held.free()
        assert gpu.alloc(3_000_000).n_bytes == 3_000_000


class TestKernels:
    def test_get_their_arguments_as_they_lie_in_memory(self, gpu: Gpu) -> None:
        x = np.arange(300, dtype=F32)
        y, a = put(gpu, np.ones(300, F32)), 0.1
        gpu.launch(launch_axpy(y, put(gpu, x), a, 300))
        assert (got(gpu, y, 300) == F32(1) + F32(a) * x).all()

    def test_take_effect_in_order(self, gpu: Gpu) -> None:
        x, y = put(gpu, np.ones(4, F32)), put(gpu, np.zeros(4, F32))
        for _ in range(3):
            gpu.launch(launch_axpy(y, x, 1.0, 4))
            gpu.launch(launch_axpy(x, y, 1.0, 4))
        assert (got(gpu, y, 4)[0], got(gpu, x, 4)[0]) == (8, 13)

    def test_use_a_buffer_that_was_given_up_while_they_waited(self, gpu: Gpu) -> None:
        y, x = put(gpu, np.zeros(4, F32)), put(gpu, np.ones(4, F32))
        gpu.launch(launch_axpy(y, x, 2.0, 4))
        x.free()  # type: ignore[attr-defined]
        assert (got(gpu, y, 4) == 2).all()

    def test_that_nobody_knows_are_refused_by_name(self, gpu: Gpu) -> None:
        with pytest.raises(ValueError, match="there is no kernel 'gelu'"):
            gpu.launch(Launch("gelu", (1, 1, 1), 32, 0, ()))

    @pytest.mark.parametrize("args", [(), (1,), (1.0,), ("where", 1)])
    def test_are_held_to_the_sizes_of_their_parameters(self, gpu: Gpu, args: tuple[object, ...]) -> None:
        where = gpu.alloc(4)
        given = tuple(where if arg == "where" else arg for arg in args)
        with pytest.raises(ValueError, match=r'kernel "count" has parameters of \[8\] bytes'):
            gpu.launch(Launch("count", (1, 1, 1), 32, 0, given))  # type: ignore[arg-type]
        gpu.launch(launch_count(where))
        assert got(gpu, where, 1, np.int32)[0] == 1

    def test_get_much_shared_memory_after_asking(self, gpu: Gpu, driver: FakeDriver) -> None:
        where = gpu.alloc(4)
        for smem in (0, 48 * 1024, 100_000, 100_000, 60_000, 200_000):
            gpu.launch(Launch("count", (1, 1, 1), 32, smem, (where,)))
        assert got(gpu, where, 1, np.int32)[0] == 6
        assert driver.calls.count("cuFuncSetAttribute") == 2

    def test_that_ask_for_too_much_are_refused(self, gpu: Gpu) -> None:
        message = 'kernel "count" does not get 300000 bytes of shared memory on cuda:0 .*INVALID_VALUE'
        with pytest.raises(RuntimeError, match=message):
            gpu.launch(Launch("count", (1, 1, 1), 32, 300_000, (gpu.alloc(4),)))

    @pytest.mark.parametrize("capability", [(9, 0), (8, 9)])
    def test_may_begin_early_where_the_gpu_can(self, driver: FakeDriver, capability: tuple[int, int]) -> None:
        driver.kernels = {"count": Kernel((8,), counting(driver))}
        driver.cuInit(0)
        gpu = Gpu(Device(0, "a GPU", *capability, 10**6), "", [cubin("count")])
        where = gpu.alloc(4)
        early = launch_count(where)
        late = dataclasses.replace(early, overlap=False)
        gpu.launch(late)
        gpu.launch(early)
        gpu.graph([late, early]).launch()
        assert got(gpu, where, 1, np.int32)[0] == 4
        assert driver.overlapping == (["count"] * 2 if capability >= (9, 0) else [])

    def test_may_be_given_a_mailbox(self, gpu: Gpu) -> None:
        box = gpu.mailbox(8)
        assert box.host.tolist() == [0] * 8
        gpu.launch(launch_count(box))
        gpu.launch(launch_count(box))
        gpu.synchronize()
        assert box.host.view(np.int32).tolist() == [2, 0]

    def test_may_be_launched_from_several_threads(self, gpu: Gpu) -> None:
        where = gpu.alloc(4)
        threads = [
            threading.Thread(target=lambda: [gpu.launch(launch_count(where)) for _ in range(50)])
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert got(gpu, where, 1, np.int32)[0] == 200


class TestMailbox:
    def test_lasts_as_long_as_somebody_looks_at_it(self, gpu: Gpu, driver: FakeDriver) -> None:
        box = gpu.mailbox(8)
        view, host = box.host[2:4], box.memory.address
        del box
        gc.collect()
        assert host in driver.memory
        view[:] = 1
        del view
        gc.collect()
        assert host not in driver.memory

    def test_is_not_freed_while_a_kernel_may_write_to_it(self, gpu: Gpu, driver: FakeDriver) -> None:
        box = gpu.mailbox(8)
        gpu.launch(launch_count(box))
        box.free()
        gpu.synchronize()
        assert driver.executed == ["count"]


class TestGraphs:
    def test_do_nothing_until_launched_and_then_all(self, gpu: Gpu) -> None:
        y, x = put(gpu, np.zeros(4, F32)), put(gpu, np.ones(4, F32))
        graph = gpu.graph([launch_axpy(y, x, 1.0, 4), launch_axpy(x, y, 1.0, 4)])
        assert (got(gpu, y, 4) == 0).all()
        for _ in range(3):
            graph.launch()
        assert (got(gpu, y, 4)[0], got(gpu, x, 4)[0]) == (8, 13)

    def test_keep_their_buffers_alive_and_let_them_go_in_the_end(self, gpu: Gpu) -> None:
        before = gpu.memory()[0]
        y, x = put(gpu, np.zeros(4, F32)), put(gpu, np.ones(4, F32))
        graph = gpu.graph([launch_axpy(y, x, 1.0, 4)])
        x.free()  # type: ignore[attr-defined]
        del x
        gc.collect()
        # What is allocated now would get the memory, were it free.
        put(gpu, np.full(4, 9, F32))
        graph.launch()
        assert (got(gpu, y, 4) == 1).all()
        del graph, y
        gc.collect()
        gpu.synchronize()
        assert gpu.memory()[0] == before

    def test_are_gone_with_their_last_reference(self, gpu: Gpu, driver: FakeDriver) -> None:
        graph = gpu.graph([launch_count(gpu.alloc(4))])
        graph.launch()
        del graph
        gc.collect()
        assert "cuGraphExecDestroy" in driver.calls
        assert not [thing for thing in driver.handles.values() if isinstance(thing, tuple)]

    def test_that_can_t_be_recorded_leave_the_queue_as_it_was(self, gpu: Gpu) -> None:
        where = gpu.alloc(4)
        for wrong in (Launch("gelu", (1, 1, 1), 32, 0, ()), Launch("count", (1, 1, 1), 32, 0, ())):
            with pytest.raises(ValueError, match="kernel"):
                gpu.graph([launch_count(where), wrong])
        gpu.graph([launch_count(where)]).launch()
        assert got(gpu, where, 1, np.int32)[0] == 1

    def test_may_lose_a_buffer_while_they_are_recorded(self, gpu: Gpu, driver: FakeDriver) -> None:
        """The garbage collector runs when it likes; its frees must not become part of the graph."""
        where, lost = gpu.alloc(4), [gpu.alloc(4)]
        original = driver.kernels["count"].sizes

        class Dropping(tuple):  # type: ignore[type-arg]
            def __iter__(self):  # type: ignore[no-untyped-def]
                lost.clear()
                return super().__iter__()

        driver.kernels["count"].sizes = Dropping(original)
        graph = gpu.graph([launch_count(where)])
        assert not lost
        gpu.synchronize()
        graph.launch()
        graph.launch()
        assert got(gpu, where, 1, np.int32)[0] == 2


class TestFailure:
    def test_of_a_kernel_is_an_error_then_and_ever_after(self, gpu: Gpu) -> None:
        buffer = gpu.alloc(4)
        gpu.launch(FAIL)
        message = (
            r"^a kernel failed on cuda:0 \(NVIDIA H200\): CUDA_ERROR_ILLEGAL_ADDRESS, illegal address; "
            "start a new process to use this GPU again$"
        )
        with pytest.raises(RuntimeError, match=message):
            got(gpu, buffer, 1)
        for again in (
            lambda: gpu.alloc(4),
            lambda: gpu.mailbox(4),
            lambda: gpu.upload(buffer, np.zeros(1, F32)),
            lambda: got(gpu, buffer, 1),
            lambda: gpu.launch(launch_count(buffer)),
            lambda: gpu.graph([]),
            gpu.synchronize,
            gpu.memory,
        ):
            with pytest.raises(RuntimeError, match=message):
                again()

    def test_in_a_graph_is_an_error_too(self, gpu: Gpu) -> None:
        graph = gpu.graph([FAIL])
        graph.launch()
        for _ in range(2):
            with pytest.raises(RuntimeError, match="a kernel failed"):
                gpu.synchronize()
        with pytest.raises(RuntimeError, match="a kernel failed"):
            graph.launch()

    def test_to_launch_names_the_kernel_and_ends_the_machine(self, gpu: Gpu) -> None:
        """What was to be computed is missing, so nothing after it is right."""
        message = (
            r'^kernel "count" was not launched on cuda:0 \(NVIDIA H200\): CUDA_ERROR_INVALID_VALUE, '
            "invalid value; load the model again$"
        )
        where = gpu.alloc(4)
        with pytest.raises(RuntimeError, match=message):
            gpu.launch(Launch("count", (1, 1, 1), 2048, 0, (where,)))
        with pytest.raises(RuntimeError, match=message):
            gpu.launch(launch_count(where))

    @pytest.mark.parametrize(
        "function", ["cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync", "cuStreamSynchronize", "cuGraphInstantiate"]
    )
    def test_of_any_other_call_is_an_error_with_its_name(
        self, gpu: Gpu, driver: FakeDriver, function: str
    ) -> None:
        buffer = gpu.alloc(4)
        driver.errors[function] = CUresult.CUDA_ERROR_INVALID_CONTEXT
        with pytest.raises(RuntimeError, match=r"on cuda:0 .*CUDA_ERROR_INVALID_CONTEXT, invalid context"):
            put(gpu, np.zeros(1, F32))
            gpu.graph([launch_count(buffer)])
            got(gpu, buffer, 1)

    def test_leaves_no_context_behind(self, gpu: Gpu, driver: FakeDriver) -> None:
        gpu.launch(FAIL)
        with pytest.raises(RuntimeError):
            gpu.synchronize()
        with pytest.raises(ValueError, match="contiguous"):
            gpu.upload(gpu, np.zeros((4, 4), F32)[:, ::2])  # type: ignore[arg-type]
        assert driver.stack == []


class TestOpening:
    def test_refuses_machine_code_that_the_driver_does_not_take(self, driver: FakeDriver) -> None:
        driver.cuInit(0)
        with pytest.raises(
            RuntimeError, match=r"cuda:0 \(NVIDIA H200\) can't be used: CUDA_ERROR_INVALID_IMAGE"
        ):
            Gpu(DEVICE, "sm_90", [cubin("count"), b"damaged"])

    @pytest.mark.parametrize(
        "function",
        [
            "cuDevicePrimaryCtxRetain",
            "cuStreamCreate",
            "cuMemPoolCreate",
            "cuMemHostAlloc",
            "cuModuleLoadData",
        ],
    )
    def test_that_fails_gives_back_what_it_had_taken(self, driver: FakeDriver, function: str) -> None:
        driver.cuInit(0)
        driver.errors[function] = CUresult.CUDA_ERROR_DEVICE_UNAVAILABLE
        with pytest.raises(
            RuntimeError, match="can't be used: CUDA_ERROR_DEVICE_UNAVAILABLE, device unavail"
        ):
            Gpu(DEVICE, "sm_90", [cubin("count")])
        given_back = driver.calls.count("cuDevicePrimaryCtxRelease")
        assert given_back == (function != "cuDevicePrimaryCtxRetain")
        assert driver.memory == {}
        assert driver.calls.count("cuStreamDestroy") == (
            driver.calls.count("cuStreamCreate") if function != "cuStreamCreate" else 0
        )
        assert driver.stack == []


class TestTheEnd:
    def test_gives_everything_back_once_nobody_holds_anything(self, driver: FakeDriver) -> None:
        driver.kernels = {"count": Kernel((8,), lambda *_: None)}
        driver.cuInit(0)
        gpu = Gpu(DEVICE, "sm_90", [cubin("count")])
        buffer, box = gpu.alloc(4), gpu.mailbox(4)
        graph = gpu.graph([launch_count(buffer)])
        graph.launch()
        del gpu, box, graph
        gc.collect()
        # The memory is the device's as long as it is used.
        assert "cuDevicePrimaryCtxRelease" not in driver.calls
        del buffer
        gc.collect()
        assert driver.memory == {}
        assert driver.calls[-1] == "cuDevicePrimaryCtxRelease"
        assert driver.stack == []

    def test_of_the_process_is_quiet_whatever_is_still_held(self) -> None:
        code = """
            import pytest
            from fake_driver import Kernel, cubin
            from fakes import installed
            from gpt2rs.cuda.availability import Device
            from gpt2rs.cuda.gpu import Gpu
            from gpt2rs.cuda.machine import Launch
            fakes = installed(pytest.MonkeyPatch())
            driver, nvrtc = fakes.__enter__()
            driver.kernels = {"count": Kernel((8,), print)}
            driver.cuInit(0)
            gpu = Gpu(Device(0, "NVIDIA H200", 9, 0, 10), "sm_90", [cubin("count")])
            box = gpu.mailbox(4)
            graph = gpu.graph([Launch("count", (1, 1, 1), 32, 0, (box,))])
            graph.launch()
            view = box.host
            held = [gpu, box, graph, view]
            held.append(held)
        """
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_fork_is_told_to_load_the_model_itself(gpu: Gpu) -> None:
    buffer = gpu.alloc(4)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            got(gpu, buffer, 1)
        except RuntimeError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    assert os.waitpid(child, 0)[1] == 0
    said = os.read(read, 1000).decode()
    os.close(read)
    assert said == (
        "cuda:0 (NVIDIA H200) was opened before this process was forked off: load the model in it"
    )
