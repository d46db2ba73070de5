//! One answer: the logits of a token sequence are the same bits whatever computes them, and however they are come by.
//!
//! One instruction set (portable), one thread and one pass give the reference. Everything else is held against its bits:
//! threads x instruction set x {alone, in a ragged batch of 7} x {one pass, pieces of 1, 7, 64, 65 tokens} x {fresh,
//! forked, truncated cache} x {the caller's floating-point mode}.

use gpt2rs::checkpoint::Checkpoint;
use gpt2rs::config::Config;
use gpt2rs::error::Error;
use gpt2rs::kv_cache::KvCache;
use gpt2rs::model::{MAX_ROWS, Model, Options, Run, Wanted};
use gpt2rs::session::{self, DecodeScratch, Sequence};
use gpt2rs::simd::Isa;
use gpt2rs::weights::{Dtype, Origin};

/// Heads of 20 channels, a partial register; every other size is odd too, and the vocabulary ends inside a panel.
const ODD: &str =
    r#"{"n_layer": 2, "n_head": 3, "n_embd": 60, "n_inner": 100, "n_positions": 256, "vocab_size": 301}"#;
/// One head of GPT-2's own size.
const WIDE: &str = r#"{"n_layer": 1, "n_head": 1, "n_embd": 64, "n_positions": 256, "vocab_size": 96, "activation_function": "gelu"}"#;
/// More positions than rows in a pass.
const LONG: &str = r#"{"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 700, "vocab_size": 40}"#;

const GO_ON: &dyn Fn() -> bool = &|| true;

/// The texts of a ragged batch; the first is the one that is cut into pieces. It crosses two borders of the runs of 64
/// positions, and nine of the blocks of 16.
const LENGTHS: [usize; 7] = [150, 1, 17, 64, 33, 90, 5];
/// Where caches are forked and truncated to: inside a block and inside a run, so that both are shared in part.
const SHARED: usize = 70;
/// Where a cache is truncated from.
const DISCARDED: usize = 101;
/// Tokens of a pass, of the text that is cut.
const PIECES: [usize; 5] = [usize::MAX, 1, 7, 64, 65];
/// Where several threads decode token by token: what lies between takes them five tokens a pass, since threads that
/// outnumber the cores of a machine wait for each other at every barrier.
const DECODED: [std::ops::Range<usize>; 3] = [0..4, 58..76, 124..134];

/// Text `which`: tokens of a small linear congruential generator.
fn text(which: usize, len: usize, n_vocab: usize) -> Vec<u32> {
    let mut state = 12345 + 977 * which as u32;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) % n_vocab as u32
        })
        .collect()
}

/// Weights large enough that attention is far from uniform and that a change in any order of sums shows. The last
/// eight tokens have subnormal embeddings, and so subnormal logits: zero to who flushes them.
fn checkpoint(json: &str) -> Checkpoint {
    let mut state = 1u64;
    let mut values = |len: usize, scale: f32| -> Vec<f32> {
        (0..len)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                ((state >> 40) as f32 / (1 << 23) as f32 - 1.0) * scale
            })
            .collect()
    };
    let Config { n_embd: c, n_vocab, n_ctx, n_inner, n_layer, .. } = Config::from_json(json).unwrap();
    let mut checkpoint = Checkpoint::new();
    let mut add = |name: String, values: Vec<f32>, shape: &[usize]| {
        checkpoint.add_array(&name, values, shape, false).unwrap();
    };
    let mut wte = values(n_vocab * c, 0.3);
    wte[(n_vocab - 8) * c..].iter_mut().for_each(|value| *value *= 1e-38);
    add("wte.weight".into(), wte, &[n_vocab, c]);
    add("wpe.weight".into(), values(n_ctx * c, 0.3), &[n_ctx, c]);
    let norms = (0..n_layer).flat_map(|i| [format!("h.{i}.ln_1"), format!("h.{i}.ln_2")]);
    for name in norms.chain(["ln_f".to_owned()]) {
        add(format!("{name}.weight"), values(c, 1.5), &[c]);
        add(format!("{name}.bias"), values(c, 0.2), &[c]);
    }
    for i in 0..n_layer {
        for (name, k, n) in [
            ("attn.c_attn", c, 3 * c),
            ("attn.c_proj", c, c),
            ("mlp.c_fc", c, n_inner),
            ("mlp.c_proj", n_inner, c),
        ] {
            add(format!("h.{i}.{name}.weight"), values(k * n, 0.5), &[k, n]);
            add(format!("h.{i}.{name}.bias"), values(n, 0.2), &[n]);
        }
    }
    checkpoint
}

