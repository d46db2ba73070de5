"""Text and settings of runs that take a moment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prose import prose

from gpt2rs.train import TrainSettings


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or fills the user's own cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gpt2rs" / "tokens"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(prose(1, 3000), encoding="utf-8")
    return path


@pytest.fixture
def small(text: Path, tmp_path: Path) -> dict[str, Any]:
    """Settings of a run of twelve steps on a model of one layer."""
    return {
        "data": str(text),
        "out": str(tmp_path / "run"),
        "tokenizer": "shakespeare",
        "val_fraction": 0.1,
        "n_layer": 1,
        "n_embd": 16,
        "n_head": 2,
        "n_ctx": 32,
        "dropout": 0.1,
        "batch_size": 2,
        "tokens_per_step": 5 * 32,
        "steps": 12,
        "lr": 1e-2,
        "save_every": 4,
        "eval_every": 6,
        "sample_every": 6,
        "sample_tokens": 8,
        "n_threads": 1,
    }


@pytest.fixture
def settings(small: dict[str, Any]) -> TrainSettings:
    return TrainSettings(**small)


@pytest.fixture
def gpt2_encoding() -> Any:
    """GPT-2's published encoding, where tiktoken has it or gets it."""
    import tiktoken

    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:
        pytest.skip(f"GPT-2's published encoding is out of reach: {error}")
