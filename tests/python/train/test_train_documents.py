"""Text as a stream: the same documents and the same tokens as if it were read at once."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpt2rs
from gpt2rs.train.documents import Piece, Span, hold_out, pieces, whole

TOKENIZER = gpt2rs.GPT2.from_pretrained("shakespeare").tokenizer
assert TOKENIZER is not None


def written(tmp_path: Path, *texts: str | bytes) -> list[Path]:
    paths = [tmp_path / f"{i}.txt" for i in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    return paths


def read(path: Path, characters: int = 1 << 20) -> list[Piece]:
    return [piece for span in whole([path]) for piece in pieces(span, characters)]


# Every kind of character that the tokenizer's pattern tells apart, and the marks around which it looks ahead.
ALPHABET = "ab'sé9Ⅷ.,!  \n\n\t\r\u00a0\u2003\x1c\N{SNOWMAN}"


@settings(max_examples=300, deadline=None)
@given(text=st.text(ALPHABET, min_size=1, max_size=200), characters=st.integers(8, 40))
def test_pieces_give_the_tokens_of_the_whole(
    text: str, characters: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if text.isspace():
        return
    (path,) = written(tmp_path_factory.mktemp("text"), text)
    found = read(path, characters)
    assert "".join(piece.text for piece in found) == text
    assert [piece.opens for piece in found] == [True] + [False] * (len(found) - 1)
    # Where a piece had to end without a good place, tokens may differ: in the middle of a word, or beside
    # other white space.
    forced = any(
        not (after.text[0] in " \n" and not before.text[-1].isspace() and not after.text[1:2].isspace())
        for before, after in pairwise(found)
    )
    if not forced:
        tokens = [token for piece in found for token in TOKENIZER.encode_ordinary(piece.text)]
        assert tokens == TOKENIZER.encode_ordinary(text)


def test_a_long_text_is_cut_often_and_only_where_tokens_end(tmp_path: Path) -> None:
    text = "It's 10 o'clock,\n\nsaid  he. " * 400
    (path,) = written(tmp_path, text)
    found = read(path, 100)
    assert len(found) > 50
    tokens = [token for piece in found for token in TOKENIZER.encode_ordinary(piece.text)]
    assert tokens == TOKENIZER.encode_ordinary(text)


@pytest.mark.parametrize("characters", [5, 17, 1000])
def test_separators_go_between_documents(tmp_path: Path, characters: int) -> None:
    (path,) = written(
        tmp_path,
        "<|endoftext|>one two three four<|endoftext|>\n<|endoftext|>five<|endoftext|> six\n<|endoftext|>\n",
    )
    documents: list[str] = []
    for piece in read(path, characters):
        if piece.opens:
            documents.append("")
        documents[-1] += piece.text
    assert documents == ["one two three four", "five", " six\n"]


def test_text_without_a_place_to_cut_is_cut_all_the_same(tmp_path: Path) -> None:
    (path,) = written(tmp_path, "x" * 1000)
    assert [len(piece.text) for piece in read(path, 100)] == [100] * 9 + [100]


def test_characters_across_reads_and_a_byte_order_mark(tmp_path: Path) -> None:
    text = "a" * ((1 << 20) - 1) + "é\N{SNOWMAN}" + "b" * 10
    (path,) = written(tmp_path, "\N{BYTE ORDER MARK}" + text)
    assert "".join(piece.text for piece in read(path)) == text


@pytest.mark.parametrize(
    ("data", "at"), [(b"good\xffbad", 4), (b"cut \xe2\x98", 4), (b"a" * (1 << 20) + b"\xc3(", 1 << 20)]
)
def test_what_is_not_utf8_is_an_error_with_its_place(tmp_path: Path, data: bytes, at: int) -> None:
    (path,) = written(tmp_path, data)
    with pytest.raises(ValueError, match=rf"0\.txt: not UTF-8: .* at byte {at}$"):
        read(path)


def test_the_end_is_held_out_from_a_character_on(tmp_path: Path) -> None:
    first, second = written(tmp_path, "a" * 90, "éééééé")
    kept, held = hold_out(whole([first, second]), 9 / 102)
    # int(102 * 93 / 102) is 93, the middle of the second é.
    assert kept == [Span(first, 0, 90), Span(second, 0, 4)]
    assert held == [Span(second, 4, 12)]
    assert hold_out(whole([first, second]), 0) == (whole([first, second]), [])


def test_tinyshakespeare_s_usual_split(tmp_path: Path) -> None:
    (path,) = written(tmp_path, "x" * 1115394)
    assert hold_out(whole([path]), 0.1)[1] == [Span(path, 1003854, 1115394)]