fn model(json: &str, dtype: Dtype, kv_dtype: Dtype, isa: Isa, n_threads: usize) -> Model {
    packed(&checkpoint(json), json, dtype, kv_dtype, isa, n_threads)
}

fn packed(
    checkpoint: &Checkpoint,
    json: &str,
    dtype: Dtype,
    kv_dtype: Dtype,
    isa: Isa,
    n_threads: usize,
) -> Model {
    let config = Config::from_json(json).unwrap();
    let options = Options { dtype, kv_dtype: Some(kv_dtype), n_threads: Some(n_threads), isa: Some(isa) };
    Model::new(config, Origin::Checkpoint(checkpoint), options).unwrap()
}

/// The model that gives the reference.
fn reference(json: &str, dtype: Dtype, kv_dtype: Dtype) -> Model {
    model(json, dtype, kv_dtype, Isa::named("portable").unwrap(), 1)
}

fn fastest() -> Isa {
    *Isa::available().last().unwrap()
}

/// `tokens` computed in one pass after what `cache` holds: logits of all, (tokens, V).
fn pass(model: &Model, cache: &mut KvCache, tokens: &[u32]) -> Vec<f32> {
    let mut logits = vec![0.0; tokens.len() * model.config().n_vocab];
    model.forward(&mut [Run { tokens, cache, wanted: true }], Wanted::All(&mut logits), GO_ON).unwrap();
    logits
}

#[track_caller]
fn assert_bits(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let differs = found.iter().zip(expected).position(|(a, b)| a.to_bits() != b.to_bits());
    if let Some(i) = differs {
        panic!("{what}: logit {i} is {:e}, not {:e}", found[i], expected[i]);
    }
}

/// The caller's floating-point mode.
#[derive(Clone, Copy, Debug)]
enum Mode {
    Default,
    /// Flush-to-zero, denormals-are-zero, and rounding up.
    Hostile,
}

/// Runs `work` with the thread in that mode, in which it also starts threads.
#[cfg(target_arch = "x86_64")]
fn in_mode<R>(mode: Mode, work: impl FnOnce() -> R) -> R {
    /// Sets MXCSR, and sets it back to the default also after a panic.
    struct Mxcsr;
    impl Mxcsr {
        const DEFAULT: u32 = 0x1f80;
        fn set(value: u32) -> Mxcsr {
            // SAFETY: ldmxcsr reads the four bytes of a live u32; all exceptions stay masked.
            unsafe { std::arch::asm!("ldmxcsr [{}]", in(reg) &raw const value, options(nostack)) };
            Mxcsr
        }
        fn control() -> u32 {
            let mut value = 0u32;
            // SAFETY: stmxcsr writes the four bytes of a live u32.
            unsafe { std::arch::asm!("stmxcsr [{}]", in(reg) &raw mut value, options(nostack)) };
            value & 0xffc0
        }
    }
    impl Drop for Mxcsr {
        fn drop(&mut self) {
            std::mem::forget(Mxcsr::set(Mxcsr::DEFAULT));
        }
    }
    let value = match mode {
        Mode::Default => Mxcsr::DEFAULT,
        Mode::Hostile => Mxcsr::DEFAULT | 0x8040 | 0x4000,
    };
    let _back = Mxcsr::set(value);
    let result = work();
    assert_eq!(Mxcsr::control(), value, "the caller's floating-point mode is not back");
    result
}

#[cfg(not(target_arch = "x86_64"))]
fn in_mode<R>(_mode: Mode, work: impl FnOnce() -> R) -> R {
    work()
}

/// The reference: texts and the logits of all their tokens, (len, V) each.
struct Expected {
    texts: Vec<Vec<u32>>,
    logits: Vec<Vec<f32>>,
    n_vocab: usize,
}

