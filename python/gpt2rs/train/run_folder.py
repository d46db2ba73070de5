"""The folder of a run: its settings, its log, and its checkpoints, of which the last and the best stay.

settings.toml    how the run was started, or last gone on with
log.jsonl        what happened, a line each
step-001000/     a checkpoint: config.json, model.safetensors, the tokenizer's files; beside them
                 optimizer.safetensors (AdamW's moments) and position.json (where the run was)
last, best       links to two of these
loss.svg         the losses, with samples
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from . import durable
from .tensor_file import read_tensors, write_tensors
from .vocabulary import Vocabulary

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .. import _core

_NAME = re.compile(r"step-(\d{6,})")
_MOMENTS = ("exp_avg", "exp_avg_sq")
_FORMAT = 2


@dataclass(frozen=True)
class Position:
    """Where a run is: with the weights, the moments and the settings, all that it needs to go on.

    step: how many were made.  The order of the data and the dropout masks are functions of the seed, which
    is a setting, and of it.  data: a digest of the tokens that are learned from.  seconds: of training.
    evaluated, sampled: whether what was due after this step is done.
    """

    step: int
    best_step: int | None
    best_val_loss: float | None
    data: str
    seconds: float
    evaluated: bool
    sampled: bool
    format: int = _FORMAT


_TYPES: dict[str, tuple[type, ...]] = {
    "step": (int,),
    "best_step": (int, type(None)),
    "best_val_loss": (float, type(None)),
    "data": (str,),
    "seconds": (float, int),
    "evaluated": (bool,),
    "sampled": (bool,),
}


class RunFolder:
    """A run's files; nothing is made before something is saved."""

    def __init__(self, path: Path) -> None:
        """`path` need not exist."""
        self.path = path
        self.settings = path / "settings.toml"
        self.log = path / "log.jsonl"
        self.lock = path / ".lock"
        self.plot = path / "loss.svg"

    def checkpoints(self) -> dict[int, Path]:
        """The complete checkpoints, by step, ascending."""
        found = {}
        for path in self.path.glob("step-*"):
            match = _NAME.fullmatch(path.name)
            if match and (path / "position.json").is_file():
                found[int(match[1])] = path
        return dict(sorted(found.items()))

    def last(self) -> Path | None:
        """The latest checkpoint."""
        return next(reversed(self.checkpoints().values()), None)

    def save(self, core: _core.Trainer, vocabulary: Vocabulary, position: Position, dropout: float) -> Path:
        """Write a checkpoint; `tidy` then makes it the last.

        OSError, a full disk for one, leaves the checkpoints that there were.
        """
        folder = self._folder(position.step)
        names = {f"transformer.{name}" if name != "lm_head.weight" else name: name for name in core.names()}
        moments = {f"{kind}.{name}": (kind, name) for kind in _MOMENTS for name in core.names()}
        config = {
            **json.loads(core.config.to_json()),
            **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), dropout),
            "torch_dtype": "float32",
        }
        try:
            with durable.new_folder(folder) as unfinished:
                write_tensors(
                    unfinished / "model.safetensors",
                    {name: core.shape(own) for name, own in names.items()},
                    lambda name: core.tensor("weight", names[name]),
                )
                write_tensors(
                    unfinished / "optimizer.safetensors",
                    {key: core.shape(name) for key, (_, name) in moments.items()},
                    lambda key: core.tensor(*moments[key]),
                )
                vocabulary.save(unfinished)
                for name, text in (
                    ("config.json", _json(config)),
                    ("position.json", _json(asdict(position))),
                ):
                    (unfinished / name).write_text(text, encoding="utf-8")
        except OSError as error:
            last = self.last()
            rest = f"the last good one is {last}" if last else "there is none yet"
            why = error.strerror or error
            raise type(error)(f"cannot write the checkpoint {folder}: {why}; {rest}") from error
        return folder

    def move(self, position: Position) -> None:
        """Write down a later position of the same step: what was due after it is done."""
        durable.write_text(self._folder(position.step) / "position.json", _json(asdict(position)))
        self.tidy(position)

    def _folder(self, step: int) -> Path:
        return self.path / f"step-{step:06d}"

    def tidy(self, position: Position) -> None:
        """Remove all checkpoints but the last and the best, and link these."""
        kept = self.checkpoints()
        durable.link(self.path / "last", kept[position.step])
        if position.best_step in kept:
            durable.link(self.path / "best", kept[position.best_step])
        for step, folder in kept.items():
            if step not in (position.step, position.best_step):
                durable.remove_folder(folder)


def _json(content: dict[str, object]) -> str:
    return json.dumps(content, indent=2) + "\n"


def read_position(folder: Path) -> Position:
    """Where the run was when it wrote a checkpoint; ValueError for a file of another program or version."""
    path = folder / "position.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields.get("format") != _FORMAT:
            raise ValueError(f"format {fields.get('format')}, expected {_FORMAT}")
        position = Position(**fields)
        for field, types in _TYPES.items():
            value = getattr(position, field)
            if type(value) not in types:
                raise ValueError(f"{field} is {value!r}")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a position of a run: {error}") from None
    return position


def read_moments(core: _core.Trainer, folder: Path) -> None:
    """Give a core the moments of a checkpoint, whose weights it has."""
    path = folder / "optimizer.safetensors"
    shapes = {f"{kind}.{name}": core.shape(name) for kind in _MOMENTS for name in core.names()}
    for key, tensor in read_tensors(path, shapes).items():
        kind, _, name = key.partition(".")
        core.set_tensor(kind, name, _copied(tensor))


def _copied(tensor: NDArray[np.float32]) -> NDArray[np.float32]:
    """An array of its own, which a mapped file is not: the core borrows it."""
    return np.array(tensor, np.float32)
