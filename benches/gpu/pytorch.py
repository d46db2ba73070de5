"""The same work by PyTorch: transformers as it comes, and GPT-2 with a static cache under torch.compile.

The second is what gpt-fast (PyTorch's own example of fast decoding) does: one step of one token as one
compiled function, keys and values in tensors of fixed size, replayed as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Causal attention, with the keys and values of n_ctx positions."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, n_embd: int, n_head: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.c_attn = nn.Linear(n_embd, 3 * n_embd)
        self.c_proj = nn.Linear(n_embd, n_embd)

    def forward(self, x: torch.Tensor, at: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        batch, n, c = x.shape
        q, k, v = (
            part.view(batch, n, self.n_head, c // self.n_head).transpose(1, 2)
            for part in self.c_attn(x).split(c, dim=2)
        )
        self.keys.index_copy_(2, at, k)
        self.values.index_copy_(2, at, v)
        y = F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=mask)
        return self.c_proj(y.transpose(1, 2).reshape(batch, n, c))


class Block(nn.Module):
    """One transformer block."""

    def __init__(self, n_embd: int, n_head: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.attn = Attention(n_embd, n_head)
        self.c_fc, self.c_proj = nn.Linear(n_embd, 4 * n_embd), nn.Linear(4 * n_embd, n_embd)

    def forward(self, x: torch.Tensor, at: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), at, mask)
        return x + self.c_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class StaticGPT2(nn.Module):
    """GPT-2 with a cache of fixed size, whose tensors stay where they are: what a CUDA graph needs."""

    def __init__(self, *, n_vocab: int, n_ctx: int, n_embd: int, n_layer: int, n_head: int) -> None:
        super().__init__()
        self.n_ctx, self.n_head, self.n_embd = n_ctx, n_head, n_embd
        self.wte, self.wpe = nn.Embedding(n_vocab, n_embd), nn.Embedding(n_ctx, n_embd)
        self.h = nn.ModuleList(Block(n_embd, n_head) for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(n_embd)

    def make_cache(self, batch: int) -> None:
        """Keys and values for so many sequences."""
        shape = (batch, self.n_head, self.n_ctx, self.n_embd // self.n_head)
        for block in self.h:
            for name in ("keys", "values"):
                block.attn.register_buffer(name, self.wte.weight.new_zeros(shape), persistent=False)

    def forward(self, tokens: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """tokens (B, T) at positions `at` (T,) -> logits (B, V) of the last."""
        mask = torch.arange(self.n_ctx, device=at.device)[None, :] <= at[:, None]
        x = self.wte(tokens) + self.wpe(at)
        for block in self.h:
            x = block(x, at, mask)
        return F.linear(self.ln_f(x[:, -1]), self.wte.weight)


def from_transformers(model: Any) -> StaticGPT2:
    """The same weights; transformers keeps its matrices as (in, out)."""
    config = model.config
    made = StaticGPT2(
        n_vocab=config.vocab_size,
        n_ctx=config.n_positions,
        n_embd=config.n_embd,
        n_layer=config.n_layer,
        n_head=config.n_head,
    )
    weights = {}
    for name, tensor in model.transformer.state_dict().items():
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue
        matrix = tensor.dim() == 2 and name.startswith("h.")
        weights[name.replace(".mlp.", ".")] = tensor.t().contiguous() if matrix else tensor
    made.load_state_dict(weights)
    return made.to(model.device, next(model.parameters()).dtype).eval()


def transformers_model(config: dict[str, int], device: str, dtype: torch.dtype) -> Any:
    """GPT2LMHeadModel with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = GPT2Config(
        vocab_size=config["n_vocab"],
        n_positions=config["n_ctx"],
        n_embd=config["n_embd"],
        n_layer=config["n_layer"],
        n_head=config["n_head"],
    )
    with torch.device(device):
        return GPT2LMHeadModel(shape).to(dtype).eval()


class Eager:
    """transformers, step by step with its own cache."""

    name = "transformers, eager"

    def __init__(self, model: Any) -> None:
        self._model = model

    def prefill(self, tokens: torch.Tensor) -> Callable[[], None]:
        """Compute (B, T) tokens; gives the step after them."""
        with torch.inference_mode():
            out = self._model(tokens, use_cache=True, logits_to_keep=1)
        state = {"cache": out.past_key_values, "token": out.logits[:, -1:].argmax(-1)}

        def step() -> None:
            with torch.inference_mode():
                after = self._model(state["token"], past_key_values=state["cache"], use_cache=True)
                state["token"] = after.logits[:, -1:].argmax(-1)

        step.state = state  # type: ignore[attr-defined]
        return step


class Compiled:
    """`StaticGPT2` under torch.compile, as a CUDA graph where there is a GPU."""

    name = "torch.compile, static cache, CUDA graphs"

    def __init__(self, model: StaticGPT2, batch: int) -> None:
        self._model = model
        model.make_cache(batch)

        def step(tokens: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
            return model(tokens, at).argmax(-1, keepdim=True)

        self._step = torch.compile(step, mode="reduce-overhead", fullgraph=True)

    def prefill(self, tokens: torch.Tensor) -> Callable[[], None]:
        """Compute (B, T) tokens; gives the step after them."""
        n = tokens.shape[1]
        with torch.no_grad():
            logits = self._model(tokens, torch.arange(n, device=tokens.device))
        state = {"token": logits.argmax(-1, keepdim=True), "at": torch.tensor([n], device=tokens.device)}

        def step() -> None:
            with torch.no_grad():
                # A graph's output is overwritten by its next replay.
                state["token"] = self._step(state["token"], state["at"]).clone()
                state["at"] += 1

        step.state = state  # type: ignore[attr-defined]
        return step


class Decoding:
    """Steps of one of the two; as `timing.Decoding`."""

    def __init__(
        self, engine: Eager | Compiled, n_vocab: int, context: int, batch: int, n_steps: int
    ) -> None:
        """Three steps first: torch.compile compiles, and captures."""
        self._engine, self._context, self._batch, self._n_steps = engine, context, batch, n_steps
        self._vocabulary = n_vocab
        self.seconds: list[float] = []
        self._steps(3)

    def round(self) -> None:
        """Seconds a step over `n_steps` of them, after some that are not counted."""
        self.seconds.append(self._steps(self._n_steps))

    def _steps(self, n: int) -> float:
        device = next(self._engine._model.parameters()).device
        ids = torch.arange(self._context, device=device) * 7919 % self._vocabulary
        step = self._engine.prefill(ids.expand(self._batch, -1).contiguous())
        n_first = min(3, n - 1)
        for _ in range(n_first):
            step()
        return elapsed(device, lambda: [step() for _ in range(n - n_first)]) / (n - n_first)


def elapsed(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds of what `work` queues, by the GPU's events; on a CPU by its clock."""
    if device.type != "cuda":
        import time

        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    work()
    end_event.record()
    torch.cuda.synchronize()
    return start_event.elapsed_time(end_event) / 1e3
