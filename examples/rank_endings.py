"""Which ending does the model find most likely?  The beginning is computed once and shared."""

import numpy as np

import gpt2rs

BEGINNING = "What light through yonder window"
ENDINGS = [" breaks?", " sings?", " of the king, my lord?"]

model = gpt2rs.GPT2.from_pretrained("shakespeare")
beginning = model.session()
beginning.prefill(model.tokenizer.encode(BEGINNING))

for ending in ENDINGS:
    session = beginning.fork()
    logprob = 0.0
    tokens = model.tokenizer.encode(ending)
    for token in tokens:
        logits = session.logits.astype(np.float64)
        logprob += logits[token] - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        session.prefill([token])
    # Per token, or short endings would always win.
    print(f"{logprob / len(tokens):8.3f} per token   {BEGINNING}{ending}")
