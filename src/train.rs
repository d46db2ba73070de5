//! Training GPT-2: the loss of a micro-batch and its gradients, and AdamW.
//!
//! [`Trainer::accumulate`] is a forward and a backward pass, [`Trainer::update`] the optimiser's step. The forward pass is
//! [`crate::model`]'s with dropout; it keeps of each block what the backward pass needs, or, with
//! [`Options::recompute`], its input alone. Loss, gradients and weights are the same bits whatever the threads, the
//! instruction set, or whether blocks are computed again.

mod memory;
mod options;
mod parameters;
mod workers;

use crate::checkpoint::Checkpoint;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::ops::dropout::{Dropout, Place};
use crate::pool::{PerProcess, default_threads};
use crate::simd::{Isa, in_default_mode};
use crate::weights::{Origin, Tensors};
use memory::{Activations, Buffer, Floats, Room, Saved, Size};
use parameters::{Block, Parameters};
use workers::{Attention, HeadBackward, Learned, Workers};

pub use crate::ops::gemm::Precision;
pub use options::{Batch, Options, Pass, Update};
pub use parameters::{Biases, Tensor};

/// What a run would allocate: (what, bytes).
///
/// # Errors
/// [`Error::Setting`] for options out of range.
pub fn memory_plan(config: &Config, options: &Options) -> Result<Vec<(&'static str, usize)>> {
    options.check(config)?;
    let tensors = Tensors::new(config, &Origin::Random { seed: 0 })?;
    let len = Parameters::new(config, &tensors, options.biases).len;
    let n_threads = options.n_threads.unwrap_or_else(all_threads);
    Ok(Size::of(options).plan(config, len, n_threads))
}

/// As many as there are cores: a step's products have thousands of rows, enough for all whatever the model's size.
fn all_threads() -> usize {
    default_threads(usize::MAX)
}

/// The arrays of a run that each parameter has a value in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// What is trained.
    Weight,
    /// Gradients accumulated since the last update.
    Gradient,
    /// AdamW's first moments.
    ExpAvg,
    /// AdamW's second moments.
    ExpAvgSq,
}

/// Weights, gradients, AdamW's moments, and the memory of one micro-batch's activations.
pub struct Trainer {
    config: Config,
    options: Options,
    size: Size,
    parameters: Parameters,
    weights: Floats,
    gradients: Floats,
    exp_avg: Floats,
    exp_avg_sq: Floats,
    activations: Floats,
    workers: PerProcess<Workers>,
    n_threads: usize,
}

impl Trainer {
    /// Plans and takes all memory, and reads the weights.
    ///
    /// # Errors
    /// [`Error::Setting`] for options out of range; what reading a checkpoint says; no memory or threads.
    pub fn new(config: Config, origin: &Origin<'_>, options: Options) -> Result<Trainer> {
        options.check(&config)?;
        let isa = options.isa.map_or_else(Isa::from_env, Ok)?;
        let tensors = Tensors::new(&config, origin)?;
        let biases = match origin {
            Origin::Checkpoint(_) => Biases::All,
            Origin::Random { .. } => options.biases,
        };
        let parameters = Parameters::new(&config, &tensors, biases);
        let mut weights = Floats::new(parameters.len)?;
        in_default_mode(|| parameters.read(&tensors, weights.get_mut()))?;
        let (size, precision) = (Size::of(&options), options.precision);
        let n_threads = options.n_threads.unwrap_or_else(all_threads);
        let workers = Workers::new(isa, precision, n_threads, size, &config)?;
        let for_children = config.clone();
        let workers = PerProcess::new(workers, move || {
            // A child that gets no threads computes alone, to the same bits.
            let workers = |n| Workers::new(isa, precision, n, size, &for_children);
            workers(n_threads).or_else(|_| workers(1)).expect("one thread starts none")
        });
        Ok(Trainer {
            weights,
            gradients: Floats::new(parameters.len)?,
            exp_avg: Floats::new(parameters.len)?,
            exp_avg_sq: Floats::new(parameters.len)?,
            activations: Floats::new(size.activations(&config))?,
            config,
            options,
            size,
            parameters,
            workers,
            n_threads,
        })
    }

