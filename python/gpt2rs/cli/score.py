"""`gpt2rs score`: how well a model predicts a text."""

from __future__ import annotations

import json
import math
from typing import Annotated

import typer

from . import options
from .options import flag


def score(
    file: Annotated[str, typer.Argument(help="A UTF-8 text; - for standard input.")],
    stride: Annotated[
        int | None, flag("How far windows of n_ctx tokens advance over a long text. Default: half of n_ctx.")
    ] = None,
    model: options.Model = options.BUILT_IN,
    dtype: options.Dtype = None,
    kv_dtype: options.KvDtype = None,
    precision: options.Precision = "exact",
    device: options.Device = "cpu",
    n_threads: options.Threads = None,
    config: options.Config = None,
    revision: options.Revision = None,
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Score a text: perplexity by token, and bits per byte, which can be compared between tokenizers.

    The first token is given, not predicted; its bytes are not counted either.
    """
    from gpt2rs.text import token_bytes

    text = options.read_text(file)
    gpt2 = options.open_model(
        model,
        dtype=dtype,
        kv_dtype=kv_dtype,
        precision=precision,
        device=device,
        n_threads=n_threads,
        config=config,
        revision=revision,
        offline=offline,
    )
    result = gpt2.score(text, stride=stride)
    n_bytes = len(text.encode()) - len(token_bytes(gpt2._need_tokenizer(), result.tokens[0]))
    bits_per_byte = -result.logprob / math.log(2) / n_bytes
    if as_json:
        facts = {
            "tokens": len(result.tokens),
            "bytes": n_bytes,
            "logprob": result.logprob,
            "perplexity": result.perplexity if math.isfinite(result.perplexity) else None,
            "bits_per_byte": bits_per_byte,
        }
        print(json.dumps(facts))
        return
    print(f"tokens         {len(result.tokens)}")
    print(f"perplexity     {result.perplexity:.4f}")
    print(f"bits per byte  {bits_per_byte:.4f}")
