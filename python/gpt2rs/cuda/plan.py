"""The launches of a pass, as data: which kernel runs over which grid with which buffers.

    embed -> (ln_1 + c_attn -> attention -> c_proj -> ln_2 + c_fc -> c_proj) * L -> ln_f + lm_head -> sample

Two forms give the same bits.  For few rows LayerNorm rides in the product behind it: five launches a
layer.  For a prompt, or rows too long for that, it is a launch of its own.  A product into the residual
stream leaves partial sums, which whoever reads the stream next adds, in their order; so K may be shared
among blocks without a launch more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .machine import Buffer, Launch, Machine, Mailbox
from .sizes import (
    BLOCK,
    GROUP,
    MAX_PARTIALS,
    POSITIONS,
    TILE,
    WARP,
    Attention,
    Float32,
    Rows,
    Sample,
    Tiled,
)
from .weights import Linear, Matrix, Norm, Shape, Weights, padded

# Rows of one pass of a prompt at most.
MAX_ROWS = 512
# Rows whose logits are computed together.
LOGIT_ROWS = 64

_PLAIN, _QKV, _ACTIVATE = range(3)
# Values of a row that a product normalises itself at most, and the shared memory that every architecture has.
_FUSED_C, _FUSED_SMEM = Rows.COLUMNS * BLOCK, 99 << 10
# Bytes.
_INT, _FLOAT, _BFLOAT16, _U64 = 4, 4, 2, 8


class Room:
    """Buffers of a pass of up to `n_rows` rows: what its rows are, and activations."""

    def __init__(
        self, machine: Machine, shape: Shape, n_rows: int, *, n_sequences: int, n_logits: int
    ) -> None:
        """Take the memory; RuntimeError where it lacks."""
        config = shape.config
        self.n_rows = n_rows
        self.n_logits = n_logits
        self.n_blocks = _over(config.n_ctx, POSITIONS)
        rows = padded(n_rows, Tiled.ROWS)

        def ints(count: int) -> Buffer:
            return machine.alloc(_INT * count)

        def operand(parts: int, width: int, height: int = rows) -> Buffer:
            return machine.alloc(height * width * (_BFLOAT16 * parts or _FLOAT))

        # Of each row: its token, its position (below 0: not in use), the sequence it belongs to.
        self.tokens, self.positions, self.sequences = ints(n_rows), ints(n_rows), ints(n_rows)
        # Of each tile of attention: its first row, and how many.
        self.first_rows, self.counts = ints(n_rows), ints(n_rows)
        self.tables = machine.alloc(_U64 * n_sequences * self.n_blocks)
        self.x = tuple(machine.alloc(_FLOAT * rows * config.n_embd) for _ in range(2))
        splits = MAX_PARTIALS if shape.parts else 1
        self.partials = machine.alloc(_FLOAT * splits * rows * config.n_embd)
        self.normed = operand(shape.parts, shape.k)
        self.queries = operand(shape.query_parts, shape.attended)
        self.attended = operand(shape.parts, shape.attended)
        self.inner = operand(shape.parts, shape.inner)
        self.last = operand(shape.parts, shape.k, padded(n_logits, Tiled.ROWS))
        self.logits = machine.alloc(_FLOAT * n_logits * shape.vocab)
        self.hidden = operand(0, shape.k, n_logits)
        self.plane_rows = rows


@dataclass(frozen=True)
class Sampling:
    """Buffers of the rows that tokens are chosen for; see sample.cu."""

    settings: Buffer
    history: Buffer
    steps: Buffer
    mailbox: Mailbox
    n_slots: int


@dataclass
class Stream:
    """The residual stream while it goes through the layers: where it is, and what is to be added to it."""

    x: int = 0
    n_partials: int = 0
    bias: Buffer | None = None


class Plan:
    """The launches of a model's passes over one room."""

    def __init__(self, shape: Shape, weights: Weights, room: Room) -> None:
        """Nothing is launched here."""
        self._shape, self._weights, self._room = shape, weights, room

    def layers(self, n_rows: int, n_tiles: int, *, prompt: bool) -> tuple[list[Launch], Stream]:
        """From the rows' tokens to the stream after the last layer; keys and values go into the cache."""
        config, room = self._shape.config, self._room
        wte = self._weights.wte
        launches = [
            Launch(
                "embed",
                (n_rows, 1, 1),
                BLOCK,
                0,
                (
                    *(room.tokens, room.positions, wte.data, int(self._shape.parts == 0), wte.k),
                    *(self._weights.wpe, room.x[0], config.n_embd),
                ),
            )
        ]
        stream = Stream()
        for layer, block in enumerate(self._weights.blocks):
            qkv = self._to(
                _QKV,
                block.c_attn.bias,
                3 * self._shape.attended,
                room.queries,
                parts=self._shape.query_parts,
                stride=self._shape.attended,
                layer=layer,
            )
            launches += self._normed_product(stream, block.ln_1, block.c_attn.weight, n_rows, qkv, prompt)
            launches.append(self._attention(layer, n_tiles))
            launches += self._into_stream(stream, block.attn_c_proj, room.attended, n_rows, prompt)
            act = self._to(
                _ACTIVATE,
                block.c_fc.bias,
                self._shape.inner,
                room.inner,
                parts=self._shape.parts,
                stride=self._shape.inner,
            )
            launches += self._normed_product(stream, block.ln_2, block.c_fc.weight, n_rows, act, prompt)
            launches += self._into_stream(stream, block.mlp_c_proj, room.inner, n_rows, prompt)
        return launches, stream

    def step(self, n_rows: int) -> list[Launch]:
        """One token for each row: from the tokens to the logits (n_rows, vocab)."""
        launches, stream = self.layers(n_rows, n_rows, prompt=False)
        head = self._weights.lm_head
        launches += self._normed_product(stream, self._weights.ln_f, head, n_rows, self._logits(), False)
        return launches

    def sample(self, n_rows: int, sampling: Sampling) -> Launch:
        """The next token of each row from its logits, taken in as the row's token."""
        room, config = self._room, self._shape.config
        return Launch(
            "sample",
            (n_rows, 1, 1),
            Sample.THREADS,
            _U64 * (Sample.BINS + Sample.SUMS + 3),  # and three results
            (
                *(room.logits, self._shape.vocab, config.n_vocab, sampling.settings),
                *(room.tokens, room.positions),
                *(sampling.history, config.n_ctx, sampling.mailbox, sampling.n_slots, sampling.steps),
            ),
        )

    def logits(self, stream: Stream, first: int, n_rows: int) -> list[Launch]:
        """Logits of rows first .. first + n_rows, at most `LOGIT_ROWS`."""
        room = self._room
        norm = self._norm(stream, self._weights.ln_f, n_rows, room.last, self._shape.parts, first)
        return [
            norm,
            self._product(self._weights.lm_head, room.last, self._shape.k, n_rows, self._logits(), True),
        ]

    def hidden(self, stream: Stream, first: int, n_rows: int) -> Launch:
        """Rows after ln_f, as float32 (n_rows, k)."""
        return self._norm(stream, self._weights.ln_f, n_rows, self._room.hidden, 0, first)

    def _logits(self) -> _Output:
        shape = self._shape
        return self._to(_PLAIN, None, shape.config.n_vocab, self._room.logits, parts=0, stride=shape.vocab)

    def _to(
        self, mode: int, bias: Buffer | None, n: int, out: Buffer, *, parts: int, stride: int, layer: int = 0
    ) -> _Output:
        return _Output(mode, bias or self._room.partials, n, out, parts, stride, layer)

    def _epilogue(self, output: _Output) -> tuple[Buffer | int | float, ...]:
        room, shape = self._room, self._shape
        # Logits have no planes.
        plane = 0 if output.out is room.logits else room.plane_rows * output.stride
        return (
            *(output.mode, output.bias, output.n, output.out, output.parts, output.stride, plane),
            *(shape.activation, room.positions, room.sequences, room.tables, room.n_blocks, output.layer),
            *(shape.config.n_head, shape.head, int(shape.wide)),
        )

    def _stream(self, stream: Stream) -> tuple[Buffer | int | float, ...]:
        """The stream's arguments: the last is where its sum goes, if anything is to be added."""
        room = self._room
        plane = room.plane_rows * self._shape.config.n_embd
        return (
            *(room.x[stream.x], room.partials, stream.n_partials, plane),
            *(stream.bias or room.partials, room.x[1 - stream.x]),
        )

    def _norm(
        self, stream: Stream, norm: Norm, n_rows: int, out: Buffer, parts: int, first: int = 0
    ) -> Launch:
        shape, config = self._shape, self._shape.config
        height = (
            self._room.plane_rows if out is self._room.normed else padded(self._room.n_logits, Tiled.ROWS)
        )
        return Launch(
            "layer_norm",
            (n_rows, 1, 1),
            BLOCK,
            _FLOAT * (BLOCK + 1),  # a sum a thread, and that of the row
            (
                *self._stream(stream),
                *(norm.gain, norm.shift, config.layer_norm_epsilon, config.n_embd),
                *(out, parts, shape.k, height * shape.k, first),
            ),
        )

    def _fused_smem(self, n_rows: int) -> int:
        """Shared memory of a product with its LayerNorm: the operand; then a sum a thread of each row, and
        those of the rows, where the warps' sums follow."""
        k = self._shape.k
        stride = k if k % 64 else k + 32  # padded_stride of matmul.cu
        operand = _BFLOAT16 * self._shape.parts * min(n_rows, Rows.ROWS) * stride
        return operand + _FLOAT * Rows.ROWS * (BLOCK + 1)

    def _fuses(self) -> bool:
        fits = self._fused_smem(Rows.ROWS) <= _FUSED_SMEM
        return self._shape.parts > 0 and self._shape.k <= _FUSED_C and fits

    def _normed_product(
        self, stream: Stream, norm: Norm, matrix: Matrix, n_rows: int, output: _Output, prompt: bool
    ) -> Iterator[Launch]:
        shape, room = self._shape, self._room
        if prompt or not self._fuses():
            yield self._norm(stream, norm, n_rows, room.normed, shape.parts)
            yield self._product(matrix, room.normed, shape.k, n_rows, output, prompt)
        else:
            yield Launch(
                f"norm_matmul_{shape.parts}",
                (_over(matrix.tiles * matrix.warps, Rows.WARPS), _over(n_rows, Rows.ROWS), 1),
                BLOCK,
                self._fused_smem(n_rows),
                (
                    *(matrix.data, matrix.tiles, matrix.groups, matrix.warps, *self._stream(stream)),
                    *(norm.gain, norm.shift, shape.config.layer_norm_epsilon, shape.config.n_embd, n_rows),
                    *self._epilogue(output),
                ),
            )
        if stream.n_partials:  # the launch has stored the sum
            stream.x, stream.n_partials = 1 - stream.x, 0

    def _product(
        self, matrix: Matrix, operand: Buffer, stride: int, n_rows: int, output: _Output, prompt: bool
    ) -> Launch:
        shape, room = self._shape, self._room
        height = padded(room.n_logits, Tiled.ROWS) if operand is room.last else room.plane_rows
        tail = self._epilogue(output)
        if shape.parts == 0:
            grid = (matrix.n // Float32.OUTPUTS, _over(n_rows, Float32.ROWS), 1)
            # A ring of stages, each with weights and rows.
            smem = _FLOAT * Float32.STAGES * Float32.STEP * (Float32.OUTPUTS + Float32.ROWS)
            arguments = (matrix.data, matrix.k, operand, stride, n_rows, *tail)
            return Launch("matmul_float32", grid, BLOCK, smem, arguments)
        rows = (operand, stride, height * stride, n_rows)
        if prompt:
            grid = (matrix.n // Tiled.OUTPUTS, _over(n_rows, Tiled.ROWS), matrix.splits)
            # The same of bfloat16: a group of weights, and of each part of the rows.
            smem = _BFLOAT16 * Tiled.STAGES * GROUP * (Tiled.OUTPUTS + shape.parts * Tiled.ROWS)
            head = (matrix.data, matrix.groups, matrix.warps)
            return Launch(f"tiled_matmul_{shape.parts}", grid, BLOCK, smem, (*head, *rows, *tail))
        blocks = _over(matrix.tiles * matrix.warps, Rows.WARPS)
        grid = (blocks, _over(n_rows, Rows.ROWS), matrix.splits)
        smem = _FLOAT * Rows.WARPS * Rows.ROWS * TILE  # of each warp, the sums of its tile
        own = (matrix.data, matrix.tiles, matrix.groups, matrix.warps)
        return Launch(f"matmul_{shape.parts}", grid, BLOCK, smem, (*own, *rows, *tail))

    def _into_stream(
        self, stream: Stream, linear: Linear, operand: Buffer, n_rows: int, prompt: bool
    ) -> Iterator[Launch]:
        c = self._shape.config.n_embd
        output = self._to(_PLAIN, None, c, self._room.partials, parts=0, stride=c)
        yield self._product(linear.weight, operand, linear.weight.k, n_rows, output, prompt)
        stream.n_partials, stream.bias = linear.weight.splits, linear.bias

    def _attention(self, layer: int, n_tiles: int) -> Launch:
        shape, room = self._shape, self._room
        plane = room.plane_rows * shape.attended
        arguments = (
            *(room.queries, shape.attended, plane, room.first_rows, room.counts, room.positions),
            *(room.sequences, room.tables, room.n_blocks, layer, shape.config.n_head, shape.head),
            *(shape.scale(layer), room.attended, shape.parts, plane),
        )
        if shape.wide:
            grid = (n_tiles, shape.config.n_head, _over(shape.head, Attention.RUN))
            smem = _FLOAT * (Attention.RUN + Attention.RUN // WARP)  # weights of a run, and a value a warp
            return Launch("attention_float32", grid, Attention.RUN, smem, arguments)
        grid = (n_tiles, shape.config.n_head, _over(shape.head, Attention.CHANNELS))
        # Of a run and query: weighted values, maximum and sum.
        smem = _FLOAT * Attention.WARPS * Attention.QUERIES * (Attention.CHANNELS + 2)
        return Launch(f"attention_{shape.query_parts}", grid, BLOCK, smem, arguments)


def _over(n: int, size: int) -> int:
    """Pieces of `size` that n needs."""
    return -(-n // size)


@dataclass(frozen=True)
class _Output:
    """Where a product's outputs go; see epilogue.cuh."""

    mode: int
    bias: Buffer
    n: int
    out: Buffer
    parts: int
    stride: int
    layer: int
