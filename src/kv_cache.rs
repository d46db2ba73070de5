//! Keys and values of one sequence, in blocks that sequences share until one of them writes.
//!
//! A block holds [`BLOCK`] positions of all layers and heads, `[layer][head][block_len(head size)]`; see
//! [`crate::ops::attention`] for what is inside. Forking a sequence clones its list of blocks; appending to a block that
//! is shared copies that block first.

use crate::config::{Config, Dtype};
use crate::ops::attention::{self, BLOCK};
use crate::simd::Element;
use half::bf16;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// The cache of one sequence; `clone` forks it.
#[derive(Clone)]
pub enum KvCache {
    /// float32 keys and values.
    F32(Cache<f32>),
    /// bfloat16 keys and values, rounded to nearest even.
    BF16(Cache<bf16>),
}

impl KvCache {
    /// Positions held.
    pub fn len(&self) -> usize {
        match self {
            KvCache::F32(cache) => cache.len,
            KvCache::BF16(cache) => cache.len,
        }
    }

    /// Whether no position is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Forgets all but the first `len` positions.
    pub fn truncate(&mut self, len: usize) {
        match self {
            KvCache::F32(cache) => cache.truncate(len),
            KvCache::BF16(cache) => cache.truncate(len),
        }
    }
}

/// Where the caches of a model get their blocks, and leave them: fresh memory costs more than what is written to it.
pub enum Blocks {
    /// For float32 caches.
    F32(Arc<Supply<f32>>),
    /// For bfloat16 caches.
    BF16(Arc<Supply<bf16>>),
}

impl Blocks {
    /// Blocks for a model of this shape.
    pub fn new(config: &Config, dtype: Dtype) -> Blocks {
        match dtype {
            Dtype::F32 => Blocks::F32(Arc::new(Supply::new(config))),
            Dtype::BF16 => Blocks::BF16(Arc::new(Supply::new(config))),
        }
    }

    /// An empty cache.
    pub fn new_cache(&self) -> KvCache {
        match self {
            Blocks::F32(supply) => KvCache::F32(Cache::new(supply)),
            Blocks::BF16(supply) => KvCache::BF16(Cache::new(supply)),
        }
    }
}

/// Blocks of one shape that no cache uses at the moment.
pub struct Supply<T> {
    n_layer: usize,
    n_head: usize,
    /// Elements of one head of one layer in a block.
    head_len: usize,
    /// As many blocks as a sequence of the longest length has; more are given back to the system.
    kept: usize,
    free: Mutex<Vec<Arc<[T]>>>,
}

impl<T: Element> Supply<T> {
    fn new(config: &Config) -> Supply<T> {
        Supply {
            n_layer: config.n_layer,
            n_head: config.n_head,
            head_len: attention::block_len(config.head_size()),
            kept: config.n_ctx.div_ceil(BLOCK),
            free: Mutex::default(),
        }
    }

    /// A block of unspecified content: positions that were not written are never looked at.
    fn take(&self) -> Arc<[T]> {
        let used = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
        used.unwrap_or_else(|| {
            std::iter::repeat_n(T::default(), self.n_layer * self.n_head * self.head_len).collect()
        })
    }

    fn give_back(&self, blocks: impl Iterator<Item = Arc<[T]>>) {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        for block in blocks {
            if free.len() < self.kept && Arc::strong_count(&block) == 1 {
                free.push(block);
            }
        }
    }
}

/// Blocks of keys and values of one type.
#[derive(Clone)]
pub struct Cache<T: Element> {
    supply: Arc<Supply<T>>,
    len: usize,
    blocks: Vec<Arc<[T]>>,
}

impl<T: Element> Drop for Cache<T> {
    fn drop(&mut self) {
        self.supply.give_back(self.blocks.drain(..));
    }
}

/// A type that caches are held in.
pub trait CacheElement: Element {
    /// The cache of this type.
    ///
    /// # Panics
    /// When the cache is of another type: a model gives all its sequences the same.
    fn of(cache: &mut KvCache) -> &mut Cache<Self>;
}

impl CacheElement for f32 {
    fn of(cache: &mut KvCache) -> &mut Cache<f32> {
        match cache {
            KvCache::F32(cache) => cache,
            KvCache::BF16(_) => panic!("a bfloat16 cache where float32 is meant"),
        }
    }
}

impl CacheElement for bf16 {
    fn of(cache: &mut KvCache) -> &mut Cache<bf16> {
        match cache {
            KvCache::BF16(cache) => cache,
            KvCache::F32(_) => panic!("a float32 cache where bfloat16 is meant"),
        }
    }
}

impl<T: Element> Cache<T> {
    fn new(supply: &Arc<Supply<T>>) -> Cache<T> {
        Cache { supply: Arc::clone(supply), len: 0, blocks: Vec::new() }
    }

    fn truncate(&mut self, len: usize) {
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
    pub fn heads(&mut self, layer: usize) -> Vec<Head<'_, T>> {
        let (past, written) = self.blocks.split_at_mut(self.len / BLOCK);
        let (past, first) = (&*past, past.len());
        let Supply { n_head, head_len, .. } = *self.supply;
        let layer_len = n_head * head_len;
        let mut heads: Vec<Head<'_, T>> = (0..n_head)
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
                head.written.push(block);
            }
        }
        heads
    }
}

/// One head of one layer of a sequence.
pub struct Head<'a, T> {
    past: &'a [Arc<[T]>],
    /// Index of the first block that is written.
    first: usize,
    /// The head's place in a past block.
    range: Range<usize>,
    written: Vec<&'a mut [T]>,
}

impl<T: Element> Head<'_, T> {
    /// Writes the key and the value (HS each) of `position`.
    pub fn append(&mut self, position: usize, key: &[f32], value: &[f32]) {
        attention::append(self.written[position / BLOCK - self.first], position % BLOCK, key, value);
    }

    /// All blocks from position 0 on.
    pub fn blocks(&self) -> Vec<&[T]> {
        let past = self.past.iter().map(|block| &block[self.range.clone()]);
        past.chain(self.written.iter().map(|block| &**block)).collect()
    }
}
