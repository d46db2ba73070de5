//! Keys and values of one sequence, in blocks that sequences share until one of them writes.
//!
//! A block holds [`BLOCK`] positions of all layers and heads, `[layer][head][block_bytes(head size)]`; see
//! [`crate::ops::attention`] for what is inside. Forking a sequence clones its list of blocks; appending to a block that
//! is shared copies that block first.

use crate::config::{Config, Dtype};
use crate::mapped::Line;
use crate::ops::attention::{self, BLOCK};
use crate::ops::pairs::{Bf16, F32, Int8};
use bytemuck::Zeroable;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// Where the caches of a model get their blocks, and leave them: fresh memory costs more than what is written to it.
pub struct Supply {
    n_layer: usize,
    n_head: usize,
    /// Lines of one head of one layer in a block.
    head_len: usize,
    /// As many blocks as a sequence of the longest length has; more are given back to the system.
    kept: usize,
    free: Mutex<Vec<Arc<[Line]>>>,
}

impl Supply {
    /// Blocks for a model of this shape.
    ///
    /// # Panics
    /// For int4, which no cache is held in.
    pub fn new(config: &Config, dtype: Dtype) -> Supply {
        let hs = config.head_size();
        let head_bytes = match dtype {
            Dtype::F32 => attention::block_bytes::<F32>(hs),
            Dtype::BF16 => attention::block_bytes::<Bf16>(hs),
            Dtype::Int8 => attention::block_bytes::<Int8>(hs),
            Dtype::Int4 => panic!("no cache is held in int4"),
        };
        Supply {
            n_layer: config.n_layer,
            n_head: config.n_head,
            head_len: head_bytes / size_of::<Line>(),
            kept: config.n_ctx.div_ceil(BLOCK),
            free: Mutex::default(),
        }
    }

    /// Bytes of a block: keys and values of [`BLOCK`] positions.
    pub fn block_bytes(&self) -> usize {
        self.n_layer * self.n_head * self.head_len * size_of::<Line>()
    }

    /// A block that was zero when it was new: positions that were not written are never looked at, and what no position
    /// writes stays zero.
    fn take(&self) -> Arc<[Line]> {
        let used = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
        used.unwrap_or_else(|| {
            std::iter::repeat_n(Line::zeroed(), self.n_layer * self.n_head * self.head_len).collect()
        })
    }

    fn give_back(&self, blocks: impl Iterator<Item = Arc<[Line]>>) {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        for block in blocks {
            if free.len() < self.kept && Arc::strong_count(&block) == 1 {
                free.push(block);
            }
        }
    }
}

/// The cache of one sequence; `clone` forks it.
#[derive(Clone)]
pub struct KvCache {
    supply: Arc<Supply>,
    len: usize,
    blocks: Vec<Arc<[Line]>>,
}

impl Drop for KvCache {
    fn drop(&mut self) {
        self.supply.give_back(self.blocks.drain(..));
    }
}

impl KvCache {
    /// An empty cache.
    pub fn new(supply: &Arc<Supply>) -> KvCache {
        KvCache { supply: Arc::clone(supply), len: 0, blocks: Vec::new() }
    }

    /// Positions held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no position is held.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Forgets all but the first `len` positions.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
        self.supply.give_back(self.blocks.drain(self.len.div_ceil(BLOCK)..));
    }

    /// Makes room for `count` more positions in blocks that no other sequence shares.
    pub fn reserve(&mut self, count: usize) {
        let first_written = self.len / BLOCK;
        for block in self.blocks.iter_mut().skip(first_written) {
            Arc::make_mut(block);
        }
        let wanted = (self.len + count).div_ceil(BLOCK);
        self.blocks.resize_with(wanted, || self.supply.take());
    }

    /// Counts `count` positions as written, in every layer.
    pub fn advance(&mut self, count: usize) {
        self.len += count;
    }

    /// The heads of a layer, each to be read whole and written from position `len` on, by one thread each.
    ///
    /// # Panics
    /// When `reserve` was not called before.
    pub fn heads(&mut self, layer: usize) -> Vec<Head<'_>> {
        let (past, written) = self.blocks.split_at_mut(self.len / BLOCK);
        let (past, first) = (&*past, past.len());
        let Supply { n_head, head_len, .. } = *self.supply;
        let layer_len = n_head * head_len;
        let mut heads: Vec<Head<'_>> = (0..n_head)
            .map(|head| {
                let start = layer * layer_len + head * head_len;
                let range = start..start + head_len;
                Head { past, first, range, written: Vec::with_capacity(written.len()) }
            })
            .collect();
        for block in written {
            let block = Arc::get_mut(block).expect("reserve() made these blocks this sequence's own");
            let layer = &mut block[layer * layer_len..(layer + 1) * layer_len];
            for (head, block) in heads.iter_mut().zip(layer.chunks_exact_mut(head_len)) {
                head.written.push(bytemuck::cast_slice_mut(block));
            }
        }
        heads
    }
}

/// One head of one layer of a sequence.
pub struct Head<'a> {
    past: &'a [Arc<[Line]>],
    /// Index of the first block that is written.
    first: usize,
    /// The head's place in a past block.
    range: Range<usize>,
    written: Vec<&'a mut [u8]>,
}

impl<'a> Head<'a> {
    /// The blocks that are written, and the position that the first of them begins with.
    pub fn written(&mut self) -> (&mut [&'a mut [u8]], usize) {
        (&mut self.written, self.first * BLOCK)
    }

    /// All blocks from position 0 on.
    pub fn blocks(&self) -> Vec<&[u8]> {
        let past = self.past.iter().map(|block| bytemuck::cast_slice(&block[self.range.clone()]));
        past.chain(self.written.iter().map(|block| &**block)).collect()
    }
}
