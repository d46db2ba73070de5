"""`gpt2rs train`: a run from random weights or from a checkpoint."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import flag

if TYPE_CHECKING:
    from gpt2rs.train import Trainer

_RUN = "Run"
_DATA = "Data"
_MODEL = "Model"
_STEPS = "Steps"
_RUNNING = "While it runs"
_MACHINE = "Machine"


def _two_numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.replace(",", " ").split())
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not two numbers such as 0.9,0.95") from error


def train(
    data: Annotated[
        list[str] | None,
        flag("File or folder of text, or of tokens (*.bin). May be repeated.", panel=_RUN, metavar="PATH"),
    ] = None,
    out: Annotated[str | None, flag("The run's folder.", panel=_RUN, metavar="DIR")] = None,
    resume: Annotated[
        bool, flag("Go on with the run in --out, by its own settings.", "--resume", panel=_RUN)
    ] = False,
    init_from: Annotated[
        str | None, flag("Fine-tune this folder, file or hub name.", panel=_RUN, metavar="MODEL")
    ] = None,
    settings: Annotated[
        str | None,
        flag("A TOML file of settings; options given besides win.", panel=_RUN, metavar="FILE"),
    ] = None,
    val_data: Annotated[
        list[str] | None, flag("As --data, but held out.", panel=_DATA, metavar="PATH")
    ] = None,
    val_fraction: Annotated[
        float | None,
        flag("Without --val-data: the part of --data, its end, to hold out. Default: 0.05.", panel=_DATA),
    ] = None,
    tokenizer: Annotated[
        str | None,
        flag(
            "gpt2, shakespeare, a folder with vocab.json and merges.txt, or none, for tokens. "
            "Default: gpt2, or that of --init-from.",
            panel=_DATA,
            metavar="NAME",
        ),
    ] = None,
    cache_dir: Annotated[
        str | None,
        flag("Where tokenised text is kept. Default: the user's cache.", panel=_DATA, metavar="DIR"),
    ] = None,
    preset: Annotated[
        str | None, flag("gpt2, gpt2-medium, gpt2-large or gpt2-xl. Default: gpt2.", panel=_MODEL)
    ] = None,
    n_layer: Annotated[int | None, flag("Layers, other than the preset's.", panel=_MODEL)] = None,
    n_head: Annotated[int | None, flag("Attention heads.", panel=_MODEL)] = None,
    n_embd: Annotated[int | None, flag("Channels.", panel=_MODEL)] = None,
    n_ctx: Annotated[
        int | None, flag("Positions, and tokens of a sequence to train on.", panel=_MODEL)
    ] = None,
    n_vocab: Annotated[int | None, flag("Default: as many as the tokenizer has.", panel=_MODEL)] = None,
    bias: Annotated[
        str | None, flag("all, no-qkv (not of queries, keys, values) or none. Default: all.", panel=_MODEL)
    ] = None,
    tie_word_embeddings: Annotated[
        bool | None, flag("Whether the head is the token embedding.", "--tie/--untied", panel=_MODEL)
    ] = None,
    dropout: Annotated[float | None, flag("From 0, below 1. Default: 0.", panel=_MODEL)] = None,
    steps: Annotated[int | None, flag("How many in all. Default: 19073.", panel=_STEPS)] = None,
    batch_size: Annotated[
        int | None, flag("Sequences computed at once. Default: 4 at most.", panel=_STEPS)
    ] = None,
    tokens_per_step: Annotated[
        int | None,
        flag(
            "Accumulate gradients up to it. Default: a batch if its size is given, else 524288.", panel=_STEPS
        ),
    ] = None,
    lr: Annotated[float | None, flag("Learning rate after the warm-up. Default: 6e-4.", panel=_STEPS)] = None,
    min_lr: Annotated[float | None, flag("At the end. Default: a tenth.", panel=_STEPS)] = None,
    warmup: Annotated[
        int | None, flag("Steps up to it. Default: 715, or a tenth of the steps.", panel=_STEPS)
    ] = None,
    betas: Annotated[
        Any, flag("Of AdamW. Default: 0.9,0.95.", panel=_STEPS, parser=_two_numbers, metavar="B,B")
    ] = None,
    eps: Annotated[float | None, flag("Of AdamW. Default: 1e-8.", panel=_STEPS)] = None,
    weight_decay: Annotated[
        float | None, flag("Of matrices and embeddings. Default: 0.1.", panel=_STEPS)
    ] = None,
    max_norm: Annotated[
        float | None, flag("Clip gradients to it; 0: don't. Default: 1.", panel=_STEPS)
    ] = None,
    seed: Annotated[
        int | None, flag("Of weights, dropout, order of the data. Default: 0.", panel=_STEPS)
    ] = None,
    save_every: Annotated[
        int | None, flag("Steps; 0: at the end alone. Default: 250.", panel=_RUNNING)
    ] = None,
    eval_every: Annotated[int | None, flag("Steps; 0: never. Default: 250.", panel=_RUNNING)] = None,
    eval_tokens: Annotated[
        int | None, flag("Held-out tokens to measure on; 0: all. Default: 131072.", panel=_RUNNING)
    ] = None,
    sample_every: Annotated[int | None, flag("Steps; 0: never. Default: 250.", panel=_RUNNING)] = None,
    sample_prompt: Annotated[
        str | None, flag("What samples begin with. Default: <|endoftext|>.", panel=_RUNNING, metavar="TEXT")
    ] = None,
    sample_tokens: Annotated[int | None, flag("How long they are. Default: 100.", panel=_RUNNING)] = None,
    sample_temperature: Annotated[
        float | None, flag("How they are drawn. Default: 0.8.", panel=_RUNNING)
    ] = None,
    plot: Annotated[
        bool | None,
        flag("Draw loss.svg at the end. Default: where matplotlib is.", "--plot/--no-plot", panel=_RUNNING),
    ] = None,
    precision: Annotated[
        str | None, flag("float32 or bfloat16 (matrix products). Default: float32.", panel=_MACHINE)
    ] = None,
    recompute: Annotated[
        bool | None, flag("Less memory, a seventh more time.", "--recompute/--no-recompute", panel=_MACHINE)
    ] = None,
    n_threads: Annotated[
        int | None, flag("Default: the cores that this process may use.", panel=_MACHINE)
    ] = None,
) -> None:
    """Train a GPT-2, or fine-tune one with --init-from.

    The folder has checkpoints that every command takes as a model, a log,
    and a picture of the losses.  The defaults are the recipe of the GPT-2
    (124M) reproductions; help(gpt2rs.train.TrainSettings) has all settings.
    Ctrl-C saves and stops, and --resume goes on to the same bits.

        gpt2rs train --data play.txt --out run --batch-size 12 --steps 1000 \\
          --n-layer 6 --n-head 6 --n-embd 192 --n-ctx 256

        gpt2rs train --out run --resume

        gpt2rs generate --model run/best "ROMEO:"
    """
    given = {name: value for name, value in locals().items() if value is not None}
    for name in ("settings", "resume", "plot"):
        given.pop(name, None)
    from gpt2rs.train import plot as picture

    if plot and not picture.available():
        raise ImportError(picture.MISSING)  # before the run rather than after it
    trainer = _trainer(settings, resume, given)
    try:
        trainer.fit()
    finally:
        if trainer.resumed and (picture.available() if plot is None else plot):
            # Whatever ended the run is what there is to tell; a full disk has no room for a picture.
            with suppress(OSError):
                print(f"losses and samples: {picture.draw(str(trainer.settings.out))}")


def _trainer(settings: str | None, resume: bool, given: dict[str, Any]) -> Trainer:
    from gpt2rs.train import Trainer, TrainSettings
    from gpt2rs.train.settings_file import read_settings

    values = {} if settings is None else read_settings(Path(settings).expanduser())
    values |= given
    if "out" not in values:
        raise typer.BadParameter("give the run's folder: --out DIR")
    if resume:
        out = values.pop("out")
        return Trainer.resume(out, **values)
    if "data" not in values:
        raise typer.BadParameter("give what to train on: --data PATH")
    return Trainer(TrainSettings.of(values))
