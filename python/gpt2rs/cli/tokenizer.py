"""`gpt2rs tokenizer train`: a tokenizer from text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import flag

tokenizer = typer.Typer(no_args_is_help=True, help="Make a tokenizer.")


@tokenizer.command()
def train(
    data: Annotated[list[str], flag("File or folder of text. May be repeated.", metavar="PATH")],
    out: Annotated[str, flag("The folder to write vocab.json and merges.txt into.", metavar="DIR")],
    size: Annotated[int, flag("How many tokens, <|endoftext|> included. Default: 8192.")] = 8192,
) -> None:
    """Make a byte-level BPE tokenizer, in GPT-2's file format, for text like this.

    Every command takes the folder where a tokenizer's is asked for; so does transformers.
    """
    from gpt2rs.train.bpe import train_tokenizer

    n_tokens, n_bytes = train_tokenizer(data, Path(out).expanduser(), size)
    print(f"{out}: {n_tokens} tokens, from {n_bytes:,} bytes of text")
