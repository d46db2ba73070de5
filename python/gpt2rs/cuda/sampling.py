"""A sampler's settings as the sampling kernel takes them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .. import _core

# `Settings` of sample.cu.
SETTINGS = np.dtype(
    [
        ("seed", "<u8"),
        ("index", "<u8"),
        ("top_p", "<u8"),
        ("min_weight", "<u8"),
        ("presence_penalty", "<f8"),
        ("frequency_penalty", "<f8"),
        ("scale", "<f4"),
        ("repetition_penalty", "<f4"),
        ("do_sample", "<i4"),
        ("top_k", "<i4"),
        ("prompt_len", "<i4"),
        ("penalise", "<i4"),
    ]
)
_WEIGHT_BITS = 40
_LEAST, _GREATEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


def on_device(sampler: _core.Sampler, n_tokens: int) -> bool:
    """Whether the kernel can choose the token after `n_tokens`, and all later ones."""
    return sampler.is_plain and n_tokens - sampler.prompt_len >= sampler.min_new_tokens


def penalises(sampler: _core.Sampler) -> bool:
    """Whether tokens so far count."""
    return (
        sampler.repetition_penalty != 1.0
        or sampler.presence_penalty != 0.0
        or sampler.frequency_penalty != 0.0
    )


def settings(samplers: list[_core.Sampler], n_rows: int) -> NDArray[np.void]:
    """(n_rows,) of `SETTINGS`; rows beyond the samplers are zero."""
    packed = np.zeros(n_rows, SETTINGS)
    for row, sampler in zip(packed, samplers, strict=False):
        row["seed"] = sampler.seed
        row["index"] = sampler.index
        row["top_p"] = _units(1.0 if sampler.top_p is None else sampler.top_p)
        row["min_weight"] = _share(1 << _WEIGHT_BITS, _units(sampler.min_p or 0.0))
        row["presence_penalty"] = sampler.presence_penalty
        row["frequency_penalty"] = sampler.frequency_penalty
        row["scale"] = min(max(_LEAST, 1.0 / sampler.temperature), _GREATEST)
        row["repetition_penalty"] = min(sampler.repetition_penalty, _GREATEST)
        row["do_sample"] = sampler.do_sample
        row["top_k"] = sampler.top_k or 0
        row["prompt_len"] = min(sampler.prompt_len, 2**31 - 1)
        row["penalise"] = penalises(sampler)
    return packed


def _units(fraction: float) -> int:
    """In units of 2^-63."""
    return int(min(fraction, 1.0) * 2.0**63)


def _share(total: int, units: int) -> int:
    """The least integer that is not below `total` times `units` / 2^63."""
    return -(-total * units >> 63)
