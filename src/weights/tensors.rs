//! All tensors of a model, read one by one.

use super::Origin;
use super::named::{Named, initial};
use super::pack::Values;
use crate::config::Config;
use crate::error::Result;

/// All tensors of a model as a checkpoint holds them, row-major, by their names without `transformer.` before them.
pub struct Tensors<'a> {
    config: &'a Config,
    from: From<'a>,
}

enum From<'a> {
    Checkpoint(Named<'a>),
    Random { seed: u64 },
}

impl<'a> Tensors<'a> {
    /// Finds them.
    ///
    /// # Errors
    /// [`crate::error::Error::UnexpectedTensor`], [`crate::error::Error::AmbiguousTensor`].
    pub fn new(config: &'a Config, origin: &Origin<'a>) -> Result<Tensors<'a>> {
        let from = match *origin {
            Origin::Checkpoint(checkpoint) => From::Checkpoint(Named::new(config, checkpoint)?),
            Origin::Random { seed } => From::Random { seed },
        };
        Ok(Tensors { config, from })
    }

    /// Whether there are values for it: a checkpoint may leave biases out.
    pub fn contains(&self, name: &str) -> bool {
        match &self.from {
            From::Checkpoint(named) => named.contains(name),
            From::Random { .. } => true,
        }
    }

    /// Reads a tensor; `number` is its place, from 1, among all that the model may have, in the order of the computation.
    ///
    /// # Errors
    /// [`crate::error::Error::MissingTensor`], [`crate::error::Error::TensorShape`], or what reading a file says.
    ///
    /// # Panics
    /// When `out` is not as long as the shape says.
    pub fn read(&self, name: &str, shape: &[usize], number: u64, out: &mut [f32]) -> Result<()> {
        let values = match &self.from {
            From::Checkpoint(named) => named.tensor(name, shape)?,
            From::Random { seed } => initial(self.config, name, *seed, number),
        };
        let row_len: usize = shape[1..].iter().product();
        match values {
            Values::Tensor(tensor) if tensor.transposed() && shape.len() == 2 => {
                let mut column = vec![0.0; shape[0]];
                for i in 0..row_len {
                    tensor.read_rows(i..i + 1, &mut column)?;
                    for (row, &value) in out.chunks_exact_mut(row_len).zip(&column) {
                        row[i] = value;
                    }
                }
                Ok(())
            }
            values => values.read(0..shape[0], row_len, out),
        }
    }
}
