//! `wte[token] + wpe[position]`.

use super::*;
use gpt2rs::ops::embed::embed;
use gpt2rs::ops::pairs::{Bf16, F32};
use gpt2rs::ops::panels::{Int4Groups, Int8Groups};
use proptest::prelude::*;

/// A (V, C) embedding in the panels of its transpose.
fn pack_transposed<F: Format>(wte: &[f32], c: usize) -> Vec<Line> {
    let transposed: Vec<f32> = (0..c).flat_map(|channel| wte[channel..].iter().step_by(c)).copied().collect();
    pack::<F>(&transposed, c, wte.len() / c)
}

fn check<F: Format>(wte: &[f32], c: usize, wpe: &[f32]) {
    let v = wte.len() / c;
    let packed = pack_transposed::<F>(wte, c);
    let panels = Panels::<F>::new(bytemuck::cast_slice(&packed), c, v);
    let held = held(panels);
    for token in 0..v {
        let mut out = vec![FORBIDDEN; c];
        embed(panels, token, wpe, &mut out);
        let expected: Vec<f32> = held[token..].iter().step_by(v).zip(wpe).map(|(t, p)| t + p).collect();
        assert_eq!(bits(&out), bits(&expected), "token {token}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_token(c in 1usize..=150, v in 1usize..=100, seed: u64) {
        let mut random = Random(seed);
        let (wte, wpe) = (random.values(v * c, 1.0), random.values(c, 1.0));
        check::<F32>(&wte, c, &wpe);
        check::<Bf16>(&wte, c, &wpe);
        check::<Int8Groups>(&wte, c, &wpe);
        check::<Int4Groups>(&wte, c, &wpe);
    }
}

/// 33 tokens take two panels of 32 lanes: lanes that exist without a token must not pass for one.
#[test]
#[should_panic(expected = "assertion failed")]
fn a_token_beyond_the_vocabulary_is_refused() {
    let packed = pack_transposed::<F32>(&[0.0; 33], 1);
    embed(Panels::<F32>::new(bytemuck::cast_slice(&packed), 1, 33), 33, &[0.0], &mut [0.0]);
}
