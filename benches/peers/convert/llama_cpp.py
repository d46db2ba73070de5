"""Checkpoint -> GGUF: `python -m convert.llama_cpp CHECKPOINT FOLDER VARIANT`.

Writes model.gguf without a vocabulary: ids go in and come out. The F32 file is written here; llama.cpp itself
makes the others of it.
"""

import ctypes
import sys
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from checkpoint import Weights, read_shape

from convert import write_sizes

FILE_TYPES = {
    "F16": llama_cpp.LLAMA_FTYPE_MOSTLY_F16,
    "BF16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
}
NAMES = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def write_float32(checkpoint: Path, path: Path) -> None:
    weights = Weights(checkpoint)
    shape = weights.shape
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_name("random")
    writer.add_block_count(shape.n_layer)
    writer.add_context_length(shape.n_ctx)
    writer.add_embedding_length(shape.n_embd)
    writer.add_feed_forward_length(shape.n_inner)
    writer.add_head_count(shape.n_head)
    writer.add_layer_norm_eps(1e-5)
    writer.add_file_type(llama_cpp.LLAMA_FTYPE_ALL_F32)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(shape.n_vocab)
    writer.add_tensor("token_embd.weight", weights["wte.weight"])
    writer.add_tensor("position_embd.weight", weights["wpe.weight"])
    for part in ("weight", "bias"):
        writer.add_tensor(f"output_norm.{part}", weights[f"ln_f.{part}"])
    for i in range(shape.n_layer):
        for ours, theirs in NAMES.items():
            for part in ("weight", "bias"):
                values = weights[f"h.{i}.{ours}.{part}"]
                # GGUF has a linear weight as (out, in).
                writer.add_tensor(f"blk.{i}.{theirs}.{part}", np.ascontiguousarray(values.T))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source: Path, path: Path, variant: str) -> None:
    # llama-quantize gives the tied head of a Q4_0 file a wider type, which is what a user gets.
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = FILE_TYPES[variant]
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(settings))
    if status != 0:
        raise RuntimeError(f"llama_model_quantize gave {status} for {variant}")


def bytes_of_a_step(path: Path) -> int:
    tensors = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}
    gathered = {"position_embd.weight"}
    if "output.weight" in tensors:
        gathered.add("token_embd.weight")
    return sum(size for name, size in tensors.items() if name not in gathered)


if __name__ == "__main__":
    checkpoint, folder, variant = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    target = folder / "model.gguf"
    write_float32(checkpoint, target)
    if variant != "F32":
        source = target.rename(folder / "float32.gguf")
        quantize(source, target, variant)
        source.unlink()
    write_sizes(folder, read_shape(checkpoint), bytes_of_a_step(target))
