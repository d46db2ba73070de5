//! Named tensors -> `wte`, `wpe`, `h[i]`, `ln_f`, packed once for the kernels.

mod named;
mod pack;
mod tensors;

use crate::checkpoint::Checkpoint;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::mapped::{Arena, Slab};
use crate::ops::pairs::{Bf16, F32};
use crate::ops::panels::{Format, Int4Groups, Int8Groups, Panels};
use crate::ops::round::rotation;
use crate::packed::Packed;
use half::bf16;
use named::{Named, initial};
use pack::{Planned, Values, pack_all};

pub use crate::config::Dtype;
pub use named::tensor;
pub use tensors::Tensors;

/// Every weight of a model, under the checkpoint's names.
pub struct Weights {
    /// Token embedding, packed as the (C, V) matrix of the LM head that it is tied to.
    pub wte: Matrix,
    /// Position embedding, (n_ctx, C).
    pub wpe: Vec<f32>,
    /// The blocks.
    pub h: Vec<Block>,
    /// The final LayerNorm.
    pub ln_f: Norm,
    /// (C, V), where it is not `wte`.
    pub lm_head: Option<Matrix>,
}

/// One transformer block.
pub struct Block {
    /// LayerNorm before attention.
    pub ln_1: Norm,
    /// Attention's projections.
    pub attn: Attn,
    /// LayerNorm before the MLP.
    pub ln_2: Norm,
    /// The MLP's projections.
    pub mlp: Mlp,
}

/// Attention's weights.
pub struct Attn {
    /// (C, 3C): queries, keys and values side by side.
    pub c_attn: Linear,
    /// (C, C).
    pub c_proj: Linear,
}

/// The MLP's weights.
pub struct Mlp {
    /// (C, n_inner).
    pub c_fc: Linear,
    /// (n_inner, C).
    pub c_proj: Linear,
}

/// A gain and a bias of C values each.
pub struct Norm {
    /// The gain.
    pub weight: Vec<f32>,
    /// The bias; zeros where the checkpoint has none.
    pub bias: Vec<f32>,
}

/// `x @ weight + bias`.
pub struct Linear {
    /// (K, N).
    pub weight: Matrix,
    /// (N,); zeros where the checkpoint has none.
    pub bias: Vec<f32>,
}

/// A packed (K, N) matrix.
pub struct Matrix {
    slab: Slab,
    k: usize,
    n: usize,
    dtype: Dtype,
    rotation: usize,
}

impl Matrix {
    /// Rows: the inputs.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Columns: the outputs.
    pub fn n(&self) -> usize {
        self.n
    }

    /// The type of its elements.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// By how many values its columns were rotated, and inputs must be, too: see [`crate::ops::round::rotate`].
    pub fn rotation(&self) -> usize {
        self.rotation
    }

    /// The packed values.
    ///
    /// # Panics
    /// When `F` takes another number of bytes than the matrix's type.
    pub fn panels<F: Format>(&self) -> Panels<'_, F> {
        Panels::new(self.slab.bytes(), self.k, self.n)
    }

    /// The values in the order of a file, little-endian float32 or bfloat16: (K, N) row-major, or (N, K) when
    /// `by_column`.
    pub fn unpack(&self, by_column: bool) -> Vec<u8> {
        let panels = |out: &mut dyn FnMut(usize, f32)| match self.dtype {
            Dtype::F32 => unpack(self.panels::<F32>(), by_column, out),
            Dtype::BF16 => unpack(self.panels::<Bf16>(), by_column, out),
            Dtype::Int8 => unpack(self.panels::<Int8Groups>(), by_column, out),
            Dtype::Int4 => unpack(self.panels::<Int4Groups>(), by_column, out),
        };
        if self.dtype == Dtype::BF16 {
            let mut out = vec![bf16::ZERO; self.k * self.n];
            panels(&mut |i, value| out[i] = bf16::from_f32(value));
            bytemuck::cast_slice(&out).to_vec()
        } else {
            let mut out = vec![0.0; self.k * self.n];
            panels(&mut |i, value| out[i] = value);
            bytemuck::cast_slice(&out).to_vec()
        }
    }

    /// The bytes as they lie in memory, for a packed file.
    pub fn packed(&self) -> &[u8] {
        self.slab.bytes()
    }

    fn bytes(&self) -> usize {
        self.slab.bytes().len()
    }
}

fn unpack<F: Format>(w: Panels<'_, F>, by_column: bool, out: &mut dyn FnMut(usize, f32)) {
    let (k, n) = (w.k(), w.n());
    for column in 0..n {
        for i in 0..k {
            out(if by_column { column * k + i } else { i * n + column }, w.value(i, column));
        }
    }
}

/// Bytes that a packed (k, n) matrix takes.
fn packed_len(dtype: Dtype, k: usize, n: usize) -> usize {
    match dtype {
        Dtype::F32 => Panels::<F32>::packed_len(k, n),
        Dtype::BF16 => Panels::<Bf16>::packed_len(k, n),
        Dtype::Int8 => Panels::<Int8Groups>::packed_len(k, n),
        Dtype::Int4 => Panels::<Int4Groups>::packed_len(k, n),
    }
}

