//! How tokens are chosen, and what was chosen.

use crate::sample::{Sample, Sampling, Scratch};
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
