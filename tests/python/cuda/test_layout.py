"""Weights as kernels lay them out, against NumPy's reading of the same layouts, bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
from shim_models import config, needs_shim, shim_machine

from gpt2rs.cuda import weights
from gpt2rs.cuda.weights import Matrix, Shape

pytestmark = needs_shim

# Heads of 20 channels, an odd inner size, and an embedding that takes several pieces.
FIELDS = {
    "vocab_size": 333,
    "n_positions": 16,
    "n_embd": 40,
    "n_layer": 1,
    "n_head": 2,
    "n_inner": 70,
    "tie_word_embeddings": False,
    "model_type": "gpt2",
}
C, V, HEADS, HS = 40, 333, 2, 20


class Noise:
    """Random tensors, each always the same; a checkpoint may have its layers' matrices `transposed`."""

    def __init__(self, *, transposed: bool = False) -> None:
        self._transposed = transposed

    def get(self, name: str) -> np.ndarray:
        shapes = {
            "wte.weight": (V, C),
            "lm_head.weight": (V, C),
            "wpe.weight": (16, C),
            "attn.c_attn.weight": (C, 3 * C),
            "attn.c_attn.bias": (3 * C,),
            "attn.c_proj.weight": (C, C),
            "mlp.c_fc.weight": (C, 70),
            "mlp.c_fc.bias": (70,),
            "mlp.c_proj.weight": (70, C),
        }
        shape = shapes.get(name.removeprefix("h.0."), (C,))
        # Of many sizes, and with what rounds up into the next power of two, or is no number.
        values = np.random.default_rng(len(name)).standard_normal(shape).astype(np.float32)
        values.flat[:6] = [np.inf, np.nan, -0.0, 1.99999, 1e-40, 3.3961775e38]
        # Readers then give views.
        return np.asfortranarray(values) if self._transposed and name.startswith("h.") else values


def padded(values: np.ndarray, *sizes: int) -> np.ndarray:
    """With zeros up to these sizes."""
    return np.pad(values, [(0, size - n) for n, size in zip(values.shape, sizes, strict=True)])


def bfloat16(values: np.ndarray) -> np.ndarray:
    """To nearest even, as bits."""
    bits = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


def fragments(weight: np.ndarray) -> np.ndarray:
    """(N, K) as operands A of mma m16n8k16: row 8 h + g, input 8 t + 4 step + 2 pair + e of a group."""
    n, k = weight.shape
    cut = bfloat16(weight).reshape(n // 16, 2, 8, k // 32, 4, 2, 2, 2)
    return cut.transpose(0, 3, 5, 2, 4, 6, 1, 7).reshape(-1)


def columns(weight: np.ndarray) -> np.ndarray:
    """(N, K) as (N / 32, K, 32)."""
    n, k = weight.shape
    return weight.reshape(n // 32, 32, k).transpose(0, 2, 1).reshape(-1).view(np.uint32)


def wanted() -> dict[str, np.ndarray]:
    """Every matrix as (N, K), padded."""
    get = Noise().get
    qkv = padded(get("h.0.attn.c_attn.weight").T.reshape(3 * HEADS, HS, C), 3 * HEADS, 32, C)
    heads = padded(get("h.0.attn.c_proj.weight").T.reshape(C, HEADS, HS), C, HEADS, 32)
    return {
        "wte": padded(get("wte.weight"), 384, 64),
        "lm_head": padded(get("lm_head.weight"), 384, 64),
        "c_attn": padded(qkv.reshape(-1, C), 192, 64),
        "attn_c_proj": padded(heads.reshape(C, -1), 64, 64),
        "c_fc": padded(get("h.0.mlp.c_fc.weight").T, 128, 64),
        "mlp_c_proj": padded(get("h.0.mlp.c_proj.weight").T, 64, 96),
    }


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("parts", [0, 1, 3])
def test_matrices_are_laid_out_as_the_products_take_them(parts: int, transposed: bool) -> None:
    shape = Shape(config(FIELDS), parts, parts == 0)
    loaded = weights.load(shim_machine.ShimMachine(), shape, Noise(transposed=transposed))
    block = loaded.blocks[0]
    found: dict[str, Matrix] = {
        "wte": loaded.wte,
        "lm_head": loaded.lm_head,
        **{name: getattr(block, name).weight for name in ("c_attn", "attn_c_proj", "c_fc", "mlp_c_proj")},
    }
    for name, expected in wanted().items():
        matrix = found[name]
        assert (matrix.n, matrix.k) == expected.shape, name
        laid_out = fragments(expected) if parts else columns(expected)
        host = matrix.data.host.view(laid_out.dtype)  # type: ignore[attr-defined]
        assert np.array_equal(host, laid_out), name


def test_biases_have_zeros_where_outputs_are_padded() -> None:
    loaded = weights.load(shim_machine.ShimMachine(), Shape(config(FIELDS), 3, False), Noise())
    bias = loaded.blocks[0].c_attn.bias.host.view(np.float32).reshape(3 * HEADS, 32)  # type: ignore[attr-defined]
    given = Noise().get("h.0.attn.c_attn.bias").reshape(3 * HEADS, HS)
    assert np.array_equal(bias, padded(given, 3 * HEADS, 32), equal_nan=True)