/// By how many values the columns of matrix `name` are rotated. Those of the projections into the residual stream are,
/// where they are rounded to integers: no LayerNorm has made their inputs even.
fn rotated_by(name: &str, k: usize, dtype: Dtype) -> usize {
    if dtype.is_integer() && name.ends_with("c_proj.weight") { rotation(k) } else { 1 }
}

/// Makes a norm's channels of about the same size, by powers of two, and gives what the rows of the matrix behind it must
/// be multiplied by, so that all products stay exactly the same: channels that stand out would have the others of their
/// group rounded by their scale.
fn even(norm: &mut Norm) -> Vec<f32> {
    let channels = || norm.weight.iter().zip(&norm.bias);
    // The norm's channels have variance 1 before its gain.
    let exponents: Vec<f32> = channels().map(|(gain, bias)| gain.hypot(*bias).log2()).collect();
    let known = || exponents.iter().copied().filter(|exponent| exponent.is_finite());
    let mean = known().sum::<f32>() / known().count().max(1) as f32;
    let scale = |&exponent: &f32| {
        // Products with scales this near to 1 neither overflow nor lose bits, unless the weights nearly do.
        if exponent.is_finite() { (exponent - mean).round().clamp(-24.0, 24.0).exp2() } else { 1.0 }
    };
    let scales: Vec<f32> = exponents.iter().map(scale).collect();
    for (value, scale) in norm.weight.iter_mut().zip(&scales).chain(norm.bias.iter_mut().zip(&scales)) {
        *value /= scale;
    }
    scales
}

/// Bytes of all weights of a model in `dtype`, as [`Weights::bytes`] will count them.
pub fn packed_bytes(config: &Config, dtype: Dtype) -> u64 {
    let bytes = |k, n| packed_len(dtype, k, n) as u64;
    let heads = if config.tie_word_embeddings { 1 } else { 2 } * bytes(config.n_embd, config.n_vocab);
    let block: u64 = config.block_matrices().iter().map(|&(k, n)| bytes(k, n)).sum();
    heads + config.n_layer as u64 * block + config.vectors() * size_of::<f32>() as u64
}

/// Where the values of a model's tensors come from.
pub enum Origin<'a> {
    /// A checkpoint, whose names and shapes are checked against the config. One that is packed already is not packed
    /// again, and must be of the config and type that are asked for.
    Checkpoint(&'a Checkpoint),
    /// GPT-2's initialisation: N(0, 0.02), projections into the residual stream scaled by 1/sqrt(2 L), biases zero,
    /// gains one. The same seed gives the same weights on every machine.
    Random {
        /// Seed of the generator.
        seed: u64,
    },
}

impl Weights {
    /// Packs all weights, matrices in `dtype` and the rest in float32, on `n_threads` threads.
    ///
    /// # Errors
    /// A tensor that is missing, unknown, of another shape or unreadable; no memory.
    pub fn new(config: &Config, origin: Origin<'_>, dtype: Dtype, n_threads: usize) -> Result<Weights> {
        match origin {
            Origin::Checkpoint(checkpoint) => {
                let named = Named::new(config, checkpoint)?;
                let Some(packed) = Packed::of(checkpoint)? else {
                    return Builder::build(config, dtype, n_threads, |name, shape| named.tensor(name, shape));
                };
                packed.check(config, dtype)?;
                let arena = packed.open(n_threads)?;
                Builder::build(config, dtype, n_threads, |name, shape| {
                    named.packed(&packed, &arena, name, shape)
                })
            }
            Origin::Random { seed } => {
                let mut stream = 0;
                Builder::build(config, dtype, n_threads, |name, _| {
                    stream += 1;
                    Ok(initial(config, name, seed, stream))
                })
            }
        }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        let floats = |values: &Vec<f32>| size_of_val(values.as_slice());
        let norm = |norm: &Norm| floats(&norm.weight) + floats(&norm.bias);
        let linear = |linear: &Linear| linear.weight.bytes() + floats(&linear.bias);
        let blocks = self.h.iter().map(|h| {
            norm(&h.ln_1)
                + linear(&h.attn.c_attn)
                + linear(&h.attn.c_proj)
                + norm(&h.ln_2)
                + linear(&h.mlp.c_fc)
                + linear(&h.mlp.c_proj)
        });
        let head = self.lm_head.as_ref().map_or(0, Matrix::bytes);
        self.wte.bytes() + floats(&self.wpe) + blocks.sum::<usize>() + norm(&self.ln_f) + head
    }
}

/// First everything is found and checked and the matrices' places are laid out, then they are filled.
struct Builder<'a, F> {
    values: F,
    dtype: Dtype,
    planned: Vec<Planned<'a>>,
    end: usize,
}

/// A matrix's index in the plan.
struct Place(usize);

