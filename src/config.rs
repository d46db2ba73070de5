//! The shape of a model: what `config.json` says, checked once, so that nothing later has to.
//!
//! Sizes carry the checkpoint's names. Every field read from a file is bounded ([`MAX_VOCAB`] and its neighbours), so
//! that no product of sizes can overflow 64 bits; whether the tensors are really that large is for the loader to see.

mod fields;

use crate::error::{Error, Result};
use fields::{Fields, integer, parse, wrong};
use serde_json::{Value, json};

/// Most tokens a vocabulary may have.
pub const MAX_VOCAB: usize = (1 << 23) - 1;
/// Most positions a model may have.
pub const MAX_CTX: usize = 1 << 24;
/// Most channels.
pub const MAX_EMBD: usize = 1 << 17;
/// Most channels of the MLP's inner layer.
pub const MAX_INNER: usize = 1 << 20;
/// Most blocks.
pub const MAX_LAYER: usize = 1 << 14;
/// Most bytes of a config's text; the longest real ones have a few kilobytes.
pub const MAX_CONFIG_BYTES: usize = 1 << 20;

/// `<|endoftext|>` of the published vocabulary, which `GPT2Config` takes for both ends of a text.
const END_OF_TEXT: u32 = 50256;

const N_VOCAB: &[&str] = &["vocab_size", "n_vocab"];
// `n_ctx` of a Hugging Face config decides nothing there and is apart for that reason.
const N_POSITIONS: &[&str] = &["n_positions", "max_position_embeddings", "context_length", "block_size"];
const N_EMBD: &[&str] = &["n_embd", "hidden_size", "emb_dim"];
const N_LAYER: &[&str] = &["n_layer", "num_hidden_layers", "n_layers"];
const N_HEAD: &[&str] = &["n_head", "num_attention_heads", "n_heads"];

/// The type of weights or of a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// float32.
    F32,
    /// bfloat16.
    BF16,
    /// int8 with scales: of weights in groups, of a cache by head and position.
    Int8,
    /// Weights of four bits in groups with scales.
    Int4,
}

impl Dtype {
    const ALL: [Dtype; 4] = [Dtype::F32, Dtype::BF16, Dtype::Int8, Dtype::Int4];

    /// `float32`, `bfloat16`, `int8` or `int4`.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "float32",
            Dtype::BF16 => "bfloat16",
            Dtype::Int8 => "int8",
            Dtype::Int4 => "int4",
        }
    }

    /// Whether weights of this type are integers with scales.
    pub fn is_integer(self) -> bool {
        matches!(self, Dtype::Int8 | Dtype::Int4)
    }

    /// The type of weights of that name.
    ///
    /// # Errors
    /// [`Error::UnknownDtype`].
    pub fn from_name(name: &str) -> Result<Dtype> {
        Dtype::ALL
            .into_iter()
            .find(|dtype| dtype.name() == name)
            .ok_or_else(|| Error::UnknownDtype { name: name.to_owned() })
    }

    /// The type of caches of that name.
    ///
    /// # Errors
    /// [`Error::UnknownKvDtype`].
    pub fn of_cache(name: &str) -> Result<Dtype> {
        Dtype::from_name(name)
            .ok()
            .filter(|&dtype| dtype != Dtype::Int4)
            .ok_or_else(|| Error::UnknownKvDtype { name: name.to_owned() })
    }

    /// The type of a cache beside weights of this type, unless another is asked for.
    pub fn cache(self) -> Dtype {
        if self == Dtype::Int4 { Dtype::Int8 } else { self }
    }
}

/// How exactly activations enter products.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// As float32 beside float32 and bfloat16 weights; in int8 groups beside integer ones.
    Exact,
    /// Rounded to bfloat16, as bfloat16 weights are, for products and attention.
    Fast,
}

