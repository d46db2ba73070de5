"""Whole models through all but the hardware: `CudaModel`, `Gpu`, the fake driver, the kernels' source."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shim_driver
from fake_driver import KernelFault
from shim_driver import ShimDriver
from shim_models import needs_shim

import error_bounds
import gpt2rs
from golden_cases import CASES

pytestmark = needs_shim

PROMPT = [5, 400, 17, 3, 256, 99, 8]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ShimDriver]:
    monkeypatch.setenv("GPT2RS_CACHE_DIR", str(tmp_path))
    with shim_driver.installed(monkeypatch) as made:
        yield made


def models(case: str, dtype: str) -> tuple[gpt2rs.GPT2, gpt2rs.GPT2]:
    return tuple(  # type: ignore[return-value]
        gpt2rs.GPT2.from_pretrained(CASES[case], dtype=dtype, device=device) for device in ("cpu", "cuda")
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_texts_are_those_of_the_cpu(driver: ShimDriver, dtype: str) -> None:
    cpu, gpu = models("plain", dtype)
    assert (gpu.device, gpu.isa, gpu.dtype, gpu.n_threads) == ("cuda:0", "sm_90", dtype, 1)
    assert repr(gpu).endswith("device='cuda:0')")
    for settings in ({}, {"temperature": 0.8, "top_p": 0.9, "seed": 3}, {"logprobs": True}):
        expected = cpu.generate(PROMPT, max_new_tokens=8, eos_token_id=None, **settings)  # type: ignore[call-overload]
        found = gpu.generate(PROMPT, max_new_tokens=8, eos_token_id=None, **settings)  # type: ignore[call-overload]
        assert found.tokens == expected.tokens
        assert found.finish_reason == expected.finish_reason
    want = cpu.logits(PROMPT)
    assert np.abs(gpu.logits(PROMPT) - want).max() <= error_bounds.apart(gpu._core, np.abs(want).max())  # type: ignore[arg-type]
    assert driver.stack == []


def test_graphs_are_recorded_once_and_launched_for_each_token(driver: ShimDriver) -> None:
    _, gpu = models("plain", "bfloat16")
    gpu.generate(PROMPT, max_new_tokens=4, eos_token_id=None)
    driver.calls.clear()
    gpu.generate(PROMPT, max_new_tokens=12, eos_token_id=None)
    assert driver.calls.count("cuGraphInstantiate") == 0
    assert driver.calls.count("cuGraphLaunch") >= 12
    # Several steps at a time are not waited for one by one.
    assert driver.calls.count("cuStreamSynchronize") < 12


def test_every_kernel_is_launched_so_that_it_may_overlap_the_one_before(driver: ShimDriver) -> None:
    _, gpu = models("plain", "bfloat16")
    gpu.generate(PROMPT, max_new_tokens=2, eos_token_id=None)
    assert set(driver.overlapping) == set(driver.executed)


def test_sequences_share_and_part_as_on_the_cpu(driver: ShimDriver) -> None:
    cpu, gpu = models("plain", "bfloat16")
    found = []
    for model in (cpu, gpu):
        session = model.session()
        session.prefill(PROMPT)
        other = session.fork()
        first = session.decode(6, eos_token_id=None)
        other.truncate(5)
        other.prefill([1, 2])
        found.append((first, other.decode(6, eos_token_id=None), session.tokens, other.pos))
    assert found[0] == found[1]


def test_more_prompts_than_a_graph_has_rows(driver: ShimDriver) -> None:
    _, gpu = models("plain", "bfloat16")
    prompts = [[1 + i % 7, 300 - i] for i in range(gpu._core.max_batch + 6)]
    together = gpu.generate(prompts, max_new_tokens=2, eos_token_id=None)
    assert len({tuple(result.tokens) for result in together}) > 10
    for i in (0, 63, 64, 69):
        assert together[i] == gpu.generate(prompts[i], max_new_tokens=2, eos_token_id=None)


@pytest.mark.parametrize("kind", [{}, {"temperature": 0.8, "seed": 3}])
def test_settings_of_proposals_change_no_token(driver: ShimDriver, kind: dict[str, Any]) -> None:
    cpu, gpu = models("plain", "bfloat16")
    choice: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": None, **kind}
    plain = gpu.generate(PROMPT * 3, **choice)
    for more in ({"prompt_lookup_num_tokens": 4}, {"assistant_model": cpu}):
        found = gpu.generate(PROMPT * 3, **choice, **more)
        assert found.tokens == plain.tokens
        assert (found.speculation.proposed, found.speculation.passes) == (0, 5)
        session = gpu.session()
        session.prefill(PROMPT * 3)
        assert session.decode(6, eos_token_id=None, **kind, **more) == plain.tokens


def test_a_failing_kernel_is_an_error_and_stays_one(driver: ShimDriver) -> None:
    _, gpu = models("plain", "bfloat16")
    gpu.generate(PROMPT, max_new_tokens=2)

    def fail(*_: Any) -> None:
        raise KernelFault

    driver.kernels["sample"].run = fail
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"^a kernel failed on cuda:0 \(NVIDIA H200\)"):
            gpu.generate(PROMPT, max_new_tokens=2)


def test_models_go_back_to_files(driver: ShimDriver, tmp_path: Path) -> None:
    cpu, gpu = models("plain", "float32")
    gpu.save_pretrained(tmp_path / "saved")
    again = gpt2rs.GPT2.from_pretrained(tmp_path / "saved")
    assert (again.logits(PROMPT) == cpu.logits(PROMPT)).all()
