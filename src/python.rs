//! The Python module `gpt2rs._core`: thin classes over the crate's own. Every call that computes releases the GIL.

use crate::checkpoint::StoredType;
use crate::config::Precision;
use crate::error::Error;
use crate::model::Options;
use crate::packed::{self, Packed};
use crate::sample::{Sample, Sampling, Scratch};
use crate::session::{self, DecodeScratch, Proceed, Sequence};
use crate::simd::Isa;
use crate::speculate::{self, Step, Text};
use crate::weights::{self, Dtype, Origin};
use crate::{checkpoint, config, model, probe, save};
use numpy::{
    PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1, PyReadonlyArrayDyn, PyUntypedArrayMethods,
};
use pyo3::exceptions::{PyFileNotFoundError, PyOSError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often a running computation looks for Ctrl-C.
const SIGNALS: Duration = Duration::from_millis(25);

impl From<Error> for PyErr {
    fn from(error: Error) -> PyErr {
        let message = error.to_string();
        match error {
            Error::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
                PyFileNotFoundError::new_err(message)
            }
            Error::Io { .. } => PyOSError::new_err(message),
            Error::MissingIsa(_) | Error::OutOfMemory { .. } | Error::Threads { .. } | Error::Cancelled => {
                PyRuntimeError::new_err(message)
            }
            _ => PyValueError::new_err(message),
        }
    }
}

