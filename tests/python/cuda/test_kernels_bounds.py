"""Kernels one by one against float64, element by element, by the bounds of docs/rounding.md.

Tensor cores add as float32 does, and as they do on sm_80 and sm_90; the numbers are random, of one sign (so
that what is cut off adds up), and the worst that there are: sums of which every product is cut off whole.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from shim_models import ARCHS, ODD, config, needs_shim, shim_machine

from error_bounds import attention, chain, product
from gpt2rs import Config
from gpt2rs.cuda.machine import Buffer, Launch
from gpt2rs.cuda.plan import Plan, Room, Stream
from gpt2rs.cuda.weights import Shape, load

pytestmark = needs_shim

# The least power of two of which every product just below it is lost beside a sum of 1.
LOST = {"host": -24, "sm_80": -24, "sm_90": -25}


def bfloat16(values: np.ndarray) -> np.ndarray:
    """Bits of the nearest, even among equals; NaN stays NaN."""
    bits = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
    return np.where(np.isnan(values), 0x7FFF, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(values: np.ndarray) -> np.ndarray:
    return widened(bfloat16(values))


def in_parts(values: np.ndarray, parts: int) -> list[np.ndarray]:
    """Planes of an operand: bits of bfloat16 whose sum is nearest to the values; 0: the values."""
    if parts == 0:
        return [np.ascontiguousarray(values)]
    planes = []
    for _ in range(parts):
        planes.append(bfloat16(values))
        values = values - widened(planes[-1])
    return planes


class Tensors:
    """Those that are given; the rest is zeros."""

    def __init__(self, of: Config, given: dict[str, np.ndarray]) -> None:
        self._given = given
        self._shapes = {
            "wte.weight": (of.n_vocab, of.n_embd),
            "wpe.weight": (of.n_ctx, of.n_embd),
            "attn.c_attn.weight": (of.n_embd, 3 * of.n_embd),
            "attn.c_attn.bias": (3 * of.n_embd,),
            "attn.c_proj.weight": (of.n_embd, of.n_embd),
            "mlp.c_fc.weight": (of.n_embd, of.n_inner),
            "mlp.c_fc.bias": (of.n_inner,),
            "mlp.c_proj.weight": (of.n_inner, of.n_embd),
        }
        self._vector = (of.n_embd,)

    def get(self, name: str) -> np.ndarray:
        name = name.removeprefix("h.0.")
        if name in self._given:
            return np.ascontiguousarray(self._given[name])
        return np.zeros(self._shapes.get(name, self._vector), np.float32)


class Products:
    """One matrix (N, K) that is the LM head's, or the MLP's second, and so many rows."""

    def __init__(
        self, arch: str, parts: int, n: int, k: int, rows: int, *, into_stream: bool = False
    ) -> None:
        sizes = {"n_embd": n, "n_inner": k} if into_stream else {"n_embd": k, "vocab_size": n}
        fields = {"n_layer": int(into_stream), "n_head": 1, "n_positions": 64, "tie_word_embeddings": True}
        self.shape = Shape(config({**ODD, **fields, **sizes}), parts, parts == 0)
        self.machine = shim_machine.ShimMachine(arch=arch)
        self.room = Room(self.machine, self.shape, rows, n_sequences=1, n_logits=rows)
        self.n, self.k, self.rows, self.into_stream = n, k, rows, into_stream
        self.load(np.zeros((n, k), np.float32))

    def load(self, w: np.ndarray, **others: np.ndarray) -> None:
        given = {"mlp.c_proj.weight": w.T} if self.into_stream else {"wte.weight": w}
        weights = load(self.machine, self.shape, Tensors(self.shape.config, {**given, **others}))
        self.plan = Plan(self.shape, weights, self.room)
        self.linear = weights.blocks[0].mlp_c_proj if self.into_stream else None
        self.matrix = self.linear.weight if self.linear else weights.lm_head
        self.norm = weights.ln_f

    def numbers(self, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """Weights (N, K) and activations (rows, K), as the kernel gets them."""
        rng = np.random.default_rng(self.k)
        w = rng.standard_normal((self.n, self.k)).astype(np.float32)
        x = rng.standard_normal((self.rows, self.k)).astype(np.float32)
        if kind == "positive":
            w, x = np.abs(w), np.abs(x)
        elif kind == "lost":
            power = LOST[self.machine.arch]
            w[:] = (1 - 2.0**-8) * 2.0 ** (power // 2)
            x[:] = 2.0 ** (power - power // 2)
            ranges = self.matrix.warps * self.matrix.splits
            for i in range(ranges):
                first = self.matrix.groups * i // ranges * 32
                w[:, first : first + 1] = x[:, first : first + 1] = 1
        if self.shape.parts:
            w = rounded(w)
        return w, rounded(x) if self.shape.parts == 1 else x

    def launches(self, prompt: bool) -> list[Launch]:
        plan, room = self.plan, self.room
        if self.linear:
            return list(plan._into_stream(Stream(), self.linear, room.inner, self.rows, prompt))
        return [plan._product(self.matrix, room.last, self.shape.k, self.rows, plan._logits(), prompt)]

    def outputs(self, w: np.ndarray, x: np.ndarray, *, prompt: bool) -> np.ndarray:
        self.load(w)
        self.put(self.room.inner if self.into_stream else self.room.last, x)
        for launch in self.launches(prompt):
            self.machine.launch(launch)
        return self.found()

    def put(self, buffer: Buffer, x: np.ndarray) -> None:
        """Activations as an operand; the rows beyond are whatever was there."""
        k = self.matrix.k
        height = buffer.n_bytes // (k * (2 * self.shape.parts or 4))
        for i, plane in enumerate(in_parts(np.pad(x, ((0, 0), (0, k - self.k))), self.shape.parts)):
            self.machine.upload(buffer, plane, i * height * k * 2)

    def found(self) -> np.ndarray:
        """(rows, N) float64, splits added."""
        if self.into_stream:
            sums = np.empty((self.matrix.splits, self.room.plane_rows, self.n), np.float32)
            self.machine.download(self.room.partials, sums)
            return sums[:, : self.rows].sum(0, dtype=np.float64)
        logits = np.empty((self.rows, self.shape.vocab), np.float32)
        self.machine.download(self.room.logits, logits)
        return logits[:, : self.n].astype(np.float64)


def errors(found: np.ndarray, w: np.ndarray, x: np.ndarray) -> np.ndarray:
    """As parts of sum |weight| |activation|."""
    w, x = w.astype(np.float64), x.astype(np.float64)
    return np.abs(found - x @ w.T) / (np.abs(x) @ np.abs(w).T)


# The head of the widest GPT-2, whose chains are the longest: 25 groups; odd sizes; K over two blocks.
SIZES: dict[str, dict[str, Any]] = {
    "long": {"n": 40, "k": 1600, "rows": 5},
    "odd": {"n": 90, "k": 77, "rows": 9},
    "split": {"n": 36, "k": 777, "rows": 3, "into_stream": True},
}


@pytest.mark.parametrize("kind", ["normal", "positive", "lost"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("arch", ARCHS)
def test_products(arch: str, parts: int, size: str, kind: str) -> None:
    products = Products(arch, parts, **SIZES[size])
    w, x = products.numbers(kind)
    for prompt in (False, True):
        assert errors(products.outputs(w, x, prompt=prompt), w, x).max() <= product(products.matrix, parts)
    assert products.machine.kernels >= {f"matmul_{parts}", f"tiled_matmul_{parts}"}


@pytest.mark.parametrize("size", SIZES)
def test_float32_products(size: str) -> None:
    products = Products("host", 0, **SIZES[size])
    w, x = products.numbers("positive")
    assert errors(products.outputs(w, x, prompt=True), w, x).max() <= product(products.matrix, 0)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_worst_numbers_come_near_the_bound_of_products(arch: str) -> None:
    """So it is not wider than it has to be, and one that forgets how long the chain is does not hold."""
    products = Products(arch, 3, **SIZES["long"])
    assert chain(products.matrix) == 50
    w, x = products.numbers("lost")
    worst = errors(products.outputs(w, x, prompt=True), w, x).max()
    # On sm_90 and newer an mma is one step; the bound allows for the two of sm_80.
    assert worst > (0.35 if arch == "sm_90" else 0.75) * product(products.matrix, 3)
    assert worst > 10 * product(products.matrix, 3, n_chain=1)


def test_what_is_cut_off_adds_up() -> None:
    """Numbers of one sign: where roundings to nearest cancel, a tensor core's grow with the chain."""
    off = {}
    for arch in ARCHS:
        products = Products(arch, 3, **SIZES["long"])
        w, x = products.numbers("positive")
        found = products.outputs(w, x, prompt=True)
        off[arch] = errors(found, w, x)
        if arch != "host":
            assert (found < x.astype(np.float64) @ w.astype(np.float64).T).all()
    assert off["sm_80"].min() > off["sm_90"].max() > off["sm_90"].min() > off["host"].max()


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("arch", ARCHS)
def test_products_with_their_norm(arch: str, parts: int) -> None:
    products = Products(arch, parts, n=40, k=1600, rows=5)
    rng = np.random.default_rng(7)
    w, stream = (rng.standard_normal((n, 1600), np.float32) for n in (40, 5))
    gain, shift = rng.standard_normal((2, 1600), np.float32)
    w = rounded(w)
    products.load(w, **{"ln_f.weight": gain, "ln_f.bias": shift})
    machine, room, plan = products.machine, products.room, products.plan
    machine.upload(room.x[0], stream)
    # The norm by itself has the same bits, as test_kernels_invariance.py holds.
    machine.launch(plan.hidden(Stream(), 0, 5))
    x = np.empty((5, 1600), np.float32)
    machine.download(room.hidden, x)
    for launch in plan._normed_product(Stream(), products.norm, products.matrix, 5, plan._logits(), False):
        machine.launch(launch)
    assert f"norm_matmul_{parts}" in machine.kernels
    x = rounded(x) if parts == 1 else x
    assert errors(products.found(), w, x).max() <= product(products.matrix, parts)


