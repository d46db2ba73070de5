"""The CUDA path's kernels, on the host, against what transformers computes in float64, and against the CPU.

Wherever tensor cores compute, they add as float32 does, and as they do on sm_80 and sm_90.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from shim_models import ARCHS, golden, needs_shim

import error_bounds
import gpt2rs
from golden_cases import CASES, expected, generations
from gpt2rs.cuda.model import CudaModel
from test_golden import load

pytestmark = needs_shim

# Types of weights and of the cache; on a GPU's tensor cores where these compute.
HELD = [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")]
HELD_ON = [
    pytest.param(*held, arch, id="-".join((*held, arch)))
    for held in HELD
    for arch in (ARCHS[1:] if "bfloat16" in held else ARCHS[:1])
]


def near(got: np.ndarray, want: np.ndarray, atol: float) -> None:
    assert got.dtype == np.float32
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=atol)


def both_near(model: CudaModel, name: str, *, rounded: bool) -> None:
    want = expected(name)
    ids = want["input_ids"][0].tolist()
    for got, exact in ((model.logits(ids), want["logits"][0]), (model.hidden_states(ids), want["hidden"][0])):
        near(got, exact, error_bounds.cuda(model, np.abs(exact).max(), rounded=rounded))


@pytest.mark.parametrize("name", CASES)
def test_float32(name: str) -> None:
    both_near(golden(name, "float32"), name, rounded=False)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", CASES)
def test_bfloat16_is_near(name: str, arch: str) -> None:
    both_near(golden(name, "bfloat16", "bfloat16", arch), name, rounded=True)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", ["bfloat16", "llmc_bf16"])
def test_tensor_cores_with_activations_in_parts_are_as_near_as_float32(name: str, arch: str) -> None:
    """A bfloat16 weight times an activation in three bfloat16 parts is its product with the float32 one."""
    both_near(golden(name, "bfloat16", "float32", arch), name, rounded=False)


@pytest.mark.parametrize(("dtype", "kv_dtype", "arch"), HELD_ON)
@pytest.mark.parametrize("name", CASES)
def test_logits_are_near_the_cpu_s(name: str, dtype: str, kv_dtype: str, arch: str) -> None:
    """What is rounded is rounded alike, but beside a rounding boundary; what is left are sums in float32."""
    ids = expected(name)["input_ids"][0].tolist()
    model, want = golden(name, dtype, kv_dtype, arch), load(name, dtype, kv_dtype).logits(ids)
    near(model.logits(ids), want, error_bounds.apart(model, np.abs(want).max()))


@pytest.mark.parametrize("arch", ARCHS)
def test_keys_and_values_are_rounded_as_on_the_cpu(arch: str) -> None:
    """Only those beside a rounding boundary differ, so little is left of what rounding does."""
    ids = expected("bfloat16")["input_ids"][0].tolist()
    model = golden("bfloat16", "bfloat16", "bfloat16", arch)
    rounded, exact = (
        load("bfloat16", "bfloat16", kv_dtype).logits(ids) for kv_dtype in ("bfloat16", "float32")
    )
    scale = np.abs(exact).max()
    own = error_bounds.cpu(model.config, 1, rounded=False) + error_bounds.cuda(model, 1, rounded=False)
    left = error_bounds.rounded_apart(own) * np.abs(rounded - exact).mean() + own * scale
    assert left < 0.5 * np.abs(rounded - exact).mean()
    assert np.abs(model.logits(ids) - rounded).mean() < left


RUNS = [
    pytest.param(name, dtype, run, id=f"{name}-{dtype}-{run['name']}-{len(run['prompt'])}")
    for name in CASES
    for dtype in (("bfloat16", "float32") if name == "bfloat16" else ("float32",))
    for i, run in enumerate(generations(name))
    # Every kind of setting once, and a greedy run and a penalised one of every shape.
    if (name == "plain" and dtype == "float32") or i in (0, 3)
]


@pytest.mark.parametrize(("name", "dtype", "run"), RUNS)
def test_generation(name: str, dtype: str, run: dict[str, Any]) -> None:
    model = gpt2rs.GPT2(golden(name, dtype, "float32"))
    assert model.generate(run["prompt"], **run["kwargs"]).tokens == run["tokens"]


@pytest.mark.parametrize(("dtype", "kv_dtype", "arch"), HELD_ON)
@pytest.mark.parametrize("name", [name for name in CASES if generations(name)])
def test_tokens_are_those_of_the_cpu(name: str, dtype: str, kv_dtype: str, arch: str) -> None:
    """The first run of each case is greedy."""
    run = generations(name)[0]
    cpu, gpu = load(name, dtype, kv_dtype), gpt2rs.GPT2(golden(name, dtype, kv_dtype, arch))
    expected_tokens = cpu.generate(run["prompt"], **run["kwargs"]).tokens
    assert gpu.generate(run["prompt"], **run["kwargs"]).tokens == expected_tokens
