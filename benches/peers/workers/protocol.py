"""How run.py and a peer talk: one JSON line in, one JSON line out. (train.py: see training.py.)

A worker is started as `python -m workers.PEER --model PATH --variant NAME --threads N`. It loads, says
`{"weight_bytes": ..., "cache_bytes": ...}` or `{"error": REASON}`, and then answers requests
`{"prompts": [[id, ...], ...], "new_tokens": n}` with
`{"prefill_s": ..., "decode_s": ..., "tokens": [[id, ...], ...]}`: greedy tokens, one
list a prompt; `prefill_s` includes the choice of the first token. Between requests it waits for its standard
input.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Tokens = list[list[int]]
Answer = dict[str, Any]
# (prompts, number of new tokens) -> answer
Run = Callable[[Tokens, int], Answer]


@dataclass(frozen=True)
class Loaded:
    """A peer that is ready; `weight_bytes` are read in each decode step, `cache_bytes` are a position's keys
    and values.
    """

    run: Run
    weight_bytes: int
    cache_bytes: float


def loaded(run: Run, model: str, bytes_per_cache_value: float) -> Loaded:
    """Of a converted model, whose sizes lie beside it (see convert/)."""
    sizes = json.loads((Path(model) / "sizes.json").read_text())
    return Loaded(run, sizes["weight_bytes"], bytes_per_cache_value * sizes["cache_values"])


def timed_steps(
    prefill: Callable[[Tokens, int], list[int]],
    step: Callable[[list[int]], list[int]],
) -> Run:
    """For a peer driven token by token: `prefill` gives the first token of each prompt, `step` the next."""

    def run(prompts: Tokens, n_new: int) -> Answer:
        start = time.perf_counter()
        last = prefill(prompts, n_new)
        first_done = time.perf_counter()
        steps = [last]
        for _ in range(n_new - 1):
            last = step(last)
            steps.append(last)
        done = time.perf_counter()
        tokens = [list(sequence) for sequence in zip(*steps, strict=True)]
        return {"prefill_s": first_done - start, "decode_s": done - first_done, "tokens": tokens}

    return run


def timed_whole(generate: Callable[[Tokens, int], Tokens]) -> Run:
    """For a peer that only generates: decode is the time of all tokens less the time of the first."""

    def run(prompts: Tokens, n_new: int) -> Answer:
        start = time.perf_counter()
        tokens = generate(prompts, 1)
        first_done = time.perf_counter()
        prefill_s = first_done - start
        if n_new == 1:
            return {"prefill_s": prefill_s, "decode_s": 0.0, "tokens": tokens}
        tokens = generate(prompts, n_new)
        decode_s = time.perf_counter() - first_done - prefill_s
        return {"prefill_s": prefill_s, "decode_s": decode_s, "tokens": tokens}

    return run


def parser() -> argparse.ArgumentParser:
    """What every worker is told."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--variant", required=True)
    parser.add_argument("--threads", type=int, required=True)
    return parser


def serve(load: Callable[[str, str, int], Loaded]) -> None:
    """Load the peer by `load(model path, variant, threads)` and answer requests until its input ends."""
    arguments = parser().parse_args()

    def start() -> tuple[Answer, Callable[[Answer], Answer]]:
        loaded = load(arguments.model, arguments.variant, arguments.threads)
        sizes = {"weight_bytes": loaded.weight_bytes, "cache_bytes": loaded.cache_bytes}
        return sizes, lambda request: loaded.run(request["prompts"], request["new_tokens"])

    talk(start)


def talk(start: Callable[[], tuple[Answer, Callable[[Answer], Answer]]]) -> None:
    """Say what `start` has to say, and answer requests by the function that it gave, until the input ends."""
    # What a library prints must not fall between the answers: from here on descriptor 1 is standard error.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(message: Answer) -> None:
        answers.write(json.dumps(message) + "\n")

    try:
        said, run = start()
    except Exception as error:
        answer({"error": f"{type(error).__name__}: {error}"})
        sys.exit(1)
    answer(said)
    for line in sys.stdin:
        try:
            answer(run(json.loads(line)))
        except Exception as error:
            answer({"error": f"{type(error).__name__}: {error}"})
    # Some peers' exit handlers take long or fail; nothing is left to be saved.
    os._exit(0)
