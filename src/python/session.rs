//! One sequence and its cache.

use super::compute;
use crate::model;
use crate::session::{self, Sequence};
use numpy::PyArray1;
use pyo3::prelude::*;
use std::sync::Arc;

/// One sequence and its cache.
#[pyclass(module = "gpt2rs._core")]
pub(super) struct Session {
    pub(super) model: Arc<model::Model>,
    pub(super) sequence: Sequence,
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
