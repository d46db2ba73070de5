//! What a run is told: sizes and choices once, then batches and steps, all checked before anything is computed.

use super::Biases;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::ops::adamw::Rule;
use crate::ops::gemm::Precision;
use crate::simd::Isa;

/// Most tokens of a micro-batch: sizes of activations then fit into 64 bits, whatever the config.
const MAX_TOKENS: usize = 1 << 24;

fn wrong<T>(setting: &'static str, value: impl ToString, expected: impl Into<String>) -> Result<T> {
    Err(Error::Setting { setting, value: value.to_string(), expected: expected.into() })
}

/// How a model is trained.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// B: most sequences of a micro-batch.
    pub batch_size: usize,
    /// T: most tokens of a sequence.
    pub n_tokens: usize,
    /// Key of the dropout masks.
    pub seed: u64,
    /// Probability that a value is dropped: of embeddings, attention weights, and what blocks add to the residual stream.
    pub dropout: f32,
    /// How exactly factors of products are taken.
    pub precision: Precision,
    /// Whether blocks are computed again in the backward pass, not kept.
    pub recompute: bool,
    /// Which biases there are beside random weights; a checkpoint says itself.
    pub biases: Biases,
    /// Threads; `None` chooses.
    pub n_threads: Option<usize>,
    /// Instruction set; `None` takes `GPT2RS_ISA` or the fastest.
    pub isa: Option<Isa>,
}

impl Options {
    /// float32, without dropout, on all cores that help.
    pub fn new(batch_size: usize, n_tokens: usize) -> Options {
        Options {
            batch_size,
            n_tokens,
            seed: 0,
            dropout: 0.0,
            precision: Precision::Float32,
            recompute: false,
            biases: Biases::All,
            n_threads: None,
            isa: None,
        }
    }

    pub(super) fn check(&self, config: &Config) -> Result<()> {
        let &Options { batch_size, n_tokens, dropout, .. } = self;
        if !(1..=config.n_ctx).contains(&n_tokens) {
            return wrong("n_tokens", n_tokens, format!("in 1..={} (n_ctx)", config.n_ctx));
        }
        let most = MAX_TOKENS / n_tokens;
        if !(1..=most).contains(&batch_size) {
            return wrong(
                "batch_size",
                batch_size,
                format!("in 1..={most} for {n_tokens} tokens a sequence"),
            );
        }
        if !(0.0..1.0).contains(&dropout) {
            return wrong("dropout", dropout, "in 0..1, 1 excluded");
        }
        Ok(())
    }
}

/// (B, T) token ids, row-major, and what should follow each.
#[derive(Clone, Copy)]
pub struct Batch<'a> {
    /// What the model sees.
    pub inputs: &'a [u32],
    /// What it should say.
    pub targets: &'a [u32],
    /// T.
    pub n_tokens: usize,
}

impl Batch<'_> {
    pub(super) fn check(&self, config: &Config, options: &Options) -> Result<()> {
        let &Options { batch_size, n_tokens, .. } = options;
        if !(1..=n_tokens).contains(&self.n_tokens) {
            return wrong("inputs' tokens a sequence", self.n_tokens, format!("in 1..={n_tokens}"));
        }
        let tokens = self.inputs.len();
        if !tokens.is_multiple_of(self.n_tokens) || !(1..=batch_size).contains(&(tokens / self.n_tokens)) {
            let sequences = tokens as f64 / self.n_tokens as f64;
            return wrong("inputs' sequences", sequences, format!("in 1..={batch_size}"));
        }
        if self.targets.len() != tokens {
            return wrong("targets' tokens", self.targets.len(), format!("{tokens}, as the inputs'"));
        }
        let n_vocab = config.n_vocab;
        let mut ids = self.inputs.iter().chain(self.targets);
        match ids.find(|&&token| token as usize >= n_vocab) {
            Some(&token) => Err(Error::TokenOutOfRange { token, n_vocab }),
            None => Ok(()),
        }
    }
}

/// Which pass it is, for the dropout masks, and what its gradients are multiplied by.
#[derive(Clone, Copy, Debug)]
pub struct Pass {
    /// The optimiser's step.
    pub step: u32,
    /// The micro-batch within the step.
    pub micro_step: u32,
    /// Multiplies the gradients: 1 over the number of micro-batches.
    pub scale: f32,
}

/// A step of AdamW.
#[derive(Clone, Copy, Debug)]
pub struct Update {
    /// Learning rate.
    pub lr: f64,
    /// Counted from 1.
    pub step: u32,
    /// Decay of both moments.
    pub betas: (f64, f64),
    /// Added to the square root of the second moment.
    pub eps: f64,
    /// Of matrices and embeddings.
    pub weight_decay: f64,
    /// Gradients whose norm is above are scaled down to it; `None` leaves them.
    pub max_norm: Option<f64>,
}

impl Update {
    pub(super) fn check(self) -> Result<()> {
        let Update { lr, step, betas, eps, weight_decay, max_norm } = self;
        if !(lr.is_finite() && lr >= 0.0) {
            return wrong("lr", lr, "finite and not below 0");
        }
        if step == 0 {
            return wrong("step", 0.0, "at least 1");
        }
        if let Some(beta) = [betas.0, betas.1].into_iter().find(|beta| !(0.0..1.0).contains(beta)) {
            return wrong("betas", beta, "in 0..1, 1 excluded, both");
        }
        if !(eps.is_finite() && eps >= 0.0) {
            return wrong("eps", eps, "finite and not below 0");
        }
        if !(weight_decay.is_finite() && weight_decay >= 0.0) {
            return wrong("weight_decay", weight_decay, "finite and not below 0");
        }
        if let Some(norm) = max_norm.filter(|norm| norm.is_nan() || *norm <= 0.0) {
            return wrong("max_norm", norm, "above 0, or None");
        }
        Ok(())
    }

    /// What is done to a tensor, given the norm of all gradients.
    pub(super) fn rule(self, norm: f64, decays: bool) -> Rule {
        let Update { lr, step, betas: (beta1, beta2), eps, weight_decay, max_norm } = self;
        // As torch.nn.utils.clip_grad_norm_ does.
        let clip = max_norm.map_or(1.0, |max| (max / (norm + 1e-6)).min(1.0));
        let left = |beta: f64| 1.0 - libm::pow(beta, f64::from(step));
        Rule {
            first: [beta1 as f32, (1.0 - beta1) as f32],
            second: [beta2 as f32, (1.0 - beta2) as f32],
            gradient_scale: clip as f32,
            step_size: (lr / left(beta1)) as f32,
            deviation_scale: (1.0 / left(beta2).sqrt()) as f32,
            eps: eps as f32,
            decay: if decays { (1.0 - lr * weight_decay) as f32 } else { 1.0 },
        }
    }
}
