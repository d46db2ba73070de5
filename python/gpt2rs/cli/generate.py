"""`gpt2rs generate`: the text that follows a prompt, as it comes."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .options import flag

if TYPE_CHECKING:
    from gpt2rs import GPT2, Result, Speculation, Stream

_SAMPLING = "Sampling"
_SCORES = "Penalties and bans"
_SPEED = "Several tokens a pass, the same text"
_OUTPUT = "Output"
_IDS: dict[str, Any] = {"parser": options.token_ids, "metavar": "IDS"}


def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="Text to continue. Default, or -: standard input.")
    ] = None,
    tokens: Annotated[
        Any, flag("The prompt as token ids, such as 15496,11.", "--tokens", "--ids", **_IDS)
    ] = None,
    max_new_tokens: Annotated[int | None, flag("Default: 128, or as many as the context holds.")] = None,
    min_new_tokens: Annotated[int | None, flag("No end-of-text token before that many.")] = None,
    stop: Annotated[list[str] | None, flag("End before this text. May be repeated.", metavar="TEXT")] = None,
    eos_token_id: Annotated[
        Any,
        flag(
            "What ends the text; none: nothing. Default: the model's.", parser=options.eos_ids, metavar="IDS"
        ),
    ] = None,
    context_overflow: Annotated[str | None, flag("Past the last position: error or slide.")] = None,
    num_return_sequences: Annotated[
        int | None, flag("Several texts, with lines of --- between.", "--num-return-sequences", "--n", "-n")
    ] = None,
    do_sample: Annotated[
        bool | None, flag("Draw tokens. Default: when asked below.", panel=_SAMPLING)
    ] = None,
    temperature: Annotated[float | None, flag("Divides the logits; 0: greedy.", panel=_SAMPLING)] = None,
    top_k: Annotated[int | None, flag("Draw from the k likeliest.", panel=_SAMPLING)] = None,
    top_p: Annotated[float | None, flag("Draw from the likeliest that make up p.", panel=_SAMPLING)] = None,
    min_p: Annotated[float | None, flag("Leave out what is p times less likely.", panel=_SAMPLING)] = None,
    typical_p: Annotated[float | None, flag("Locally typical sampling.", panel=_SAMPLING)] = None,
    epsilon_cutoff: Annotated[float | None, flag("Epsilon sampling.", panel=_SAMPLING)] = None,
    eta_cutoff: Annotated[float | None, flag("Eta sampling.", panel=_SAMPLING)] = None,
    seed: Annotated[int | None, flag("The same seed draws the same text.", panel=_SAMPLING)] = None,
    repetition_penalty: Annotated[float | None, flag("Above 1: repeat less.", panel=_SCORES)] = None,
    presence_penalty: Annotated[
        float | None, flag("Off the logits of generated tokens.", panel=_SCORES)
    ] = None,
    frequency_penalty: Annotated[float | None, flag("The same, once each time.", panel=_SCORES)] = None,
    no_repeat_ngram_size: Annotated[int | None, flag("No n-gram twice.", panel=_SCORES)] = None,
    bad_words_ids: Annotated[
        list[Any] | None, flag("A sequence to ban. May be repeated.", panel=_SCORES, **_IDS)
    ] = None,
    suppress_tokens: Annotated[Any, flag("Tokens to ban.", panel=_SCORES, **_IDS)] = None,
    logit_bias: Annotated[
        list[Any] | None,
        flag("Add to a logit. May be repeated.", panel=_SCORES, parser=options.biased_id, metavar="ID=BIAS"),
    ] = None,
    prompt_lookup_num_tokens: Annotated[
        int | None, flag("Propose what followed before, up to so many tokens.", panel=_SPEED)
    ] = None,
    max_matching_ngram_size: Annotated[
        int | None, flag("After as many tokens as these, or fewer. Default: 2.", panel=_SPEED)
    ] = None,
    assistant_model: Annotated[
        str | None, flag("A smaller model that proposes; as --model, loaded alike.", panel=_SPEED)
    ] = None,
    num_assistant_tokens: Annotated[
        int | None, flag("Up to so many tokens. Default: 20.", panel=_SPEED)
    ] = None,
    model: options.Model = options.BUILT_IN,
    dtype: options.Dtype = None,
    kv_dtype: options.KvDtype = None,
    precision: options.Precision = "exact",
    device: options.Device = "cpu",
    n_threads: options.Threads = None,
    config: options.Config = None,
    revision: options.Revision = None,
    offline: options.Offline = False,
    echo: Annotated[bool, flag("Print the prompt, too.", "--echo", panel=_OUTPUT)] = False,
    as_json: options.Json = False,
    logprobs: Annotated[
        bool, flag("Log-probabilities of the tokens, in the JSON.", "--logprobs", panel=_OUTPUT)
    ] = False,
    top_logprobs: Annotated[int | None, flag("Those of the k likeliest, too.", panel=_OUTPUT)] = None,
    stats: Annotated[bool, flag("Times and speeds, on stderr.", "--stats", panel=_OUTPUT)] = False,
) -> None:
    """Continue a prompt and print the text as it comes.

    The likeliest token is taken unless an option asks for sampling; help(gpt2rs.Settings) says more.
    """
    if prompt is not None and tokens is not None:
        raise typer.BadParameter("give the prompt as text or as --tokens, not both")
    if (logprobs or top_logprobs) and not as_json:
        raise typer.BadParameter("--logprobs and --top-logprobs are shown with --json")
    given: str | list[int] = options.read_prompt(prompt) if tokens is None else tokens
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "min_new_tokens": min_new_tokens,
        "stop": stop or None,
        "eos_token_id": eos_token_id,
        "context_overflow": context_overflow,
        "do_sample": do_sample,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "typical_p": typical_p,
        "epsilon_cutoff": epsilon_cutoff,
        "eta_cutoff": eta_cutoff,
        "seed": seed,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "no_repeat_ngram_size": no_repeat_ngram_size,
        "bad_words_ids": bad_words_ids or None,
        "suppress_tokens": suppress_tokens,
        "logit_bias": dict(logit_bias) if logit_bias else None,
        "logprobs": logprobs or None,
        "top_logprobs": top_logprobs,
        "prompt_lookup_num_tokens": prompt_lookup_num_tokens,
        "max_matching_ngram_size": max_matching_ngram_size,
        "num_assistant_tokens": num_assistant_tokens,
    }
    settings = {name: value for name, value in settings.items() if value is not None}

    clock = _Clock()
    how: dict[str, Any] = {
        "dtype": dtype,
        "kv_dtype": kv_dtype,
        "precision": precision,
        "device": device,
        "n_threads": n_threads,
        "offline": offline,
    }
    gpt2 = options.open_model(model, config=config, revision=revision, **how)
    if assistant_model is not None:
        settings["assistant_model"] = options.open_model(assistant_model, config=None, revision=None, **how)
    ids = gpt2._encode(given)
    has_text = _has_text(gpt2, given)
    clock.loaded()
    shown = None
    if echo:
        shown = given if isinstance(given, str) else _text_of(gpt2, ids, has_text)

    if has_text and (num_return_sequences or 1) == 1:
        stream = gpt2.stream(ids, **settings)
        if not as_json:
            print(shown or "", end="", flush=True)
        _follow(stream, clock, show=not as_json)
        results = [stream.result]
        if as_json:
            _print_json(stream.result, shown, has_text)
    else:
        # More than one text, or none but ids: nothing that could be streamed.
        results = gpt2.generate(ids, num_return_sequences=num_return_sequences or 1, **settings)
        clock.finished(sum(len(result.tokens) for result in results))
        for i, result in enumerate(results):
            if as_json:
                _print_json(result, shown, has_text)
                continue
            if i:
                print("---")
            space = "" if has_text or not shown else " "
            print(
                f"{shown or ''}{space}{result.text if has_text else _text_of(gpt2, result.tokens, has_text)}"
            )
    if stats:
        print(clock.report(gpt2, len(ids)), file=sys.stderr)
        _report_speculation([result.speculation for result in results if result.speculation])


def _has_text(gpt2: GPT2, prompt: str | list[int]) -> bool:
    """Whether the model has a tokenizer; ids do without one that is out of reach."""
    try:
        return gpt2.tokenizer is not None
    except RuntimeError:
        if isinstance(prompt, str):
            raise
        return False


def _text_of(gpt2: GPT2, tokens: list[int], has_text: bool) -> str:
    """What to print for tokens: their text, or the ids where there is no tokenizer."""
    return gpt2._decode(tokens) if has_text else " ".join(map(str, tokens))


def _follow(stream: Stream, clock: _Clock, *, show: bool) -> None:
    """Run a stream to its end, printing each piece at once, and a newline at the end where there is none."""
    last = "\n"
    for piece in stream:
        clock.piece(stream)
        if show:
            print(piece, end="", flush=True)
            last = piece
    clock.finished(len(stream.tokens))
    if show and not last.endswith("\n"):
        print()


def _print_json(result: Result, prompt: str | None, has_text: bool) -> None:
    """One line of JSON for one text."""
    shown: dict[str, Any] = {} if prompt is None else {"prompt": prompt}
    shown["text"] = result.text if has_text else None
    shown["tokens"] = result.tokens
    shown["finish_reason"] = result.finish_reason
    shown["logprobs"] = result.logprobs
    if result.top_logprobs is not None:
        shown["top_logprobs"] = [list(top.items()) for top in result.top_logprobs]
    if result.seed is not None:
        shown["seed"] = result.seed
    if result.speculation is not None:
        shown["speculation"] = asdict(result.speculation)
    print(json.dumps(shown, ensure_ascii=False))


def _report_speculation(texts: list[Speculation]) -> None:
    """What --stats says of proposals, those of all texts together; nothing where there are none."""
    if texts:
        proposed, accepted = (sum(getattr(text, name) for text in texts) for name in ("proposed", "accepted"))
        rate = f" ({accepted / proposed:.0%})" if proposed else ""
        passes = sum(text.passes for text in texts)
        line = f"proposed {proposed} tokens, {accepted} accepted{rate}, {passes} passes after the prompt's"
        print(line, file=sys.stderr)


class _Clock:
    """When what was done, for --stats."""

    def __init__(self) -> None:
        """Start the clock."""
        self._start = time.perf_counter()
        self._loaded = self._end = self._start
        self._first: tuple[float, int] | None = None
        self._n_tokens = 0

    def loaded(self) -> None:
        """Model and tokenizer are there."""
        self._loaded = time.perf_counter()

    def piece(self, stream: Stream) -> None:
        """A piece of text has come."""
        if self._first is None:
            self._first = (time.perf_counter() - self._loaded, len(stream.tokens))

    def finished(self, n_tokens: int) -> None:
        """All is generated, `n_tokens` tokens."""
        self._end = time.perf_counter()
        self._n_tokens = n_tokens

    def report(self, gpt2: GPT2, prompt_len: int) -> str:
        """The lines that --stats prints."""
        threads = f"{gpt2.n_threads} threads, " if gpt2.device == "cpu" else f"{gpt2.device}, "
        how = f"{gpt2.dtype}, {threads}{gpt2.isa}"
        lines = [f"load     {self._loaded - self._start:.3f} s ({how})"]
        seconds = self._end - self._loaded
        if self._first is None or self._first[1] == self._n_tokens:
            lines.append(
                f"text     {self._n_tokens} tokens after a prompt of {prompt_len} in {seconds:.3f} s"
            )
            return "\n".join(lines)
        at, n_first = self._first
        per_token = (seconds - at) / (self._n_tokens - n_first)
        # The first piece of text can be more than one token (a character's parts, a possible stop string).
        to_first = at - (n_first - 1) * per_token
        lines.append(f"prompt   {prompt_len} tokens, {prompt_len / to_first:.1f} tokens/s")
        lines.append(f"first    token after {to_first:.4f} s")
        lines.append(f"decode   {self._n_tokens - 1} tokens, {1 / per_token:.1f} tokens/s")
        return "\n".join(lines)
