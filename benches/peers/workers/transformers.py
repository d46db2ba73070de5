"""transformers on PyTorch, with its cache and scaled_dot_product_attention; the variant is torch's dtype."""

import torch
from transformers import DynamicCache, GPT2LMHeadModel

from workers.protocol import Loaded, Tokens, serve, timed_steps


class Transformers:
    def __init__(self, model: str, dtype: torch.dtype) -> None:
        self.model = GPT2LMHeadModel.from_pretrained(model, dtype=dtype, attn_implementation="sdpa").eval()

    def forward(self, tokens: torch.Tensor) -> list[int]:
        """Take in tokens (B, T); the best next token of each sequence."""
        with torch.inference_mode():
            output = self.model(tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1].argmax(-1).tolist()

    def prefill(self, prompts: Tokens, n_new: int) -> list[int]:
        self.cache = DynamicCache(config=self.model.config)
        return self.forward(torch.tensor(prompts))

    def step(self, last: list[int]) -> list[int]:
        return self.forward(torch.tensor(last)[:, None])


def load(model: str, variant: str, n_threads: int) -> Loaded:
    torch.set_num_threads(n_threads)
    peer = Transformers(model, getattr(torch, variant))
    # parameters() has a tied head once.
    weight_bytes = sum(parameter.nbytes for parameter in peer.model.parameters())
    weight_bytes -= peer.model.transformer.wpe.weight.nbytes
    config = peer.model.config
    cache_bytes = 2 * config.n_layer * config.n_embd * getattr(torch, variant).itemsize
    return Loaded(timed_steps(peer.prefill, peer.step), weight_bytes, cache_bytes)


if __name__ == "__main__":
    serve(load)