impl Precision {
    /// `exact` or `fast`.
    pub fn name(self) -> &'static str {
        match self {
            Precision::Exact => "exact",
            Precision::Fast => "fast",
        }
    }

    /// The precision of that name, for weights of `dtype`.
    ///
    /// # Errors
    /// [`Error::UnknownPrecision`], and [`Error::FastDtype`] for weights that are not bfloat16.
    pub fn from_name(name: &str, dtype: Dtype) -> Result<Precision> {
        match name {
            "exact" => Ok(Precision::Exact),
            "fast" if dtype == Dtype::BF16 => Ok(Precision::Fast),
            "fast" => Err(Error::FastDtype { dtype: dtype.name() }),
            _ => Err(Error::UnknownPrecision { name: name.to_owned() }),
        }
    }
}

/// The function between the two matrices of the MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`: `gelu_new`, `gelu_pytorch_tanh`, `gelu_fast`.
    GeluNew,
    /// `0.5 x (1 + erf(x / sqrt(2)))`: `gelu`.
    Gelu,
    /// `max(x, 0)`: `relu`.
    Relu,
    /// `x / (1 + exp(-x))`: `silu`, `swish`.
    Silu,
}

/// Names of Hugging Face's `ACT2FN` that a config may use, with the function each means.
const ACTIVATIONS: [(&str, Activation); 7] = [
    ("gelu_new", Activation::GeluNew),
    ("gelu_pytorch_tanh", Activation::GeluNew),
    ("gelu_fast", Activation::GeluNew),
    ("gelu", Activation::Gelu),
    ("relu", Activation::Relu),
    ("silu", Activation::Silu),
    ("swish", Activation::Silu),
];

/// A GPT-2 model's shape and the few choices its computation leaves open.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Tokens in the vocabulary: rows of `wte`.
    pub n_vocab: usize,
    /// Learned positions: rows of `wpe`, and the longest sequence.
    pub n_ctx: usize,
    /// Channels.
    pub n_embd: usize,
    /// Blocks; may be 0.
    pub n_layer: usize,
    /// Attention heads; divides `n_embd`.
    pub n_head: usize,
    /// Channels between the MLP's two matrices; a file's null means `4 * n_embd`.
    pub n_inner: usize,
    /// Added to the variance in every LayerNorm; finite and above 0.
    pub layer_norm_epsilon: f32,
    /// The MLP's activation.
    pub activation_function: Activation,
    /// The name that the config gave the activation; several names mean one function.
    pub activation_name: &'static str,
    /// Whether attention scores are divided by `sqrt(head_size)`.
    pub scale_attn_weights: bool,
    /// Whether the scores of block `i` are divided by `i + 1` too.
    pub scale_attn_by_inverse_layer_idx: bool,
    /// Whether `wte` is the LM head as well.
    pub tie_word_embeddings: bool,
    /// The token that begins a text, if the vocabulary has one.
    pub bos_token_id: Option<u32>,
    /// The tokens that end a text; ids that the vocabulary lacks are left out, since the model cannot say them.
    pub eos_token_ids: Vec<u32>,
    /// The type that the file claims for its weights (`"bfloat16"`), in its own words.
    pub dtype: Option<String>,
}

