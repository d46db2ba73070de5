"""Checkpoint -> CTranslate2: `python -m convert.ctranslate2 CHECKPOINT FOLDER VARIANT`.

The official converter wants transformers and a tokenizer; its own specification classes need neither. The
vocabulary is `t0`, `t1`, ...: ids go in and come out. Weights are copied out of the file's mapping because
CTranslate2 scales in place.
"""

import sys
from pathlib import Path

import numpy as np
from checkpoint import Weights
from ctranslate2.specs import common_spec, transformer_spec

from convert import write_sizes


def convert(checkpoint: Path, folder: Path, variant: str) -> None:
    weights = Weights(checkpoint)
    shape = weights.shape
    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        shape.n_layer, shape.n_head, pre_norm=True, activation=common_spec.Activation.GELUTanh
    )

    def norm(target: common_spec.LayerNormSpec, name: str) -> None:
        target.gamma = np.array(weights[name + ".weight"])
        target.beta = np.array(weights[name + ".bias"])

    def linear(target: common_spec.LinearSpec, name: str) -> None:
        target.weight = np.array(weights[name + ".weight"].T, order="C")  # (out, in)
        target.bias = np.array(weights[name + ".bias"])

    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = np.array(weights["wte.weight"])
    decoder.position_encodings.encodings = np.array(weights["wpe.weight"])
    decoder.projection.weight = decoder.embeddings.weight
    norm(decoder.layer_norm, "ln_f")
    for i, layer in enumerate(decoder.layer):
        block = f"h.{i}."
        norm(layer.self_attention.layer_norm, block + "ln_1")
        linear(layer.self_attention.linear[0], block + "attn.c_attn")
        linear(layer.self_attention.linear[1], block + "attn.c_proj")
        norm(layer.ffn.layer_norm, block + "ln_2")
        linear(layer.ffn.linear_0, block + "mlp.c_fc")
        linear(layer.ffn.linear_1, block + "mlp.c_proj")
    spec.register_vocabulary([f"t{i}" for i in range(shape.n_vocab)])
    end = f"t{shape.n_vocab - 1}"
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = end
    spec.validate()
    spec.optimize(quantization=None if variant == "float32" else variant)
    # A tensor that is there twice, as the tied head is, stands as the other's name the second time.
    stored = {name: value for name, value in spec.variables().items() if not isinstance(value, str)}
    stored.pop("decoder/position_encodings/encodings")
    write_sizes(folder, shape, sum(value.num_bytes() for value in stored.values()))
    spec.save(str(folder))


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
