"""How a core model is held and run: the options that all ways to a model share, checked in one place."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import _core
from .settings import check_count

_DTYPES = ("float32", "bfloat16", "int8", "int4")
_KV_DTYPES = ("float32", "bfloat16", "int8")
_PRECISIONS = ("exact", "fast")


class Build:
    """How a core model is to be built, checked before anything is read."""

    def __init__(self, dtype: Any, kv_dtype: Any, precision: str, device: str, n_threads: int | None) -> None:
        """Check the options; ValueError names the one that is wrong, RuntimeError a device out of reach."""
        self.dtype = None if dtype is None else _dtype_name("dtype", dtype, _DTYPES)
        self.kv_dtype = None if kv_dtype is None else _dtype_name("kv_dtype", kv_dtype, _KV_DTYPES)
        if precision not in _PRECISIONS:
            raise ValueError(f"precision is {precision!r}; it must be {_one_of(_PRECISIONS)}")
        self.precision = precision
        self.n_threads = None if n_threads is None else check_count("n_threads", n_threads)
        if self.n_threads == 0:
            raise ValueError("n_threads is 0; it must be at least 1, or None to choose")
        _check_device(device)
        if precision == "fast" and self.dtype not in (None, "bfloat16"):
            raise ValueError(f'precision "fast" is for bfloat16 weights; dtype is {self.dtype!r}')

    def load(self, config: _core.Config, checkpoint: _core.Checkpoint, stored_dtype: str) -> _core.Model:
        """A model with a checkpoint's weights; without a dtype, bfloat16 and packed files stay so."""
        return _core.Model.load(
            config,
            checkpoint,
            dtype=self._dtype(stored_dtype),
            kv_dtype=self.kv_dtype,
            precision=self.precision,
            n_threads=self.n_threads,
        )

    def random(self, config: _core.Config, seed: int) -> _core.Model:
        """A model with random weights; float32 without a dtype."""
        return _core.Model.random(
            config,
            seed=seed,
            dtype=self._dtype("float32"),
            kv_dtype=self.kv_dtype,
            precision=self.precision,
            n_threads=self.n_threads,
        )

    def _dtype(self, stored_dtype: str) -> str:
        if self.dtype is not None:
            return self.dtype
        if stored_dtype in ("int8", "int4"):
            return stored_dtype
        return "bfloat16" if stored_dtype == "bfloat16" or self.precision == "fast" else "float32"


def _one_of(names: tuple[str, ...]) -> str:
    quoted = [f'"{name}"' for name in names]
    return " or ".join([", ".join(quoted[:-1]), quoted[-1]])


def _dtype_name(name: str, dtype: Any, known: tuple[str, ...]) -> str:
    try:
        given = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    except TypeError:
        given = repr(dtype)
    if given not in known:
        raise ValueError(f"{name} is {given!r}; it must be {_one_of(known)}")
    return given


def _check_device(device: str) -> None:
    if not isinstance(device, str):
        raise ValueError(f'device is {device!r}; it must be "cpu" or "auto"')
    if device.split(":")[0] == "cuda":
        raise RuntimeError(f"device is {device!r}, and this build has the CPU engine only")
    if device not in ("cpu", "auto"):
        raise ValueError(f'device is {device!r}; it must be "cpu" or "auto"')
