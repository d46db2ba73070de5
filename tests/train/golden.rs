//! Losses, gradients and eight steps of AdamW of the reference cases, computed by PyTorch in float64
//! (`tests/golden/make_golden.py`).

use super::npz::Array;
use super::*;
use gpt2rs::checkpoint::Checkpoint;
use gpt2rs::config::Config;
use gpt2rs::train::Update;
use gpt2rs::weights::Origin;
use std::fs;
use std::path::{Path, PathBuf};

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
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/cases").join(name);
        let expected = folder.join("expected.npz");
        Case {
            config: Config::from_json(&fs::read_to_string(folder.join("config.json")).unwrap()).unwrap(),
            checkpoint: Checkpoint::open_safetensors(&[folder.join("model.safetensors")]).unwrap(),
            batches: Array::read(&expected, "batches", "<i8"),
            expected,
        }
    }

    pub fn options(&self) -> Options {
        Options { n_threads: Some(2), isa: Some(fastest()), ..Options::new(self.batches.shape[2], self.batches.shape[3]) }
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

#[test]
fn the_first_gradients() {
    for name in CASES {
        let case = Case::open(name);
        let mut trainer = case.trainer(case.options());
        let loss = case.accumulate(&mut trainer, 0);
        let expected = case.values("losses")[0];
        println!("{name}: loss {loss} for {expected}");
        for tensor in trainer.tensors() {
            let expected = case.of_tensor("grad", &tensor.name);
            let found = &trainer.values(Kind::Gradient)[tensor.place.clone()];
            assert_eq!(found.len(), expected.len());
            let greatest = expected.iter().fold(0.0f64, |greatest, value| greatest.max(value.abs()));
            let error = found.iter().zip(&expected).fold(0.0f64, |e, (&f, x)| e.max((f64::from(f) - x).abs()));
            println!("{name} {}: {error:e} of {greatest:e}: {:e}", tensor.name, error / greatest);
        }
    }
}

#[test]
fn eight_steps() {
    for name in CASES {
        let case = Case::open(name);
        let mut trainer = case.trainer(case.options());
        let (losses, norms, lr) = (case.values("losses"), case.values("grad_norm"), case.values("lr"));
        for step in 0..losses.len() {
            let loss = case.accumulate(&mut trainer, step);
            let update = Update {
                lr: lr[step],
                step: step as u32 + 1,
                betas: (0.9, 0.95),
                eps: 1e-8,
                weight_decay: 0.1,
                max_norm: Some(1.0),
            };
            let norm = trainer.update(update).unwrap();
            println!("{name} {step}: {loss} {} {norm} {}", losses[step], norms[step]);
        }
        for tensor in trainer.tensors() {
            let expected = case.of_tensor("after", &tensor.name);
            let found = &trainer.values(Kind::Weight)[tensor.place.clone()];
            let greatest = expected.iter().fold(0.0f64, |greatest, value| greatest.max(value.abs()));
            let error = found.iter().zip(&expected).fold(0.0f64, |e, (&f, x)| e.max((f64::from(f) - x).abs()));
            println!("{name} {}: {error:e} of {greatest:e}: {:e}", tensor.name, error / greatest);
        }
    }
}
