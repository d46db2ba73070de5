"""A checkpoint's tensors, laid out for the kernels and put into device memory.

Sizes are padded with zeros, which change no sum: a head's channels and every K to a multiple of 32, N to
one of 64.  So odd shapes need nothing of the kernels.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .. import _core
from .machine import Buffer, Machine

_GROUP, _TILE = 32, 16
# That lay out weights.
_THREADS = 4
# Most sums that a product leaves to its reader (MAX_PARTIALS of the kernels); groups of K that one has.
_MAX_SPLITS, _GROUPS_OF_SPLIT = 4, 12

_ACTIVATIONS = {
    "gelu_new": 0,
    "gelu_pytorch_tanh": 0,
    "gelu_fast": 0,
    "gelu": 1,
    "relu": 2,
    "silu": 3,
    "swish": 3,
}


def padded(n: int, to: int = _GROUP) -> int:
    """n, rounded up to a multiple."""
    return -(-n // to) * to


class Tensors(Protocol):
    """Where tensors come from: `_core.Tensors`."""

    def get(self, name: str) -> NDArray[np.float32]:
        """The tensor of this name, in the model's shape."""


@dataclass(frozen=True)
class Shape:
    """Sizes as the kernels see them, and how numbers are held.

    parts: bfloat16 values that an activation is the sum of where it meets bfloat16 weights, 3 (exact) or 1
    (rounded); 0 stands for float32 weights.  wide: keys and values in float32.
    """

    config: _core.Config
    parts: int
    wide: bool

    @property
    def head(self) -> int:
        """Channels of a head."""
        return padded(self.config.head_size)

    @property
    def attended(self) -> int:
        """Channels of all heads."""
        return self.config.n_head * self.head

    @property
    def k(self) -> int:
        """Channels of the residual stream, as an input."""
        return padded(self.config.n_embd)

    @property
    def inner(self) -> int:
        """Channels between the MLP's matrices."""
        return padded(self.config.n_inner)

    @property
    def vocab(self) -> int:
        """Distance between rows of logits."""
        return padded(self.config.n_vocab, 4)

    @property
    def query_parts(self) -> int:
        """As `parts`, of queries: float32 where keys are, and where weights are but not keys, exact."""
        return 0 if self.wide else self.parts or 3

    @property
    def activation(self) -> int:
        """Number of the activation function."""
        return _ACTIVATIONS[self.config.activation_function]

    def scale(self, layer: int) -> float:
        """What scores are multiplied by."""
        config = self.config
        by_head = config.head_size**0.5 if config.scale_attn_weights else 1.0
        by_layer = layer + 1 if config.scale_attn_by_inverse_layer_idx else 1
        return 1.0 / (by_head * by_layer)


@dataclass(frozen=True)
class Matrix:
    """K inputs, N outputs, both padded, and how sums over K are cut: by the matrix alone.

    warps: ranges of K that the warps of one block take.  splits: blocks that share K, each with so many
    ranges.
    """

    data: Buffer
    k: int
    n: int
    warps: int = 8
    splits: int = 1

    @property
    def groups(self) -> int:
        """Groups of 32 inputs."""
        return self.k // _GROUP

    @property
    def tiles(self) -> int:
        """Tiles of 16 outputs."""
        return self.n // _TILE


@dataclass(frozen=True)
class Norm:
    """Gain and shift, (C,) float32."""

    gain: Buffer
    shift: Buffer


@dataclass(frozen=True)
class Linear:
    """A matrix and its bias, (N,) float32."""

    weight: Matrix
    bias: Buffer


@dataclass(frozen=True)
class Block:
    """One transformer block."""

    ln_1: Norm
    c_attn: Linear
    attn_c_proj: Linear
    ln_2: Norm
    c_fc: Linear
    mlp_c_proj: Linear


@dataclass(frozen=True)
class Weights:
    """All of a model; wte is the LM head's matrix, and the head's own where it is not tied."""

    wte: Matrix
    wpe: Buffer
    blocks: tuple[Block, ...]
    ln_f: Norm
    lm_head: Matrix
    n_bytes: int


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """To nearest even, as bits."""
    bits = values.view(np.uint32)
    # In place from here on: loading a model is for the most part this.
    rounded = bits >> 16
    rounded &= 1
    rounded += np.uint32(0x7FFF)
    rounded += bits
    rounded >>= 16
    halves = rounded.astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():
        halves[nan] = 0x7FFF
    return halves


