"""`gpt2rs convert`: a model as a packed file, which opens without packing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .options import flag


def convert(
    model: Annotated[str, typer.Argument(help="Folder, file or hub name.")],
    out: Annotated[str, typer.Argument(help="The folder to write, which is made if need be.")],
    dtype: Annotated[
        str | None, flag("float32, bfloat16, int8 or int4. Default: as stored; float16 as float32.")
    ] = None,
    n_threads: options.Threads = None,
    config: options.Config = None,
    revision: options.Revision = None,
    offline: options.Offline = False,
) -> None:
    """Pack a model once, so that it opens at once: config.json, packed.safetensors, the tokenizer's files.

    The folder is taken wherever a model is, by the version of gpt2rs that wrote it; keep the original.
    """
    from gpt2rs.saving import check_packed_folder

    # Before the model is loaded, which may take a while.
    check_packed_folder(Path(out).expanduser())
    gpt2 = options.open_model(
        model,
        dtype=dtype,
        kv_dtype=None,
        device="cpu",
        n_threads=n_threads,
        config=config,
        revision=revision,
        offline=offline,
    )
    gpt2.save_packed(out)
    print(f"{out}: {gpt2.dtype} weights, {gpt2.memory_footprint():,} bytes")
