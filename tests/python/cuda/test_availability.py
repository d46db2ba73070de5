"""The one sentence for each way in which a GPU can be out of reach, and what "auto" makes of it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from fake_driver import CUresult, FakeDriver, Gpu
from fakes import FakeNvrtc

import gpt2rs
from golden_cases import CASES
from gpt2rs.cuda import availability

CONFIG = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 512, "n_positions": 1024}
H200 = Gpu()
T4 = Gpu("Tesla T4", (7, 5), 16 * 10**9, 40)
A100 = Gpu("NVIDIA A100-SXM4-40GB", (8, 0), 40 * 10**9, 108)


def no_driver(driver: FakeDriver, nvrtc: FakeNvrtc) -> None:
    driver.library = False


def no_compiler(driver: FakeDriver, nvrtc: FakeNvrtc) -> None:
    nvrtc.installed = False


def old_driver(driver: FakeDriver, nvrtc: FakeNvrtc) -> None:
    driver.version = 12080


def ancient_driver(driver: FakeDriver, nvrtc: FakeNvrtc) -> None:
    driver.version = 11040


def no_gpu(driver: FakeDriver, nvrtc: FakeNvrtc) -> None:
    driver.gpus = []


def mismatch(driver: FakeDriver, nvrtc: FakeNvrtc) -> None:
    driver.errors["cuInit"] = CUresult.CUDA_ERROR_SYSTEM_DRIVER_MISMATCH


def old_gpu(driver: FakeDriver, nvrtc: FakeNvrtc) -> None:
    driver.gpus = [T4]


def busy(driver: FakeDriver, nvrtc: FakeNvrtc) -> None:
    driver.errors["cuDevicePrimaryCtxRetain"] = CUresult.CUDA_ERROR_DEVICE_UNAVAILABLE


def small(driver: FakeDriver, nvrtc: FakeNvrtc) -> None:
    driver.gpus = [Gpu("NVIDIA RTX A400", (8, 6), 100_000)]


def new_gpu(driver: FakeDriver, nvrtc: FakeNvrtc) -> None:
    driver.gpus = [Gpu("a GPU of next year", (13, 0))]


WAYS = {
    no_compiler: "NVRTC, which compiles the kernels, is not installed: pip install 'gpt2rs[cuda]'",
    no_driver: "this machine has no NVIDIA driver (libcuda): install one, 580 or newer",
    old_driver: (
        "the NVIDIA driver is for CUDA 12.8 and the compiler needs one for 13.0 or newer: update the driver, "
        "or for this one pip install 'gpt2rs[cuda12]'"
    ),
    ancient_driver: (
        "the NVIDIA driver is for CUDA 11.4 and the compiler needs one for 13.0 or newer: update the driver"
    ),
    no_gpu: "the NVIDIA driver finds no GPU",
    mismatch: ("the NVIDIA driver does not start: CUDA_ERROR_SYSTEM_DRIVER_MISMATCH, system driver mismatch"),
    old_gpu: ("cuda:0 (Tesla T4) has compute capability 7.5; the kernels need 8.0 (NVIDIA Ampere) or newer"),
    busy: ("cuda:0 (NVIDIA H200) can't be used: CUDA_ERROR_DEVICE_UNAVAILABLE, device unavailable"),
    new_gpu: (
        "the GPU is of architecture sm_130, which this NVRTC (13.0 (0 bytes)) does not know: "
        "pip install --upgrade 'gpt2rs[cuda]'"
    ),
}


@pytest.fixture(autouse=True)
def _no_gpu_is_hidden(monkeypatch: pytest.MonkeyPatch, fakes: Any) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_that_says_which_and_what_to_do(
    way: Callable[[FakeDriver, FakeNvrtc], None], fakes: tuple[FakeDriver, FakeNvrtc]
) -> None:
    way(*fakes)
    with pytest.raises(RuntimeError) as raised:
        gpt2rs.GPT2.from_pretrained(CASES["plain"], device="cuda")
    assert str(raised.value) == f"device is 'cuda', but {WAYS[way]}"


@pytest.mark.parametrize("way", [*WAYS, small], ids=lambda way: way.__name__)
def test_for_which_auto_takes_the_cpu(
    way: Callable[[FakeDriver, FakeNvrtc], None], fakes: tuple[FakeDriver, FakeNvrtc]
) -> None:
    way(*fakes)
    assert gpt2rs.GPT2.from_pretrained(CASES["plain"], device="auto").device == "cpu"


def test_of_too_little_memory_has_the_numbers(driver: FakeDriver) -> None:
    driver.gpus = [Gpu("NVIDIA RTX A400", (8, 6), 1_500_000)]
    with pytest.raises(RuntimeError) as raised:
        gpt2rs.GPT2.from_config(CONFIG, device="cuda:0")
    # 4 bytes each: the parameters, and 2 x 2 layers x 64 channels x 1024 positions of keys and values.
    weights = gpt2rs.GPT2.from_config(CONFIG).memory_footprint()
    assert weights < 1_500_000
    needed = weights + 4 * 2 * 2 * 64 * 1024
    assert str(raised.value) == (
        "device is 'cuda:0', but cuda:0 (NVIDIA RTX A400) has 1.5 MB of 1.5 MB of memory free; the weights "
        f"and the keys and values of one sequence take {needed / 1e6:.1f} MB"
    )


def test_of_memory_that_runs_out_while_loading_makes_auto_take_the_cpu(driver: FakeDriver) -> None:
    driver.errors["cuMemAllocFromPoolAsync"] = CUresult.CUDA_ERROR_OUT_OF_MEMORY
    assert gpt2rs.GPT2.from_pretrained(CASES["plain"], device="auto").device == "cpu"
    driver.errors["cuMemAllocFromPoolAsync"] = CUresult.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(RuntimeError, match=r"^device is 'cuda', but out of memory on cuda:0 \(NVIDIA H200\)"):
        gpt2rs.GPT2.from_pretrained(CASES["plain"], device="cuda")


def test_of_a_number_out_of_range_lists_what_there_is(driver: FakeDriver) -> None:
    driver.gpus = [H200, A100]
    with pytest.raises(RuntimeError) as raised:
        gpt2rs.GPT2.from_pretrained(CASES["plain"], device="cuda:2")
    assert str(raised.value) == (
        "device is 'cuda:2', but there is no cuda:2; this machine has cuda:0 (NVIDIA H200), "
        "cuda:1 (NVIDIA A100-SXM4-40GB)"
    )


def test_of_hidden_gpus_names_the_variable(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.gpus = []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(availability.Unavailable, match=r"finds no GPU; CUDA_VISIBLE_DEVICES is ''$"):
        availability.devices()


def test_a_driver_of_the_same_major_version_will_do(driver: FakeDriver, nvrtc: FakeNvrtc) -> None:
    """Machine code loads on any driver of the compiler's major version, or of a later one."""
    for compiler, version in (((13, 5), 13000), ((12, 9), 12040), ((12, 9), 13020)):
        nvrtc.version, driver.version = compiler, version
        assert [device.name for device in availability.devices()] == ["NVIDIA H200"]
    nvrtc.version, driver.version = (12, 9), 12030
    with pytest.raises(
        availability.Unavailable, match=r"for CUDA 12\.3 and the compiler needs one for 12\.4"
    ):
        availability.devices()


