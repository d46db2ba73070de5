//! Dropout's masks, and AdamW.

use super::*;
use gpt2rs::ops::Rows;
use gpt2rs::ops::adamw::{AdamW, BLOCK, Rule, SquareSums};
use gpt2rs::ops::dropout::{Drop, Dropout, GROUP, Mask, Place};

fn mask(seed: u64, step: u32, micro_step: u32, rate: f32, place: Place) -> Mask {
    Dropout { seed, step, micro_step, rate }.mask(place).unwrap()
}

fn factors(mask: Mask, groups: u64) -> Vec<f32> {
    (0..groups).flat_map(|group| mask.factors(group * GROUP as u64).as_flattened().to_vec()).collect()
}

/// The share of zeros within five standard errors, and the others such that the mean stays 1.
#[test]
fn as_many_are_dropped_as_asked() {
    for rate in [0.01f32, 0.1, 0.5, 0.9] {
        let factors = factors(mask(7, 3, 0, rate, Place::Mlp(11)), 4000);
        let n = factors.len() as f64;
        let dropped = factors.iter().filter(|&&factor| factor == 0.0).count() as f64 / n;
        let rate64 = f64::from(rate);
        let error = (rate64 * (1.0 - rate64) / n).sqrt();
        assert!((dropped - rate64).abs() < 5.0 * error, "{dropped} for {rate}");
        assert!(factors.iter().all(|&factor| factor == 0.0 || factor == 1.0 / (1.0 - rate)));
        // Neighbours are dropped independently: by pairs, too.
        let both = factors.windows(2).filter(|pair| pair[0] == 0.0 && pair[1] == 0.0).count() as f64 / n;
        assert!((both - rate64 * rate64).abs() < 8.0 * error, "{both} pairs for {rate}");
    }
    assert!(Dropout { seed: 1, step: 1, micro_step: 1, rate: 0.0 }.mask(Place::Embedding).is_none());
}

#[test]
fn every_key_and_place_has_a_mask_of_its_own() {
    let places =
        [Place::Embedding, Place::Attention(0), Place::Attended(0), Place::Mlp(0), Place::Attention(1)];
    let mut masks: Vec<Vec<f32>> = places.map(|place| factors(mask(1, 1, 1, 0.5, place), 2)).to_vec();
    for (seed, step, micro_step) in [(2, 1, 1), (1 << 40, 1, 1), (1, 2, 1), (1, 1, 2)] {
        masks.push(factors(mask(seed, step, micro_step, 0.5, Place::Embedding), 2));
    }
    masks.push(mask(1, 1, 1, 0.5, Place::Embedding).factors(1 << 40).as_flattened().repeat(2));
    for (i, mask) in masks.iter().enumerate() {
        assert!(!masks[..i].contains(mask), "mask {i} is another's");
    }
}

/// Row i has the indices from i times its padded length on, whichever rows are computed together.
#[test]
fn rows_are_dropped_by_their_numbers() {
    let (rows, c, stride) = (5, 70, 75);
    let (y, residual) = (Random(1).values(rows * c, 1.0), Random(2).values(rows * c, 1.0));
    let mask = mask(3, 1, 0, 0.4, Place::Attended(2));
    let (held, held_residual) = (spread(&y, c, stride), spread(&residual, c, stride));
    let found = on_every_isa(|isa| {
        let mut out = spread(&y, c, stride);
        for (first, range) in [(0, 0..2 * stride), (2, 2 * stride..5 * stride)] {
            let out = &mut out[range];
            let y = Rows::new(&held, stride, c).rows_from(first);
            let residual = Some(Rows::new(&held_residual, stride, c).rows_from(first));
            isa.run(Drop { y, residual, mask: Some(mask), first, out, stride });
        }
        gather(&out, c, stride)
    });
    for (i, &found) in found.iter().enumerate() {
        let (row, column) = (i / c, i % c);
        let index = row * 128 + column;
        let factor = mask.factors((index / GROUP * GROUP) as u64).as_flattened()[index % GROUP];
        assert_eq!(found, residual[i] + y[i] * factor, "row {row}, column {column}");
    }
}

/// Every value follows the rule: three steps against float64.
#[test]
fn adamw() {
    let n = 53;
    let mut random = Random(4);
    let mut weights = random.values(n, 1.0);
    let (mut m, mut v) = (vec![0.0; n], vec![0.0; n]);
    let mut exact: Vec<[f64; 3]> = weights.iter().map(|&w| [f64::from(w), 0.0, 0.0]).collect();
    for step in 1..=3 {
        let gradients = random.values(n, 2.0);
        let (beta1, beta2, lr, eps, decay, clip) = (0.9f64, 0.95f64, 0.01f64, 1e-8f64, 0.1f64, 0.7f64);
        let (left1, left2) = (1.0 - beta1.powi(step), 1.0 - beta2.powi(step));
        for ([w, m, v], &g) in exact.iter_mut().zip(&gradients) {
            let g = f64::from(g) * clip;
            *m = beta1 * *m + (1.0 - beta1) * g;
            *v = beta2 * *v + (1.0 - beta2) * g * g;
            *w = *w * (1.0 - lr * decay) - lr * (*m / left1) / ((*v / left2).sqrt() + eps);
        }
        let rule = Rule {
            first: [beta1 as f32, (1.0 - beta1) as f32],
            second: [beta2 as f32, (1.0 - beta2) as f32],
            gradient_scale: clip as f32,
            step_size: (lr / left1) as f32,
            deviation_scale: (1.0 / left2.sqrt()) as f32,
            eps: eps as f32,
            decay: (1.0 - lr * decay) as f32,
        };
        let found = on_every_isa(|isa| {
            let (mut weights, mut m, mut v) = (weights.clone(), m.clone(), v.clone());
            let mut gradients = gradients.clone();
            isa.run(AdamW {
                rule,
                gradients: &mut gradients,
                weights: &mut weights,
                exp_avg: &mut m,
                exp_avg_sq: &mut v,
            });
            assert!(gradients.iter().all(|&gradient| gradient == 0.0));
            [weights, m, v].concat()
        });
        weights = found[..n].to_vec();
        m = found[n..2 * n].to_vec();
        v = found[2 * n..].to_vec();
        // A dozen roundings a step, of values below 2.
        for (i, [w, ..]) in exact.iter().enumerate() {
            assert!((f64::from(weights[i]) - w).abs() < 2.0 * gamma(12 * step as usize), "weight {i}");
        }
    }
}

#[test]
fn sums_of_squares() {
    let values = Random(8).values(2 * BLOCK + 77, 3.0);
    let found = on_every_isa(|isa| {
        let mut sums = vec![FORBIDDEN; 3];
        isa.run(SquareSums { values: &values, sums: &mut sums });
        sums
    });
    for (block, found) in values.chunks(BLOCK).zip(found) {
        let exact: f64 = block.iter().map(|&value| f64::from(value).powi(2)).sum();
        assert!((f64::from(found) - exact).abs() <= gamma(BLOCK / 16 + 4) * exact);
    }
}
