"""The settings of a training run: one dataclass, the one place that validates."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from ..ranges import Check, Interval, boolean, integer, number, optional

# The step of the reproductions of GPT-2 (124M): half a million tokens, 2**19 to be divisible.
RECIPE_TOKENS_PER_STEP = 2**19
RECIPE_WARMUP = 715
RECIPE_BATCH_SIZE = 4

PRESETS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
BIASES = ("all", "no-qkv", "none")
PRECISIONS = ("float32", "bfloat16")

# What decides the shape of a new model, which a checkpoint's own config decides otherwise.
SHAPE = ("preset", "n_layer", "n_head", "n_embd", "n_vocab", "bias", "tie_word_embeddings")
# What a run that goes on has to keep: other values would make another model, or other tokens.
FIXED = (*SHAPE, "n_ctx", "tokenizer", "init_from")


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How a model is trained.  Immutable; everything is checked on construction.

    The defaults are the recipe of the GPT-2 (124M) reproductions (llm.c, build-nanogpt, nanoGPT; Brown et
    al. 2020, arXiv:2005.14165, for the optimiser): 19073 steps of 2**19 tokens, 10 billion in all.

    Data
        data: files and folders to train on.  Text (UTF-8, documents between `<|endoftext|>`, a file being a
            document at least), or tokens: `.bin` files of llm.c and nanoGPT.  Of a folder, all its `*.txt`
            below, in order of their paths; or else its `*.bin`, of which those named `val` are held out.
        val_data: the same, to be held out: the loss on it is measured, nothing is learned from it.
        val_fraction: without `val_data`, the part of `data`, from its end, to hold out; from 0, below 1.
        tokenizer: "gpt2", the published one; "shakespeare", that of the built-in model; a folder with
            vocab.json and merges.txt; or "none": token files only, and no samples of text.  None: that of
            `init_from`, else "gpt2".
        cache_dir: where tokenised text is kept, for the next run on it to reuse.  None: `gpt2rs/tokens` in
            the user's cache folder.

    Model
        init_from: a checkpoint to start from (whatever `GPT2.from_pretrained` takes); it brings its shape.
        preset: "gpt2", "gpt2-medium", "gpt2-large" or "gpt2-xl".  None: "gpt2".
        n_layer, n_head, n_embd, n_ctx: sizes other than the preset's.  With `init_from`, `n_ctx` is the
            length of the sequences to train on, and the model keeps its positions.
        n_vocab: None: as many as the tokenizer has; more pads the embeddings.
        bias: "all"; "no-qkv": none where queries, keys and values are made; "none": nowhere at all.
        tie_word_embeddings: whether the head is the token embedding.
        dropout: of embeddings, attention weights and residual branches, from 0, below 1.

    Steps
        steps: how many in all, 0 or more.
        batch_size: sequences that are computed at once, which is what decides the memory.
        tokens_per_step: a multiple of n_ctx; gradients are accumulated over batches up to it.  None: one
            batch where batch_size is given, else 2**19.  A batch_size of None is 4 at most.
        lr, min_lr: the learning rate at the end of the warm-up, and at the end.  min_lr None: a tenth.
        warmup: steps of linear increase; the rest is a cosine.  None: 715, or a tenth of the steps if less.
        betas, eps, weight_decay: of AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101); matrices and
            embeddings decay, biases and norms don't.
        max_norm: gradients are scaled down to this norm; 0: not at all.
        seed: decides initial weights, dropout and the order of the data; 0 to 2**64 - 1.

    While it runs
        out: the folder of the run.
        save_every, eval_every, sample_every: in steps; 0: never, but the end is always saved.
        eval_tokens: how many held-out tokens a loss is measured on, evenly spread; 0: all.
        sample_prompt, sample_tokens, sample_temperature: what samples of text begin with (None:
            `<|endoftext|>`), how long they are, and how they are drawn.

    Machine
        precision: "float32", or "bfloat16": inputs of matrix products are rounded, sums and master weights
            are not.
        recompute: keep fewer activations and compute them again, for less memory and a seventh more time.
        n_threads: None: as many as the machine has cores for this process.

    Raises ValueError naming the setting, its value and its range.
    """

    data: Sequence[str | os.PathLike[str]] | str | os.PathLike[str] = ()
    out: str | os.PathLike[str] | None = None
    val_data: Sequence[str | os.PathLike[str]] | str | os.PathLike[str] = ()
    val_fraction: float = 0.05
    tokenizer: str | os.PathLike[str] | None = None
    cache_dir: str | os.PathLike[str] | None = None
    init_from: str | os.PathLike[str] | None = None
    preset: str | None = None
    n_layer: int | None = None
    n_head: int | None = None
    n_embd: int | None = None
    n_ctx: int | None = None
    n_vocab: int | None = None
    bias: str = "all"
    tie_word_embeddings: bool = True
    dropout: float = 0.0
    steps: int = 19073
    batch_size: int | None = None
    tokens_per_step: int | None = None
    lr: float = 6e-4
    min_lr: float | None = None
    warmup: int | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    max_norm: float = 1.0
    seed: int = 0
    save_every: int = 250
    eval_every: int = 250
    eval_tokens: int = 2**17
    sample_every: int = 250
    sample_prompt: str | None = None
    sample_tokens: int = 100
    sample_temperature: float = 0.8
    precision: str = "float32"
    recompute: bool = False
    n_threads: int | None = None

    def __post_init__(self) -> None:
        """Replace every value by its checked, plain Python form; then check what goes together."""
        for field in fields(self):
            value = _CHECKS[field.name](field.name, getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        if self.min_lr is not None and self.min_lr > self.lr:
            raise ValueError(f"min_lr is {self.min_lr}; it must be at most lr, which is {self.lr}")
        if self.init_from is not None:
            for name in SHAPE:
                if getattr(self, name) != _DEFAULTS[name]:
                    raise ValueError(
                        f"{name} is {getattr(self, name)!r}, and init_from is given, too, "
                        "which brings the model's shape; give one of them"
                    )
        if self.tokenizer == "none" and self.n_vocab is None and self.init_from is None:
            raise ValueError('n_vocab is None, and tokenizer is "none"; then n_vocab must be given')

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> TrainSettings:
        """Settings from a dict; ValueError for a name that is none of them."""
        for name in values:
            if name not in _CHECKS:
                near = difflib.get_close_matches(name, _CHECKS, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"the settings are {', '.join(_CHECKS)}"
                raise ValueError(f"unknown setting {name!r}; {hint}")
        return cls(**values)

    def check_goes_on(self, before: TrainSettings) -> None:
        """ValueError where a run that was started as `before` cannot go on with these settings."""
        for name in FIXED:
            was, is_now = getattr(before, name), getattr(self, name)
            if was != is_now:
                raise ValueError(
                    f"{name} is {is_now!r}, and the run was started with {was!r}; start another run, "
                    "with init_from to take its weights over"
                )

    def changed(self) -> dict[str, Any]:
        """The settings that are not at their default, by name."""
        return {name: value for name in _CHECKS if (value := getattr(self, name)) != _DEFAULTS[name]}

    def paths(self, name: Literal["data", "val_data"]) -> list[Path]:
        """The files and folders of a setting, `~` being the user's home."""
        return [Path(path).expanduser() for path in _paths(name, getattr(self, name))]

    def batching(self, n_tokens: int) -> tuple[int, int]:
        """(sequences a step, sequences computed at once) where sequences have `n_tokens` tokens.

        ValueError where tokens_per_step is no multiple of n_tokens.
        """
        budget, batch_size = self.tokens_per_step, self.batch_size
        if budget is None:
            budget = RECIPE_TOKENS_PER_STEP if batch_size is None else batch_size * n_tokens
        if budget % n_tokens:
            raise ValueError(
                f"tokens_per_step is {budget}; it must be a multiple of the sequences' length, {n_tokens}"
            )
        sequences = budget // n_tokens
        return sequences, min(sequences, RECIPE_BATCH_SIZE if batch_size is None else batch_size)

    @property
    def warmup_steps(self) -> int:
        """`warmup`, or what None stands for."""
        return min(RECIPE_WARMUP, self.steps // 10) if self.warmup is None else self.warmup

    @property
    def final_lr(self) -> float:
        """`min_lr`, or what None stands for."""
        return self.lr / 10 if self.min_lr is None else self.min_lr


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {value!r}; it must be a string")
    return value


def _path(name: str, value: Any) -> str:
    if (
        not isinstance(value, str | os.PathLike)
        or not (path := os.fspath(value))
        or not isinstance(path, str)
    ):
        raise ValueError(f"{name} is {value!r}; it must be a path")
    return path


def _paths(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str | os.PathLike):
        return (_path(name, value),)
    if not isinstance(value, Sequence):
        raise ValueError(f"{name} is {value!r}; it must be a path or a list of paths")
    return tuple(_path(f"{name}[{i}]", path) for i, path in enumerate(value))


def _one_of(*names: str) -> Check:
    def check(name: str, value: Any) -> str:
        if value not in names:
            raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, names))}")
        return str(value)

    return check


