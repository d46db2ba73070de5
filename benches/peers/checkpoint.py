"""The one random checkpoint that every peer runs: written once, read by every conversion.

The file has the names and shapes of Hugging Face's GPT-2 (linear weights are (in, out)). Its values are
normal, of a standard deviation of 0.02, as GPT-2 starts; but the matrices after a LayerNorm are three times
as large and the two that write to the residual stream are not scaled down, since GPT-2's own start repeats
one token whatever its layers do, and this one's text wanders. Biases and LayerNorms are drawn too: a
conversion that loses one shows in the tokens.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SEED = 20
STD = 0.02
STD_AFTER_LAYER_NORM = 0.06


@dataclass(frozen=True)
class Shape:
    """The sizes of a GPT-2, as its config.json names them."""

    n_vocab: int = 50257
    n_ctx: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @property
    def n_inner(self) -> int:
        return 4 * self.n_embd

    @property
    def cache_values(self) -> int:
        """Keys and values of one position."""
        return 2 * self.n_layer * self.n_embd

    def config(self) -> dict[str, object]:
        """The config.json that transformers reads."""
        return {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "vocab_size": self.n_vocab,
            "n_positions": self.n_ctx,
            "n_ctx": self.n_ctx,
            "n_embd": self.n_embd,
            "n_layer": self.n_layer,
            "n_head": self.n_head,
            "n_inner": None,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "bos_token_id": self.n_vocab - 1,
            "eos_token_id": self.n_vocab - 1,
            "tie_word_embeddings": True,
            "torch_dtype": "float32",
        }


def read_shape(folder: Path) -> Shape:
    config = json.loads((folder / "config.json").read_text())
    return Shape(
        config["vocab_size"], config["n_positions"], config["n_embd"], config["n_layer"], config["n_head"]
    )


def tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    c, inner = shape.n_embd, shape.n_inner
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (shape.n_vocab, c), "wpe.weight": (shape.n_ctx, c)}
    for i in range(shape.n_layer):
        block = f"h.{i}."
        for name, size in (
            ("ln_1.weight", (c,)),
            ("ln_1.bias", (c,)),
            ("attn.c_attn.weight", (c, 3 * c)),
            ("attn.c_attn.bias", (3 * c,)),
            ("attn.c_proj.weight", (c, c)),
            ("attn.c_proj.bias", (c,)),
            ("ln_2.weight", (c,)),
            ("ln_2.bias", (c,)),
            ("mlp.c_fc.weight", (c, inner)),
            ("mlp.c_fc.bias", (inner,)),
            ("mlp.c_proj.weight", (inner, c)),
            ("mlp.c_proj.bias", (c,)),
        ):
            shapes[block + name] = size
    shapes["ln_f.weight"] = (c,)
    shapes["ln_f.bias"] = (c,)
    return shapes


def write_checkpoint(folder: Path, shape: Shape, seed: int = SEED) -> None:
    """Write config.json and model.safetensors (float32), tensor by tensor."""
    folder.mkdir(parents=True, exist_ok=True)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    shapes = tensor_shapes(shape)
    for name, size in shapes.items():
        begin, end = end, end + 4 * math.prod(size)
        header["transformer." + name] = {"dtype": "F32", "shape": size, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(seed)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, size in shapes.items():
            values = rng.standard_normal(size, dtype=np.float32)
            reads_layer_norm = name.endswith(("c_attn.weight", "c_fc.weight"))
            values *= STD_AFTER_LAYER_NORM if reads_layer_norm else STD
            if ".ln_" in name or name.startswith("ln_f"):
                values += name.endswith(".weight")
            file.write(values.astype("<f4").tobytes())
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=2) + "\n")


def prepared(work: Path) -> tuple[Path, str]:
    """The folder of the checkpoint, written if need be, and what identifies it."""
    folder = work / "checkpoint"
    shape = Shape()
    made_from: dict[str, object] = {"shape": vars(shape), "seed": SEED, "program": digest(Path(__file__))}
    write_once(folder, made_from, lambda: write_checkpoint(folder, shape))
    return folder, json.dumps(made_from)


class Weights:
    """The tensors of a checkpoint, float32 and mapped, under their names without `transformer.`."""

    def __init__(self, folder: Path) -> None:
        self.shape = read_shape(folder)
        path = folder / "model.safetensors"
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            self._header = json.loads(file.read(size))
        self._header.pop("__metadata__", None)
        self._bytes = np.memmap(path, np.uint8, mode="r", offset=8 + size)

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self._header["transformer." + name]
        begin, end = entry["data_offsets"]
        return self._bytes[begin:end].view("<f4").reshape(entry["shape"])

    def names(self) -> Iterator[str]:
        return (name.removeprefix("transformer.") for name in self._header)


def digest(program: Path) -> str:
    """Of the program that writes a file: a changed program makes the file anew."""
    return hashlib.sha256(program.read_bytes()).hexdigest()


def write_once(target: Path, made_from: dict[str, object], write: Callable[[], None]) -> bool:
    """Call `write` unless `target` (a folder) holds the outcome of the same inputs already; say whether it
    was called.

    What a folder was made from is kept beside it, written last, so that an interrupted run starts anew.
    """
    stamp = target.with_name(target.name + ".made.json")
    if stamp.exists() and target.exists() and json.loads(stamp.read_text()) == made_from:
        return False
    stamp.unlink(missing_ok=True)
    target.mkdir(parents=True, exist_ok=True)
    write()
    stamp.write_text(json.dumps(made_from) + "\n")
    return True
