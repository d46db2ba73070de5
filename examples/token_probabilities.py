"""How sure was the model?  Each new token with its probability, and what it might have said instead."""

import math

import gpt2rs

model = gpt2rs.GPT2.from_pretrained("shakespeare")
result = model.generate("To be, or not to be", max_new_tokens=12, top_logprobs=3, logprobs=True)
for token, logprob, top in zip(result.tokens, result.logprobs, result.top_logprobs, strict=True):
    others = ", ".join(
        f"{model.tokenizer.decode([t])!r} {math.exp(p):.0%}" for t, p in top.items() if t != token
    )
    print(f"{math.exp(logprob):5.0%}  {model.tokenizer.decode([token])!r:12} not {others}")
