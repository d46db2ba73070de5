"""Parameters in a file of torch.save, brought to Hugging Face's names.

Three layouts occur. Hugging Face's own: GPT-2's linear weights are (in, out). nanoGPT's: the same names, but
weights are (out, in), as torch.nn.Linear holds them, without biases when it was trained so, inside {"model":
..., "model_args": ...}. And the textbook's GPTModel (Raschka, "Build a Large Language Model (From Scratch)"):
names of its own, (out, in), queries, keys and values apart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import Placement, place
from .pytorch import PytorchFile, SavedTensor, read_pytorch

# A compiled model (torch.compile) and a data-parallel one put their own name in front of each parameter's.
_WRAPPER_PREFIXES = ("_orig_mod.", "module.")
# Under which key training scripts keep the parameters beside the optimizer's state.
_WRAPPER_KEYS = ("model_state_dict", "state_dict", "model")
_MASK = re.compile(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)")
_LINEAR = re.compile(r"(transformer\.)?h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight")
_ATTENTION = re.compile(r"(transformer\.)?h\.\d+\.attn\.c_attn\.weight")

_TEXTBOOK_TOP = {
    "tok_emb.weight": "wte.weight",
    "pos_emb.weight": "wpe.weight",
    "final_norm.scale": "ln_f.weight",
    "final_norm.shift": "ln_f.bias",
    "out_head.weight": "lm_head.weight",
}
_TEXTBOOK_BLOCK = {
    "norm1.scale": "ln_1.weight",
    "norm1.shift": "ln_1.bias",
    "att.out_proj.weight": "attn.c_proj.weight",
    "att.out_proj.bias": "attn.c_proj.bias",
    "norm2.scale": "ln_2.weight",
    "norm2.shift": "ln_2.bias",
    "ff.layers.0.weight": "mlp.c_fc.weight",
    "ff.layers.0.bias": "mlp.c_fc.bias",
    "ff.layers.2.weight": "mlp.c_proj.weight",
    "ff.layers.2.bias": "mlp.c_proj.bias",
}
_TEXTBOOK_QKV = ("att.W_query", "att.W_key", "att.W_value")
_TEXTBOOK_NAME = re.compile(r"trf_blocks\.(\d+)\.(.+)")


@dataclass(frozen=True)
class StateDict:
    """The parameters of one file.

    Attributes:
        placements: each parameter under Hugging Face's name.
        model_args: nanoGPT's description of its model, where the file has one.
        tied: True or False when the layout decides whether the head is the token embedding; None when the
            config does.
    """

    placements: list[Placement]
    model_args: dict[str, Any] | None
    tied: bool | None


def read_state_dict(path: Path) -> StateDict:
    """The parameters in a PyTorch file, of any of the three layouts.

    Raises:
        ValueError: the file is malformed (see `read_pytorch`), holds no parameters, or a name that is in none
            of the layouts.
    """
    file = read_pytorch(path)
    tensors, model_args = _parameters(file)
    if "tok_emb.weight" in tensors:
        return StateDict(
            _textbook(file, tensors), None, _shares_head(tensors, "tok_emb.weight", "out_head.weight")
        )
    tied = None
    if model_args is not None:
        prefix = "transformer." if "transformer.wte.weight" in tensors else ""
        tied = _shares_head(tensors, f"{prefix}wte.weight", "lm_head.weight")
    return StateDict(_hugging_face(file, tensors, tied), model_args, tied)


def _parameters(file: PytorchFile) -> tuple[dict[str, SavedTensor], dict[str, Any] | None]:
    content, model_args = file.content, None
    if isinstance(content, dict):
        given = content.get("model_args")
        model_args = given if isinstance(given, dict) else None
        for key in _WRAPPER_KEYS:
            if isinstance(content.get(key), dict):
                content = content[key]
                break
    if not isinstance(content, dict) or not any(isinstance(value, SavedTensor) for value in content.values()):
        raise ValueError(f"{file.path}: no state dict: expected a dict of named tensors")
    tensors: dict[str, SavedTensor] = {}
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, SavedTensor):
            raise ValueError(
                f"{file.path}: entry {str(key)[:100]!r} is a {type(value).__name__}, expected a tensor"
            )
        name = _unwrapped(key)
        if name in tensors:
            raise ValueError(f"{file.path}: tensor {name} is there twice")
        tensors[name] = value
    return tensors, model_args


def _unwrapped(name: str) -> str:
    while name.startswith(_WRAPPER_PREFIXES):
        name = name.split(".", 1)[1]
    return name


def _shares_head(tensors: Mapping[str, SavedTensor], embedding: str, head: str) -> bool:
    """Whether the head is absent or the very same elements of the file as the token embedding."""
    return head not in tensors or tensors[head] == tensors.get(embedding)


def _hugging_face(
    file: PytorchFile, tensors: Mapping[str, SavedTensor], tied: bool | None
) -> list[Placement]:
    # c_attn is (C, 3C) in Hugging Face's Conv1D and (3C, C) in nanoGPT's Linear, and so tells the two apart.
    attention = next((tensor for name, tensor in tensors.items() if _ATTENTION.fullmatch(name)), None)
    linear = attention is not None and len(attention.shape) == 2 and attention.shape[0] > attention.shape[1]
    placements = []
    for name, tensor in tensors.items():
        # Masks are booleans in some versions; they never are parameters.
        if _MASK.fullmatch(name) or (tied and name == "lm_head.weight"):
            continue
        transposed = linear and _LINEAR.fullmatch(name) is not None
        placements.append(place(name, file.locate(name, tensor), transposed=transposed))
    return placements


def _textbook(file: PytorchFile, tensors: Mapping[str, SavedTensor]) -> list[Placement]:
    tied = _shares_head(tensors, "tok_emb.weight", "out_head.weight")
    placements = []
    joined: set[str] = set()
    for name, tensor in tensors.items():
        block = _TEXTBOOK_NAME.fullmatch(name)
        inner = block[2] if block else ""
        part, _, kind = inner.rpartition(".")
        if inner == "att.mask" or (tied and name == "out_head.weight"):
            continue
        if block and part in _TEXTBOOK_QKV and kind in ("weight", "bias"):
            target = f"h.{block[1]}.attn.c_attn.{kind}"
            if target not in joined:
                joined.add(target)
                placements += _joined(file, tensors, f"trf_blocks.{block[1]}.", kind, target)
            continue
        known = f"h.{block[1]}.{_TEXTBOOK_BLOCK[inner]}" if inner in _TEXTBOOK_BLOCK and block else None
        known = known or _TEXTBOOK_TOP.get(name)
        if known is None:
            raise ValueError(f"{file.path}: tensor {name[:100]} is not one of the textbook's GPTModel")
        # Every matrix in a block is a torch.nn.Linear's, (out, in).
        transposed = known.startswith("h.") and len(tensor.shape) == 2
        placements.append(place(known, file.locate(name, tensor), transposed=transposed))
    return placements


def _joined(
    file: PytorchFile, tensors: Mapping[str, SavedTensor], prefix: str, kind: str, target: str
) -> list[Placement]:
    """Queries, keys and values of one block as the three parts of c_attn, whose stored form is (3C, C)."""
    parts = []
    for part in _TEXTBOOK_QKV:
        name = f"{prefix}{part}.{kind}"
        if name not in tensors:
            raise ValueError(f"{file.path}: tensor {name} is missing beside its two companions")
        tensor = file.locate(name, tensors[name])
        if tensor.flipped:
            raise ValueError(
                f"{file.path}: tensor {name} is a transposed view; call .contiguous() on it before saving"
            )
        parts.append(place(target, tensor, transposed=kind == "weight"))
    return parts
