"""Sizes that the kernels are written for, under the names that they have there (`constexpr` of kernels/*).

`plan` makes grids and shared memory of them; tests hold them against the sources.
"""

from __future__ import annotations

from typing import Final

# prim.cuh: threads of a warp.
WARP: Final = 32
# rows.cuh: threads of a block, as a rule; sums of a product that a reader of the stream adds at most.
BLOCK: Final = 256
MAX_PARTIALS: Final = 4
# epilogue.cuh: positions of a block of keys and values.
POSITIONS: Final = 32
# fragments.cuh: inputs of a group, and outputs of a tile, of a matrix in fragments.
GROUP: Final = 32
TILE: Final = 16


class Rows:
    """matmul.cu: products for a few rows."""

    ROWS: Final = 8
    COLUMNS: Final = 7
    WARPS: Final = 8


class Tiled:
    """tiled.cu: products for prompts."""

    OUTPUTS: Final = 64
    ROWS: Final = 64
    STAGES: Final = 4


class Float32:
    """float32.cu: products with float32 weights."""

    OUTPUTS: Final = 32
    ROWS: Final = 8
    STEP: Final = 32
    STAGES: Final = 6


class Attention:
    """attention.cu: its queries, positions of a run, channels, and runs that a block has at a time."""

    QUERIES: Final = 16
    RUN: Final = 128
    CHANNELS: Final = 64
    WARPS: Final = 8


class Sample:
    """sample.cu."""

    THREADS: Final = 512
    BINS: Final = 1024
    SUMS: Final = 32
