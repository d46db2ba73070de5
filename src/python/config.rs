//! The shape of a model.

use crate::config;
use crate::weights::{self, Dtype};
use pyo3::prelude::*;

/// The shape of a model.
#[pyclass(frozen, module = "gpt2rs._core")]
pub(super) struct Config(pub(super) config::Config);

#[pymethods]
impl Config {
    /// Reads a Hugging Face `config.json`, a textbook's config or nanoGPT's `model_args`; ValueError names the field.
    #[staticmethod]
    fn from_json(text: &str) -> PyResult<Config> {
        Ok(Config(config::Config::from_json(text)?))
    }
    /// The config of `gpt2`, `gpt2-medium`, `gpt2-large` or `gpt2-xl`.
    #[staticmethod]
    fn preset(name: &str) -> PyResult<Config> {
        Ok(Config(config::Config::preset(name)?))
    }
    /// A `config.json` that transformers loads.
    fn to_json(&self) -> String {
        self.0.to_json()
    }
    /// Tokens in the vocabulary (V).
    #[getter]
    fn n_vocab(&self) -> usize {
        self.0.n_vocab
    }
    /// Positions: the longest sequence.
    #[getter]
    fn n_ctx(&self) -> usize {
        self.0.n_ctx
    }
    /// Channels (C).
    #[getter]
    fn n_embd(&self) -> usize {
        self.0.n_embd
    }
    /// Blocks (L).
    #[getter]
    fn n_layer(&self) -> usize {
        self.0.n_layer
    }
    /// Attention heads (NH).
    #[getter]
    fn n_head(&self) -> usize {
        self.0.n_head
    }
    /// Channels inside the MLP.
    #[getter]
    fn n_inner(&self) -> usize {
        self.0.n_inner
    }
    /// Channels of a head (HS).
    #[getter]
    fn head_size(&self) -> usize {
        self.0.head_size()
    }
    /// Added to the variance in every LayerNorm.
    #[getter]
    fn layer_norm_epsilon(&self) -> f32 {
        self.0.layer_norm_epsilon
    }
    /// The MLP's activation, by the name that the file gave it.
    #[getter]
    fn activation_function(&self) -> &'static str {
        self.0.activation_name
    }
    /// Whether scores are divided by the square root of the head size.
    #[getter]
    fn scale_attn_weights(&self) -> bool {
        self.0.scale_attn_weights
    }
    /// Whether scores of block i are divided by i + 1 too.
    #[getter]
    fn scale_attn_by_inverse_layer_idx(&self) -> bool {
        self.0.scale_attn_by_inverse_layer_idx
    }
    /// Whether `wte` is the LM head as well.
    #[getter]
    fn tie_word_embeddings(&self) -> bool {
        self.0.tie_word_embeddings
    }
    /// The token that begins a text, or None.
    #[getter]
    fn bos_token_id(&self) -> Option<u32> {
        self.0.bos_token_id
    }
    /// The first of the tokens that end a text, or None.
    #[getter]
    fn eos_token_id(&self) -> Option<u32> {
        self.0.eos_token_ids.first().copied()
    }
    /// All tokens that end a text.
    #[getter]
    fn eos_token_ids(&self) -> Vec<u32> {
        self.0.eos_token_ids.clone()
    }
    /// The type that the file claims for its weights, or None.
    #[getter]
    fn dtype(&self) -> Option<&str> {
        self.0.dtype.as_deref()
    }
    /// Number of parameters; with `lm_head` a tied head counts a second time (124M against 163M).
    #[pyo3(signature = (*, lm_head = false))]
    fn num_parameters(&self, lm_head: bool) -> u64 {
        self.0.num_parameters(lm_head)
    }
    /// Bytes of the packed weights in `dtype` ("float32", "bfloat16", "int8" or "int4").
    fn memory_footprint(&self, dtype: &str) -> PyResult<u64> {
        Ok(weights::packed_bytes(&self.0, Dtype::from_name(dtype)?))
    }
    fn __eq__(&self, other: &Config) -> bool {
        self.0 == other.0
    }
    fn __repr__(&self) -> String {
        let config::Config { n_vocab, n_ctx, n_embd, n_layer, n_head, .. } = self.0;
        format!(
            "Config(n_layer={n_layer}, n_head={n_head}, n_embd={n_embd}, n_ctx={n_ctx}, n_vocab={n_vocab})"
        )
    }
}
