"""One sequence with its keys and values: the layer that `generate` itself stands on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from . import _core
from .engine import Engine, Sequenced
from .settings import Options, Settings, check_count

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from typing_extensions import Unpack

    from .prompts import Prompt

_NOT_FOR_DECODE = (
    "max_new_tokens",
    "stop",
    "num_return_sequences",
    "logprobs",
    "top_logprobs",
    "context_overflow",
)


class Session:
    """A sequence that grows by prefill and decode, and can be forked and cut; what `GPT2.session` returns.

    Keys and values of everything taken in stay in memory: 2 * n_layer * n_embd values a token, of the model's
    `kv_dtype`.  Not for use from several threads at the same time; forks of it are.
    """

    def __init__(
        self,
        model: Engine[Any],
        core: Sequenced,
        encode: Callable[[Prompt], list[int]],
        *,
        prompt_len: int = 0,
    ) -> None:
        """Wrap a core session; use `GPT2.session()` to get one."""
        self._model = model
        self._core = core
        self._encode = encode
        self._prompt_len = prompt_len
        self._speculator: tuple[object, _core.Speculator | None] = (None, None)

    @property
    def pos(self) -> int:
        """Number of tokens in the sequence."""
        return self._core.pos

    @property
    def tokens(self) -> list[int]:
        """All tokens of the sequence, prompt and generated ones."""
        return self._core.tokens

    @property
    def logits(self) -> NDArray[np.float32]:
        """(V,) float32, the scores of the token after the last one; RuntimeError or ValueError for an empty
        sequence."""
        return self._core.logits

    def prefill(self, tokens: Prompt) -> None:
        """Append a text or token ids and compute their keys and values.

        What was there before counts as prompt from now on.  ValueError for an empty prompt, for ids outside
        the vocabulary, and where more than `n_ctx` tokens would result; the sequence is then unchanged.
        """
        self._core.prefill(self._encode(tokens))
        self._prompt_len = self._core.pos

    def decode(self, n: int = 1, **settings: Unpack[Options]) -> list[int]:
        """Generate up to `n` tokens, append them, and return them; fewer only where an eos, then the last,
        ended them.

        Takes the settings that choose a token: `decode(1)` n times gives the tokens of `decode(n)`, with a
        seed. ValueError for an empty sequence, and when the sequence is full.  What was learnt about the
        proposals of `prompt_lookup_num_tokens` or `assistant_model` is kept for the next call with the same.
        """
        n = check_count("n", n)
        for name in _NOT_FOR_DECODE:
            if name in settings:
                raise TypeError(
                    f"{name} is a setting of generate and stream; Session.decode does not take it"
                )
        choice = Settings.of(settings)
        config = self._model.config
        sampler = choice.sampler(config, prompt_len=self._prompt_len, seed=choice.seeds(1)[0])
        speculator = self._speculator_of(choice)
        eos = frozenset(choice.eos_token_ids(config))
        sessions, samplers = [self._core], [sampler]
        new: list[int] = []
        while len(new) < n:
            if speculator is None:
                samples = self._model.decode(sessions, samplers)
            else:
                [(samples, _, _)] = self._model.decode_several(
                    sessions, samplers, [speculator], [n - len(new)]
                )
            new += [sample.token for sample in samples]
            if new[-1] in eos:
                break
        return new

    def _speculator_of(self, choice: Settings) -> _core.Speculator | None:
        """That of the last call where its settings were the same."""
        settings = (
            choice.prompt_lookup_num_tokens,
            choice.max_matching_ngram_size,
            choice.assistant_model,
            choice.num_assistant_tokens,
        )
        if self._speculator[0] != settings:
            self._speculator = (settings, choice.speculator(self._model))
        return self._speculator[1]

    def fork(self) -> Session:
        """A second sequence with the same tokens; keys and values are shared until one of the two changes
        them."""
        return Session(self._model, self._core.fork(), self._encode, prompt_len=self._prompt_len)

    def truncate(self, n: int) -> None:
        """Forget all but the first `n` tokens; ValueError unless 0 <= n <= pos."""
        n = check_count("n", n)
        if n > self._core.pos:
            raise ValueError(f"n is {n}; the sequence has {self._core.pos} tokens")
        self._core.truncate(n)
        self._prompt_len = min(self._prompt_len, n)
