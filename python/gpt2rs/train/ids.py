"""Token ids that a caller gives, as the core takes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

_LARGEST = np.iinfo(np.uint32).max


def inputs_and_targets(
    inputs: ArrayLike, targets: ArrayLike
) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Both as (B, T), B and T at least 1; ValueError for other shapes, no integers, and what no id can be.

    Whether the model has all these ids, and as many positions, is checked by the core.
    """
    x, y = _ids("inputs", inputs), _ids("targets", targets)
    if x.shape != y.shape or not x.size:
        raise ValueError(
            f"inputs have shape {x.shape} and targets {y.shape}; they must be of one shape, (B, T), with "
            "at least one token"
        )
    return x, y


def _ids(name: str, values: ArrayLike) -> NDArray[np.uint32]:
    ids = np.asarray(values)
    # An empty list is float64, and is told about by its shape.
    if ids.ndim != 2 or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(f"{name} are {ids.dtype} of shape {ids.shape}; they must be integers (B, T)")
    if ids.size and (ids.min() < 0 or ids.max() > _LARGEST):
        raise ValueError(f"{name} go from {ids.min()} to {ids.max()}; ids are from 0 to {_LARGEST}")
    return np.ascontiguousarray(ids, np.uint32)
