//! The tensors of a model by name: where each one's values come from.

use super::Origin;
use super::pack::Values;
use crate::checkpoint::Checkpoint;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::mapped::{Arena, Slab};
use crate::packed::Packed;
use crate::philox::Normal;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

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
    /// [`Error::UnexpectedTensor`], [`Error::AmbiguousTensor`].
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
            From::Checkpoint(named) => named.stored.contains_key(name),
            From::Random { .. } => true,
        }
    }

    /// Reads a tensor; `number` is its place, from 1, among all that the model may have, in the order of the computation.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], [`Error::TensorShape`], or what reading a file says.
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
                if name == "wte.weight" || name == "lm_head.weight" {
                    return Err(Error::TransposedEmbedding { name: name.to_owned() });
                }
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

/// What GPT-2 starts from, as [`super::Origin::Random`] says; a tensor's stream is its number, from 1.
pub fn initial<'a>(config: &Config, name: &str, seed: u64, stream: u64) -> Values<'a> {
    const DEVIATION: f32 = 0.02;
    if name.ends_with(".bias") {
        Values::Constant(0.0)
    } else if name.contains("ln_") {
        Values::Constant(1.0)
    } else if name.contains("c_proj") {
        Values::Normal(Normal { seed, stream, deviation: DEVIATION / (2.0 * config.n_layer as f32).sqrt() })
    } else {
        Values::Normal(Normal { seed, stream, deviation: DEVIATION })
    }
}

/// A checkpoint whose names have been brought into one form and checked.
pub struct Named<'a> {
    checkpoint: &'a Checkpoint,
    /// The name -> the name that the checkpoint has for it.
    stored: BTreeMap<&'a str, &'a str>,
}

impl<'a> Named<'a> {
    /// Finds every tensor of the checkpoint among those that the model has.
    pub fn new(config: &Config, checkpoint: &'a Checkpoint) -> Result<Named<'a>> {
        let expected: BTreeSet<String> = names(config).collect();
        let mut names = BTreeMap::new();
        for stored in checkpoint.names() {
            let name = stored.strip_prefix("transformer.").unwrap_or(stored);
            // Causal masks that old versions stored, and the copy of a tied head.
            let mask = name.strip_prefix("h.").and_then(|rest| rest.split_once('.'));
            if mask.is_some_and(|(_, rest)| rest == "attn.bias" || rest == "attn.masked_bias")
                || (name == "lm_head.weight" && config.tie_word_embeddings)
            {
                continue;
            }
            if !expected.contains(name) {
                return Err(Error::UnexpectedTensor { name: stored.to_owned() });
            }
            if names.insert(name, stored).is_some() {
                return Err(Error::AmbiguousTensor { name: name.to_owned() });
            }
        }
        Ok(Named { checkpoint, stored: names })
    }

    /// The values of a tensor, which are zeros for a bias that the checkpoint lacks.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<Values<'a>> {
        let Some(stored) = self.stored.get(name) else {
            // nanoGPT and the textbooks leave biases out.
            return if name.ends_with(".bias") {
                Ok(Values::Constant(0.0))
            } else {
                Err(Error::MissingTensor { name: name.to_owned() })
            };
        };
        let tensor = self.checkpoint.get(stored)?;
        if tensor.shape() != shape {
            return Err(Error::TensorShape {
                name: name.to_owned(),
                expected: shape.to_vec(),
                found: tensor.shape(),
            });
        }
        Ok(Values::Tensor(tensor))
    }

    /// The same of a packed file, which leaves nothing out.
    pub fn packed(
        &self,
        packed: &Packed<'_>,
        arena: &Arc<Arena>,
        name: &str,
        shape: &[usize],
    ) -> Result<Values<'a>> {
        let Some(stored) = self.stored.get(name) else {
            return Err(Error::MissingTensor { name: name.to_owned() });
        };
        if shape.len() == 2 && name != "wpe.weight" {
            Ok(Values::Packed(Slab::new(arena, packed.matrix(stored)?)))
        } else {
            self.tensor(name, shape)
        }
    }
}

/// All tensor names of a model, without `transformer.` before them.
fn names(config: &Config) -> impl Iterator<Item = String> {
    const BLOCK: [&str; 6] = ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"];
    let outside = ["wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias"].map(str::to_owned);
    let head = (!config.tie_word_embeddings).then(|| "lm_head.weight".to_owned());
    let blocks = (0..config.n_layer).flat_map(|i| {
        BLOCK.iter().flat_map(move |part| ["weight", "bias"].map(|kind| format!("h.{i}.{part}.{kind}")))
    });
    outside.into_iter().chain(head).chain(blocks)
}
