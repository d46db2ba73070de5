"""The CUDA path's kernels, on the host, against what transformers computes in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from shim_models import golden, needs_shim

import gpt2rs
from golden_cases import CASES, expected, generations
from test_golden import bound, load

pytestmark = needs_shim


def near(got: np.ndarray, want: np.ndarray, config: gpt2rs.Config, rounded: bool) -> None:
    """Twice the CPU's bound: tensor cores truncate sums where it rounds them, by a unit, not half of one."""
    assert got.dtype == np.float32
    assert got.shape == want.shape
    atol = 2 * bound(config, np.abs(want).max(), rounded=rounded)
    np.testing.assert_allclose(got, want, rtol=0, atol=atol)


def both_near(name: str, dtype: str, kv_dtype: str | None = None, *, rounded: bool = False) -> None:
    model, want = golden(name, dtype, kv_dtype), expected(name)
    ids = want["input_ids"][0].tolist()
    near(model.logits(ids), want["logits"][0], model.config, rounded)
    near(model.hidden_states(ids), want["hidden"][0], model.config, rounded)


@pytest.mark.parametrize("name", CASES)
def test_float32(name: str) -> None:
    both_near(name, "float32")


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_is_near(name: str) -> None:
    both_near(name, "bfloat16", rounded=True)


@pytest.mark.parametrize("name", ["bfloat16", "llmc_bf16"])
def test_tensor_cores_with_activations_in_parts_are_as_near_as_float32(name: str) -> None:
    """A bfloat16 weight times an activation in three bfloat16 parts is its product with the float32 one."""
    both_near(name, "bfloat16", "float32")


def test_bfloat16_is_as_the_cpu_rounds() -> None:
    """Keys and values are rounded alike on both sides: only those beside a rounding boundary differ."""
    ids = expected("bfloat16")["input_ids"][0].tolist()
    got, want = golden("bfloat16", "bfloat16").logits(ids), load("bfloat16").logits(ids)
    assert np.abs(got - want).max() < 2.0**-9 * np.abs(want).max()
    assert np.abs(got - want).mean() < 2.0**-13 * np.abs(want).max()


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