impl Expected {
    fn new(reference: &Model) -> Expected {
        let n_vocab = reference.config().n_vocab;
        let texts: Vec<Vec<u32>> =
            LENGTHS.iter().enumerate().map(|(i, &len)| text(i, len, n_vocab)).collect();
        let logits = texts.iter().map(|text| pass(reference, &mut reference.new_cache(), text)).collect();
        Expected { texts, logits, n_vocab }
    }

    /// Logits of tokens `range` of a text.
    fn rows(&self, which: usize, range: std::ops::Range<usize>) -> &[f32] {
        &self.logits[which][range.start * self.n_vocab..range.end * self.n_vocab]
    }

    /// The next tokens of the first text, of which `done` are computed.
    fn piece(&self, model: &Model, done: usize, piece: usize) -> &[u32] {
        let left = &self.texts[0][done..];
        let decoded = model.n_threads() == 1 || DECODED.iter().any(|range| range.contains(&done));
        let piece = if piece == 1 && !decoded { 5 } else { piece };
        &left[..piece.min(left.len())]
    }

    /// The first text from where `cache` ends, in pieces, alone: all logits.
    fn check_alone(&self, model: &Model, mut cache: KvCache, piece: usize, what: &str) {
        let start = cache.len();
        let mut logits = Vec::new();
        while cache.len() < LENGTHS[0] {
            let tokens = self.piece(model, cache.len(), piece);
            logits.extend(pass(model, &mut cache, tokens));
        }
        assert_bits(&logits, self.rows(0, start..LENGTHS[0]), what);
    }

    /// The first text from where `cache` ends, in pieces, with pieces of the other texts around it in each pass, until
    /// they end: the logits of each piece's last token.
    fn check_batch(&self, model: &Model, cache: KvCache, piece: usize, what: &str) {
        let mut caches: Vec<KvCache> = (1..7).map(|_| model.new_cache()).collect();
        caches.insert(0, cache);
        while caches[0].len() < LENGTHS[0] {
            let mut runs = Vec::new();
            let mut ends = Vec::new();
            for (which, cache) in caches.iter_mut().enumerate() {
                let tokens = if which == 0 {
                    self.piece(model, cache.len(), piece)
                } else {
                    // The others go at paces of their own: 3, 6, ... tokens a pass.
                    let left = &self.texts[which][cache.len()..];
                    &left[..left.len().min(3 * which)]
                };
                if !tokens.is_empty() {
                    ends.push((which, cache.len() + tokens.len()));
                    runs.push(Run { tokens, cache, wanted: true });
                }
            }
            // Not always first.
            let turn = ends.len() / 2;
            runs.rotate_left(turn);
            ends.rotate_left(turn);
            let mut logits = vec![0.0; runs.len() * self.n_vocab];
            model.forward(&mut runs, Wanted::Last(&mut logits), GO_ON).unwrap();
            for ((which, end), logits) in ends.into_iter().zip(logits.chunks(self.n_vocab)) {
                assert_bits(logits, self.rows(which, end - 1..end), &format!("{what}, text {which}"));
            }
        }
    }

    /// Every way to come by the first text, on one model: of the 6 for each size of pieces, all, or the even or the odd
    /// ones.
    fn check(&self, model: &Model, ways: impl Fn(usize) -> bool, what: &str) {
        let mut shared = model.new_cache();
        let first = pass(model, &mut shared, &self.texts[0][..SHARED]);
        assert_bits(&first, self.rows(0, 0..SHARED), what);

        let mut truncated = shared.clone();
        pass(model, &mut truncated, &text(99, DISCARDED - SHARED, self.n_vocab));
        truncated.truncate(SHARED);

        for (i, piece) in PIECES.into_iter().enumerate() {
            let caches = [("fresh", &model.new_cache()), ("forked", &shared), ("truncated", &truncated)];
            for (j, (name, cache)) in caches.into_iter().enumerate() {
                let what = format!("{what}, {name} cache, pieces of {piece}");
                if ways(i + j) {
                    self.check_alone(model, cache.clone(), piece, &what);
                }
                if ways(i + j + 1) {
                    self.check_batch(model, cache.clone(), piece, &format!("{what}, in a batch"));
                }
            }
        }
        // All those forks left what they share as it was.
        self.check_alone(model, shared, usize::MAX, what);
        self.check_alone(model, truncated, usize::MAX, what);
    }
}