impl Config {
    /// Reads a config: Hugging Face's `config.json`, OpenAI's `hparams.json`, nanoGPT's `model_args` or the textbook's
    /// dictionary (`vocab_size, context_length, emb_dim, n_heads, n_layers, drop_rate, qkv_bias`).
    ///
    /// Two names of one size must agree, except that `n_positions` wins over `n_ctx`, as in transformers. What a file
    /// does not say is what its author's program takes for granted:
    ///
    /// - sizes: `GPT2Config`'s (those of 124M) when `model_type` says `gpt2`; otherwise a missing size is an error,
    ///   since such a file is more likely the wrong file than a short one;
    /// - activation: erf GELU for nanoGPT (it has `block_size`), `gelu_new` for all others;
    /// - `tie_word_embeddings`: false for the textbook (it has `emb_dim`), true for all others;
    /// - `bos_token_id` and `eos_token_id`: 50256 where the vocabulary has that token.
    ///
    /// # Errors
    /// One of the `Config...` variants of [`Error`], with the field, what it may be and what it is.
    pub fn from_json(text: &str) -> Result<Config> {
        let object = parse(text)?;
        let fields = Fields(&object);
        if let Some(found) = object.get("model_type").filter(|v| v.as_str() != Some("gpt2")) {
            return Err(wrong("model_type", "\"gpt2\"", found));
        }
        if fields.boolean("add_cross_attention", false)? {
            return Err(wrong(
                "add_cross_attention",
                "false (cross-attention is not supported)",
                &Value::Bool(true),
            ));
        }

        let n_vocab = fields.size(N_VOCAB, 1..=MAX_VOCAB, 50257)?;
        let old_n_ctx = fields.integer(&["n_ctx"], 1..=MAX_CTX)?;
        let n_ctx = match (fields.integer(N_POSITIONS, 1..=MAX_CTX)?, old_n_ctx) {
            (Some(n), _) | (None, Some(n)) => n,
            (None, None) => fields.size(N_POSITIONS, 1..=MAX_CTX, 1024)?,
        };
        let n_embd = fields.size(N_EMBD, 1..=MAX_EMBD, 768)?;
        let n_layer = fields.size(N_LAYER, 0..=MAX_LAYER, 12)?;
        let n_head = fields.size(N_HEAD, 1..=MAX_EMBD, 12)?;
        if n_embd % n_head != 0 {
            return Err(wrong(
                fields.name(N_HEAD),
                &format!("a divisor of n_embd ({n_embd})"),
                &json!(n_head),
            ));
        }
        let n_inner = match object.get("n_inner") {
            None | Some(Value::Null) => 4 * n_embd,
            Some(value) => integer("n_inner", value, 1..=MAX_INNER)?,
        };

        let usual = if object.contains_key("block_size") { "gelu" } else { "gelu_new" };
        let (activation_name, activation_function) = fields.activation(usual)?;
        Ok(Config {
            n_vocab,
            n_ctx,
            n_embd,
            n_layer,
            n_head,
            n_inner,
            layer_norm_epsilon: fields.epsilon()?,
            activation_function,
            activation_name,
            scale_attn_weights: fields.boolean("scale_attn_weights", true)?,
            scale_attn_by_inverse_layer_idx: fields.boolean("scale_attn_by_inverse_layer_idx", false)?,
            tie_word_embeddings: fields.boolean("tie_word_embeddings", !object.contains_key("emb_dim"))?,
            bos_token_id: fields.bos_token_id(n_vocab)?,
            eos_token_ids: fields.eos_token_ids(n_vocab)?,
            dtype: fields.dtype()?,
        })
    }

    /// The config of a published model: `gpt2`, `gpt2-medium`, `gpt2-large` or `gpt2-xl`, with or without
    /// `openai-community/` before it.
    ///
    /// # Errors
    /// [`Error::UnknownPreset`] for any other name.
    pub fn preset(name: &str) -> Result<Config> {
        let (n_layer, n_embd, n_head) = match name.strip_prefix("openai-community/").unwrap_or(name) {
            "gpt2" => (12, 768, 12),
            "gpt2-medium" => (24, 1024, 16),
            "gpt2-large" => (36, 1280, 20),
            "gpt2-xl" => (48, 1600, 25),
            _ => return Err(Error::UnknownPreset { name: name.to_owned() }),
        };
        Ok(Config {
            n_vocab: 50257,
            n_ctx: 1024,
            n_embd,
            n_layer,
            n_head,
            n_inner: 4 * n_embd,
            layer_norm_epsilon: 1e-5,
            activation_function: Activation::GeluNew,
            activation_name: "gelu_new",
            scale_attn_weights: true,
            scale_attn_by_inverse_layer_idx: false,
            tie_word_embeddings: true,
            bos_token_id: Some(END_OF_TEXT),
            eos_token_ids: vec![END_OF_TEXT],
            dtype: None,
        })
    }

