"""A model on a GPU that computes on the CPU: for tests of everything around it."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

from gpt2rs import _core
from gpt2rs.cuda.gpu import Gpu


class StandIn:
    """Its weights take memory of the GPU, as many bytes as they should, and `extra_bytes`."""

    extra_bytes = 0

    def __init__(self, gpu: Gpu, core: _core.Model) -> None:
        self._gpu, self._core = gpu, core
        self._weights = gpu.alloc(core.memory_footprint() + self.extra_bytes)

    @classmethod
    def load(cls, gpu: Gpu, config: Any, checkpoint: Any, *, dtype: str, kv_dtype: str | None) -> StandIn:
        return cls(gpu, _core.Model.load(config, checkpoint, dtype=dtype, kv_dtype=kv_dtype))

    @classmethod
    def random(cls, gpu: Gpu, config: Any, *, seed: int, dtype: str, kv_dtype: str | None) -> StandIn:
        return cls(gpu, _core.Model.random(config, seed=seed, dtype=dtype, kv_dtype=kv_dtype))

    @property
    def device(self) -> str:
        return f"cuda:{self._gpu.device.ordinal}"

    @property
    def n_threads(self) -> int:
        return 1

    @property
    def isa(self) -> str:
        return self._gpu.arch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    @classmethod
    def take_place(cls, monkeypatch: pytest.MonkeyPatch) -> None:
        """Stand in for `gpt2rs.cuda.model.CudaModel`, for one test."""
        module = types.ModuleType("gpt2rs.cuda.model")
        module.CudaModel = cls  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "gpt2rs.cuda.model", module)
        monkeypatch.setattr(cls, "extra_bytes", 0)