/// With the thread counts given: two tests that differ in the weights' type share them.
fn check_everything(json: &str, dtype: Dtype, threads: [usize; 3]) {
    let expected = Expected::new(&reference(json, dtype, dtype));
    let tiny = expected.rows(0, 0..1).iter().filter(|logit| logit.is_subnormal()).count();
    assert!(tiny > 0, "no logit could be flushed to zero");
    let checkpoint = checkpoint(json);
    for isa in Isa::available() {
        for n_threads in threads {
            for mode in [Mode::Default, Mode::Hostile] {
                // More than two threads share the ways between the two modes, each taking what the other leaves.
                let ways =
                    |way: usize| n_threads <= 2 || (way + mode as usize + n_threads / 3).is_multiple_of(2);
                in_mode(mode, || {
                    let model = packed(&checkpoint, json, dtype, dtype, isa, n_threads);
                    let what = format!("{}, {n_threads} threads, {mode:?}", isa.name());
                    expected.check(&model, ways, &what);
                });
            }
        }
    }
}

#[test]
fn odd_shapes_in_float32() {
    check_everything(ODD, Dtype::F32, [1, 2, 5]);
}

#[test]
fn odd_shapes_in_bfloat16() {
    check_everything(ODD, Dtype::BF16, [1, 2, 3]);
}

#[test]
fn a_wide_head_in_float32() {
    check_everything(WIDE, Dtype::F32, [1, 2, 3]);
}

#[test]
fn a_wide_head_in_bfloat16() {
    check_everything(WIDE, Dtype::BF16, [1, 2, 5]);
}

/// float32 weights with a bfloat16 cache, and the other way round: types of their own, with one answer each.
#[test]
fn mixed_types_have_one_answer_each() {
    let tokens = text(0, 120, 301);
    let mut answers = Vec::new();
    for (dtype, kv_dtype) in [
        (Dtype::F32, Dtype::F32),
        (Dtype::F32, Dtype::BF16),
        (Dtype::BF16, Dtype::F32),
        (Dtype::BF16, Dtype::BF16),
    ] {
        let reference = reference(ODD, dtype, kv_dtype);
        assert_eq!((reference.dtype(), reference.kv_dtype()), (dtype, kv_dtype));
        let expected = pass(&reference, &mut reference.new_cache(), &tokens);
        for isa in Isa::available() {
            let model = model(ODD, dtype, kv_dtype, isa, 3);
            let mut cache = model.new_cache();
            let logits: Vec<f32> =
                tokens.chunks(31).flat_map(|tokens| pass(&model, &mut cache, tokens)).collect();
            assert_bits(&logits, &expected, &format!("{dtype:?}, {kv_dtype:?}, {}", isa.name()));
        }
        answers.push(expected);
    }
    for (i, answer) in answers.iter().enumerate() {
        assert!(answers[..i].iter().all(|other| other != answer), "two types that round alike");
    }
}

