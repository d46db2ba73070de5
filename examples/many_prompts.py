"""Prompts of different lengths in one call, without padding: each line of standard input is one.

printf 'ROMEO:\\nWhat is thy name?\\n' | python examples/many_prompts.py
"""

import sys

import gpt2rs

prompts = [line.rstrip("\n") for line in sys.stdin if line.strip()]
model = gpt2rs.GPT2.from_pretrained("shakespeare")
# The seed belongs to a prompt, not to its place: a prompt gets the same text whatever else is in the batch.
for prompt, result in zip(prompts, model.generate(prompts, max_new_tokens=30, top_k=40, seed=7), strict=True):
    print(f"{prompt} | {result.text.strip()!r} ({result.finish_reason})")
