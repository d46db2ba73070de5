"""Do the peers give the same text? Greedy tokens of each, held against the NumPy reference."""

import json
from dataclasses import dataclass
from pathlib import Path

from checkpoint import Weights, write_once
from processes import Worker
from reference import greedy
from workloads import CHECK, request

# Where the best logit leads the second by more than this, float32 gives the same token in any order of
# summation.
FLOAT32_MARGIN = 1e-3


@dataclass(frozen=True)
class Reference:
    """Greedy tokens of the prompts of CHECK, and by how much each led the second."""

    tokens: list[list[int]]
    margins: list[list[float]]


def reference(checkpoint: Path, folder: Path, made_from: dict[str, object]) -> Reference:
    file = folder / "tokens.json"

    def write() -> None:
        weights = Weights(checkpoint)
        tokens, margins = greedy(weights, CHECK.prompts(weights.shape.n_vocab), CHECK.new)
        file.write_text(json.dumps({"tokens": tokens, "margins": margins}))

    write_once(folder, made_from, write)
    return Reference(**json.loads(file.read_text()))


@dataclass(frozen=True)
class Agreement:
    """How far a peer's texts follow the reference.

    `agreeing` of `total` tokens come before a text's first difference; `widest` is the largest margin that a
    first difference overruled (0 if there is none); `same_in_batch`: each prompt alone gives what it gives in
    a batch.
    """

    agreeing: int
    total: int
    widest: float
    same_in_batch: bool

    @property
    def holds_for_float32(self) -> bool:
        return self.widest <= FLOAT32_MARGIN


def compare(worker: Worker, reference: Reference, n_vocab: int) -> Agreement:
    prompts = CHECK.prompts(n_vocab)
    together = worker.ask(request(prompts, CHECK.new))["tokens"]
    alone = [worker.ask(request([prompt], CHECK.new))["tokens"][0] for prompt in prompts]
    agreeing, widest = 0, 0.0
    for texts in (together, alone):
        for text, expected, margins in zip(texts, reference.tokens, reference.margins, strict=True):
            first = next((i for i, (a, b) in enumerate(zip(text, expected, strict=True)) if a != b), None)
            agreeing += len(expected) if first is None else first
            if first is not None:
                widest = max(widest, margins[first])
    return Agreement(agreeing, 2 * CHECK.batch * CHECK.new, widest, together == alone)
