"""Prompts to finished texts: the loop around the core's prefill and decode.

Sequences are decoded together, without padding, as many as the engine's `max_batch` at a time; when one ends,
the next prompt takes its place.  Neither changes any text, since the engine's answer for a sequence does not
depend on its batch.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Container, Generator, Sequence
from typing import Any

from .engine import Engine, Sample, Sequenced
from .results import FinishReason, Result, Speculation
from .settings import Settings
from .text import TextDecoder


class Text:
    """One text being written: its sequence in the core, its sampler, and what ends it."""

    def __init__(
        self,
        model: Engine[Any],
        prompt: list[int],
        settings: Settings,
        *,
        seed: int,
        index: int = 0,
        decoder: TextDecoder | None = None,
    ) -> None:
        """Check that the prompt fits; nothing is computed yet.

        seed, index: of this text among those returned for its prompt.  decoder: needed where text is streamed
        or a stop string may end it.
        """
        config = model.config
        self.prompt = prompt
        self.tokens: list[int] = []
        self.decoder = decoder
        self.session: Sequenced | None = None
        self.finish_reason: FinishReason | None = None
        self._n_ctx = config.n_ctx
        self._settings = settings
        self._seed = seed
        self._room = settings.room(len(prompt), config.n_ctx)
        self._eos: Container[int] = frozenset(settings.eos_token_ids(config))
        self._logprobs: list[float] | None = [] if settings.logprobs or settings.top_logprobs else None
        self._top_logprobs: list[dict[int, float]] | None = [] if settings.top_logprobs else None
        self.sampler = settings.sampler(config, prompt_len=len(prompt), seed=seed, index=index)
        self.speculator = settings.speculator(model)
        self._steps = self._proposed = self._accepted = 0
        if self._room == 0:
            self._end("length")

    @property
    def full(self) -> bool:
        """Whether prompt and text fill the context, so that the next token sees the last `n_ctx` alone."""
        return len(self.prompt) + len(self.tokens) >= self._n_ctx

    @property
    def room(self) -> int:
        """How many tokens may still come."""
        return self._room - len(self.tokens)

    @property
    def all_tokens(self) -> list[int]:
        """Prompt and text."""
        return self.prompt + self.tokens

    def append(self, sample: Sample) -> None:
        """Take in the next token."""
        token = sample.token
        self.tokens.append(token)
        if self._logprobs is not None:
            assert sample.logprob is not None
            self._logprobs.append(sample.logprob)
            if self._top_logprobs is not None:
                self._top_logprobs.append(dict(sample.top_logprobs))
        if token in self._eos:
            self._end("eos")
        elif self.decoder is not None and self.decoder.push(token):
            self._end("stop")
        elif len(self.tokens) == self._room:
            self._end("length")

    def append_several(self, samples: Sequence[Sample], proposed: int, accepted: int) -> None:
        """Take in the tokens of one pass, up to the one that ends the text; the first `accepted` are of the
        `proposed` ones."""
        taken = 0
        while taken < len(samples) and self.finish_reason is None:
            self.append(samples[taken])
            taken += 1
        self._steps += 1
        self._proposed += proposed
        self._accepted += min(accepted, taken)

    def result(self, decode: Callable[[Sequence[int]], str]) -> Result:
        """The finished text; `decode` turns tokens into text where that was not done on the way."""
        assert self.finish_reason is not None
        pieces = None if self.decoder is None else self.decoder.pieces
        return Result(
            self.tokens,
            self.finish_reason,
            self._logprobs,
            self._top_logprobs,
            self._seed if self._settings.sampling else None,
            # The first token follows from the prompt's pass.
            Speculation(self._proposed, self._accepted, max(self._steps - 1, 0))
            if self._settings.speculates
            else None,
            _decode=decode if pieces is None else lambda _: "".join(pieces),
        )

    def _end(self, reason: FinishReason) -> None:
        self.finish_reason = reason
        self.session = None
        if self.decoder is not None:
            self.decoder.finish()


def steps(model: Engine[Any], texts: Sequence[Text]) -> Generator[None, None, None]:
    """Write all `texts` to their end, yielding after each pass, of which every text in work has got a token
    or more.

    Equal prompts are computed once and share their keys and values.
    """
    waiting = _Waiting(model, texts)
    active: list[Text] = []
    while True:
        active = [text for text in active if text.finish_reason is None]
        active += waiting.start(model.max_batch - len(active))
        if not active:
            return
        fitting = [text for text in active if not text.full]
        sliding = [text for text in active if text.full]
        _advance(model, fitting)
        _slide(model, sliding)
        yield


def write(model: Engine[Any], texts: Sequence[Text]) -> None:
    """Write all `texts` to their end."""
    for _ in steps(model, texts):
        pass


def _advance(model: Engine[Any], texts: Sequence[Text]) -> None:
    """One pass over texts that have room in the context: of each the next token, or several where tokens are
    proposed."""
    sessions = [text.session for text in texts if text.session is not None]
    samplers = [text.sampler for text in texts]
    speculators = [text.speculator for text in texts if text.speculator is not None]
    if speculators:
        steps = model.decode_several(sessions, samplers, speculators, [text.room for text in texts])
        for text, step in zip(texts, steps, strict=True):
            text.append_several(*step)
    else:
        for text, sample in zip(texts, model.decode(sessions, samplers), strict=True):
            text.append_several([sample], 0, 0)


def _slide(model: Engine[Any], texts: Sequence[Text]) -> None:
    """Choose the next token of texts that fill the context: from their last `n_ctx`, computed afresh."""
    n_ctx = model.config.n_ctx
    sessions = [model.session() for _ in texts]
    model.prefill(sessions, [text.all_tokens[-n_ctx:] for text in texts])
    for text, session in zip(texts, sessions, strict=True):
        text.append(text.sampler.choose(session.logits, text.all_tokens))


class _Waiting:
    """Texts not begun yet, those of equal prompts one after the other."""

    def __init__(self, model: Engine[Any], texts: Sequence[Text]) -> None:
        self._model = model
        groups: dict[tuple[int, ...], list[Text]] = {}
        for text in texts:
            if text.finish_reason is None:
                groups.setdefault(tuple(text.prompt), []).append(text)
        self._queue = deque((prompt, text) for prompt, group in groups.items() for text in group)
        self._left = Counter({prompt: len(group) for prompt, group in groups.items()})
        self._prefilled: dict[tuple[int, ...], Sequenced] = {}

    def start(self, count: int) -> list[Text]:
        """Up to `count` texts, their prompts computed where they leave room in the context."""
        if not self._queue:
            return []
        starting = [self._queue.popleft() for _ in range(min(count, len(self._queue)))]
        fitting = [(prompt, text) for prompt, text in starting if not text.full]
        fresh = {prompt: self._model.session() for prompt, _ in fitting if prompt not in self._prefilled}
        if fresh:
            self._model.prefill(list(fresh.values()), [list(prompt) for prompt in fresh])
            self._prefilled.update(fresh)
        for prompt, text in fitting:
            self._left[prompt] -= 1
            shared = self._prefilled[prompt]
            text.session = shared.fork() if self._left[prompt] else self._prefilled.pop(prompt)
        return [text for _, text in starting]
