"""The fake driver, for tests that ask for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_driver import FakeDriver
from fakes import FakeNvrtc, installed


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[tuple[FakeDriver, FakeNvrtc]]:
    """A machine with one GPU, a driver, a compiler, and an empty cache of compiled kernels."""
    monkeypatch.setenv("GPT2RS_CACHE_DIR", str(tmp_path / "cache"))
    with installed(monkeypatch) as both:
        yield both


@pytest.fixture
def driver(fakes: tuple[FakeDriver, FakeNvrtc]) -> FakeDriver:
    return fakes[0]


@pytest.fixture
def nvrtc(fakes: tuple[FakeDriver, FakeNvrtc]) -> FakeNvrtc:
    return fakes[1]
