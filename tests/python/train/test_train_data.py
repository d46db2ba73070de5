"""Files of tokens, caches of them, and what the settings make of paths."""

from __future__ import annotations

import errno
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from full_disk import filling_up
from prose import prose

from gpt2rs.train import TrainSettings
from gpt2rs.train.corpus import Tokens, open_corpus
from gpt2rs.train.token_files import ShardWriter, check_ids, open_tokens
from gpt2rs.train.vocabulary import Vocabulary

SHAKESPEARE = Vocabulary.named("shakespeare")
END_OF_TEXT = 0


def llmc(
    ids: list[int], *, magic: int = 20240520, version: int = 1, count: int | None = None, kind: str = "<u2"
) -> bytes:
    """A file as llm.c's data scripts write it."""
    header = struct.pack("<3i", magic, version, len(ids) if count is None else count)
    return header + bytes(1024 - len(header)) + np.array(ids, kind).tobytes()


def corpus(vocabulary: Vocabulary = SHAKESPEARE, n_vocab: int = 1024, **values: Any) -> tuple[Tokens, Tokens]:
    return open_corpus(TrainSettings(**values), vocabulary, n_vocab)


def ids_of(tokens: Tokens) -> list[int]:
    return tokens.read(0, len(tokens)).tolist() if len(tokens) else []


class TestTokenFiles:
    def test_of_llmc(self, tmp_path: Path) -> None:
        path = tmp_path / "x.bin"
        path.write_bytes(llmc([5, 50256, 7]))
        assert open_tokens(path).tolist() == [5, 50256, 7]

    def test_of_llmc_for_large_vocabularies(self, tmp_path: Path) -> None:
        path = tmp_path / "x.bin"
        path.write_bytes(llmc([5, 128000, 7], magic=20240801, version=7, kind="<u4"))
        assert open_tokens(path).tolist() == [5, 128000, 7]

    def test_of_nanogpt(self, tmp_path: Path) -> None:
        path = tmp_path / "x.bin"
        np.array([1, 65535, 3], np.uint16).tofile(path)
        assert open_tokens(path).tolist() == [1, 65535, 3]

    @pytest.mark.parametrize(("n_vocab", "kind"), [(1024, np.uint16), (65536, np.uint16), (65537, np.uint32)])
    def test_written_are_read_across_shards(self, tmp_path: Path, n_vocab: int, kind: type) -> None:
        ids = np.arange(n_vocab - 25, n_vocab)
        with ShardWriter(tmp_path, n_vocab, shard_tokens=10) as writer:
            writer.write(ids[:3])
            writer.write(ids[3:])
        shards = [open_tokens(path) for path in writer.paths]
        assert [path.name for path in writer.paths] == [f"tokens_00000{i}.bin" for i in range(3)]
        assert [len(shard) for shard in shards] == [10, 10, 5]
        assert {shard.dtype for shard in shards} == {np.dtype(kind)}
        assert np.concatenate(shards).tolist() == ids.tolist()

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (llmc([1, 2, 3], version=2), "version 2, expected version 1"),
            (llmc([1, 2, 3])[:-1], "1029 bytes, expected 1030 for the 3 tokens"),
            (llmc([1, 2, 3], count=4), "1030 bytes, expected 1032 for the 4 tokens"),
            (llmc([1, 2, 3], count=-1), "expected"),
            (llmc([1])[:500], "500 bytes, expected 1026"),
            (llmc([]), "no tokens"),
            (llmc([1], magic=20240326), "a model of llm.c, expected token ids"),
            (b"PK\x03\x04 and more", "a zip archive"),
            (b"", "no tokens"),
            (b"abc", "3 bytes; neither llm.c's header .* nor nanoGPT's"),
        ],
    )
    def test_malformed_are_errors(self, tmp_path: Path, data: bytes, message: str) -> None:
        path = tmp_path / "x.bin"
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message) as error:
            open_tokens(path)
        assert str(path) in str(error.value)

    def test_ids_beyond_the_vocabulary_are_found_wherever_they_are(self, tmp_path: Path) -> None:
        path = tmp_path / "x.bin"
        ids = np.full((1 << 24) + 10, 3, np.uint16)
        ids[(1 << 24) + 5] = 1024
        ids.tofile(path)
        check_ids(path, open_tokens(path), 1025)
        with pytest.raises(ValueError, match=r"token 16777221 is 1024, expected below 1024"):
            check_ids(path, open_tokens(path), 1024)


class TestTokens:
    def test_read_across_parts(self) -> None:
        parts = [np.arange(5, dtype=np.uint16), np.array([], np.uint16), np.arange(5, 12, dtype=np.uint16)]
        tokens = Tokens(parts)
        for start in range(12):
            for count in range(1, 13 - start):
                assert tokens.read(start, count).tolist() == list(range(start, start + count))
        assert tokens.read(0, 1).dtype == np.uint32

    def test_split(self) -> None:
        tokens = Tokens([np.arange(5, dtype=np.uint16), np.arange(5, 12, dtype=np.uint16)])
        for fraction in (0.0, 0.25, 0.5, 0.75, 0.99):
            first, second = tokens.split(fraction)
            assert ids_of(first) + ids_of(second) == list(range(12))
            assert len(first) == int(12 * (1 - fraction))


