"""generate: prompts, results, batches, sampling, the end of the context, and where models come from."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest

import gpt2rs
from golden_cases import CASES, expected
from scripted import constant_logits, writes
from test_settings import fits


def test_all_kinds_of_prompt_mean_the_same(shakespeare: gpt2rs.GPT2) -> None:
    text = "ROMEO:"
    assert shakespeare.tokenizer is not None
    ids = shakespeare.tokenizer.encode(text)
    wanted = shakespeare.generate(text, max_new_tokens=8)
    for prompt in (
        ids,
        tuple(ids),
        np.array(ids),
        np.array(ids, np.uint16),
        [np.int64(token) for token in ids],
    ):
        assert shakespeare.generate(prompt, max_new_tokens=8) == wanted
    for prompts in ([text], [ids], (text,), [np.array(ids)], list(np.array([ids]))):
        assert shakespeare.generate(prompts, max_new_tokens=8) == [wanted]
    assert shakespeare.generate([text, ids, np.array(ids)], max_new_tokens=8) == [wanted] * 3
    np.testing.assert_array_equal(shakespeare.logits(text), shakespeare.logits(np.array(ids)))
    np.testing.assert_array_equal(shakespeare.hidden_states(text), shakespeare.hidden_states(ids))


BAD_PROMPTS: list[tuple[Any, str]] = [
    ([], "the prompt is empty.*bos_token_id"),
    (np.array([], dtype=np.int64), "the prompt is empty"),
    ([[1], []], "prompt 1 is empty"),
    ([512], r"token id 512 at index 0.*512 tokens.*0 to 511"),
    ([1, 2, -1], r"token id -1 at index 2"),
    ([[1], [2, 600]], r"prompt 1 has token id 600 at index 1"),
    ([10**30], "the prompt"),
    ([1.5], "dtype float64"),
    ([True, False], "dtype bool"),
    (np.array([[1, 2]]), r"shape \(1, 2\).*1-D.*several prompts"),
    (np.array(3), r"shape \(\)"),
    (5, "the prompt is a int"),
    (None, "the prompt is a NoneType"),
    ([1, "a"], "the prompt is"),
    ({1: 2}, "the prompt is a dict"),
]


@pytest.mark.parametrize(("prompt", "message"), BAD_PROMPTS)
def test_bad_prompts(plain: gpt2rs.GPT2, prompt: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plain.generate(prompt, max_new_tokens=1)


def test_empty_text(shakespeare: gpt2rs.GPT2) -> None:
    with pytest.raises(ValueError, match="empty"):
        shakespeare.generate("")


def test_without_a_tokenizer(plain: gpt2rs.GPT2) -> None:
    assert plain.tokenizer is None
    result = plain.generate([1, 2], max_new_tokens=3)
    assert len(result.tokens) == 3
    for use in (
        lambda: result.text,
        lambda: plain.generate("a"),
        lambda: plain.generate([1], stop="a"),
        lambda: plain.stream([1]),
        lambda: plain.logits("a"),
        lambda: plain.score("a"),
    ):
        with pytest.raises(RuntimeError, match="no tokenizer"):
            use()


def test_special_tokens_in_a_text_are_special(shakespeare: gpt2rs.GPT2) -> None:
    assert shakespeare.generate("<|endoftext|>", max_new_tokens=4) == shakespeare.generate(
        [0], max_new_tokens=4
    )


def test_result_of_eos() -> None:
    model = writes([b">", b"one", b" two", b"!", b" not reached"])
    result = model.generate([0], max_new_tokens=4, eos_token_id=3)
    assert (result.tokens, result.text, result.finish_reason) == ([1, 2, 3], "one two", "eos")
    result = model.generate([0], max_new_tokens=4, eos_token_id=None)
    assert (result.tokens, result.text, result.finish_reason) == (
        [1, 2, 3, 4],
        "one two! not reached",
        "length",
    )


def test_stop_strings_cut_the_text_and_keep_the_tokens() -> None:
    model = writes([b">", b"one", b" tw", b"o thr", b"ee", b" four"])
    result = model.generate([0], max_new_tokens=5, stop="two", logprobs=True)
    assert (result.tokens, result.text, result.finish_reason) == ([1, 2, 3], "one ", "stop")
    assert result.logprobs is not None
    assert len(result.logprobs) == 3
    # Both end within the same token; " th" is complete first.
    assert model.generate([0], max_new_tokens=5, stop=["thr", " th"]).text == "one two"
    assert model.generate([0], max_new_tokens=5, stop="never").text == "one two three four"
    # The prompt is not looked at.
    assert model.generate([0], max_new_tokens=1, stop=">").finish_reason == "length"


def test_unknown_tokens_and_broken_bytes_show_as_replacement() -> None:
    model = writes([b">", b"\xe2\x82", b"\xac", b"\xff", b"x", b"\xf0\x9f"])
    assert model.generate([0], max_new_tokens=6).text == "€\ufffdx\ufffd\ufffd"


def test_number_of_returned_sequences_shapes_the_answer(plain: gpt2rs.GPT2) -> None:
    def shape(answer: Any) -> Any:
        return [shape(part) for part in answer] if isinstance(answer, list) else len(answer.tokens)

    def generate(prompts: Any, **settings: Any) -> Any:
        return shape(plain.generate(prompts, max_new_tokens=2, eos_token_id=None, do_sample=True, **settings))

    assert generate([1]) == 2
    assert generate([[1]]) == [2]
    assert generate([1], num_return_sequences=1) == [2]
    assert generate([1], num_return_sequences=3) == [2, 2, 2]
    assert generate([[1], [2, 3]], num_return_sequences=3) == [[2, 2, 2], [2, 2, 2]]


def test_default_length_ends_with_the_context(plain: gpt2rs.GPT2) -> None:
    assert len(plain.generate([1] * 100, eos_token_id=None).tokens) == 28
    assert len(plain.generate([1] * 127, eos_token_id=None).tokens) == 1
    long = constant_logits([0.0, 1.0], n_ctx=1024)
    assert len(long.generate([0], eos_token_id=None).tokens) == 128


def test_past_the_context_is_an_error(plain: gpt2rs.GPT2) -> None:
    assert len(plain.generate([1] * 100, max_new_tokens=28, eos_token_id=None).tokens) == 28
    with pytest.raises(ValueError, match=r"max_new_tokens is 29.*100 tokens at most 28.*128 positions"):
        plain.generate([1] * 100, max_new_tokens=29)
    for settings in ({}, {"max_new_tokens": 1}):
        with pytest.raises(ValueError, match=r"129 tokens.*128 positions"):
            plain.generate([1] * 129, **settings)
    with pytest.raises(ValueError, match=r"128 tokens.*no room"):
        plain.generate([1] * 128)
    with pytest.raises(ValueError, match=r"min_new_tokens is 29.*at most 28"):
        plain.generate([1] * 100, min_new_tokens=29)
    with pytest.raises(ValueError, match=r"129 tokens.*128 positions"):
        plain.logits([1] * 129)
    with pytest.raises(ValueError, match=r"129 tokens.*128 positions"):
        plain.hidden_states([1] * 129)


def test_no_new_tokens(plain: gpt2rs.GPT2) -> None:
    result = plain.generate([1] * 128, max_new_tokens=0, logprobs=True)
    assert (result.tokens, result.logprobs, result.finish_reason) == ([], [], "length")


@pytest.mark.parametrize("length", [1, 40, 48, 60])
def test_sliding_equals_the_loop_of_the_textbook(length: int) -> None:
    model = gpt2rs.GPT2.from_pretrained(CASES["odd_shapes"])
    n_ctx = model.config.n_ctx
    prompt = np.random.default_rng(length).integers(0, model.config.n_vocab, length).tolist()
    ids = list(prompt)
    for _ in range(60):
        ids.append(int(model.logits(ids[-n_ctx:])[-1].argmax()))
    slide: Any = {"max_new_tokens": 60, "context_overflow": "slide", "eos_token_id": None}
    assert model.generate(prompt, **slide).tokens == ids[length:]
    together = model.generate([prompt, prompt[:1], prompt], **slide)
    assert together == [model.generate(part, **slide) for part in (prompt, prompt[:1], prompt)]


def test_sampling_while_sliding_does_not_repeat_its_random_numbers() -> None:
    model = constant_logits([0.0] * 16, n_ctx=8)
    settings: Any = {
        "max_new_tokens": 1600,
        "context_overflow": "slide",
        "eos_token_id": None,
        "do_sample": True,
    }
    tokens = model.generate([0], seed=5, **settings).tokens
    assert tokens == model.generate([0], seed=5, **settings).tokens
    assert fits(Counter(tokens), [1 / 16] * 16)
    assert fits(Counter(16 * a + b for a, b in zip(tokens[::2], tokens[1::2], strict=True)), [1 / 256] * 256)


def test_min_new_tokens_holds_while_sliding() -> None:
    model = constant_logits([1.0, 0.0], n_ctx=4)
    result = model.generate(
        [1], max_new_tokens=20, min_new_tokens=11, eos_token_id=0, context_overflow="slide"
    )
    assert result.tokens == [1] * 11 + [0]


def test_logprobs_are_the_models_own(plain: gpt2rs.GPT2) -> None:
    prompt = expected("plain")["input_ids"][0, :9].tolist()
    sampling: Any = {"temperature": 2.0, "top_k": 50, "repetition_penalty": 1.4, "seed": 1}
    result = plain.generate(
        prompt, max_new_tokens=12, eos_token_id=None, logprobs=True, top_logprobs=3, **sampling
    )
    assert result.logprobs is not None
    assert result.top_logprobs is not None
    rows = plain.logits(prompt + result.tokens)[len(prompt) - 1 : -1].astype(np.float64)
    peak = rows.max(axis=1, keepdims=True)
    want = rows - peak - np.log(np.exp(rows - peak).sum(axis=1, keepdims=True))
    # Summing 512 exponentials in float32, and rounding the result itself.
    tolerance = (math.sqrt(512) + np.abs(want).max()) * 2.0**-24
    for row, token, logprob, top in zip(
        want, result.tokens, result.logprobs, result.top_logprobs, strict=True
    ):
        assert abs(row[token] - logprob) <= tolerance
        assert list(top) == np.argsort(-row, kind="stable")[:3].tolist()
        assert all(abs(row[i] - value) <= tolerance for i, value in top.items())
    assert plain.generate(prompt, max_new_tokens=2).logprobs is None
    assert plain.generate(prompt, max_new_tokens=2, logprobs=True).top_logprobs is None


def test_more_prompts_than_a_batch_holds(plain: gpt2rs.GPT2) -> None:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, 512, n).tolist() for n in rng.integers(1, 30, plain._core.max_batch + 9)]
    together = plain.generate(prompts, max_new_tokens=6)
    assert together == [plain.generate(prompt, max_new_tokens=6) for prompt in prompts]


def test_equal_prompts_share_their_computation(plain: gpt2rs.GPT2) -> None:
    computed = []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(plain._core, name)

        def prefill(self, sessions: Any, prompts: Any) -> None:
            computed.extend(prompts)
            plain._core.prefill(sessions, prompts)

    a, b = [5, 6, 7], [8]
    answer = gpt2rs.GPT2(Counting()).generate(
        [a, b, a], max_new_tokens=4, do_sample=True, seed=[1, 2, 1], num_return_sequences=20
    )
    assert sorted(computed) == [a, b]
    assert answer[0] == answer[2]
    assert len({tuple(result.tokens) for result in answer[0]}) > 1


SAMPLED: Any = {"max_new_tokens": 8, "temperature": 1.3, "eos_token_id": None, "logprobs": True}


def test_seeds_reproduce(plain: gpt2rs.GPT2) -> None:
    first = plain.generate([1, 2], seed=7, **SAMPLED)
    assert first.seed == 7
    assert first == plain.generate([1, 2], seed=7, **SAMPLED)
    assert first.tokens != plain.generate([1, 2], seed=8, **SAMPLED).tokens
    fresh, other = plain.generate([[1, 2], [1, 2]], **SAMPLED)
    assert fresh.seed is not None
    assert fresh.seed != other.seed
    assert fresh == plain.generate([1, 2], seed=fresh.seed, **SAMPLED)
    assert plain.generate([1, 2], max_new_tokens=1, seed=7).seed is None


def test_sampling_does_not_depend_on_the_batch(plain: gpt2rs.GPT2) -> None:
    prompts = [[1, 2], [3] * 20, [4, 5, 6], [1, 2]]
    seeds = [7, 8, 9, 10]
    together = plain.generate(prompts, seed=seeds, num_return_sequences=3, **SAMPLED)
    for prompt, seed, group in zip(prompts, seeds, together, strict=True):
        assert group == plain.generate(prompt, seed=seed, num_return_sequences=3, **SAMPLED)
        assert group[:2] == plain.generate(prompt, seed=seed, num_return_sequences=2, **SAMPLED)
        assert group[0] == plain.generate(prompt, seed=seed, **SAMPLED)


def test_draws_follow_the_models_distribution() -> None:
    """Tokens drawn one after the other from a real model of 3 tokens, against its own logits."""
    model = gpt2rs.GPT2.from_pretrained(CASES["no_blocks"])
    prompt = [1, 0, 2, 2]
    results = model.generate(
        prompt, max_new_tokens=2, seed=3, do_sample=True, eos_token_id=None, num_return_sequences=6000
    )

    def softmax(row: np.ndarray) -> np.ndarray:
        weights = np.exp(row.astype(np.float64) - row.max())
        return weights / weights.sum()

    first = softmax(model.logits(prompt)[-1])
    pairs = [first[token] * softmax(model.logits([*prompt, token])[-1]) for token in range(3)]
    observed = Counter(3 * a + b for a, b in (result.tokens for result in results))
    assert fits(observed, np.concatenate(pairs).tolist())


def test_seeds_and_places_are_independent_streams() -> None:
    model = constant_logits([0.0] * 8)
    draw: Any = {"max_new_tokens": 1, "do_sample": True, "eos_token_id": None}
    by_seed = model.generate([[0]] * 3000, seed=list(range(3000)), **draw)
    assert fits(Counter(result.tokens[0] for result in by_seed), [1 / 8] * 8)
    pairs = model.generate([[0]] * 3000, seed=list(range(3000)), num_return_sequences=2, **draw)
    assert fits(Counter(8 * a.tokens[0] + b.tokens[0] for a, b in pairs), [1 / 64] * 64)


def test_a_model_without_blocks_from_arrays() -> None:
    rng = np.random.default_rng(1)
    wte, wpe = rng.normal(size=(7, 4)).astype(np.float32), rng.normal(size=(5, 4)).astype(np.float32)
    gain, shift = rng.normal(size=4).astype(np.float32), rng.normal(size=4).astype(np.float32)
    model = gpt2rs.GPT2.from_params(
        {"wte": wte, "wpe": wpe, "blocks": [], "ln_f": {"g": gain, "b": shift}}, n_head=2
    )
    ids = [3, 0, 6]
    x = wte[ids].astype(np.float64) + wpe[:3]
    hidden = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * gain + shift
    tolerance = 16 * 2.0**-24 * np.abs(hidden).max()
    np.testing.assert_allclose(model.hidden_states(ids), hidden, rtol=0, atol=tolerance)
    np.testing.assert_allclose(
        model.logits(ids), hidden @ wte.T.astype(np.float64), rtol=0, atol=16 * tolerance
    )


TINY = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32, "vocab_size": 100}


def test_from_config_is_seeded_and_initialised_as_gpt2() -> None:
    model = gpt2rs.GPT2.from_config(TINY, seed=3)
    again = gpt2rs.GPT2.from_config(TINY, seed=3)
    other = gpt2rs.GPT2.from_config(TINY, seed=4)
    np.testing.assert_array_equal(model.logits([1, 2, 3]), again.logits([1, 2, 3]))
    assert not np.array_equal(model.logits([1, 2, 3]), other.logits([1, 2, 3]))
    assert (model.dtype, model.device) == ("float32", "cpu")
    # A weight of standard deviation 0.02 under a layer-normed activation of 16 entries of variance 1.
    assert 0.5 < np.std(model.logits(list(range(32)))) / (0.02 * 4) < 2


def test_sizes() -> None:
    config = gpt2rs.Config.preset("gpt2")
    assert config.num_parameters() == 124_439_808
    assert config.num_parameters(lm_head=True) == 163_037_184
    model = gpt2rs.GPT2.from_config(TINY, dtype="bfloat16", n_threads=2)
    assert model.num_parameters() == sum((100 * 16, 32 * 16, 2 * (12 * 16 * 16 + 13 * 16), 2 * 16))
    assert model.num_parameters(lm_head=True) == model.num_parameters() + 1600
    assert (
        2 * model.num_parameters()
        <= model.memory_footprint()
        < gpt2rs.GPT2.from_config(TINY).memory_footprint()
    )
    assert model.n_threads == 2
    assert "n_layer=2" in repr(model)


def test_dtypes_and_devices() -> None:
    assert gpt2rs.GPT2.from_config(TINY, dtype=np.float32, device="auto").dtype == "float32"
    assert gpt2rs.GPT2.from_config(TINY, kv_dtype="bfloat16").kv_dtype == "bfloat16"
    for settings, message in (
        ({"dtype": "float16"}, "dtype is 'float16'"),
        ({"dtype": np.float64}, "dtype is 'float64'"),
        ({"dtype": 5}, "dtype is"),
        ({"kv_dtype": "int4"}, "kv_dtype is 'int4'"),
        ({"precision": "best"}, "precision is 'best'"),
        ({"precision": "fast", "dtype": "int8"}, "dtype is 'int8'"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"device": 0}, "device is 0"),
        ({"n_threads": 0}, "n_threads is 0"),
        ({"n_threads": -1}, "n_threads is -1"),
        ({"n_threads": 1.5}, "n_threads is 1.5"),
        ({"seed": -1}, "seed is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            gpt2rs.GPT2.from_config(TINY, **settings)


def test_results_can_be_pickled(shakespeare: gpt2rs.GPT2, plain: gpt2rs.GPT2) -> None:
    for result in (
        shakespeare.generate("ROMEO:", max_new_tokens=5, logprobs=True),
        shakespeare.generate("ROMEO:", max_new_tokens=5, stop="never"),
    ):
        copy = pickle.loads(pickle.dumps(result))
        assert copy == result
        assert copy.text == result.text
    copy = pickle.loads(pickle.dumps(plain.generate([1], max_new_tokens=2)))
    with pytest.raises(RuntimeError, match="no tokenizer"):
        _ = copy.text


def test_import_loads_numpy_and_the_core_alone() -> None:
    program = (
        "import sys, numpy; before = set(sys.modules); import gpt2rs; "
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout
    heavy = {
        "tiktoken",
        "huggingface_hub",
        "requests",
        "httpx",
        "typer",
        "rich",
        "regex",
        "importlib_metadata",
    }
    assert "gpt2rs" in output.split()
    assert not heavy & set(output.split())
