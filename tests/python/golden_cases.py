"""The reference checkpoints of tests/golden and what transformers computes for them in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = {
    path.name: path for path in sorted((GOLDEN / "cases").iterdir()) if not path.name.startswith("training_")
}


def expected(name: str) -> dict[str, np.ndarray]:
    """input_ids (2, T) int64, logits (2, T, V) float64, hidden (2, T, C) float64."""
    with np.load(CASES[name] / "expected.npz") as arrays:
        return dict(arrays)


def generations(name: str) -> list[dict[str, Any]]:
    """Generations of one case: name, prompt, kwargs and new tokens.  Beam search is left out."""
    path = CASES[name] / "generate.json"
    runs = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return [run for run in runs if "num_beams" not in run["kwargs"]]
