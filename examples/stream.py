"""Text as it comes, from the model that ships with the package: python examples/stream.py "JULIET:" """

import sys

import gpt2rs

model = gpt2rs.GPT2.from_pretrained("shakespeare")
prompt = sys.argv[1] if len(sys.argv) > 1 else "ROMEO:"
print(prompt, end="")
for piece in model.stream(prompt, max_new_tokens=120, temperature=0.8, top_p=0.95, seed=1):
    print(piece, end="", flush=True)
print()