impl<'a, F: FnMut(&str, &[usize]) -> Result<Values<'a>>> Builder<'a, F> {
    fn build(config: &Config, dtype: Dtype, n_threads: usize, values: F) -> Result<Weights> {
        let mut builder = Builder { values, dtype, planned: Vec::new(), end: 0 };
        let (c, v) = (config.n_embd, config.n_vocab);
        let wte = builder.embedding("wte.weight", c, v)?;
        let wpe = (builder.values)("wpe.weight", &[config.n_ctx, c])?.vector(config.n_ctx * c, c)?;
        let mut blocks = Vec::new();
        for i in 0..config.n_layer {
            let name = |part: &str| format!("h.{i}.{part}");
            let mut ln_1 = builder.norm(&name("ln_1"), c)?;
            let c_attn = builder.linear(&name("attn.c_attn"), c, 3 * c, Some(&mut ln_1))?;
            let attn_c_proj = builder.linear(&name("attn.c_proj"), c, c, None)?;
            let mut ln_2 = builder.norm(&name("ln_2"), c)?;
            let c_fc = builder.linear(&name("mlp.c_fc"), c, config.n_inner, Some(&mut ln_2))?;
            let mlp_c_proj = builder.linear(&name("mlp.c_proj"), config.n_inner, c, None)?;
            blocks.push((ln_1, c_attn, attn_c_proj, ln_2, c_fc, mlp_c_proj));
        }
        let ln_f = builder.norm("ln_f", c)?;
        let lm_head = if config.tie_word_embeddings {
            None
        } else {
            Some(builder.embedding("lm_head.weight", c, v)?)
        };

        let matrices = builder.fill(n_threads)?;
        let mut matrices: Vec<Option<Matrix>> = matrices.into_iter().map(Some).collect();
        let mut take = |place: Place| matrices[place.0].take().expect("a place is used once");
        let mut linear = |(place, bias)| Linear { weight: take(place), bias };
        let h = blocks
            .into_iter()
            .map(|(ln_1, c_attn, attn_c_proj, ln_2, c_fc, mlp_c_proj)| Block {
                ln_1,
                attn: Attn { c_attn: linear(c_attn), c_proj: linear(attn_c_proj) },
                ln_2,
                mlp: Mlp { c_fc: linear(c_fc), c_proj: linear(mlp_c_proj) },
            })
            .collect();
        let wte = take(wte);
        let lm_head = lm_head.map(take);
        Ok(Weights { wte, wpe, h, ln_f, lm_head })
    }

    fn norm(&mut self, name: &str, c: usize) -> Result<Norm> {
        let weight = (self.values)(&format!("{name}.weight"), &[c])?.vector(c, 1)?;
        let bias = (self.values)(&format!("{name}.bias"), &[c])?.vector(c, 1)?;
        Ok(Norm { weight, bias })
    }

    fn linear(
        &mut self,
        name: &str,
        k: usize,
        n: usize,
        behind: Option<&mut Norm>,
    ) -> Result<(Place, Vec<f32>)> {
        let values = (self.values)(&format!("{name}.weight"), &[k, n])?;
        let by_column = matches!(values, Values::Tensor(tensor) if tensor.transposed());
        let bias = (self.values)(&format!("{name}.bias"), &[n])?.vector(n, 1)?;
        let rounded = self.dtype.is_integer() && !matches!(values, Values::Packed(_));
        let scales = behind.filter(|_| rounded).map(even).unwrap_or_default();
        Ok((self.plan(&format!("{name}.weight"), values, (k, n), by_column, scales)?, bias))
    }

    /// A (V, C) embedding, whose rows are the columns of the head's (C, V) matrix.
    fn embedding(&mut self, name: &str, c: usize, v: usize) -> Result<Place> {
        let values = (self.values)(name, &[v, c])?;
        self.plan(name, values, (c, v), true, Vec::new())
    }

    fn plan(
        &mut self,
        name: &str,
        values: Values<'a>,
        (k, n): (usize, usize),
        by_column: bool,
        scales: Vec<f32>,
    ) -> Result<Place> {
        let dtype = self.dtype;
        let expected = packed_len(dtype, k, n);
        if let Values::Packed(slab) = &values
            && slab.bytes().len() != expected
        {
            return Err(Error::PackedBytes {
                name: name.to_owned(),
                k,
                n,
                dtype: dtype.name(),
                expected,
                found: slab.bytes().len(),
            });
        }
        let rotation = rotated_by(name, k, dtype);
        let planned = Planned { values, k, n, by_column, scales, rotation, dtype, start: self.end };
        self.end += planned.len();
        self.planned.push(planned);
        Ok(Place(self.planned.len() - 1))
    }

    fn fill(self, n_threads: usize) -> Result<Vec<Matrix>> {
        let mut arena =
            Arena::new(self.end).map_err(|source| Error::OutOfMemory { bytes: self.end, source })?;
        pack_all(&self.planned, arena.bytes_mut(), n_threads)?;
        let arena = arena.freeze();
        let matrix = |planned: &Planned<'_>| {
            let &Planned { k, n, dtype, rotation, start, .. } = planned;
            let slab = match &planned.values {
                Values::Packed(slab) => slab.clone(),
                _ => Slab::new(&arena, start..start + planned.len()),
            };
            Matrix { slab, k, n, dtype, rotation }
        };
        Ok(self.planned.iter().map(matrix).collect())
    }
}
