//! The memory of a run, planned before anything is computed.

use super::Options;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::mapped::Arena;
use crate::ops::cross_entropy::BLOCK;
use crate::ops::{Rows, flash_attention, gemm, padded_stride};
use crate::pool::{Columns, share};
use std::ops::Range;

/// Most tokens whose logits are held at once.
const HEAD_TOKENS: usize = 224;

/// float32 values on huge pages, zeros at first.
pub struct Floats {
    arena: Arena,
}

impl Floats {
    /// Room for `len` values, taken from the system as they are first written.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn new(len: usize) -> Result<Floats> {
        let bytes = len * size_of::<f32>();
        Ok(Floats { arena: Arena::new(bytes).map_err(|source| Error::OutOfMemory { bytes, source })? })
    }

    /// The values.
    pub fn get(&self) -> &[f32] {
        bytemuck::cast_slice(self.arena.bytes())
    }

    /// The values, to be changed.
    pub fn get_mut(&mut self) -> &mut [f32] {
        bytemuck::cast_slice_mut(self.arena.bytes_mut())
    }
}

/// A row-major matrix of activations, its rows padded.
pub struct Buffer<'a> {
    data: &'a mut [f32],
    rows: usize,
    columns: usize,
}

impl Buffer<'_> {
    /// Values that a buffer takes.
    fn len(rows: usize, columns: usize) -> usize {
        rows * padded_stride(columns)
    }

    /// How many rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Distance between rows.
    pub fn stride(&self) -> usize {
        padded_stride(self.columns)
    }

    /// All rows.
    pub fn view(&self) -> Rows<'_> {
        Rows::new(self.data, self.stride(), self.columns)
    }

    /// All values, padding included.
    pub fn data_mut(&mut self) -> &mut [f32] {
        self.data
    }

    /// Columns that threads write, of rows from `first` on.
    pub fn split(
        &mut self,
        rows: Range<usize>,
        ranges: impl IntoIterator<Item = Range<usize>>,
    ) -> Vec<Columns<'_>> {
        let stride = self.stride();
        Columns::split(&mut self.data[rows.start * stride..rows.end * stride], stride, rows.len(), ranges)
    }

    /// The rows in `n` parts, each with its first row's number.
    pub fn split_rows(&mut self, n: usize) -> Vec<(usize, &mut [f32])> {
        let (rows, stride) = (self.rows, self.stride());
        let mut rest = &mut *self.data;
        let mut parts = Vec::with_capacity(n);
        for i in 0..n {
            let range = share(rows, n, i);
            let (part, after) = rest.split_at_mut(range.len() * stride);
            rest = after;
            parts.push((range.start, part));
        }
        parts
    }
}

/// What a block's forward pass leaves for its backward pass, beside its input.
pub struct Saved<'a> {
    /// (rows, 3C): queries, keys and values.
    pub qkv: Buffer<'a>,
    /// (rows, C): attention's output.
    pub attended: Buffer<'a>,
    /// (B, NH, T): logarithms of the attention's sums.
    pub lse: &'a mut [f32],
    /// (rows, C): the residual stream between attention and MLP.
    pub mid: Buffer<'a>,
    /// (rows, n_inner): what the activation function is applied to.
    pub fc: Buffer<'a>,
}

/// What a pass works with, block after block.
pub struct Room<'a> {
    /// (rows, C): a LayerNorm's output.
    pub normed: Buffer<'a>,
    /// (rows, C): what is added to the residual stream, or its gradient.
    pub branch: Buffer<'a>,
    /// (rows, n_inner): the activation function's output.
    pub hidden: Buffer<'a>,
    /// (rows, C): the residual stream's gradient.
    pub dx: Buffer<'a>,
    /// (rows, C): the gradient of what a matrix takes.
    pub dnormed: Buffer<'a>,
    /// (rows, n_inner).
    pub dfc: Buffer<'a>,
    /// (rows, 3C).
    pub dqkv: Buffer<'a>,
    /// (rows, 2): means and inverse deviations.
    pub moments: &'a mut [[f32; 2]],
    /// The head's.
    pub head: Head<'a>,
}

/// The head's room: logits of some tokens, token by column.
pub struct Head<'a> {
    /// (V, tokens).
    pub logits: &'a mut [f32],
    /// (blocks of V, tokens): maxima.
    pub maxima: &'a mut [f32],
    /// The same: sums of exponentials.
    pub sums: &'a mut [f32],
    /// Most tokens.
    pub tokens: usize,
}

/// All activations of a pass.
pub struct Activations<'a> {
    /// L + 1 times (rows, C): the input of each block, and of `ln_f`.
    pub x: Vec<Buffer<'a>>,
    /// One for each block, or one alone where they are recomputed.
    pub saved: Vec<Saved<'a>>,
    /// The rest.
    pub room: Room<'a>,
}

/// How much a micro-batch of (B, T) tokens takes.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// B, at most.
    pub batch_size: usize,
    /// T, at most.
    pub n_tokens: usize,
    /// Whether each block is computed again in the backward pass, not kept.
    pub recompute: bool,
}

impl Size {
    /// What the options ask for.
    pub fn of(options: &Options) -> Size {
        let &Options { batch_size, n_tokens, recompute, .. } = options;
        Size { batch_size, n_tokens, recompute }
    }

