"""OpenVINO on the stateful graph of convert/openvino.py.

Variants: float32; bfloat16; int8 and int4 (compressed weights). The cache is as wide as the computation,
except for int8 and int4, where it is of OpenVINO's default, uint8.
"""

from pathlib import Path

import numpy as np
import openvino

from workers.protocol import Loaded, Tokens, loaded, serve, timed_steps

PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}
CACHE_BYTES = {"float32": 4.0, "bfloat16": 2.0}
# A scale and a zero point, float32 both, for the 64 values of a head.
UINT8_BYTES = 1 + 2 * 4 / 64


class OpenVino:
    def __init__(self, model: str, settings: dict[str, object]) -> None:
        self.request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()

    def forward(self, tokens: np.ndarray) -> list[int]:
        """Take in tokens (B, T); the best next token of each sequence."""
        batch, n_tokens = tokens.shape
        positions = np.arange(self.position, self.position + n_tokens, dtype=np.int64)
        inputs = {
            "input_ids": tokens,
            "position_ids": np.repeat(positions[None], batch, 0),
            "beam_idx": np.arange(batch, dtype=np.int32),
        }
        self.request.infer(inputs, share_inputs=True)
        self.position += n_tokens
        return self.request.get_output_tensor(0).data.reshape(batch, -1).argmax(-1).tolist()

    def prefill(self, prompts: Tokens, n_new: int) -> list[int]:
        self.request.reset_state()
        self.position = 0
        return self.forward(np.array(prompts, np.int64))

    def step(self, last: list[int]) -> list[int]:
        return self.forward(np.array(last, np.int64)[:, None])


def load(model: str, variant: str, n_threads: int) -> Loaded:
    settings: dict[str, object] = {
        "INFERENCE_NUM_THREADS": n_threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": PRECISIONS.get(variant, "f32"),
    }
    if variant in PRECISIONS:
        settings["KV_CACHE_PRECISION"] = PRECISIONS[variant]
    peer = OpenVino(str(Path(model) / "model.xml"), settings)
    return loaded(timed_steps(peer.prefill, peer.step), model, CACHE_BYTES.get(variant, UINT8_BYTES))


if __name__ == "__main__":
    serve(load)
