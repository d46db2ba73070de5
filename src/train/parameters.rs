//! Which tensors are trained, and where each lies: weights, gradients and both moments are four arrays of one layout.

use crate::config::Config;
use crate::error::Result;
use crate::weights::Tensors;
use std::ops::Range;

/// A tensor under its checkpoint's name.
pub struct Tensor {
    /// Without `transformer.` before it.
    pub name: String,
    /// As in a checkpoint.
    pub shape: Vec<usize>,
    /// Its values in each array, row-major.
    pub place: Range<usize>,
    number: u64,
}

impl Tensor {
    /// Whether weight decay applies: to matrices and embeddings, not to gains and biases.
    pub fn decays(&self) -> bool {
        self.shape.len() > 1
    }
}

/// All tensors that are trained, and the model that they make.
pub struct Parameters {
    /// In the order of their places.
    pub tensors: Vec<Tensor>,
    /// Values of each array: every tensor begins at a whole register.
    pub len: usize,
    /// (V, C).
    pub wte: Range<usize>,
    /// (n_ctx, C).
    pub wpe: Range<usize>,
    /// The blocks.
    pub h: Vec<Block>,
    /// The final LayerNorm.
    pub ln_f: Norm,
    /// (V, C), where it is not `wte`.
    pub lm_head: Option<Range<usize>>,
}

/// One transformer block, its parts as the checkpoint names them.
pub struct Block {
    /// LayerNorm before attention.
    pub ln_1: Norm,
    /// (C, 3C): queries, keys and values side by side.
    pub c_attn: Linear,
    /// (C, C), `attn.c_proj`.
    pub attn_c_proj: Linear,
    /// LayerNorm before the MLP.
    pub ln_2: Norm,
    /// (C, n_inner).
    pub c_fc: Linear,
    /// (n_inner, C), `mlp.c_proj`.
    pub mlp_c_proj: Linear,
}

/// A gain of C values, and a bias where there is one.
pub struct Norm {
    /// The gain.
    pub weight: Range<usize>,
    /// The bias; empty for none.
    pub bias: Range<usize>,
}

/// `x @ weight + bias`.
pub struct Linear {
    /// (K, N).
    pub weight: Range<usize>,
    /// (N,); empty for none.
    pub bias: Range<usize>,
    /// Inputs.
    pub k: usize,
    /// Outputs.
    pub n: usize,
}

/// Which biases a model that is trained from random weights has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Biases {
    /// All, as the published models.
    All,
    /// All but those of queries, keys and values.
    NoQkv,
    /// None, of LayerNorms neither.
    None,
}

impl Biases {
    fn has(self, name: &str) -> bool {
        match self {
            Biases::All => true,
            Biases::NoQkv => !name.ends_with("attn.c_attn.bias"),
            Biases::None => !name.ends_with(".bias"),
        }
    }
}

impl Parameters {
    /// The tensors that a checkpoint has, or those that a model of this config has with these `biases`.
    pub fn new(config: &Config, tensors: &Tensors<'_>, biases: Biases) -> Parameters {
        let has = |name: &str| !name.ends_with(".bias") || tensors.contains(name) && biases.has(name);
        let mut places = Places { tensors: Vec::new(), len: 0, numbers: 0, has };
        let (c, v) = (config.n_embd, config.n_vocab);
        let wte = places.tensor("wte.weight", &[v, c]);
        let wpe = places.tensor("wpe.weight", &[config.n_ctx, c]);
        let block = |i: usize| {
            let name = |part: &str| format!("h.{i}.{part}");
            Block {
                ln_1: places.norm(&name("ln_1"), c),
                c_attn: places.linear(&name("attn.c_attn"), c, 3 * c),
                attn_c_proj: places.linear(&name("attn.c_proj"), c, c),
                ln_2: places.norm(&name("ln_2"), c),
                c_fc: places.linear(&name("mlp.c_fc"), c, config.n_inner),
                mlp_c_proj: places.linear(&name("mlp.c_proj"), config.n_inner, c),
            }
        };
        let h = (0..config.n_layer).map(block).collect();
        let ln_f = places.norm("ln_f", c);
        let lm_head = (!config.tie_word_embeddings).then(|| places.tensor("lm_head.weight", &[v, c]));
        let Places { tensors, len, .. } = places;
        Parameters { tensors, len, wte, wpe, h, ln_f, lm_head }
    }

    /// Reads all weights.
    ///
    /// # Errors
    /// As [`Tensors::read`].
    pub fn read(&self, tensors: &Tensors<'_>, weights: &mut [f32]) -> Result<()> {
        for Tensor { name, shape, place, number } in &self.tensors {
            tensors.read(name, shape, *number, &mut weights[place.clone()])?;
        }
        Ok(())
    }

    /// The head's embedding: `lm_head`, or `wte`.
    pub fn head(&self) -> Range<usize> {
        self.lm_head.clone().unwrap_or(self.wte.clone())
    }
}

/// Gives tensors their places, in the order of the computation.
struct Places<F> {
    tensors: Vec<Tensor>,
    len: usize,
    /// Of all tensors that the config has, so that a bias more or less changes no other tensor's random values.
    numbers: u64,
    has: F,
}

impl<F: Fn(&str) -> bool> Places<F> {
    fn tensor(&mut self, name: &str, shape: &[usize]) -> Range<usize> {
        self.numbers += 1;
        if !(self.has)(name) {
            return self.len..self.len;
        }
        let place = self.len..self.len + shape.iter().product::<usize>();
        self.len = place.end.next_multiple_of(crate::simd::LANES);
        let (name, shape) = (name.to_owned(), shape.to_vec());
        self.tensors.push(Tensor { name, shape, place: place.clone(), number: self.numbers });
        place
    }

    fn norm(&mut self, name: &str, c: usize) -> Norm {
        let weight = self.tensor(&format!("{name}.weight"), &[c]);
        Norm { weight, bias: self.tensor(&format!("{name}.bias"), &[c]) }
    }

    fn linear(&mut self, name: &str, k: usize, n: usize) -> Linear {
        let weight = self.tensor(&format!("{name}.weight"), &[k, n]);
        Linear { weight, bias: self.tensor(&format!("{name}.bias"), &[n]), k, n }
    }
}
