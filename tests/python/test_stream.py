"""stream: pieces that make up generate's text, whole characters, and stop strings held back."""

from __future__ import annotations

import gc
import weakref
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import gpt2rs
from gpt2rs.text import TextDecoder
from scripted import Pieces, writes


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """`text` before the stop string that is complete first, of several the longest; was there one?"""
    ends = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    return (text[: min(ends)[1]], True) if ends else (text, False)


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(place % (len(data) + 1) for place in cuts)})
    return [data[start:end] for start, end in pairwise(places)]


def decode(pieces: list[bytes], stops: list[str]) -> TextDecoder:
    decoder = TextDecoder(Pieces(pieces), stops)  # type: ignore[arg-type]
    for token in range(len(pieces)):
        if decoder.push(token):
            break
    decoder.finish()
    return decoder


texts = st.text(alphabet="ab\n€日😀", max_size=30)
stop_strings = st.lists(st.text(alphabet="ab\n€日😀", min_size=1, max_size=4), max_size=3)
cut_places = st.lists(st.integers(0, 200), max_size=30)


@given(texts, stop_strings, cut_places)
def test_pieces_are_the_text_wherever_tokens_end(text: str, stops: list[str], cuts: list[int]) -> None:
    decoder = decode(split(text.encode(), cuts), stops)
    assert ("".join(decoder.pieces), decoder.stopped) == cut(text, stops)
    assert all(decoder.pieces)


@given(st.binary(max_size=30), cut_places)
def test_any_bytes_decode_as_they_do_at_once(data: bytes, cuts: list[int]) -> None:
    assert "".join(decode(split(data, cuts), []).pieces) == data.decode("utf-8", errors="replace")


@given(texts, stop_strings.filter(bool), cut_places)
def test_nothing_given_out_is_ever_taken_back(text: str, stops: list[str], cuts: list[int]) -> None:
    """After every token, what was given out is what stays in front of any stop string that may still come."""
    pieces = split(text.encode(), cuts)
    decoder = TextDecoder(Pieces(pieces), stops)  # type: ignore[arg-type]
    for token in range(len(pieces)):
        stopped = decoder.push(token)
        given_out = "".join(decoder.pieces)
        so_far = b"".join(pieces[: token + 1]).decode("utf-8", errors="ignore")
        assert so_far.startswith(given_out)
        if stopped:
            assert given_out == cut(so_far, stops)[0]
            break
        for stop in stops:
            for length in range(1, len(stop)):
                if so_far.endswith(stop[:length]):
                    assert len(given_out) <= len(so_far) - length


def test_characters_are_whole() -> None:
    model = writes([b">", b"\xf0\x9f", b"\x98", b"\x80\xe6", b"\x97", b"\xa5", b"!"])
    assert list(model.stream([0], max_new_tokens=6)) == ["😀", "日", "!"]
    assert list(model.stream([0], max_new_tokens=4)) == ["😀", "\ufffd"]


def test_possible_stop_strings_are_held_back() -> None:
    model = writes([b">", b"a", b"b", b"a", b"b", b"c", b"d", b"e"])
    assert list(model.stream([0], max_new_tokens=7, stop="abd")) == ["ab", "abc", "d", "e"]
    assert list(model.stream([0], max_new_tokens=7, stop="abc")) == ["ab"]
    assert list(model.stream([0], max_new_tokens=4, stop="abc")) == ["ab", "ab"]
    assert list(model.stream([0], max_new_tokens=7, stop=["abcx", "cd"])) == ["ab", "ab"]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"eos_token_id": None},
        {"temperature": 6.0, "seed": 1, "eos_token_id": None},
        {"temperature": 6.0, "seed": 2, "eos_token_id": None, "stop": ["e", "th", "\n"]},
        {"temperature": 1.0, "seed": 3, "stop": "\n\n", "logprobs": True},
        {"stop": ["\n"], "max_new_tokens": 0},
        {"context_overflow": "slide", "max_new_tokens": 300, "eos_token_id": None},
    ],
)
def test_pieces_joined_are_the_text_of_generate(shakespeare: gpt2rs.GPT2, settings: dict[str, Any]) -> None:
    stream = shakespeare.stream("JULIET:", **settings)
    text = "".join(stream)
    wanted = shakespeare.generate("JULIET:", **settings)
    assert text == wanted.text
    assert stream.result == wanted
    assert stream.result.text == text
    assert stream.tokens == wanted.tokens


def test_errors_come_before_the_first_piece(shakespeare: gpt2rs.GPT2, plain: gpt2rs.GPT2) -> None:
    with pytest.raises(ValueError, match="top_p"):
        shakespeare.stream("a", top_p=3)
    with pytest.raises(ValueError, match="max_new_tokens is 300"):
        shakespeare.stream("a", max_new_tokens=300)
    with pytest.raises(TypeError, match="num_return_sequences"):
        shakespeare.stream("a", num_return_sequences=2)  # type: ignore[call-arg]
    with pytest.raises(RuntimeError, match="no tokenizer"):
        plain.stream([1])


def test_the_result_is_there_at_the_end() -> None:
    stream = writes([b">", b"a", b"b", b"c"]).stream([0], max_new_tokens=3)
    assert next(stream) == "a"
    assert stream.tokens == [1]
    with pytest.raises(RuntimeError, match="not come to its end"):
        _ = stream.result
    assert list(stream) == ["b", "c"]
    assert stream.result.finish_reason == "length"
    assert list(stream) == []


def test_closing_early_frees_the_sequence(shakespeare: gpt2rs.GPT2) -> None:
    with shakespeare.stream("ROMEO:", max_new_tokens=100, eos_token_id=None) as stream:
        next(stream)
        steps = weakref.ref(stream._steps)
        assert stream._text.session is not None
    assert list(stream) == []
    assert stream._text.session is None
    assert len(stream.tokens) < 100
    del stream
    gc.collect()
    assert steps() is None
    assert shakespeare.generate("ROMEO:", max_new_tokens=3).tokens


def test_two_streams_of_one_model_do_not_mix(shakespeare: gpt2rs.GPT2) -> None:
    prompts = ("ROMEO:", "JULIET:")
    first, second = (shakespeare.stream(prompt, max_new_tokens=20) for prompt in prompts)
    pieces: tuple[list[str], list[str]] = ([], [])
    for a, b in zip(first, second, strict=False):
        pieces[0].append(a)
        pieces[1].append(b)
    pieces[0].extend(first)
    pieces[1].extend(second)
    for prompt, part in zip(prompts, pieces, strict=True):
        wanted = shakespeare.generate(prompt, max_new_tokens=20).text
        assert wanted.startswith("".join(part)) or "".join(part) == wanted
