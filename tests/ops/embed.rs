//! `wte[token] + wpe[position]`.

use super::*;
use gpt2rs::ops::embed::embed;
use gpt2rs::ops::matmul::{NR, Panels};
use gpt2rs::simd::Element;
use half::bf16;
use proptest::prelude::*;

/// A (V, C) embedding in the panels of its transpose.
fn pack<W: Element>(wte: &[f32], c: usize) -> Vec<W> {
    let mut packed = vec![W::from_f32(FORBIDDEN); Panels::<W>::packed_len(c, wte.len() / c)];
    for (token, row) in wte.chunks_exact(c).enumerate() {
        for (channel, &value) in row.iter().enumerate() {
            packed[token / NR * c * NR + channel * NR + token % NR] = W::from_f32(value);
        }
    }
    packed
}

fn check<W: Element>(wte: &[f32], c: usize, wpe: &[f32]) {
    let packed = pack::<W>(wte, c);
    let panels = Panels::new(&packed, c, wte.len() / c);
    for (token, row) in wte.chunks_exact(c).enumerate() {
        let mut out = vec![FORBIDDEN; c];
        embed(panels, token, wpe, &mut out);
        let expected: Vec<f32> = row.iter().zip(wpe).map(|(&t, &p)| W::from_f32(t).to_f32() + p).collect();
        assert_eq!(bits(&out), bits(&expected), "token {token}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_token(c in 1usize..=80, v in 1usize..=100, seed: u64) {
        let mut random = Random(seed);
        let (wte, wpe) = (random.values(v * c, 1.0), random.values(c, 1.0));
        check::<f32>(&wte, c, &wpe);
        check::<bf16>(&wte, c, &wpe);
    }
}

/// 33 tokens take two panels of 32 lanes: lanes that exist without a token must not pass for one.
#[test]
#[should_panic(expected = "assertion failed")]
fn a_token_beyond_the_vocabulary_is_refused() {
    let packed = pack::<f32>(&[0.0; 33], 1);
    embed(Panels::new(&packed, 1, 33), 33, &[0.0f32], &mut [0.0]);
}
