//! Tensors by the names that the model has for them.

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

/// Values by GPT-2's initialisation; `stream` is the tensor's number, from 1, in the order of [`names`].
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
    /// Finds all tensors by their names.
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

    /// Whether the checkpoint has it; biases may be left out.
    pub fn contains(&self, name: &str) -> bool {
        self.stored.contains_key(name)
    }

    /// The values of a tensor of this shape; zeros for a bias that is not there. Rows of embeddings are taken one by one,
    /// so they can't be stored transposed.
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
        if tensor.transposed() && ["wte.weight", "wpe.weight", "lm_head.weight"].contains(&name) {
            return Err(Error::TransposedEmbedding { name: name.to_owned() });
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

/// All tensor names of a model, without `transformer.` before them, in the order in which they are packed.
fn names(config: &Config) -> impl Iterator<Item = String> {
    const BLOCK: [&str; 6] = ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"];
    let embeddings = ["wte.weight", "wpe.weight"].map(str::to_owned);
    let blocks = (0..config.n_layer).flat_map(|i| {
        BLOCK.iter().flat_map(move |part| ["weight", "bias"].map(|kind| format!("h.{i}.{part}.{kind}")))
    });
    let last = ["ln_f.weight", "ln_f.bias"].map(str::to_owned);
    let head = (!config.tie_word_embeddings).then(|| "lm_head.weight".to_owned());
    embeddings.into_iter().chain(blocks).chain(last).chain(head)
}

/// The shape that a tensor of this name has.
fn shape(config: &Config, name: &str) -> Vec<usize> {
    let (c, v) = (config.n_embd, config.n_vocab);
    let [c_attn, attn_c_proj, c_fc, mlp_c_proj] = config.block_matrices();
    let matrix = |(k, n): (usize, usize)| if name.ends_with(".bias") { vec![n] } else { vec![k, n] };
    match name.rsplit_once('.').map_or(name, |(part, _)| part) {
        "wte" | "lm_head" => vec![v, c],
        "wpe" => vec![config.n_ctx, c],
        part if part.ends_with("attn.c_attn") => matrix(c_attn),
        part if part.ends_with("attn.c_proj") => matrix(attn_c_proj),
        part if part.ends_with("mlp.c_fc") => matrix(c_fc),
        part if part.ends_with("mlp.c_proj") => matrix(mlp_c_proj),
        _ => vec![c],
    }
}

/// One tensor as float32, for engines that pack weights their own way: its shape as stored, whether that is the
/// transpose of what the model means, and its values.
///
/// # Errors
/// [`Error::MissingTensor`] for a name that the model has not either; what reading a checkpoint says;
/// [`Error::TransposedEmbedding`].
pub fn tensor(config: &Config, origin: &Origin<'_>, name: &str) -> Result<(Vec<usize>, bool, Vec<f32>)> {
    let Some(place) = names(config).position(|known| known == name) else {
        return Err(Error::MissingTensor { name: name.to_owned() });
    };
    let shape = shape(config, name);
    let (len, row_len) = (shape.iter().product(), shape[1..].iter().product());
    match origin {
        Origin::Random { seed } => {
            let values = initial(config, name, *seed, place as u64 + 1).vector(len, row_len)?;
            Ok((shape, false, values))
        }
        Origin::Checkpoint(checkpoint) => {
            let values = Named::new(config, checkpoint)?.tensor(name, &shape)?;
            let Values::Tensor(stored) = &values else {
                return Ok((shape, false, values.vector(len, row_len)?));
            };
            let transposed = stored.transposed() && shape.len() == 2;
            Ok((stored.stored_shape().to_vec(), transposed, values.vector(len, stored.row_len())?))
        }
    }
}
