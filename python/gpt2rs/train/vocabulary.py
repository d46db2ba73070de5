"""The tokenizer of a run: where it comes from, what identifies it, and its files for the checkpoints."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..checkpoints import BUILT_IN, built_in_folder
from ..saving import TOKENIZER_FILES
from ..text import token_bytes
from ..tokenizer import byte_characters, load_tokenizer
from .documents import SEPARATOR

if TYPE_CHECKING:
    import tiktoken
    from numpy.typing import NDArray

_PUBLISHED_N_VOCAB = 50257
# Ids have 32 bits in files; a model's own limit is lower.
_ANY_N_VOCAB = 1 << 31


@dataclass(frozen=True)
class Vocabulary:
    """An encoding, or none.

    folder, files: where its files are, and their contents by name, since a checkpoint's folder may be gone by
    the time that they are needed.  None and nothing for the published encoding, which tiktoken keeps.
    """

    encoding: tiktoken.Encoding | None
    folder: Path | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)

    @staticmethod
    def named(name: str) -> Vocabulary:
        """What the setting `tokenizer` says; FileNotFoundError where there is no such tokenizer."""
        if name == "none":
            return Vocabulary(None)
        if name == "gpt2":
            return Vocabulary(load_tokenizer(None, _PUBLISHED_N_VOCAB))
        folder = built_in_folder() if name == BUILT_IN else Path(name).expanduser()
        return Vocabulary.of_checkpoint(folder, _ANY_N_VOCAB)

    @staticmethod
    def of_checkpoint(folder: Path | None, n_vocab: int) -> Vocabulary:
        """That of a model with `n_vocab` tokens; FileNotFoundError where it has none."""
        encoding = load_tokenizer(folder, n_vocab)
        if encoding is None:
            raise FileNotFoundError(
                f"no tokenizer in {folder}: looked for vocab.json and merges.txt; the names are 'gpt2', "
                f"'{BUILT_IN}' and 'none'"
            )
        paths = [folder / name for name in TOKENIZER_FILES] if folder is not None else []
        files = {path.name: path.read_bytes() for path in paths if path.is_file()}
        return Vocabulary(encoding, folder if files else None, files)

    @property
    def n_tokens(self) -> int:
        """One more than the largest id; 0 without an encoding."""
        return 0 if self.encoding is None else self.encoding.n_vocab

    @property
    def end_of_text(self) -> int | None:
        """The id of `<|endoftext|>`, where there is one."""
        return None if self.encoding is None else self.encoding._special_tokens.get(SEPARATOR)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides which ids a text has."""
        if self.encoding is None:
            return ""
        digest = hashlib.sha256(self.encoding._pat_str.encode())
        for token, rank in sorted(self.encoding._mergeable_ranks.items()):
            digest.update(b"%d %b\n" % (rank, token.hex().encode()))
        digest.update(json.dumps(sorted(self.encoding._special_tokens.items())).encode())
        return digest.hexdigest()

    @cached_property
    def characters(self) -> NDArray[np.int32]:
        """(n_tokens,): how many characters begin in each token; 0 for `<|endoftext|>` and unused ids."""
        counts = np.zeros(self.n_tokens, np.int32)
        if self.encoding is not None:
            for token in set(range(self.n_tokens)) - set(self.encoding._special_tokens.values()):
                counts[token] = sum(byte & 0xC0 != 0x80 for byte in token_bytes(self.encoding, token))
        return counts

    def save(self, folder: Path) -> None:
        """Write the tokenizer into `folder`: the files that it was read from, where there were any.

        The published encoding has none: vocab.json and merges.txt are made, which give the same ids.
        """
        for name, content in (self.files or self._written()).items():
            (folder / name).write_bytes(content)

    def _written(self) -> dict[str, bytes]:
        if self.encoding is None:
            return {}
        ranks, special = self.encoding._mergeable_ranks, self.encoding._special_tokens
        letters = byte_characters()

        def written(token: bytes) -> str:
            return "".join(letters[byte] for byte in token)

        vocab = {written(token): rank for token, rank in sorted(ranks.items(), key=lambda item: item[1])}
        merges = [
            f"{written(left)} {written(right)}"
            for token in sorted((token for token in ranks if len(token) > 1), key=ranks.__getitem__)
            for left, right in [_halves(token, ranks)]
        ]
        return {
            "vocab.json": json.dumps({**vocab, **special}, ensure_ascii=False).encode(),
            "merges.txt": "\n".join(["#version: 0.2", *merges, ""]).encode(),
        }


def _halves(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that a merge makes `token` of: what its bytes become by all merges before it."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        merged = [ranks.get(left + right, _ANY_N_VOCAB) for left, right in pairwise(parts)]
        at = min(range(len(merged)), key=merged.__getitem__)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]
