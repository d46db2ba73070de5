"""Models that many tests share; none of them is changed by use."""

from __future__ import annotations

import pytest

import gpt2rs
from golden_cases import CASES


@pytest.fixture(scope="session")
def plain() -> gpt2rs.GPT2:
    """2 layers, 64 channels, 512 tokens, 128 positions; no tokenizer; eos is 0."""
    return gpt2rs.GPT2.from_pretrained(CASES["plain"])


@pytest.fixture(scope="session")
def shakespeare() -> gpt2rs.GPT2:
    """The model that comes with the package: 1024 tokens of its own, 256 positions."""
    return gpt2rs.GPT2.from_pretrained("shakespeare")
