"""What commands share: the options that choose a model, how values are read, where text comes from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from gpt2rs import GPT2

BUILT_IN = "shakespeare"


def flag(help_text: str, *names: str, panel: str | None = None, **more: Any) -> Any:
    """An option under a heading of the help; named after its parameter where no name is given."""
    return typer.Option(*names, help=help_text, rich_help_panel=panel, show_default=False, **more)


_MODEL = "Model"
Model = Annotated[
    str, flag(f"Folder, file or hub name. Default: {BUILT_IN}, built in.", "--model", "-m", panel=_MODEL)
]
Dtype = Annotated[
    str | None,
    flag("float32, bfloat16, int8 or int4. Default: as stored; float16 as float32.", panel=_MODEL),
]
KvDtype = Annotated[
    str | None, flag("float32, bfloat16 or int8, for keys and values. Default: as --dtype.", panel=_MODEL)
]
Precision = Annotated[
    str, flag("exact, or fast: activations are bfloat16, too. Default: exact.", panel=_MODEL)
]
Device = Annotated[str, flag("cpu, cuda, cuda:N or auto. Default: cpu.", panel=_MODEL)]
Threads = Annotated[int | None, flag("Default: what machine and model profit from.", panel=_MODEL)]
Config = Annotated[str | None, flag("For a file without one: a config.json or a preset.", panel=_MODEL)]
Revision = Annotated[str | None, flag("Branch, tag or commit of a hub name.", panel=_MODEL)]
Offline = Annotated[bool, flag("Use the hub's cache alone.", "--offline", panel=_MODEL)]
Json = Annotated[bool, flag("Print JSON.", "--json", panel="Output")]


def open_model(
    name: str,
    *,
    dtype: str | None,
    kv_dtype: str | None,
    precision: str = "exact",
    device: str,
    n_threads: int | None,
    config: str | None,
    revision: str | None,
    offline: bool,
) -> GPT2:
    """The model that the options choose; errors as of `GPT2.from_pretrained`."""
    from gpt2rs import GPT2

    return GPT2.from_pretrained(
        name,
        dtype=dtype,
        kv_dtype=kv_dtype,
        precision=precision,
        device=device,
        n_threads=n_threads,
        config=config,
        revision=revision,
        local_files_only=offline,
    )


def token_ids(text: str) -> list[int]:
    """Token ids with commas or spaces between them."""
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a list of token ids such as 15496,11") from error


def eos_ids(text: str) -> list[int]:
    """Token ids; the word none for an empty list."""
    return [] if text == "none" else token_ids(text)


def biased_id(text: str) -> tuple[int, float]:
    """ID=BIAS, a token and what is added to its logit."""
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not of the form ID=BIAS, such as 198=-5") from error


def read_text(source: str) -> str:
    """The text of a file, or of standard input for `-`; ValueError where it is not UTF-8."""
    data = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        name = "standard input" if source == "-" else source
        raise ValueError(f"{name} is not UTF-8: {error.reason} at byte {error.start}") from error


def read_prompt(argument: str | None) -> str:
    """The prompt: the argument, or standard input without its last newline, or what is typed when asked.

    An `echo` into a pipe ends its text with a newline that is not meant; a second one is kept.
    """
    if argument is None and sys.stdin.isatty():
        print("Prompt: ", end="", file=sys.stderr, flush=True)
        return sys.stdin.readline().removesuffix("\n")
    if argument is None or argument == "-":
        return read_text("-").removesuffix("\n")
    if any("\ud800" <= character <= "\udfff" for character in argument):
        # How Python hands over bytes of an argument that are not UTF-8.
        raise ValueError("the prompt is not UTF-8")
    return argument
