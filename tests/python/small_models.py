"""One small model of random numbers, in the forms that programs keep it in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import gpt2rs

C, V, N_CTX, N_LAYER, N_HEAD = 8, 11, 6, 2, 2
IDS = [3, 0, 10, 7]
CONFIG = {"vocab_size": V, "n_positions": N_CTX, "n_embd": C, "n_layer": N_LAYER, "n_head": N_HEAD}
TEXTBOOK_CONFIG = {
    "vocab_size": V,
    "context_length": N_CTX,
    "emb_dim": C,
    "n_layers": N_LAYER,
    "n_heads": N_HEAD,
    "drop_rate": 0.1,
    "qkv_bias": True,
}


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def parameters(*, biases: bool = True, head: bool = False) -> dict[str, Any]:
    """The textbooks' nested dict, with random numbers."""
    seeds = iter(range(1000))

    def norm() -> dict[str, np.ndarray]:
        return {"g": draw(next(seeds), C), **({"b": draw(next(seeds), C)} if biases else {})}

    def linear(n_in: int, n_out: int) -> dict[str, np.ndarray]:
        return {"w": draw(next(seeds), n_in, n_out), **({"b": draw(next(seeds), n_out)} if biases else {})}

    params = {"wte": draw(next(seeds), V, C), "wpe": draw(next(seeds), N_CTX, C), "ln_f": norm()}
    params["blocks"] = [
        {
            "ln_1": norm(),
            "attn": {"c_attn": linear(C, 3 * C), "c_proj": linear(C, C)},
            "ln_2": norm(),
            "mlp": {"c_fc": linear(C, 4 * C), "c_proj": linear(4 * C, C)},
        }
        for _ in range(N_LAYER)
    ]
    return {**params, **({"lm_head": draw(next(seeds), V, C)} if head else {})}


def hugging_face(params: dict[str, Any], *, prefix: str = "", linear: bool = False) -> dict[str, Any]:
    """The same parameters under Hugging Face's names; with `linear` as nanoGPT stores them, (out, in)."""
    kinds = {"g": "weight", "b": "bias", "w": "weight"}
    state = {f"{prefix}wte.weight": params["wte"], f"{prefix}wpe.weight": params["wpe"]}

    def add(name: str, layer: dict[str, np.ndarray]) -> None:
        for key, array in layer.items():
            transposed = linear and key == "w"
            state[f"{prefix}{name}.{kinds[key]}"] = np.ascontiguousarray(array.T) if transposed else array

    for number, block in enumerate(params["blocks"]):
        for norm in ("ln_1", "ln_2"):
            add(f"h.{number}.{norm}", block[norm])
        for part, layer in (("attn", "c_attn"), ("attn", "c_proj"), ("mlp", "c_fc"), ("mlp", "c_proj")):
            add(f"h.{number}.{part}.{layer}", block[part][layer])
    add("ln_f", params["ln_f"])
    state["lm_head.weight"] = params.get("lm_head", params["wte"])
    return state


def textbook(params: dict[str, Any]) -> dict[str, Any]:
    """The same parameters as the textbook's GPTModel names and stores them, mask included."""
    state = {
        "tok_emb.weight": params["wte"],
        "pos_emb.weight": params["wpe"],
        "final_norm.scale": params["ln_f"]["g"],
        "final_norm.shift": params["ln_f"]["b"],
        "out_head.weight": params.get("lm_head", params["wte"]),
    }

    def add(name: str, layer: dict[str, np.ndarray]) -> None:
        state[f"{name}.weight"] = np.ascontiguousarray(layer["w"].T)
        state[f"{name}.bias"] = layer["b"]

    for number, block in enumerate(params["blocks"]):
        at = f"trf_blocks.{number}"
        state[f"{at}.att.mask"] = np.triu(np.ones((N_CTX, N_CTX), np.float32), 1)
        whole = block["attn"]["c_attn"]
        # Not in the order of the parts, which only their names tell.
        for part in (1, 2, 0):
            name = ("W_query", "W_key", "W_value")[part]
            columns = slice(part * C, (part + 1) * C)
            add(f"{at}.att.{name}", {"w": whole["w"][:, columns], "b": whole["b"][columns]})
        add(f"{at}.att.out_proj", block["attn"]["c_proj"])
        add(f"{at}.ff.layers.0", block["mlp"]["c_fc"])
        add(f"{at}.ff.layers.2", block["mlp"]["c_proj"])
        for theirs, ours in (("norm1", "ln_1"), ("norm2", "ln_2")):
            state[f"{at}.{theirs}.scale"], state[f"{at}.{theirs}.shift"] = block[ours]["g"], block[ours]["b"]
    return state


def from_arrays(params: dict[str, Any], **config: Any) -> np.ndarray:
    return gpt2rs.GPT2.from_params(params, n_head=N_HEAD, **config).logits(IDS)


def from_file(path: Path, config: Any = None) -> np.ndarray:
    return gpt2rs.GPT2.from_pretrained(path, config=config).logits(IDS)
