//! Logits and hidden states of the reference cases, computed by Hugging Face transformers in float64
//! (`tests/golden/make_golden.py`).

use cases::CASES;
use gpt2rs::checkpoint::Checkpoint;
use gpt2rs::config::{Config, Precision};
use gpt2rs::model::{Model, Options};
use gpt2rs::session;
use gpt2rs::simd::Isa;
use gpt2rs::weights::{Dtype, Origin};
use npz::Array;

mod cases;
mod npz;

struct Case {
    name: &'static str,
    config: Config,
    checkpoint: Checkpoint,
    /// (2, T).
    input_ids: Array<i64>,
    /// (2, T, V).
    logits: Array<f64>,
    /// (2, T, C), after `ln_f`.
    hidden: Array<f64>,
}

impl Case {
    fn open(name: &'static str) -> Case {
        let (config, checkpoint) = cases::open(name);
        let expected = cases::folder(name).join("expected.npz");
        Case {
            name,
            config,
            checkpoint,
            input_ids: Array::read(&expected, "input_ids", "<i8"),
            logits: Array::read(&expected, "logits", "<f8"),
            hidden: Array::read(&expected, "hidden", "<f8"),
        }
    }

    fn model(&self, isa: Isa, dtype: Dtype) -> Model {
        self.model_with(Options { dtype, isa: Some(isa), kv_dtype: Some(Dtype::F32), ..Options::default() })
    }

    fn model_with(&self, options: Options) -> Model {
        let options = Options { n_threads: Some(2), ..options };
        Model::new(self.config.clone(), Origin::Checkpoint(&self.checkpoint), options).unwrap()
    }

    /// Of both sequences, one after the other: logits and hidden states.
    fn compute(&self, model: &Model) -> (Vec<f32>, Vec<f32>) {
        let (mut logits, mut hidden) = (Vec::new(), Vec::new());
        for i in 0..self.input_ids.shape[0] {
            let tokens: Vec<u32> =
                self.input_ids.of_sequence(i).iter().map(|&id| id.try_into().unwrap()).collect();
            logits.extend(session::logits(model, &tokens, &|| true).unwrap());
            hidden.extend(session::hidden_states(model, &tokens, &|| true).unwrap());
        }
        (logits, hidden)
    }

    /// The error that float32 may make, as a part of the greatest magnitude.
    ///
    /// A chain of K fused multiply-adds errs by at most K u sum |a b|, and in all likelihood by sqrt(K) u sum |a b|, for
    /// roundings go either way (Higham and Mary, "A New Approach to Probabilistic Rounding Error Analysis", SIAM J. Sci.
    /// Comput. 41, 2019); with terms of either sign, sum |a b| is about sqrt(K) times the magnitude of the sum, so that
    /// each chain errs by K u of its result. A token passes four chains a block, of n_embd, the positions attended to and
    /// n_inner terms, and `last` more at the end. What one of them errs by the next one's LayerNorm passes on as it is,
    /// relative to its row.
    fn bound(&self, last: usize) -> f64 {
        const UNIT: f64 = 1.0 / (1 << 24) as f64;
        let Config { n_layer, n_embd, n_inner, .. } = self.config;
        let terms = n_layer * (3 * n_embd + n_inner + self.input_ids.shape[1]) + last;
        terms as f64 * UNIT
    }

    fn check_against(&self, what: &str, found: &[f32], expected: &[f64], bound: f64) {
        assert_eq!(found.len(), expected.len(), "{}: {what}", self.name);
        let greatest = expected.iter().fold(0.0f64, |greatest, value| greatest.max(value.abs()));
        for (i, (&found, &expected)) in found.iter().zip(expected).enumerate() {
            let error = (f64::from(found) - expected).abs() / greatest;
            assert!(
                error <= bound,
                "{}: {what} {i} is {found}, not {expected}: off by {error:e} of {greatest}, above {bound:e}",
                self.name
            );
        }
    }
}

/// The likeliest token after each, wherever the reference's two greatest logits are further apart than the bound.
fn check_greedy(case: &Case, logits: &[f32]) {
    let greatest = case.logits.values.iter().fold(0.0f64, |greatest, value| greatest.max(value.abs()));
    let apart = 2.0 * greatest * case.bound(2 * case.config.n_embd);
    let v = case.config.n_vocab;
    let mut decided = 0;
    for (expected, found) in case.logits.values.chunks_exact(v).zip(logits.chunks_exact(v)) {
        let likeliest = (0..v).max_by(|&a, &b| expected[a].total_cmp(&expected[b])).unwrap();
        let second =
            (0..v).filter(|&i| i != likeliest).map(|i| expected[i]).fold(f64::NEG_INFINITY, f64::max);
        if expected[likeliest] - second > apart {
            decided += 1;
            let chosen = (0..v).max_by(|&a, &b| found[a].total_cmp(&found[b])).unwrap();
            assert_eq!(chosen, likeliest, "{}", case.name);
        }
    }
    assert!(decided * v * 10 >= logits.len() * 9, "{}: most rows have one likeliest token", case.name);
}

