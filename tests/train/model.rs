//! Heads of their own, biases that are not there, dropout, interruption, and what is refused.

use super::golden::Case;
use super::*;
use gpt2rs::checkpoint::Checkpoint;
use gpt2rs::config::Config;
use gpt2rs::error::Error;
use gpt2rs::model::{self, Model};
use gpt2rs::session;
use gpt2rs::train::{Biases, Precision, Update, memory_plan};
use gpt2rs::weights::Origin;
use std::cell::Cell;

const SHAPE: &str =
    r#"{"n_layer": 2, "n_head": 3, "n_embd": 15, "n_inner": 19, "n_positions": 70, "vocab_size": 67}"#;

fn config(changes: &str) -> Config {
    let tail = if changes.is_empty() { String::new() } else { format!(", {changes}") };
    Config::from_json(&SHAPE.replace('}', &format!("{tail}}}"))).unwrap()
}

fn trainer(config: &Config, options: Options) -> Trainer {
    Trainer::new(config.clone(), &Origin::Random { seed: 5 }, options).unwrap()
}

fn options() -> Options {
    Options { n_threads: Some(2), isa: Some(fastest()), ..Options::new(2, 70) }
}

/// Two sequences of 65 tokens: more than a block of attention's.
fn ids() -> [Vec<u32>; 2] {
    let all: Vec<u32> = (0..131).map(|i| i * 7919 % 67).collect();
    [all[..130].to_vec(), all[1..].to_vec()]
}

fn pass(trainer: &mut Trainer) -> f64 {
    let [inputs, targets] = ids();
    let batch = Batch { inputs: &inputs, targets: &targets, n_tokens: 65 };
    trainer.accumulate(batch, Pass { step: 1, micro_step: 0, scale: 1.0 }, GO_ON).unwrap()
}

fn tensor<'t>(trainer: &'t Trainer, kind: Kind, name: &str) -> &'t [f32] {
    let tensor = trainer.tensors().iter().find(|tensor| tensor.name == name).expect(name);
    &trainer.values(kind)[tensor.place.clone()]
}

