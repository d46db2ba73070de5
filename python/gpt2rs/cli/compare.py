"""`gpt2rs compare`: what smaller types of weights cost in accuracy, as a table or as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .options import flag

if TYPE_CHECKING:
    from gpt2rs import Fidelity

_HEAD = ("MB", "perplexity", "change", "mean KL", "99 % KL", "max KL", "same top")
_FORMAT = "{:<{}}  {:>9}  {:>10}  {:>9}  {:>9}  {:>9}  {:>9}  {:>9}"


def compare(
    file: Annotated[str, typer.Argument(help="A UTF-8 text; - for standard input.")],
    variants: Annotated[
        str | None,
        flag(
            "Types of weights, such as int8,int4/kv=float32,bfloat16/fast. Default: all.", metavar="NAME,..."
        ),
    ] = None,
    stride: Annotated[
        int | None, flag("How far windows of n_ctx tokens advance over a long text. Default: half of n_ctx.")
    ] = None,
    model: options.Model = options.BUILT_IN,
    device: options.Device = "cpu",
    n_threads: options.Threads = None,
    config: options.Config = None,
    revision: options.Revision = None,
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Compare a model with itself in float32, on a text, as other types of weights hold it.

    KL is the Kullback-Leibler divergence of the next token's distribution from that in float32, in nats;
    same top: how often the likeliest token is the same. help(gpt2rs.Fidelity) says more.
    """
    from gpt2rs import fidelity

    chosen = fidelity.VARIANTS if variants is None else [name.strip() for name in variants.split(",")]
    results = fidelity.each(
        model,
        options.read_text(file),
        chosen,
        stride=stride,
        device=device,
        n_threads=n_threads,
        config=config,
        revision=revision,
        local_files_only=offline,
    )
    if as_json:
        print(json.dumps([_facts(result) for result in results], indent=2))
        return
    width = max(len(name) for name in ("weights", *chosen))
    # A row takes as long as scoring the text twice: each is shown when it is there, under one head.
    for number, result in enumerate(results):
        if number == 0:
            print(f"{model}, {result.n_positions} positions; KL to float32 in nats\n")
            print(_FORMAT.format("weights", width, *_HEAD))
        print(_row(result, width), flush=True)


def _row(result: Fidelity, width: int) -> str:
    return _FORMAT.format(
        result.variant,
        width,
        f"{result.weight_bytes / 1e6:.2f}",
        f"{result.perplexity:.4f}",
        f"{100 * (result.perplexity_ratio - 1):+.3f} %",
        f"{result.mean_kl:.2e}",
        f"{result.kl_99:.2e}",
        f"{result.max_kl:.2e}",
        f"{100 * result.same_top:.2f} %",
    )


def _facts(result: Fidelity) -> dict[str, Any]:
    """The fields, with null for a perplexity beyond float64, which JSON can't name."""
    facts = asdict(result).items()
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in facts}
