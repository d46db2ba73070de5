"""The CUDA driver, through cuda-python: which of its calls failed, in words."""

from __future__ import annotations

from typing import Any


class DriverError(RuntimeError):
    """A driver call that failed; `name` is CUDA's name of the error, such as "CUDA_ERROR_OUT_OF_MEMORY"."""

    def __init__(self, name: str, text: str) -> None:
        """text: what the driver says about the error."""
        super().__init__(f"{name}, {text}")
        self.name = name


def api() -> Any:
    """`cuda.bindings.driver`, loaded on first use; ImportError without cuda-python."""
    from cuda.bindings import driver

    return driver


def call(function: Any, *args: Any) -> Any:
    """What a driver function gives: None, one value, or a tuple; `DriverError` where it fails."""
    error, *values = function(*args)
    if int(error) != 0:
        raise DriverError(*described(error))
    return values[0] if len(values) == 1 else tuple(values) or None


def described(error: Any) -> tuple[str, str]:
    """An error's name and its description, without the calls that could fail again."""
    name = str(getattr(error, "name", error))
    _, text = api().cuGetErrorString(error)
    return name, text.decode(errors="replace") if isinstance(text, bytes) else "an error unknown to the driver"
