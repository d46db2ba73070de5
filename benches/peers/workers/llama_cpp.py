"""llama.cpp through llama-cpp-python's low-level calls; the variant is the type of the GGUF's weights.

A context holds what the workload needs and no more, one context for each number of sequences; its cache is of
llama.cpp's default type (float16), and so is the choice of flash attention.
"""

import ctypes
from pathlib import Path

import llama_cpp
import numpy as np

from workers.protocol import Loaded, Tokens, loaded, serve, timed_steps

N_CTX = 1024


class LlamaCpp:
    def __init__(self, model: str, n_threads: int) -> None:
        self.silent = llama_cpp.llama_log_callback(lambda level, text, user: None)
        llama_cpp.llama_log_set(self.silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(model.encode(), settings)
        if not self.model:
            raise RuntimeError(f"llama.cpp could not load {model}")
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.n_threads = n_threads
        self.contexts: dict[tuple[int, int], object] = {}
        self.batch = llama_cpp.llama_batch_init(N_CTX, 0, 1)

    def context_for(self, n_sequences: int, n_tokens: int) -> object:
        """`n_tokens` of each sequence; one sequence has all positions, so that it stays with one context."""
        room = N_CTX if n_sequences == 1 else 256 * -(-n_tokens // 256)
        if (n_sequences, room) not in self.contexts:
            settings = llama_cpp.llama_context_default_params()
            settings.n_ctx = room * n_sequences
            settings.n_seq_max = n_sequences
            settings.n_batch = N_CTX
            settings.n_threads = self.n_threads
            settings.n_threads_batch = self.n_threads
            context = llama_cpp.llama_init_from_model(self.model, settings)
            if not context:
                raise RuntimeError(f"llama.cpp could not make a context of {n_sequences} sequences")
            self.contexts[n_sequences, room] = context
        return self.contexts[n_sequences, room]

    def decode(self, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Take in rows of (token, position, sequence, logits wanted); the best next token where wanted."""
        self.batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            self.batch.token[i] = token
            self.batch.pos[i] = position
            self.batch.n_seq_id[i] = 1
            self.batch.seq_id[i][0] = sequence
            self.batch.logits[i] = wanted
        status = llama_cpp.llama_decode(self.context, self.batch)
        if status != 0:
            raise RuntimeError(f"llama_decode gave {status}")
        best = []
        for i, row in enumerate(rows):
            if row[3]:
                logits = llama_cpp.llama_get_logits_ith(self.context, i)
                best.append(int(np.ctypeslib.as_array(logits, shape=(self.n_vocab,)).argmax()))
        return best

    def prefill(self, prompts: Tokens, n_new: int) -> list[int]:
        self.context = self.context_for(len(prompts), len(prompts[0]) + n_new)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), False)
        self.position = len(prompts[0])
        return self.decode(
            [
                (token, position, sequence, position == len(prompt) - 1)
                for sequence, prompt in enumerate(prompts)
                for position, token in enumerate(prompt)
            ]
        )

    def step(self, last: list[int]) -> list[int]:
        best = self.decode([(token, self.position, sequence, True) for sequence, token in enumerate(last)])
        self.position += 1
        return best


def load(model: str, variant: str, n_threads: int) -> Loaded:
    peer = LlamaCpp(str(Path(model) / "model.gguf"), n_threads)
    return loaded(timed_steps(peer.prefill, peer.step), model, 2)


if __name__ == "__main__":
    serve(load)