/// Passes of at most 512 rows: one text that is longer, and a batch that is larger.
#[test]
fn more_rows_than_a_pass_takes() {
    let reference = reference(LONG, Dtype::F32, Dtype::F32);
    let n_vocab = reference.config().n_vocab;
    let long = text(0, 650, n_vocab);
    assert!(long.len() > MAX_ROWS);
    let mut cache = reference.new_cache();
    let expected: Vec<f32> =
        long.chunks(64).flat_map(|tokens| pass(&reference, &mut cache, tokens)).collect();
    let last = &expected[(long.len() - 1) * n_vocab..];
    let mut states = Vec::new();
    for isa in Isa::available() {
        let model = model(LONG, Dtype::F32, Dtype::F32, isa, 2);
        assert_bits(&session::logits(&model, &long, GO_ON).unwrap(), &expected, isa.name());
        states.push(session::hidden_states(&model, &long, GO_ON).unwrap());
        assert_bits(&states[0], states.last().unwrap(), isa.name());

        let texts: Vec<Vec<u32>> =
            [650, 300, 150, 1, 99].iter().enumerate().map(|(i, &len)| text(i, len, n_vocab)).collect();
        let alone: Vec<Vec<f32>> = texts
            .iter()
            .map(|text| {
                let mut sequence = Sequence::new(&model);
                session::prefill(&model, &mut [&mut sequence], &[text], GO_ON).unwrap();
                sequence.logits(&model, GO_ON).unwrap().to_vec()
            })
            .collect();
        assert_bits(&alone[0], last, isa.name());
        let mut batch: Vec<Sequence> = texts.iter().map(|_| Sequence::new(&model)).collect();
        let prompts: Vec<&[u32]> = texts.iter().map(Vec::as_slice).collect();
        session::prefill(&model, &mut batch.iter_mut().collect::<Vec<_>>(), &prompts, GO_ON).unwrap();
        for (sequence, alone) in batch.iter_mut().zip(&alone) {
            assert_bits(sequence.logits(&model, GO_ON).unwrap(), alone, isa.name());
        }
    }
    let state = &states[0];
    assert!(state.len() == long.len() * 16 && state.iter().all(|value| value.is_finite()));
}

/// Scores are log-probabilities of the same logits, also past the rows that are held at a time.
#[test]
fn scores_are_the_logits_log_softmax() {
    let expected = reference(ODD, Dtype::F32, Dtype::F32);
    let tokens = text(3, 150, 301);
    let logits = session::logits(&expected, &tokens, GO_ON).unwrap();
    let first = session::score(&expected, &tokens, GO_ON).unwrap();
    assert_eq!(first.len(), tokens.len() - 1);
    for (i, (row, &score)) in logits.chunks(301).zip(&first).enumerate() {
        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = row.iter().map(|&logit| f64::from(logit - max).exp()).sum();
        let exact = f64::from(row[tokens[i + 1] as usize] - max) - sum.ln();
        // Two roundings of the result; those inside it are of numbers up to ln V and exponentials, 1e-6 of 1.
        let bound = 1.2e-7 * exact.abs() + 1e-6;
        assert!((f64::from(score) - exact).abs() <= bound, "token {i}: {score} for {exact}");
    }
    for isa in Isa::available() {
        for mode in [Mode::Default, Mode::Hostile] {
            let model = model(ODD, Dtype::F32, Dtype::F32, isa, 2);
            let scores = in_mode(mode, || session::score(&model, &tokens, GO_ON).unwrap());
            assert_bits(&scores, &first, isa.name());
        }
    }
}

/// A computation that is stopped before any of its layers leaves the caches as they were.
#[test]
fn a_cancelled_pass_leaves_nothing_behind() {
    let model = model(ODD, Dtype::F32, Dtype::F32, fastest(), 2);
    let tokens = text(0, 100, 301);
    let expected = pass(&model, &mut model.new_cache(), &tokens);
    for layers in 0..model.config().n_layer {
        let mut cache = model.new_cache();
        pass(&model, &mut cache, &tokens[..35]);
        let fork = cache.clone();
        let asked = std::cell::Cell::new(0);
        let proceed = || asked.replace(asked.get() + 1) < layers;
        let mut logits = vec![0.0; 65 * 301];
        let mut runs = [Run { tokens: &text(5, 65, 301), cache: &mut cache, wanted: true }];
        let outcome = model.forward(&mut runs, Wanted::All(&mut logits), &proceed);
        assert!(matches!(outcome, Err(Error::Cancelled)), "{outcome:?}");
        for mut cache in [cache, fork] {
            assert_eq!(cache.len(), 35);
            assert_bits(&pass(&model, &mut cache, &tokens[35..]), &expected[35 * 301..], "afterwards");
        }
    }

    let mut sequence = Sequence::new(&model);
    session::prefill(&model, &mut [&mut sequence], &[&tokens[..35]], GO_ON).unwrap();
    let outcome = session::prefill(&model, &mut [&mut sequence], &[&tokens[35..]], &|| false);
    assert!(matches!(outcome, Err(Error::Cancelled)));
    assert_eq!(sequence.tokens(), &tokens[..35]);
    session::prefill(&model, &mut [&mut sequence], &[&tokens[35..]], GO_ON).unwrap();
    assert_bits(sequence.logits(&model, GO_ON).unwrap(), &expected[99 * 301..], "prefilled again");
}