/// With a head equal to `wte`, its gradient and that of `wte` add up to what a tied `wte` has.
#[test]
fn a_head_of_its_own() {
    let mut tied = trainer(&config(""), options());
    let mut untied = trainer(&config(r#""tie_word_embeddings": false"#), options());
    let wte = tensor(&untied, Kind::Weight, "wte.weight").to_vec();
    assert_eq!(wte, tensor(&tied, Kind::Weight, "wte.weight"));
    let place = untied.tensors().last().unwrap().place.clone();
    untied.values_mut(Kind::Weight)[place].copy_from_slice(&wte);
    assert_eq!(pass(&mut tied), pass(&mut untied));
    let sum = tensor(&untied, Kind::Gradient, "wte.weight")
        .iter()
        .zip(tensor(&untied, Kind::Gradient, "lm_head.weight"))
        .map(|(embedding, head)| embedding + head);
    let tied = tensor(&tied, Kind::Gradient, "wte.weight");
    let greatest = tied.iter().fold(0.0f32, |greatest, value| greatest.max(value.abs()));
    assert!(greatest > 0.0);
    for (tied, sum) in tied.iter().zip(sum) {
        // A few roundings: the tied one goes on where the other begins anew.
        assert!((tied - sum).abs() <= 8.0 * f32::EPSILON * greatest, "{tied} for {sum}");
    }
}

/// Biases that are not there count as zeros, are no tensors, and change no other gradient.
#[test]
fn absent_biases() {
    let all = || {
        let mut trainer = trainer(&config(""), options());
        (pass(&mut trainer), trainer)
    };
    let (loss, all) = all();
    for (biases, absent) in [(Biases::NoQkv, 2), (Biases::None, 13)] {
        let mut without = trainer(&config(""), Options { biases, ..options() });
        assert_eq!(pass(&mut without), loss);
        assert_eq!(without.tensors().len(), all.tensors().len() - absent);
        for found in without.tensors() {
            let gradient = tensor(&all, Kind::Gradient, &found.name);
            assert_eq!(&without.values(Kind::Gradient)[found.place.clone()], gradient, "{}", found.name);
        }
        // A checkpoint without them is trained without them.
        let checkpoint = without.to_checkpoint().unwrap();
        let origin = Origin::Checkpoint(&checkpoint);
        let loaded = Trainer::new(config(""), &origin, options()).unwrap();
        assert_eq!(loaded.tensors().len(), without.tensors().len());
        assert_eq!(loaded.values(Kind::Weight), without.values(Kind::Weight));
    }
}

/// What the trainer calls a loss is what the inference model's logits give.
#[test]
fn the_loss_is_that_of_the_model() {
    for changes in ["", r#""activation_function": "relu", "scale_attn_by_inverse_layer_idx": true"#] {
        let config = config(changes);
        let mut trainer = trainer(&config, options());
        let [inputs, targets] = ids();
        let batch = Batch { inputs: &inputs[..65], targets: &targets[..65], n_tokens: 65 };
        let loss = trainer.loss(batch, GO_ON).unwrap();
        let checkpoint: Checkpoint = trainer.to_checkpoint().unwrap();
        let model =
            Model::new(config.clone(), Origin::Checkpoint(&checkpoint), model::Options::default()).unwrap();
        let logits = session::logits(&model, batch.inputs, GO_ON).unwrap();
        let of_row = |(logits, &target): (&[f32], &u32)| -> f64 {
            let total: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
            total.ln() - f64::from(logits[target as usize])
        };
        let expected = logits.chunks(67).zip(batch.targets).map(of_row).sum::<f64>() / 65.0;
        assert!((loss - expected).abs() < 1e-6 * expected, "{loss} for {expected}");
    }
}

#[test]
fn dropout_is_a_function_of_seed_step_and_micro_step() {
    let loss = |seed, step, micro_step| {
        let mut trainer = trainer(&config(""), Options { seed, dropout: 0.3, ..options() });
        let [inputs, targets] = ids();
        let batch = Batch { inputs: &inputs, targets: &targets, n_tokens: 65 };
        trainer.accumulate(batch, Pass { step, micro_step, scale: 1.0 }, GO_ON).unwrap()
    };
    assert_eq!(loss(1, 2, 3), loss(1, 2, 3));
    let others = [loss(1, 2, 3), loss(2, 2, 3), loss(1, 3, 3), loss(1, 2, 4)];
    for (i, other) in others.iter().enumerate() {
        assert!(!others[..i].contains(other));
    }
    // An evaluation drops nothing.
    let [inputs, targets] = ids();
    let batch = Batch { inputs: &inputs, targets: &targets, n_tokens: 65 };
    let evaluate =
        |dropout| trainer(&config(""), Options { dropout, ..options() }).loss(batch, GO_ON).unwrap();
    assert_eq!(evaluate(0.3), evaluate(0.0));
}

/// Between blocks, as soon as it is wanted; weights stay whole, and after `zero_grad` all is as if nothing had been.
#[test]
fn a_pass_can_be_interrupted() {
    for after in 0..4 {
        let mut interrupted = trainer(&config(""), options());
        let asked = Cell::new(0);
        let proceed = || asked.replace(asked.get() + 1) < after;
        let [inputs, targets] = ids();
        let batch = Batch { inputs: &inputs, targets: &targets, n_tokens: 65 };
        let outcome = interrupted.accumulate(batch, Pass { step: 1, micro_step: 0, scale: 1.0 }, &proceed);
        assert!(matches!(outcome, Err(Error::Cancelled)));
        assert_eq!(asked.get(), after + 1);
        interrupted.zero_grad();
        let mut other = trainer(&config(""), options());
        assert_eq!(pass(&mut interrupted), pass(&mut other));
        assert_eq!(interrupted.values(Kind::Gradient), other.values(Kind::Gradient));
    }
}

/// The bytes that are promised for 124M at 4 x 1024 tokens.
#[test]
fn the_memory_plan_of_124m() {
    let config = Config::preset("gpt2").unwrap();
    let total = |recompute, precision| -> usize {
        let options = Options { recompute, precision, n_threads: Some(2), ..Options::new(4, 1024) };
        memory_plan(&config, &options).unwrap().iter().map(|(_, bytes)| bytes).sum()
    };
    for precision in [Precision::Float32, Precision::Bfloat16] {
        let (kept, computed_again) = (total(false, precision), total(true, precision));
        println!("{precision:?}: {kept} bytes, with recomputation {computed_again}");
        assert!(kept < 8 << 30, "{kept}");
        assert!(computed_again < 5 << 30 && computed_again < kept, "{computed_again}");
    }
}

#[test]
fn what_is_out_of_range_is_refused() {
    let config = config("");
    let refused = |options: Options| Trainer::new(config.clone(), &Origin::Random { seed: 1 }, options).err();
    for (options, setting) in [
        (Options { batch_size: 0, ..options() }, "batch_size"),
        (Options { n_tokens: 0, ..options() }, "n_tokens"),
        (Options { n_tokens: 71, ..options() }, "n_tokens"),
        (Options { dropout: 1.0, ..options() }, "dropout"),
        (Options { dropout: f32::NAN, ..options() }, "dropout"),
    ] {
        let error = refused(options).expect("refused").to_string();
        assert!(error.starts_with(setting), "{error}");
    }
    let mut trainer = trainer(&config, options());
    let ids = [0u32; 210];
    let mut wrong = |inputs: &[u32], targets: &[u32], n_tokens| {
        trainer.loss(Batch { inputs, targets, n_tokens }, GO_ON).unwrap_err().to_string()
    };
    assert!(wrong(&ids, &ids, 70).contains("sequences"));
    assert!(wrong(&ids[..100], &ids[..100], 100).contains("tokens"));
    assert!(wrong(&ids[..65], &ids[..64], 65).contains("targets"));
    assert!(wrong(&[], &[], 1).contains("sequences"));
    assert!(wrong(&[67; 3], &[0; 3], 3).contains("67"));
    let good = Update { lr: 0.1, step: 1, betas: (0.9, 0.95), eps: 1e-8, weight_decay: 0.1, max_norm: None };
    for (update, setting) in [
        (Update { lr: -0.1, ..good }, "lr"),
        (Update { lr: f64::NAN, ..good }, "lr"),
        (Update { step: 0, ..good }, "step"),
        (Update { betas: (0.9, 1.0), ..good }, "betas"),
        (Update { eps: -1.0, ..good }, "eps"),
        (Update { weight_decay: f64::INFINITY, ..good }, "weight_decay"),
        (Update { max_norm: Some(0.0), ..good }, "max_norm"),
    ] {
        let error = trainer.update(update).unwrap_err().to_string();
        assert!(error.starts_with(setting), "{error}");
    }
}

/// A loss that is not a number is given as such, and its gradients move nothing.
#[test]
fn what_is_not_finite_moves_nothing() {
    let case = Case::open("training_plain");
    let mut trainer = case.trainer(case.options());
    trainer.values_mut(Kind::Weight)[0] = f32::NAN;
    let [mut inputs, targets] = case.batch(0);
    inputs[0] = 0;
    let batch = Batch { inputs: &inputs, targets: &targets, n_tokens: 64 };
    let loss = trainer.accumulate(batch, Pass { step: 1, micro_step: 0, scale: 1.0 }, GO_ON).unwrap();
    assert!(loss.is_nan());
    let bits =
        |trainer: &Trainer| trainer.values(Kind::Weight).iter().map(|w| w.to_bits()).collect::<Vec<_>>();
    let before = bits(&trainer);
    let update =
        Update { lr: 0.1, step: 1, betas: (0.9, 0.95), eps: 1e-8, weight_decay: 0.1, max_norm: Some(1.0) };
    assert!(!trainer.update(update).unwrap().is_finite());
    assert_eq!(bits(&trainer), before);
    assert!(trainer.values(Kind::ExpAvg).iter().chain(trainer.values(Kind::Gradient)).all(|&v| v == 0.0));
}
