"""What a model answers: generated texts and scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

FinishReason: TypeAlias = Literal["length", "eos", "stop"]


@dataclass(frozen=True)
class Speculation:
    """How proposals did in one text.

    proposed: tokens that were proposed.  accepted: those of them that are part of the text.  passes: passes
        of the model after the prompt's own, which gives the first token; plain decoding takes one for each
        token more.
    """

    proposed: int
    accepted: int
    passes: int

    @property
    def acceptance_rate(self) -> float:
        """`accepted` of `proposed`, 0 to 1; 0 where nothing was proposed."""
        return self.accepted / self.proposed if self.proposed else 0.0


@dataclass(frozen=True)
class Result:
    """One generated text; the prompt is not part of it.

    tokens: the new token ids, with the eos that ended the text.  Where a stop string ended it, they are all
        the tokens that were generated, the stop string's included.
    finish_reason: "length" (max_new_tokens), "eos" or "stop".
    logprobs: natural log-probability of each of `tokens` under the model, before temperature, penalties and
        filters; None unless asked for.
    top_logprobs: for each of `tokens`, the most likely ids at its place and their log-probabilities, best
        first; None unless asked for.
    seed: the seed that gives this text again; None where the choice was greedy.
    speculation: how the proposals of `prompt_lookup_num_tokens` or `assistant_model` did; None without them.
    """

    tokens: list[int]
    finish_reason: FinishReason
    logprobs: list[float] | None = None
    top_logprobs: list[dict[int, float]] | None = None
    seed: int | None = None
    speculation: Speculation | None = None
    _decode: Callable[[Sequence[int]], str] = field(repr=False, compare=False, kw_only=True)

    @cached_property
    def text(self) -> str:
        """The new text, without the eos and without the stop string that ended it; decoded on first access.

        Bytes that are no UTF-8, and an unfinished character at the end, show as U+FFFD; nothing else is
        changed. RuntimeError for a model without a tokenizer.
        """
        return self._decode(self.tokens[:-1] if self.finish_reason == "eos" else self.tokens)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the text in place of the model's tokenizer."""
        state = {**self.__dict__, "_decode": _no_text}
        try:
            state["text"] = self.text
        except RuntimeError:
            state.pop("text", None)
        return state


NO_TOKENIZER = (
    "this model has no tokenizer, so there is no text: its folder has neither vocab.json and merges.txt nor "
    "encoder.json and vocab.bpe, and its vocabulary is not GPT-2's; pass token ids, and read `tokens`"
)


def _no_text(tokens: Sequence[int]) -> str:
    """Stand for a tokenizer where there is none."""
    raise RuntimeError(NO_TOKENIZER)


@dataclass(frozen=True, eq=False)
class Score:
    """How likely a model holds a text to be.

    tokens: the T token ids of the text.
    logprobs: (T - 1,) float32, natural log-probability of each token but the first, given those before it.
    """

    tokens: list[int]
    logprobs: NDArray[np.float32]

    @cached_property
    def logprob(self) -> float:
        """Log-probability of the whole text given its first token: the sum of `logprobs`, in float64."""
        return float(self.logprobs.sum(dtype=np.float64))

    @cached_property
    def perplexity(self) -> float:
        """exp of the mean of `-logprobs`, taken in float64."""
        mean = -self.logprob / len(self.logprobs)
        return math.exp(mean) if mean < 709 else math.inf
