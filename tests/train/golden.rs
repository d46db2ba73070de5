//! Losses, gradients and eight steps of AdamW of the reference cases, computed by PyTorch in float64
//! (`tests/golden/make_golden.py`).

use super::npz::Array;
use super::*;
use gpt2rs::checkpoint::Checkpoint;
use gpt2rs::config::Config;
use gpt2rs::train::Update;
use gpt2rs::weights::Origin;
use std::path::PathBuf;

pub const CASES: [&str; 2] = ["training_plain", "training_odd"];

pub struct Case {
    pub config: Config,
    pub checkpoint: Checkpoint,
    expected: PathBuf,
    /// (steps, 2, B, T): inputs and targets.
    batches: Array<i64>,
}

impl Case {
    pub fn open(name: &str) -> Case {
        let (config, checkpoint) = cases::open(name);
        let expected = cases::folder(name).join("expected.npz");
        Case { config, checkpoint, batches: Array::read(&expected, "batches", "<i8"), expected }
    }

    pub fn options(&self) -> Options {
        Options {
            n_threads: Some(2),
            isa: Some(fastest()),
            ..Options::new(self.batches.shape[2], self.batches.shape[3])
        }
    }

    pub fn trainer(&self, options: Options) -> Trainer {
        Trainer::new(self.config.clone(), &Origin::Checkpoint(&self.checkpoint), options).unwrap()
    }

    /// Inputs and targets of a step, (B, T) each.
    pub fn batch(&self, step: usize) -> [Vec<u32>; 2] {
        let both = self.batches.of_sequence(step);
        let (inputs, targets) = both.split_at(both.len() / 2);
        [inputs, targets].map(|ids| ids.iter().map(|&id| id.try_into().unwrap()).collect())
    }

    pub fn accumulate(&self, trainer: &mut Trainer, step: usize) -> f64 {
        let [inputs, targets] = self.batch(step);
        let batch = Batch { inputs: &inputs, targets: &targets, n_tokens: self.batches.shape[3] };
        trainer.accumulate(batch, Pass { step: step as u32, micro_step: 0, scale: 1.0 }, GO_ON).unwrap()
    }

    fn values(&self, name: &str) -> Vec<f64> {
        Array::read(&self.expected, name, "<f8").values
    }

    /// An array under the name that the checkpoint has for it, `transformer.` before all but the head's.
    fn of_tensor(&self, kind: &str, name: &str) -> Vec<f64> {
        let prefix = if name == "lm_head.weight" { "" } else { "transformer." };
        self.values(&format!("{kind}.{prefix}{name}"))
    }
}

/// The unit roundoff of float32.
const UNIT: f64 = 1.0 / (1 << 24) as f64;

impl Case {
    /// The error that float32 may make in a gradient, as a part of the tensor's greatest.
    ///
    /// As for logits (`tests/golden.rs`), each chain of K terms errs by K u of its result. A gradient has passed the chains
    /// of the forward pass, and for each of them two in the backward pass; the head's, of the vocabulary; and the sum over
    /// the tokens.
    fn bound(&self) -> f64 {
        let Config { n_layer, n_embd, n_inner, n_vocab, .. } = self.config;
        let n_tokens = self.batches.shape[3];
        let blocks = n_layer * (3 * n_embd + n_inner + n_tokens);
        (3 * blocks + 2 * n_embd + n_vocab + self.batches.shape[2] * n_tokens) as f64 * UNIT
    }
}

/// Whether value `i` of a tensor is a key's bias. Softmax does not see these: their gradient is zero.
fn is_key_bias(case: &Case, name: &str, i: usize) -> bool {
    let c = case.config.n_embd;
    name.ends_with("c_attn.bias") && (c..2 * c).contains(&i)
}

fn greatest(values: impl IntoIterator<Item = f64>) -> f64 {
    values.into_iter().fold(0.0, |greatest, value| greatest.max(value.abs()))
}

