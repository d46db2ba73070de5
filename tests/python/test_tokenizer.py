"""Tokenizers from a folder's files and the published one, against tiktoken's own and against plain BPE."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2rs.tokenizer import byte_characters, load_tokenizer

SHAKESPEARE = Path(__file__).parents[2] / "python" / "gpt2rs" / "models" / "shakespeare"
TEXTS = [
    "Hello, I'm a language model, and it's 2019!",
    "  two  spaces\tand\ttabs\n\n\nand lines \r\n ",
    "I'll we've you're he'd 'tis CAN'T don't' ''s",
    "naïve façade — “quotes” … £5 ½ ²",
    "日本語のテキストと한국어 그리고 العربية",
    "👩‍👩‍👧‍👦 🇫🇮 e\u0301 \u200b\ufeff\u00a0x",
    "def f(x):\n    return x ** 2  # square\n",
    "a" * 3000 + " " * 3000 + "\n" * 300,
    "\x00\x01\x7f\x80\xad\xa0\uffff\U0010ffff",
    "",
]

# Text of every kind: any characters, and many white-space and letter runs, where splitting is delicate.
texts = st.text() | st.text(alphabet="ab '\n\t\u00a0\u3000sdtl12é🙂日")


def write(
    folder: Path,
    vocab: Mapping[str, object],
    merges: str,
    pair: tuple[str, str] = ("vocab.json", "merges.txt"),
) -> Path:
    (folder / pair[0]).write_text(json.dumps(vocab), encoding="utf-8")
    (folder / pair[1]).write_text(merges, encoding="utf-8")
    return folder


def small(merges: list[tuple[str, str]], special: tuple[str, ...] = ()) -> dict[str, int]:
    """A vocabulary: special tokens, the 256 bytes, and what the merges make."""
    tokens = [*special, *byte_characters(), *(left + right for left, right in merges)]
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}


def lines(merges: list[tuple[str, str]]) -> str:
    return "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges)


def published() -> tiktoken.Encoding:
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:
        pytest.skip(
            f"tiktoken's gpt2 encoding can be neither downloaded nor found in TIKTOKEN_CACHE_DIR: {error}"
        )


# ---- the built-in model's


@pytest.fixture(scope="module")
def shakespeare() -> tiktoken.Encoding:
    encoding = load_tokenizer(SHAKESPEARE, 1024)
    assert encoding is not None
    return encoding


def test_the_built_in_tokenizer(shakespeare: tiktoken.Encoding) -> None:
    vocab = json.loads((SHAKESPEARE / "vocab.json").read_text(encoding="utf-8"))
    assert shakespeare.n_vocab == len(vocab) == 1024
    assert shakespeare.encode("<|endoftext|>", allowed_special="all") == [0]
    assert shakespeare.encode("!") == [vocab["!"]]
    assert shakespeare.encode(" the") == [vocab["Ġthe"]]
    assert shakespeare.decode([vocab["Ġthe"], 0]) == " the<|endoftext|>"


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_round_trips(shakespeare: tiktoken.Encoding, text: str) -> None:
    assert shakespeare.decode(shakespeare.encode(text)) == text


@given(text=texts)
def test_any_text_comes_back(shakespeare: tiktoken.Encoding, text: str) -> None:
    tokens = shakespeare.encode(text, disallowed_special=())
    assert shakespeare.decode(tokens) == text
    assert all(0 < token < 1024 for token in tokens)


# ---- GPT-2's published files


@pytest.fixture(scope="module")
def published_files() -> Path:
    folder = os.environ.get("GPT2RS_GPT2_TOKENIZER")
    if not folder:
        pytest.skip("GPT2RS_GPT2_TOKENIZER does not name a folder with GPT-2's vocab.json and merges.txt")
    return Path(folder)


@pytest.fixture(scope="module")
def ours(published_files: Path) -> tiktoken.Encoding:
    encoding = load_tokenizer(published_files, 50257)
    assert encoding is not None
    return encoding


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_the_published_files_are_tiktokens_gpt2(ours: tiktoken.Encoding, text: str) -> None:
    assert ours.encode(text) == published().encode(text)
    assert ours.n_vocab == published().n_vocab


@given(text=texts)
@settings(max_examples=500)
def test_any_text_is_encoded_as_tiktoken_does(ours: tiktoken.Encoding, text: str) -> None:
    tokens = ours.encode(text, allowed_special="all")
    assert tokens == published().encode(text, allowed_special="all")
    assert ours.decode(tokens) == text


def test_the_other_names_of_the_files(published_files: Path, ours: tiktoken.Encoding, tmp_path: Path) -> None:
    shutil.copy(published_files / "vocab.json", tmp_path / "encoder.json")
    shutil.copy(published_files / "merges.txt", tmp_path / "vocab.bpe")
    encoding = load_tokenizer(tmp_path, 50304)
    assert encoding is not None
    assert encoding.encode(TEXTS[0]) == ours.encode(TEXTS[0])


@pytest.mark.parametrize("n_vocab", [50257, 50304])
def test_the_published_encoding_without_files(n_vocab: int, tmp_path: Path) -> None:
    published()
    for folder in (None, tmp_path):
        encoding = load_tokenizer(folder, n_vocab)
        assert encoding is not None
        assert encoding.encode("Hello, I'm a language model,") == [15496, 11, 314, 1101, 257, 3303, 2746, 11]


def test_a_download_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> tiktoken.Encoding:
        raise OSError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    with pytest.raises(
        RuntimeError, match=r"could not download GPT-2's encoding: no route to host; put vocab\.json"
    ):
        load_tokenizer(None, 50257)


@pytest.mark.parametrize("n_vocab", [1, 512, 50256, 50305])
def test_no_tokenizer(n_vocab: int, tmp_path: Path) -> None:
    assert load_tokenizer(None, n_vocab) is None
    assert load_tokenizer(tmp_path, n_vocab) is None


# ---- vocabularies of one's own


def byte_pair_encoding(word: str, ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """GPT-2's own procedure: merge all pairs of the lowest rank, left to right, until none is listed."""
    parts = list(word)
    while len(parts) > 1:
        best = min(itertools.pairwise(parts), key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        merged: list[str] = []
        at = 0
        while at < len(parts):
            here = tuple(parts[at : at + 2]) == best
            merged.append("".join(best) if here else parts[at])
            at += 2 if here else 1
        parts = merged
    return parts


def random_merges(rng: random.Random, letters: str) -> list[tuple[str, str]]:
    """Up to seven merges over few letters, most of which no training would make."""
    tokens, merges = list(letters), []
    for _ in range(rng.randint(1, 7)):
        pair = (rng.choice(tokens), rng.choice(tokens))
        merges.append(pair)
        if "".join(pair) not in tokens:
            tokens.append("".join(pair))
    return merges


def test_merges_mean_what_they_mean_to_gpt2_or_are_refused(tmp_path: Path) -> None:
    seen = {True: 0, False: 0}
    for seed in range(300):
        rng = random.Random(seed)
        letters = rng.choice(["a", "ab", "abc"])
        merges = random_merges(rng, letters)
        vocab = small(merges)
        ranks: dict[tuple[str, str], int] = {}
        first_way: dict[str, tuple[str, str]] = {}
        for pair in merges:
            ranks.setdefault(pair, len(ranks))
            first_way.setdefault("".join(pair), pair)
        # tiktoken can represent merges when each token's own pair is the last one merged in its text.
        representable = all(
            byte_pair_encoding(token, ranks) == [token]
            and byte_pair_encoding(token, {other: rank for other, rank in ranks.items() if other != pair})
            == list(pair)
            for token, pair in first_way.items()
        )
        seen[representable] += 1
        write(tmp_path, vocab, lines(merges))
        if not representable:
            with pytest.raises(ValueError, match=r"merges\.txt: merge \d+, '[abc]+', never applies"):
                load_tokenizer(tmp_path, len(vocab))
            continue
        encoding = load_tokenizer(tmp_path, len(vocab))
        assert encoding is not None
        for length in range(1, 12):
            word = "".join(rng.choice(letters) for _ in range(length))
            got = [encoding.decode([token]) for token in encoding.encode(word)]
            assert got == byte_pair_encoding(word, ranks), (merges, word)
    assert min(seen.values()) > 50


def test_special_tokens_first_last_and_added(tmp_path: Path) -> None:
    merges = [("h", "e"), ("Ġ", "he")]
    vocab = small(merges, special=("<|endoftext|>", "<pad>"))
    vocab["<last one>"] = len(vocab)
    added = {"<|user|>": len(vocab), "<pad>": 1}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added), encoding="utf-8")
    encoding = load_tokenizer(write(tmp_path, vocab, lines(merges)), 300)
    assert encoding is not None
    assert encoding.special_tokens_set == {"<|endoftext|>", "<pad>", "<last one>", "<|user|>"}
    tokens = encoding.encode("<|endoftext|> he<last one><|user|>", allowed_special="all")
    assert tokens == [0, vocab["Ġhe"], vocab["<last one>"], added["<|user|>"]]
    assert encoding.decode(tokens) == "<|endoftext|> he<last one><|user|>"


