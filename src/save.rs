//! Weights -> a safetensors file that Hugging Face transformers loads, or a packed one.

use crate::checkpoint::Checkpoint;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::packed::{self, Data};
use crate::weights::{Dtype, Linear, Matrix, Norm, Weights};
use half::bf16;
use safetensors::tensor::{View, serialize_to_file};
use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;

/// A tensor that is unpacked when its turn to be written comes.
struct Tensor<'a> {
    shape: Vec<usize>,
    values: Values<'a>,
}

enum Values<'a> {
    /// (K, N), or (N, K) when `by_column`.
    Matrix {
        matrix: &'a Matrix,
        by_column: bool,
    },
    Floats(&'a [f32]),
}

impl Tensor<'_> {
    fn as_held(&self) -> Data<'_> {
        match self.values {
            Values::Matrix { matrix, .. } => Data::Matrix(matrix.packed()),
            Values::Floats(values) => Data::Floats(values, &self.shape),
        }
    }
}

impl View for Tensor<'_> {
    fn dtype(&self) -> safetensors::Dtype {
        match self.values {
            Values::Matrix { matrix, .. } if matrix.dtype() == Dtype::BF16 => safetensors::Dtype::BF16,
            _ => safetensors::Dtype::F32,
        }
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        match self.values {
            Values::Matrix { matrix, by_column } => Cow::Owned(matrix.unpack(by_column)),
            Values::Floats(values) => Cow::Borrowed(bytemuck::cast_slice(values)),
        }
    }

    fn data_len(&self) -> usize {
        let size = if View::dtype(self) == safetensors::Dtype::BF16 { 2 } else { 4 };
        self.shape.iter().product::<usize>() * size
    }
}

/// Writes all weights under Hugging Face's names, matrices in the type they are held in and the rest in float32.
///
/// # Errors
/// [`Error::Io`], such as a full disk; what has been written by then stays. [`Error::SaveQuantised`].
pub fn save(config: &Config, weights: &Weights, path: &Path) -> Result<()> {
    let dtype = weights.wte.dtype();
    if dtype.is_integer() {
        return Err(Error::SaveQuantised { dtype: dtype.name() });
    }
    // transformers wants to know which framework's names these are.
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    serialize_to_file(tensors(config, weights), Some(metadata), path).map_err(|error| Error::Io {
        path: path.to_owned(),
        source: match error {
            safetensors::SafeTensorError::IoError(source) => source,
            other => std::io::Error::other(other),
        },
    })
}

/// All weights under their names as tensors in memory, in float32.
///
/// # Errors
/// [`Error::SaveQuantised`].
pub fn to_checkpoint(config: &Config, weights: &Weights) -> Result<Checkpoint> {
    let dtype = weights.wte.dtype();
    if dtype.is_integer() {
        return Err(Error::SaveQuantised { dtype: dtype.name() });
    }
    let mut checkpoint = Checkpoint::new();
    for (name, tensor) in tensors(config, weights) {
        let bytes = tensor.data();
        let values = if View::dtype(&tensor) == safetensors::Dtype::BF16 {
            bytes.as_chunks::<2>().0.iter().map(|&value| bf16::from_le_bytes(value).to_f32()).collect()
        } else {
            bytes.as_chunks::<4>().0.iter().map(|&value| f32::from_le_bytes(value)).collect()
        };
        checkpoint.add_array(&name, values, &tensor.shape, false)?;
    }
    Ok(checkpoint)
}

/// Writes all weights as they are held, into a file that is opened without packing.
///
/// # Errors
/// [`Error::Io`], such as a full disk; what has been written by then stays.
pub fn save_packed(config: &Config, weights: &Weights, dtype: Dtype, path: &Path) -> Result<()> {
    let tensors = tensors(config, weights);
    let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (name.clone(), tensor.as_held())).collect();
    packed::write(path, config, dtype, &tensors)
}

/// All tensors under Hugging Face's names.
fn tensors<'a>(config: &Config, weights: &'a Weights) -> Vec<(String, Tensor<'a>)> {
    let mut tensors = Vec::new();
    let mut add = |name: String, shape: &[usize], values| {
        tensors.push((name, Tensor { shape: shape.to_vec(), values }));
    };
    let (c, v) = (config.n_embd, config.n_vocab);
    let embedding = |matrix| Values::Matrix { matrix, by_column: true };
    add("transformer.wte.weight".to_owned(), &[v, c], embedding(&weights.wte));
    add("transformer.wpe.weight".to_owned(), &[config.n_ctx, c], Values::Floats(&weights.wpe));
    if let Some(head) = &weights.lm_head {
        add("lm_head.weight".to_owned(), &[v, c], embedding(head));
    }
    let norms = weights.h.iter().enumerate().flat_map(|(i, h)| {
        [(format!("transformer.h.{i}.ln_1"), &h.ln_1), (format!("transformer.h.{i}.ln_2"), &h.ln_2)]
    });
    for (name, Norm { weight, bias }) in norms.chain([("transformer.ln_f".to_owned(), &weights.ln_f)]) {
        add(format!("{name}.weight"), &[c], Values::Floats(weight));
        add(format!("{name}.bias"), &[c], Values::Floats(bias));
    }
    for (i, h) in weights.h.iter().enumerate() {
        let linears = [
            ("attn.c_attn", &h.attn.c_attn),
            ("attn.c_proj", &h.attn.c_proj),
            ("mlp.c_fc", &h.mlp.c_fc),
            ("mlp.c_proj", &h.mlp.c_proj),
        ];
        for (name, Linear { weight, bias }) in linears {
            let name = format!("transformer.h.{i}.{name}");
            let matrix = Values::Matrix { matrix: weight, by_column: false };
            add(format!("{name}.weight"), &[weight.k(), weight.n()], matrix);
            add(format!("{name}.bias"), &[bias.len()], Values::Floats(bias));
        }
    }
    tensors
}
