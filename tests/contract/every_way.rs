//! Threads x instruction set x batch x pieces x cache x mode, all against one reference.

use super::floating_point_mode::{Mode, in_mode};
use super::*;
use std::ops::Range;

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
const DECODED: [Range<usize>; 3] = [0..4, 58..76, 124..134];

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
    fn rows(&self, which: usize, range: Range<usize>) -> &[f32] {
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
                    runs.push(Run { tokens, cache, wanted: 1 });
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

/// The sets that differ in what such a model runs: those with dot products run the kernels of the set that they extend
/// for all else. (`mixed_types_have_one_answer_each` asks every set.)
fn sets(types: Types) -> impl Iterator<Item = Isa> {
    let dots = types != FLOAT32 && types != BFLOAT16;
    let sets = Isa::available().into_iter();
    sets.filter(move |isa| dots || ["portable", "avx2", "avx512"].contains(&isa.name()))
}

/// With the thread counts given: two tests that differ in the weights' type share them.
fn check_everything(json: &str, types: Types, threads: [usize; 3]) {
    let expected = Expected::new(&reference(json, types));
    if types == FLOAT32 || types == BFLOAT16 {
        let tiny = expected.rows(0, 0..1).iter().filter(|logit| logit.is_subnormal()).count();
        assert!(tiny > 0, "no logit could be flushed to zero");
    }
    let checkpoint = checkpoint(json);
    for isa in sets(types) {
        for n_threads in threads {
            for mode in [Mode::Default, Mode::Hostile] {
                // More than two threads share the ways between the two modes, each taking what the other leaves.
                let ways =
                    |way: usize| n_threads <= 2 || (way + mode as usize + n_threads / 3).is_multiple_of(2);
                in_mode(mode, || {
                    let model = packed(&checkpoint, json, types, isa, n_threads);
                    let what = format!("{}, {n_threads} threads, {mode:?}", isa.name());
                    expected.check(&model, ways, &what);
                });
            }
        }
    }
}

#[test]
fn odd_shapes_in_float32() {
    check_everything(ODD, FLOAT32, [1, 2, 5]);
}

#[test]
fn odd_shapes_in_bfloat16() {
    check_everything(ODD, BFLOAT16, [1, 2, 3]);
}

#[test]
fn odd_shapes_in_bfloat16_fast() {
    check_everything(ODD, FAST, [1, 2, 5]);
}

#[test]
fn odd_shapes_in_int8() {
    check_everything(ODD, INT8, [1, 2, 3]);
}

#[test]
fn odd_shapes_in_int4() {
    check_everything(ODD, INT4, [1, 2, 5]);
}

#[test]
fn a_wide_head_in_float32() {
    check_everything(WIDE, FLOAT32, [1, 2, 3]);
}

#[test]
fn a_wide_head_in_bfloat16() {
    check_everything(WIDE, BFLOAT16, [1, 2, 5]);
}

#[test]
fn a_wide_head_in_bfloat16_fast() {
    check_everything(WIDE, FAST, [1, 2, 3]);
}

#[test]
fn a_wide_head_in_int8() {
    check_everything(WIDE, INT8, [1, 2, 5]);
}

#[test]
fn a_wide_head_in_int4() {
    check_everything(WIDE, INT4, [1, 2, 3]);
}
