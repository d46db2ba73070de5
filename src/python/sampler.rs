//! How tokens are chosen, and what was chosen.

use crate::error::Error;
use crate::sample::{Sample, Sampling, Scratch, log_softmax_at as log_softmax_at_row};
use crate::simd::Isa;
use numpy::PyReadonlyArray1;
use pyo3::prelude::*;
use std::collections::BTreeMap;

/// How the tokens of one returned sequence are chosen.
#[pyclass(frozen, module = "gpt2rs._core")]
pub(super) struct Sampler(pub(super) Sampling);

#[pymethods]
impl Sampler {
    #[new]
    #[pyo3(signature = (*, prompt_len, do_sample = false, temperature = 1.0, top_k = None, top_p = None, min_p = None,
        typical_p = None, epsilon_cutoff = None, eta_cutoff = None, repetition_penalty = 1.0, presence_penalty = 0.0,
        frequency_penalty = 0.0, no_repeat_ngram_size = 0, bad_words_ids = vec![], suppress_tokens = vec![],
        logit_bias = BTreeMap::new(), eos_token_ids = vec![], min_new_tokens = 0, seed = 0, index = 0, logprobs = false,
        top_logprobs = 0))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        prompt_len: usize,
        do_sample: bool,
        temperature: f64,
        top_k: Option<usize>,
        top_p: Option<f64>,
        min_p: Option<f64>,
        typical_p: Option<f64>,
        epsilon_cutoff: Option<f64>,
        eta_cutoff: Option<f64>,
        repetition_penalty: f64,
        presence_penalty: f64,
        frequency_penalty: f64,
        no_repeat_ngram_size: usize,
        bad_words_ids: Vec<Vec<u32>>,
        suppress_tokens: Vec<u32>,
        logit_bias: BTreeMap<u32, f64>,
        eos_token_ids: Vec<u32>,
        min_new_tokens: usize,
        seed: u64,
        index: u64,
        logprobs: bool,
        top_logprobs: usize,
    ) -> Sampler {
        Sampler(Sampling {
            do_sample,
            temperature,
            top_k,
            top_p,
            min_p,
            typical_p,
            epsilon_cutoff,
            eta_cutoff,
            repetition_penalty,
            presence_penalty,
            frequency_penalty,
            no_repeat_ngram_size,
            bad_words_ids,
            suppress_tokens,
            logit_bias,
            eos_token_ids,
            min_new_tokens,
            seed,
            index,
            prompt_len,
            logprobs,
            top_logprobs,
        })
    }
    #[getter]
    fn prompt_len(&self) -> usize {
        self.0.prompt_len
    }
    #[getter]
    fn do_sample(&self) -> bool {
        self.0.do_sample
    }
    #[getter]
    fn temperature(&self) -> f64 {
        self.0.temperature
    }
    #[getter]
    fn top_k(&self) -> Option<usize> {
        self.0.top_k
    }
    #[getter]
    fn top_p(&self) -> Option<f64> {
        self.0.top_p
    }
    #[getter]
    fn min_p(&self) -> Option<f64> {
        self.0.min_p
    }
    #[getter]
    fn repetition_penalty(&self) -> f64 {
        self.0.repetition_penalty
    }
    #[getter]
    fn presence_penalty(&self) -> f64 {
        self.0.presence_penalty
    }
    #[getter]
    fn frequency_penalty(&self) -> f64 {
        self.0.frequency_penalty
    }
    #[getter]
    fn min_new_tokens(&self) -> usize {
        self.0.min_new_tokens
    }
    #[getter]
    fn seed(&self) -> u64 {
        self.0.seed
    }
    #[getter]
    fn index(&self) -> u64 {
        self.0.index
    }
    /// Whether nothing beyond the settings above is asked for, eos and `min_new_tokens` aside.
    #[getter]
    fn is_plain(&self) -> bool {
        let sampling = &self.0;
        sampling.typical_p.is_none()
            && sampling.epsilon_cutoff.is_none()
            && sampling.eta_cutoff.is_none()
            && sampling.no_repeat_ngram_size == 0
            && sampling.bad_words_ids.is_empty()
            && sampling.suppress_tokens.is_empty()
            && sampling.logit_bias.is_empty()
            && !sampling.logprobs
            && sampling.top_logprobs == 0
    }
    fn choose(
        &self,
        py: Python<'_>,
        logits: PyReadonlyArray1<'_, f32>,
        tokens: Vec<u32>,
    ) -> PyResult<PySample> {
        let logits = logits.as_slice()?.to_vec();
        let sample =
            py.detach(|| self.0.choose(Isa::from_env()?, &logits, &tokens, &mut Scratch::default()))?;
        Ok(PySample(sample))
    }
}

/// A chosen token.
#[pyclass(frozen, name = "Sample", module = "gpt2rs._core")]
pub(super) struct PySample(pub(super) Sample);

#[pymethods]
impl PySample {
    /// A token that another engine chose, without log-probabilities.
    #[new]
    fn new(token: u32) -> PySample {
        PySample(Sample { token, logprob: None, top_logprobs: Vec::new() })
    }
    #[getter]
    fn token(&self) -> u32 {
        self.0.token
    }
    #[getter]
    fn logprob(&self) -> Option<f32> {
        self.0.logprob
    }
    #[getter]
    fn top_logprobs(&self) -> Vec<(u32, f32)> {
        self.0.top_logprobs.clone()
    }
}

/// ln p(token) under the softmax of logits (V,).
#[pyfunction]
pub(super) fn log_softmax_at(logits: PyReadonlyArray1<'_, f32>, token: u32) -> PyResult<f32> {
    let logits = logits.as_slice()?;
    if token as usize >= logits.len() {
        return Err(Error::TokenOutOfRange { token, n_vocab: logits.len() }.into());
    }
    Ok(log_softmax_at_row(Isa::from_env()?, logits, token))
}
