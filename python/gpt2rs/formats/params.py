"""The nested dict of arrays that textbook implementations of GPT-2 keep their parameters in.

picoGPT and the textbook's loader of OpenAI's files use the same names; the latter keeps the final LayerNorm's
`g` and `b` at the top instead of in `ln_f`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_Arrays = dict[str, NDArray[Any]]


def named_arrays(params: Mapping[str, Any]) -> tuple[_Arrays, dict[str, int]]:
    """The arrays under Hugging Face's names, and the sizes of the model as fields of a config.json.

    Raises:
        ValueError: an array is missing or unknown, or has a wrong shape or dtype.
    """
    reader = _Reader()
    top = _mapping(params, "params")
    _only(top, ("wte", "wpe", "blocks", "ln_f", "g", "b", "lm_head"), "params")
    wte = reader.matrix(top, "", "wte", "wte.weight", (None, None))
    n_vocab, n_embd = wte.shape
    n_ctx = reader.matrix(top, "", "wpe", "wpe.weight", (None, n_embd)).shape[0]
    blocks = top.get("blocks", ())
    if isinstance(blocks, (str, bytes, Mapping)) or not isinstance(blocks, Sequence):
        raise ValueError(f"blocks: expected a list of dicts, found {type(blocks).__name__}")
    n_inner = 4 * n_embd
    for layer, given in enumerate(blocks):
        n_inner = _block(reader, given, layer, n_embd, n_inner if layer else None)
    reader.norm(
        top.get("ln_f", top if "g" in top else None), "ln_f", "ln_f", n_embd, at_top="ln_f" not in top
    )
    if top.get("lm_head") is not None:
        reader.matrix(top, "", "lm_head", "lm_head.weight", (n_vocab, n_embd))
    sizes = {
        "vocab_size": n_vocab,
        "n_positions": n_ctx,
        "n_embd": n_embd,
        "n_layer": len(blocks),
        "n_inner": n_inner,
    }
    return reader.arrays, sizes


def _block(reader: _Reader, given: Any, layer: int, n_embd: int, n_inner: int | None) -> int:
    """One block; returns its n_inner, which the first block decides."""
    at, name = f"blocks[{layer}]", f"h.{layer}"
    block = _mapping(given, at)
    _only(block, ("ln_1", "attn", "ln_2", "mlp"), at)
    reader.norm(block.get("ln_1"), f"{at}.ln_1", f"{name}.ln_1", n_embd)
    attn = _mapping(block.get("attn"), f"{at}.attn")
    _only(attn, ("c_attn", "c_proj"), f"{at}.attn")
    reader.linear(attn, f"{at}.attn.", "c_attn", f"{name}.attn.c_attn", (n_embd, 3 * n_embd))
    reader.linear(attn, f"{at}.attn.", "c_proj", f"{name}.attn.c_proj", (n_embd, n_embd))
    reader.norm(block.get("ln_2"), f"{at}.ln_2", f"{name}.ln_2", n_embd)
    mlp = _mapping(block.get("mlp"), f"{at}.mlp")
    _only(mlp, ("c_fc", "c_proj"), f"{at}.mlp")
    n_inner = reader.linear(mlp, f"{at}.mlp.", "c_fc", f"{name}.mlp.c_fc", (n_embd, n_inner))
    reader.linear(mlp, f"{at}.mlp.", "c_proj", f"{name}.mlp.c_proj", (n_inner, n_embd))
    return n_inner


class _Reader:
    """Collects arrays under their checkpoint names, checking each as it comes."""

    def __init__(self) -> None:
        self.arrays: _Arrays = {}

    def matrix(
        self, holder: Mapping[str, Any], at: str, key: str, name: str, shape: tuple[int | None, ...]
    ) -> NDArray[Any]:
        """The array `holder[key]`, of that shape, where None is any positive size."""
        if holder.get(key) is None:
            raise ValueError(f"{at}{key}: missing, expected an array of shape {_shown(shape)}")
        array = np.asarray(holder[key])
        if array.dtype not in (np.float16, np.float32, np.float64):
            raise ValueError(f"{at}{key}: dtype {array.dtype}, expected float16, float32 or float64")
        fits = len(array.shape) == len(shape) and all(
            size == wanted or (wanted is None and size > 0)
            for size, wanted in zip(array.shape, shape, strict=True)
        )
        if not fits:
            raise ValueError(f"{at}{key}: shape {_shown(array.shape)}, expected {_shown(shape)}")
        self.arrays[name] = np.ascontiguousarray(array)
        return array

    def linear(
        self, holder: Mapping[str, Any], at: str, key: str, name: str, shape: tuple[int, int | None]
    ) -> int:
        """A weight (in, out) and its bias (out,), which may be absent; returns `out`."""
        layer = _mapping(holder.get(key), f"{at}{key}")
        _only(layer, ("w", "b"), f"{at}{key}")
        n_out = int(self.matrix(layer, f"{at}{key}.", "w", f"{name}.weight", shape).shape[1])
        if layer.get("b") is not None:
            self.matrix(layer, f"{at}{key}.", "b", f"{name}.bias", (n_out,))
        return n_out

    def norm(self, given: Any, at: str, name: str, n_embd: int, *, at_top: bool = False) -> None:
        """A LayerNorm's gain (C,) and bias (C,), which may be absent."""
        layer = _mapping(given, at)
        if not at_top:
            _only(layer, ("g", "b"), at)
        prefix = "" if at_top else f"{at}."
        self.matrix(layer, prefix, "g", f"{name}.weight", (n_embd,))
        if layer.get("b") is not None:
            self.matrix(layer, prefix, "b", f"{name}.bias", (n_embd,))


def _mapping(value: Any, at: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        found = "nothing" if value is None else type(value).__name__
        raise ValueError(f"{at}: expected a dict, found {found}")
    return value


def _only(holder: Mapping[str, Any], names: tuple[str, ...], at: str) -> None:
    for key in holder:
        if key not in names:
            raise ValueError(f"{at}: unknown entry {key!r}, expected {', '.join(names)}")


def _shown(shape: Sequence[int | None]) -> str:
    return "(" + ", ".join("any" if size is None else str(size) for size in shape) + ")"
