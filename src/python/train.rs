//! Training: a model's weights, their gradients, and AdamW.

use super::checkpoint::Checkpoint;
use super::compute;
use super::config::Config;
use super::model::{MAX_THREADS, Model};
use crate::error::Error;
use crate::train::{self, Batch, Biases, Kind, Options, Pass, Precision, Tensor, Update};
use crate::weights::{Dtype, Origin};
use crate::{model, save};
use numpy::{PyArrayDyn, PyArrayMethods, PyReadonlyArray2, PyReadonlyArrayDyn, PyUntypedArrayMethods};
use pyo3::exceptions::{PyKeyError, PyValueError};
use pyo3::prelude::*;
use std::sync::Arc;

/// Weights, gradients and AdamW's moments, float32, and the memory plan of one micro-batch.
#[pyclass(module = "gpt2rs._core")]
pub(super) struct Trainer(train::Trainer);

/// What Python gives beside config and weights.
struct Settings<'a> {
    batch_size: usize,
    n_tokens: usize,
    seed: u64,
    dropout: f32,
    precision: &'a str,
    recompute: bool,
    n_threads: Option<usize>,
    bias: &'a str,
}

impl Settings<'_> {
    fn options(&self) -> PyResult<Options> {
        let wrong = |name: &'static str, value: &str, expected: &str| Error::Setting {
            setting: name,
            value: format!("{value:?}"),
            expected: format!("one of {expected}"),
        };
        let &Settings { batch_size, n_tokens, seed, dropout, recompute, n_threads, .. } = self;
        if n_threads.is_some_and(|n| !(1..=MAX_THREADS).contains(&n)) {
            let value = n_threads.unwrap_or_default().to_string();
            return Err(Error::Setting {
                setting: "n_threads",
                value,
                expected: format!("in 1..={MAX_THREADS}"),
            }
            .into());
        }
        let precision = match self.precision {
            "float32" => Precision::Float32,
            "bfloat16" => Precision::Bfloat16,
            other => return Err(wrong("precision", other, "\"float32\", \"bfloat16\"").into()),
        };
        let biases = match self.bias {
            "all" => Biases::All,
            "no-qkv" => Biases::NoQkv,
            "none" => Biases::None,
            other => return Err(wrong("bias", other, "\"all\", \"no-qkv\", \"none\"").into()),
        };
        let options = Options::new(batch_size, n_tokens);
        Ok(Options { seed, dropout, precision, recompute, biases, n_threads, ..options })
    }

    fn trainer(&self, py: Python<'_>, config: &Config, origin: &Origin<'_>) -> PyResult<Trainer> {
        let (options, config) = (self.options()?, config.0.clone());
        Ok(Trainer(py.detach(|| train::Trainer::new(config, origin, options))?))
    }
}

