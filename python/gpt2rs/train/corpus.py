"""What the settings name as data, as two runs of tokens: one to learn from, one held out."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .documents import Span, hold_out, whole
from .settings import TrainSettings
from .sharding import Progress, default_cache, shards_of
from .token_files import Ids, check_ids, open_tokens
from .vocabulary import Vocabulary

_HELD_OUT_NAME = re.compile(r"(?:^|[_.-])val(?:[_.-]|$)")
_DIGEST_TOKENS = 1 << 16


class Tokens:
    """Arrays of ids, one after the other, as one sequence."""

    def __init__(self, parts: Sequence[Ids]) -> None:
        """Empty arrays are left out."""
        self._parts = [part for part in parts if len(part)]
        self._ends = list(accumulate(map(len, self._parts)))

    def __len__(self) -> int:
        """How many tokens."""
        return self._ends[-1] if self._ends else 0

    def read(self, start: int, count: int) -> NDArray[np.uint32]:
        """(count,): the ids from `start`, all of which must be there."""
        first = int(np.searchsorted(self._ends, start, side="right"))
        found: list[NDArray[np.uint32]] = []
        for part, end in zip(self._parts[first:], self._ends[first:], strict=True):
            begin = start - (end - len(part))
            found.append(part[begin : begin + count].astype(np.uint32))
            start, count = start + len(found[-1]), count - len(found[-1])
            if not count:
                break
        return found[0] if len(found) == 1 else np.concatenate(found)

    def split(self, fraction: float) -> tuple[Tokens, Tokens]:
        """The same in two, the second being the last `fraction`."""
        cut = int(len(self) * (1 - fraction))
        first, second = [], []
        for part, end in zip(self._parts, self._ends, strict=True):
            at = max(0, cut - (end - len(part)))
            first.append(part[:at])
            second.append(part[at:])
        return Tokens(first), Tokens(second)

    def digest(self) -> str:
        """Tells other data apart: of the number of tokens, the first and the last ones."""
        digest = hashlib.sha256(f"{len(self)}\n".encode())
        count = min(_DIGEST_TOKENS, len(self))
        if count:
            digest.update(self.read(0, count).astype("<u4").tobytes())
            digest.update(self.read(len(self) - count, count).astype("<u4").tobytes())
        return digest.hexdigest()[:32]


def open_corpus(
    settings: TrainSettings, vocabulary: Vocabulary, n_vocab: int, progress: Progress = lambda *_: None
) -> tuple[Tokens, Tokens]:
    """The tokens to train on and those held out, by `data`, `val_data`, `val_fraction` and `cache_dir`.

    Raises:
        FileNotFoundError: a path does not exist, or a folder has nothing to read.
        ValueError: a file is malformed, text and token files are mixed, or text is given without a tokenizer.
        OSError: tokenised text cannot be written.
    """
    if not settings.data:
        raise ValueError("data is empty; it must name files or folders to train on")
    cache = default_cache() if settings.cache_dir is None else Path(settings.cache_dir).expanduser()
    files = _files(settings.paths("data"))
    held_files = _files(settings.paths("val_data"))
    if _are_tokens(files):
        if not held_files:
            held_files = [path for path in files if _HELD_OUT_NAME.search(path.stem)]
            files = [path for path in files if path not in held_files]
        tokens = Tokens([_checked(path, n_vocab) for path in files])
    else:
        spans = whole(files)
        held_spans: list[Span] = []
        if not held_files:
            spans, held_spans = hold_out(spans, settings.val_fraction)
        tokens = Tokens(shards_of(spans, _needed(vocabulary, files), cache, progress))
        if not held_files:
            return tokens, Tokens(shards_of(held_spans, vocabulary, cache, progress) if held_spans else [])
    if not held_files:
        return tokens.split(settings.val_fraction)
    if _are_tokens(held_files):
        return tokens, Tokens([_checked(path, n_vocab) for path in held_files])
    return tokens, Tokens(shards_of(whole(held_files), _needed(vocabulary, held_files), cache, progress))


def text_files(paths: Sequence[Path]) -> list[Path]:
    """The text files that are meant by files and folders; ValueError where they are token files."""
    files = _files(paths)
    if _are_tokens(files):
        raise ValueError(f"{files[0]}: a file of tokens, expected text")
    return files


def _files(paths: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(path.rglob("*.txt")) or sorted(path.glob("*.bin"))
            if not inside:
                raise FileNotFoundError(f"{path}: no *.txt below it, and no *.bin in it")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            # A run's settings may have been written elsewhere.
            seen_from = "" if path.is_absolute() else f", seen from {Path.cwd()}"
            raise FileNotFoundError(f"no such file or folder: {path}{seen_from}")
    return found


def _are_tokens(files: Sequence[Path]) -> bool:
    kinds = {path.suffix == ".bin" for path in files}
    if len(kinds) > 1:
        bins = next(path for path in files if path.suffix == ".bin")
        texts = next(path for path in files if path.suffix != ".bin")
        raise ValueError(f"{bins} holds tokens and {texts} text; give one of the two kinds")
    return kinds == {True}


def _checked(path: Path, n_vocab: int) -> Ids:
    ids = open_tokens(path)
    check_ids(path, ids, n_vocab)
    return ids


def _needed(vocabulary: Vocabulary, files: Sequence[Path]) -> Vocabulary:
    if vocabulary.encoding is None:
        raise ValueError(f'{files[0]} is text, and tokenizer is "none", which is for files of tokens (*.bin)')
    return vocabulary
