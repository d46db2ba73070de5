//! The Python module `gpt2rs._core`: thin classes over the crate's own. Every call that computes releases the GIL.

mod checkpoint;
mod config;
mod model;
mod probe;
mod sampler;
mod session;
mod speculator;
mod train;

use crate::error::{Error, Result};
use crate::session::Proceed;
use pyo3::exceptions::{PyFileNotFoundError, PyOSError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use std::cell::{Cell, RefCell};
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
fn compute<T: Send>(py: Python<'_>, work: impl FnOnce(Proceed<'_>) -> Result<T> + Send) -> PyResult<T> {
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

#[pymodule]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<config::Config>()?;
    module.add_class::<checkpoint::Checkpoint>()?;
    module.add_class::<checkpoint::Tensors>()?;
    module.add_class::<model::Model>()?;
    module.add_class::<session::Session>()?;
    module.add_class::<speculator::Speculator>()?;
    module.add_class::<train::Trainer>()?;
    module.add_class::<sampler::Sampler>()?;
    module.add_class::<sampler::PySample>()?;
    module.add_function(wrap_pyfunction!(sampler::log_softmax_at, module)?)?;
    module.add_function(wrap_pyfunction!(probe::probe_bandwidth, module)?)?;
    module.add_function(wrap_pyfunction!(probe::probe_fma, module)?)?;
    module.add_function(wrap_pyfunction!(probe::probe_dot_bf16, module)?)?;
    module.add_function(wrap_pyfunction!(probe::probe_dot_int8, module)?)
}
