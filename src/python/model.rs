//! A model, and what it computes for one sequence or several.

use super::checkpoint::Checkpoint;
use super::compute;
use super::config::Config;
use super::sampler::{PySample, Sampler};
use super::session::Session;
use super::speculator::Speculator;
use crate::config::Precision;
use crate::model::{self, Options};
use crate::sample::Sampling;
use crate::save;
use crate::session::{self, DecodeScratch, Sequence};
use crate::speculate::{self, Step, Text};
use crate::weights::{Dtype, Origin};
use numpy::{PyArray1, PyArray2, PyArrayMethods};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use std::cell::RefCell;
use std::path::PathBuf;
use std::sync::Arc;

thread_local! {
    static SCRATCH: RefCell<DecodeScratch> = RefCell::default();
}

/// Most threads that may be asked for.
pub(super) const MAX_THREADS: usize = 1024;

/// Sequences that are worth decoding together: beyond, the arithmetic units are busy anyway, and keys and values only
/// take memory.
const MAX_BATCH: usize = 32;

/// Packed weights, and the threads that compute with them.
#[pyclass(frozen, module = "gpt2rs._core")]
pub(super) struct Model(pub(super) Arc<model::Model>);

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

    /// What a batch's sessions hold, each of which must be of this model and go with one of `others`.
    fn sequences<'a>(
        &self,
        sessions: &'a mut [PyRefMut<'_, Session>],
        others: usize,
    ) -> PyResult<Vec<&'a mut Sequence>> {
        if sessions.len() != others {
            let found = sessions.len();
            return Err(PyValueError::new_err(format!("{found} sessions do not go with {others} others")));
        }
        if sessions.iter().any(|session| !Arc::ptr_eq(&session.model, &self.0)) {
            return Err(PyValueError::new_err("the sessions of a batch must belong to the model"));
        }
        Ok(sessions.iter_mut().map(|session| &mut session.sequence).collect())
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
    fn device(&self) -> &'static str {
        "cpu"
    }
    #[getter]
    fn max_batch(&self) -> usize {
        MAX_BATCH
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
    /// Appends to each session its prompt.
    fn prefill(
        &self,
        py: Python<'_>,
        mut sessions: Vec<PyRefMut<'_, Session>>,
        prompts: Vec<Vec<u32>>,
    ) -> PyResult<()> {
        let mut sequences = self.sequences(&mut sessions, prompts.len())?;
        let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
        compute(py, |proceed| session::prefill(&self.0, &mut sequences, &prompts, proceed))
    }
    /// Chooses the next token of each session, and appends it.
    fn decode(
        &self,
        py: Python<'_>,
        mut sessions: Vec<PyRefMut<'_, Session>>,
        samplers: Vec<PyRef<'_, Sampler>>,
    ) -> PyResult<Vec<PySample>> {
        let mut sequences = self.sequences(&mut sessions, samplers.len())?;
        let samplings: Vec<&Sampling> = samplers.iter().map(|sampler| &sampler.0).collect();
        let samples = compute(py, |proceed| {
            SCRATCH.with_borrow_mut(|scratch| {
                session::decode(&self.0, &mut sequences, &samplings, scratch, proceed)
            })
        })?;
        Ok(samples.into_iter().map(PySample).collect())
    }
    /// For each session its new tokens, how many were proposed, and how many of those were accepted.
    fn decode_several(
        &self,
        py: Python<'_>,
        mut sessions: Vec<PyRefMut<'_, Session>>,
        samplers: Vec<PyRef<'_, Sampler>>,
        mut speculators: Vec<PyRefMut<'_, Speculator>>,
        rooms: Vec<usize>,
    ) -> PyResult<Vec<(Vec<PySample>, usize, usize)>> {
        let lengths = [samplers.len(), speculators.len(), rooms.len()];
        let others = lengths.into_iter().find(|&len| len != sessions.len()).unwrap_or(sessions.len());
        let sequences = self.sequences(&mut sessions, others)?;
        let draft = speculators.iter().find_map(|speculator| speculator.draft.clone());
        let is_draft =
            |other: &Arc<model::Model>| draft.as_ref().is_some_and(|draft| Arc::ptr_eq(draft, other));
        if speculators.iter().filter_map(|speculator| speculator.draft.as_ref()).any(|other| !is_draft(other))
        {
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
                speculate::decode(&self.0, draft.as_deref(), &mut texts, scratch, proceed)
            })
        })?;
        let to_python = |Step { samples, proposed, accepted }| {
            (samples.into_iter().map(PySample).collect(), proposed, accepted)
        };
        Ok(steps.into_iter().map(to_python).collect())
    }
}
