//! What the machine can do at most, in billions a second.

use crate::probe;
use crate::simd::Isa;
use pyo3::prelude::*;

#[pyfunction]
pub(super) fn probe_bandwidth(py: Python<'_>, n_threads: usize) -> PyResult<f64> {
    py.detach(|| {
        let mut bandwidth = probe::Bandwidth::new(Isa::from_env()?, n_threads)?;
        Ok((0..3).map(|_| bandwidth.measure()).fold(0.0, f64::max) / 1e9)
    })
}

#[pyfunction]
pub(super) fn probe_fma(py: Python<'_>, n_threads: usize) -> PyResult<f64> {
    py.detach(|| Ok(probe::fma_peak(Isa::from_env()?, n_threads)? / 1e9))
}

/// GFLOP/s.
#[pyfunction]
pub(super) fn probe_dot_bf16(py: Python<'_>, n_threads: usize) -> PyResult<f64> {
    py.detach(|| Ok(probe::dot_bf16_peak(Isa::from_env()?, n_threads)? / 1e9))
}

/// Integer operations, in billions a second.
#[pyfunction]
pub(super) fn probe_dot_int8(py: Python<'_>, n_threads: usize) -> PyResult<f64> {
    py.detach(|| Ok(probe::dot_int8_peak(Isa::from_env()?, n_threads)? / 1e9))
}
