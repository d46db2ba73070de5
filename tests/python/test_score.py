"""score: log-probabilities, perplexity, and texts longer than the context."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gpt2rs
from golden_cases import CASES, expected
from gpt2rs.scoring import windows
from scripted import constant_logits


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("name", CASES)
def test_log_probabilities_against_the_reference(name: str) -> None:
    model = gpt2rs.GPT2.from_pretrained(CASES[name], kv_dtype="float32")
    ids = expected(name)["input_ids"][1]
    score = model.score(ids)
    assert score.tokens == ids.tolist()
    assert (score.logprobs.dtype, score.logprobs.shape) == (np.float32, (len(ids) - 1,))
    own = log_softmax(model.logits(ids))[np.arange(len(ids) - 1), ids[1:]]
    # Sums of V exponentials in float32, and one rounding of the result.
    tolerance = 2.0**-24 * (math.sqrt(model.config.n_vocab) + np.abs(own).max())
    np.testing.assert_allclose(score.logprobs, own, rtol=0, atol=tolerance)
    reference = log_softmax(expected(name)["logits"][1])[np.arange(len(ids) - 1), ids[1:]]
    logit_error = np.abs(model.logits(ids) - expected(name)["logits"][1]).max()
    np.testing.assert_allclose(score.logprobs, reference, rtol=0, atol=2 * logit_error + tolerance)


def test_perplexity() -> None:
    score = constant_logits([math.log(0.5), math.log(0.25), math.log(0.25)]).score([0, 0, 1, 2, 0])
    assert score.logprob == pytest.approx(2 * math.log(0.5) + 2 * math.log(0.25), rel=1e-6)
    assert score.perplexity == pytest.approx(8**0.5, rel=1e-6)


def test_text_and_its_ids_score_alike(shakespeare: gpt2rs.GPT2) -> None:
    text = "But, soft! what light through yonder window breaks?"
    assert shakespeare.tokenizer is not None
    by_text, by_ids = shakespeare.score(text), shakespeare.score(shakespeare.tokenizer.encode(text))
    np.testing.assert_array_equal(by_text.logprobs, by_ids.logprobs)
    assert by_text.perplexity == by_ids.perplexity
    # It learned this author, so that it is far from guessing among its 1024 tokens.
    assert by_text.perplexity < 100


@given(st.integers(2, 60), st.integers(2, 12), st.data())
def test_windows_score_every_token_once_with_enough_before_it(
    n_tokens: int, n_ctx: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, n_ctx - 1))
    scored = []
    for begin, first, end in windows(n_tokens, n_ctx, stride):
        assert end - begin <= n_ctx
        assert begin == 0 or first - begin >= n_ctx - stride
        scored += range(first, end)
    assert scored == list(range(1, n_tokens))


@pytest.mark.parametrize("stride", [None, 1, 7, 47])
def test_long_texts(stride: int | None) -> None:
    model = gpt2rs.GPT2.from_pretrained(CASES["odd_shapes"])
    n_ctx = model.config.n_ctx
    ids = np.random.default_rng(2).integers(0, model.config.n_vocab, 150)
    score = model.score(ids, stride=stride)
    # The loop of the guide, window by window, with log-softmax over all rows.
    step = stride or n_ctx // 2
    wanted, previous_end = [], 0
    for begin in range(0, len(ids), step):
        end = min(begin + n_ctx, len(ids))
        new = end - max(previous_end, 1)
        rows = log_softmax(model.logits(ids[begin:end]))[:-1]
        wanted += rows[np.arange(len(rows)), ids[begin + 1 : end]][len(rows) - new :].tolist()
        previous_end = end
        if end == len(ids):
            break
    assert len(wanted) == 149
    np.testing.assert_allclose(score.logprobs, wanted, rtol=0, atol=2.0**-24 * (28 + np.abs(wanted).max()))


def test_bad_use(plain: gpt2rs.GPT2) -> None:
    with pytest.raises(ValueError, match=r"1 token.*2 at least"):
        plain.score([1])
    with pytest.raises(ValueError, match="empty"):
        plain.score([])
    for stride in (0, 128, -1, 1.5):
        with pytest.raises(ValueError, match=f"stride is {stride}"):
            plain.score([1, 2], stride=stride)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n_ctx is 1"):
        constant_logits([0.0, 1.0], n_ctx=1).score([0, 1])
