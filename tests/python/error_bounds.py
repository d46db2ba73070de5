"""How far what was computed may be from exact arithmetic; docs/rounding.md derives all of it.

Products and attention: bounds that hold for all numbers short of the range's ends, element by element.
Whole models, where such a bound would be far too wide: what errors add up to, to first order.
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
# In units of float32: what an mma of 16 products may be off by, of the sum of all magnitudes; and what one of
# its steps, of which there are two at most, may cut off its sum.
MMA, CUT, STEPS = 20, 2, 2
# Inputs of an mma and of a group; positions of attention's runs.
_INPUTS, _GROUP, _RUN = 16, 32, 128


def grown(units: float) -> float:
    """What so many roundings of float32, one after the other, may add up to."""
    return float(np.expm1(units * np.log1p(UNIT_FLOAT32)))


def chain(matrix: Matrix) -> int:
    """How many mma the longest range of a matrix's inputs takes."""
    ranges = matrix.warps * matrix.splits
    return -(-matrix.groups // ranges) * _GROUP // _INPUTS


def product(matrix: Matrix, parts: int, n_chain: int | None = None) -> float:
    """Largest error of an output, as a part of sum |weight| |activation|, of numbers as the kernel gets them.

    parts: of activations; 0: one chain of fused multiply-adds.  n_chain: instead of `chain`, to see what
    becomes of a bound that is wrong.
    """
    if parts == 0:
        return grown(matrix.k)
    sums = matrix.warps + matrix.splits - 2 + (2 if parts == 3 else 0)
    return grown(MMA * (n_chain or chain(matrix)) + sums) * _of_parts(parts)


def attention(
    queries: Array, keys: Array, values: Array, first: int, scale: float, *, parts: int, out_parts: int
) -> tuple[Array, Array]:
    """What queries (Q, HS) from position `first` on take from keys and values (T, HS); the largest error.

    parts: of queries, and of the weights; 0: all in float32.  out_parts: of what comes out.
    """
    head = -(-queries.shape[1] // _GROUP) * _GROUP
    # Units that a score, a sum of weights and a weighted value of one run may be off by.
    if parts == 0:
        of_score, of_sum, of_value = head, 7, _RUN
    else:
        added = 2 if parts == 3 else 0
        of_score, of_sum, of_value = MMA * head // _INPUTS + added, 34, MMA * _RUN // _INPUTS + added
    seen = np.arange(len(keys)) <= first + np.arange(len(queries))[:, None]
    scores = queries @ keys.T * scale
    greatest = np.where(seen, scores, -np.inf).max(1, keepdims=True)
    weights = np.where(seen, np.exp(scores - greatest), 0.0)
    weights /= weights.sum(1, keepdims=True)
    exact = weights @ values

    off = np.abs(queries) @ np.abs(keys).T * abs(scale) * grown(of_score) * _of_parts(parts)
    off = np.where(seen, off + UNIT_FLOAT32 * np.abs(scores), 0.0)
    # The exponential's argument is rounded: what the computed scores are apart.
    off += UNIT_FLOAT32 * (np.where(seen, greatest - scores, 0.0) + 2 * off.max(1, keepdims=True))
    runs = -(-(first + len(queries)) // _RUN)
    weight = np.exp(off) * (1 + grown(4 + 6 * runs))
    held = 1 + UNIT_BFLOAT16 if parts == 1 else 1.0  # weights in one part are rounded
    weighted = weight * held * (1 + grown(of_value) * _of_parts(parts)) - 1
    sums = (weights * (weight * (1 + grown(of_sum)) - 1)).sum(1, keepdims=True)
    error = ((weights * weighted) @ np.abs(values) + np.abs(exact) * sums) / (1 - sums)
    last = UNIT_FLOAT32 + (UNIT_BFLOAT16 if out_parts == 1 else 0.0)
    return exact, error + last * (np.abs(exact) + error)


def cpu(config: gpt2rs.Config, scale: float, *, rounded: bool) -> float:
    """Largest error to expect of the CPU's values of size `scale`, against exact arithmetic.

    Roundings of a float32 sum of K products walk at random, about 0.3 sqrt(K) units of its size in the mean;
    sqrt(K) is more than three times that.  What a sum is off by is passed on, so this adds up over all sums
    that a token passes.  Weights and caches `rounded` to bfloat16 put a layer off by unit of its size, as
    errors add up no faster than the products, and 8 covers the largest of some 10,000 values.  Without the
    scaling of scores, attention's exponential makes errors sqrt(HS) times as large.
    """
    c, layers = config.n_embd, config.n_layer
    of_layer = 3 * np.sqrt(c) + np.sqrt(config.head_size) + np.sqrt(config.n_ctx) + np.sqrt(config.n_inner)
    unit = UNIT_FLOAT32 * (layers * of_layer + np.sqrt(c)) + (
        8 * UNIT_BFLOAT16 * (1 + layers) if rounded else 0
    )
    return float(unit * _sharpness(config) * scale)


def cuda(model: CudaModel, scale: float, *, rounded: bool) -> float:
    """The same of a GPU's values: the CPU's, and what tensor cores cut off.

    Sums are cut off towards zero, so these errors don't walk at random, they add up along a chain and from
    chain to chain.
    """
    return cpu(model.config, scale, rounded=rounded) + grown(cuts(model)) * _sharpness(model.config) * scale


def cuts(model: CudaModel) -> int:
    """Units that tensor cores may cut off what a token passes, from the embedding to the logits."""
    shape, weights, config = model._shape, model._weights, model.config
    n_mma = 0
    if shape.parts:
        matrices = [weights.lm_head]
        for block in weights.blocks:
            linears = (block.c_attn, block.attn_c_proj, block.c_fc, block.mlp_c_proj)
            matrices += [linear.weight for linear in linears]
        n_mma += sum(chain(matrix) for matrix in matrices)
    if shape.query_parts:
        n_mma += config.n_layer * -(-(shape.head + min(_RUN, config.n_ctx)) // _INPUTS)
    return CUT * STEPS * n_mma


def apart(model: CudaModel, scale: float) -> float:
    """How far a GPU's values may be from those of a CPU's model of the same types."""
    own = cpu(model.config, scale, rounded=False) + cuda(model, scale, rounded=False)
    if model.kv_dtype == "float32":
        return own
    rounding = cpu(model.config, scale, rounded=True) - cpu(model.config, scale, rounded=False)
    return own + rounding * rounded_apart(own / scale)


def rounded_apart(error: float) -> float:
    """What is left of what rounding to bfloat16 does, between numbers that are a part `error` apart.

    They are rounded alike, but for those that a boundary lies between, error / unit of them; such a one is
    off by a whole place, where rounding is off by 1 / sqrt(12) of one in the mean.
    """
    return float(np.sqrt(min(1.0, 12 * error / UNIT_BFLOAT16)))


def _of_parts(parts: int) -> float:
    """Magnitudes of a value's parts, added, as a multiple of its own."""
    return 1 + 2.0**-7 if parts == 3 else 1.0


def _sharpness(config: gpt2rs.Config) -> float:
    return 1.0 if config.scale_attn_weights else float(np.sqrt(config.head_size))