def _betas(name: str, value: Any) -> tuple[float, float]:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise ValueError(f"{name} is {value!r}; it must be two numbers, at least 0 and below 1")
    check = number(Interval(0, 1, open_high=True))
    return check(f"{name}[0]", value[0]), check(f"{name}[1]", value[1])


_COUNT = integer(0)
_SIZE = integer(1)
_FRACTION = number(Interval(0, 1, open_high=True))
_NOT_NEGATIVE = number(Interval(0))
_POSITIVE = number(Interval(0, open_low=True))

# One check a setting: (name, value) -> the value in plain Python types, or a ValueError.
_CHECKS: dict[str, Check] = {
    "data": _paths,
    "out": optional(_path),
    "val_data": _paths,
    "val_fraction": _FRACTION,
    "tokenizer": optional(_path),
    "cache_dir": optional(_path),
    "init_from": optional(_path),
    "preset": optional(_one_of(*PRESETS)),
    "n_layer": optional(_COUNT),
    "n_head": optional(_SIZE),
    "n_embd": optional(_SIZE),
    "n_ctx": optional(_SIZE),
    "n_vocab": optional(_SIZE),
    "bias": _one_of(*BIASES),
    "tie_word_embeddings": boolean,
    "dropout": _FRACTION,
    "steps": _COUNT,
    "batch_size": optional(_SIZE),
    "tokens_per_step": optional(_SIZE),
    "lr": _NOT_NEGATIVE,
    "min_lr": optional(_NOT_NEGATIVE),
    "warmup": optional(_COUNT),
    "betas": _betas,
    "eps": _POSITIVE,
    "weight_decay": _NOT_NEGATIVE,
    "max_norm": _NOT_NEGATIVE,
    "seed": integer(0, 2**64 - 1),
    "save_every": _COUNT,
    "eval_every": _COUNT,
    "eval_tokens": _COUNT,
    "sample_every": _COUNT,
    "sample_prompt": optional(_text),
    "sample_tokens": _SIZE,
    "sample_temperature": _NOT_NEGATIVE,
    "precision": _one_of(*PRECISIONS),
    "recompute": boolean,
    "n_threads": optional(_SIZE),
}
_DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(TrainSettings)}