# This folder is a package `cuda` of its own to whoever asks for that alone.
@pytest.mark.skipif(importlib.util.find_spec("cuda.bindings") is None, reason="cuda-python is not installed")
@pytest.mark.skipif(sys.platform != "linux", reason="drivers elsewhere have other names")
def test_the_true_cuda_python_says_the_same_of_a_missing_driver() -> None:
    code = """
import ctypes, gpt2rs
try:
    ctypes.CDLL("libcuda.so.1")
except OSError:
    try:
        gpt2rs.GPT2.from_config("gpt2", device="cuda")
    except RuntimeError as error:
        print(error)
else:
    print("there is one")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    if done.stdout == "there is one\n":
        pytest.skip("this machine has an NVIDIA driver")
    assert done.stdout == f"device is 'cuda', but {WAYS[no_driver]}\n"


def test_without_the_extra_the_sentence_is_its_installation() -> None:
    code = """
import sys
sys.modules["cuda"] = None
import gpt2rs
config = {"n_embd": 8, "n_layer": 1, "n_head": 1, "vocab_size": 9, "n_positions": 9}
for device in ("auto", "cuda"):
    try:
        print(gpt2rs.GPT2.from_config(config, device=device).device)
    except RuntimeError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert (
        done.stdout == "cpu\ndevice is 'cuda', but cuda-python is not installed: pip install 'gpt2rs[cuda]'\n"
    )
