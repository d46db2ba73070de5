"""The settings of a generation: their names, defaults and ranges, and the one place that checks them.

Names and meanings are those of Hugging Face's `generate`; `presence_penalty`, `frequency_penalty`,
`logit_bias`, `logprobs` and `top_logprobs` are those of OpenAI's completions.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol, TypedDict

import numpy as np

from . import _core
from .engine import Engine
from .ranges import (
    Check,
    Interval,
    bias,
    boolean,
    integer,
    mapping,
    number,
    one_or_several,
    optional,
    several,
)

DEFAULT_MAX_NEW_TOKENS = 128
DEFAULT_MATCHING_NGRAM_SIZE = 2
DEFAULT_ASSISTANT_TOKENS = 20
SEED_BITS = 64


class HasCore(Protocol):
    """A `GPT2`, as far as settings look at it."""

    @property
    def _core(self) -> Engine[Any]: ...


class Options(TypedDict, total=False):
    """The keywords of `generate`, `stream` and `Session.decode`; `Settings` says what each one means."""

    max_new_tokens: int | None
    min_new_tokens: int
    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    epsilon_cutoff: float | None
    eta_cutoff: float | None
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    no_repeat_ngram_size: int
    bad_words_ids: Sequence[Sequence[int]] | None
    suppress_tokens: Sequence[int] | None
    logit_bias: Mapping[int, float] | None
    stop: str | Sequence[str] | None
    eos_token_id: int | Sequence[int] | Literal["config"] | None
    seed: int | Sequence[int] | None
    logprobs: bool
    top_logprobs: int
    context_overflow: Literal["error", "slide"]
    prompt_lookup_num_tokens: int | None
    max_matching_ngram_size: int
    assistant_model: HasCore | None
    num_assistant_tokens: int


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the next tokens are chosen and when a text ends.  Immutable; everything is checked on construction.

    The text is the most likely one token by token (greedy) unless sampling is asked for: by `do_sample=True`,
    or by giving any of `temperature` above 0, `top_k`, `top_p`, `min_p`, `typical_p`, `epsilon_cutoff`,
    `eta_cutoff`. `seed` alone does not ask for it; `do_sample=False` or `temperature=0` means greedy whatever
    else is given.

    Length
        max_new_tokens: tokens to generate at most, 0 or more.  None: 128, or as many as the context still
            holds where that is fewer.  A number that does not fit in `n_ctx` together with the prompt is a
            ValueError.
        min_new_tokens: no eos before that many new tokens.
        eos_token_id: the token or tokens that end the text; "config" stands for those of the model's config
            (ids outside the vocabulary there are passed over), None for none.
        stop: a string or several that end the text; looked for in the new text only, across token borders;
            the one that is complete first counts.  `min_new_tokens` does not hold it back, as in Hugging
            Face.
        context_overflow: "error", or "slide": past `n_ctx` tokens the model sees the last `n_ctx` alone, at
            positions counted from 0 and recomputed for every token, as the loop of the textbooks does
            (`idx[:, -context_length:]`).  Slow by nature.

    Sampling
        do_sample: None to infer it as said above.
        temperature: divides the logits, 0 or more.  None: 1.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: nucleus sampling, 0 to 1 (Holtzman et al. 2020, arXiv:1904.09751).
        min_p: keep tokens at least min_p times as likely as the most likely one, 0 to 1 (arXiv:2407.01082).
        typical_p: locally typical sampling, above 0 to 1 (Meister et al. 2023, arXiv:2202.00666).
        epsilon_cutoff, eta_cutoff: truncation sampling, from 0, below 1 (Hewitt et al. 2022,
            arXiv:2210.15191).
        seed: an int from 0 to 2**64 - 1, or one a prompt.  None draws a fresh one for each prompt, which the
            result then carries.  Texts depend on (seed, place among the prompt's returned sequences,
            position) and on nothing
            else: the same seed gives a prompt the same text in any batch.

    Scores, applied before sampling and to greedy choice alike
        repetition_penalty: divides positive logits of tokens seen in prompt or text, multiplies negative ones
            (Keskar et al. 2019, arXiv:1909.05858); above 0, 1 is off.
        presence_penalty, frequency_penalty: subtracted from the logit of a token already generated, once, or
            once each time.
        no_repeat_ngram_size: no n-gram twice in prompt and text; 0 is off.
        bad_words_ids: token sequences that must not appear.
        suppress_tokens: tokens that must not appear.
        logit_bias: token id -> number added to its logit; -inf forbids the token.

    Results
        num_return_sequences: sequences for each prompt; given, a prompt's answer is a list of them.  More
            than one needs sampling.
        logprobs: report the log-probability of every new token, under the model itself (before any of the
            above).
        top_logprobs: report those of the most likely tokens too, that many a position; implies `logprobs`.

    Speed: several tokens a pass, the same ones.  What may follow is proposed, computed in one pass, and kept
    as far as the model chooses the same; tokens, log-probabilities and texts are those without these
    settings, greedy or sampled.  How many are proposed follows from how many were accepted so far, down to
    none; `Result.speculation` counts them.  Not with context_overflow="slide" past `n_ctx`, and one of the
    two at a time.  On a GPU nothing is proposed: these settings change neither the tokens nor the speed.
        prompt_lookup_num_tokens: propose that many tokens at most of those that followed when the last tokens
            of prompt and text occurred before; 1 or more, None is off.  Pays where a text repeats its prompt
            or itself (Saxena 2023, "Prompt Lookup Decoding").
        max_matching_ngram_size: how many last tokens to look for, 1 or more; then fewer, down to one.
        assistant_model: a smaller `GPT2` of the same vocabulary that proposes tokens, chosen by these
            settings and the same seed; None is off.  It has to read the prompt too.  (Leviathan et al. 2023,
            arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318.)
        num_assistant_tokens: how many it proposes at a time at most, 1 or more.

    Raises ValueError naming the setting, its value and its range.
    """

    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    epsilon_cutoff: float | None = None
    eta_cutoff: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: Sequence[Sequence[int]] | None = None
    suppress_tokens: Sequence[int] | None = None
    logit_bias: Mapping[int, float] | None = None
    stop: str | Sequence[str] | None = None
    eos_token_id: int | Sequence[int] | Literal["config"] | None = "config"
    seed: int | Sequence[int] | None = None
    num_return_sequences: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    context_overflow: Literal["error", "slide"] = "error"
    prompt_lookup_num_tokens: int | None = None
    max_matching_ngram_size: int = DEFAULT_MATCHING_NGRAM_SIZE
    assistant_model: HasCore | None = None
    num_assistant_tokens: int = DEFAULT_ASSISTANT_TOKENS

    def __post_init__(self) -> None:
        """Replace every value that was given by its checked, plain Python form."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not field.default:
                object.__setattr__(self, field.name, _CHECKS[field.name](field.name, value))
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens is {self.min_new_tokens}; "
                f"it must be at most max_new_tokens, which is {self.max_new_tokens}"
            )
        if self.do_sample and self.temperature == 0:
            raise ValueError("temperature is 0, which means greedy, and do_sample is True; give one of them")
        if (self.num_return_sequences or 1) > 1 and not self.sampling:
            raise ValueError(
                f"num_return_sequences is {self.num_return_sequences}, and greedy choice makes them all the "
                "same; ask for sampling (do_sample=True, or a temperature above 0)"
            )
        if self.prompt_lookup_num_tokens is not None and self.assistant_model is not None:
            raise ValueError(
                f"prompt_lookup_num_tokens is {self.prompt_lookup_num_tokens}, and assistant_model is given, "
                "too; tokens are proposed by one of them"
            )

    @staticmethod
    def of(options: Mapping[str, Any]) -> Settings:
        """Settings from keywords; an unknown one is a TypeError that names the nearest known one."""
        for name in options:
            if name not in _CHECKS:
                raise TypeError(f"unknown setting {name!r}{_suggestion(name)}")
        return Settings(**options)

    @property
    def sampling(self) -> bool:
        """Whether tokens are drawn, rather than the most likely one taken."""
        if self.do_sample is not None:
            return self.do_sample and self.temperature != 0
        if self.temperature is not None:
            return self.temperature > 0
        filters = (self.top_k, self.top_p, self.min_p, self.typical_p, self.epsilon_cutoff, self.eta_cutoff)
        return any(value is not None for value in filters)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings, as a tuple whatever they were given as."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def speculates(self) -> bool:
        """Whether tokens are proposed, so that a pass may give several."""
        return self.prompt_lookup_num_tokens is not None or self.assistant_model is not None

    def room(self, prompt_len: int, n_ctx: int) -> int:
        """Tokens to generate after a prompt of `prompt_len` tokens; ValueError where they do not fit in
        `n_ctx`."""
        if self.context_overflow == "slide":
            room = DEFAULT_MAX_NEW_TOKENS if self.max_new_tokens is None else self.max_new_tokens
            if self.speculates and prompt_len + room > n_ctx:
                name = "prompt_lookup_num_tokens" if self.assistant_model is None else "assistant_model"
                raise ValueError(
                    f'context_overflow is "slide", and prompt and text may have {prompt_len + room} tokens; '
                    f"with {name} they must fit in the {n_ctx} positions of the model (n_ctx)"
                )
            return room
        left = n_ctx - prompt_len
        if left < 0 or (left == 0 and self.max_new_tokens is None):
            raise ValueError(
                f"the prompt has {prompt_len} tokens, which leaves no room in the {n_ctx} positions of the "
                'model (n_ctx); shorten it, or give context_overflow="slide"'
            )
        if self.max_new_tokens is None:
            room = min(DEFAULT_MAX_NEW_TOKENS, left)
            if self.min_new_tokens > room:
                raise ValueError(
                    f"min_new_tokens is {self.min_new_tokens}; after this prompt at most {room} are generated"
                )
            return room
        if self.max_new_tokens > left:
            raise ValueError(
                f"max_new_tokens is {self.max_new_tokens}; after a prompt of {prompt_len} tokens at most "
                f"{left} fit in the {n_ctx} positions of the model (n_ctx); ask for fewer, or give "
                'context_overflow="slide"'
            )
        return self.max_new_tokens

    def eos_token_ids(self, config: _core.Config) -> list[int]:
        """The tokens that end a text of a model with this config."""
        if self.eos_token_id is None:
            return []
        if isinstance(self.eos_token_id, str):
            return [token for token in config.eos_token_ids if 0 <= token < config.n_vocab]
        given = self.eos_token_id
        return check_vocabulary("eos_token_id", [given] if isinstance(given, int) else given, config.n_vocab)

    def seeds(self, n_prompts: int) -> list[int]:
        """One seed a prompt: those given, or fresh ones from the operating system."""
        if self.seed is None:
            return [int.from_bytes(os.urandom(SEED_BITS // 8), "little") for _ in range(n_prompts)]
        if isinstance(self.seed, int):
            return [self.seed] * n_prompts
        if len(self.seed) != n_prompts:
            raise ValueError(
                f"seed has {len(self.seed)} values; it must be one int, or one a prompt ({n_prompts})"
            )
        return list(self.seed)

    def speculator(self, model: Engine[Any]) -> _core.Speculator | None:
        """Where the proposals of one text come from; None where there are none, as always for a model on a
        GPU.

        ValueError, for a model on the CPU, where `assistant_model` has another vocabulary or is on a GPU.
        """
        if not isinstance(model, _core.Model):
            return None
        if self.prompt_lookup_num_tokens is not None:
            return _core.Speculator.lookup(self.prompt_lookup_num_tokens, self.max_matching_ngram_size)
        if self.assistant_model is not None:
            draft = self.assistant_model._core
            if not isinstance(draft, _core.Model):
                raise ValueError(
                    f"assistant_model is on {draft.device}; it must be on the CPU, as the model is"
                )
            return _core.Speculator.draft(model, draft, self.num_assistant_tokens)
        return None

    def sampler(
        self,
        config: _core.Config,
        *,
        prompt_len: int,
        seed: int,
        index: int = 0,
    ) -> _core.Sampler:
        """These settings compiled for one returned sequence.

        prompt_len: tokens of the sequence that were given rather than generated.  index: place among the
        sequences returned for the prompt.  ValueError for token ids outside the vocabulary and a
        `top_logprobs` beyond its size.
        """
        n_vocab = config.n_vocab
        if self.top_logprobs > n_vocab:
            raise ValueError(
                f"top_logprobs is {self.top_logprobs}; it must be from 0 to {n_vocab}, the vocabulary's size"
            )
        biases = dict(self.logit_bias or {})
        check_vocabulary("logit_bias", list(biases), n_vocab)
        return _core.Sampler(
            prompt_len=prompt_len,
            do_sample=self.sampling,
            temperature=1.0 if self.temperature is None or not self.sampling else self.temperature,
            top_k=min(self.top_k, n_vocab) if self.top_k else None,
            top_p=self.top_p,
            min_p=self.min_p,
            typical_p=self.typical_p,
            epsilon_cutoff=self.epsilon_cutoff or None,
            eta_cutoff=self.eta_cutoff or None,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            no_repeat_ngram_size=self.no_repeat_ngram_size,
            bad_words_ids=[
                check_vocabulary("bad_words_ids", ids, n_vocab) for ids in self.bad_words_ids or ()
            ],
            suppress_tokens=check_vocabulary("suppress_tokens", self.suppress_tokens or (), n_vocab),
            logit_bias=biases,
            eos_token_ids=self.eos_token_ids(config),
            min_new_tokens=self.min_new_tokens,
            seed=seed,
            index=index,
            logprobs=self.logprobs or self.top_logprobs > 0,
            top_logprobs=self.top_logprobs,
        )


def check_vocabulary(name: str, ids: Sequence[int], n_vocab: int) -> list[int]:
    """`ids` as a list; ValueError naming the first id that is not in a vocabulary of `n_vocab` tokens."""
    for position, token in enumerate(ids):
        if not 0 <= token < n_vocab:
            raise ValueError(
                f"{name}: token id {token} at index {position} is outside the vocabulary; "
                f"ids go from 0 to {n_vocab - 1}"
            )
    return list(ids)


def _stop_string(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} is {value!r}; it must be a string of one character or more")
    return value


def _eos(name: str, value: Any) -> int | tuple[int, ...] | str | None:
    if value is None or (isinstance(value, str) and value == "config"):
        return value
    if isinstance(value, int | np.integer):
        token: int = _TOKEN(name, value)
        return token
    ids: tuple[int, ...] = several(_TOKEN, 'a token id, a list of them, None, or "config"')(name, value)
    return ids


def _context_overflow(name: str, value: Any) -> str:
    if value not in ("error", "slide"):
        raise ValueError(f'{name} is {value!r}; it must be "error" or "slide"')
    return str(value)


def _assistant_model(name: str, value: Any) -> HasCore:
    from .gpt2 import GPT2

    if not isinstance(value, GPT2):
        raise ValueError(f"{name} is {value!r}; it must be a gpt2rs.GPT2, or None")
    model: HasCore = value
    return model


def check_count(name: str, value: Any) -> int:
    """`value` as an int of 0 or more; ValueError naming it otherwise."""
    count: int = _COUNT(name, value)
    return count


_COUNT = integer(0)
_TOKEN = integer(0)
_SEED = integer(0, 2**SEED_BITS - 1)
_PROBABILITY = Interval(0, 1)
_CUTOFF = Interval(0, 1, open_high=True)
_FINITE = Interval()

# One check a setting: (name, value) -> the value in plain Python types, or a ValueError.
_CHECKS: dict[str, Check] = {
    "max_new_tokens": optional(_COUNT),
    "min_new_tokens": _COUNT,
    "do_sample": optional(boolean),
    "temperature": optional(number(Interval(0))),
    "top_k": optional(_COUNT),
    "top_p": optional(number(_PROBABILITY)),
    "min_p": optional(number(_PROBABILITY)),
    "typical_p": optional(number(Interval(0, 1, open_low=True))),
    "epsilon_cutoff": optional(number(_CUTOFF)),
    "eta_cutoff": optional(number(_CUTOFF)),
    "repetition_penalty": number(Interval(0, open_low=True)),
    "presence_penalty": number(_FINITE),
    "frequency_penalty": number(_FINITE),
    "no_repeat_ngram_size": _COUNT,
    "bad_words_ids": optional(
        several(several(_TOKEN, "a list of token ids", allow_empty=False), "a list of lists of token ids")
    ),
    "suppress_tokens": optional(several(_TOKEN, "a list of token ids")),
    "logit_bias": optional(mapping(_TOKEN, bias, "a dict, token id -> number")),
    "stop": optional(
        one_or_several(_stop_string, several(_stop_string, "a string or a list of strings"), str)
    ),
    "eos_token_id": _eos,
    "seed": optional(
        one_or_several(_SEED, several(_SEED, "an int, or a list of them, one a prompt"), (int, np.integer))
    ),
    "num_return_sequences": optional(integer(1)),
    "logprobs": boolean,
    "top_logprobs": _COUNT,
    "context_overflow": _context_overflow,
    "prompt_lookup_num_tokens": optional(integer(1)),
    "max_matching_ngram_size": integer(1),
    "assistant_model": optional(_assistant_model),
    "num_assistant_tokens": integer(1),
}

# Names that users of other libraries reach for, and that no spelling check would connect with ours.
_KNOWN_ELSEWHERE = {
    "max_length": "give max_new_tokens, which does not count the prompt",
    "max_tokens": "it is called max_new_tokens here",
    "min_length": "give min_new_tokens, which does not count the prompt",
    "min_tokens": "it is called min_new_tokens here",
    "stop_strings": "it is called stop here",
    "n": "it is called num_return_sequences here",
    "num_beams": "beam search is not part of this version",
}


def _suggestion(name: str) -> str:
    if name in _KNOWN_ELSEWHERE:
        return f"; {_KNOWN_ELSEWHERE[name]}"
    near = difflib.get_close_matches(name, _CHECKS, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; the settings are {', '.join(_CHECKS)}"
