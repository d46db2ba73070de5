"""Tokenizers: byte-level BPE as a `tiktoken.Encoding`, from a checkpoint's own files or the published one of
GPT-2.

Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), and the `encoder.py` of its
release define the files: a vocabulary (token -> id) and the merges in the order in which they apply, both
written with a visible character for each byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .formats import read_json, read_text

if TYPE_CHECKING:
    import tiktoken

_FILE_PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
_ADDED = "added_tokens.json"
# GPT-2's vocabulary, and that padded to a multiple of 64, as training programs store it.
_PUBLISHED_N_VOCAB = range(50257, 50305)

# How GPT-2 cuts text before merging: contractions, then words, numbers and other characters with a space
# before them, then white space, whose last character goes with what follows. `++` gives nothing back, so a
# long run takes linear time.
SPLIT_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


def load_tokenizer(folder: Path | None, n_vocab: int) -> tiktoken.Encoding | None:
    """The tokenizer of a checkpoint.

    Args:
        folder: where to look for vocab.json with merges.txt, or encoder.json with vocab.bpe, and
        added_tokens.json. n_vocab: the number of tokens that the model knows. Without files, 50257 (or up to
            50304, padded) means GPT-2's published encoding, which tiktoken downloads once and keeps
            (`TIKTOKEN_CACHE_DIR`).

    Returns:
        The encoding, or None when there are no files and the vocabulary is not GPT-2's.

    Raises:
        ValueError: a file is malformed, an id is not below `n_vocab`, or the merges cannot be represented by
            tiktoken, which takes a token's id for its rank. The message names the file and the line or the
            token.
        FileNotFoundError: one file of a pair is there without the other.
        RuntimeError: GPT-2's published encoding cannot be downloaded.
    """
    if folder is not None:
        for vocab_name, merges_name in _FILE_PAIRS:
            vocab, merges = folder / vocab_name, folder / merges_name
            if vocab.is_file() and merges.is_file():
                added = folder / _ADDED
                return read_tokenizer(vocab, merges, n_vocab, added if added.is_file() else None)
            if merges.is_file():
                raise FileNotFoundError(f"{merges} is there without {vocab_name}")
            if vocab.is_file():
                raise FileNotFoundError(f"{vocab} is there without {merges_name}")
    return _published() if n_vocab in _PUBLISHED_N_VOCAB else None


def read_tokenizer(vocab: Path, merges: Path, n_vocab: int, added: Path | None = None) -> tiktoken.Encoding:
    """The encoding that a vocabulary and its merges define.

    Tokens that no merges lead to, such as <|endoftext|>, are special tokens of the encoding: they are
    recognised in text only when `encode` is told to. Raises as `load_tokenizer` does.
    """
    import tiktoken

    ids = _read_vocab(vocab, n_vocab)
    byte_of = {character: byte for byte, character in enumerate(byte_characters())}
    ranks: dict[bytes, int] = {}
    for character, byte in byte_of.items():
        if character not in ids:
            raise ValueError(f"{vocab}: no token for byte 0x{byte:02x}, which is written {character!r}")
        ranks[bytes([byte])] = ids[character]
    parts = _read_merges(merges, ids, byte_of)
    _check_each_token_encodes_to_itself(merges, ids, parts)
    for token in parts:
        ranks[bytes(map(byte_of.__getitem__, token))] = ids[token]
    special = {
        _as_text(token, byte_of): token_id
        for token, token_id in ids.items()
        if token not in parts and token not in byte_of
    }
    if added is not None:
        special |= {
            token: token_id for token, token_id in _read_vocab(added, n_vocab).items() if token not in ids
        }
    _check_special_ids(vocab if added is None else added, special, ranks)
    return tiktoken.Encoding(
        str(vocab.parent), pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=special
    )


def byte_characters() -> list[str]:
    """The visible character that stands for each byte in GPT-2's vocabulary files, by byte.

    Printable Latin-1 characters stand for themselves; the others, among them space and controls, are numbered
    from 256.
    """
    characters = []
    moved = 256
    for byte in range(256):
        printable = 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or byte >= 0xAE
        characters.append(chr(byte if printable else moved))
        moved += not printable
    return characters


def _published() -> tiktoken.Encoding:
    import tiktoken

    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RuntimeError(
            f"tiktoken could not download GPT-2's encoding: {reason}; put vocab.json and merges.txt into the "
            "model's folder, or fill TIKTOKEN_CACHE_DIR"
        ) from error


def _read_vocab(path: Path, n_vocab: int) -> dict[str, int]:
    content: Any = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object of tokens and their ids")
    try:
        "".join(content).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{path}: a token holds half of a surrogate pair, which is not text") from None
    token_of: dict[int, str] = {}
    for token, token_id in content.items():
        if not token:
            raise ValueError(f"{path}: a token is empty")
        if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < n_vocab:
            raise ValueError(
                f"{path}: the id of token {token[:40]!r} is not an integer from 0 to {n_vocab - 1}"
            )
        if token_of.setdefault(token_id, token) != token:
            raise ValueError(
                f"{path}: tokens {token_of[token_id][:40]!r} and {token[:40]!r} share the id {token_id}"
            )
    return content


def _read_merges(
    path: Path, ids: Mapping[str, int], byte_of: Mapping[str, int]
) -> dict[str, tuple[str, str]]:
    """The two tokens that each merged token is made of, in the order of the merges."""
    parts: dict[str, tuple[str, str]] = {}
    last = -1
    for number, line in enumerate(read_text(path).split("\n"), 1):
        line = line.rstrip("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        left, space, right = line.partition(" ")
        if not left or not space or not right or " " in right:
            raise ValueError(
                f"{path}, line {number}: {line[:80]!r}, expected two tokens with a space between them"
            )
        merged = left + right
        for token in (left, right, merged):
            if token not in ids:
                raise ValueError(f"{path}, line {number}: token {token[:80]!r} is not in the vocabulary")
        for token in (left, right):
            if token not in parts and token not in byte_of:
                raise ValueError(
                    f"{path}, line {number}: {token[:80]!r} is no byte, and no merge before it makes it"
                )
        # A second way to the same token never applies once the first one is known to lead to it.
        if merged in parts:
            continue
        if ids[merged] <= last:
            raise ValueError(
                f"{path}, line {number}: {merged[:80]!r} has id {ids[merged]}, expected more than {last}, "
                "the id of the merge before it: tiktoken takes ids for ranks"
            )
        last = ids[merged]
        parts[merged] = (left, right)
    return parts


def _check_each_token_encodes_to_itself(
    path: Path, ids: Mapping[str, int], parts: Mapping[str, tuple[str, str]]
) -> None:
    """Refuses merges for which tiktoken would not give the tokens of GPT-2's own procedure.

    GPT-2 merges the listed pairs only; tiktoken any two neighbours that together are a token. Both give the
    same tokens when the bytes of each token, merged alone, become that token by its own pair: an unlisted
    pair that could be merged in a text would already have been merged otherwise. That holds for every
    vocabulary that was trained. To see it for one token, its halves are taken apart again, latest merge
    first: at no time may the two tokens at their border be a pair that merges before one of them has become
        part of its half.
    """
    merged_of = {pair: ids[token] for token, pair in parts.items()}
    made = {token: ids[token] for token in parts}
    never = max(ids.values()) + 1
    for number, (token, (left, right)) in enumerate(parts.items(), 1):
        left_made = -1
        while (left_id := made.get(left, -1)) >= 0 or right in made:
            right_id = made.get(right, -1)
            if left_id >= right_id:
                left = parts[left][1]
                too_early = merged_of.get((left, right), never) < left_id
                left_made = left_id
            else:
                right = parts[right][0]
                border = merged_of.get((left, right), never)
                # Of equal pairs the leftmost merges first: "x xx" is never made of three x, unless a pair of
                # x on the left was used up by the same merge.
                too_early = border < right_id or (border == right_id and left_made != right_id)
            if too_early:
                raise ValueError(
                    f"{path}: merge {number}, {token[:80]!r}, never applies, since {(left + right)[:80]!r} "
                    "is merged first: tiktoken cannot represent that"
                )


def _as_text(token: str, byte_of: Mapping[str, int]) -> str:
    """What a token that no merges lead to stands for: its bytes as text where it is written as bytes."""
    try:
        return bytes(byte_of[character] for character in token).decode()
    except (KeyError, UnicodeDecodeError):
        return token


def _check_special_ids(path: Path, special: Mapping[str, int], ranks: Mapping[bytes, int]) -> None:
    taken = set(ranks.values())
    for token, token_id in special.items():
        if token_id in taken:
            raise ValueError(f"{path}: the id {token_id} of token {token[:40]!r} is taken by another token")
        taken.add(token_id)