/// Computes without the GIL, and stops between layers when a signal's handler raises.
fn compute<T: Send>(
    py: Python<'_>,
    work: impl FnOnce(Proceed<'_>) -> crate::error::Result<T> + Send,
) -> PyResult<T> {
    py.detach(|| {
        let raised: RefCell<Option<PyErr>> = RefCell::new(None);
        let looked = Cell::new(Instant::now());
        let proceed = || {
            if looked.get().elapsed() < SIGNALS {
                return true;
            }
            looked.set(Instant::now());
            match Python::attach(|py| py.check_signals()) {
                Ok(()) => true,
                Err(error) => {
                    raised.replace(Some(error));
                    false
                }
            }
        };
        let result = work(&proceed);
        match raised.take() {
            Some(error) => Err(error),
            None => result.map_err(PyErr::from),
        }
    })
}

/// The shape of a model.
#[pyclass(frozen, module = "gpt2rs._core")]
struct Config(config::Config);

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

/// Names of tensors, and where the bytes of each are.
#[pyclass(module = "gpt2rs._core")]
struct Checkpoint(checkpoint::Checkpoint);

#[pymethods]
impl Checkpoint {
    #[new]
    fn new() -> Checkpoint {
        Checkpoint(checkpoint::Checkpoint::new())
    }
    #[staticmethod]
    fn open_safetensors(py: Python<'_>, paths: Vec<PathBuf>) -> PyResult<Checkpoint> {
        Ok(Checkpoint(py.detach(|| checkpoint::Checkpoint::open_safetensors(&paths))?))
    }
    #[pyo3(signature = (name, path, offset, dtype, shape, *, transposed = false))]
    fn add_file(
        &mut self,
        name: &str,
        path: PathBuf,
        offset: u64,
        dtype: &str,
        shape: Vec<usize>,
        transposed: bool,
    ) -> PyResult<()> {
        let dtype = StoredType::from_name(dtype)?;
        Ok(self.0.add_file(name, Path::new(&path), offset, dtype, &shape, transposed)?)
    }
    #[pyo3(signature = (name, array, *, transposed = false))]
    fn add_array(&mut self, name: &str, array: &Bound<'_, PyAny>, transposed: bool) -> PyResult<()> {
        let numpy = array.py().import("numpy")?;
        let array = numpy.call_method1("ascontiguousarray", (array, "float32"))?;
        let array: PyReadonlyArrayDyn<'_, f32> = array.extract()?;
        let shape = array.shape().to_vec();
        Ok(self.0.add_array(name, array.as_slice()?.to_vec(), &shape, transposed)?)
    }
    /// Of a packed file: its config, the type of its weights, and the name of their layout; else None.
    fn packed(&self) -> PyResult<Option<(Config, &'static str, String)>> {
        let packed = Packed::of(&self.0)?;
        Ok(packed.map(|Packed { config, dtype, .. }| (Config(config), dtype.name(), packed::layout(dtype))))
    }
    fn names(&self) -> Vec<String> {
        self.0.names().map(str::to_owned).collect()
    }
    fn shape(&self, name: &str) -> PyResult<Vec<usize>> {
        Ok(self.0.shape(name)?)
    }
}

/// Packed weights, and the threads that compute with them.
#[pyclass(frozen, module = "gpt2rs._core")]
struct Model(Arc<model::Model>);

impl Model {
    fn make(
        py: Python<'_>,
        config: &Config,
        origin: Origin<'_>,
        dtype: &str,
        kv_dtype: Option<&str>,
        precision: &str,
        n_threads: Option<usize>,
    ) -> PyResult<Model> {
        const MAX_THREADS: usize = 1024;
        if n_threads.is_some_and(|n| !(1..=MAX_THREADS).contains(&n)) {
            let found = n_threads.unwrap_or_default();
            return Err(PyValueError::new_err(format!(
                "n_threads is {found}; it must be in 1..={MAX_THREADS}"
            )));
        }
        let dtype = Dtype::from_name(dtype)?;
        let kv_dtype = kv_dtype.map(Dtype::of_cache).transpose()?;
        let precision = Precision::from_name(precision, dtype)?;
        let options = Options { dtype, kv_dtype, precision, n_threads, isa: None };
        Ok(Model(Arc::new(py.detach(|| model::Model::new(config.0.clone(), origin, options))?)))
    }
}

#[pymethods]
impl Model {
    #[staticmethod]
    #[pyo3(signature = (config, checkpoint, *, dtype, kv_dtype = None, precision = "exact", n_threads = None))]
    fn load(
        py: Python<'_>,
        config: &Config,
        checkpoint: &Checkpoint,
        dtype: &str,
        kv_dtype: Option<&str>,
        precision: &str,
        n_threads: Option<usize>,
    ) -> PyResult<Model> {
        Model::make(py, config, Origin::Checkpoint(&checkpoint.0), dtype, kv_dtype, precision, n_threads)
    }
    #[staticmethod]
    #[pyo3(signature = (config, *, seed, dtype, kv_dtype = None, precision = "exact", n_threads = None))]
    fn random(
        py: Python<'_>,
        config: &Config,
        seed: u64,
        dtype: &str,
        kv_dtype: Option<&str>,
        precision: &str,
        n_threads: Option<usize>,
    ) -> PyResult<Model> {
        Model::make(py, config, Origin::Random { seed }, dtype, kv_dtype, precision, n_threads)
    }
    #[getter]
    fn config(&self) -> Config {
        Config(self.0.config().clone())
    }
    #[getter]
    fn dtype(&self) -> &'static str {
        self.0.dtype().name()
    }
    #[getter]
    fn kv_dtype(&self) -> &'static str {
        self.0.kv_dtype().name()
    }
    #[getter]
    fn n_threads(&self) -> usize {
        self.0.n_threads()
    }
    #[getter]
    fn precision(&self) -> &'static str {
        self.0.precision().name()
    }
    #[getter]
    fn isa(&self) -> &'static str {
        self.0.isa().name()
    }
    fn memory_footprint(&self) -> usize {
        self.0.weights().bytes()
    }
    fn save_safetensors(&self, py: Python<'_>, path: PathBuf) -> PyResult<()> {
        Ok(py.detach(|| save::save(self.0.config(), self.0.weights(), &path))?)
    }
    fn save_packed(&self, py: Python<'_>, path: PathBuf) -> PyResult<()> {
        let model = &self.0;
        Ok(py.detach(|| save::save_packed(model.config(), model.weights(), model.dtype(), &path))?)
    }
    fn session(&self) -> Session {
        Session { model: Arc::clone(&self.0), sequence: Sequence::new(&self.0) }
    }
    fn logits<'py>(&self, py: Python<'py>, tokens: Vec<u32>) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let rows = compute(py, |proceed| session::logits(&self.0, &tokens, proceed))?;
        PyArray1::from_vec(py, rows).reshape([tokens.len(), self.0.config().n_vocab])
    }
    fn hidden_states<'py>(&self, py: Python<'py>, tokens: Vec<u32>) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let rows = compute(py, |proceed| session::hidden_states(&self.0, &tokens, proceed))?;
        PyArray1::from_vec(py, rows).reshape([tokens.len(), self.0.config().n_embd])
    }
    fn score<'py>(&self, py: Python<'py>, tokens: Vec<u32>) -> PyResult<Bound<'py, PyArray1<f32>>> {
        let scores = compute(py, |proceed| session::score(&self.0, &tokens, proceed))?;
        Ok(PyArray1::from_vec(py, scores))
    }
}

