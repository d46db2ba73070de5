"""A checkpoint's tensors in device memory, laid out for the kernels by kernels (layout.cu).

Sizes are padded with zeros, which change no sum: a head's channels and every K to a multiple of 32, N to
one of 64.  So odd shapes need nothing of the products.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .. import _core
from .machine import Buffer, Launch, Machine
from .sizes import BLOCK, GROUP, MAX_PARTIALS, TILE, Tiled

# Threads that read tensors.
_THREADS = 4
# Outputs of a matrix are padded to a multiple: what a block of the tiled product has.
_OUTPUTS = Tiled.OUTPUTS
# The least groups of K in a split.
_GROUPS_OF_SPLIT = 12

_ACTIVATIONS = {
    "gelu_new": 0,
    "gelu_pytorch_tanh": 0,
    "gelu_fast": 0,
    "gelu": 1,
    "relu": 2,
    "silu": 3,
    "swish": 3,
}


def padded(n: int, to: int = GROUP) -> int:
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
        return self.k // GROUP

    @property
    def tiles(self) -> int:
        """Tiles of 16 outputs."""
        return self.n // TILE


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


@dataclass(frozen=True)
class _Side:
    """Outputs or inputs of a matrix: blocks of `filled` indices of the checkpoint's `count`, each padded to
    `block`.  A block is a head, or the whole side.  `Side` of layout.cu."""

    block: int
    filled: int
    count: int

    @classmethod
    def plain(cls, count: int) -> _Side:
        """One block."""
        return cls(padded(count), count, count)

    @property
    def size(self) -> int:
        """Indices, padding of the blocks counted."""
        return -(-self.count // self.filled) * self.block


def load(machine: Machine, shape: Shape, tensors: Tensors) -> Weights:
    """Read and upload all tensors, to be laid out on the device; ValueError for a missing one or a wrong
    shape.

    Blocks are read side by side, one a thread, since the core lets go of the GIL.  A thread takes memory for
    a tensor; the device, beside the weights, for the largest that it lays out, or a piece of the embedding.
    """
    loader = _Loader(machine, shape, tensors)
    with ThreadPoolExecutor(_THREADS) as threads:
        weights = loader.weights(threads)
    # Kernels wrote the weights, and products fetch weights before they wait for the kernel before them.
    machine.synchronize()
    return weights


class _Loader:
    def __init__(self, machine: Machine, shape: Shape, tensors: Tensors) -> None:
        self._machine, self._shape, self._tensors = machine, shape, tensors
        self._n_bytes = 0
        config = shape.config
        largest = config.n_embd * max(3 * config.n_embd, config.n_inner, _OUTPUTS)
        # What is laid out, as it came.
        self._arrived = machine.alloc(4 * largest)
        # One tensor at a time is uploaded and laid out.
        self._turn = threading.Lock()

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
        # Queries, keys and values: every head's channels padded, as they stand in the cache.
        qkv = _Side(shape.head, config.head_size, 3 * config.n_embd)
        attended = _Side(shape.head, config.head_size, config.n_embd)
        stream, inner = _Side.plain(config.n_embd), _Side.plain(config.n_inner)
        return Block(
            ln_1=self._norm(at + "ln_1"),
            c_attn=self._linear(at + "attn.c_attn", qkv, stream),
            attn_c_proj=self._linear(at + "attn.c_proj", stream, attended, into_stream=True),
            ln_2=self._norm(at + "ln_2"),
            c_fc=self._linear(at + "mlp.c_fc", inner, stream),
            mlp_c_proj=self._linear(at + "mlp.c_proj", stream, inner, into_stream=True),
        )

    def _norm(self, name: str) -> Norm:
        return Norm(self._vector(name + ".weight"), self._vector(name + ".bias"))

    def _vector(self, name: str, side: _Side | None = None) -> Buffer:
        values = self._tensors.get(name)
        if side is not None:
            blocks = values.reshape(-1, side.filled)
            values = np.pad(blocks, ((0, 0), (0, side.block - side.filled)))
        with self._turn:
            buffer = self._alloc(values.nbytes)
            self._machine.upload(buffer, values)
        return buffer

    def _linear(self, name: str, outputs: _Side, inputs: _Side, *, into_stream: bool = False) -> Linear:
        """Products into the residual stream may leave several sums, which are added there."""
        weight = self._tensors.get(name + ".weight")
        n, k = padded(outputs.size, _OUTPUTS), padded(inputs.size)
        splits = 1
        if into_stream and self._shape.parts:
            splits = min(MAX_PARTIALS, max(1, k // GROUP // _GROUPS_OF_SPLIT))
        with self._turn:
            matrix = Matrix(self._alloc(n * k * self._element), k, n, splits=splits)
            self._lay_out(matrix, weight.T, outputs, inputs)
        return Linear(matrix, self._vector(name + ".bias", outputs))

    def _embedding(self, name: str) -> Matrix:
        """(V, C), in pieces: it may be many times a layer's matrix."""
        weight = self._tensors.get(name)
        v, c = weight.shape
        k = padded(c)
        piece = self._arrived.n_bytes // (4 * c) // _OUTPUTS * _OUTPUTS
        n = padded(v, _OUTPUTS)
        with self._turn:
            matrix = Matrix(self._alloc(n * k * self._element), k, n, warps=2)
        for first in range(0, v, piece):
            rows = weight[first : first + piece]
            with self._turn:
                self._lay_out(matrix, rows, _Side.plain(len(rows)), _Side.plain(c), first)
        return matrix

    def _lay_out(
        self, matrix: Matrix, weight: NDArray[np.float32], outputs: _Side, inputs: _Side, first: int = 0
    ) -> None:
        """Upload weights (outputs, inputs), as rows or as columns lie in memory, and put them into the matrix
        from its output `first` on."""
        self._machine.upload(self._arrived, weight if weight.flags.c_contiguous else weight.T)
        sides: list[int] = []
        for side, stride in zip((outputs, inputs), weight.strides, strict=True):
            sides += (side.block, side.filled, side.count, stride // weight.itemsize)
        n, k = padded(outputs.size, _OUTPUTS), matrix.k
        if self._shape.parts:
            kernel, values_of_thread = "pack_fragments", 8
            tail = (first // TILE, n // TILE, k // GROUP)
        else:
            kernel, values_of_thread = "pack_columns", 1
            tail = (first, n, k)
        grid = -(-n * k // (BLOCK * values_of_thread)), 1, 1
        self._machine.launch(Launch(kernel, grid, BLOCK, 0, (self._arrived, *sides, matrix.data, *tail)))

    @property
    def _element(self) -> int:
        return 2 if self._shape.parts else 4

    def _alloc(self, n_bytes: int) -> Buffer:
        self._n_bytes += n_bytes
        return self._machine.alloc(n_bytes)