class Attending:
    """Two heads over a cache of n positions, and 13 queries, the last of them; then one alone."""

    HEADS, COUNT = 2, 13

    def __init__(self, arch: str, parts: int, wide: bool, n: int, head_size: int) -> None:
        sizes = {"n_layer": 1, "n_head": self.HEADS, "n_embd": self.HEADS * head_size, "n_positions": n}
        self.shape = Shape(config({**ODD, **sizes}), parts, wide)
        self.machine = shim_machine.ShimMachine(arch=arch)
        self.room = Room(self.machine, self.shape, 64, n_sequences=1, n_logits=1)
        self.n, self.head_size = n, head_size
        self.firsts = (n - self.COUNT, n - 1)

    def numbers(self, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Queries (COUNT + 1, heads, HS), keys and values (n, heads, HS), as the kernel gets them."""
        rng = np.random.default_rng(self.n)
        queries = 2 * rng.standard_normal((self.COUNT + 1, self.HEADS, self.head_size)).astype(np.float32)
        keys, values = rng.standard_normal((2, self.n, self.HEADS, self.head_size)).astype(np.float32)
        if kind == "positive":
            queries, keys, values = np.abs(queries) / 4, np.abs(keys), np.abs(values)
        elif kind == "lost":  # all weights are 1, and of each run of 128 positions only the first counts
            keys[:], values[:] = 0, (1 - 2.0**-8) * 2.0 ** LOST[self.machine.arch]
            values[::128] = 1
        if not self.shape.wide:
            keys, values = rounded(keys), rounded(values)
        return rounded(queries) if self.shape.query_parts == 1 else queries, keys, values

    def outputs(self, queries: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
        """(COUNT + 1, heads, HS) float64."""
        machine, room, shape = self.machine, self.room, self.shape
        pad = ((0, 0), (0, 0), (0, shape.head - self.head_size))
        blocks = [
            self.block(np.pad(keys, pad)[at : at + 32], np.pad(values, pad)[at : at + 32])
            for at in range(0, self.n, 32)
        ]
        count = self.COUNT
        positions = [*range(self.firsts[0], self.n), self.firsts[1]]
        for buffer, numbers in (
            (room.positions, positions),
            (room.sequences, [0] * (count + 1)),
            (room.first_rows, [0, count]),
            (room.counts, [count, 1]),
        ):
            machine.upload(buffer, np.array(numbers, np.int32))
        machine.upload(room.tables, np.array([block.address for block in blocks], np.uint64))
        operand = np.pad(queries, pad).reshape(count + 1, -1)
        for i, plane in enumerate(in_parts(operand, shape.query_parts)):
            machine.upload(room.queries, plane, 2 * i * room.plane_rows * shape.attended)
        machine.launch(Plan(shape, SimpleNamespace(), room)._attention(0, 2))  # type: ignore[arg-type]
        out = np.empty(
            (shape.parts or 1, room.plane_rows, shape.attended), np.uint16 if shape.parts else np.float32
        )
        machine.download(room.attended, out)
        rows = out[:, : count + 1]
        found = (widened(rows) if shape.parts else rows).sum(0, dtype=np.float64)
        return found.reshape(count + 1, self.HEADS, shape.head)[..., : self.head_size]

    def block(self, keys: np.ndarray, values: np.ndarray) -> shim_machine.ShimBuffer:
        """A block of the cache, (keys or values, head); what lies beyond the last position is poison."""
        size, fewer = self.shape.head, 32 - len(keys)
        room = ((0, fewer), (0, 0), (0, 0))
        keys = np.pad(keys, room, constant_values=np.nan).transpose(1, 0, 2)
        values = np.pad(values, room, constant_values=np.nan).transpose(1, 0, 2)
        if not self.shape.wide:
            keys, values = bfloat16(keys), bfloat16(values).transpose(0, 2, 1)
        both = np.stack([part.reshape(self.HEADS, 32 * size) for part in (keys, values)])
        buffer = self.machine.alloc(both.nbytes)
        self.machine.upload(buffer, both)
        return buffer

    def worst(self, kind: str) -> float:
        """The largest error, as a part of what it may be."""
        queries, keys, values = self.numbers(kind)
        found = self.outputs(queries, keys, values)
        scale, ratios = float(np.float32(self.shape.scale(0))), []
        for head in range(self.HEADS):
            for first, rows in zip(self.firsts, (slice(0, self.COUNT), slice(self.COUNT, None)), strict=True):
                exact, bound = attention(
                    *(part[:, head].astype(np.float64) for part in (queries[rows], keys, values)),
                    first,
                    scale,
                    parts=self.shape.query_parts,
                    out_parts=self.shape.parts,
                )
                ratios.append((np.abs(found[rows, head] - exact) / bound).max())
        return float(max(ratios))


@pytest.mark.parametrize("kind", ["normal", "positive", "lost"])
@pytest.mark.parametrize(("n", "head_size"), [(13, 16), (150, 20), (1100, 64)])
@pytest.mark.parametrize(
    ("arch", "parts", "wide"),
    [(arch, parts, False) for arch in ARCHS for parts in (0, 1, 3)]
    + [("host", parts, True) for parts in (0, 3)],
)
def test_attention(arch: str, parts: int, wide: bool, n: int, head_size: int, kind: str) -> None:
    assert Attending(arch, parts, wide, n, head_size).worst(kind) <= 1