/// Checks a case on every instruction set, and that all of them give the same bits.
fn check(case: &Case, dtype: Dtype) -> (Vec<f32>, Vec<f32>) {
    let mut answers = Isa::available().into_iter().map(|isa| case.compute(&case.model(isa, dtype)));
    let first = answers.next().unwrap();
    // ln_f is a chain of C / 16 terms; the head's is C long.
    let c = case.config.n_embd;
    case.check_against("logit", &first.0, &case.logits.values, case.bound(2 * c));
    case.check_against("hidden", &first.1, &case.hidden.values, case.bound(c));
    check_greedy(case, &first.0);
    for other in answers {
        assert!(first == other, "{}: instruction sets differ", case.name);
    }
    first
}

#[test]
fn every_case_in_float32() {
    for name in CASES {
        check(&Case::open(name), Dtype::F32);
    }
}

/// Weights that are bfloat16 in the file lose nothing when they are held as such: the same bits as in float32.
#[test]
fn bfloat16_weights_are_exact() {
    let case = Case::open("bfloat16");
    assert!(check(&case, Dtype::BF16) == check(&case, Dtype::F32));
}

/// A wrong weight shows: the bound is not so wide that it would pass for a rounding error.
#[test]
fn the_bound_is_narrow() {
    for name in CASES {
        let case = Case::open(name);
        assert!(case.bound(2 * case.config.n_embd) < 2e-4, "{name}: {:e}", case.bound(0));
    }
}

/// How far logits are from the reference's: the root of the mean square of the differences, as a part of the reference's
/// spread over the vocabulary (both without each row's mean, which no probability depends on); and the mean over the
/// tokens of the KL divergence from the reference's distribution, in nats.
fn distance(case: &Case, logits: &[f32]) -> (f64, f64) {
    let v = case.config.n_vocab;
    let rows = case.logits.values.chunks_exact(v).zip(logits.chunks_exact(v));
    let (mut square, mut spread, mut divergence) = (0.0, 0.0, 0.0);
    for (expected, found) in rows {
        let found: Vec<f64> = found.iter().map(|&logit| f64::from(logit)).collect();
        let centred = |row: &[f64]| -> Vec<f64> {
            let mean = row.iter().sum::<f64>() / v as f64;
            row.iter().map(|logit| logit - mean).collect()
        };
        let log_total = |row: &[f64]| row.iter().map(|logit| logit.exp()).sum::<f64>().ln();
        let (expected, found) = (centred(expected), centred(&found));
        let (p_total, q_total) = (log_total(&expected), log_total(&found));
        for (p, q) in expected.iter().zip(&found) {
            square += (p - q).powi(2);
            spread += p.powi(2);
            divergence += (p - p_total).exp() * ((p - p_total) - (q - q_total));
        }
    }
    ((square / spread).sqrt(), divergence / (logits.len() / v) as f64)
}

/// Narrow types lose what their steps are wide, and no more: the bounds are half above the worst that these cases,
/// whose random weights pass errors on more than trained ones do, were seen to give when the types were new.
#[test]
fn narrow_types_stay_near_the_reference() {
    let exact = Options::default();
    let bfloat16 = Options { dtype: Dtype::BF16, ..exact };
    let kinds = [
        ("bfloat16", bfloat16, 0.033, 4.2e-4),
        ("bfloat16, fast", Options { precision: Precision::Fast, ..bfloat16 }, 0.057, 1.2e-3),
        ("int8", Options { dtype: Dtype::Int8, ..exact }, 0.12, 9e-3),
        ("float32, int8 cache", Options { kv_dtype: Some(Dtype::Int8), ..exact }, 0.066, 2.1e-3),
        ("int4", Options { dtype: Dtype::Int4, ..exact }, 0.68, 0.29),
    ];
    for name in CASES {
        let case = Case::open(name);
        for (kind, options, most_difference, most_divergence) in kinds {
            let (logits, _) = case.compute(&case.model_with(options));
            let (difference, divergence) = distance(&case, &logits);
            println!("{name}, {kind}: {difference:.4} of the spread, {divergence:.2e} nats");
            assert!(difference <= most_difference, "{name}, {kind}: {difference} of the spread");
            assert!(divergence <= most_divergence, "{name}, {kind}: {divergence} nats");
        }
    }
}