/// One sequence and its cache.
#[pyclass(module = "gpt2rs._core")]
struct Session {
    model: Arc<model::Model>,
    sequence: Sequence,
}

#[pymethods]
impl Session {
    #[getter]
    fn pos(&self) -> usize {
        self.sequence.tokens().len()
    }
    #[getter]
    fn tokens(&self) -> Vec<u32> {
        self.sequence.tokens().to_vec()
    }
    #[getter]
    fn logits<'py>(&mut self, py: Python<'py>) -> PyResult<Bound<'py, PyArray1<f32>>> {
        let Session { model, sequence } = self;
        compute(py, |proceed| sequence.logits(model, proceed).map(|_| ()))?;
        // Valid by now, so that this only looks.
        Ok(PyArray1::from_slice(py, sequence.logits(model, &|| true)?))
    }
    fn prefill(&mut self, py: Python<'_>, tokens: Vec<u32>) -> PyResult<()> {
        let Session { model, sequence } = self;
        compute(py, |proceed| session::prefill(model, &mut [sequence], &[&tokens], proceed))
    }
    fn fork(&self) -> Session {
        Session { model: Arc::clone(&self.model), sequence: self.sequence.clone() }
    }
    fn truncate(&mut self, n: usize) {
        self.sequence.truncate(n);
    }
}

/// The model that all sessions of a batch belong to, and their sequences.
fn batch<'a>(
    sessions: &'a mut [PyRefMut<'_, Session>],
    others: usize,
) -> PyResult<Option<(Arc<model::Model>, Vec<&'a mut Sequence>)>> {
    if sessions.len() != others {
        let found = sessions.len();
        return Err(PyValueError::new_err(format!("{found} sessions do not go with {others} others")));
    }
    let Some(first) = sessions.first() else { return Ok(None) };
    let model = Arc::clone(&first.model);
    if sessions.iter().any(|session| !Arc::ptr_eq(&session.model, &model)) {
        return Err(PyValueError::new_err("the sessions of a batch must belong to one model"));
    }
    Ok(Some((model, sessions.iter_mut().map(|session| &mut session.sequence).collect())))
}

#[pyfunction]
fn prefill(py: Python<'_>, mut sessions: Vec<PyRefMut<'_, Session>>, prompts: Vec<Vec<u32>>) -> PyResult<()> {
    let Some((model, mut sequences)) = batch(&mut sessions, prompts.len())? else { return Ok(()) };
    let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
    compute(py, |proceed| session::prefill(&model, &mut sequences, &prompts, proceed))
}

thread_local! {
    static SCRATCH: RefCell<DecodeScratch> = RefCell::default();
}

#[pyfunction]
fn decode(
    py: Python<'_>,
    mut sessions: Vec<PyRefMut<'_, Session>>,
    samplers: Vec<PyRef<'_, Sampler>>,
) -> PyResult<Vec<PySample>> {
    let Some((model, mut sequences)) = batch(&mut sessions, samplers.len())? else { return Ok(Vec::new()) };
    let samplings: Vec<&Sampling> = samplers.iter().map(|sampler| &sampler.0).collect();
    let samples = compute(py, |proceed| {
        SCRATCH
            .with_borrow_mut(|scratch| session::decode(&model, &mut sequences, &samplings, scratch, proceed))
    })?;
    Ok(samples.into_iter().map(PySample).collect())
}

/// Where the proposals of one text come from.
#[pyclass(module = "gpt2rs._core")]
struct Speculator {
    speculator: speculate::Speculator,
    draft: Option<Arc<model::Model>>,
}

#[pymethods]
impl Speculator {
    #[staticmethod]
    fn lookup(num_tokens: usize, max_ngram: usize) -> Speculator {
        Speculator { speculator: speculate::Speculator::lookup(num_tokens, max_ngram), draft: None }
    }
    #[staticmethod]
    fn draft(model: &Model, draft: &Model, num_tokens: usize) -> PyResult<Speculator> {
        let speculator = speculate::Speculator::draft(&model.0, &draft.0, num_tokens)?;
        Ok(Speculator { speculator, draft: Some(Arc::clone(&draft.0)) })
    }
}

