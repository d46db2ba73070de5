"""Prompt lookup beside plain decoding: `python benches/speculation.py TEXT [TEXT_OF_124M]`.

TEXT continues the built-in model's kind of text, TEXT_OF_124M is any; prompts are cut from them.  Both ways
of decoding take turns; printed are medians of tokens/s, the median of the ratios with minimum and maximum,
and how many tokens a pass gave.  The tokens are compared, too: they must be the same.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import gpt2rs

LOOKUP = {"prompt_lookup_num_tokens": 10}
GREEDY: dict[str, Any] = {}


def write(model: gpt2rs.GPT2, prompts: list[list[int]], n: int, settings: dict[str, Any]) -> Any:
    """Seconds a token, and the results."""
    start = time.perf_counter()
    results = [model.generate(prompt, max_new_tokens=n, eos_token_id=None, **settings) for prompt in prompts]
    return (time.perf_counter() - start) / (n * len(prompts)), results


def compare(
    model: gpt2rs.GPT2, name: str, prompts: list[list[int]], n: int, settings: dict[str, Any], rounds: int
) -> None:
    """Print a line: plain decoding and lookup in turns."""
    if settings:
        settings = {"seed": 1, **settings}
    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(rounds):
        texts = []
        for lookup in (False, True):
            seconds, results = write(model, prompts, n, settings | (LOOKUP if lookup else {}))
            times[lookup].append(seconds)
            texts.append([result.tokens for result in results])
        assert texts[0] == texts[1], "speculation changed a text"
    passes = sum(result.speculation.passes for result in results)
    plain, looked_up = (1 / statistics.median(times[lookup]) for lookup in (False, True))
    ratios = [a / b for a, b in zip(times[False], times[True], strict=True)]
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}, {max(ratios):.2f})"
    print(f"{name:44}{plain:9.1f}{looked_up:9.1f}   {spread:20}{n * len(prompts) / passes:12.2f}", flush=True)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("text_of_124m", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    print(f"{'tokens/s':44}{'plain':>9}{'lookup':>9}   {'lookup/plain':20}{'tokens/pass':>12}")

    model = gpt2rs.GPT2.from_pretrained("shakespeare")
    assert model.tokenizer is not None
    ids = model.tokenizer.encode(arguments.text.read_text())
    prompts = [ids[i : i + 50] for i in range(0, 600, 100)]
    for name, settings in [
        ("built in, greedy", GREEDY),
        ("built in, temperature 0.7", {"temperature": 0.7}),
        ("built in, temperature 1", {"temperature": 1.0}),
    ]:
        compare(model, name, prompts, 200, settings, arguments.rounds)
    copies = [prompt * 3 for prompt in prompts]
    compare(model, "built in, greedy, prompt repeated", copies, 100, GREEDY, arguments.rounds)

    if arguments.text_of_124m is None:
        return
    model = gpt2rs.GPT2.from_config("gpt2", dtype="bfloat16")
    assert model.tokenizer is not None
    ids = model.tokenizer.encode(arguments.text_of_124m.read_text())
    prompts = [ids[:100], ids[200:300]]
    for name, settings in [
        ("124M, random weights, greedy (a loop)", GREEDY),
        ("124M, random weights, temperature 1", {"temperature": 1.0}),
    ]:
        compare(model, name, prompts, 100, settings, arguments.rounds)


if __name__ == "__main__":
    main()
