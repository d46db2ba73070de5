//! GPT-2 on the CPU: right, reproducible to the bit, at the limit of the hardware, small.
//!
//! The way of the data, which is also the modules' order:
//!
//! tokens -> embed -> blocks (ln_1, attention, ln_2, mlp) -> ln_f -> logits -> sample -> token
//!
//! | letter | meaning |
//! |---|---|
//! | B | sequences in a batch |
//! | T | tokens of a sequence |
//! | C | channels, `n_embd` |
//! | V | vocabulary, `n_vocab` |
//! | L | layers, `n_layer` |
//! | NH | heads, `n_head` |
//! | HS | head size, C / NH |
//! | K, N | inputs and outputs of a matrix |
//!
//! Modules, from what imports nothing to what imports all: [`error`], [`simd`], [`pool`], [`mapped`], [`philox`] and
//! [`config`]; [`checkpoint`] (where a file's tensors are); [`ops`] (one file an operation); [`kv_cache`]; [`packed`]
//! (files of packed weights); [`weights`] (tensors packed for the kernels); [`parallel`] (operations cut over threads); [`model`] (GPT-2); [`sample`];
//! [`session`] (prefill and decode); [`speculate`] (several tokens a pass); [`train`] (gradients and AdamW).

#![deny(unsafe_code)]
#![warn(missing_docs)]

pub mod checkpoint;
pub mod config;
pub mod error;
pub mod kv_cache;
#[allow(unsafe_code)]
pub mod mapped;
pub mod model;
pub mod ops;
pub mod packed;
pub mod parallel;
pub mod philox;
#[allow(unsafe_code)]
pub mod pool;
pub mod probe;
#[cfg(feature = "python")]
#[allow(unsafe_code)]
mod python;
pub mod sample;
pub mod save;
pub mod session;
#[allow(unsafe_code)]
pub mod simd;
pub mod speculate;
pub mod train;
pub mod weights;