    /// The model's shape.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Threads that compute.
    pub fn n_threads(&self) -> usize {
        self.n_threads
    }

    /// All that is allocated: (what, bytes).
    pub fn memory_plan(&self) -> Vec<(&'static str, usize)> {
        self.size.plan(&self.config, self.parameters.len, self.n_threads)
    }

    /// What is trained, in the order of the computation.
    pub fn tensors(&self) -> &[Tensor] {
        &self.parameters.tensors
    }

    /// The values of all tensors, each at its [`Tensor::place`].
    pub fn values(&self, kind: Kind) -> &[f32] {
        match kind {
            Kind::Weight => self.weights.get(),
            Kind::Gradient => self.gradients.get(),
            Kind::ExpAvg => self.exp_avg.get(),
            Kind::ExpAvgSq => self.exp_avg_sq.get(),
        }
    }

    /// The same, to be changed.
    pub fn values_mut(&mut self, kind: Kind) -> &mut [f32] {
        match kind {
            Kind::Weight => self.weights.get_mut(),
            Kind::Gradient => self.gradients.get_mut(),
            Kind::ExpAvg => self.exp_avg.get_mut(),
            Kind::ExpAvgSq => self.exp_avg_sq.get_mut(),
        }
    }

    /// The weights as a checkpoint, copied.
    ///
    /// # Errors
    /// Those of [`Checkpoint::add_array`].
    pub fn to_checkpoint(&self) -> Result<Checkpoint> {
        let mut checkpoint = Checkpoint::new();
        for Tensor { name, shape, place, .. } in self.tensors() {
            checkpoint.add_array(name, self.weights.get()[place.clone()].to_vec(), shape, false)?;
        }
        Ok(checkpoint)
    }

    /// Forgets the accumulated gradients.
    pub fn zero_grad(&mut self) {
        self.gradients.get_mut().fill(0.0);
    }

    /// The mean cross-entropy of the targets, in nats a token; `scale` times its gradients are added to what was
    /// accumulated before.
    ///
    /// `proceed` is asked before each block; when it says no, gradients are undefined until [`Trainer::zero_grad`].
    ///
    /// # Errors
    /// [`Error::Setting`] for a batch of another size than planned, [`Error::TokenOutOfRange`], [`Error::Cancelled`].
    pub fn accumulate(&mut self, batch: Batch<'_>, pass: Pass, proceed: &dyn Fn() -> bool) -> Result<f64> {
        batch.check(&self.config, &self.options)?;
        let Options { seed, dropout: rate, .. } = self.options;
        let dropout = Dropout { seed, step: pass.step, micro_step: pass.micro_step, rate };
        self.compute(batch, dropout, Some(pass.scale), proceed)
    }

    /// The mean cross-entropy of the targets, in nats a token, without dropout.
    ///
    /// # Errors
    /// As [`Trainer::accumulate`].
    pub fn loss(&mut self, batch: Batch<'_>, proceed: &dyn Fn() -> bool) -> Result<f64> {
        batch.check(&self.config, &self.options)?;
        let dropout = Dropout { seed: 0, step: 0, micro_step: 0, rate: 0.0 };
        self.compute(batch, dropout, None, proceed)
    }

    fn compute(
        &mut self,
        batch: Batch<'_>,
        dropout: Dropout,
        scale: Option<f32>,
        proceed: &dyn Fn() -> bool,
    ) -> Result<f64> {
        let model = Model {
            config: &self.config,
            parameters: &self.parameters,
            tokens: batch.inputs.iter().enumerate().map(|(i, &token)| (token, i % batch.n_tokens)).collect(),
            n_tokens: batch.n_tokens,
            dropout,
            proceed,
        };
        let mut workers = self.workers.lock();
        let activations = self.size.cut(&self.config, batch.inputs.len(), self.activations.get_mut());
        let learned = Learned { weights: self.weights.get(), gradients: self.gradients.get_mut() };
        let count = batch.targets.len() as f64;
        in_default_mode(|| {
            let scale = scale.map(|scale| (f64::from(scale) / count) as f32);
            Ok(model.pass(&mut workers, batch.targets, learned, activations, scale)? / count)
        })
    }

