"""How far what was computed may be from exact arithmetic; docs/design.md, "How far from exact", derives it.

Products, LayerNorm's inputs aside, and attention: bounds that hold for all numbers, element by element, as multiples of
the sum of magnitudes.  Whole models, where such a bound would be far too wide: what errors add up to, to first order.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

import gpt2rs
from gpt2rs.cuda.model import CudaModel
from gpt2rs.cuda.weights import Matrix

Array = NDArray[np.float64]

# What rounding to nearest may be off by, as a part of the result.
UNIT_FLOAT32, UNIT_BFLOAT16 = 2.0**-24, 2.0**-8
# What one mma of 16 products may be off by, in units of float32 and as a part of the sum of all magnitudes: two steps of
# eight products on sm_80 to sm_89; one of sixteen (10) on sm_90 and newer; sixteen additions rounded to nearest (16).
MMA = 20
# A step of a tensor core cuts off up to so many units of its sum.  Steps of an mma at most.
CUT, STEPS = 2, 2
# Of the kernels: inputs of an mma and of a group, positions of attention's runs.
_INPUTS, _GROUP, _RUN = 16, 32, 128


def grown(units: float) -> float:
    """What so many units of float32 one after the other may add up to."""
    return float(np.expm1(units * np.log1p(UNIT_FLOAT32)))


def chain(matrix: Matrix) -> int:
    """How many mma the longest range of a matrix's inputs takes."""
    ranges = matrix.warps * matrix.splits
    return -(-matrix.groups // ranges) * _GROUP // _INPUTS


def product(matrix: Matrix, parts: int, n_chain: int | None = None) -> float:
    """Largest error of an output, as a part of sum |weight| |activation|, of the numbers as the kernel gets them.

    parts: of activations; 0: one chain of fused multiply-adds.  n_chain: other than `chain`, for tests of the tests.
    """
    if parts == 0:
        return grown(matrix.k)
    sums = matrix.warps + matrix.splits - 2 + (2 if parts == 3 else 0)
    return grown(MMA * (n_chain or chain(matrix)) + sums) * _of_parts(parts)


def _of_parts(parts: int) -> float:
    """Magnitudes of the parts of a value, together, as a multiple of its own."""
    return 1 + 2.0**-7 if parts == 3 else 1.0


def attention(
    queries: Array, keys: Array, values: Array, first: int, scale: float, *, parts: int, out_parts: int
) -> tuple[Array, Array]:
    """What queries (Q, HS) at positions `first` and on take from keys and values (T, HS), and the largest error.

    parts: of queries, and of the weights; 0: all in float32.  out_parts: of what comes out.
    """
    head = -(-queries.shape[1] // _GROUP) * _GROUP
    # Units that a score, a sum of weights and a weighted value of one run may be off by.
    if parts == 0:
        of_score, of_sum, of_value = head, 7, _RUN
    else:
        added = 2 if parts == 3 else 0
        of_score, of_sum, of_value = MMA * head // _INPUTS + added, 34, MMA * _RUN // _INPUTS + added
    scores = queries @ keys.T * scale
    seen = np.arange(len(keys)) <= first + np.arange(len(queries))[:, None]
    greatest = np.where(seen, scores, -np.inf).max(1, keepdims=True)
    weights = np.where(seen, np.exp(scores - greatest), 0.0)
    weights /= weights.sum(1, keepdims=True)
    exact = weights @ values

    off = np.abs(queries) @ np.abs(keys).T * abs(scale) * grown(of_score) * _of_parts(parts)
    off += UNIT_FLOAT32 * np.abs(scores)
    # The exponential's argument is rounded once, and its parts as runs are merged.
    off += UNIT_FLOAT32 * (
        np.where(seen, greatest - scores, 0.0) + 2 * np.where(seen, off, 0.0).max(1, keepdims=True)
    )
    # The exponential itself is off by two units in the last place, 4 of rounding; a merge, by one more and two roundings.
    runs = -(-(first + len(queries)) // _RUN)
    relative = np.exp(off) * (1 + grown(4 + 6 * runs)) - 1
    held = 1 + UNIT_BFLOAT16 if parts == 1 else 1.0  # weights in one part are rounded
    above = (1 + relative) * held * (1 + grown(of_value) * _of_parts(parts))
    of_sums = (weights * ((1 + relative) * (1 + grown(of_sum)) - 1)).sum(1, keepdims=True)
    error = ((weights * (above - 1)) @ np.abs(values) + np.abs(exact) * of_sums) / (1 - of_sums)
    last = UNIT_FLOAT32 + (UNIT_BFLOAT16 if out_parts == 1 else 0.0)
    return exact, error + last * (np.abs(exact) + error)


def cpu(config: gpt2rs.Config, scale: float, *, rounded: bool) -> float:
    """Largest error to expect of the CPU's values of size `scale`, against exact arithmetic on the same numbers.

    A float32 sum of K products is off by about unit * sqrt(K) of its size: its roundings add up like a
    random walk.  Weights and caches `rounded` to bfloat16 put it off by unit of its size, as errors add up no
    faster than the products.  This happens once in every layer and once more in the head.  Without the
    scaling of scores, attention's exponential makes errors sqrt(HS) times as large.  The factors 2 and 8
    cover the largest of some 10,000 values.
    """
    longest = max(config.n_inner, 3 * config.n_embd)
    unit = 2 * UNIT_FLOAT32 * np.sqrt(longest) + (8 * UNIT_BFLOAT16 if rounded else 0)
    return float(unit * (1 + config.n_layer) * _sharpness(config) * scale)


def cuda(model: CudaModel, scale: float, *, rounded: bool) -> float:
    """The same of a GPU's values: the CPU's, and what tensor cores cut off.

    Sums are cut off towards zero, so these errors don't walk at random, they add up: each step of a chain
    takes up to `CUT` units of the sum's size, and each chain that a token passes passes it on.
    """
    return cpu(model.config, scale, rounded=rounded) + grown(cuts(model)) * _sharpness(model.config) * scale


def cuts(model: CudaModel) -> int:
    """Units that tensor cores may cut off what a token passes, from the embedding to the logits."""
    shape, weights = model._shape, model._weights
    n_mma = 0
    if shape.parts:
        matrices = [weights.lm_head]
        for block in weights.blocks:
            matrices += [
                linear.weight for linear in (block.c_attn, block.attn_c_proj, block.c_fc, block.mlp_c_proj)
            ]
        n_mma += sum(chain(matrix) for matrix in matrices)
    if shape.query_parts:
        n_mma += model.config.n_layer * (shape.head + min(_RUN, model.config.n_ctx)) // _INPUTS
    return CUT * STEPS * n_mma


def apart(model: CudaModel, scale: float) -> float:
    """How far a GPU's values may be from those of the CPU's model of the same types.

    Both are off by their own errors.  Keys and values that are rounded to bfloat16 are rounded alike, but for
    those that a boundary between two of them finds on either side of it: with an error of a part e of them,
    e / 2^-8 of all; such a value is off by the whole distance, of which rounding itself is off by 1 / sqrt(12)
    in the mean.
    """
    config = model.config
    own = cpu(config, scale, rounded=False) + cuda(model, scale, rounded=False)
    if model.kv_dtype == "float32":
        return own
    rounding = cpu(config, scale, rounded=True) - cpu(config, scale, rounded=False)
    return own + rounding * rounded_apart(own / scale)


def rounded_apart(error: float) -> float:
    """What remains of the effect of rounding to bfloat16 between two who round numbers that are `error` apart."""
    return float(np.sqrt(min(1.0, 12 * error / UNIT_BFLOAT16)))


def _sharpness(config: gpt2rs.Config) -> float:
    return 1.0 if config.scale_attn_weights else float(np.sqrt(config.head_size))
