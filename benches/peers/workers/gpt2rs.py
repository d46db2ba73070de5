"""gpt2rs through its public interface; the variant is its dtype."""

import time

import gpt2rs
from workers.protocol import Answer, Run, Tokens, serve, timed_whole


def load(model: str, variant: str, n_threads: int) -> Run:
    gpt2 = gpt2rs.GPT2.from_pretrained(model, dtype=variant, n_threads=n_threads)

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

    def generate(prompts: Tokens, n_new: int) -> Tokens:
        results = gpt2.generate(prompts, max_new_tokens=n_new, eos_token_id=None)
        return [result.tokens for result in results]

    run_together = timed_whole(generate)

    def run(prompts: Tokens, n_new: int) -> Answer:
        return run_one(prompts[0], n_new) if len(prompts) == 1 else run_together(prompts, n_new)

    return run


if __name__ == "__main__":
    serve(load)
