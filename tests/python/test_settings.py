"""Settings: what is accepted, what is refused and how, and what each one does to the distribution."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, get_type_hints

import numpy as np
import pytest

import gpt2rs
from golden_cases import GOLDEN
from gpt2rs.settings import Options, Settings
from scripted import constant_logits

OUT_OF_RANGE: list[tuple[str, Any]] = [
    ("max_new_tokens", -1),
    ("max_new_tokens", 1.5),
    ("max_new_tokens", True),
    ("max_new_tokens", 10**30),
    ("min_new_tokens", -1),
    ("min_new_tokens", None),
    ("do_sample", 1),
    ("do_sample", "yes"),
    ("temperature", -0.1),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("temperature", "warm"),
    ("temperature", True),
    ("temperature", 10**400),
    ("top_k", -1),
    ("top_k", 2.0),
    ("top_p", -0.01),
    ("top_p", 1.01),
    ("min_p", 1.5),
    ("typical_p", 0),
    ("typical_p", 1.1),
    ("epsilon_cutoff", 1),
    ("eta_cutoff", -0.1),
    ("repetition_penalty", 0),
    ("repetition_penalty", -1.0),
    ("repetition_penalty", None),
    ("presence_penalty", math.inf),
    ("frequency_penalty", math.nan),
    ("no_repeat_ngram_size", -1),
    ("bad_words_ids", [1, 2]),
    ("bad_words_ids", [[]]),
    ("bad_words_ids", [[-1]]),
    ("suppress_tokens", 5),
    ("suppress_tokens", ["a"]),
    ("logit_bias", [1]),
    ("logit_bias", {1: math.nan}),
    ("logit_bias", {1: math.inf}),
    ("logit_bias", {"a": 1}),
    ("stop", ""),
    ("stop", ["a", ""]),
    ("stop", 5),
    ("stop", b"a"),
    ("eos_token_id", -1),
    ("eos_token_id", "end"),
    ("eos_token_id", [1, None]),
    ("seed", -1),
    ("seed", 2**64),
    ("seed", 0.5),
    ("seed", [1, -1]),
    ("num_return_sequences", 0),
    ("logprobs", 3),
    ("top_logprobs", -1),
    ("prompt_lookup_num_tokens", 0),
    ("max_matching_ngram_size", 0),
    ("max_matching_ngram_size", None),
    ("assistant_model", "gpt2"),
    ("num_assistant_tokens", 0),
    ("context_overflow", "crop"),
    ("context_overflow", None),
]


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_out_of_range_names_setting_value_and_range(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name}.* (is|must)") as caught:
        Settings.of({name: value})
    assert "must be" in str(caught.value)


IN_RANGE: list[tuple[str, Any, Any]] = [
    ("max_new_tokens", np.int64(5), 5),
    ("max_new_tokens", 0, 0),
    ("do_sample", np.bool_(True), True),
    ("temperature", np.float32(0.5), 0.5),
    ("temperature", 2, 2.0),
    ("temperature", np.int8(0), 0.0),
    ("top_k", np.uint8(3), 3),
    ("top_p", 1, 1.0),
    ("suppress_tokens", np.array([3, 4]), (3, 4)),
    ("suppress_tokens", [], ()),
    ("bad_words_ids", [np.array([1]), (2, 3)], ((1,), (2, 3))),
    ("logit_bias", {np.int32(3): np.float64(1.5), 4: -math.inf}, {3: 1.5, 4: -math.inf}),
    ("eos_token_id", np.int64(7), 7),
    ("eos_token_id", np.array([7, 8]), (7, 8)),
    ("seed", np.uint64(2**64 - 1), 2**64 - 1),
    ("seed", np.arange(3), (0, 1, 2)),
]


@pytest.mark.parametrize(("name", "value", "plain_value"), IN_RANGE)
def test_numpy_values_become_plain_ones(name: str, value: Any, plain_value: Any) -> None:
    checked = getattr(Settings.of({name: value}), name)
    assert checked == plain_value
    assert type(checked) is type(plain_value)


def test_unknown_setting_names_the_nearest() -> None:
    with pytest.raises(TypeError, match=r"'temprature'.*did you mean 'temperature'"):
        Settings.of({"temprature": 1})
    with pytest.raises(TypeError, match=r"'max_length'.*max_new_tokens"):
        Settings.of({"max_length": 1})
    with pytest.raises(TypeError, match=r"'xyz'.*the settings are max_new_tokens, "):
        Settings.of({"xyz": 1})


def test_typed_keywords_are_the_settings() -> None:
    settings = {field.name for field in fields(Settings)}
    assert set(get_type_hints(Options)) == settings - {"num_return_sequences"}


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True},
        {"temperature": 0.5},
        {"temperature": 1},
        {"top_k": 5},
        {"top_p": 0.9},
        {"min_p": 0.1},
        {"typical_p": 0.9},
        {"epsilon_cutoff": 0.01},
        {"eta_cutoff": 0.01},
        {"do_sample": True, "seed": 3},
    ],
)
def test_what_asks_for_sampling(options: dict[str, Any]) -> None:
    assert Settings.of(options).sampling


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"seed": 3},
        {"temperature": 0},
        {"temperature": 0, "top_k": 5},
        {"do_sample": False, "temperature": 0.7},
    ],
)
def test_what_stays_greedy(options: dict[str, Any]) -> None:
    assert not Settings.of(options).sampling


def test_contradictions() -> None:
    with pytest.raises(ValueError, match=r"min_new_tokens is 5.*max_new_tokens, which is 3"):
        Settings.of({"min_new_tokens": 5, "max_new_tokens": 3})
    with pytest.raises(ValueError, match=r"temperature is 0.*do_sample is True"):
        Settings.of({"temperature": 0, "do_sample": True})
    with pytest.raises(ValueError, match=r"num_return_sequences is 2.*sampling"):
        Settings.of({"num_return_sequences": 2, "seed": 1})


@pytest.mark.parametrize(
    "options",
    [
        {"bad_words_ids": [[3], [1, 512]]},
        {"suppress_tokens": [512]},
        {"logit_bias": {512: 1.0}},
        {"eos_token_id": 512},
        {"eos_token_id": [1, 512]},
    ],
)
def test_ids_outside_the_vocabulary(plain: gpt2rs.GPT2, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(options))}.*512.*0 to 511"):
        plain.generate([1], max_new_tokens=1, **options)


def test_more_top_logprobs_than_tokens(plain: gpt2rs.GPT2) -> None:
    with pytest.raises(ValueError, match=r"top_logprobs is 513.*512"):
        plain.generate([1], max_new_tokens=1, top_logprobs=513)


def test_seeds_match_prompts(plain: gpt2rs.GPT2) -> None:
    with pytest.raises(ValueError, match=r"seed has 3 values.*one a prompt \(2\)"):
        plain.generate([[1], [2]], seed=[1, 2, 3], do_sample=True)


def fits(observed: Counter[int], probabilities: Sequence[float]) -> bool:
    """Pearson's chi-squared test at 4 sigma by Wilson and Hilferty's approximation, rare outcomes taken
    together.

    Outcomes of probability 0 must not have been seen at all.
    """
    draws = observed.total()
    if any(probabilities[token] == 0 for token in observed):
        return False
    common = [token for token, p in enumerate(probabilities) if p * draws >= 5]
    rare = [token for token, p in enumerate(probabilities) if 0 < p * draws < 5]
    cells = [(observed[token], probabilities[token] * draws) for token in common]
    if rare:
        cells.append(
            (sum(observed[token] for token in rare), sum(probabilities[token] for token in rare) * draws)
        )
    statistic = sum((seen - mean) ** 2 / mean for seen, mean in cells)
    freedom = len(cells) - 1
    if freedom == 0:
        return statistic < 1e-6
    spread = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread) < 4


def test_the_chi_squared_test_can_fail() -> None:
    assert fits(Counter({0: 500, 1: 250, 2: 250}), [0.5, 0.25, 0.25])
    assert not fits(Counter({0: 580, 1: 210, 2: 210}), [0.5, 0.25, 0.25])
    assert not fits(Counter({0: 999, 1: 1}), [1.0, 0.0])


PROCESSORS = json.loads((GOLDEN / "processors.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=f"{row['name']}-{'-'.join(map(str, row['settings'].values()))}")
        for row in PROCESSORS["rows"]
    ],
)
def test_draws_follow_the_processors_of_transformers(row: dict[str, Any]) -> None:
    model = constant_logits(PROCESSORS["scores"])
    results = model.generate(
        PROCESSORS["seen"],
        max_new_tokens=1,
        do_sample=True,
        seed=11,
        num_return_sequences=4000,
        **row["settings"],
    )
    assert fits(Counter(result.tokens[0] for result in results), row["probs"])


def test_presence_and_frequency_penalties_and_bias() -> None:
    """Where a penalty or a bias equals the distance between two logits, greedy choice changes over."""
    model = constant_logits([0.0, 1.0, 1.75, -5.0])

    def tokens(**settings: Any) -> list[int]:
        return model.generate([2], max_new_tokens=6, **settings).tokens

    assert tokens() == [2, 2, 2, 2, 2, 2]
    # The prompt's own 2 does not count; after one penalty each of 1 the order is 2, 1, 0 again.
    assert tokens(presence_penalty=1.0) == [2, 1, 2, 2, 2, 2]
    assert tokens(frequency_penalty=0.5) == [2, 2, 1, 2, 1, 2]
    assert tokens(logit_bias={3: 10.0}) == [3] * 6
    assert tokens(logit_bias={2: -math.inf}) == [1] * 6
    assert tokens(suppress_tokens=[2, 1]) == [0] * 6
    # As in transformers, a sequence longer than the text so far is not looked for yet.
    assert tokens(bad_words_ids=[[2, 2]]) == [2, 1, 2, 1, 2, 1]
    assert model.generate([2], max_new_tokens=3, no_repeat_ngram_size=1).tokens == [1, 0, 3]


def test_eos_and_min_new_tokens() -> None:
    model = constant_logits([0.0, 1.0, 2.0])
    result = model.generate([0], max_new_tokens=5, eos_token_id=2)
    assert (result.tokens, result.finish_reason) == ([2], "eos")
    result = model.generate([0], max_new_tokens=5, eos_token_id=[0, 2], min_new_tokens=3)
    assert (result.tokens, result.finish_reason) == ([1, 1, 1, 2], "eos")
    result = model.generate([0], max_new_tokens=5, eos_token_id=None)
    assert (result.tokens, result.finish_reason) == ([2] * 5, "length")
