"""Checkpoint -> OpenVINO: `python -m convert.openvino CHECKPOINT FOLDER VARIANT`.

The stateful graph that optimum-intel makes, built by hand without torch: each cache is a variable that is
read, reordered by `beam_idx` and extended, the pattern which OpenVINO's CPU plugin fuses into its attention
kernel. NNCF, OpenVINO's own tool, compresses the weights for int8 and int4; for bfloat16 they stay float32 in
the file.
"""

import sys
from pathlib import Path

import nncf
import numpy as np
import openvino
from checkpoint import Weights
from openvino import Node, opset13
from openvino.op.util import Variable, VariableInfo

from convert import write_sizes

COMPRESSION = {
    "int8": {"mode": nncf.CompressWeightsMode.INT8_ASYM},
    "int4": {"mode": nncf.CompressWeightsMode.INT4_SYM, "group_size": 64, "ratio": 1.0, "all_layers": True},
}


def integers(*values: int) -> Node:
    return opset13.constant(np.array(values, np.int64))


def parameter(name: str, shape: list[int], dtype: type) -> Node:
    node = opset13.parameter(shape, dtype, name)
    node.output(0).set_names({name})
    return node


class Builder:
    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.shape = weights.shape
        self.input_ids = parameter("input_ids", [-1, -1], np.int64)
        self.position_ids = parameter("position_ids", [-1, -1], np.int64)
        self.beam_idx = parameter("beam_idx", [-1], np.int32)
        self.assigns: list[Node] = []
        self.variables: list[Variable] = []
        self.batch = opset13.gather(opset13.shape_of(self.input_ids), integers(0), integers(0))  # (1,)

    def norm(self, x: Node, name: str) -> Node:
        centred = opset13.mvn(x, integers(-1), True, 1e-5, "inside_sqrt")
        return centred * self.constant(name + ".weight") + self.constant(name + ".bias")

    def constant(self, name: str) -> Node:
        return opset13.constant(self.weights[name], name=name)

    def linear(self, x: Node, name: str) -> Node:
        weight = opset13.constant(
            np.ascontiguousarray(self.weights[name + ".weight"].T), name=name
        )  # (out, in)
        return opset13.matmul(x, weight, False, True) + self.constant(name + ".bias")

    def cached(self, new: Node, name: str) -> Node:
        """Extend the variable `name` (B, NH, positions, HS) by the new positions."""
        shape = self.shape
        info = VariableInfo()
        info.data_shape = openvino.PartialShape([-1, shape.n_head, -1, shape.head_size])
        info.data_type = openvino.Type.f32
        info.variable_id = name
        variable = Variable(info)
        empty_shape = opset13.concat([self.batch, integers(shape.n_head, 0, shape.head_size)], 0)
        empty = opset13.broadcast(opset13.constant(np.float32(0)), empty_shape)
        past = opset13.gather(opset13.read_value(empty, variable), self.beam_idx, integers(0))
        extended = opset13.concat([past, new], 2)
        self.assigns.append(opset13.assign(extended, variable))
        self.variables.append(variable)
        return extended

    def attention(self, x: Node, mask: Node, i: int) -> Node:
        shape = self.shape
        qkv = opset13.split(self.linear(x, f"h.{i}.attn.c_attn"), opset13.constant(np.int64(2)), 3)
        heads = integers(0, 0, shape.n_head, shape.head_size)
        q, k, v = (
            opset13.transpose(opset13.reshape(part, heads, True), integers(0, 2, 1, 3))
            for part in qkv.outputs()
        )
        k = self.cached(k, f"past_k_{i}")
        v = self.cached(v, f"past_v_{i}")
        mixed = opset13.scaled_dot_product_attention(q, k, v, mask)
        mixed = opset13.transpose(mixed, integers(0, 2, 1, 3))
        return self.linear(opset13.reshape(mixed, integers(0, 0, shape.n_embd), True), f"h.{i}.attn.c_proj")

    def mask(self) -> Node:
        """(B, 1, T, positions): 0 where a position may be seen, the lowest float32 elsewhere.

        B is spelled out because a mask that is broadcast over the batch gives wrong texts in bfloat16.
        """
        rows = opset13.unsqueeze(self.position_ids, integers(1, 3))  # (B, 1, T, 1)
        total = opset13.reduce_max(self.position_ids, integers(0, 1), False) + opset13.constant(np.int64(1))
        columns = opset13.range(opset13.constant(np.int64(0)), total, opset13.constant(np.int64(1)), "i64")
        seen = opset13.less_equal(columns, rows)
        lowest = opset13.constant(np.finfo(np.float32).min)
        return opset13.select(seen, opset13.constant(np.float32(0)), lowest)

    def build(self) -> openvino.Model:
        wte = self.constant("wte.weight")
        token = opset13.gather(wte, self.input_ids, integers(0))
        position = opset13.gather(self.constant("wpe.weight"), self.position_ids, integers(0))
        x = token + position
        mask = self.mask()
        for i in range(self.shape.n_layer):
            block = f"h.{i}."
            x = x + self.attention(self.norm(x, block + "ln_1"), mask, i)
            wide = opset13.gelu(self.linear(self.norm(x, block + "ln_2"), block + "mlp.c_fc"), "tanh")
            x = x + self.linear(wide, block + "mlp.c_proj")
        last = opset13.gather(x, integers(-1), integers(1))
        logits = opset13.matmul(self.norm(last, "ln_f"), wte, False, True)
        logits.output(0).set_names({"logits"})
        return openvino.Model(
            [opset13.result(logits)],
            self.assigns,
            [self.input_ids, self.position_ids, self.beam_idx],
            self.variables,
            "gpt2",
        )


def bytes_of_a_step(model: openvino.Model, variant: str) -> int:
    """In bfloat16 the matrices are rounded when the model is compiled: two bytes a value, not the four of the
    file.
    """
    total = 0.0
    for node in model.get_ops():
        if node.get_type_name() == "Constant" and not node.get_friendly_name().startswith("wpe."):
            kind = node.get_element_type()
            narrowed = variant == "bfloat16" and kind == openvino.Type.f32 and len(node.shape) == 2
            total += np.prod(node.shape) * (2 if narrowed else kind.bitwidth / 8)
    return int(total)


def convert(checkpoint: Path, folder: Path, variant: str) -> None:
    weights = Weights(checkpoint)
    model = Builder(weights).build()
    if variant in COMPRESSION:
        model = nncf.compress_weights(model, **COMPRESSION[variant])
    write_sizes(folder, weights.shape, bytes_of_a_step(model, variant))
    openvino.save_model(model, folder / "model.xml", compress_to_fp16=False)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
