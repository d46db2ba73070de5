"""onnxruntime on the hand-built graph of convert/onnxruntime.py, its keys and values bound in place.

Variants: float32; int8-blocks and int4-blocks (MatMulNBits, blocks of 32); int8-dynamic (MatMulInteger).
"""

from pathlib import Path

import numpy as np
import onnxruntime

from workers.protocol import Loaded, Tokens, loaded, serve, timed_steps


class OnnxRuntime:
    def __init__(self, model: str, n_threads: int) -> None:
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = n_threads
        settings.inter_op_num_threads = 1
        settings.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
        # Inputs and outputs pair up: past_k_0 and present_k_0 (B, NH, positions, HS), and so on.
        self.past = {i.name: i for i in self.session.get_inputs() if i.name.startswith("past_")}
        self.caches: dict[tuple[int, int], dict[str, object]] = {}

    def cache_for(self, batch: int, positions: int) -> dict[str, object]:
        if (batch, positions) not in self.caches:
            self.caches[batch, positions] = {
                name: onnxruntime.OrtValue.ortvalue_from_numpy(
                    np.zeros((batch, entry.shape[1], positions, entry.shape[3]), np.float32)
                )
                for name, entry in self.past.items()
            }
        return self.caches[batch, positions]

    def forward(self, tokens: np.ndarray) -> list[int]:
        """Take in tokens (B, T); the best next token of each sequence."""
        batch, n_tokens = tokens.shape
        total = self.position + n_tokens
        positions = np.arange(self.position, total, dtype=np.int64)
        binding = self.session.io_binding()
        binding.bind_cpu_input("input_ids", tokens)
        binding.bind_cpu_input("position_ids", np.repeat(positions[None], batch, 0))
        binding.bind_cpu_input("seqlens_k", np.full(batch, total - 1, np.int32))
        binding.bind_cpu_input("total_length", np.array(total, np.int32))
        # The logits come first among the outputs, in the order of binding.
        binding.bind_output("logits", "cpu")
        for name, values in self.cache.items():
            binding.bind_ortvalue_input(name, values)
            binding.bind_ortvalue_output(name.replace("past", "present"), values)
        self.session.run_with_iobinding(binding)
        self.position = total
        return binding.get_outputs()[0].numpy().reshape(batch, -1).argmax(-1).tolist()

    def prefill(self, prompts: Tokens, n_new: int) -> list[int]:
        self.cache = self.cache_for(len(prompts), len(prompts[0]) + n_new)
        self.position = 0
        return self.forward(np.array(prompts, np.int64))

    def step(self, last: list[int]) -> list[int]:
        return self.forward(np.array(last, np.int64)[:, None])


def load(model: str, variant: str, n_threads: int) -> Loaded:
    peer = OnnxRuntime(str(Path(model) / "model.onnx"), n_threads)
    return loaded(timed_steps(peer.prefill, peer.step), model, 4)


if __name__ == "__main__":
    serve(load)
