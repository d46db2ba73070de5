"""The CUDA driver, through cuda-python: which of its calls failed, in words."""

from __future__ import annotations

from typing import Any


class DriverError(RuntimeError):
    """A driver call that failed: CUDA's name of the error, and what the driver says about it."""

    @classmethod
    def of(cls, error: Any) -> DriverError:
        """From the code that a call returned."""
        name = str(getattr(error, "name", error))
        _, text = api().cuGetErrorString(error)
        said = text.decode(errors="replace") if isinstance(text, bytes) else "unknown to the driver"
        return cls(f"{name}, {said}")


def api() -> Any:
    """`cuda.bindings.driver`, loaded on first use; ImportError without cuda-python."""
    from cuda.bindings import driver

    return driver


def call(function: Any, *args: Any) -> Any:
    """What a driver function gives: None, one value, or a tuple; `DriverError` where it fails."""
    error, *values = function(*args)
    if int(error) != 0:
        raise DriverError.of(error)
    return values[0] if len(values) == 1 else tuple(values) or None
