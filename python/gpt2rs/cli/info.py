"""`gpt2rs info`: what a checkpoint is, without loading its weights."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from . import options

_DTYPES = ("float32", "bfloat16")
_BYTES = {"float32": 4, "bfloat16": 2}


def info(
    model: Annotated[
        str,
        typer.Argument(help="Folder, file or hub name; the built-in model by default.", show_default=False),
    ] = options.BUILT_IN,
    config: options.Config = None,
    revision: options.Revision = None,
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Show a model's config, number of parameters, memory by dtype and tokenizer, and where it could run."""
    from gpt2rs.checkpoints import open_checkpoint

    source = open_checkpoint(model, config=config, revision=revision, local_files_only=offline)
    shape = source.config
    # A packed file's weights are of one type.
    dtypes = _DTYPES if source.layout is None else (source.stored_dtype,)
    facts: dict[str, Any] = {
        "model": model,
        "folder": None if source.folder is None else str(source.folder),
        "kind": source.kind,
        "stored_dtype": source.stored_dtype,
        "layout": source.layout,
        "n_tensors": len(source.checkpoint.names()),
        "config": json.loads(shape.to_json()),
        "num_parameters": shape.num_parameters(),
        "num_parameters_lm_head": shape.num_parameters(lm_head=True),
        "memory_footprint": {dtype: shape.memory_footprint(dtype) for dtype in dtypes},
        "kv_cache_per_token": {dtype: 2 * shape.n_layer * shape.n_embd * _BYTES[dtype] for dtype in _DTYPES},
        "tokenizer": _tokenizer(source.folder, shape.n_vocab),
        "devices": _devices(),
    }
    print(json.dumps(facts, indent=2) if as_json else _page(facts))


def _tokenizer(folder: Any, n_vocab: int) -> dict[str, Any] | None:
    """What is known of the tokenizer; a vocabulary that is out of reach is no reason to show nothing."""
    from gpt2rs.tokenizer import load_tokenizer

    try:
        encoding = load_tokenizer(folder, n_vocab)
    except RuntimeError as error:
        return {"error": str(error)}
    if encoding is None:
        return None
    return {"n_tokens": encoding.n_vocab, "special_tokens": sorted(encoding.special_tokens_set)}


def _devices() -> dict[str, Any]:
    """The values of --device on this machine, and what stands in the way of a GPU."""
    from gpt2rs.cuda.availability import Unavailable, devices

    found: dict[str, Any] = {"cpu": None}
    try:
        gpus = devices()
    except Unavailable as error:
        return {**found, "cuda": {"problem": str(error)}}
    for gpu in gpus:
        problem = None
        try:
            gpu.check()
        except Unavailable as error:
            problem = str(error)
        found[f"cuda:{gpu.ordinal}"] = {
            "name": gpu.name,
            "compute_capability": f"{gpu.major}.{gpu.minor}",
            "memory": gpu.n_bytes,
            "problem": problem,
        }
    return found


def _page(facts: dict[str, Any]) -> str:
    """The facts as lines for a reader."""
    tokenizer, n_lm_head = facts["tokenizer"], facts["num_parameters_lm_head"]
    if tokenizer is None:
        words = "none: token ids only"
    elif "error" in tokenizer:
        words = tokenizer["error"]
    else:
        words = f"{tokenizer['n_tokens']} tokens, special: {' '.join(tokenizer['special_tokens']) or 'none'}"
    lines = {
        "model": facts["model"],
        "folder": facts["folder"],
        "stored as": f"{facts['kind']}, {facts['stored_dtype']}, {facts['n_tensors']} tensors",
        "parameters": f"{facts['num_parameters']:,} ({n_lm_head:,} with a head of its own)",
        "weights": ", ".join(f"{dtype} {_size(size)}" for dtype, size in facts["memory_footprint"].items()),
        "KV cache": ", ".join(
            f"{dtype} {_size(size)} a token" for dtype, size in facts["kv_cache_per_token"].items()
        ),
        "tokenizer": words,
        "devices": _device_line(facts["devices"]),
    }
    if facts["layout"] is not None:
        lines["layout"] = facts["layout"]
    rows = [f"{name:<12}{value}" for name, value in lines.items()]
    rows.append("config")
    rows += [f"  {name} = {json.dumps(value)}" for name, value in facts["config"].items()]
    return "\n".join(rows)


def _device_line(devices: dict[str, Any]) -> str:
    """Those that can be used, then why others can't."""
    usable = [
        name if about is None else f"{name} ({about['name']})"
        for name, about in devices.items()
        if about is None or about["problem"] is None
    ]
    problems = [about["problem"] for about in devices.values() if about is not None and about["problem"]]
    return "; ".join([", ".join(usable), *problems])


def _size(n_bytes: int) -> str:
    """Bytes for a reader, in powers of 1000."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n_bytes >= size:
            return f"{n_bytes / size:.1f} {unit}"
    return f"{n_bytes} bytes"
