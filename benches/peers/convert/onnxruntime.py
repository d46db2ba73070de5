"""Checkpoint -> ONNX: `python -m convert.onnxruntime CHECKPOINT FOLDER VARIANT`.

A graph built by hand around com.microsoft's GroupQueryAttention, whose keys and values grow in place: the
fastest form of GPT-2 that onnxruntime was found to have. Logits are of the last token only.
"""

import sys
from pathlib import Path

import numpy as np
import onnx
from checkpoint import Weights
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

from convert import write_sizes

MICROSOFT = "com.microsoft"


class Graph:
    """Nodes and weights in the making; a method returns the name of what it adds."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def value(self, name: str, values: np.ndarray) -> str:
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def node(
        self, op: str, inputs: list[str], outputs: str | list[str], domain: str = "", **attributes: object
    ) -> str:
        outputs = [outputs] if isinstance(outputs, str) else outputs
        self.nodes.append(
            helper.make_node(op, inputs, outputs, name="node_" + outputs[0], domain=domain, **attributes)
        )
        return outputs[0]

    def parameter(self, name: str) -> str:
        return self.value(name, self.weights[name])

    def norm(self, x: str, name: str) -> str:
        inputs = [x, self.parameter(name + ".weight"), self.parameter(name + ".bias")]
        return self.node("LayerNormalization", inputs, name + ".out", axis=-1, epsilon=1e-5)

    def linear(self, x: str, name: str) -> str:
        product = self.node("MatMul", [x, self.parameter(name + ".weight")], name + ".product")
        return self.node("Add", [product, self.parameter(name + ".bias")], name + ".out")


def build(weights: Weights) -> onnx.ModelProto:
    shape = weights.shape
    graph = Graph(weights)
    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["B", "T"]),
        helper.make_tensor_value_info("position_ids", TensorProto.INT64, ["B", "T"]),
        helper.make_tensor_value_info("seqlens_k", TensorProto.INT32, ["B"]),
        helper.make_tensor_value_info("total_length", TensorProto.INT32, []),
    ]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", 1, shape.n_vocab])]
    token = graph.node("Gather", [graph.parameter("wte.weight"), "input_ids"], "token")
    position = graph.node("Gather", [graph.parameter("wpe.weight"), "position_ids"], "position")
    x = graph.node("Add", [token, position], "embedded")
    for i in range(shape.n_layer):
        block = f"h.{i}."
        qkv = graph.linear(graph.norm(x, block + "ln_1"), block + "attn.c_attn")
        past, present = [f"past_k_{i}", f"past_v_{i}"], [f"present_k_{i}", f"present_v_{i}"]
        cache = ["B", shape.n_head, "positions", shape.head_size]
        inputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, cache) for name in past]
        outputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, cache) for name in present]
        mixed = graph.node(
            "GroupQueryAttention",
            [qkv, "", "", *past, "seqlens_k", "total_length"],
            [block + "attention", *present],
            MICROSOFT,
            num_heads=shape.n_head,
            kv_num_heads=shape.n_head,
            do_rotary=0,
        )
        x = graph.node("Add", [x, graph.linear(mixed, block + "attn.c_proj")], block + "after_attention")
        wide = graph.linear(graph.norm(x, block + "ln_2"), block + "mlp.c_fc")
        wide = graph.node("FastGelu", [wide], block + "gelu", MICROSOFT)
        x = graph.node("Add", [x, graph.linear(wide, block + "mlp.c_proj")], block + "after_mlp")
    last = graph.node("Gather", [x, graph.value("last_index", np.array([-1]))], "last", axis=1)
    head = graph.value("lm_head", weights["wte.weight"].T)
    graph.node("MatMul", [graph.norm(last, "ln_f"), head], "logits")
    return helper.make_model(
        helper.make_graph(graph.nodes, "gpt2", inputs, outputs, graph.initializers),
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid(MICROSOFT, 1)],
        ir_version=10,
    )


def bytes_of_a_step(model: onnx.ModelProto) -> int:
    gathered = {node.input[0] for node in model.graph.node if node.op_type == "Gather"}
    return sum(
        numpy_helper.to_array(tensor).nbytes
        for tensor in model.graph.initializer
        if tensor.name not in gathered
    )


def convert(checkpoint: Path, folder: Path, variant: str) -> None:
    target = folder / "model.onnx"
    weights = Weights(checkpoint)
    model = build(weights)
    if variant == "float32":
        onnx.save(model, target)
    elif variant == "int8-dynamic":
        quantize_dynamic(
            model,
            target,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            extra_options={"DefaultTensorType": TensorProto.FLOAT},
        )
    else:
        # Accuracy level 4 multiplies in int8, the fastest.
        bits = int(variant.removeprefix("int").removesuffix("-blocks"))
        settings = DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=True, accuracy_level=4, bits=bits)
        quantizer = MatMulNBitsQuantizer(model, algo_config=settings)
        quantizer.process()
        quantizer.model.save_model_to_file(str(target))
    write_sizes(folder, weights.shape, bytes_of_a_step(onnx.load(target)))


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
