//! Losses, gradients and weights are the same bits on any number of threads and every instruction set, with and without
//! recomputation, and in any company.

use super::golden::{CASES, Case};
use super::*;
use gpt2rs::simd::Isa;
use gpt2rs::train::{Precision, Update};

const UPDATE: Update =
    Update { lr: 1e-3, step: 1, betas: (0.9, 0.95), eps: 1e-8, weight_decay: 0.1, max_norm: Some(1.0) };

/// Two micro-batches, and a step: the losses, the norm and all values.
fn run(case: &Case, options: Options) -> (Vec<u64>, Vec<u32>) {
    let mut trainer = case.trainer(options);
    let mut numbers = Vec::new();
    for micro_step in 0..2 {
        let [inputs, targets] = case.batch(micro_step);
        let batch = Batch { inputs: &inputs, targets: &targets, n_tokens: options.n_tokens };
        let pass = Pass { step: 1, micro_step: micro_step as u32, scale: 0.5 };
        numbers.push(trainer.accumulate(batch, pass, GO_ON).unwrap().to_bits());
    }
    let mut values: Vec<u32> = trainer.values(Kind::Gradient).iter().map(|value| value.to_bits()).collect();
    numbers.push(trainer.update(UPDATE).unwrap().to_bits());
    for kind in [Kind::Weight, Kind::ExpAvg, Kind::ExpAvgSq] {
        values.extend(trainer.values(kind).iter().map(|value| value.to_bits()));
    }
    assert!(trainer.values(Kind::Gradient).iter().all(|&value| value == 0.0));
    (numbers, values)
}

#[test]
fn threads_instruction_sets_and_recomputation_change_nothing() {
    for name in CASES {
        let case = Case::open(name);
        for precision in [Precision::Float32, Precision::Bfloat16] {
            for dropout in [0.0, 0.2] {
                let options = Options { precision, dropout, seed: 3, ..case.options() };
                let reference =
                    run(&case, Options { isa: Some(Isa::available()[0]), n_threads: Some(1), ..options });
                for isa in Isa::available().into_iter().map(Some) {
                    let same = run(&case, Options { isa, ..options }) == reference;
                    assert!(
                        same,
                        "{name}, {precision:?}, dropout {dropout}: {} differs",
                        isa.unwrap().name()
                    );
                }
                for (n_threads, recompute) in [(1, true), (2, true), (5, false), (5, true)] {
                    let n_threads = Some(n_threads);
                    let same = run(&case, Options { n_threads, recompute, ..options }) == reference;
                    assert!(same, "{name}, {precision:?}, dropout {dropout}: {n_threads:?}, {recompute}");
                }
            }
        }
    }
}

/// A sequence's loss without dropout does not depend on what else is in the batch, nor on the room that was planned.
#[test]
fn sequences_do_not_mix() {
    let case = Case::open("training_odd");
    let [inputs, targets] = case.batch(0);
    let n_tokens = case.options().n_tokens;
    let mut whole = case.trainer(case.options());
    let all = whole.loss(Batch { inputs: &inputs, targets: &targets, n_tokens }, GO_ON).unwrap();
    let mut alone = case.trainer(Options { batch_size: 1, ..case.options() });
    let sequences = inputs.chunks(n_tokens).zip(targets.chunks(n_tokens));
    let one_by_one = |trainer: &mut Trainer| -> Vec<f64> {
        let loss = |(inputs, targets)| trainer.loss(Batch { inputs, targets, n_tokens }, GO_ON).unwrap();
        sequences.clone().map(loss).collect()
    };
    let losses = one_by_one(&mut alone);
    assert_eq!(losses, one_by_one(&mut whole));
    assert!((losses.iter().sum::<f64>() / 3.0 - all).abs() < 1e-12);
}