    /// Clips the gradients, moves the weights, and forgets the gradients; gives the norm that they had. A norm that is not
    /// finite moves nothing: weights and moments stay whole.
    ///
    /// # Errors
    /// [`Error::Setting`] for values out of range.
    pub fn update(&mut self, update: Update) -> Result<f64> {
        update.check()?;
        let mut workers = self.workers.lock();
        let mut sums = Vec::new();
        let norm = workers.norm_of(self.gradients.get(), &mut sums);
        if !norm.is_finite() {
            self.gradients.get_mut().fill(0.0);
            return Ok(norm);
        }
        let rule = |tensor: &Tensor| (tensor.place.clone(), update.rule(norm, tensor.decays()));
        let rules: Vec<_> = in_default_mode(|| self.tensors().iter().map(rule).collect());
        let values = [self.weights.get_mut(), self.exp_avg.get_mut(), self.exp_avg_sq.get_mut()];
        workers.adamw(&rules, self.gradients.get_mut(), values);
        Ok(norm)
    }
}

/// One pass over a micro-batch.
struct Model<'a> {
    config: &'a Config,
    parameters: &'a Parameters,
    /// (token, position) of each row.
    tokens: Vec<(u32, usize)>,
    n_tokens: usize,
    dropout: Dropout,
    proceed: &'a dyn Fn() -> bool,
}

