"""Keys and values in device memory: blocks of 32 positions that sequences share until one of them writes."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable

import numpy as np

from .machine import Buffer, Launch, Machine
from .sizes import BLOCK, POSITIONS
from .weights import Shape

# New blocks are taken from the machine so many bytes at a time, or one block.
_SLAB_BYTES = 32 << 20
_COPY_BLOCKS = 64


class Block:
    """One block's address, and how many sequences have it."""

    __slots__ = ("address", "owners")

    def __init__(self, address: int) -> None:
        """A block of one owner."""
        self.address = address
        self.owners = 1


class Pool:
    """Where the caches of a model get their blocks, and leave them."""

    def __init__(self, machine: Machine, shape: Shape) -> None:
        """Empty: memory is taken when the first block is."""
        config = shape.config
        self._machine = machine
        element = 4 if shape.wide else 2
        self.block_bytes = max(256, 2 * config.n_layer * shape.attended * POSITIONS * element)
        self._slabs: list[Buffer] = []
        self._free: list[int] = []
        # Blocks of caches that were forgotten: in any thread, at any time, so that no lock may be waited for.
        self.abandoned: deque[list[Block]] = deque()

    def take(self) -> Block:
        """A block; what is in it is not to be read.  RuntimeError where memory lacks."""
        if not self._free:
            count = max(1, _SLAB_BYTES // self.block_bytes)
            slab = self._machine.alloc(count * self.block_bytes)
            self._slabs.append(slab)
            self._free = [slab.address + i * self.block_bytes for i in reversed(range(count))]
        return Block(self._free.pop())

    def give_back(self, block: Block) -> None:
        """One owner less."""
        block.owners -= 1
        if block.owners == 0:
            self._free.append(block.address)

    def reserve(self, wanted: Iterable[tuple[KvCache, int, int]]) -> None:
        """Make positions start .. end of each cache its own, with copies queued of what they hold before.

        RuntimeError where memory lacks.  Whatever is raised, no cache has a block without its copy.
        """
        self._collect()
        changes: list[tuple[KvCache, int, Block]] = []
        copies: list[tuple[Block, Block]] = []
        # Owners that a block loses by these changes: the last one writes to it.
        leaving: Counter[Block] = Counter()
        try:
            for cache, start, end in wanted:
                for i in range(start // POSITIONS, -(-end // POSITIONS)):
                    shared = cache.blocks[i] if i < len(cache.blocks) else None
                    if shared is not None and shared.owners - leaving[shared] == 1:
                        continue
                    changes.append((cache, i, self.take()))
                    if shared is not None:
                        leaving[shared] += 1
                        if i * POSITIONS < start:
                            copies.append((changes[-1][2], shared))
            self._copy(copies)
        except BaseException:
            for _, _, block in changes:
                self.give_back(block)
            raise
        for cache, i, own in changes:
            if i == len(cache.blocks):
                cache.blocks.append(own)
            else:
                shared, cache.blocks[i] = cache.blocks[i], own
                self.give_back(shared)

    def _collect(self) -> None:
        """Take back what was abandoned."""
        while self.abandoned:
            for block in self.abandoned.popleft():
                self.give_back(block)

    def _copy(self, pairs: list[tuple[Block, Block]]) -> None:
        """Queue copies of whole blocks, as (to, from)."""
        if not pairs:
            return
        addresses = np.array([(to.address, source.address) for to, source in pairs], np.uint64)
        buffer = self._machine.alloc(addresses.nbytes)
        self._machine.upload(buffer, addresses)
        n_words = self.block_bytes // 4
        self._machine.launch(
            Launch("copy_blocks", (_COPY_BLOCKS, len(pairs), 1), BLOCK, 0, (buffer, n_words))
        )


class KvCache:
    """The blocks of one sequence; calls are made under the model's lock."""

    def __init__(self, pool: Pool) -> None:
        """No blocks."""
        self._pool = pool
        self.blocks: list[Block] = []

    def __del__(self) -> None:
        """Leave the blocks to the pool."""
        self._pool.abandoned.append(self.blocks)

    @property
    def addresses(self) -> list[int]:
        """Of all blocks, in the order of their positions."""
        return [block.address for block in self.blocks]

    def fork(self) -> KvCache:
        """A second owner of the same blocks."""
        other = KvCache(self._pool)
        for block in self.blocks:
            block.owners += 1
        other.blocks = list(self.blocks)
        return other

    def truncate(self, n: int) -> None:
        """Keep the blocks of the first `n` positions."""
        keep = -(-n // POSITIONS)
        while len(self.blocks) > keep:
            self._pool.give_back(self.blocks.pop())