class TestCorpus:
    def test_is_the_tokens_of_its_documents(self, tmp_path: Path) -> None:
        folder = tmp_path / "texts"
        (folder / "below").mkdir(parents=True)
        (folder / "a.txt").write_text("My lord,<|endoftext|>good night.")
        (folder / "below" / "b.txt").write_text("Farewell.")
        (folder / "notes.md").write_text("not read")
        train, held = corpus(data=folder, val_fraction=0)
        encode = SHAKESPEARE.encoding.encode_ordinary
        expected = [
            END_OF_TEXT,
            *encode("My lord,"),
            END_OF_TEXT,
            *encode("good night."),
            END_OF_TEXT,
            *encode("Farewell."),
        ]
        assert ids_of(train) == expected
        assert len(held) == 0

    def test_is_tokenised_once(self, text: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = [ids_of(tokens) for tokens in corpus(data=text)]
        kept = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
        # Elsewhere, under another name, with the same content.
        other = text.with_name("other.txt")
        other.write_bytes(text.read_bytes())
        with monkeypatch.context() as patch:
            patch.setattr("gpt2rs.train.sharding._write", None)
            assert [ids_of(tokens) for tokens in corpus(data=other)] == first
        assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == kept
        text.write_text(text.read_text() + " more")
        assert [ids_of(tokens) for tokens in corpus(data=text)] != first

    def test_of_another_tokenizer_is_another(self, text: Path, cache: Path, tmp_path: Path) -> None:
        pytest.importorskip("tokenizers")
        from gpt2rs.train.bpe import train_tokenizer

        train_tokenizer([str(text)], tmp_path / "tokenizer", 300)
        corpus(data=text)
        own = Vocabulary.named(str(tmp_path / "tokenizer"))
        train, _ = corpus(own, own.n_tokens, data=text, val_fraction=0)
        assert own.encoding.decode(ids_of(train)[1:]) == text.read_text()

    @pytest.mark.parametrize("damage", ["cut", "gone", "about"])
    def test_damaged_shards_are_made_again(self, text: Path, cache: Path, damage: str) -> None:
        expected = ids_of(corpus(data=text, val_fraction=0)[0])
        (shard,) = cache.rglob("*.bin")
        if damage == "cut":
            shard.write_bytes(shard.read_bytes()[:-2])
        elif damage == "gone":
            shard.unlink()
        else:
            shard.with_name("corpus.json").write_text('{"shards": 1}')
        assert ids_of(corpus(data=text, val_fraction=0)[0]) == expected

    def test_a_failure_leaves_no_half_shards(self, tmp_path: Path, cache: Path) -> None:
        (tmp_path / "bad.txt").write_bytes(b"good for a while \xff")
        with pytest.raises(ValueError, match="not UTF-8"):
            corpus(data=tmp_path / "bad.txt", val_fraction=0)
        assert [path for path in cache.iterdir() if not path.name.startswith(".lock-")] == []

    def test_a_disk_that_is_full_leaves_nothing(self, text: Path, cache: Path) -> None:
        with filling_up() as leave_room_for:
            leave_room_for(4000)
            with pytest.raises(OSError, match=r"cannot write tokens into .*: ") as error:
                corpus(data=text, val_fraction=0)
        assert error.value.__cause__.errno == errno.EFBIG
        assert [path for path in cache.iterdir() if not path.name.startswith(".lock-")] == []
        assert len(corpus(data=text, val_fraction=0)[0]) > 2000

    def test_held_out_text_is_the_end(self, text: Path) -> None:
        train, held = corpus(data=text, val_fraction=0.25)
        n_bytes = text.stat().st_size
        decode = SHAKESPEARE.encoding.decode
        assert decode(ids_of(train)[1:]).encode() == text.read_bytes()[: int(n_bytes * 0.75)]
        assert decode(ids_of(held)[1:]).encode() == text.read_bytes()[int(n_bytes * 0.75) :]

    def test_held_out_data_of_its_own(self, text: Path, tmp_path: Path) -> None:
        other = tmp_path / "held.txt"
        other.write_text(prose(2, 50))
        train, held = corpus(data=text, val_data=[other])
        assert SHAKESPEARE.encoding.decode(ids_of(train)[1:]) == text.read_text()
        assert SHAKESPEARE.encoding.decode(ids_of(held)[1:]) == other.read_text()

    def test_token_files_named_val_are_held_out(self, tmp_path: Path) -> None:
        folder = tmp_path / "fineweb"
        folder.mkdir()
        for name, ids in {
            "web_train_000001": [1, 2],
            "web_train_000002": [3],
            "web_val_000000": [4, 5],
        }.items():
            (folder / f"{name}.bin").write_bytes(llmc(ids))
        assert [ids_of(tokens) for tokens in corpus(data=folder)] == [[1, 2, 3], [4, 5]]
        np.array([6, 7], np.uint16).tofile(tmp_path / "train.bin")
        np.array([8], np.uint16).tofile(tmp_path / "val.bin")
        found = corpus(data=[tmp_path / "train.bin", tmp_path / "val.bin"])
        assert [ids_of(tokens) for tokens in found] == [[6, 7], [8]]

    def test_the_end_of_token_files_is_held_out(self, tmp_path: Path) -> None:
        (tmp_path / "a.bin").write_bytes(llmc(list(range(10))))
        found = corpus(data=tmp_path / "a.bin", val_fraction=0.2)
        assert [ids_of(tokens) for tokens in found] == [list(range(8)), [8, 9]]

    @pytest.mark.parametrize(
        ("files", "error", "message"),
        [
            ({}, FileNotFoundError, r"no \*.txt below it, and no \*.bin in it"),
            ({"a.bin": llmc([1024])}, ValueError, r"a.bin: token 0 is 1024, expected below 1024"),
            ({"a.bin": llmc([1])[:-1]}, ValueError, r"a.bin: 1025 bytes"),
        ],
    )
    def test_of_hostile_files_is_an_error(
        self, tmp_path: Path, files: dict[str, bytes], error: type[Exception], message: str
    ) -> None:
        folder = tmp_path / "data"
        folder.mkdir()
        for name, data in files.items():
            (folder / name).write_bytes(data)
        with pytest.raises(error, match=message):
            corpus(data=folder)

    def test_of_text_and_tokens_is_an_error(self, text: Path, tmp_path: Path) -> None:
        (tmp_path / "a.bin").write_bytes(llmc([1]))
        with pytest.raises(ValueError, match="give one of the two kinds"):
            corpus(data=[text, tmp_path / "a.bin"])

    def test_of_text_without_a_tokenizer_is_an_error(self, text: Path) -> None:
        with pytest.raises(ValueError, match='is text, and tokenizer is "none"'):
            corpus(Vocabulary.named("none"), data=text)

    def test_of_what_is_not_there_is_an_error(self) -> None:
        with pytest.raises(FileNotFoundError, match=re.escape(f"nowhere, seen from {Path.cwd()}")):
            corpus(data="nowhere")
        with pytest.raises(ValueError, match="data is empty"):
            corpus()


# A process that tokenises the text it is given.  It says "missing" or "found" when it has looked for the
# shards, "writing" when it begins to make them, which it does once it is told to, and at the end the ids.
TOKENISING = """
import sys
from gpt2rs.train import TrainSettings, sharding
from gpt2rs.train.corpus import open_corpus
from gpt2rs.train.vocabulary import Vocabulary

def look(folder, own=sharding._kept):
    found = own(folder)
    print("missing" if found is None else "found", flush=True)
    return found

def write(*arguments, own=sharding._write):
    print("writing", flush=True)
    sys.stdin.readline()
    return own(*arguments)

sharding._kept, sharding._write = look, write
settings = TrainSettings(data=sys.argv[1], val_fraction=0)
tokens, _ = open_corpus(settings, Vocabulary.named("shakespeare"), 1024)
print(tokens.read(0, len(tokens)).tolist())
"""


class TestProcesses:
    @pytest.fixture
    def start(self) -> Iterator[Callable[[Path], subprocess.Popen[str]]]:
        with ExitStack() as stack:

            def start(text: Path) -> subprocess.Popen[str]:
                command = [sys.executable, "-c", TOKENISING, str(text)]
                process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
                )
                stack.enter_context(process)
                stack.callback(process.kill)
                return process

            yield start

    @staticmethod
    def says(process: subprocess.Popen[str], *lines: str) -> None:
        assert [process.stdout.readline().strip() for _ in lines] == list(lines)

    def test_two_that_want_the_same_tokens_make_them_once(
        self, text: Path, start: Callable[[Path], subprocess.Popen[str]]
    ) -> None:
        first = start(text)
        self.says(first, "missing", "missing", "writing")
        second = start(text)
        self.says(second, "missing")
        first.stdin.write("\n")
        # It looks once more when it may write, and has nothing left to do.
        self.says(second, "found")
        expected = str(ids_of(corpus(data=text, val_fraction=0)[0]))
        self.says(first, expected)
        self.says(second, expected)

    def test_what_a_killed_one_left_is_swept_and_no_other(
        self, text: Path, cache: Path, tmp_path: Path, start: Callable[[Path], subprocess.Popen[str]]
    ) -> None:
        process = start(text)
        self.says(process, "missing", "missing", "writing")
        (unfinished,) = cache.glob(".unfinished-*")
        for number in (2, 3):
            (tmp_path / f"{number}.txt").write_text(prose(number, 50))
        corpus(data=tmp_path / "2.txt", val_fraction=0)
        assert unfinished.is_dir()
        process.kill()
        process.wait()
        corpus(data=tmp_path / "3.txt", val_fraction=0)
        assert not list(cache.glob(".unfinished-*"))
        assert len(list(cache.glob("*/corpus.json"))) == 2
