"""What is timed, and what the hardware could at most do of it."""

import random
from dataclasses import dataclass, replace
from typing import Any

from checkpoint import Shape

# As many sequences as gpt2rs decodes together; asked for more, it takes one lot after the other.
LARGEST_BATCH = 32


@dataclass(frozen=True)
class Workload:
    """`batch` prompts of `prompt` tokens, `new` greedy tokens after each.

    Decode counts the tokens after the first: the first one comes with the prompt.
    """

    name: str
    title: str
    batch: int
    prompt: int
    new: int

    @property
    def is_decode(self) -> bool:
        return self.new > 1

    def prompts(self, n_vocab: int) -> list[list[int]]:
        return [random_prompt(self.prompt, seed, n_vocab) for seed in range(self.batch)]

    def request(self, n_vocab: int) -> dict[str, Any]:
        """What a worker is asked."""
        return request(self.prompts(n_vocab), self.new)

    def tokens_per_second(self, prefill_s: float, decode_s: float) -> float:
        if self.is_decode:
            return self.batch * (self.new - 1) / decode_s
        return self.batch * self.prompt / prefill_s

    def bytes_per_token(self, weight_bytes: int, cache_bytes: int) -> float:
        """What a decode has to read for one token: its part of the weights, which a step reads once for all
        sequences, and its own sequence's keys and values, at half of the new tokens.

        `weight_bytes` of a step, `cache_bytes` of a position.
        """
        return weight_bytes / self.batch + cache_bytes * (self.prompt + self.new / 2)

    def flops_per_token(self, shape: Shape) -> float:
        """What a prefill computes: the matrices, causal attention, and the LM head for the last token."""
        attention = 4 * shape.n_layer * shape.n_embd * self.prompt / 2
        head = 2 * shape.n_vocab * shape.n_embd / self.prompt
        return 2 * matrix_values(shape) + attention + head

    def shortened(self) -> "Workload":
        """The same with a quarter of the new tokens or fewer: at most 256 of all sequences."""
        return replace(self, new=min(self.new // 4, 256 // self.batch)) if self.is_decode else self


def batch_of(n: int) -> Workload:
    return Workload(f"batch-{n}", f"decode, {n} sequences together, prompt 32", n, 32, 64)


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("decode-32", "decode, prompt 32", 1, 32, 128),
        Workload("decode-896", "decode, prompt 896", 1, 896, 64),
        Workload("prefill-512", "prefill, 512 tokens", 1, 512, 1),
        Workload("prefill-1000", "prefill, 1000 tokens", 1, 1000, 1),
        batch_of(8),
        batch_of(32),
    )
}
# All but what takes long and says little more than the others.
QUICK = tuple(name for name in WORKLOADS if name != "prefill-1000")


def select(names: tuple[str, ...], batches: tuple[int, ...] | None) -> list[Workload]:
    """Those with these names; with `batches`, only those of so many sequences, and one for each size that has
    none."""
    chosen = [WORKLOADS[name] for name in names]
    if batches is None:
        return chosen
    chosen = [workload for workload in chosen if workload.batch in batches]
    known = {workload.batch for workload in chosen}
    return chosen + [batch_of(n) for n in batches if n not in known]


# The token check and the cold start run these; they are not timed as throughput.
CHECK = Workload("check", "greedy tokens", 4, 32, 16)
FIRST_TOKEN = Workload("first-token", "cold start to the first token, prompt 32", 1, 32, 1)
MEMORY = Workload("memory", "prompt 32, 32 new tokens", 1, 32, 32)


def request(prompts: list[list[int]], n_new: int) -> dict[str, Any]:
    return {"prompts": prompts, "new_tokens": n_new}


def random_prompt(length: int, seed: int, n_vocab: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(n_vocab - 1) for _ in range(length)]


def matrix_values(shape: Shape) -> int:
    """Values in the matrices of the blocks: c_attn, attn.c_proj, c_fc, mlp.c_proj."""
    return shape.n_layer * shape.n_embd * (4 * shape.n_embd + 2 * shape.n_inner)