def test_merges_without_a_version_and_with_dos_lines(tmp_path: Path) -> None:
    merges = [("#", "!"), ("a", "b")]
    for text in ("# !\na b\n", "#version: 0.2\r\n# !\r\na b\r\n", "# !\na b"):
        encoding = load_tokenizer(write(tmp_path, small(merges), text), 300)
        assert encoding is not None
        assert encoding.encode("ab#!") == [257, 256]


@pytest.mark.parametrize("pair", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
def test_half_a_pair_of_files(pair: tuple[str, str], tmp_path: Path) -> None:
    for there, missing in (pair, pair[::-1]):
        write(tmp_path, small([]), "", pair)
        (tmp_path / missing).unlink()
        with pytest.raises(FileNotFoundError, match=f"{there} is there without {missing}"):
            load_tokenizer(tmp_path, 50257)
        (tmp_path / there).unlink()


GOOD = [("a", "b"), ("c", "d"), ("ab", "cd")]


@pytest.mark.parametrize(
    ("vocab", "merges", "message"),
    [
        ("[1, 2]", lines(GOOD), r"vocab\.json: expected an object"),
        ("{", lines(GOOD), r"vocab\.json, line 1: not JSON"),
        ("[" * 200_000, lines(GOOD), r"vocab\.json: JSON nested too deeply"),
        (
            {**small(GOOD), "abcd": "258"},
            lines(GOOD),
            r"the id of token 'abcd' is not an integer from 0 to 299",
        ),
        ({**small(GOOD), "abcd": True}, lines(GOOD), "the id of token 'abcd'"),
        ({**small(GOOD), "abcd": -1}, lines(GOOD), "the id of token 'abcd'"),
        ({**small(GOOD), "abcd": 300}, lines(GOOD), "the id of token 'abcd'"),
        ({**small(GOOD), "abcd": 10**30}, lines(GOOD), "the id of token 'abcd'"),
        ({**small(GOOD), "abcd": 257}, lines(GOOD), r"tokens 'cd' and 'abcd' share the id 257"),
        ({**small(GOOD), "": 299}, lines(GOOD), "a token is empty"),
        ({**small(GOOD), "\ud800": 299}, lines(GOOD), "half of a surrogate pair"),
        (
            {token: number for token, number in small(GOOD).items() if token != "Ġ"},
            lines(GOOD),
            "no token for byte 0x20",
        ),
        (small(GOOD), "#version: 0.2\nab\n", r"merges\.txt, line 2: 'ab', expected two tokens"),
        (small(GOOD), "a b c\n", r"merges\.txt, line 1: 'a b c', expected two tokens"),
        (small(GOOD), " a\n", r"merges\.txt, line 1: ' a', expected two tokens"),
        (small(GOOD), "a b\na c\n", r"merges\.txt, line 2: token 'ac' is not in the vocabulary"),
        (
            small(GOOD),
            "ab cd\na b\nc d\n",
            r"merges\.txt, line 1: 'ab' is no byte, and no merge before it makes it",
        ),
        (small(GOOD), "c d\na b\nab cd\n", r"merges\.txt, line 2: 'ab' has id 256, expected more than 257"),
        ({**small(GOOD), "日": 298, "日a": 299}, "日 a\n", "'日' is no byte"),
    ],
)
def test_malformed_files(vocab: object, merges: str, message: str, tmp_path: Path) -> None:
    text = vocab if isinstance(vocab, str) else json.dumps(vocab)
    (tmp_path / "vocab.json").write_text(text, encoding="utf-8")
    (tmp_path / "merges.txt").write_text(merges, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path, 300)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "added_tokens.json"])
def test_files_that_are_not_text(name: str, tmp_path: Path) -> None:
    write(tmp_path, small(GOOD), lines(GOOD))
    (tmp_path / name).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=rf"{name}: expected UTF-8 text, invalid start byte at byte 0"):
        load_tokenizer(tmp_path, 300)


def test_an_added_token_on_a_taken_id(tmp_path: Path) -> None:
    write(tmp_path, small(GOOD), lines(GOOD))
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 256}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"added_tokens\.json: the id 256 of token '<pad>' is taken"):
        load_tokenizer(tmp_path, 300)