/// Threads share a model: each gets the answer that it gets alone.
#[test]
fn concurrent_callers_get_their_serial_answers() {
    for n_threads in [1, 2] {
        let model = model(ODD, Dtype::F32, Dtype::F32, fastest(), n_threads);
        let texts: Vec<Vec<u32>> = (0..4).map(|i| text(i, 60 + 20 * i, 301)).collect();
        let serial: Vec<Vec<f32>> =
            texts.iter().map(|text| pass(&model, &mut model.new_cache(), text)).collect();
        std::thread::scope(|scope| {
            for (text, expected) in texts.iter().zip(&serial) {
                let model = &model;
                scope.spawn(move || {
                    for piece in [usize::MAX, 13, 1] {
                        let mut cache = model.new_cache();
                        let logits: Vec<f32> =
                            text.chunks(piece).flat_map(|tokens| pass(model, &mut cache, tokens)).collect();
                        assert_bits(&logits, expected, "one of four threads");
                    }
                });
            }
        });
    }
}

/// Each is an error that names what was found and what is allowed, and leaves sequence and model usable.
#[test]
fn what_does_not_fit_is_refused() {
    let model = model(WIDE, Dtype::F32, Dtype::F32, fastest(), 2);
    let (n_vocab, n_ctx) = (96, 256);
    let tokens = text(0, 20, n_vocab);
    let mut sequence = Sequence::new(&model);
    session::prefill(&model, &mut [&mut sequence], &[&tokens], GO_ON).unwrap();
    let expected = sequence.logits(&model, GO_ON).unwrap().to_vec();

    let outcome = session::prefill(&model, &mut [&mut sequence], &[&[3, 96, 5]], GO_ON);
    assert!(matches!(outcome, Err(Error::TokenOutOfRange { token: 96, n_vocab: 96 })), "{outcome:?}");
    let long = vec![1; n_ctx];
    let outcome = session::prefill(&model, &mut [&mut sequence], &[&long], GO_ON);
    assert!(matches!(outcome, Err(Error::ContextOverflow { wanted: 276, n_ctx: 256 })), "{outcome:?}");
    let outcome = session::prefill(&model, &mut [&mut Sequence::new(&model)], &[&[]], GO_ON);
    assert!(matches!(outcome, Err(Error::EmptySequence)), "{outcome:?}");
    assert_eq!(sequence.tokens(), tokens);
    assert_bits(sequence.logits(&model, GO_ON).unwrap(), &expected, "after errors");

    for tokens in [&[96][..], &[u32::MAX]] {
        let outcome = session::logits(&model, tokens, GO_ON);
        assert!(matches!(outcome, Err(Error::TokenOutOfRange { token, .. }) if token == tokens[0]));
    }
    for compute in [session::logits, session::hidden_states, session::score] {
        assert!(matches!(compute(&model, &[], GO_ON), Err(Error::EmptySequence)));
        let too_long = compute(&model, &vec![0; n_ctx + 1], GO_ON);
        assert!(matches!(too_long, Err(Error::ContextOverflow { wanted: 257, n_ctx: 256 })));
        assert!(compute(&model, &long, GO_ON).is_ok(), "as long as the context");
    }

    let mut full = Sequence::new(&model);
    session::prefill(&model, &mut [&mut full], &[&long], GO_ON).unwrap();
    let greedy = gpt2rs::sample::Sampling::default();
    let outcome = session::decode(&model, &mut [&mut full], &[&greedy], &mut DecodeScratch::default(), GO_ON);
    assert!(matches!(outcome, Err(Error::ContextOverflow { wanted: 257, n_ctx: 256 })), "{outcome:?}");
    full.truncate(0);
    assert!(matches!(full.logits(&model, GO_ON), Err(Error::EmptySequence)));
}
