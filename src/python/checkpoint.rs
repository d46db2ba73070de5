//! Tensors by name, in files or in memory.

use super::config::Config;
use crate::checkpoint::{self, StoredType};
use crate::config;
use crate::packed::{self, Packed};
use crate::weights::{self, Origin};
use numpy::{PyArray1, PyArrayMethods, PyReadonlyArrayDyn, PyUntypedArrayMethods};
use pyo3::prelude::*;
use std::path::{Path, PathBuf};

/// Names of tensors, and where the bytes of each are.
#[pyclass(module = "gpt2rs._core")]
pub(super) struct Checkpoint(pub(super) checkpoint::Checkpoint);

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

/// The tensors of a model as arrays, for an engine that packs them its own way.
#[pyclass(frozen, module = "gpt2rs._core")]
pub(super) struct Tensors {
    config: config::Config,
    origin: Kept,
}

enum Kept {
    Checkpoint(Py<Checkpoint>),
    Random { seed: u64 },
}

#[pymethods]
impl Tensors {
    #[staticmethod]
    fn of(config: &Config, checkpoint: Py<Checkpoint>) -> Tensors {
        Tensors { config: config.0.clone(), origin: Kept::Checkpoint(checkpoint) }
    }
    #[staticmethod]
    fn random(config: &Config, seed: u64) -> Tensors {
        Tensors { config: config.0.clone(), origin: Kept::Random { seed } }
    }
    /// The tensor of this name, float32, in the shape that the model means.
    fn get<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyAny>> {
        let (shape, transposed, values) = match &self.origin {
            Kept::Random { seed } => {
                py.detach(|| weights::tensor(&self.config, &Origin::Random { seed: *seed }, name))?
            }
            Kept::Checkpoint(checkpoint) => {
                let checkpoint = &checkpoint.borrow(py).0;
                py.detach(|| weights::tensor(&self.config, &Origin::Checkpoint(checkpoint), name))?
            }
        };
        let array = PyArray1::from_vec(py, values).reshape(shape)?;
        if transposed { array.getattr("T") } else { Ok(array.into_any()) }
    }
}