def fragments(weight: NDArray[np.float32]) -> NDArray[np.uint16]:
    """(N, K) as operands A of mma m16n8k16; see fragments.cuh."""
    n, k = weight.shape
    # Two inputs that are neighbours stay so: they are moved as one word.
    pairs = to_bfloat16(np.ascontiguousarray(weight)).view(np.uint32)
    # row = 8 h + g, input = 8 t + 4 step + 2 pair + element of a group.
    cut = pairs.reshape(n // _TILE, 2, 8, k // _GROUP, 4, 2, 2)
    return np.ascontiguousarray(cut.transpose(0, 3, 5, 2, 4, 6, 1)).view(np.uint16).reshape(-1)


def columns(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """(N, K) as (N / 32, K, 32)."""
    n, k = weight.shape
    return np.ascontiguousarray(weight.reshape(n // 32, 32, k).transpose(0, 2, 1)).reshape(-1)


def load(machine: Machine, shape: Shape, tensors: Tensors) -> Weights:
    """Read, lay out and upload all tensors; ValueError for a missing one or a wrong shape.

    Blocks are read and laid out side by side, one a thread: NumPy and the core let go of the GIL.  A thread
    takes memory for a matrix and its copies.
    """
    with ThreadPoolExecutor(_THREADS) as threads:
        return _Loader(machine, shape, tensors).weights(threads)


class _Loader:
    def __init__(self, machine: Machine, shape: Shape, tensors: Tensors) -> None:
        self._machine, self._shape, self._tensors = machine, shape, tensors
        self._n_bytes = 0
        self._upload_lock = threading.Lock()

    def weights(self, threads: ThreadPoolExecutor) -> Weights:
        config = self._shape.config
        # The largest first: what begins last should be small.
        embedding = threads.submit(self._embedding, "wte.weight")
        head = None if config.tie_word_embeddings else threads.submit(self._embedding, "lm_head.weight")
        blocks = tuple(threads.map(self._block, [f"h.{i}." for i in range(config.n_layer)]))
        wpe, ln_f = self._vector("wpe.weight"), self._norm("ln_f")
        wte = embedding.result()
        lm_head = wte if head is None else head.result()
        return Weights(wte, wpe, blocks, ln_f, lm_head, self._n_bytes)

    def _block(self, at: str) -> Block:
        shape, config = self._shape, self._shape.config
        heads, hs, c = config.n_head, config.head_size, config.n_embd
        # Queries, keys and values: every head's channels padded, as they stand in the cache.
        w = _pad(self._tensors.get(at + "attn.c_attn.weight").T.reshape(3 * heads, hs, c), shape.head, 1)
        b = _pad(self._tensors.get(at + "attn.c_attn.bias").reshape(3 * heads, hs), shape.head, 1)
        proj = _pad(self._tensors.get(at + "attn.c_proj.weight").T.reshape(c, heads, hs), shape.head, 2)
        return Block(
            ln_1=self._norm(at + "ln_1"),
            c_attn=Linear(self._matrix(w.reshape(-1, c)), self._upload(b.reshape(-1))),
            attn_c_proj=Linear(
                self._matrix(proj.reshape(c, -1), into_stream=True), self._vector(at + "attn.c_proj.bias")
            ),
            ln_2=self._norm(at + "ln_2"),
            c_fc=Linear(
                self._matrix(self._tensors.get(at + "mlp.c_fc.weight").T),
                self._upload(_pad(self._tensors.get(at + "mlp.c_fc.bias"), shape.inner, 0)),
            ),
            mlp_c_proj=Linear(
                self._matrix(self._tensors.get(at + "mlp.c_proj.weight").T, into_stream=True),
                self._vector(at + "mlp.c_proj.bias"),
            ),
        )

    def _norm(self, name: str) -> Norm:
        return Norm(self._vector(name + ".weight"), self._vector(name + ".bias"))

    def _vector(self, name: str) -> Buffer:
        return self._upload(self._tensors.get(name))

    def _embedding(self, name: str) -> Matrix:
        return self._matrix(self._tensors.get(name), warps=2)

    def _matrix(self, weight: NDArray[np.float32], *, warps: int = 8, into_stream: bool = False) -> Matrix:
        """From (N, K); products into the residual stream may leave several sums, which are added there."""
        weight = _pad(_pad(weight, padded(weight.shape[0], 64), 0), padded(weight.shape[1]), 1)
        n, k = weight.shape
        if self._shape.parts == 0:
            return Matrix(self._upload(columns(weight)), k, n)
        splits = min(_MAX_SPLITS, max(1, k // _GROUP // _GROUPS_OF_SPLIT)) if into_stream else 1
        return Matrix(self._upload(fragments(weight)), k, n, warps, splits)

    def _upload(self, values: NDArray[np.generic]) -> Buffer:
        values = np.ascontiguousarray(values)
        with self._upload_lock:
            buffer = self._machine.alloc(values.nbytes)
            self._machine.upload(buffer, values)
            self._n_bytes += values.nbytes
        return buffer


def _pad(values: NDArray[np.float32], size: int, axis: int) -> NDArray[np.float32]:
    """Zeros up to `size` along an axis."""
    if values.shape[axis] == size:
        return values
    widths = [(0, size - n if i == axis else 0) for i, n in enumerate(values.shape)]
    return np.pad(values, widths)
