"""Every reference checkpoint through from_pretrained, against Hugging Face transformers in float64."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

import error_bounds
import gpt2rs
from golden_cases import CASES, expected, generations


@functools.cache
def load(name: str, dtype: str | None = None, kv_dtype: str | None = None) -> gpt2rs.GPT2:
    return gpt2rs.GPT2.from_pretrained(CASES[name], dtype=dtype, kv_dtype=kv_dtype)


def close(got: np.ndarray, want: np.ndarray, config: gpt2rs.Config, *, rounded: bool = False) -> None:
    assert got.dtype == np.float32
    assert got.shape == want.shape
    np.testing.assert_allclose(
        got, want, rtol=0, atol=error_bounds.cpu(config, np.abs(want).max(), rounded=rounded)
    )


@pytest.mark.parametrize("name", CASES)
def test_logits_and_hidden_states(name: str) -> None:
    # Keys and values in float32, so that nothing but float32 arithmetic separates us from the reference:
    # weights of bfloat16 files are the same numbers in both.
    model = load(name, kv_dtype="float32")
    want = expected(name)
    for ids, logits, hidden in zip(want["input_ids"], want["logits"], want["hidden"], strict=True):
        close(model.logits(ids), logits, model.config)
        close(model.hidden_states(ids), hidden, model.config)


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_is_near(name: str) -> None:
    model = load(name, "bfloat16")
    assert model.dtype == model.kv_dtype == "bfloat16"
    want = expected(name)
    for ids, logits, hidden in zip(want["input_ids"], want["logits"], want["hidden"], strict=True):
        close(model.logits(ids), logits, model.config, rounded=True)
        close(model.hidden_states(ids), hidden, model.config, rounded=True)


@pytest.mark.parametrize("name", ["bfloat16", "llmc_bf16"])
def test_bfloat16_weights_lose_nothing(name: str) -> None:
    """A bfloat16 file held as bfloat16 or widened to float32: the same products, so the same bits."""
    narrow, wide = load(name, "bfloat16", "float32"), load(name, "float32", "float32")
    assert narrow.memory_footprint() < wide.memory_footprint()
    for ids in expected(name)["input_ids"]:
        np.testing.assert_array_equal(narrow.logits(ids), wide.logits(ids))


@pytest.mark.parametrize("name", CASES)
def test_default_dtype_follows_the_file(name: str) -> None:
    model = load(name)
    assert model.dtype == model.kv_dtype == ("bfloat16" if name in ("bfloat16", "llmc_bf16") else "float32")


RUNS = [
    pytest.param(name, run, id=f"{name}-{run['name']}-{len(run['prompt'])}")
    for name in CASES
    for run in generations(name)
]


@pytest.mark.parametrize(("name", "run"), RUNS)
def test_generation(name: str, run: dict[str, Any]) -> None:
    model = load(name, kv_dtype="float32")
    result = model.generate(run["prompt"], **run["kwargs"])
    assert result.tokens == run["tokens"]
    ended = run["kwargs"].get("eos_token_id", 0) == 0 and run["tokens"][-1] == 0
    assert result.finish_reason == ("eos" if ended else "length")


@pytest.mark.parametrize("name", [name for name in CASES if generations(name)])
def test_ragged_batch_equals_each_alone(name: str) -> None:
    model = load(name)
    prompts = [run["prompt"] for run in generations(name) if run["name"] in ("greedy", "greedy_no_eos")]
    together = model.generate(prompts, max_new_tokens=10, logprobs=True)
    assert together == [model.generate(prompt, max_new_tokens=10, logprobs=True) for prompt in prompts]


@pytest.mark.parametrize("name", CASES)
def test_logits_by_prefill_and_decode_have_the_same_bits(name: str) -> None:
    model = load(name)
    ids = expected(name)["input_ids"][0].tolist()
    rows = model.logits(ids)
    for cut in (1, 2, len(ids) // 2, len(ids)):
        session = model.session()
        session.prefill(ids[:cut])
        np.testing.assert_array_equal(session.logits, rows[cut - 1])
        for token in ids[cut : cut + 5]:
            session.prefill([token])
        np.testing.assert_array_equal(session.logits, rows[min(cut + 5, len(ids)) - 1])
