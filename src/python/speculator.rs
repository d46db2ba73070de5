//! Where the proposals of one text come from.

use super::model::Model;
use crate::{model, speculate};
use pyo3::prelude::*;
use std::sync::Arc;

/// Where the proposals of one text come from.
#[pyclass(module = "gpt2rs._core")]
pub(super) struct Speculator {
    pub(super) speculator: speculate::Speculator,
    pub(super) draft: Option<Arc<model::Model>>,
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