    /// A `config.json` that transformers loads as this model, and [`Config::from_json`] reads back as this
    /// config. What does not bear on inference (dropout, initialisation) is left to transformers' defaults.
    pub fn to_json(&self) -> String {
        // Through its shortest decimal form: widening the float32 itself would print 9.999999747378752e-6.
        let epsilon: f64 =
            format!("{:e}", self.layer_norm_epsilon).parse().expect("a float's own digits parse");
        let eos = match self.eos_token_ids.as_slice() {
            [] => Value::Null,
            [id] => json!(id),
            ids => json!(ids),
        };
        let mut object = json!({
            "activation_function": self.activation_name,
            "add_cross_attention": false,
            "architectures": ["GPT2LMHeadModel"],
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos,
            "layer_norm_epsilon": epsilon,
            "model_type": "gpt2",
            "n_ctx": self.n_ctx,
            "n_embd": self.n_embd,
            "n_head": self.n_head,
            "n_inner": if self.n_inner == 4 * self.n_embd { Value::Null } else { json!(self.n_inner) },
            "n_layer": self.n_layer,
            "n_positions": self.n_ctx,
            "scale_attn_by_inverse_layer_idx": self.scale_attn_by_inverse_layer_idx,
            "scale_attn_weights": self.scale_attn_weights,
            "tie_word_embeddings": self.tie_word_embeddings,
            "vocab_size": self.n_vocab,
        });
        if let Some(dtype) = &self.dtype {
            // The older name: transformers 4 knows only this one, 5 reads both.
            object["torch_dtype"] = json!(dtype);
        }
        let mut text = serde_json::to_string_pretty(&object).expect("a JSON value prints");
        text.push('\n');
        text
    }

    /// Channels of one attention head.
    pub fn head_size(&self) -> usize {
        self.n_embd / self.n_head
    }

    /// What the attention scores of block `layer` (from 0) are multiplied by before the softmax.
    pub fn attn_scale(&self, layer: usize) -> f32 {
        let by_head = if self.scale_attn_weights { (self.head_size() as f64).sqrt() } else { 1.0 };
        let by_layer = if self.scale_attn_by_inverse_layer_idx { (layer + 1) as f64 } else { 1.0 };
        (1.0 / (by_head * by_layer)) as f32
    }

    /// The (K, N) shapes of one block's matrices, in the order of the computation: `attn.c_attn`, `attn.c_proj`,
    /// `mlp.c_fc`, `mlp.c_proj`.
    pub fn block_matrices(&self) -> [(usize, usize); 4] {
        let (c, i) = (self.n_embd, self.n_inner);
        [(c, 3 * c), (c, c), (c, i), (i, c)]
    }

    /// Number of parameters. A head of its own always counts; with `lm_head` one that is tied to `wte` counts a second
    /// time, as the textbooks do (124,439,808 against 163,037,184 for `gpt2`).
    pub fn num_parameters(&self, lm_head: bool) -> u64 {
        let matrices: u64 = self.block_matrices().iter().map(|&(k, n)| k as u64 * n as u64).sum();
        let embedding = self.n_vocab as u64 * self.n_embd as u64;
        let heads = u64::from(lm_head || !self.tie_word_embeddings);
        embedding * (1 + heads) + self.n_layer as u64 * matrices + self.vectors()
    }

    /// Parameters held as float32 whatever the weights' type: `wpe`, the norms' gains and biases, the biases.
    pub fn vectors(&self) -> u64 {
        let norm = 2 * self.n_embd as u64;
        let biases: u64 = self.block_matrices().iter().map(|&(_, n)| n as u64).sum();
        self.n_ctx as u64 * self.n_embd as u64 + self.n_layer as u64 * (2 * norm + biases) + norm
    }
}

#[cfg(test)]
mod tests;
