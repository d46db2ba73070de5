"""How a model is held and where it runs: the options that all ways to a model share, checked in one place."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _core
from .engine import Engine
from .settings import check_count

if TYPE_CHECKING:
    from .cuda.availability import Device
    from .cuda.gpu import Gpu
    from .cuda.model import CudaModel

_DTYPES = ("float32", "bfloat16", "int8", "int4")
_KV_DTYPES = ("float32", "bfloat16", "int8")
_PRECISIONS = ("exact", "fast")
_GPU_DTYPES = ("float32", "bfloat16")


class Build:
    """How a model is to be built, checked before anything is read."""

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
        if precision == "fast" and self.dtype not in (None, "bfloat16"):
            raise ValueError(f'precision "fast" is for bfloat16 weights; dtype is {self.dtype!r}')
        self.device = device
        self._ordinal = _ordinal(device)
        if self._ordinal is not None:
            self._check_gpu(self.dtype)
            if self.n_threads is not None:
                raise ValueError(f"n_threads is {n_threads}, and device is {device!r}; it is for the CPU")
            self._find_gpu(self._ordinal)

    def load(self, config: _core.Config, checkpoint: _core.Checkpoint, stored_dtype: str) -> Engine[Any]:
        """A model with a checkpoint's weights; without a dtype, bfloat16 and packed files stay so."""
        held = self._held(self._dtype(stored_dtype))

        def on_gpu(gpu: Gpu) -> Engine[Any]:
            return _cuda_model().load(gpu, config, checkpoint, **held)

        def on_cpu() -> Engine[Any]:
            return _core.Model.load(config, checkpoint, **held, n_threads=self.n_threads)

        if self.device == "auto" and checkpoint.packed() is not None:
            return on_cpu()
        return self._placed(config, held["dtype"], on_gpu, on_cpu)

    def random(self, config: _core.Config, seed: int) -> Engine[Any]:
        """A model with random weights; float32 without a dtype."""
        held = self._held(self._dtype("float32"))

        def on_gpu(gpu: Gpu) -> Engine[Any]:
            return _cuda_model().random(gpu, config, seed=seed, **held)

        def on_cpu() -> Engine[Any]:
            return _core.Model.random(config, seed=seed, **held, n_threads=self.n_threads)

        return self._placed(config, held["dtype"], on_gpu, on_cpu)

    def _held(self, dtype: str) -> dict[str, Any]:
        """What both kinds of model take."""
        return {"dtype": dtype, "kv_dtype": self.kv_dtype, "precision": self.precision}

    def _placed(
        self,
        config: _core.Config,
        dtype: str,
        on_gpu: Callable[[Gpu], Engine[Any]],
        on_cpu: Callable[[], Engine[Any]],
    ) -> Engine[Any]:
        """The model where `device` says; for "auto" on the first GPU that can, else on the CPU."""
        if self.device == "cpu":
            return on_cpu()
        from .cuda.availability import Unavailable, devices
        from .cuda.gpu import open_gpu

        n_bytes = config.memory_footprint(dtype) + self._cache_bytes(config, dtype)
        if self._ordinal is not None:
            self._check_gpu(dtype)
            try:
                return on_gpu(open_gpu(self._find_gpu(self._ordinal), n_bytes))
            except Unavailable as error:
                raise self._out_of_reach(error) from error
        try:
            self._check_gpu(dtype)
            found = devices()
        except (ValueError, Unavailable):
            return on_cpu()
        for device in found:
            try:
                device.check()
                return on_gpu(open_gpu(device, n_bytes))
            except Unavailable:
                continue
        return on_cpu()

    def _check_gpu(self, dtype: str | None) -> None:
        """ValueError for what only the CPU does."""
        for name, value in (("dtype", dtype), ("kv_dtype", self.kv_dtype)):
            if value is not None and value not in _GPU_DTYPES:
                raise ValueError(
                    f"{name} is {value!r}, and device is {self.device!r}; on a GPU it must be "
                    f"{_one_of(_GPU_DTYPES)}"
                )

    def _find_gpu(self, ordinal: int) -> Device:
        from .cuda.availability import Unavailable, device

        try:
            return device(ordinal)
        except Unavailable as error:
            raise self._out_of_reach(error) from error

    def _out_of_reach(self, error: Exception) -> RuntimeError:
        return RuntimeError(f"device is {self.device!r}, but {error}")

    def _cache_bytes(self, config: _core.Config, dtype: str) -> int:
        """Of the keys and values of one full context."""
        size = np.dtype("float32").itemsize if (self.kv_dtype or dtype) == "float32" else 2
        return 2 * config.n_layer * config.n_embd * config.n_ctx * size

    def _dtype(self, stored_dtype: str) -> str:
        if self.dtype is not None:
            return self.dtype
        if stored_dtype in ("int8", "int4"):
            return stored_dtype
        return "bfloat16" if stored_dtype == "bfloat16" or self.precision == "fast" else "float32"


def _cuda_model() -> type[CudaModel]:
    from .cuda.model import CudaModel

    return CudaModel


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


def _ordinal(device: str) -> int | None:
    """N of "cuda:N", 0 of "cuda", None of "cpu" and "auto"; ValueError for anything else."""
    if device in ("cpu", "auto"):
        return None
    match = re.fullmatch(r"cuda(?::([0-9]{1,4}))?", device) if isinstance(device, str) else None
    if match is None:
        raise ValueError(f'device is {device!r}; it must be "cpu", "cuda", "cuda:N" or "auto"')
    return int(match[1] or 0)