#[test]
fn the_first_gradients() {
    for name in CASES {
        let case = Case::open(name);
        let mut trainer = case.trainer(case.options());
        let loss = case.accumulate(&mut trainer, 0);
        let expected = case.values("losses")[0];
        assert!((loss - expected).abs() <= case.bound() * expected, "{name}: {loss}, not {expected}");
        for tensor in trainer.tensors() {
            let expected = case.of_tensor("grad", &tensor.name);
            let found = &trainer.values(Kind::Gradient)[tensor.place.clone()];
            assert_eq!(found.len(), expected.len());
            let greatest = greatest(expected.iter().copied());
            for (i, (&found, &expected)) in found.iter().zip(&expected).enumerate() {
                let (name, error) = (&tensor.name, (f64::from(found) - expected).abs() / greatest);
                if is_key_bias(&case, name, i) {
                    assert!(found.abs() < 1e-6, "{name} {i}: {found:e}");
                }
                assert!(error <= case.bound(), "{name} {i}: {found}, not {expected}: {error:e}");
            }
        }
    }
}

/// A step moves a weight by lr m / sqrt(v), so an error e of its gradients, relative to their root mean square, moves it
/// by about 2 lr e too far, and by 2 lr at most. The sum of that over the steps, doubled for what moved weights change in
/// later gradients, is the bound of each weight.
#[test]
fn eight_steps() {
    for name in CASES {
        let case = Case::open(name);
        let mut trainer = case.trainer(case.options());
        let (losses, norms, lr) = (case.values("losses"), case.values("grad_norm"), case.values("lr"));
        let mut bounds = vec![0.0; trainer.values(Kind::Weight).len()];
        for step in 0..losses.len() {
            let loss = case.accumulate(&mut trainer, step);
            assert!((loss - losses[step]).abs() <= case.bound() * losses[step], "{name} {step}: {loss}");
            let (betas, eps, weight_decay, max_norm) = ((0.9, 0.95), 1e-8, 0.1, Some(1.0));
            let gradients: Vec<f64> = trainer
                .tensors()
                .iter()
                .map(|tensor| {
                    greatest(trainer.values(Kind::Gradient)[tensor.place.clone()].iter().map(|&g| g.into()))
                })
                .collect();
            let step_number = step as u32 + 1;
            let update = Update { lr: lr[step], step: step_number, betas, eps, weight_decay, max_norm };
            let norm = trainer.update(update).unwrap();
            assert!((norm - norms[step]).abs() <= case.bound() * norms[step], "{name} {step}: {norm}");
            let left = 1.0 - 0.95f64.powi(step_number as i32);
            for (tensor, greatest) in trainer.tensors().iter().zip(gradients) {
                let error = case.bound() * greatest / norm.max(1.0);
                for i in tensor.place.clone() {
                    let deviation = (f64::from(trainer.values(Kind::ExpAvgSq)[i]) / left).sqrt();
                    bounds[i] += 4.0 * lr[step] * (error / deviation).min(1.0);
                }
            }
        }
        let mut tight = 0;
        for tensor in trainer.tensors() {
            let expected = case.of_tensor("after", &tensor.name);
            let found = &trainer.values(Kind::Weight)[tensor.place.clone()];
            for (i, (&found, &expected)) in found.iter().zip(&expected).enumerate() {
                let bound = bounds[tensor.place.start + i] + 32.0 * UNIT * expected.abs();
                let error = (f64::from(found) - expected).abs();
                // A key's bias moves by the sign of a rounding error.
                let name = &tensor.name;
                let in_bound = error <= bound || is_key_bias(&case, name, i);
                assert!(in_bound, "{name} {i}: {found}, not {expected}: {error:e} above {bound:e}");
                tight += usize::from(bound < 5e-3);
            }
        }
        // A tenth of what the weights moved: the bound says something about most of them.
        assert!(tight > bounds.len() / 2, "{name}: {tight} of {}", bounds.len());
    }
}
