//! Causal attention of whole sequences, and its gradients.

use super::backward::{assert_near, differences, wide};
use super::*;
use gpt2rs::ops::Rows;
use gpt2rs::ops::dropout::{Dropout, GROUP, Mask, Place};
use gpt2rs::ops::flash_attention::{Head, Scratch};
use gpt2rs::ops::gemm::{self, Precision};
use gpt2rs::pool::Columns;

struct Case {
    tokens: usize,
    hs: usize,
    scale: f32,
    /// (T, 3 HS): queries, keys, values.
    qkv: Vec<f32>,
    /// (T, HS).
    dout: Vec<f32>,
    mask: Option<Mask>,
}

const INDEX: usize = 5;

impl Case {
    fn new(tokens: usize, hs: usize, rate: f32) -> Case {
        let mut random = Random((tokens * hs) as u64);
        let mask = Dropout { seed: 9, step: 2, micro_step: 1, rate }.mask(Place::Attention(1));
        let (qkv, dout) = (random.values(tokens * 3 * hs, 1.5), random.values(tokens * hs, 1.0));
        Case { tokens, hs, scale: 1.0 / (hs as f32).sqrt(), qkv, dout, mask }
    }

    /// What each weight is multiplied by, (T, T).
    fn factors(&self) -> Vec<f64> {
        let padded = self.tokens.next_multiple_of(GROUP);
        let factor = |i: usize| {
            let index = (INDEX * padded + i / self.tokens) * padded + i % self.tokens;
            self.mask.map_or(1.0, |mask| {
                let first = index / GROUP * GROUP;
                f64::from(mask.factors(first as u64).as_flattened()[index - first])
            })
        };
        (0..self.tokens * self.tokens).map(factor).collect()
    }

    /// (T, HS), in float64.
    fn naive(&self, qkv: &[f64], factors: &[f64]) -> Vec<f64> {
        let (t, hs) = (self.tokens, self.hs);
        let part = |row: usize, which: usize| &qkv[(3 * row + which) * hs..][..hs];
        let mut out = vec![0.0; t * hs];
        for row in 0..t {
            let score = |key: usize| -> f64 {
                let dot: f64 = part(row, 0).iter().zip(part(key, 1)).map(|(q, k)| q * k).sum();
                (dot * f64::from(self.scale)).exp()
            };
            let weights: Vec<f64> = (0..=row).map(score).collect();
            let total: f64 = weights.iter().sum();
            for (key, weight) in weights.iter().enumerate() {
                let weight = weight / total * factors[row * t + key];
                for (out, v) in out[row * hs..].iter_mut().zip(part(key, 2)) {
                    *out += weight * v;
                }
            }
        }
        out
    }

    fn head(&self) -> Head<'_> {
        let rows = Rows::new(&self.qkv, 3 * self.hs, 3 * self.hs);
        let part = |which: usize| rows.columns_of(which * self.hs..(which + 1) * self.hs);
        let &Case { tokens, scale, mask, .. } = self;
        Head { q: part(0), k: part(1), v: part(2), tokens, scale, mask, index: INDEX }
    }

    /// Output, then the gradients of queries, keys and values, (T, 3 HS).
    fn compute(&self, isa: Isa, precision: Precision) -> Vec<f32> {
        let (t, hs) = (self.tokens, self.hs);
        let (mut scratch, mut gemm) = (Scratch::new(t, hs), gemm::Scratch::new());
        let (mut out, mut lse) = (vec![FORBIDDEN; t * hs], vec![FORBIDDEN; t]);
        let columns = Columns::split(&mut out, hs, t, [0..hs]).pop().unwrap();
        self.head().forward(isa, precision, columns, &mut lse, &mut scratch, gemm.left());
        let mut dqkv = vec![FORBIDDEN; t * 3 * hs];
        let ranges = [0..hs, hs..2 * hs, 2 * hs..3 * hs];
        let gradients: [Columns<'_>; 3] =
            Columns::split(&mut dqkv, 3 * hs, t, ranges).try_into().ok().expect("three");
        let saved = (Rows::new(&out, hs, hs), &lse[..], Rows::new(&self.dout, hs, hs));
        self.head().backward(isa, precision, saved, gradients, &mut scratch, gemm.left());
        [out, dqkv].concat()
    }
}

/// Chains of HS terms, then of T, each of magnitudes near the result's; the exponential's argument may be 20 and so err by
/// 20 roundings more.
#[test]
fn against_finite_differences() {
    for (tokens, hs, rate) in
        [(1, 4, 0.0), (7, 5, 0.0), (19, 6, 0.3), (66, 3, 0.0), (70, 7, 0.2), (64, 16, 0.5)]
    {
        let case = Case::new(tokens, hs, rate);
        let found = on_every_isa(|isa| case.compute(isa, Precision::Float32));
        let (factors, qkv, dout) = (case.factors(), wide(&case.qkv), wide(&case.dout));
        let (out, gradients) = found.split_at(tokens * hs);
        let bound = gamma(tokens + hs + 64);
        assert_near(out, &case.naive(&qkv, &factors), bound, "output");
        let loss = |qkv: &[f64]| case.naive(qkv, &factors).iter().zip(&dout).map(|(a, b)| a * b).sum();
        assert_near(gradients, &differences(&qkv, loss), bound, "gradient");
    }
}

/// Several blocks of keys, against one: the last rows of a longer sequence see everything.
#[test]
fn blocks_are_merged() {
    let case = Case::new(200, 20, 0.1);
    let found = on_every_isa(|isa| case.compute(isa, Precision::Float32));
    let expected = case.naive(&wide(&case.qkv), &case.factors());
    assert_near(&found[..expected.len()], &expected, gamma(284), "output");
}

/// The same bits on every instruction set, and near: each factor is rounded to eight bits.
#[test]
fn bfloat16_factors() {
    let case = Case::new(90, 12, 0.0);
    let found = on_every_isa(|isa| case.compute(isa, Precision::Bfloat16));
    let exact = wide(&case.compute(*Isa::available().last().unwrap(), Precision::Float32));
    assert_near(&found[..90 * 12], &exact[..90 * 12], 0.02, "output");
    assert_near(&found[90 * 12..], &exact[90 * 12..], 0.05, "gradient");
}
