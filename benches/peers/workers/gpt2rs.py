"""gpt2rs through its public interface; the variant is its dtype, and `-fast` asks for precision="fast".

The model is a checkpoint, or a folder that `gpt2rs convert` wrote, which says its dtype itself. A batch is
`generate`, driven by hand: its own loop yields after each token, so that the first can be timed apart.
"""

import time
from pathlib import Path
from typing import Any

import gpt2rs
from gpt2rs.generation import Text, steps
from gpt2rs.settings import Settings
from workers.protocol import Answer, Loaded, Tokens, serve

# Of a key or value in the cache; int8 has a float32 scale for the 64 of a head.
CACHE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1 + 4 / 64}


def open_model(model: str, variant: str, n_threads: int) -> gpt2rs.GPT2:
    dtype, _, precision = variant.partition("-")
    settings: dict[str, Any] = {"precision": precision} if precision else {}
    if (Path(model) / "model.safetensors").exists():
        settings["dtype"] = dtype
    return gpt2rs.GPT2.from_pretrained(model, n_threads=n_threads, **settings)


def load(model: str, variant: str, n_threads: int) -> Loaded:
    gpt2 = open_model(model, variant, n_threads)
    config = gpt2.config

    def run_one(prompt: list[int], n_new: int) -> Answer:
        session = gpt2.session()
        start = time.perf_counter()
        session.prefill(prompt)
        tokens = session.decode(1, eos_token_id=None)
        first_done = time.perf_counter()
        if n_new > 1:
            tokens += session.decode(n_new - 1, eos_token_id=None)
        done = time.perf_counter()
        return {"prefill_s": first_done - start, "decode_s": done - first_done, "tokens": [tokens]}

    def run_together(prompts: Tokens, n_new: int) -> Answer:
        start = time.perf_counter()
        settings = Settings(max_new_tokens=n_new, eos_token_id=None)
        texts = [Text(gpt2._core, prompt, settings, seed=0) for prompt in prompts]
        writing = steps(gpt2._core, texts)
        next(writing)
        first_done = time.perf_counter()
        for _ in writing:
            pass
        done = time.perf_counter()
        tokens = [text.tokens for text in texts]
        return {"prefill_s": first_done - start, "decode_s": done - first_done, "tokens": tokens}

    def run(prompts: Tokens, n_new: int) -> Answer:
        return run_one(prompts[0], n_new) if len(prompts) == 1 else run_together(prompts, n_new)

    wpe = 4 * config.n_ctx * config.n_embd  # float32 at every width
    cache_values = 2 * config.n_layer * config.n_embd
    return Loaded(run, gpt2.memory_footprint() - wpe, CACHE_BYTES[gpt2.kv_dtype] * cache_values)


if __name__ == "__main__":
    serve(load)
