//! `(x - mean) / sqrt(variance + eps) * weight + bias`.

use super::*;
use gpt2rs::ops::Rows;
use gpt2rs::ops::layernorm::LayerNorm;
use gpt2rs::simd::LANES;
use proptest::prelude::*;

struct Case {
    c: usize,
    /// (rows, C).
    x: Vec<f32>,
    weight: Vec<f32>,
    bias: Vec<f32>,
    eps: f32,
}

impl Case {
    fn compute(&self, isa: Isa) -> Vec<f32> {
        let (x_stride, out_stride) = (self.c + 2, self.c + 3);
        let x = spread(&self.x, self.c, x_stride);
        let mut out = spread(&vec![0.0; self.x.len()], self.c, out_stride);
        let x = Rows::new(&x, x_stride, self.c);
        let Case { weight, bias, eps, .. } = self;
        isa.run(LayerNorm { x, weight, bias, eps: *eps, out: &mut out, out_stride });
        gather(&out, self.c, out_stride)
    }

    /// (value, bound) of each output of a row.
    ///
    /// With C values in 16 lanes, a sum has depth d = ceil(C / 16) + 4 (the tree).
    /// - mean: d roundings, one of 1/C, one of the product: `delta = gamma_{d+2} sum |x| / C`.
    /// - difference: `e_i = delta + u (|x_i - mean| + delta)`.
    /// - variance: `sum (2 |x_i - mean| e_i + e_i^2) / C`, and gamma_{d+2} of the sum of the squares found.
    /// - 1/sqrt(variance + eps): a relative error r of its argument becomes (1 - r)^-1/2 - 1; then three roundings.
    /// - the product of both, one rounding; with weight and bias one more.
    fn expected(&self, x: &[f32]) -> Vec<(f64, f64)> {
        let c = x.len() as f64;
        let depth = x.len().div_ceil(LANES) + 4;
        let mean = x.iter().map(|&x| f64::from(x)).sum::<f64>() / c;
        let delta = gamma(depth + 2) * x.iter().map(|&x| f64::from(x).abs()).sum::<f64>() / c;
        let differences: Vec<(f64, f64)> =
            x.iter().map(|&x| f64::from(x) - mean).map(|d| (d, delta + UNIT * (d.abs() + delta))).collect();
        let variance = differences.iter().map(|(d, _)| d * d).sum::<f64>() / c;
        let from_differences = differences.iter().map(|(d, e)| 2.0 * d.abs() * e + e * e).sum::<f64>() / c;
        let variance_error = from_differences + gamma(depth + 2) * (variance + from_differences);
        let squared = variance + f64::from(self.eps);
        let r = variance_error / squared;
        assert!(r < 0.5, "the bound says nothing");
        let inverse = 1.0 / squared.sqrt();
        let inverse_error = inverse * ((1.0 - r).powf(-0.5) * (1.0 + gamma(3)) - 1.0);
        let outputs = differences.iter().zip(self.weight.iter().zip(&self.bias));
        outputs
            .map(|((d, e), (&weight, &bias))| {
                let (weight, bias) = (f64::from(weight), f64::from(bias));
                let normed = d * inverse;
                let normed_error =
                    (d.abs() + e) * (inverse + inverse_error) * (1.0 + UNIT) - d.abs() * inverse;
                let magnitude = weight.abs() * (normed.abs() + normed_error) + bias.abs();
                (normed * weight + bias, weight.abs() * normed_error + UNIT * magnitude + UNIT * TINY)
            })
            .collect()
    }

    fn check(&self) {
        let results = on_every_isa(|isa| self.compute(isa));
        for (x, results) in self.x.chunks_exact(self.c).zip(results.chunks_exact(self.c)) {
            for (i, (&result, (value, bound))) in results.iter().zip(self.expected(x)).enumerate() {
                let error = (f64::from(result) - value).abs();
                assert!(error <= bound, "channel {i}: {result} for {value}: {error:e} above {bound:e}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_row(
        rows in 1usize..=6,
        c in 1usize..=300,
        eps in prop::sample::select(vec![1e-3f32, 1e-5, 1e-6]),
        offset in -4.0f32..4.0,
        scale in prop::sample::select(vec![0.1f32, 1.0, 100.0]),
        seed: u64,
    ) {
        let mut random = Random(seed);
        let x = random.values(rows * c, scale).into_iter().map(|x| x + offset).collect();
        let case = Case { c, x, weight: random.values(c, 2.0), bias: random.values(c, 1.0), eps };
        case.check();
        for (row, x) in case.x.chunks_exact(c).enumerate() {
            let alone = Case { x: x.to_vec(), weight: case.weight.clone(), bias: case.bias.clone(), ..case };
            for isa in Isa::available() {
                prop_assert_eq!(bits(&case.compute(isa)[row * c..][..c]), bits(&alone.compute(isa)));
            }
        }
    }
}

/// A constant row of values whose sum is exact has variance 0: the result is the bias.
#[test]
fn a_constant_row_gives_the_bias() {
    for c in [1, 2, 16, 64, 256] {
        let bias = Random(c as u64).values(c, 1.0);
        let case = Case { c, x: vec![3.0; c], weight: vec![2.0; c], bias: bias.clone(), eps: 1e-12 };
        assert_eq!(bits(&on_every_isa(|isa| case.compute(isa))), bits(&bias));
    }
}
