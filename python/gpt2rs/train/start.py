"""What a run starts from: a new model, a checkpoint, or its own last checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import _core
from ..checkpoints import open_checkpoint
from .run_folder import Position, RunFolder, read_moments, read_position
from .settings import TrainSettings
from .settings_file import read_settings
from .vocabulary import Vocabulary


@dataclass(frozen=True)
class Start:
    """A model to train, and where in its run it is; `n_tokens` is the length of the sequences."""

    core: _core.Trainer
    vocabulary: Vocabulary
    n_tokens: int
    position: Position | None


def begin(settings: TrainSettings) -> Start:
    """A new model, or that of `init_from`; errors as of `TrainSettings` and `GPT2.from_pretrained`."""
    if settings.init_from is not None:
        return _load(settings, str(settings.init_from))
    vocabulary = Vocabulary.named(str(settings.tokenizer or "gpt2"))
    config = new_config(settings, vocabulary)
    core = _core.Trainer.random(config, **_options(settings, config.n_ctx), bias=settings.bias)
    return Start(core, vocabulary, config.n_ctx, None)


def go_on(settings: TrainSettings) -> Start:
    """The model of the run's last checkpoint; a run that has none begins anew."""
    assert settings.out is not None
    last = RunFolder(Path(settings.out).expanduser()).last()
    if last is None:
        return begin(settings)
    position = read_position(last)
    if position.step > settings.steps:
        raise ValueError(
            f"steps is {settings.steps}; the run in {settings.out} has made {position.step} already"
        )
    start = _load(settings, last, position)
    read_moments(start.core, last)
    return start


def resumed(out: str, changes: dict[str, Any]) -> TrainSettings:
    """The settings that a run was started with, and `changes` of them.

    Raises:
        FileNotFoundError: there is no run in `out`.
        ValueError: a change would make another model, or is out of its range.
    """
    path = RunFolder(Path(out).expanduser()).settings
    if not path.is_file():
        raise FileNotFoundError(f"no run to go on with in {out}: there is no {path.name}")
    stored = TrainSettings.of(read_settings(path))
    settings = TrainSettings.of({**_given(stored), **changes, "out": out})
    settings.check_goes_on(stored)
    return settings


def _given(settings: TrainSettings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in type(settings).__dataclass_fields__}


def new_config(settings: TrainSettings, vocabulary: Vocabulary) -> _core.Config:
    """The configuration of a new model; ValueError where sizes don't go together."""
    n_vocab = vocabulary.n_tokens if settings.n_vocab is None else settings.n_vocab
    if n_vocab < vocabulary.n_tokens:
        raise ValueError(f"n_vocab is {n_vocab}; the tokenizer has {vocabulary.n_tokens} tokens")
    fields = json.loads(_core.Config.preset(settings.preset or "gpt2").to_json())
    sizes = {
        "n_layer": settings.n_layer,
        "n_head": settings.n_head,
        "n_embd": settings.n_embd,
        "n_ctx": settings.n_ctx,
        "n_positions": settings.n_ctx,
    }
    fields |= {name: size for name, size in sizes.items() if size is not None}
    fields |= {
        "vocab_size": n_vocab,
        "bos_token_id": vocabulary.end_of_text,
        "eos_token_id": vocabulary.end_of_text,
        "tie_word_embeddings": settings.tie_word_embeddings,
    }
    return _core.Config.from_json(json.dumps(fields))


def _load(settings: TrainSettings, name: str | Path, position: Position | None = None) -> Start:
    source = open_checkpoint(name)
    n_ctx = source.config.n_ctx
    n_tokens = n_ctx if settings.n_ctx is None else settings.n_ctx
    if n_tokens > n_ctx:
        raise ValueError(f"n_ctx is {n_tokens}; the model of {name} has {n_ctx} positions")
    if settings.tokenizer is None or (position is not None and settings.tokenizer != "none"):
        vocabulary = Vocabulary.of_checkpoint(source.folder, source.config.n_vocab)
    else:
        vocabulary = Vocabulary.named(str(settings.tokenizer))
    if vocabulary.n_tokens > source.config.n_vocab:
        raise ValueError(
            f"the tokenizer has {vocabulary.n_tokens} tokens; the model of {name} has {source.config.n_vocab}"
        )
    core = _core.Trainer.load(source.config, source.checkpoint, **_options(settings, n_tokens))
    return Start(core, vocabulary, n_tokens, position)


def _options(settings: TrainSettings, n_tokens: int) -> dict[str, Any]:
    return {
        "batch_size": settings.batching(n_tokens)[1],
        "n_tokens": n_tokens,
        "seed": settings.seed,
        "dropout": settings.dropout,
        "precision": settings.precision,
        "recompute": settings.recompute,
        "n_threads": settings.n_threads,
    }