impl Model<'_> {
    /// The sum of the tokens' losses; where there is a scale, that times its gradients is added to what was there.
    fn pass(
        &self,
        workers: &mut Workers,
        targets: &[u32],
        mut learned: Learned<'_>,
        Activations { mut x, mut saved, mut room }: Activations<'_>,
        scale: Option<f32>,
    ) -> Result<f64> {
        let Parameters { wte, wpe, h, ln_f, .. } = self.parameters;
        let (weights, ln_f) = (learned.weights, (ln_f, self.config.layer_norm_epsilon));

        workers.embed(&weights[wte.clone()], &weights[wpe.clone()], &self.tokens, &mut room.branch);
        workers.drop(&room.branch, None, self.dropout.mask(Place::Embedding), &mut x[0]);
        for (layer, block) in h.iter().enumerate() {
            let (before, behind) = x.split_at_mut(layer + 1);
            let kept = layer.min(saved.len() - 1);
            let saved = &mut saved[kept];
            self.forward(workers, (layer, block), weights, &before[layer], saved, &mut room)?;
            workers.activate(&saved.fc, self.config.activation_function, &mut room.hidden);
            workers.linear(&room.hidden, &block.mlp_c_proj, weights, &mut room.branch);
            workers.drop(
                &room.branch,
                Some(&saved.mid),
                self.dropout.mask(Place::Mlp(layer)),
                &mut behind[0],
            );
        }
        let x_f = &x[h.len()];
        workers.norm(x_f, ln_f, weights, &mut room.normed);

        let head = self.parameters.head();
        let wte_f = &weights[head.clone()];
        let Some(scale) = scale else {
            return Ok(workers.head(&room.normed, wte_f, targets, &mut room.head, None));
        };
        let backward = HeadBackward { dwte: &mut learned.gradients[head], dh: &mut room.dnormed, scale };
        let sum = workers.head(&room.normed, wte_f, targets, &mut room.head, Some(backward));

        room.dx.data_mut().fill(0.0);
        workers.norm_backward(x_f, ln_f, &room.dnormed, &mut learned, &mut room.dx, room.moments);
        for (layer, block) in h.iter().enumerate().rev() {
            let kept = layer.min(saved.len() - 1);
            // Of blocks that share one memory, the last one's is still there.
            let lost = saved.len() < h.len() && layer + 1 < h.len();
            let saved = &mut saved[kept];
            if lost {
                self.forward(workers, (layer, block), weights, &x[layer], saved, &mut room)?;
            }
            self.backward(workers, (layer, block), &mut learned, &x[layer], saved, &mut room)?;
        }
        let dx = workers.dropped(&room.dx, self.dropout.mask(Place::Embedding), &mut room.branch);
        workers.embed_backward(dx, &self.tokens, (wte, wpe), &mut learned);
        Ok(sum)
    }

    /// A block up to what its activation function takes: `mid = x + dropout(attn(ln_1(x)))`, `fc = c_fc(ln_2(mid))`.
    fn forward(
        &self,
        workers: &mut Workers,
        (layer, block): (usize, &Block),
        weights: &[f32],
        x: &Buffer<'_>,
        Saved { qkv, attended, lse, mid, fc }: &mut Saved<'_>,
        Room { normed, branch, .. }: &mut Room<'_>,
    ) -> Result<()> {
        self.go_on()?;
        let eps = self.config.layer_norm_epsilon;
        workers.norm(x, (&block.ln_1, eps), weights, normed);
        workers.linear(normed, &block.c_attn, weights, qkv);
        workers.attention(qkv, self.attention(layer), attended, lse);
        workers.linear(attended, &block.attn_c_proj, weights, branch);
        workers.drop(branch, Some(x), self.dropout.mask(Place::Attended(layer)), mid);
        workers.norm(mid, (&block.ln_2, eps), weights, normed);
        workers.linear(normed, &block.c_fc, weights, fc);
        Ok(())
    }

    /// The gradient of a block's output, in `dx`, becomes that of its input.
    fn backward(
        &self,
        workers: &mut Workers,
        (layer, block): (usize, &Block),
        learned: &mut Learned<'_>,
        x: &Buffer<'_>,
        Saved { qkv, attended, lse, mid, fc }: &mut Saved<'_>,
        Room { normed, branch, hidden, dx, dnormed, dfc, dqkv, moments, .. }: &mut Room<'_>,
    ) -> Result<()> {
        self.go_on()?;
        let (weights, eps) = (learned.weights, self.config.layer_norm_epsilon);
        let activation = self.config.activation_function;

        let dy = workers.dropped(dx, self.dropout.mask(Place::Mlp(layer)), branch);
        workers.activate(fc, activation, hidden);
        workers.linear_backward(hidden, &block.mlp_c_proj, dy, learned, dfc);
        workers.activate_backward(fc, activation, dfc);
        workers.norm(mid, (&block.ln_2, eps), weights, normed);
        workers.linear_backward(normed, &block.c_fc, dfc, learned, dnormed);
        workers.norm_backward(mid, (&block.ln_2, eps), dnormed, learned, dx, moments);

        let dy = workers.dropped(dx, self.dropout.mask(Place::Attended(layer)), branch);
        workers.linear_backward(attended, &block.attn_c_proj, dy, learned, dnormed);
        workers.attention_backward((qkv, attended, lse), self.attention(layer), dnormed, dqkv);
        workers.norm(x, (&block.ln_1, eps), weights, normed);
        workers.linear_backward(normed, &block.c_attn, dqkv, learned, dnormed);
        workers.norm_backward(x, (&block.ln_1, eps), dnormed, learned, dx, moments);
        Ok(())
    }

    fn attention(&self, layer: usize) -> Attention {
        Attention {
            tokens: self.n_tokens,
            n_head: self.config.n_head,
            scale: self.config.attn_scale(layer),
            mask: self.dropout.mask(Place::Attention(layer)),
        }
    }

    fn go_on(&self) -> Result<()> {
        if (self.proceed)() { Ok(()) } else { Err(Error::Cancelled) }
    }
}
