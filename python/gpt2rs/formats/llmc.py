"""The `.bin` files of llm.c: a header of 256 int32, then all parameters in a fixed order, layers stacked.

Version 3 is float32, version 5 bfloat16. Linear weights are (out, in), the head is the token embedding, and
the vocabulary is padded with rows that are not tokens.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import LLMC_MAGIC, Placement, StoredTensor, place

HEADER_BYTES = 256 * 4
_DTYPES = {3: ("float32", 4), 5: ("bfloat16", 2)}
# Far above GPT-2 XL's largest (50,304), and small enough that no product of them is beyond reason.
_LARGEST = 1 << 24
_MOST_LAYERS = 10_000


@dataclass(frozen=True)
class LlmcFile:
    """A parsed file: `config` holds the settings that its header gives, under the names of a config.json."""

    config: dict[str, Any]
    placements: list[Placement]


def read_llmc(path: Path) -> LlmcFile:
    """The settings and the parameters in a model file of llm.c.

    Raises:
        ValueError: a field of the header is out of range, or the file is not as long as its header says.
    """
    with path.open("rb") as file:
        header = file.read(HEADER_BYTES)
    if len(header) < HEADER_BYTES:
        raise ValueError(f"{path}: {len(header)} bytes, expected a header of {HEADER_BYTES}")
    magic, version, n_ctx, n_vocab, n_layer, n_head, n_embd, n_padded = struct.unpack_from("<8i", header)
    if magic != LLMC_MAGIC or version not in _DTYPES:
        raise ValueError(
            f"{path}: magic {magic} version {version}, expected magic {LLMC_MAGIC} version 3 or 5"
        )
    fields = {"maxT": n_ctx, "V": n_vocab, "NH": n_head, "C": n_embd, "Vp": n_padded}
    for field, value in fields.items():
        if not 0 < value <= _LARGEST:
            raise ValueError(f"{path}: header field {field} is {value}, expected 1 to {_LARGEST}")
    if not 0 <= n_layer <= _MOST_LAYERS:
        raise ValueError(f"{path}: header field L is {n_layer}, expected 0 to {_MOST_LAYERS}")
    if n_padded < n_vocab:
        raise ValueError(f"{path}: header field Vp is {n_padded}, expected at least V, {n_vocab}")
    dtype, itemsize = _DTYPES[version]
    placements = []
    at = HEADER_BYTES
    for name, shape, kept in _parameters(n_ctx, n_vocab, n_layer, n_embd, n_padded):
        tensor = StoredTensor(str(path), at, dtype, (kept, *shape[1:]))
        placements.append(place(name, tensor, transposed=name.startswith("h.") and len(shape) == 2))
        at += itemsize * shape[0] * (shape[1] if len(shape) == 2 else 1)
    size = path.stat().st_size
    if at != size:
        raise ValueError(f"{path}: {size} bytes, expected {at} for the model its header describes")
    config = {
        "vocab_size": n_vocab,
        "n_positions": n_ctx,
        "n_embd": n_embd,
        "n_layer": n_layer,
        "n_head": n_head,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    }
    return LlmcFile(config, placements)


def _parameters(
    n_ctx: int, n_vocab: int, n_layer: int, n_embd: int, n_padded: int
) -> list[tuple[str, tuple[int, ...], int]]:
    """The name, the stored shape and the number of rows to keep of each parameter, in the file's order."""
    c = n_embd
    stacked: list[tuple[str, tuple[int, ...]]] = [
        ("ln_1.weight", (c,)),
        ("ln_1.bias", (c,)),
        ("attn.c_attn.weight", (3 * c, c)),
        ("attn.c_attn.bias", (3 * c,)),
        ("attn.c_proj.weight", (c, c)),
        ("attn.c_proj.bias", (c,)),
        ("ln_2.weight", (c,)),
        ("ln_2.bias", (c,)),
        ("mlp.c_fc.weight", (4 * c, c)),
        ("mlp.c_fc.bias", (4 * c,)),
        ("mlp.c_proj.weight", (c, 4 * c)),
        ("mlp.c_proj.bias", (c,)),
    ]
    order: list[tuple[str, tuple[int, ...], int]] = [
        ("wte.weight", (n_padded, c), n_vocab),
        ("wpe.weight", (n_ctx, c), n_ctx),
    ]
    for name, shape in stacked:
        order += [(f"h.{layer}.{name}", shape, shape[0]) for layer in range(n_layer)]
    return [*order, ("ln_f.weight", (c,), c), ("ln_f.bias", (c,), c)]