    fn rows(self) -> usize {
        self.batch_size * self.n_tokens
    }

    /// Tokens whose logits are held at once: fewer than all, unless they are few.
    fn head_tokens(self) -> usize {
        let rows = self.rows();
        rows.div_ceil(rows.div_ceil(HEAD_TOKENS).max(2)).max(32).min(rows)
    }

    /// What is allocated: (what, bytes).
    pub fn plan(self, config: &Config, parameters: usize, n_threads: usize) -> Vec<(&'static str, usize)> {
        let bytes = |floats: usize| floats * size_of::<f32>();
        let rows = self.rows();
        let kept =
            if self.recompute { "inputs of the blocks" } else { "inputs and activations of the blocks" };
        vec![
            ("weights", bytes(parameters)),
            ("gradients", bytes(parameters)),
            ("first moments", bytes(parameters)),
            ("second moments", bytes(parameters)),
            (kept, bytes(self.kept(config, rows))),
            ("activations and gradients of one block", bytes(self.working(config, rows))),
            ("logits of some tokens", bytes(self.logits(config))),
            ("packed factors and attention's blocks of the threads", n_threads * self.of_thread(config)),
        ]
    }

    /// Bytes of each thread's own.
    fn of_thread(self, config: &Config) -> usize {
        gemm::Scratch::BYTES + flash_attention::Scratch::bytes(self.n_tokens, config.head_size())
    }

    /// Values of all activations.
    pub fn activations(self, config: &Config) -> usize {
        let rows = self.rows();
        self.kept(config, rows) + self.working(config, rows) + self.logits(config)
    }

    fn saved(self, config: &Config, rows: usize) -> usize {
        let &Config { n_embd: c, n_inner, n_head, .. } = config;
        Buffer::len(rows, 3 * c)
            + 2 * Buffer::len(rows, c)
            + whole(n_head * rows)
            + Buffer::len(rows, n_inner)
    }

    fn kept(self, config: &Config, rows: usize) -> usize {
        let blocks = if self.recompute { 0 } else { config.n_layer * self.saved(config, rows) };
        (config.n_layer + 1) * Buffer::len(rows, config.n_embd) + blocks
    }

    fn working(self, config: &Config, rows: usize) -> usize {
        let &Config { n_embd: c, n_inner, .. } = config;
        let block = if self.recompute { self.saved(config, rows) } else { 0 };
        block
            + 4 * Buffer::len(rows, c)
            + 2 * Buffer::len(rows, n_inner)
            + Buffer::len(rows, 3 * c)
            + whole(2 * rows)
    }

    fn logits(self, config: &Config) -> usize {
        let stride = padded_stride(self.head_tokens());
        (config.n_vocab + 2 * config.n_vocab.div_ceil(BLOCK)) * stride
    }

    /// Cuts the memory of all activations for a micro-batch of `rows` tokens.
    ///
    /// # Panics
    /// When the memory is too small.
    pub fn cut<'a>(self, config: &Config, rows: usize, memory: &'a mut [f32]) -> Activations<'a> {
        let &Config { n_embd: c, n_inner, n_head, n_layer, n_vocab, .. } = config;
        let mut memory = Memory(memory);
        let x = (0..=n_layer).map(|_| memory.buffer(rows, c)).collect();
        let saved = |_| Saved {
            qkv: memory.buffer(rows, 3 * c),
            attended: memory.buffer(rows, c),
            lse: memory.floats(n_head * rows),
            mid: memory.buffer(rows, c),
            fc: memory.buffer(rows, n_inner),
        };
        let blocks = if self.recompute { n_layer.min(1) } else { n_layer };
        let saved = (0..blocks).map(saved).collect();
        let tokens = self.head_tokens().min(rows);
        let stride = padded_stride(tokens);
        let blocks = n_vocab.div_ceil(BLOCK);
        let room = Room {
            normed: memory.buffer(rows, c),
            branch: memory.buffer(rows, c),
            hidden: memory.buffer(rows, n_inner),
            dx: memory.buffer(rows, c),
            dnormed: memory.buffer(rows, c),
            dfc: memory.buffer(rows, n_inner),
            dqkv: memory.buffer(rows, 3 * c),
            moments: bytemuck::cast_slice_mut(memory.floats(2 * rows)),
            head: Head {
                logits: memory.floats(n_vocab * stride),
                maxima: memory.floats(blocks * stride),
                sums: memory.floats(blocks * stride),
                tokens,
            },
        };
        Activations { x, saved, room }
    }
}

/// Whole cache lines of values.
fn whole(len: usize) -> usize {
    len.next_multiple_of(16)
}

/// What has not been given out yet.
struct Memory<'a>(&'a mut [f32]);

impl<'a> Memory<'a> {
    fn floats(&mut self, len: usize) -> &'a mut [f32] {
        let (taken, rest) = std::mem::take(&mut self.0).split_at_mut(whole(len));
        self.0 = rest;
        &mut taken[..len]
    }

    fn buffer(&mut self, rows: usize, columns: usize) -> Buffer<'a> {
        Buffer { data: self.floats(Buffer::len(rows, columns)), rows, columns }
    }
}
