"""Several tokens a pass, by lookup or with a draft model: everything is as without, only in fewer passes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gpt2rs
from golden_cases import CASES
from scripted import constant_logits, writes

LOOKUP = {"prompt_lookup_num_tokens": 10}
SONG = "ROMEO:\nTo be, or not to be, to be, or not to be, to be, or not"


@pytest.fixture(scope="module")
def rounded() -> gpt2rs.GPT2:
    """`plain` in bfloat16: half as large, and nearly always of the same opinion."""
    return gpt2rs.GPT2.from_pretrained(CASES["plain"], dtype="bfloat16")


@pytest.fixture(scope="module")
def stranger() -> gpt2rs.GPT2:
    """A small model of other weights and fewer positions than `plain`."""
    return gpt2rs.GPT2.from_config(
        {"n_layer": 0, "n_head": 1, "n_embd": 8, "n_positions": 50, "vocab_size": 512}, seed=5
    )


def without_counts(result: gpt2rs.Result) -> gpt2rs.Result:
    assert result.speculation is not None
    return replace(result, speculation=None)


PROBABILITY = st.floats(0.05, 1)
CHOICES = st.fixed_dictionaries(
    {
        "max_new_tokens": st.integers(0, 60),
        "seed": st.lists(st.integers(0, 2**64 - 1), min_size=4, max_size=4),
    },
    optional={
        "do_sample": st.booleans(),
        "temperature": st.floats(0.05, 1.5),
        "top_k": st.integers(0, 40),
        "top_p": PROBABILITY,
        "min_p": PROBABILITY,
        "typical_p": PROBABILITY,
        "epsilon_cutoff": st.floats(0, 0.1),
        "eta_cutoff": st.floats(0, 0.1),
        "repetition_penalty": st.floats(0.7, 1.3),
        "presence_penalty": st.floats(-1, 1),
        "frequency_penalty": st.floats(-1, 1),
        "no_repeat_ngram_size": st.integers(0, 6),
        "bad_words_ids": st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3), max_size=4),
        "suppress_tokens": st.lists(st.integers(0, 511), max_size=4),
        "logit_bias": st.dictionaries(st.integers(0, 9), st.floats(-3, 6)),
        "eos_token_id": st.lists(st.integers(0, 511), max_size=200),
        "logprobs": st.booleans(),
        "top_logprobs": st.integers(0, 3),
        "min_new_tokens": st.just(0),
    },
)
# Few ids and runs that come again, so that there is something to look up.
PROMPT = st.builds(
    lambda phrase, times, rest: (phrase * times)[:60] + rest,
    st.lists(st.integers(0, 9), min_size=1, max_size=8),
    st.integers(1, 9),
    st.lists(st.integers(0, 9), max_size=5),
)


class TestTheSame:
    @settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(
        st.lists(PROMPT, min_size=4, max_size=4),
        CHOICES,
        st.sampled_from(["lookup", "rounded", "stranger"]),
        st.integers(1, 30),
        st.integers(1, 6),
        st.data(),
    )
    def test_whatever_the_settings(
        self,
        plain: gpt2rs.GPT2,
        rounded: gpt2rs.GPT2,
        stranger: gpt2rs.GPT2,
        prompts: list[list[int]],
        choice: dict[str, Any],
        source: str,
        count: int,
        ngram: int,
        data: st.DataObject,
    ) -> None:
        if choice.get("do_sample"):
            choice.setdefault("temperature", 0.3)
        if "min_new_tokens" in choice:
            choice["min_new_tokens"] = data.draw(st.integers(0, choice["max_new_tokens"]))
        drafts = {"rounded": rounded, "stranger": stranger}
        speed: dict[str, Any] = (
            {"prompt_lookup_num_tokens": count, "max_matching_ngram_size": ngram}
            if source == "lookup"
            else {"assistant_model": drafts[source], "num_assistant_tokens": count}
        )
        expected = plain.generate(prompts, **choice)
        found = plain.generate(prompts, **choice, **speed)
        assert [without_counts(result) for result in found] == expected
        for result in found:
            counts = result.speculation
            assert counts is not None
            assert 0 <= counts.accepted <= counts.proposed
            # Each pass gives one token of its own, but for the one that ends with an accepted eos.
            least = len(result.tokens) - 1 - counts.accepted
            assert counts.passes in ((0,) if len(result.tokens) < 2 else (least, least + 1))

    @pytest.mark.parametrize("kind", [{}, {"temperature": 0.6, "seed": 3, "num_return_sequences": 5}])
    @pytest.mark.parametrize("stop", [None, ["be, to", "zzz"], "\n\n"])
    def test_texts_and_stop_strings(self, shakespeare: gpt2rs.GPT2, kind: dict[str, Any], stop: Any) -> None:
        choice: dict[str, Any] = {"max_new_tokens": 90, "stop": stop, "logprobs": True, **kind}
        expected, found = shakespeare.generate(SONG, **choice), shakespeare.generate(SONG, **choice, **LOOKUP)
        pairs = zip(expected, found, strict=True) if isinstance(expected, list) else [(expected, found)]
        for one, other in pairs:
            assert without_counts(other) == one
            assert other.text == one.text
            assert other.speculation.accepted <= len(other.tokens)

    @pytest.mark.parametrize("kind", [{}, {"temperature": 0.7, "seed": 8}])
    def test_streams(self, shakespeare: gpt2rs.GPT2, kind: dict[str, Any]) -> None:
        choice: dict[str, Any] = {"max_new_tokens": 100, "stop": "Exeunt", **kind}
        plain, fast = shakespeare.stream(SONG, **choice), shakespeare.stream(SONG, **choice, **LOOKUP)
        assert list(plain) == list(fast)
        assert without_counts(fast.result) == plain.result
        assert fast.result == shakespeare.generate(SONG, **choice, **LOOKUP)

    def test_more_texts_than_go_together(self, shakespeare: gpt2rs.GPT2) -> None:
        prompts = [SONG[: 7 + i % 50] for i in range(shakespeare._core.max_batch + 9)]
        choice: dict[str, Any] = {"max_new_tokens": 30, "temperature": 0.3, "seed": 1}
        found = shakespeare.generate(prompts, **choice, **LOOKUP)
        assert [without_counts(result) for result in found] == shakespeare.generate(prompts, **choice)

    def test_sessions(self, plain: gpt2rs.GPT2, rounded: gpt2rs.GPT2) -> None:
        prompt = [5, 9, 301, 17] * 9
        for speed in (LOOKUP, {"assistant_model": rounded}):
            for kind in ({}, {"temperature": 0.2, "seed": 4}):
                slow, fast = plain.session(), plain.session()
                for session, more in ((slow, {}), (fast, speed)):
                    choice: dict[str, Any] = {"eos_token_id": None, **kind, **more}
                    session.prefill(prompt)
                    first = session.decode(17, **choice)
                    fork = session.fork()
                    session.truncate(len(prompt) + 9)
                    assert session.decode(8, **choice) == first[9:]
                    assert session.decode(5, **choice) == fork.decode(5, **choice)
                assert slow.tokens == fast.tokens
                np.testing.assert_array_equal(slow.logits, fast.logits)
        eos = slow.tokens[len(prompt) + 4]
        for session in (slow, fast):
            session.truncate(len(prompt))
        assert slow.decode(20, eos_token_id=eos) == fast.decode(20, eos_token_id=eos, **LOOKUP)

    def test_up_to_the_last_position(self, plain: gpt2rs.GPT2) -> None:
        for prompt_len in (1, 100, 126, 127, 128):
            prompt = [3, 4] * 64
            choice: dict[str, Any] = {"eos_token_id": None, "max_new_tokens": 128 - prompt_len}
            expected = plain.generate(prompt[:prompt_len], **choice)
            assert without_counts(plain.generate(prompt[:prompt_len], **choice, **LOOKUP)) == expected
        session = plain.session()
        session.prefill([3, 4] * 63)
        assert len(session.decode(2, eos_token_id=None, **LOOKUP)) == 2
        with pytest.raises(ValueError, match="n_ctx"):
            session.decode(1, **LOOKUP)

    def test_a_token_that_cannot_follow_is_the_same_error(self) -> None:
        # Each token may come once, so that the fifth has no candidate.
        model = constant_logits([1.0, 1.0, 1.0, 1.0])
        choice: dict[str, Any] = {"no_repeat_ngram_size": 1, "eos_token_id": None}
        for speed in ({}, LOOKUP, {"assistant_model": constant_logits([1.0] * 4)}):
            session = model.session()
            session.prefill([0])
            with pytest.raises(ValueError, match="no token can be chosen after 4 tokens"):
                session.decode(9, **choice, **speed)
            assert session.tokens == [0, 1, 2, 3]


class TestCounts:
    def test_without_proposals_there_are_none(self, plain: gpt2rs.GPT2) -> None:
        assert plain.generate([1, 2], max_new_tokens=4).speculation is None
        empty = plain.generate([1, 2], max_new_tokens=0, **LOOKUP).speculation
        assert empty == gpt2rs.Speculation(0, 0, 0)
        assert empty.acceptance_rate == 0.0

    def test_a_text_that_repeats_takes_few_passes(self) -> None:
        model = constant_logits([0.0, 5.0, 0.0])
        counts = model.generate([1, 1, 1], max_new_tokens=200, **LOOKUP).speculation
        assert counts is not None
        assert counts.accepted == counts.proposed == 199 - counts.passes
        assert counts.acceptance_rate == 1.0
        # At most 11 tokens a pass, and hardly fewer.
        assert 199 / 11 <= counts.passes < 40

    def test_a_text_that_does_not_repeat_gets_no_proposals(self) -> None:
        model = writes([bytes([65 + i % 26]) for i in range(250)])
        counts = model.generate([0], max_new_tokens=240, **LOOKUP).speculation
        assert counts == gpt2rs.Speculation(0, 0, 239)

    def test_guesses_that_fail_are_given_up(self, plain: gpt2rs.GPT2) -> None:
        # Drawn evenly of 512: what followed before never does.
        uniform = constant_logits([0.0] * 64, n_ctx=1024)
        counts = uniform.generate(
            [1, 2, 3], max_new_tokens=1000, do_sample=True, seed=1, **LOOKUP
        ).speculation
        assert counts is not None
        assert counts.proposed < 30
        assert counts.passes > 990

    @pytest.mark.parametrize("kind", [{}, {"temperature": 1.0, "seed": 2}])
    def test_a_draft_of_the_same_opinion_is_right(self, kind: dict[str, Any]) -> None:
        # A draft draws by the same random bits, so that where distributions are equal the tokens are.
        logits = np.random.default_rng(0).normal(size=40)
        head = {"max_new_tokens": 150, "eos_token_id": None, **kind}
        model = wide(logits, 64)
        # Texts for one prompt share its keys and values, the draft's too.
        number = {"num_return_sequences": 3} if kind else {}
        prompt = list(range(20))
        found = model.generate(prompt, assistant_model=wide(logits, 2), **head, **number)
        for result in found if isinstance(found, list) else [found]:
            counts = result.speculation
            assert counts is not None
            assert counts.accepted == counts.proposed > 60
        expected = model.generate(prompt, **head, **number)
        if isinstance(found, list):
            assert [without_counts(result) for result in found] == expected

    def test_a_draft_as_large_as_the_model_is_not_asked(self, plain: gpt2rs.GPT2) -> None:
        counts = plain.generate(
            [1, 2], max_new_tokens=50, eos_token_id=None, assistant_model=plain
        ).speculation
        assert counts == gpt2rs.Speculation(0, 0, 49)

    def test_a_draft_that_knows_nothing_does_no_harm(self) -> None:
        model = constant_logits([0.0, 2.0, 1.0])
        choice: dict[str, Any] = {"max_new_tokens": 60, "temperature": 1.0, "seed": 5, "eos_token_id": None}
        expected = model.generate([1], **choice)
        lost = gpt2rs.GPT2.from_params(
            {
                "wte": np.ones((3, 1), np.float32),
                "wpe": np.zeros((256, 1), np.float32),
                "blocks": [],
                "ln_f": {"g": np.zeros(1, np.float32), "b": np.full(1, np.nan, np.float32)},
            },
            n_head=1,
        )
        assert without_counts(model.generate([1], assistant_model=lost, **choice)) == expected


def wide(logits: Any, n_embd: int) -> gpt2rs.GPT2:
    """`constant_logits` with more channels than it needs."""
    head = np.zeros((len(logits), n_embd), np.float32)
    head[:, 0] = logits
    return gpt2rs.GPT2.from_params(
        {
            "wte": np.ones((len(logits), n_embd), np.float32),
            "wpe": np.zeros((256, n_embd), np.float32),
            "blocks": [],
            "ln_f": {"g": np.zeros(n_embd, np.float32), "b": np.eye(n_embd, dtype=np.float32)[0]},
            "lm_head": head,
        },
        n_head=1,
    )


class TestRefused:
    @pytest.mark.parametrize(
        ("choice", "message"),
        [
            (
                {"prompt_lookup_num_tokens": 3, "assistant_model": "self"},
                "prompt_lookup_num_tokens is 3.*one",
            ),
            (
                {"prompt_lookup_num_tokens": 3, "context_overflow": "slide", "max_new_tokens": 127},
                '"slide".*129 tokens.*prompt_lookup_num_tokens.*128 positions',
            ),
            (
                {"assistant_model": "self", "context_overflow": "slide"},
                '"slide".*130 tokens.*assistant_model.*128 positions',
            ),
            ({"assistant_model": "other"}, "assistant_model is a model with a vocabulary of 3.*512"),
            ({"assistant_model": "gpt2"}, "assistant_model is 'gpt2'; it must be a gpt2rs.GPT2"),
        ],
    )
    def test_what_does_not_go_together(
        self, plain: gpt2rs.GPT2, choice: dict[str, Any], message: str
    ) -> None:
        models = {"self": plain, "other": constant_logits([0.0, 1.0, 2.0])}
        given_model = choice.get("assistant_model")
        if given_model in models:
            choice = {**choice, "assistant_model": models[given_model]}
        with pytest.raises(ValueError, match=message):
            plain.generate([1, 2], **choice)

    def test_a_text_that_fits_may_be_allowed_to_slide(self, plain: gpt2rs.GPT2) -> None:
        choice: dict[str, Any] = {"max_new_tokens": 126, "eos_token_id": None, "context_overflow": "slide"}
        expected = plain.generate([1, 2], **choice)
        assert without_counts(plain.generate([1, 2], **choice, **LOOKUP)) == expected
