"""Sessions: prefill, decode, fork, truncate, and the same bits however the sequence was put together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import gpt2rs

PROMPT = [5, 9, 301, 17, 44, 8, 2, 77]


def filled(model: gpt2rs.GPT2, tokens: list[int] = PROMPT) -> gpt2rs.Session:
    session = model.session()
    session.prefill(tokens)
    return session


def test_prefill_and_logits(plain: gpt2rs.GPT2) -> None:
    rows = plain.logits(PROMPT)
    session = plain.session()
    assert (session.pos, session.tokens) == (0, [])
    for start, end in ((0, 1), (1, 3), (3, 8)):
        session.prefill(np.array(PROMPT[start:end]))
        assert (session.pos, session.tokens) == (end, PROMPT[:end])
        logits = session.logits
        assert (logits.dtype, logits.shape) == (np.float32, (512,))
        np.testing.assert_array_equal(logits, rows[end - 1])


def test_text_goes_in_too(shakespeare: gpt2rs.GPT2) -> None:
    session = shakespeare.session()
    session.prefill("ROMEO:")
    assert shakespeare.tokenizer is not None
    assert session.tokens == shakespeare.tokenizer.encode("ROMEO:")
    assert session.decode(10) == shakespeare.generate("ROMEO:", max_new_tokens=10).tokens


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 1.5, "seed": 4},
        {"top_k": 9, "seed": 5, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "min_new_tokens": 3},
        {"no_repeat_ngram_size": 1},
    ],
)
def test_decode_is_what_generate_does(plain: gpt2rs.GPT2, settings: dict[str, Any]) -> None:
    wanted = plain.generate(PROMPT, max_new_tokens=12, eos_token_id=None, **settings).tokens
    session = filled(plain)
    assert session.decode(12, eos_token_id=None, **settings) == wanted
    assert session.tokens == PROMPT + wanted
    session = filled(plain)
    assert [token for _ in range(12) for token in session.decode(eos_token_id=None, **settings)] == wanted


def test_decode_ends_at_eos(plain: gpt2rs.GPT2) -> None:
    wanted = plain.generate(PROMPT, max_new_tokens=12, eos_token_id=None).tokens
    end = wanted.index(wanted[4])
    assert filled(plain).decode(12, eos_token_id=wanted[4]) == wanted[: end + 1]
    assert filled(plain).decode(0) == []


def test_logits_after_decode(plain: gpt2rs.GPT2) -> None:
    session = filled(plain)
    new = session.decode(3, eos_token_id=None)
    assert session.pos == len(PROMPT) + 3
    np.testing.assert_array_equal(session.logits, plain.logits(PROMPT + new)[-1])
    session.prefill([7])
    np.testing.assert_array_equal(session.logits, plain.logits([*PROMPT, *new, 7])[-1])


def test_fork_shares_and_then_goes_its_own_way(plain: gpt2rs.GPT2) -> None:
    session = filled(plain)
    forks = [session.fork() for _ in range(3)]
    for fork, token in zip(forks, (1, 2, 3), strict=True):
        fork.prefill([token])
        assert fork.tokens == [*PROMPT, token]
    session.prefill([400] * 20)
    for fork, token in zip(forks, (1, 2, 3), strict=True):
        np.testing.assert_array_equal(fork.logits, plain.logits([*PROMPT, token])[-1])
    late = forks[0].fork()
    assert late.decode(5) == forks[0].decode(5)
    np.testing.assert_array_equal(session.logits, plain.logits(PROMPT + [400] * 20)[-1])


def test_fork_between_choosing_and_computing_a_token(plain: gpt2rs.GPT2) -> None:
    session = filled(plain)
    new = session.decode(2, eos_token_id=None)
    fork = session.fork()
    np.testing.assert_array_equal(fork.logits, plain.logits(PROMPT + new)[-1])
    assert fork.decode(4, eos_token_id=None) == session.decode(4, eos_token_id=None)


@pytest.mark.parametrize("n", [1, 3, 8, 10])
def test_truncate_forgets(plain: gpt2rs.GPT2, n: int) -> None:
    session = filled(plain)
    tokens = PROMPT + session.decode(3, eos_token_id=None)
    session.truncate(n)
    assert (session.pos, session.tokens) == (n, tokens[:n])
    session.prefill([6, 7])
    np.testing.assert_array_equal(session.logits, plain.logits([*tokens[:n], 6, 7])[-1])


def test_truncate_to_nothing(plain: gpt2rs.GPT2) -> None:
    session = filled(plain)
    session.truncate(0)
    session.prefill([3])
    np.testing.assert_array_equal(session.logits, plain.logits([3])[-1])


def test_the_logits_of_a_truncated_session_are_its_last_tokens(plain: gpt2rs.GPT2) -> None:
    session = filled(plain)
    session.truncate(5)
    np.testing.assert_array_equal(session.logits, plain.logits(PROMPT)[4])


def test_bad_use(plain: gpt2rs.GPT2) -> None:
    empty = plain.session()
    for use in (lambda: empty.logits, lambda: empty.decode(1)):
        with pytest.raises(ValueError, match=r"empty|no token"):
            use()
    session = filled(plain)
    for bad, message in (([], "empty"), ([512], "512"), ([0.5], "float64"), ([1] * 121, "129.*128")):
        with pytest.raises(ValueError, match=message):
            session.prefill(bad)
        assert session.tokens == PROMPT
    for n in (9, -1, 1.5):
        with pytest.raises(ValueError, match=str(n)):
            session.truncate(n)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n is -1"):
        session.decode(-1)
    for name in ("max_new_tokens", "stop", "num_return_sequences", "top_logprobs", "context_overflow"):
        with pytest.raises(TypeError, match=f"{name} is a setting of generate"):
            session.decode(1, **{name: 1})
    with pytest.raises(TypeError, match="did you mean 'top_k'"):
        session.decode(1, topk=1)  # type: ignore[call-arg]
    with pytest.raises(RuntimeError, match="no tokenizer"):
        session.prefill("text")


def test_a_full_session_refuses_more(plain: gpt2rs.GPT2) -> None:
    session = filled(plain, [1] * 126)
    session.decode(2, eos_token_id=None)
    np.testing.assert_array_equal(session.logits, plain.logits(session.tokens)[-1])
    with pytest.raises(ValueError, match="128"):
        session.prefill([1])
    with pytest.raises(ValueError, match="128"):
        session.decode(2, eos_token_id=None)
