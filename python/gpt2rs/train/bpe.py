"""A tokenizer from text: byte-level BPE in GPT-2's manner, trained by Hugging Face's `tokenizers`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ..tokenizer import byte_characters
from . import durable
from .corpus import text_files
from .documents import SEPARATOR, pieces, whole

# One token for each byte, and <|endoftext|>.
SMALLEST = 257
_PIECE_CHARACTERS = 1 << 16


def train_tokenizer(data: Sequence[str], out: Path, size: int) -> tuple[int, int]:
    """Write vocab.json and merges.txt of a tokenizer of `size` tokens, for text like that of `data`.

    data: files and folders of text, as for training.  The tokens are the 256 bytes, the pairs that are merged
    in the order of their frequency (Sennrich et al. 2016, arXiv:1508.07909), over GPT-2's words, and at last
    `<|endoftext|>`, as in GPT-2's own files.

    Returns (tokens, bytes of text).  There are fewer tokens than `size` where the text is too small for more.

    Raises:
        ImportError: `tokenizers` is missing.
        ValueError: size is below 257, there is no text, or it is not UTF-8.
        FileExistsError: `out` has a tokenizer.
    """
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    except ImportError as error:
        raise ImportError("training a tokenizer needs tokenizers: pip install 'gpt2rs[train]'") from error
    if size < SMALLEST:
        raise ValueError(f"size is {size}; it must be at least {SMALLEST}: the 256 bytes and {SEPARATOR}")
    for name in ("vocab.json", "merges.txt"):
        if (out / name).exists():
            raise FileExistsError(f"{out} has a {name} already; take another folder")
    spans = whole(text_files([Path(path).expanduser() for path in data]))
    if not any(span.end for span in spans):
        raise ValueError(f"no text in {', '.join(str(span.path) for span in spans)}; all of it is empty")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    texts = (piece.text for span in spans for piece in pieces(span, _PIECE_CHARACTERS))
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    # Numbered anew in GPT-2's order, which tiktoken relies on: bytes, then merges as they were made.
    merges = [merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]]
    tokens = [*_bytes_in_order(), *dict.fromkeys("".join(merge) for merge in merges), SEPARATOR]
    out.mkdir(parents=True, exist_ok=True)
    durable.write_text(out / "merges.txt", "\n".join(["#version: 0.2", *map(" ".join, merges), ""]))
    vocab = {token: number for number, token in enumerate(tokens)}
    durable.write_text(out / "vocab.json", json.dumps(vocab, ensure_ascii=False))
    return len(tokens), sum(span.end for span in spans)


def _bytes_in_order() -> list[str]:
    """The characters that stand for bytes, in the order of GPT-2's vocabulary: the printable ones first."""
    return sorted(byte_characters())