/// For each text its new tokens, how many were proposed, and how many of those were accepted.
#[pyfunction]
fn decode_several(
    py: Python<'_>,
    mut sessions: Vec<PyRefMut<'_, Session>>,
    samplers: Vec<PyRef<'_, Sampler>>,
    mut speculators: Vec<PyRefMut<'_, Speculator>>,
    rooms: Vec<usize>,
) -> PyResult<Vec<(Vec<PySample>, usize, usize)>> {
    let lengths = [samplers.len(), speculators.len(), rooms.len()];
    if let Some(&other) = lengths.iter().find(|&&len| len != sessions.len()) {
        let found = sessions.len();
        return Err(PyValueError::new_err(format!("{found} sessions do not go with {other} others")));
    }
    let Some((model, sequences)) = batch(&mut sessions, samplers.len())? else { return Ok(Vec::new()) };
    let draft = speculators.iter().find_map(|speculator| speculator.draft.clone());
    let is_draft = |other: &Arc<model::Model>| draft.as_ref().is_some_and(|draft| Arc::ptr_eq(draft, other));
    if speculators.iter().filter_map(|speculator| speculator.draft.as_ref()).any(|other| !is_draft(other)) {
        return Err(PyValueError::new_err("the speculators of a batch must draft with one model"));
    }
    let mut texts: Vec<Text<'_>> = sequences
        .into_iter()
        .zip(&samplers)
        .zip(&mut speculators)
        .zip(rooms)
        .map(|(((sequence, sampler), speculator), room)| Text {
            sequence,
            sampling: &sampler.0,
            speculator: &mut speculator.speculator,
            room,
        })
        .collect();
    let steps = compute(py, |proceed| {
        SCRATCH.with_borrow_mut(|scratch| {
            speculate::decode(&model, draft.as_deref(), &mut texts, scratch, proceed)
        })
    })?;
    let to_python = |Step { samples, proposed, accepted }| {
        (samples.into_iter().map(PySample).collect(), proposed, accepted)
    };
    Ok(steps.into_iter().map(to_python).collect())
}

/// How the tokens of one returned sequence are chosen.
#[pyclass(frozen, module = "gpt2rs._core")]
struct Sampler(Sampling);

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
struct PySample(Sample);

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

#[pyfunction]
fn probe_bandwidth(py: Python<'_>, n_threads: usize) -> PyResult<f64> {
    py.detach(|| {
        let mut bandwidth = probe::Bandwidth::new(Isa::from_env()?, n_threads)?;
        Ok((0..3).map(|_| bandwidth.measure()).fold(0.0, f64::max) / 1e9)
    })
}

#[pyfunction]
fn probe_fma(py: Python<'_>, n_threads: usize) -> PyResult<f64> {
    py.detach(|| Ok(probe::fma_peak(Isa::from_env()?, n_threads)? / 1e9))
}

/// GFLOP/s.
#[pyfunction]
fn probe_dot_bf16(py: Python<'_>, n_threads: usize) -> PyResult<f64> {
    py.detach(|| Ok(probe::dot_bf16_peak(Isa::from_env()?, n_threads)? / 1e9))
}

/// Integer operations, in billions a second.
#[pyfunction]
fn probe_dot_int8(py: Python<'_>, n_threads: usize) -> PyResult<f64> {
    py.detach(|| Ok(probe::dot_int8_peak(Isa::from_env()?, n_threads)? / 1e9))
}

#[pymodule]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<Config>()?;
    module.add_class::<Checkpoint>()?;
    module.add_class::<Model>()?;
    module.add_class::<Session>()?;
    module.add_class::<Sampler>()?;
    module.add_class::<PySample>()?;
    module.add_class::<Speculator>()?;
    module.add_function(wrap_pyfunction!(prefill, module)?)?;
    module.add_function(wrap_pyfunction!(decode, module)?)?;
    module.add_function(wrap_pyfunction!(decode_several, module)?)?;
    module.add_function(wrap_pyfunction!(probe_bandwidth, module)?)?;
    module.add_function(wrap_pyfunction!(probe_fma, module)?)?;
    module.add_function(wrap_pyfunction!(probe_dot_bf16, module)?)?;
    module.add_function(wrap_pyfunction!(probe_dot_int8, module)?)
}
