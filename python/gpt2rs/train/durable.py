"""Files and folders that are there as a whole or not at all, whenever the process or the machine stops."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

UNFINISHED = ".unfinished-"
_LEAVING = "old-"


@contextmanager
def writing(what: str, consequence: str = "") -> Iterator[None]:
    """An OSError that names no file, as that of a full disk, says what could not be written."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise type(error)(f"cannot write {what}: {error.strerror}{consequence}") from error


def write_text(path: Path, text: str) -> None:
    """Replace a file's content."""
    beside = path.with_name(UNFINISHED + path.name)
    try:
        with writing(str(path)):
            beside.write_text(text, encoding="utf-8")
            _sync(beside)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which replaces `target` at the end; an exception leaves nothing of it."""
    unfinished = target.with_name(UNFINISHED + target.name)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        for path in unfinished.iterdir():
            _sync(path)
        _sync(unfinished)
        if target.exists():
            remove_folder(target)
        unfinished.rename(target)
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def remove_folder(folder: Path) -> None:
    """Remove a folder; one that is half removed has another name."""
    leaving = folder.with_name(f"{UNFINISHED}{_LEAVING}{folder.name}")
    shutil.rmtree(leaving, ignore_errors=True)
    folder.rename(leaving)
    shutil.rmtree(leaving, ignore_errors=True)


@contextmanager
def only_one(path: Path, *, waits: bool = False) -> Iterator[bool]:
    """Hold the file `path`, made if need be; RuntimeError while another process does, unless it `waits`.

    The system lets go of it when a process ends, however it does.  Gives whether it is held, which it is not
    where the system has no such locks.
    """
    try:
        import fcntl
    except ImportError:
        yield False
        return
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
        except BlockingIOError:
            raise RuntimeError(f"another process is training in {path.parent}") from None
        yield True


def link(name: Path, target: Path) -> None:
    """Make `name` a link to `target`, beside it, in one step; nothing where the system has no links."""
    beside = name.with_name(UNFINISHED + name.name)
    beside.unlink(missing_ok=True)
    try:
        beside.symlink_to(target.name, target_is_directory=True)
    except NotImplementedError:
        return
    except OSError as error:
        # Windows gives the right to make links to few.
        if error.errno in (errno.EPERM, errno.ENOTSUP) or getattr(error, "winerror", None) == 1314:
            return
        raise
    beside.replace(name)


def sweep(folder: Path) -> None:
    """Remove what a process that was killed left unfinished."""
    for path in folder.glob(UNFINISHED + "*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sweep_unheld(folder: Path, lock: Callable[[str], Path]) -> None:
    """The same of a folder whose entries are made under locks of their own: none that a process makes now.

    lock: the file that `only_one` holds while the entry of a name is made.
    """
    for path in folder.glob(UNFINISHED + "*"):
        name = path.name.removeprefix(UNFINISHED).removeprefix(_LEAVING)
        # What others have, or may alone remove, is theirs.
        with suppress(RuntimeError, OSError), only_one(lock(name)) as is_held:
            if is_held:
                shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    """Have the system write a file, or a folder's entries, to the disk."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
