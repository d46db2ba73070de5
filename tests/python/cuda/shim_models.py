"""Models whose kernels run on the host, and the pieces that tests make them of."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest

import gpt2rs
from golden_cases import CASES
from gpt2rs.checkpoints import open_checkpoint
from gpt2rs.cuda.model import CudaModel

sys.path.insert(0, str(Path(__file__).parents[2] / "cuda"))
import shim_machine

needs_shim = pytest.mark.skipif(
    shim_machine.COMPILER is None, reason="there is no g++ to compile the kernels with"
)

# How tensor cores add: as float32 does, in two steps of eight products, in one of sixteen.
ARCHS = ("host", "sm_80", "sm_90")

# Every kind of remainder: heads of 20 channels, an odd inner size and vocabulary, three runs of positions,
# and products whose K is cut in two.
ODD = {
    "vocab_size": 90,
    "n_positions": 300,
    "n_embd": 40,
    "n_layer": 2,
    "n_head": 2,
    "n_inner": 777,
    "activation_function": "gelu",
    "tie_word_embeddings": False,
    "model_type": "gpt2",
}


def config(fields: dict[str, Any]) -> gpt2rs.Config:
    return gpt2rs.Config.from_json(json.dumps(fields))


def odd(dtype: str, *, seed: int = 0, **options: Any) -> CudaModel:
    """The odd model with random weights; `seed` shuffles the kernels' threads."""
    return CudaModel.random(shim_machine.ShimMachine(seed=seed), config(ODD), seed=5, dtype=dtype, **options)


@functools.cache
def golden(name: str, dtype: str, kv_dtype: str | None = None, arch: str = "host") -> CudaModel:
    source = open_checkpoint(CASES[name])
    machine = shim_machine.ShimMachine(seed=len(name), arch=arch)
    return CudaModel.load(machine, source.config, source.checkpoint, dtype=dtype, kv_dtype=kv_dtype)