#[pymethods]
impl Trainer {
    #[staticmethod]
    #[pyo3(signature = (config, *, batch_size, n_tokens, seed, dropout = 0.0, precision = "float32", recompute = false, n_threads = None, bias = "all"))]
    #[allow(clippy::too_many_arguments)]
    fn random(
        py: Python<'_>,
        config: &Config,
        batch_size: usize,
        n_tokens: usize,
        seed: u64,
        dropout: f32,
        precision: &str,
        recompute: bool,
        n_threads: Option<usize>,
        bias: &str,
    ) -> PyResult<Trainer> {
        let settings =
            Settings { batch_size, n_tokens, seed, dropout, precision, recompute, n_threads, bias };
        settings.trainer(py, config, &Origin::Random { seed })
    }
    #[staticmethod]
    #[pyo3(signature = (config, checkpoint, *, batch_size, n_tokens, seed, dropout = 0.0, precision = "float32", recompute = false, n_threads = None))]
    #[allow(clippy::too_many_arguments)]
    fn load(
        py: Python<'_>,
        config: &Config,
        checkpoint: &Checkpoint,
        batch_size: usize,
        n_tokens: usize,
        seed: u64,
        dropout: f32,
        precision: &str,
        recompute: bool,
        n_threads: Option<usize>,
    ) -> PyResult<Trainer> {
        let settings =
            Settings { batch_size, n_tokens, seed, dropout, precision, recompute, n_threads, bias: "all" };
        settings.trainer(py, config, &Origin::Checkpoint(&checkpoint.0))
    }
    /// The weights of a model, widened to float32.
    #[staticmethod]
    #[pyo3(signature = (model, *, batch_size, n_tokens, recompute = false))]
    fn of_model(
        py: Python<'_>,
        model: &Model,
        batch_size: usize,
        n_tokens: usize,
        recompute: bool,
    ) -> PyResult<Trainer> {
        let model = &model.0;
        let n_threads = Some(model.n_threads());
        let options =
            Options { recompute, n_threads, isa: Some(model.isa()), ..Options::new(batch_size, n_tokens) };
        let trainer = py.detach(|| {
            let checkpoint = save::to_checkpoint(model.config(), model.weights())?;
            train::Trainer::new(model.config().clone(), &Origin::Checkpoint(&checkpoint), options)
        });
        Ok(Trainer(trainer?))
    }
    #[getter]
    fn config(&self) -> Config {
        Config(self.0.config().clone())
    }
    #[getter]
    fn n_threads(&self) -> usize {
        self.0.n_threads()
    }
    #[getter]
    fn memory_plan(&self) -> Vec<(&'static str, usize)> {
        self.0.memory_plan()
    }
    #[pyo3(signature = (inputs, targets, *, step, micro_step, scale))]
    fn accumulate(
        &mut self,
        py: Python<'_>,
        inputs: PyReadonlyArray2<'_, u32>,
        targets: PyReadonlyArray2<'_, u32>,
        step: u64,
        micro_step: u64,
        scale: f32,
    ) -> PyResult<f64> {
        let pass =
            Pass { step: counted("step", step)?, micro_step: counted("micro_step", micro_step)?, scale };
        let ids = Ids::new(&inputs, &targets)?;
        compute(py, |proceed| self.0.accumulate(ids.batch(), pass, proceed))
    }
    fn loss(
        &mut self,
        py: Python<'_>,
        inputs: PyReadonlyArray2<'_, u32>,
        targets: PyReadonlyArray2<'_, u32>,
    ) -> PyResult<f64> {
        let ids = Ids::new(&inputs, &targets)?;
        compute(py, |proceed| self.0.loss(ids.batch(), proceed))
    }
    #[pyo3(signature = (*, lr, step, betas = (0.9, 0.95), eps = 1e-8, weight_decay = 0.1, max_norm = Some(1.0)))]
    #[allow(clippy::too_many_arguments)]
    fn update(
        &mut self,
        py: Python<'_>,
        lr: f64,
        step: u64,
        betas: (f64, f64),
        eps: f64,
        weight_decay: f64,
        max_norm: Option<f64>,
    ) -> PyResult<f64> {
        let update = Update { lr, step: counted("step", step)?, betas, eps, weight_decay, max_norm };
        Ok(py.detach(|| self.0.update(update))?)
    }
    fn zero_grad(&mut self, py: Python<'_>) {
        py.detach(|| self.0.zero_grad());
    }
    fn names(&self) -> Vec<String> {
        self.0.tensors().iter().map(|tensor| tensor.name.clone()).collect()
    }
    fn shape(&self, name: &str) -> PyResult<Vec<usize>> {
        Ok(self.find(name)?.shape.clone())
    }
    fn tensor<'py>(&self, py: Python<'py>, kind: &str, name: &str) -> PyResult<Bound<'py, PyArrayDyn<f32>>> {
        let Tensor { shape, place, .. } = self.find(name)?;
        let values = &self.0.values(kind_of(kind)?)[place.clone()];
        let array = PyArrayDyn::zeros(py, shape.clone(), false);
        array.readwrite().as_slice_mut()?.copy_from_slice(values);
        Ok(array)
    }
    fn set_tensor(&mut self, kind: &str, name: &str, array: PyReadonlyArrayDyn<'_, f32>) -> PyResult<()> {
        let Tensor { shape, place, .. } = self.find(name)?;
        if array.shape() != shape {
            let found = array.shape();
            return Err(PyValueError::new_err(format!(
                "tensor {name}: expected shape {shape:?}, found {found:?}"
            )));
        }
        let place = place.clone();
        let values = &mut self.0.values_mut(kind_of(kind)?)[place];
        for (value, &given) in values.iter_mut().zip(array.as_array()) {
            *value = given;
        }
        Ok(())
    }
    #[pyo3(signature = (dtype = "float32"))]
    fn model(&self, py: Python<'_>, dtype: &str) -> PyResult<Model> {
        let (dtype, n_threads) = (Dtype::from_name(dtype)?, Some(self.0.n_threads()));
        let options = model::Options { dtype, n_threads, ..model::Options::default() };
        let made = py.detach(|| {
            let checkpoint = self.0.to_checkpoint()?;
            model::Model::new(self.0.config().clone(), Origin::Checkpoint(&checkpoint), options)
        });
        Ok(Model(Arc::new(made?)))
    }
}

impl Trainer {
    fn find(&self, name: &str) -> PyResult<&Tensor> {
        let found = self.0.tensors().iter().find(|tensor| tensor.name == name);
        found.ok_or_else(|| PyKeyError::new_err(format!("no tensor is called {name:?}")))
    }
}

fn kind_of(name: &str) -> PyResult<Kind> {
    match name {
        "weight" => Ok(Kind::Weight),
        "grad" => Ok(Kind::Gradient),
        "exp_avg" => Ok(Kind::ExpAvg),
        "exp_avg_sq" => Ok(Kind::ExpAvgSq),
        _ => Err(PyValueError::new_err(format!(
            "kind is {name:?}; it must be one of \"weight\", \"grad\", \"exp_avg\", \"exp_avg_sq\""
        ))),
    }
}

/// Steps are words of the generator's counter.
fn counted(setting: &'static str, value: u64) -> PyResult<u32> {
    let wrong =
        |_| Error::Setting { setting, value: value.to_string(), expected: format!("at most {}", u32::MAX) };
    Ok(u32::try_from(value).map_err(wrong)?)
}

/// A micro-batch's ids, row-major.
struct Ids {
    inputs: Vec<u32>,
    targets: Vec<u32>,
    n_tokens: usize,
}

impl Ids {
    fn new(inputs: &PyReadonlyArray2<'_, u32>, targets: &PyReadonlyArray2<'_, u32>) -> PyResult<Ids> {
        if inputs.shape() != targets.shape() {
            let (inputs, targets) = (inputs.shape(), targets.shape());
            return Err(PyValueError::new_err(format!(
                "inputs have shape {inputs:?} and targets {targets:?}"
            )));
        }
        let n_tokens = inputs.shape()[1];
        let [inputs, targets] = [inputs, targets].map(|ids| ids.as_array().iter().copied().collect());
        Ok(Ids { inputs, targets, n_tokens })
    }

    fn batch(&self) -> Batch<'_> {
        Batch { inputs: &self.inputs, targets: &self.targets, n_tokens: self.n_tokens }
    }
}
