"""Text into files of tokens, in parallel and once: the same text and tokenizer find them again."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from .documents import READ_BYTES, SEPARATOR, Piece, Span, pieces
from .durable import new_folder, only_one, sweep_unheld, write_text
from .token_files import Ids, ShardWriter, open_tokens
from .vocabulary import Vocabulary

# What is going on, and how many bytes of how many are done.
Progress = Callable[[str, int, int], None]

_ABOUT = "corpus.json"
# Goes into the key: another way of making tokens of text is another number.
_VERSION = 1


def default_cache() -> Path:
    """`gpt2rs/tokens` in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "gpt2rs" / "tokens"


def shards_of(spans: Sequence[Span], vocabulary: Vocabulary, cache: Path, progress: Progress) -> list[Ids]:
    """The tokens of texts, one array a shard; `<|endoftext|>` opens every document, as in llm.c.

    Kept in a folder of `cache` under a digest of the texts and the tokenizer.

    Raises:
        ValueError: a text is not UTF-8; there are several documents and the tokenizer has no `<|endoftext|>`.
        OSError: a file cannot be read, or a shard not be written.
    """
    folder = cache / _key(spans, vocabulary, progress)
    found = _kept(folder)
    if found is not None:
        return found
    cache.mkdir(parents=True, exist_ok=True)

    def lock(name: str) -> Path:
        return cache / f".lock-{name}"

    sweep_unheld(cache, lock)
    with only_one(lock(folder.name), waits=True):
        found = _kept(folder)
        if found is not None:  # another run made it in the meantime
            return found
        with new_folder(folder) as unfinished:
            about = _write(spans, vocabulary, unfinished, progress)
            write_text(unfinished / _ABOUT, json.dumps(about, indent=2) + "\n")
    return [open_tokens(folder / name) for name in about["shards"]]


def _key(spans: Sequence[Span], vocabulary: Vocabulary, progress: Progress) -> str:
    digest = hashlib.sha256(f"{_VERSION} {vocabulary.fingerprint}\n".encode())
    total, done = sum(span.end - span.begin for span in spans), 0
    for span in spans:
        own = hashlib.sha256()
        with span.path.open("rb") as file:
            file.seek(span.begin)
            left = span.end - span.begin
            while data := file.read(min(left, READ_BYTES)):
                own.update(data)
                left -= len(data)
                done += len(data)
                progress("reading text", done, total)
        digest.update(f"{span.begin == 0} {own.hexdigest()}\n".encode())
    return digest.hexdigest()[:32]


def _kept(folder: Path) -> list[Ids] | None:
    """The shards of a folder that is whole."""
    try:
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        shards = [open_tokens(folder / name) for name in about["shards"]]
        n_tokens = about["n_tokens"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return shards if sum(map(len, shards)) == n_tokens else None


def _write(spans: Sequence[Span], vocabulary: Vocabulary, folder: Path, progress: Progress) -> dict[str, Any]:
    total, done = sum(span.end - span.begin for span in spans), 0
    n_documents = 0
    with ShardWriter(folder, vocabulary.n_tokens) as writer:
        for piece, ids in _encoded(spans, vocabulary):
            n_documents += piece.opens
            if n_documents > 1 and vocabulary.end_of_text is None:
                raise ValueError(
                    f"the text has several documents, and the tokenizer has no {SEPARATOR} to go between them"
                )
            writer.write(ids)
            done += len(piece.text.encode())
            progress("tokenising", min(done, total), total)
    progress("tokenising", total, total)
    return {
        "n_tokens": writer.n_tokens,
        "n_documents": n_documents,
        "n_bytes": total,
        "files": [str(span.path) for span in spans],
        "tokenizer": vocabulary.fingerprint,
        "shards": [path.name for path in writer.paths],
    }


def _encoded(spans: Sequence[Span], vocabulary: Vocabulary) -> Iterator[tuple[Piece, Ids]]:
    """Every piece with its ids, in order; tiktoken lets go of the GIL, so threads do."""
    encoding, end_of_text = vocabulary.encoding, vocabulary.end_of_text
    assert encoding is not None

    def encode(piece: Piece) -> Ids:
        ids = encoding.encode_ordinary(piece.text)
        before = [end_of_text] if piece.opens and end_of_text is not None else []
        return np.array(before + ids, np.uint32)

    n_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    waiting: deque[tuple[Piece, Future[Ids]]] = deque()
    with ThreadPoolExecutor(n_threads) as pool:
        for piece in (piece for span in spans for piece in pieces(span)):
            waiting.append((piece, pool.submit(encode, piece)))
            # As many as keep all threads busy, and no more text in memory.
            if len(waiting) > 2 * n_threads:
                first, ids = waiting.popleft()
                yield first, ids.result()
        for first, ids in waiting:
            yield first, ids.result()
