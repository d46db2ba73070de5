"""Ctrl-C at any time, and its effect only where it does no harm."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """SIGINT and SIGTERM raise KeyboardInterrupt, but not while `held`: then `pending` says that one came.

    In effect between `listen` and `leave`; elsewhere than in the main thread nothing is changed.
    """

    def __init__(self) -> None:
        """Nothing came yet."""
        self.pending = False
        self._held = False
        self._before: dict[signal.Signals, Any] = {}

    def listen(self) -> None:
        """Take the signals over."""
        self.pending = False
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}

    def leave(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @contextmanager
    def held(self) -> Iterator[None]:
        """What must not be left half done."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.pending = True
        if not self._held:
            raise KeyboardInterrupt
