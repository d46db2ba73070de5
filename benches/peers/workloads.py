"""What is timed, and what the hardware could at most do of it."""

import random
from dataclasses import dataclass

from checkpoint import Shape

BYTES_PER_VALUE = {"float32": 4, "bfloat16": 2}


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

    def tokens_per_second(self, prefill_s: float, decode_s: float) -> float:
        if self.is_decode:
            return self.batch * (self.new - 1) / decode_s
        return self.batch * self.prompt / prefill_s

    def bytes_per_second(self, tokens_per_second: float, shape: Shape, bytes_per_value: int) -> float:
        """What a decode reads: every weight but wpe once a step, and each sequence's keys and values."""
        positions = self.prompt + self.new / 2
        cache = self.batch * positions * 2 * shape.n_layer * shape.n_embd
        values = matrix_values(shape) + shape.n_vocab * shape.n_embd + cache
        return bytes_per_value * values * tokens_per_second / self.batch

    def flops_per_second(self, tokens_per_second: float, shape: Shape) -> float:
        """What a prefill computes: the matrices, causal attention, and the LM head for the last token."""
        attention = 4 * shape.n_layer * shape.n_embd * self.prompt / 2
        head = 2 * shape.n_vocab * shape.n_embd / self.prompt
        return (2 * matrix_values(shape) + attention + head) * tokens_per_second


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("decode-32", "decode, prompt 32, 128 new tokens", 1, 32, 128),
        Workload("decode-896", "decode, prompt 896, 64 new tokens", 1, 896, 64),
        Workload("prefill-512", "prefill, 512 tokens", 1, 512, 1),
        Workload("prefill-1000", "prefill, 1000 tokens", 1, 1000, 1),
        Workload("batch-8", "decode, 8 sequences together, prompt 32, 64 new tokens", 8, 32, 64),
    )
}
QUICK = ("decode-32", "prefill-512", "batch-8")

# The token check and the cold start run these; they are not timed as throughput.
CHECK = Workload("check", "greedy tokens", 4, 32, 16)
FIRST_TOKEN = Workload("first-token", "cold start to the first token, prompt 32", 1, 32, 1)
MEMORY = Workload("memory", "prompt 32, 32 new tokens", 1, 32, 32)


def random_prompt(length: int, seed: int, n_vocab: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(n_vocab - 1) for _ in range(length)]


def matrix_values(shape: Shape) -> int:
    """Values in the matrices of the blocks: c_attn, attn.c_proj, c_fc, mlp.c_proj."""
    return shape.n_layer * shape.n_embd * (4 * shape.n_embd + 2 * shape.n_inner)
