//! Token and position embeddings: `x = wte[token] + wpe[position]`.

use super::matmul::{NR, Panels};
use crate::simd::Element;

/// Row `token` of the (V, C) embedding that is packed as the LM head's (C, V) matrix, plus `wpe`'s row of C values.
///
/// # Panics
/// When the token is not in the vocabulary.
pub fn embed<W: Element, P: Element>(wte: Panels<'_, W>, token: usize, wpe: &[P], out: &mut [f32]) {
    let (panel, lane) = (token / NR, token % NR);
    assert!(token < wte.n());
    for ((out, row), position) in out.iter_mut().zip(wte.panel(panel)).zip(wpe) {
        *out = row[lane].to_f32() + position.to_f32();
    }
}
